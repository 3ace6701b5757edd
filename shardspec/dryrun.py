"""Run forward again on local shapes, still on meta, and compare it with the typed program op for op.

The typing says what each rank's call must be; this finds the model that makes another one: a head count
written into a `view`, an `arange` over a local length, a division by a local width.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from attrs import define, evolve, frozen
from torch import nn

from shardspec.diagnostics import Location
from shardspec.infer import TypedGraph, absolute
from shardspec.kin import Kin
from shardspec.nests import distinct, tensor_leaves
from shardspec.program import Graph, Node, Program, Ref, Value, substitute, tensors
from shardspec.rules.attention import ATTENTION
from shardspec.rules.operator import Refusal, Type, named_arguments
from shardspec.stages import Claims
from shardspec.survey import Survey
from shardspec.torch_private import no_torch_dispatch, no_torch_function
from shardspec.tracing import HostRead, Tracer, run, user_frame
from shardspec.twin import Twin

SILENT = frozenset({"detach", "clone", "contiguous", "alias", "lift_fresh"})
"""Operators whose presence may differ: they copy or rename."""

VIEWS = frozenset({"view", "_unsafe_view", "reshape"})
"""Three names of one thing, chosen by strides."""

SHAPED = VIEWS | {
    "expand", "expand_as", "broadcast_to", "view_as", "flatten", "unflatten", "full", "zeros", "ones", "empty",
    "new_zeros", "new_ones", "new_full", "new_empty", "split", "split_with_sizes", "chunk",
}  # fmt: skip
"""Operators that take sizes: the shapes of their results are compared instead."""

LENGTHS = frozenset({"size", "sizes", "shape", "split_size", "split_sizes", "chunks"})
"""The arguments of such operators that are sizes."""

ATTENTION_FUNCTION = torch.ops.aten.scaled_dot_product_attention.default

PLACES = frozenset({"device", "pin_memory", "memory_format", "layout"})
"""Arguments that say where a result lies, and nothing of its values."""


@define(eq=False)
class _Pair:
    """A typed graph and the local graph that should be its image."""

    typed: TypedGraph
    local: Graph
    fqn: str
    ended: bool = False
    """False where the local run broke off inside."""


@frozen(eq=False)
class Difference:
    """A place where the local program is not the image of the typed one."""

    typed: TypedGraph
    position: int | None
    """The node of the typed graph that has no image; None at the end of the program."""
    path: str
    """The module whose forward runs."""
    what: str
    """`<value 3>` stands for the name of the typed graph's value 3."""
    why: str = ""
    locations: tuple[Location, ...] = ()
    code: str = "SS309"
    advice: str = "take sizes from the tensors at hand, or name the attribute that holds a global size in attributes="


