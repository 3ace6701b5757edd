"""How Mixtral lies on a mesh: one table for every mesh.

The ranks of `ep` are data ranks for all but the experts: the batch is split over them, and what is not an expert is
stored over fsdp and ep. Of the experts each ep rank holds some, whole or in shards of F over tp; tokens travel to them
and back inside `experts`, and nowhere else. They are stored in slices of their width, for eight are fewer than the
ranks of a large fsdp. The router has all logits of its tokens; what its losses read is a mean over the microbatch, made
whole on every rank at `router.load`.

V vocabulary, D model width, F an expert's width, E experts, L what a router's losses read (2 E + 1), H and K query and
key-value heads, hd a head's width, B batch, S sequence, T positions of the rotary tables.
"""

import shardspec as ss

RULES = ss.Rules(
    params={
        r"tok_embeddings\.weight": "V@(tp,fsdp,ep) D",
        r"layers\.\d+\.attention\.wq\.weight": "(H@tp hd)@(fsdp,ep) D",
        r"layers\.\d+\.attention\.w[kv]\.weight": "(K@tp hd)@(fsdp,ep) D",
        r"layers\.\d+\.attention\.wo\.weight": "D@(fsdp,ep) (H@tp hd)",
        r"layers\.\d+\.moe\.router\.gate\.weight": "E D@(fsdp,ep)",
        r"layers\.\d+\.moe\.experts\.w[13]": "E@ep F@(tp,fsdp) D",
        r"layers\.\d+\.moe\.experts\.w2": "E@ep D@fsdp F@tp",
        r"(layers\.\d+\.\w+_norm|norm)\.weight": "D@(fsdp,ep)",
        r"output\.weight": "V@(tp,fsdp,ep) D",
        r"rope_(cos|sin)": "T hd",
    },
    activations={
        r"tokens|labels": "B@(dp,fsdp,ep) S@cp",
        r"positions": "S@cp",
        r"tok_embeddings|layers\.\d+(\.attention|\.moe)?": "B@(dp,fsdp,ep) S@(cp,tp) D",
        r"layers\.\d+\.(attention|moe):in|output:in": "B@(dp,fsdp,ep) S@cp D",
        r"layers\.\d+\.moe\.router\.load": "L",
        r"output": "B@(dp,fsdp,ep) S@cp V@tp",
    },
    pipeline=r"layers\.(?P<pp>\d+)",
    experts=r"layers\.\d+\.moe\.experts",
    units=[r"layers\.\d+", r"tok_embeddings", ("norm", "output")],
)

# The same without sequence parallelism: between blocks, each tp rank holds the whole sequence.
WITHOUT_SP = RULES.override(
    activations={
        r"tok_embeddings|layers\.\d+(\.attention|\.moe)?": "B@(dp,fsdp,ep) S@cp D",
    },
)
