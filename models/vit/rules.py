"""How the Vision Transformer lies on a mesh: one table for every mesh.

C channels, p a patch's rows and columns, Y and X the image's, D model width, F feed-forward width, H heads, hd a
head's width, B batch, T tokens (196 patches and a class token: 197 is prime, so tp splits heads and features only),
K classes.
"""

import shardspec as ss

RULES = ss.Rules(
    params={
        r"patch_embed\.proj\.weight": "D@fsdp C p p",
        r"patch_embed\.proj\.bias": "D@fsdp",
        r"cls_token": "1 1 D@fsdp",
        r"pos_embed": "1 T D@fsdp",
        # Queries, keys and values below one another: each split over its heads. Storage cuts rows into
        # consecutive slices, which cannot be said of rows that lie in three pieces, so it divides the columns.
        r"blocks\.\d+\.attn\.qkv\.weight": "(3 H@tp hd) D@fsdp",
        r"blocks\.\d+\.attn\.qkv\.bias": "(3 H@tp hd)",
        r"blocks\.\d+\.attn\.proj\.weight": "D@fsdp (H@tp hd)",
        r"blocks\.\d+\.mlp\.fc1\.weight": "F@(tp,fsdp) D",
        r"blocks\.\d+\.mlp\.fc1\.bias": "F@(tp,fsdp)",
        r"blocks\.\d+\.mlp\.fc2\.weight": "D@fsdp F@tp",
        r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.bias": "D@fsdp +tp",  # a share on each rank: the sum adds them up
        r"(blocks\.\d+\.norm[12]|norm)\.(weight|bias)": "D@fsdp",
        r"head\.weight": "K@fsdp D",
        r"head\.bias": "K@fsdp",
    },
    activations={
        r"images": "B@(dp,fsdp) C Y X",
        r"labels": "B@(dp,fsdp)",
        r"blocks\.\d+(\.attn|\.mlp)?": "B@(dp,fsdp) T D",
        r"blocks\.\d+\.(attn|mlp):in": "B@(dp,fsdp) T D",
        r"head": "B@(dp,fsdp) K",
    },
    pipeline=r"blocks\.(?P<pp>\d+)",
    units=[r"blocks\.\d+"],
)
