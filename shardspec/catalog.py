"""What each diagnostic code means: one entry a code, for `shardspec explain` and docs/errors.md. Imports no torch."""

from collections.abc import Mapping

from attrs import frozen


@frozen(kw_only=True)
class CodeEntry:
    """A code with what a user who meets it wants to read."""

    code: str
    title: str
    explanation: str
    """Three to ten lines: what it means, why it matters, how it comes about, how to mend it."""
    wrong: str = ""
    """A line that is refused with this code, and `right`, the same line mended."""
    right: str = ""

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.title}", "", self.explanation]
        if self.wrong:
            lines += ["", f"  wrong   {_hanging(self.wrong)}", f"  right   {_hanging(self.right)}"]
        return "\n".join(lines)


def _hanging(text: str) -> str:
    return text.replace("\n", "\n          ")


SECTIONS = {
    "SS1": "Meshes and texts: what cannot be read",
    "SS2": "Names: the table against the model",
    "SS3": "Types: the program on the mesh",
    "SS4": "Runs: batches, states and worlds",
}
"""The first digit of a code -> what such codes are about."""

ENTRIES = (
    CodeEntry(
        code="SS101",
        title="the mesh cannot be read",
        explanation="""\
A mesh gives each of the axes pp, dp, fsdp, ep, cp and tp a size: a whole number of at least 1, once.
An axis that is not named has size 1. One axis may be "auto": it takes what the world leaves, and
the world must then be known, by `world=` or by the variable WORLD_SIZE that torchrun sets.
Usually: an axis by another library's name (`data`, `model`), a size of 0, or "auto" outside torchrun.""",
        wrong='ss.Mesh.parse("data=2,tp=2")',
        right='ss.Mesh.parse("fsdp=2,tp=2")',
    ),
    CodeEntry(
        code="SS102",
        title="the mesh and the world have different sizes",
        explanation="""\
The product of the axes' sizes is the number of ranks. Here it is not the world's, or does not divide
it, so that "auto" has no size. Every rank has exactly one place on the mesh: none may be left over,
for it would wait in the first collective for ever.
Let one axis take the rest, or start as many processes as the mesh has ranks.""",
        wrong="ss.Mesh(fsdp=4, tp=4, world=8)",
        right='ss.Mesh(fsdp="auto", tp=4, world=8)',
    ),
    CodeEntry(
        code="SS103",
        title="a pattern or a spec cannot be read",
        explanation="""\
A pattern is a Python regex, matched whole against a name. A spec is one string a tensor: a factor for
each dim, outermost first; `( )` makes one dim of several factors; `@axis` or `@(axis, axis)` stands
behind what it splits; `+axis` at the end marks a value that is still to be summed. params=, activations=,
attributes= and sizes= are dicts, units= is a list of patterns and tuples of patterns.
The axes are pp, dp, fsdp, ep, cp and tp. `ss.P("tp", None)` says the same without names; a bare tuple
or None is no spec. The message gives the column and what was expected there.""",
        wrong='r"output\\.weight": ("tp", None)',
        right='r"output\\.weight": ss.P("tp", None)      # or "V@tp D"',
    ),
    CodeEntry(
        code="SS201",
        title="override drops a pattern that the table does not have",
        explanation="""\
`rules.override(drop=[...])` names the patterns of entries letter for letter, as they stand in the
table: it does not match names. A pattern that is not there is a mistake, because the entry that was
meant stays in the table and goes on claiming its names.
Copy the pattern from the table; where the spec alone should change, give the entry again instead.""",
        wrong='RULES.override(drop=[r"layers\\.0\\.attention"])',
        right='RULES.override(drop=[r"layers\\.\\d+\\.attention"])',
    ),
    CodeEntry(
        code="SS202",
        title="a name has no rule",
        explanation="""\
Every parameter, every buffer and every entry of the batch is claimed by exactly one rule. Replicated
is written, never assumed: a matrix that a typo left unclaimed would otherwise be copied to every rank
and nobody would notice but the memory.
Usually a new parameter (a bias, a norm), a buffer such as rotary tables, or a batch entry that only
the loss reads. Add a rule; a spec without an axis keeps the whole tensor on every rank.""",
        wrong='r"layers\\.\\d+\\.attention\\.w[qkv]\\.weight": ...   # and no rule for q_norm.weight',
        right='r"layers\\.\\d+\\.attention\\.q_norm\\.weight": "hd"',
    ),
    CodeEntry(
        code="SS203",
        title="a rule claims nothing",
        explanation="""\
A pattern is matched whole (`re.fullmatch`) against the names of the model, and this one matches none.
A dead rule is a mistake: what it was meant to split is split by no one.
Usually a typo, a doubled backslash in a raw string, a pattern that was meant as a prefix, or a module
that this size of the family does not have. Where a name without a rule looks like the pattern, the two
are told together. Rules for forward's optional arguments count as used even if none is passed.""",
        wrong='r"layers.\\\\d+\\.attention": ...      r"output": "V@tp D"',
        right='r"layers\\.\\d+\\.attention": ...       r"output\\.weight": "V@tp D"',
    ),
    CodeEntry(
        code="SS204",
        title="two rules claim one name",
        explanation="""\
A name belongs to one rule. There is no order among rules and no "first match wins": which of two
specs holds would hang on the order of lines, and a broad pattern added at the end would change the
meaning of what stands above it. The same goes for a module in two units.
Make the broad pattern narrower, or drop one of the rules; `rules.override` replaces the entry that has
the same pattern.""",
        wrong='r"layers\\..*\\.weight": "D"               r"layers\\.\\d+\\.attention\\.wq\\.weight": ...',
        right='r"layers\\.\\d+\\.\\w+_norm\\.weight": "D"      r"layers\\.\\d+\\.attention\\.wq\\.weight": ...',
    ),
    CodeEntry(
        code="SS205",
        title="a spec and its tensor have different numbers of dims",
        explanation="""\
A spec names each dim of the tensor, outermost first; a weight of `nn.Linear` is [out, in]. A dim of
several factors is written in brackets: `(H hd) D` is two dims, `H hd D` is three. `...` stands for dims
that are not named, in activations only: a parameter's dims are all named. A 0-dim tensor has the spec "".""",
        wrong='r"layers\\.\\d+\\.attention\\.wq\\.weight": "H@tp hd D"',
        right='r"layers\\.\\d+\\.attention\\.wq\\.weight": "(H@tp hd) D"',
    ),
    CodeEntry(
        code="SS206",
        title="a name has two sizes",
        explanation="""\
A factor's name has one size in a table: that is how a transposed weight or two exchanged dims are found
before anything runs. Where rules disagree, the size that most of them tell is taken as meant.
Usually the dims stand in the wrong order, or one name is used for two things: key heads are not query
heads, and the rows of the rotary tables are not the sequence. Names cost nothing: give another one.""",
        wrong='r"layers\\.\\d+\\.feed_forward\\.w2\\.weight": "F@tp D"      # its shape is [D, F]',
        right='r"layers\\.\\d+\\.feed_forward\\.w2\\.weight": "D F@tp"',
    ),
    CodeEntry(
        code="SS207",
        title="an axis stands twice in one tensor",
        explanation="""\
An axis splits one factor of a tensor. On two dims at once, rank i would hold block (i, i) alone: the
blocks off the diagonal would be nowhere. The same axis as `@axis` and as `+axis` contradicts itself.
To split a matrix on both dims, use two axes. The parts of a direct sum are split over the same axes, each
for itself; what else stands on the sum may only store a parameter.""",
        wrong='r"layers\\.\\d+\\.attention\\.wo\\.weight": "D@tp (H@tp hd)"',
        right='r"layers\\.\\d+\\.attention\\.wo\\.weight": "D@fsdp (H@tp hd)"',
    ),
    CodeEntry(
        code="SS208",
        title="an axis stands where it means nothing",
        explanation="""\
dp never stands on a parameter: its ranks are replicas, which is what dp means; fsdp is the axis that
divides storage over data ranks. pp is never written at all: stages come from `pipeline=`. A storage axis
(fsdp, ep, cp) cannot be pending on a parameter: it says where rows are kept, and they are gathered whole
before anything reads them.""",
        wrong='r"output\\.weight": "V@(tp,dp) D"',
        right='r"output\\.weight": "V@(tp,fsdp) D"',
    ),
    CodeEntry(
        code="SS209",
        title="a parameter cannot be stored so",
        explanation="""\
`fully_shard` keeps consecutive rows of one dim, of what tp has left. So the storage axes of a parameter
stand on one dim, behind the compute axes, and on a whole group or direct sum rather than inside it. Buffers
are never stored in parts, for nothing gathers them.""",
        wrong='r"tok_embeddings\\.weight": "V@(fsdp,tp) D"      r"...wq\\.weight": "(H@(tp,fsdp) hd) D"',
        right='r"tok_embeddings\\.weight": "V@(tp,fsdp) D"      r"...wq\\.weight": "(H@tp hd)@fsdp D"',
    ),
    CodeEntry(
        code="SS210",
        title="an axis of the mesh that no rule uses",
        explanation="""\
The mesh has an axis larger than one that stands in no rule. Its ranks would all do the same work: the
run would cost that many times as much, and be right, so that nobody would look.
Put the axis where it belongs (dp and fsdp on the batch, cp on the sequence, tp on features or heads), or
take it out of the mesh. An axis of size one may stand anywhere: one table serves every mesh.""",
        wrong='ss.Mesh(ep=2, tp=2)      # and no "ep" in the table',
        right="ss.Mesh(fsdp=2, tp=2)",
    ),
    CodeEntry(
        code="SS211",
        title="units=, attributes= or sizes= names what is not there",
        explanation="""\
A pattern in `units` or `attributes` is matched whole against the FQNs of modules, not of parameters.
One that matches nothing would silently leave the model in one unit, or a global size in a module. An
attribute must exist and hold a whole number: the size that a rank's part of the module should see. A name in
`sizes` must be a factor of some rule: a misspelt one would tell nothing.""",
        wrong='units=[r"layers\\.\\d+\\.weight"]      attributes={r"layers\\.\\d+": {"heads": "H@tp"}}',
        right='units=[r"layers\\.\\d+"]               attributes={r"layers\\.\\d+\\.attention": {"n_heads": "H@tp"}}',
    ),
    CodeEntry(
        code="SS212",
        title="tied weights with two layouts",
        explanation="""\
A tensor that the model knows under two names (`output.weight is tok_embeddings.weight`) is claimed under
both, and is one tensor: it lies on a rank in one way only. Two layouts would silently untie it, and the
halves would drift apart from the first step.
Give both rules the same axes in the same order; one pattern for the two names cannot go wrong.""",
        wrong='r"tok_embeddings\\.weight": "V@(tp,fsdp) D"      r"output\\.weight": "V D@fsdp"',
        right='r"(tok_embeddings|output)\\.weight": "V@(tp,fsdp) D"',
    ),
    CodeEntry(
        code="SS213",
        title="a batch axis that divides no batch entry",
        explanation="""\
dp, fsdp and ep are the axes whose ranks read different rows. This one is larger than one and stands on no
entry of the batch: all its ranks would read the same rows and do the same work, and a gradient that is
averaged over them would look right.
Put the axis on the batch factor of the entries and of the activations.""",
        wrong='r"tokens|labels": "B@dp S"',
        right='r"tokens|labels": "B@(dp,fsdp) S"',
    ),
    CodeEntry(
        code="SS215",
        title="the size of a factor is not known",
        explanation="""\
A group of factors is one dim of the tensor, so that its length alone does not tell their sizes. To split
a factor, its size and those in front of it must be known: from a rule where the name is a dim of its own
(`rope_cos: "T hd"` tells hd), from a group of which all others are known, or from `sizes=`.""",
        wrong='r"...w13\\.weight": "(parts F@tp) D"',
        right='r"...w13\\.weight": "(2 F@tp) D"      # or sizes={"parts": 2}',
    ),
    CodeEntry(
        code="SS216",
        title="a parameter is read while its unit is not gathered",
        explanation="""\
A parameter that is stored over fsdp is whole only while a module of its unit runs: the unit's forward
gathers it, and lets it go again. Here another module reads it directly, as in `self.norm.weight` or
`F.linear(x, self.embedding.weight)`, and would meet a rank's slice of it.
Make the module that reads it the unit, leave the parameter to the root unit, or call its own module.""",
        wrong='units=[r"layers\\.\\d+\\.attention_norm"]      # and the layer reads attention_norm.weight',
        right='units=[r"layers\\.\\d+"]',
    ),
    CodeEntry(
        code="SS217",
        title="layers that do not make the stages of a pipeline",
        explanation="""\
`pipeline=` is matched whole against the FQN of each module, and its group `pp` is the index of a layer. A stage
has at least one layer. GPipe and 1F1B run one stage on each rank of pp, the others two, or as many as
`Policy(stages=[...])` has numbers: of layers, one number for each stage, in order.
Give pp a smaller size, another schedule, or stages that have all the layers.""",
        wrong='pipeline=r"layers\\.\\d+"',
        right='pipeline=r"layers\\.(?P<pp>\\d+)"',
    ),
    CodeEntry(
        code="SS218",
        title="ep on an expert weight, and not on its experts",
        explanation="""\
`experts=` names modules whose parameters are stacked over experts on dim 0. There `@ep` says which rank has which
experts: rows travel to the rank of their expert, and the weights stay. On another dim, or behind another axis of
dim 0, it would say that a rank has a part of every expert, and rows would go nowhere.
Write `E@ep` on dim 0 of each of the module's parameters; fsdp may store them along any dim, and tp splits what is
inside an expert. On parameters of other modules ep stores, as fsdp does.""",
        wrong='r"layers\\.\\d+\\.moe\\.experts\\.down_proj": "E D@ep F@tp"',
        right='r"layers\\.\\d+\\.moe\\.experts\\.down_proj": "E@ep D@fsdp F@tp"',
    ),
    CodeEntry(
        code="SS301",
        title="a size that cannot be split evenly",
        explanation="""\
What compute reads is split evenly: with 8 key-value heads and tp=16, half the ranks would have none. The
size must be a multiple of the product of the axes that split it; the message lists the degrees that pass.
A view that cuts a split dim elsewhere than at a rank's border is the same mistake: 4096 features are 32
heads of 128, and tp may cut between heads, not inside one.
Only storage along a parameter's first dim, over one axis, may be uneven: FSDP2 pads it there.""",
        wrong='"(K@tp hd) D"      # K = 8 key-value heads, on ss.Mesh(tp=16)',
        right='"(K@tp hd) D"      # on ss.Mesh(fsdp=2, tp=8)',
    ),
    CodeEntry(
        code="SS302",
        title="operands that are laid out differently",
        explanation="""\
Two tensors meet in one operation, and along a dim that they share a rank holds different elements of
each: one is split and the other whole, or they are split by other axes or in another order. Nothing is
sliced or gathered between two declared points: what a rank paired would not belong together.
`64@cp` reads: 64 on each rank, split over cp. The usual cases are rotary tables or position ids that are
whole beside a split sequence, a weight whose partner was forgotten, and a residual in another layout.
Lay one out as the other is, or declare the activation where the change should happen.""",
        wrong='r"...w1\\.weight": "F@tp D"      r"...w3\\.weight": "F D"      # silu(w1 x) * (w3 x)',
        right='r"...w[13]\\.weight": "F@tp D"',
    ),
    CodeEntry(
        code="SS303",
        title="a value is read before it is summed",
        explanation="""\
A product over a split dim leaves each rank a share of the result: the value is their sum. A share may be
scaled, moved, or added to another share. It may not go through a nonlinear function, be multiplied by
another share, or be added to a complete value, which would be counted once a rank.
Usually the rule is missing that sums what a row-parallel product (`wo`, `w2`) or a split embedding leaves.
Declare the activation without the axis: the sum happens there. A bias behind such a product is read as a
share with `+tp`.""",
        wrong='r"layers\\.\\d+\\.attention\\.wo\\.bias": "D"',
        right='r"layers\\.\\d+\\.attention\\.wo\\.bias": "D +tp"',
    ),
    CodeEntry(
        code="SS304",
        title="an operation needs the whole of a split dim",
        explanation="""\
Softmax, norms, argmax, sort, a running sum, a shift, one row of a dim: computed on a rank's part they give
something else than a part of the result. Along this dim the operand is split.
Declare the activation in front of the operation without the axis, so that it is gathered there; or do not
split the dim. `ss.cross_entropy` knows a split vocabulary and gathers nothing; torch's own does not.""",
        wrong='r"output": "B@(dp,fsdp) S V@tp"      # and F.cross_entropy(output, ...)',
        right='r"output": "B@(dp,fsdp) S V@tp"      # and ss.cross_entropy(output, labels)',
    ),
    CodeEntry(
        code="SS305",
        title="an operator without a rule",
        explanation="""\
Nothing says how this operator's result is laid out when its operands are split, or what it does with this
option. Where all its operands are whole and complete on every axis, any operator passes.
Gather its operands at a declared point in front of it, write the step with operators that have a rule, or give
it one with `ss.register_rule`, which tries it by brute force before it is used.
A result whose shape depends on values, such as `x[mask]`, has no layout on any mesh: use torch.where.""",
    ),
    CodeEntry(
        code="SS306",
        title="a declared point that cannot be reached",
        explanation="""\
A rule for an activation says what the value is from there on, and the step from what it was must exist.
Any value can be gathered, split or summed; none can become pending: `+tp` at an activation means "left
unsummed", and here the value is complete, or pending over another axis.
Drop the `+axis`, or declare it where the value still is a share.""",
        wrong='r"layers\\.\\d+\\.attention_norm": "B S D +tp"',
        right='r"layers\\.\\d+\\.attention\\.wo": "B S D +tp"      # behind the row-parallel product',
    ),
    CodeEntry(
        code="SS307",
        title="a gradient that is whole by one use and a share by another",
        explanation="""\
Backward is typed too. A value that every rank holds whole gets, from a column-parallel product, a share of
its gradient on each rank, and from a residual or a replicated use the whole of it. Added as they are, the
whole would be counted once a rank, or the shares not summed: no later reduction can tell them apart.
Declare the activation between the uses, as the inputs of attention and feed-forward are: that point moves
nothing forward and sums the shares backward. A tied weight needs both its uses on the same side.""",
        wrong='r"layers\\.\\d+": "B S D"      # and no rule for the inputs',
        right='r"layers\\.\\d+\\.(attention|feed_forward):in": "B S D"',
    ),
    CodeEntry(
        code="SS308",
        title="storage over an axis on which the gradient is complete",
        explanation="""\
The gradient of a stored parameter is reduce-scattered: summed over the storage axes. That is right where
each of those ranks has a share of it, because they read different rows (fsdp) or different parts of the
sequence (cp). Here every rank already has the whole gradient, and the sum would multiply it. The same goes for
dp: what is stored over fsdp is summed over its replicas too.
Take the axis off the parameter, or split what it is used with over the same axis.""",
        wrong='r"output\\.weight": "V@cp D"      # and cp on no activation',
        right='r"output\\.weight": "V@cp D"      r"tokens|labels": "B S@cp"',
    ),
    CodeEntry(
        code="SS309",
        title="the model does something else on a rank's local shapes",
        explanation="""\
Forward is run a second time with the shapes that a rank will have, and compared operation by operation.
Here they part: the model fails, runs another operator, or uses another number than on the whole. Usually
a head count in a `view`, a division by `h.shape[-1]` of a split dim, an `arange` over a local length, or a
branch on a size. Under torch alone such a model runs, and is silently wrong.
Take sizes from the tensors at hand (`view(B, S, -1, head_dim)`). Where a module keeps a global size in an
attribute, name it in `attributes=`, and each rank sees its part; a size that must stay whole is kept apart.""",
        wrong="q = self.wq(x).view(B, S, 32, 128)",
        right="q = self.wq(x).view(B, S, -1, 128)",
    ),
    CodeEntry(
        code="SS310",
        title="a loss that ranks cannot add up",
        explanation="""\
A loss returns (sum, weight), two scalars over this rank's part of the batch; the runtime divides the sum of
the sums by the sum of the weights, over ranks and microbatches. So masked tokens weigh the same on every
mesh. A mean cannot be put together again: ranks hold different numbers of tokens. A Python number is taken
as it is, and must be the same on every rank.
Return `ss.cross_entropy(...)`, or a sum and the count that it is over, both as tensors.""",
        wrong="return loss.mean(), labels.numel()",
        right="return loss.sum(), (labels != -100).sum()",
    ),
    CodeEntry(
        code="SS311",
        title="a mean over tokens that are split",
        explanation="""\
`F.cross_entropy` with its default reduction takes the mean over the tokens that are not masked. On a rank
that is the mean of its own tokens, and the mean of the ranks' means is not the mean: a rank with one
unmasked token would weigh as much as one with a thousand. With no mask it happens to agree, which hides it.
Return a sum and its weight instead.""",
        wrong="return F.cross_entropy(logits.flatten(0, 1), labels.flatten())",
        right='return ss.cross_entropy(output, batch["labels"])',
    ),
    CodeEntry(
        code="SS312",
        title="random numbers that are not keyed",
        explanation="""\
On a mesh, replicas must draw the same numbers and shards different ones, and a recomputed forward must draw
what it drew before. Dropout is keyed by the global index of each element, so that every mesh drops alike;
this operator is not, and each rank would draw from its own generator.
Call model.eval(), set the probability to 0, or hand the noise in as an entry of the batch.""",
        wrong="h = h + 0.1 * torch.randn_like(h)",
        right='h = h + batch["noise"]      # an entry of the batch, with a rule',
    ),
    CodeEntry(
        code="SS313",
        title="Python reads a tensor's value",
        explanation="""\
`.item()`, `int(x)`, `if x.any():` make Python decide by a value of the batch. Ranks hold different parts of
the batch, would decide differently, and then wait for each other in collectives that only some of them
run. Values that derive from constants alone may be read.
Decide by tensors (`torch.where`, a mask), or do it to the batch before the step.""",
        wrong="if (tokens == 0).any(): tokens = tokens.clamp(min=1)",
        right="tokens = tokens.clamp(min=1)",
    ),
    CodeEntry(
        code="SS314",
        title="a write in place that cannot be followed",
        explanation="""\
A write changes every tensor that shares the memory. It is refused where it would change a layout, where
views of the same tensor see it, where it goes to a parameter (which on a mesh is a gathered copy, thrown
away after use), where a declared point lies between: behind the point there may be another tensor, and what is
written is not seen in front of it; and where a repeated block writes to a tensor of its caller's that is read
again, for the gradients of what was written would be summed by nobody.
Use the form of the operator that makes a new tensor; the compiler's memory is not worse for it.""",
        wrong="q[..., :2].mul_(0.5)",
        right="q = torch.cat((q[..., :2] * 0.5, q[..., 2:]), -1)",
    ),
    CodeEntry(
        code="SS315",
        title="a custom autograd function",
        explanation="""\
A `torch.autograd.Function` declares a backward of its own that forward does not show. What its operands'
gradients are then owed cannot be derived: a mean over the batch inside it, say, would be a mean over a rank's
rows, and wrong in silence. A replicated operand is no better: the gradient that reaches it may be a rank's
share of a sum. Torch's own checkpoint is such a function too: `ss.Policy(remat=...)` does the same.
Write the function with torch operators and let autograd derive its backward.""",
    ),
    CodeEntry(
        code="SS316",
        title="a gradient through a maximum over ranks",
        explanation="""\
A maximum over a split dim is the maximum of the ranks' maxima, and a declared point takes it. Its gradient
belongs to the one element that is largest of all; each rank would send it to the largest of its own part.
Detach what the maximum is taken of, as the usual stabilising of a softmax may; or gather the dim first.""",
        wrong='top = ss.name(logits.amax(-1, keepdim=True), "top")',
        right='top = ss.name(logits.detach().amax(-1, keepdim=True), "top")',
    ),
    CodeEntry(
        code="SS317",
        title="a point that is passed twice and would do two things",
        explanation="""\
A module runs more than once, and a rule stands at its input or output. What such a point moves, forward or
backward, is fixed by its name; here the calls would need different moves: their inputs are laid out differently,
or one call's gradient is a share and another's the whole. With the moves of one, the other would be wrong.
Declare the activations that the calls are made from and that they feed, so that both see the same layouts; a
point behind the uses (`attention:in`) is often the better place than the shared module itself.""",
        wrong='r"layers\\.\\d+\\.attention_norm": "B S D"      # it feeds attention, and the residual too',
        right='r"layers\\.\\d+\\.attention:in": "B S D"',
    ),
    CodeEntry(
        code="SS318",
        title="a tensor that comes to its use unseen",
        explanation="""\
The check follows a tensor through arguments and results. A repeated block (`layers.3`) is run once for all that
are like it, by what goes in and what comes out: a tensor that it leaves in an attribute, in a list of the
caller's or in an object would be read outside with nothing known of its layout or of its gradient. The same
holds for a parameter that is reached through a closure, functools.partial or an object that is bound to the
model itself: the check, and a rank, run a copy.
Return such tensors from the block (in tuples, lists or dicts), and reach modules through attributes.""",
        wrong="self.aux = balance; return x      # the model adds layer.aux for each layer",
        right="return x, balance",
    ),
    CodeEntry(
        code="SS319",
        title="a hook on a gradient",
        explanation="""\
A backward hook of a module, a hook on a parameter's gradient, `register_hook` in forward, or Python that asks
an activation for `requires_grad`, `grad_fn` or `is_leaf`. The check derives the layouts of gradients and runs no
backward: what such a hook does to a rank's part, or to its share of a sum, is not seen, and a norm or a clamp
there would be wrong in silence.
Do it to what `sharded.value_and_grad` gives, which is global, in a step of your own; whether gradients are
taken at all, `torch.is_grad_enabled()` tells.""",
        wrong="model.head.weight.register_hook(lambda grad: grad.clamp(-1, 1))",
        right="(loss, metrics), grads = grad_fn(state.params, batch, state.rng)   # then clamp grads",
    ),
    CodeEntry(
        code="SS321",
        title="an operator's rule that brute force refutes",
        explanation="""\
`ss.register_rule` runs the operator on every rank's part, for each layout that the rule would accept on the
samples, and compares results and gradients with those of the whole. Here they differ: the message gives the
layout, the result or gradient, an element, and what the rule claims that is not so.
Usually a factor that the operator needs whole (`!d`), a reduction that is no sum, an argument in linear= in which
the operator is not linear, the results' dims in another order, or a backward that counts rows. A fix is an edit
with which the rule was brute-forced again and passed.""",
        wrong='ss.register_rule(op, "b s d -> b s d", ...)      # a softmax along d',
        right='ss.register_rule(op, "b s !d -> b s !d", ...)',
    ),
    CodeEntry(
        code="SS322",
        title="an operator's rule that cannot be tried",
        explanation="""\
A rule of one's own is accepted only on evidence. Here there is none, or the evidence would say nothing: no
samples, a sample that the operator or the notation does not fit, a factor that no sample can split in four parts,
a tensor that is the same all along a dim, so that its parts cannot be told apart, or a result that holds NaN.
Also: an operator that has a rule already, writes to its arguments, draws random numbers, or lacks the shape
function (register_fake) or the backward (register_autograd) that a model will need.""",
        wrong='ss.register_rule(op, "b d, d -> b d", samples=[(torch.ones(2, 3), torch.ones(3))])',
        right='ss.register_rule(op, "b d, d -> b d", samples=[(torch.randn(4, 8), torch.randn(8))])',
    ),
    CodeEntry(
        code="SS331",
        title="a forward that cannot be cut into stages",
        explanation="""\
Each stage of a pipeline runs the model's own forward on the same rows, with the layers of other stages hollow.
From one stage to the next cross the arguments of the next stage's first layer. What else is read must come from
the batch and buffers (positions, masks, tables), which every stage has. Here a later stage reads what parameters or
layers of an earlier one made, or layers do not run once each, in their order.
Pass the value through the layers, as an argument and a result, make it from the batch, or begin the stages elsewhere
with `Policy(stages=[...])`.""",
    ),
    CodeEntry(
        code="SS332",
        title="a module that experts= names and that cannot run as one",
        explanation="""\
Such a module has `forward(hidden [N, D], topk_ids [N, k], topk_weights [N, k]) -> [N, D]`, and its parameters are
stacked over experts on dim 0. On a mesh a rank's module holds some of the experts, is called with the rows that
chose one of them (k=1, ids from 0), and its results go back. Its forward is typed so, on a few rows.
Here it is called otherwise, gives something else, or cannot run on a rank's experts, as where it counts them by an
attribute that `attributes=` does not tell; or it computes with the number of an expert, of all experts, of rows or of
choices, which a rank has others of. Rows are split over ep where the experts are; and over tp only where no
weight is: a rank of tp would compute its features for its own rows alone.""",
        wrong='experts=r"layers\\.\\d+\\.moe"                # forward(x)',
        right='experts=r"layers\\.\\d+\\.moe\\.experts"      # forward(x, ids, weights)',
    ),
    CodeEntry(
        code="SS340",
        title="positions that every rank counts from the front",
        explanation="""\
With `S@cp` a rank holds a part of the sequence. A model that makes positions by the length at hand
(`torch.arange(x.shape[1])`), or reads the first rows of a table for them (`rope_cos[:x.shape[1]]`), gives every
rank the positions 0, 1, 2, ...: each takes its tokens for the first of the sequence. All shapes fit, so that such a
run would train, and be wrong.
Positions come into a model as its batch does: have forward take `positions` and index its tables by them, put
`torch.arange(S)` into the batch, and lay it by `"S@cp"`. A buffer with just a row for each position may be laid
`"S@cp ..."` itself. Tokens, labels, positions and masks then lie alike on a rank, whichever order that is.""",
        wrong="cos = self.rope_cos[: x.shape[1]]",
        right="cos = self.rope_cos[positions]",
    ),
    CodeEntry(
        code="SS341",
        title="attention that a strategy cannot compute over a split sequence",
        explanation="""\
`Policy(attention=...)` says how attention reads a sequence that is split over cp. "allgather" gathers keys and values
and takes a mask with the rank's rows and all columns; "ring" passes keys and values from rank to rank and takes none;
"ulysses" exchanges sequence for heads and takes a whole mask. None drops attention weights at random.
The message names the strategies that can compute the call. A mapping of regexes to strategies chooses one for some
modules: `Policy(attention={r"encoder\\..*": "allgather", ".*": "ring"})`.""",
        wrong='Policy(attention="ring")         # F.scaled_dot_product_attention(q, k, v, attn_mask=mask)',
        right='Policy(attention="allgather")',
    ),
    CodeEntry(
        code="SS342",
        title="fewer heads than ranks that exchange them",
        explanation="""\
"ulysses" gives each rank of cp some heads for the whole sequence. Queries as well as keys and values must have as many
heads as there are ranks, or a multiple, after tp has taken its share: cp divides K / tp. With few key-value heads
that leaves little room.
Take one of the degrees that the message lists, split heads less by tp, or use "ring" or "allgather".""",
        wrong='Policy(attention="ulysses")      # 2 key-value heads, cp=4',
        right='Policy(attention="ring")',
    ),
    CodeEntry(
        code="SS343",
        title="a sequence that cannot be laid head and tail",
        explanation="""\
Under a causal mask late positions read more keys than early ones. So that each rank of cp has as much work, the
sequence is cut into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r. Here 2 cp does not divide a length, or a
view cuts the two chunks of a rank, which do not follow each other in the whole.
By default the order is chosen where 2 cp divides the sequence; `Policy(balance=False)` leaves it in order.""",
        wrong="Policy(balance=True)             # S = 12, cp = 4",
        right="Policy(balance=False)",
    ),
    CodeEntry(
        code="SS401",
        title="an argument or a batch of the wrong kind",
        explanation="""\
The model is an `nn.Module` or a function without arguments that builds one; the table is `ss.Rules`; the mesh
is `ss.Mesh`; a batch maps names to tensors. Entries that are named as forward's arguments go to forward, and
the others to the loss alone. Here something of another kind was given, or an entry is missing that forward
cannot be called without.""",
        wrong="ss.compile(model, RULES, mesh, tokens)",
        right='ss.compile(model, RULES, mesh, {"tokens": tokens, "labels": labels})',
    ),
    CodeEntry(
        code="SS402",
        title="the model or the loss does not run on this batch",
        explanation="""\
Forward and loss are run once on meta tensors of the batch's shapes, before any layout matters, and raised.
This is the model's own error, on any mesh and on none: shapes that do not fit, an entry that the loss reads
and the batch does not have, or an operator that needs values. The message ends with the batch's shapes; the
line is the innermost of yours.""",
    ),
    CodeEntry(
        code="SS403",
        title="the processes that run are not those of the mesh",
        explanation="""\
The world has another number of ranks than the mesh, no launcher started it, or the ranks did not compile the
same plan. Each rank compiles the table for itself, and the plans are compared before anything is touched: a
rank with another table, another model or another batch shape would otherwise wait in a collective that the
others do not run. A mesh of size one needs no launcher. A step that fails on one rank is told on the others too,
as soon as that rank's process ends: with SS403 and that rank's own words. It does not go on alone.""",
        wrong="python train.py      # with ss.Mesh(fsdp=2, tp=2)",
        right="torchrun --nproc-per-node 4 train.py",
    ),
    CodeEntry(
        code="SS404",
        title="a state dict that does not fit the model",
        explanation="""\
Every entry that the model has is given, with the model's shape and dtype, and no others. A cast or a missing
key would load in silence and train something else. All entries that do not fit are listed at once.
Rename or cast them before loading; names tied to one tensor must agree in their values.""",
    ),
    CodeEntry(
        code="SS405",
        title="a number, dtype or pattern that the policy cannot use",
        explanation="""\
What changes speed and never meaning is policy: schedule, microbatches, accumulation, recomputation, clipping.
Here a number is out of range (a step has at least one microbatch, 1F1B at least one for each stage, a clip is
above 0), a schedule is unknown, a dtype is no torch.dtype that holds fractions, or a pattern matches no unit of
the table, so that what it asks for would not happen.""",
        wrong='ss.Policy(remat=[r"layer\\.\\d+"])',
        right='ss.Policy(remat=[r"layers\\.\\d+"])',
    ),
    CodeEntry(
        code="SS406",
        title="a parameter or buffer without a value",
        explanation="""\
`sharded.init` replays what the constructors do to parameters, slice by slice, so that every mesh gets bitwise
the same weights. Here it cannot: the model was given on meta without a function that builds it, or a
constructor does something that has no slice, such as an orthogonal matrix. Nothing is filled with what happens
to lie in memory.
Give a function in place of a built model, `init={pattern: fill}`, or load weights.""",
        wrong="sharded = ss.shard(meta_model, ...); sharded.init(ss.adamw(lr=1e-3))",
        right='sharded = ss.shard(lambda: build("8b"), ...)',
    ),
    CodeEntry(
        code="SS407",
        title="a state, a gradient or a step that does not belong together",
        explanation="""\
A step takes a state that its own sharding made: the same names, layouts and mesh. A state of another sharding,
a dict in its place, a gradient for a parameter that is not trained, or a state without an optimizer is refused
before anything moves.
Make states with `sharded.init`, `sharded.load` or `ss.restore`; `ss.restore` reads any mesh's files into any
other.""",
    ),
    CodeEntry(
        code="SS408",
        title="a checkpoint of something else",
        explanation="""\
A checkpoint holds parameters, persistent buffers and the optimizer's state by their global names. What is restored
must have the same names, shapes and dtypes, on whatever mesh; nothing is cast, left out or made up. All entries
that are missing, surplus or of another shape or dtype are listed. An optimizer of another kind cannot go on from
the state of the one that was saved; one with other options of the same kind can.
Shard the model that was saved, with the parameters frozen that were frozen then, and give the optimizer of that
run.""",
        wrong="ss.restore(sharded, path, optimizer=ss.sgd(lr=0.1))      # the run had ss.adamw",
        right="ss.restore(sharded, path, optimizer=ss.adamw(lr=schedule))",
    ),
    CodeEntry(
        code="SS409",
        title="no checkpoint, or a damaged one",
        explanation="""\
A folder is a checkpoint when it has a manifest.json, which is written last and states the length and the sum of
every file. `ss.save` writes beside the folder's name and renames, so that a killed run leaves the checkpoint before.
Here there is none by this name, or files are not what was written: they are named. A file that was cut short or
changed would restore in silence to something else.
Give the folder that was given to `ss.save`; restore an earlier one where this one is damaged.""",
    ),
    CodeEntry(
        code="SS410",
        title="a state or a place that cannot be saved",
        explanation="""\
A save replaces a checkpoint and nothing else: a folder with other things in it is left alone. The place must be
writable, and the same folder on every rank. An optimizer's state may be any nest of dicts, lists and tuples whose
leaves are numbers or tensors; a tensor is saved as a parameter is where it has the name and shape of one, and must
else be the same on every rank.""",
    ),
    CodeEntry(
        code="SS411",
        title="a batch whose sequence is in another order",
        explanation="""\
Where causal attention is balanced over cp, a rank holds two chunks of the sequence, one from the front and one from the
back. `local_batch` cuts every entry with `@cp` so, by the same rule. A batch that was not cut by it would be read in
another order than its own, and no shape would tell.
Hand on what `local_batch` returns, as it is. A loader that reads a consecutive part of the sequence on each rank
goes with `Policy(balance=False)`.""",
    ),
    CodeEntry(
        code="SS421",
        title="a step that fails while it runs",
        explanation="""\
What torch raised in forward, in the loss or in backward, with what is known of the place in front: the module and
its line, the tensors that lie there on a rank, and the rules that laid them out so. The error is of torch's own
class still (`except IndexError` catches it), and the original is its cause.
Typing knows shapes and layouts, and no values: an index out of range, a label beyond the vocabulary or memory
that does not suffice show only now. The state that the step was given is as it was.""",
    ),
)

CATALOG: Mapping[str, CodeEntry] = {entry.code: entry for entry in ENTRIES}
"""Code -> its entry, in order."""


def as_markdown() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "<!-- Written by `python -m tests.errors.update` from shardspec/catalog.py. -->",
        "",
        "Every refusal carries a code. `shardspec explain SS301` prints its entry. `str(error)` shows where (the",
        "model's line and the rules), why with the numbers, and `fix:` lines: edits that were applied and checked.",
        "`help:` lines are advice that could not be tried.",
    ]
    for prefix, heading in SECTIONS.items():
        lines += ["", f"## {heading}"]
        for entry in ENTRIES:
            if entry.code.startswith(prefix):
                lines += ["", f"### {entry.code}: {entry.title}", "", entry.explanation]
                if entry.wrong:
                    lines += ["", "```", f"wrong   {entry.wrong}", f"right   {entry.right}", "```"]
    return "\n".join(lines) + "\n"
