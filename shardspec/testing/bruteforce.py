"""Brute force of an operator's rule: run it on every simulated rank's part and put the parts together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from shardspec.aliasing import writes
from shardspec.cotangent import Cotangents
from shardspec.diagnostics import ShardingError
from shardspec.functional import cross_entropy
from shardspec.infer import Inference, TypedGraph
from shardspec.kin import Kin
from shardspec.layout import AVG, MAX, MIN, SUM, Layout, dim_axes
from shardspec.mesh import Mesh
from shardspec.nests import tensor_leaves
from shardspec.program import Node, Program, Ref, tensors
from shardspec.recording import trace
from shardspec.rules.fit import check_rank, layout_of, learn_sizes
from shardspec.rules.operator import Type, named_arguments
from shardspec.rules.parse import Entry, ParamClaim, Storage, parse_table
from shardspec.rules.table import Rules
from shardspec.spec import P
from shardspec.survey import survey
from shardspec.testing.local_call import call_locally, masked_lookup
from shardspec.testing.simulate import Ranks, coordinates, difference, group, rank_name, scatter
from shardspec.tracing import HostRead
from shardspec.typecheck import OPERATOR_FAMILIES  # pyright: ignore[reportUnusedImport]  # noqa: F401

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 0.05,
    torch.float16: 0.01,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
    torch.complex32: 0.01,
}


@frozen(kw_only=True)
class Verdict:
    """What brute force found: whether the rules accept the operator on these layouts, and if so, rightly."""

    accepted: bool
    refusal: str = ""
    """Code and reason where it is not accepted."""
    problem: str = ""
    """What is wrong where it is accepted and should not be, or claimed with another layout."""
    outputs: tuple[Layout, ...] = ()

    @property
    def correct(self) -> bool:
        """False where the rules accept something and the ranks compute something else."""
        return not self.problem


def verify_operator(
    op: Callable[..., Any],
    inputs: Sequence[Tensor],
    layouts: Sequence[str | P | Layout],
    mesh: Mesh,
    *,
    seed: int = 0,
    gradients: bool = True,
) -> Verdict:
    """Type `op(*inputs)` with its inputs laid out over a mesh, run it on every rank's parts, and compare.

    Sizes that `op` writes into a call (of `view`, `expand`, `full`) become a rank's own, as the dry run demands of a
    model. The gradients of floating inputs are compared too, for a random cotangent of the outputs.

    Args:
        inputs: the global values, on the CPU; float64 leaves no doubt.
        layouts: for each input a spec, a `P`, or a `Layout`; where it is pending the ranks get random shares.

    Raises:
        ShardingError: for layouts that do not fit the inputs.
        ValueError: for an operator that draws random numbers, or a number of layouts that is not that of inputs.
    """
    if len(layouts) != len(inputs):
        raise ValueError(f"{len(inputs)} inputs, {len(layouts)} layouts")
    names = [f"x{index}" for index in range(len(inputs))]
    fitted = _fit(names, inputs, layouts, mesh)
    try:
        program = record_operator(op, inputs)
    except HostRead as error:
        return Verdict(accepted=False, refusal=str(error))
    attempt = type_layouts(program, fitted, mesh)
    if attempt.refusal:
        return Verdict(accepted=False, refusal=attempt.refusal)
    problem = attempt.run(op, inputs, seed=seed, gradients=gradients)
    return Verdict(accepted=True, problem=problem, outputs=attempt.outputs)


def record_operator(op: Callable[..., Any], inputs: Sequence[Tensor]) -> Program:
    """Record `op(*inputs)` once, to be typed with its inputs laid out in many ways.

    Raises:
        HostRead: `op` reads a value on the host.
    """
    return trace(survey(as_model(op, inputs)), {})


def as_model(op: Callable[..., Any], inputs: Sequence[Tensor]) -> nn.Module:
    """An operator as a model without arguments, its inputs x0, x1, ... as parameters and buffers."""
    return Operator(op, inputs)


def type_layouts(program: Program, layouts: Sequence[Layout], mesh: Mesh) -> "Attempt":
    """Type a recorded operator, forward and backward, with its inputs laid out over a mesh."""
    fitted = {f"x{index}": layout for index, layout in enumerate(layouts)}
    inference = Inference(mesh.shape, _claims(program, fitted), {}, lambda *_: None, Kin())
    typed = inference.program(program)
    if inference.issues:
        refusal = inference.issues[0].refusal
        return Attempt(typed, mesh, fitted, inference, f"{refusal.code}: {refusal.what}\n{refusal.why}")
    cotangents = Cotangents(inference)
    dtypes = {ref.index: program.values[ref.index].dtype for ref in tensors(program.result)}
    seeds = [index for index, dtype in dtypes.items() if dtype.is_floating_point or dtype.is_complex]
    backward = cotangents.program(typed, seeds)
    if cotangents.conflicts:
        axis = cotangents.conflicts[0].axis
        refusal = f"SS307: some uses owe a sum over {axis} that others do not"
        return Attempt(typed, mesh, fitted, inference, refusal)
    return Attempt(typed, mesh, fitted, inference, owed=backward.owed)


@define(eq=False)
class Attempt:
    """A recorded operator typed on one choice of layouts."""

    typed: TypedGraph
    mesh: Mesh
    layouts: Mapping[str, Layout]
    inference: Inference
    refusal: str = ""
    """Code and reason where it is not accepted."""
    owed: Mapping[int, frozenset[str]] = field(factory=dict)
    """Value of an input -> axes over which its gradient is a pending sum."""

    @property
    def outputs(self) -> tuple[Layout, ...]:
        """The claimed layouts of an accepted operator's results."""
        program = self.typed.graph
        assert isinstance(program, Program), "an operator is recorded as a program"
        return tuple(self.typed.layout(ref.index) for ref in tensors(program.result))

    def run(self, op: Callable[..., Any], inputs: Sequence[Tensor], *, seed: int = 0, gradients: bool = True) -> str:
        """Run an accepted operator on every rank's parts; in words what is wrong, or nothing."""
        program = self.typed.graph
        assert isinstance(program, Program), "an operator is recorded as a program"
        outputs = [ref.index for ref in tensors(program.result)]
        trial = _Trial(self.typed, self.mesh, inputs, self.layouts, seed)
        try:
            trial.forward(op, outputs)
            if gradients:
                trial.backward(outputs, self.owed)
        except _WrongError as wrong:
            return str(wrong)
        return ""


