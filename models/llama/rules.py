"""How Llama 3 lies on a mesh: one table for every mesh.

V vocabulary, D model width, F feed-forward width, H and K query and key-value heads, hd a head's
width, B batch, S sequence, T positions of the rotary tables.
"""

import shardspec as ss

RULES = ss.Rules(
    params={
        r"tok_embeddings\.weight": "V@(tp,fsdp) D",
        r"layers\.\d+\.attention\.wq\.weight": "(H@tp hd)@fsdp D",
        r"layers\.\d+\.attention\.w[kv]\.weight": "(K@tp hd)@fsdp D",
        r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (H@tp hd)",
        r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@(tp,fsdp) D",
        r"layers\.\d+\.feed_forward\.w2\.weight": "D@fsdp F@tp",
        r"(layers\.\d+\.\w+_norm|norm)\.weight": "D@fsdp",
        r"output\.weight": "V@(tp,fsdp) D",
        r"rope_(cos|sin)": "T hd",
    },
    activations={
        r"tokens|labels": "B@(dp,fsdp) S@cp",
        r"positions": "S@cp",
        r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?": "B@(dp,fsdp) S@(cp,tp) D",
        r"layers\.\d+\.(attention|feed_forward):in|output:in": "B@(dp,fsdp) S@cp D",
        r"output": "B@(dp,fsdp) S@cp V@tp",
    },
    pipeline=r"layers\.(?P<pp>\d+)",
    units=[r"layers\.\d+", r"tok_embeddings", ("norm", "output")],
)

# The same without sequence parallelism: between blocks, each tp rank holds the whole sequence.
WITHOUT_SP = RULES.override(
    activations={
        r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?": "B@(dp,fsdp) S@cp D",
    },
)
