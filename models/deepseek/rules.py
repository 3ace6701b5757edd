"""How DeepSeek-V3 lies on a mesh: one table for every mesh.

The ranks of `ep` are data ranks for all but the routed experts: the batch is split over them, and what is not an expert
is stored over fsdp and ep. Of the experts each ep rank holds some, whole or in shards of F over tp; tokens travel to
them and back inside `experts`, and nowhere else.

Attention is split over its heads: of queries, of keys and values, and of what they read. The latents that those are
made of have no heads, so that every tp rank computes them alike, and a gradient is summed over tp where they are made
(`wq_a`, `wkv_a`: a quarter of what the block's input would be). The norms of the latents lie behind that point; what
they owe goes with the step's one all-reduce.

The routers' choices of a microbatch are counted by all at `router.load`; selection biases and counts are whole on every
rank, as whatever forward writes must be.

V vocabulary, D model width, F, X and Y the widths of a dense feed-forward, of an expert and of what is shared, E
experts, H heads, q and kv what a head has of queries and of keys and values, v of values, Q and C what wq_a and wkv_a
make (the latter with the shared rotary part of keys), latent the part of C that is normed, B batch, S sequence, T
positions of the rotary tables, r their width.
"""

import shardspec as ss

RULES = ss.Rules(
    params={
        r"tok_embeddings\.weight": "V@(tp,fsdp,ep) D",
        r"layers\.\d+\.attention\.wq_a\.weight": "Q@(fsdp,ep) D",
        r"layers\.\d+\.attention\.wkv_a\.weight": "C D@(fsdp,ep)",  # 576 rows divide over few ranks
        r"layers\.\d+\.attention\.wq_b\.weight": "(H@tp q)@(fsdp,ep) Q",
        r"layers\.\d+\.attention\.wkv_b\.weight": "(H@tp kv)@(fsdp,ep) latent",
        r"layers\.\d+\.attention\.wo\.weight": "D@(fsdp,ep) (H@tp v)",
        r"layers\.\d+\.attention\.q_norm\.weight": "Q@(fsdp,ep)",
        r"layers\.\d+\.attention\.kv_norm\.weight": "latent@(fsdp,ep)",
        r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@(tp,fsdp,ep) D",
        r"layers\.\d+\.feed_forward\.w2\.weight": "D@(fsdp,ep) F@tp",
        r"layers\.\d+\.moe\.router\.gate\.weight": "E D@(fsdp,ep)",
        r"layers\.\d+\.moe\.router\.(bias|counts)": "E",
        r"layers\.\d+\.moe\.experts\.w[13]": "E@(ep,fsdp) X@tp D",
        r"layers\.\d+\.moe\.experts\.w2": "E@(ep,fsdp) D X@tp",
        r"layers\.\d+\.moe\.shared\.w[13]\.weight": "Y@(tp,fsdp,ep) D",
        r"layers\.\d+\.moe\.shared\.w2\.weight": "D@(fsdp,ep) Y@tp",
        r"(layers\.\d+\.(attention|ffn)_norm|norm)\.weight": "D@(fsdp,ep)",
        r"output\.weight": "V@(tp,fsdp,ep) D",
        r"rope_(cos|sin)": "T r",
    },
    activations={
        r"tokens|labels": "B@(dp,fsdp,ep) S@cp",
        r"positions": "S@cp",
        r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward|\.moe)?": "B@(dp,fsdp,ep) S@(cp,tp) D",
        r"layers\.\d+\.(attention|feed_forward|moe|moe\.shared):in|output:in": "B@(dp,fsdp,ep) S@cp D",
        r"layers\.\d+\.attention\.wq_a": "B@(dp,fsdp,ep) S@cp Q",
        r"layers\.\d+\.attention\.wkv_a": "B@(dp,fsdp,ep) S@cp C",
        r"layers\.\d+\.moe\.router\.load": "E",
        r"output": "B@(dp,fsdp,ep) S@cp V@tp",
    },
    pipeline=r"layers\.(?P<pp>\d+)",
    experts=r"layers\.\d+\.moe\.experts",
    units=[r"layers\.\d+", r"tok_embeddings", ("norm", "output")],
)

# The same without sequence parallelism: between blocks, each tp rank holds the whole sequence.
WITHOUT_SP = RULES.override(
    activations={
        r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward|\.moe)?": "B@(dp,fsdp,ep) S@cp D",
    },
)