class Operator(nn.Module):
    """An operator as a model without arguments, its inputs as parameters and buffers."""

    def __init__(self, op: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.op = op
        self.count = len(inputs)
        for index, tensor in enumerate(inputs):
            if tensor.is_floating_point():
                self.register_parameter(f"x{index}", nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(f"x{index}", tensor)

    def forward(self) -> Any:
        return self.op(*(getattr(self, f"x{index}") for index in range(self.count)))


def _fit(
    names: Sequence[str], inputs: Sequence[Tensor], layouts: Sequence[str | P | Layout], mesh: Mesh
) -> list[Layout]:
    """The inputs' layouts, specs read as an activation's."""
    specs = {name: spec for name, spec in zip(names, layouts, strict=True) if not isinstance(spec, Layout)}
    table, problems = parse_table(Rules(params={}, activations=specs))
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, inputs, strict=True)}
    entries: dict[str, Entry] = {entry.rule.pattern: entry for entry in table.activations}
    problems += [p for name, entry in entries.items() if (p := check_rank(entry, name, shapes[name])) is not None]
    if problems:
        raise ShardingError(problems)
    sizes, problems = learn_sizes(((name, entry, shapes[name]) for name, entry in entries.items()), {})
    found: list[Layout] = []
    for name, given in zip(names, layouts, strict=True):
        if isinstance(given, Layout):
            found.append(given)
            assert given.global_shape(mesh.shape) == shapes[name], f"{given} is no layout of shape {shapes[name]}"
            continue
        layout, _, problem = layout_of(entries[name], name, shapes[name], sizes.known, mesh, storage=False)
        problems += [problem] if problem else []
        found.append(layout)
    if problems:
        raise ShardingError(problems)
    return found


def _claims(program: Program, layouts: Mapping[str, Layout]) -> dict[str, ParamClaim]:
    entry: Any = None  # nothing here explains itself by the rule of a table
    return {
        name: ParamClaim(name, entry, value.shape, value.dtype, value.kind == "buffer", layouts[name], Storage())
        for name, value in ((name, program.values[index]) for name, index in program.params.items())
    }


class _WrongError(Exception):
    """The ranks do not hold what the types claim."""


