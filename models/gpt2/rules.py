"""How GPT-2 lies on a mesh: one table for every mesh.

V vocabulary, D model width, F feed-forward width, H heads, hd a head's width, B batch, S sequence, T positions.
The vocabulary of 50257 = 29 x 1733 splits over no usual tp: each rank holds all of it, and embeds and scores its
own part of the sequence.
"""

import shardspec as ss

RULES = ss.Rules(
    params={
        r"wte\.weight|lm_head\.weight": "V@fsdp D",
        r"wpe\.weight": "T@fsdp D",
        # Queries, keys and values below one another: each split over its heads. Storage cuts rows into
        # consecutive slices, which cannot be said of rows that lie in three pieces, so it divides the columns.
        r"h\.\d+\.attn\.c_attn\.weight": "(3 H@tp hd) D@fsdp",
        r"h\.\d+\.attn\.c_attn\.bias": "(3 H@tp hd)",
        r"h\.\d+\.attn\.c_proj\.weight": "D@fsdp (H@tp hd)",
        r"h\.\d+\.mlp\.c_fc\.weight": "F@(tp,fsdp) D",
        r"h\.\d+\.mlp\.c_fc\.bias": "F@(tp,fsdp)",
        r"h\.\d+\.mlp\.c_proj\.weight": "D@fsdp F@tp",
        r"h\.\d+\.(attn|mlp)\.c_proj\.bias": "D@fsdp +tp",  # a share on each rank: the product's sum adds them up
        r"(h\.\d+\.ln_[12]|ln_f)\.(weight|bias)": "D@fsdp",
    },
    activations={
        r"tokens": "B@(dp,fsdp) S@cp",
        r"positions": "S@cp",
        r"labels|wte:in": "B@(dp,fsdp) S@(cp,tp)",
        r"wpe:in": "S@(cp,tp)",
        r"h\.\d+(\.(attn|mlp)\.c_proj)?": "B@(dp,fsdp) S@(cp,tp) D",
        r"h\.\d+\.(attn|mlp):in": "B@(dp,fsdp) S@cp D",
        r"lm_head": "B@(dp,fsdp) S@(cp,tp) V",
    },
    pipeline=r"h\.(?P<pp>\d+)",
    units=[r"h\.\d+"],
)

# The same without sequence parallelism: outside attention and mlp, each tp rank does the whole sequence.
WITHOUT_SP = RULES.override(
    activations={
        r"labels|wte:in": "B@(dp,fsdp) S@cp",
        r"wpe:in": "S@cp",
        r"h\.\d+(\.(attn|mlp)\.c_proj)?": "B@(dp,fsdp) S@cp D",
        r"lm_head": "B@(dp,fsdp) S@cp V",
    },
)