class Replayer(Tracer):
    """Runs the local program: declared points change shape as planned, verified blocks are skipped."""

    def __init__(
        self,
        graph: Program,
        names: Survey,
        typed: TypedGraph,
        attributes: Mapping[str, Mapping[str, int]],
        kin: Kin,
    ) -> None:
        super().__init__(graph, names.model, names.ids)
        self.kin = kin
        self.typed = [typed]
        self.cursor = [0]
        self.pairs = [_Pair(typed, graph, "")]
        self.attributes = attributes
        self.verified: set[Any] = set()
        self.results: dict[int, list[tuple[tuple[int, ...], torch.dtype]]] = {}
        """Typed block -> the local shapes of what it gives."""
        self.entered: _Pair | None = None
        self.failed = ""
        """The module in which the local run broke off."""

    def _find(self, wanted: Callable[[Node], bool]) -> int | None:
        """The next node of the typed graph that answers, from where the last one was found."""
        nodes = self.typed[-1].graph.nodes
        for position in range(self.cursor[-1], len(nodes)):
            if wanted(nodes[position]):
                self.cursor[-1] = position + 1
                return position
        return None

    def point(self, names: tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        position = self._find(lambda node: node.op == "point" and node.func == names)
        step = self.typed[-1].transitions.get(position) if position is not None else None
        if step is None or not step.moves:
            return self.append_point(names, tensor, self.fresh(tensor))
        with no_torch_function(), no_torch_dispatch():
            out = torch.empty(step.after.shape, dtype=tensor.dtype, device="meta")
        return self.append_point(names, tensor, out)

    def block(self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        relative = fqn[len(self.frame.prefix) :]
        position = self._find(lambda node: node.op == "block" and node.func.fqn == relative)
        inner = self.typed[-1].calls.get(position) if position is not None else None
        if position is None or inner is None:
            return self.plain(module, fqn, forward, args, kwargs)
        entered = distinct(tensor_leaves((args, kwargs)))
        key = (id(inner), constants((args, kwargs)), self._changed(fqn))
        if key in self.verified:
            out = self._skip(self.typed[-1].graph.nodes[position], inner)
        else:
            self.verified.add(key)
            pair = _Pair(inner, Graph(), fqn)
            self.pairs.append(pair)
            self.entered = pair
            self.typed.append(inner)
            self.cursor.append(0)
            try:
                _, entered, out = self.in_block(module, fqn, forward, args, kwargs)
            finally:
                self.typed.pop()
                self.cursor.pop()
            pair.local.outputs = [ref.index for ref in tensors(self.result_refs)]
            pair.ended = True
        return self.append_block(self.typed[-1].graph.nodes[position], entered, out)

    def plain(self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.entered is not None:
            # The first call inside a block's own frame: what it records is there to compare even if it breaks off.
            self.entered.local, self.entered = self.frame.graph, None
        try:
            return super().plain(module, fqn, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or fqn
            raise

    def attach(self, fqn: str, module: nn.Module) -> None:
        for name, value in self.attributes.get(self.kin.canonical(fqn), {}).items():
            setattr(module, name, value)
        super().attach(fqn, module)

    def _changed(self, fqn: str) -> tuple[tuple[str, str, int], ...]:
        """The attributes inside a block that have another value on a rank."""
        fqn = self.kin.canonical(fqn)
        return tuple(
            (path.removeprefix(fqn), name, value)
            for path, named in self.attributes.items()
            if path == fqn or path.startswith(f"{fqn}.")
            for name, value in named.items()
        )

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A mask over a sequence that is split over cp has the columns of all keys: the typing has looked at it."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        if func is ATTENTION_FUNCTION and isinstance(mask, torch.Tensor) and not _fits(mask, args[0], args[1]):
            query, value = args[0], args[2]
            with no_torch_function(), no_torch_dispatch():
                out = query.new_empty((*query.shape[:-1], value.shape[-1]))
            return self.append(func, ATTENTION, args, kwargs, out)
        return super().record(func, args, kwargs)

    def append_block(self, node: Node, entered: list[torch.Tensor], out: Any) -> Any:
        """Append the image of a block's call."""
        with no_torch_function():
            args = tuple(Ref(self.value_of(tensor)) for tensor in entered)
            outputs = tuple(self.enter(item, Value(tuple(item.shape), item.dtype)) for item in tensor_leaves(out))
        self.frame.graph.nodes.append(Node("block", node.func, args, {}, outputs, self.path, node.file, node.line))
        return out

    def _skip(self, node: Node, inner: TypedGraph) -> Any:
        """A verified block's results, from its types."""
        if id(inner) not in self.results:
            shapes = [(inner.layout(i).shape, inner.graph.values[i].dtype) for i in inner.graph.outputs]
            self.results[id(inner)] = shapes
        made = dict(zip(node.outputs, self.results[id(inner)], strict=True))

        def make(ref: Ref) -> torch.Tensor:
            shape, dtype = made[ref.index]
            return torch.empty(shape, dtype=dtype, device="meta")

        with no_torch_function(), no_torch_dispatch():
            return substitute(node.nested, make)


def _fits(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a mask is of the queries and keys that a rank holds."""
    return mask.shape[-2] in (1, query.shape[-2]) and mask.shape[-1] in (1, key.shape[-2])


def constants(tree: Any) -> Any:
    """What a nest of arguments holds beside tensors, as something that compares."""
    if isinstance(tree, torch.Tensor):
        return None
    if isinstance(tree, (list, tuple)):
        return tuple([None if isinstance(item, torch.Tensor) else constants(item) for item in tree])
    if isinstance(tree, dict):
        return tuple([(key, constants(item)) for key, item in tree.items()])
    return (type(tree), tree) if isinstance(tree, (bool, int, float, str, type(None))) else id(tree)


def dry_run(
    names: Survey,
    typed: TypedGraph,
    program: Program,
    claims: Claims,
    attributes: Mapping[str, Mapping[str, int]],
    inputs: Mapping[str, Any],
    loss_fn: Callable[..., Any] | None,
    training: bool | None = None,
) -> list[Difference]:
    """Each place where the local program is not the image of the typed one.

    Args:
        attributes: module -> attribute -> what it is on a rank, in the names of blocks that stand for others.
    """
    image = Program()
    tracer = Replayer(image, names, typed, attributes, claims.kin)
    experts = claims.table.rules.experts
    tracer.whole = re.compile(experts) if experts is not None else None

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        def make() -> torch.Tensor:
            local = torch.empty(claims.of(name).layout.shape, dtype=tensor.dtype, device="meta")
            return nn.Parameter(local, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else local

        return tracer.hold(name, make)

    local = Twin(names.model, place, tracer.attach, at_once=names.tangled).root
    if training is not None:
        local.train(training)
    batch: dict[str, Any] = {}
    for name, item in inputs.items():
        if not isinstance(item, torch.Tensor):
            batch[name] = item
            continue
        tensor = torch.empty(typed.layout(program.entries[name]).shape, dtype=item.dtype, device="meta")
        image.entries[name] = tracer.enter(tensor, Value(tuple(tensor.shape), tensor.dtype, name, "entry"))
        batch[name] = tensor
    try:
        run(tracer, local, batch, loss_fn)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, HostRead) as error:
        found = _compare_all(tracer)
        return found or [_crash(error, tracer)]
    tracer.pairs[0].ended = True
    found = _compare_all(tracer) or list(_compare_loss(typed, program, image) if loss_fn is not None else ())
    return found or list(_compare_bodies(typed, "", claims, attributes, set()))


def _compare_all(tracer: Replayer) -> list[Difference]:
    found: list[Difference] = []
    for pair in tracer.pairs:
        first = next(_compare(pair), None)
        if first is not None:
            found.append(first)
    return found


def _crash(error: Exception, tracer: Replayer) -> Difference:
    """The operation that failed is the first that the innermost graph did not come to."""
    pair = [pair for pair in tracer.pairs if not pair.ended][-1]
    whole, part = _effective(pair.typed.graph)[0], _effective(pair.local)[0]
    return Difference(
        pair.typed,
        whole[len(part)][0] if len(part) < len(whole) else None,
        tracer.failed,
        f"{tracer.failed or 'the model'} fails on a rank's local shapes",
        str(error).splitlines()[0] if str(error) else type(error).__name__,
        user_frame(error),
    )


def _effective(graph: Graph) -> tuple[list[tuple[int, Node]], dict[int, int]]:
    """The nodes that compute or move, and for each value the one that it is another name of."""
    names: dict[int, int] = {}
    kept: list[tuple[int, Node]] = []
    for position, node in enumerate(graph.nodes):
        if node.op in SILENT and node.args and isinstance(node.args[0], Ref) and node.outputs[0] is not None:
            source = node.args[0].index
            names[node.outputs[0]] = names.get(source, source)
        else:
            kept.append((position, node))
    return kept, names


def _compare(pair: _Pair) -> Iterator[Difference]:
    whole, whole_names = _effective(pair.typed.graph)
    part, part_names = _effective(pair.local)
    image = dict(zip(pair.typed.graph.inputs, pair.local.inputs, strict=False))
    for name, index in pair.typed.graph.params.items():
        if name in pair.local.params:
            image[index] = pair.local.params[name]
    if isinstance(pair.typed.graph, Program) and isinstance(pair.local, Program):
        image.update({index: pair.local.entries[name] for name, index in pair.typed.graph.entries.items()})
    for (position, node), (_, other) in zip(whole, part, strict=False):
        problem = _differs(pair, position, node, other, image, whole_names, part_names)
        if problem:
            yield _mismatch(pair, position, other, problem)
            return
        both = zip(node.outputs, other.outputs, strict=False)
        image.update((one, two) for one, two in both if one is not None and two is not None)
    if not pair.ended:
        return
    if len(whole) != len(part):
        if len(whole) > len(part):
            position, extra = whole[len(part)]
            yield _mismatch(pair, position, extra, f"only the whole runs {extra.op} here")
        else:
            extra = part[len(whole)][1]
            yield _mismatch(pair, None, extra, f"it runs {extra.op} where the whole has ended")
        return
    for one, two in zip(pair.typed.graph.outputs, pair.local.outputs, strict=False):
        index, found = whole_names.get(one, one), part_names.get(two, two)
        if image.setdefault(index, found) != found:
            yield _mismatch(pair, whole[-1][0], part[-1][1], "it returns another value than the whole does")
            return


def _compare_bodies(
    typed: TypedGraph,
    fqn: str,
    claims: Claims,
    attributes: Mapping[str, Mapping[str, int]],
    seen: set[int],
) -> Iterator[Difference]:
    """The forwards of experts modules, each on the shapes that tp leaves a rank of its parameters."""
    for position, inner in typed.calls.items():
        yield from _compare_bodies(inner, absolute(fqn, typed.graph.nodes[position].func.fqn), claims, attributes, seen)
    for position, body in typed.bodies.items():
        if id(body) in seen:
            continue
        seen.add(id(body))
        node = typed.graph.nodes[position]
        full = absolute(fqn, node.func.fqn)
        shapes = {name: claims.of(absolute(full, name)).layout.shape for name in node.func.names}
        hidden, weights = (typed.graph.values[node.args[at].index] for at in (0, 1))
        try:
            local = node.func.record(hidden, weights, shapes, attributes.get(claims.kin.canonical(full), {}))
        except Refusal as error:
            yield Difference(body, None, full, error.what, error.why)
            continue
        different = next(_compare(_Pair(body, local, full, ended=True)), None)
        if different is not None:
            yield different


def _compare_loss(typed: TypedGraph, program: Program, image: Program) -> Iterator[Difference]:
    """SS310 for a loss or a weight that is a Python number and depends on a rank's part of the batch."""
    whole, part = program.result, image.result
    if not (isinstance(whole, (tuple, list)) and isinstance(part, (tuple, list))):
        return
    for what, one, two in zip(("sum", "weight"), whole, part, strict=False):
        if isinstance(one, (int, float)) and one != two:
            yield Difference(
                typed,
                None,
                "loss",
                f"the loss's {what} is {one} on the whole batch and {two} on a rank's part",
                "a Python number is taken as it is, on every rank alike; only tensors are summed over ranks",
                tuple(node.location for node in image.nodes[-1:]),
                code="SS310",
                advice="count with a tensor: (labels != -100).sum()",
            )


def _mismatch(pair: _Pair, position: int | None, other: Node, problem: str) -> Difference:
    path = absolute(pair.fqn, other.path)
    what, *why = problem.splitlines()
    found = Difference(
        pair.typed,
        position,
        path,
        f"{path or 'the model'} does not compute its part on a rank: {what}",
        "\n".join(why) or "a branch or a loop of the model hangs on a local size",
        (other.location,),
    )
    return evolve(found, advice=GLOBAL) if why == [LOCAL] else found


LOCAL = "the number comes from a local size, and stands for the whole one"
GLOBAL = "keep the whole size in an attribute of the module, or use an operator that needs none, such as mean"


def _differs(
    pair: _Pair,
    position: int,
    node: Node,
    other: Node,
    image: dict[int, int],
    whole_names: dict[int, int],
    part_names: dict[int, int],
) -> str:
    """What is wrong with a local operation, or nothing."""
    if node.op != other.op and not (node.op in VIEWS and other.op in VIEWS):
        return f"it runs {other.op} where the whole runs {node.op}"
    if node.op == "point" and node.func != other.func:
        return f"it passes {other.func[0]} where the whole passes {node.func[0]}"
    what = absolute(pair.fqn, node.func[0]) if node.op == "point" else node.op
    refs = node.operands
    others = other.operands
    if len(refs) != len(others):
        return f"{node.op} reads {len(others)} tensors, and {len(refs)} on the whole"
    typed, local = pair.typed, pair.local
    read = typed.consumed.get(position)
    for number, (one, two) in enumerate(zip(refs, others, strict=True)):
        index = whole_names.get(one.index, one.index)
        found = part_names.get(two.index, two.index)
        if image.setdefault(index, found) != found:
            verb = "is" if node.op == "point" else "reads"
            return f"{what} {verb} another value than on the whole"
        if typed.graph.values[index].kind == "constant":
            problem = _constant_problem(typed.graph.values[index], local.values[found])
            if problem:
                return problem
        if read is not None:
            problem = _shape_problem(read[number], local.values[two.index].shape, f"<value {one.index}>")
            if problem:
                return problem
    if len(node.outputs) != len(other.outputs):
        return f"{node.op} gives {len(other.outputs)} tensors, and {len(node.outputs)} on the whole"
    for one, two in zip(node.outputs, other.outputs, strict=True):
        if one is None or two is None or typed.types[one] is None:
            continue
        kind = typed.types[one]
        assert kind is not None
        problem = _shape_problem(kind, local.values[two].shape, f"the result of {node.op}")
        if problem:
            return problem
    return "" if node.op in ("point", "block") else _argument_problem(pair, position, node, other)


def _constant_problem(whole: Value, part: Value) -> str:
    """What is wrong with a constant that Python made, or nothing."""
    if whole.data is None or part.data is None:
        return ""
    if whole.data is part.data or whole.data.data_ptr() == part.data.data_ptr():
        return ""
    if whole.data.shape == part.data.shape and bool(torch.equal(whole.data, part.data)):
        return ""
    one, two = (
        f"{item.item()!r}" if item.numel() == 1 else f"of shape {tuple(item.shape)}" for item in (whole.data, part.data)
    )
    return f"a constant is {two} on a rank and {one} on the whole\n{LOCAL}"


def _shape_problem(kind: Type, shape: tuple[int, ...], what: str) -> str:
    wanted = kind.layout.shape
    if len(shape) == len(wanted) and all(
        index in kind.uniform or one == two for index, (one, two) in enumerate(zip(wanted, shape, strict=True))
    ):
        return ""
    return f"{what} has shape {shape} on a rank\nits layout is {kind.layout}, of which a rank's part is {wanted}"


def _argument_problem(pair: _Pair, position: int, node: Node, other: Node) -> str:
    expected = pair.typed.local.get(position, {})
    mine, theirs = named_arguments(node), named_arguments(other)
    for name, value in mine.items():
        if tensors(value) or expected.get(name) is ... or name in PLACES:
            continue
        if node.op in SHAPED and name in LENGTHS:
            continue
        wanted = expected.get(name, value)
        if name == "start" and node.op in ("slice", "narrow") and _start(pair.local, other, theirs) == (wanted or 0):
            continue
        if theirs.get(name) != wanted:
            if wanted == value:
                found = f"{name}={theirs.get(name)!r} on a rank and {value!r} on the whole"
                return f"{node.op} is called with {found}\n{LOCAL}"
            return (
                f"{node.op} is called with {name}={theirs.get(name)!r}, and the rank's part needs {wanted!r}\n"
                f"on the whole it is called with {value!r}: the number should be taken from a local size"
            )
    return ""


def _start(local: Graph, node: Node, named: Mapping[str, Any]) -> int:
    """Where a slice begins on a rank, counted from the front."""
    shape = local.values[tensors(node.args)[0].index].shape
    length = shape[int(named.get("dim") or 0)]
    start = int(named.get("start") or 0)
    return max(0, start + length) if start < 0 else min(start, length)