@define(eq=False)
class _Trial:
    """One run of a typed operator on all ranks, node by node."""

    typed: TypedGraph
    mesh: Mesh
    inputs: Sequence[Tensor]
    layouts: Mapping[str, Layout]
    seed: int
    leaves: dict[str, Ranks] = field(factory=dict)
    values: dict[int, Ranks] = field(factory=dict)
    whole_leaves: list[Tensor] = field(factory=list)
    whole: list[Tensor] = field(factory=list)

    def forward(self, op: Callable[..., Any], outputs: Sequence[int]) -> None:
        """Run the operator on the whole and on every rank's part, and compare."""
        self.whole_leaves = [_leaf(tensor) for tensor in self.inputs]
        self.whole = tensor_leaves(op(*(leaf.clone() for leaf in self.whole_leaves)))
        sizes, graph = self.mesh.shape, self.typed.graph
        for name, index in graph.params.items():
            tensor = self.inputs[int(name[1:])]
            parts = scatter(tensor.detach(), self.layouts[name], sizes, self.seed + index)
            self.leaves[name] = {at: _leaf(held) for at, held in parts.items()}
            self.values[index] = {at: held.clone() for at, held in self.leaves[name].items()}
        for index, value in enumerate(graph.values):
            if value.kind == "constant":
                assert value.data is not None, "a constant has a value"
                self.values[index] = {at: value.data.clone() for at in coordinates(sizes)}
        for position, node in enumerate(graph.nodes):
            self._node(position, node)
        for number, (index, whole) in enumerate(zip(outputs, self.whole, strict=True)):
            self._check(self.values[index], whole, index, f"result {number}")

    def _check(self, ranks: Ranks, whole: Tensor, index: int, name: str) -> None:
        kind = self.typed.types[index]
        assert kind is not None, "an accepted program is typed"
        for dim in kind.uniform:
            if whole.numel() and not torch.equal(whole, whole.narrow(dim, 0, 1).expand_as(whole)):
                raise _WrongError(f"dim {dim} of {name} is said to be uniform, and is not")
        held = next(iter(ranks.values()))
        if held.dtype != whole.dtype:
            raise _WrongError(f"{name} is {whole.dtype} on the whole and {held.dtype} on a rank")
        problem = difference(
            {at: tensor.detach() for at, tensor in ranks.items()},
            whole.detach(),
            kind.layout,
            self.mesh.shape,
            tolerance=self._tolerance() if whole.dtype in TOLERANCE else 0.0,
        )
        if problem:
            raise _WrongError(f"{name} is said to be {kind.layout}: {problem}")

    def _node(self, position: int, node: Node) -> None:
        types = [self.typed.types[index] for index in node.outputs if index is not None]
        shapes = [kind.layout.shape for kind in types if kind is not None]
        lowering = self.typed.lowering.get(position, "")
        made: dict[Any, Any] = {}
        for at in coordinates(self.mesh.shape):
            read = self._operands(position, node, at)
            if lowering == "embedding":
                made[at] = masked_lookup(node, read, self._first_row(node, at))
            elif lowering == "cross_entropy":
                made[at] = self._gathered_loss(node, read, at)
            elif lowering:
                raise ValueError(f"{node.op} has a local form that is not simulated: {lowering}")
            else:
                made[at] = call_locally(node, read, self.typed.local.get(position, {}), shapes)
        outs = {at: list(out) if isinstance(out, (tuple, list)) else [out] for at, out in made.items()}
        for number, index in enumerate(node.outputs):
            if index is None:
                continue
            self.values[index] = {at: out[number] for at, out in outs.items()}
            kind = self.typed.types[index]
            assert kind is not None, "an accepted program is typed"
            for at, tensor in self.values[index].items():
                if not _fits(tuple(tensor.shape), kind):
                    raise _WrongError(
                        f"{node.op} gives {rank_name(at)} shape {tuple(tensor.shape)}, its type is {kind.layout}"
                    )

    def _operands(self, position: int, node: Node, at: Any) -> Callable[[Ref], Tensor]:
        """A rank's operands; those that are uniform along a dim as long as they are read."""
        refs = node.operands
        wanted = {ref: kind.layout for ref, kind in zip(refs, self.typed.consumed.get(position, ()), strict=False)}

        def read(ref: Ref) -> Tensor:
            tensor, kind, layout = self.values[ref.index][at], self.typed.types[ref.index], wanted.get(ref)
            if kind is None or layout is None:
                return tensor
            for dim in kind.uniform:
                length = layout.shape[dim]
                if tensor.shape[dim] != length:
                    tensor = tensor.narrow(dim, 0, 1).expand(*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
            if tensor is not self.values[ref.index][at] and writes(node.func):
                # What is written to was made in its local size, and its other names must see the write.
                self.values[ref.index][at] = tensor = tensor.clone()
            return tensor

        return read

    def _first_row(self, node: Node, at: Any) -> int:
        """The first row of the vocabulary that a rank holds."""
        dims = self.typed.layout(tensors(node.args)[0].index).dims[0]
        first = 0
        for axis in dim_axes(dims):
            first = first * self.mesh[axis] + dict(at)[axis]
        return first * self.typed.layout(tensors(node.args)[0].index).shape[0]

    def _gathered_loss(self, node: Node, read: Callable[[Ref], Tensor], at: Any) -> Any:
        """`ss.cross_entropy` over the logits of all ranks that share a vocabulary."""
        logits = node.args[0]
        pieces: list[tuple[Any, Tensor]] = [(at, read(logits))]
        for axis in reversed(dim_axes(self.typed.layout(logits.index).dims[-1])):
            pieces = [
                (other, self.values[logits.index][other] if other == at else self.values[logits.index][other].detach())
                for place, _ in pieces
                for other in group(place, axis, self.mesh.shape)
            ]
        pieces.sort(key=lambda piece: [dict(piece[0])[a] for a in dim_axes(self.typed.layout(logits.index).dims[-1])])
        arguments = named_arguments(node)
        whole = torch.cat([piece for _, piece in pieces], dim=-1)
        rest = {key: item for key, item in arguments.items() if key not in ("0", "1")}
        return cross_entropy(whole, read(node.args[1]), **rest)

    def backward(self, outputs: Sequence[int], owed: Mapping[int, frozenset[str]]) -> None:
        """Compare the inputs' gradients, for a random cotangent of every floating output."""
        chosen = [
            (number, index)
            for number, index in enumerate(outputs)
            if self.whole[number].requires_grad
            and not any(kind in (MAX, MIN) for _, kind in self.typed.layout(index).pending)
        ]
        leaves = [leaf for leaf in self.whole_leaves if leaf.requires_grad]
        if not chosen or not leaves:
            return
        generator = torch.Generator().manual_seed(self.seed)
        sizes = self.mesh.shape
        seeds = [
            torch.randn(self.whole[n].shape, generator=generator, dtype=torch.float64).to(self.whole[n].dtype)
            for n, _ in chosen
        ]
        expected = torch.autograd.grad([self.whole[n] for n, _ in chosen], leaves, seeds, allow_unused=True)
        wanted = dict(zip(map(id, leaves), expected, strict=True))
        arriving = [
            scatter(seed / self._mean(index), Layout(self.typed.layout(index).dims), sizes)
            for seed, (_, index) in zip(seeds, chosen, strict=True)
        ]
        tolerance = 10 * self._tolerance()
        trained = [name for name in self.leaves if self.inputs[int(name[1:])].is_floating_point()]
        found: dict[str, Ranks] = {name: {} for name in trained}
        for at in coordinates(sizes):
            live = [
                (self.values[i][at], seed[at])
                for (_, i), seed in zip(chosen, arriving, strict=True)
                if self.values[i][at].requires_grad
            ]
            mine = [self.leaves[name][at] for name in trained]
            grads = torch.autograd.grad(
                [value for value, _ in live],
                mine,
                [seed.expand_as(value) for value, seed in live],
                allow_unused=True,
                retain_graph=True,
            )
            for name, leaf, grad in zip(trained, mine, grads, strict=True):
                found[name][at] = torch.zeros_like(leaf) if grad is None else grad
        for name in trained:
            index = self.typed.graph.params[name]
            whole = wanted[id(self.whole_leaves[int(name[1:])])]
            layout = self.layouts[name]
            expects = Layout(layout.dims, tuple((axis, SUM) for axis in sorted(owed.get(index, ()))))
            target = torch.zeros_like(self.inputs[int(name[1:])]) if whole is None else whole
            problem = difference(found[name], target / self._mean(index), expects, sizes, tolerance=tolerance)
            if problem:
                raise _WrongError(f"the gradient of input {name[1:]} is said to be {expects}: {problem}")

    def _tolerance(self) -> float:
        """That of the coarsest dtype that is computed in."""
        return max(TOLERANCE.get(value.dtype, 0.0) for value in self.typed.graph.values)

    def _mean(self, index: int) -> int:
        """By what a rank's share of a mean divides the mean's cotangent."""
        count = 1
        for axis, kind in self.typed.layout(index).pending:
            count *= self.mesh[axis] if kind == AVG else 1
        return count


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _fits(shape: tuple[int, ...], kind: Type) -> bool:
    wanted = kind.layout.shape
    return len(shape) == len(wanted) and all(
        index in kind.uniform or one == two for index, (one, two) in enumerate(zip(shape, wanted, strict=True))
    )
