"""How each node of a typed program runs on a rank, as far as memory goes: a `Record` of every one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from shardspec.amounts import NOTHING, Amount, as_kind, fixed, part, plus
from shardspec.contextrun import FORMS, Held, record
from shardspec.footprint import KEPT, PASSING, Measure, Origin, Record, probe
from shardspec.functional import accumulation_dtype
from shardspec.infer import TypedGraph
from shardspec.layout import Layout, Sizes
from shardspec.moves import Move
from shardspec.peaks import Peaks
from shardspec.program import Node, Ref, substitute, tensors
from shardspec.rules.operator import named_arguments
from shardspec.sequence import AXIS

COLLECTIVES = "collectives"

CHUNK_ELEMENTS = 1 << 24
"""Of the logits of a vocabulary-parallel cross-entropy that are worked on at a time; see runtime/vocab.py."""

RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "view_as", "flatten", "unflatten"})
EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
FILLS = frozenset({"full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})
SLICES = frozenset({"slice", "narrow"})
SPLITS = frozenset({"split", "split_with_sizes", "chunk"})


@define(eq=False)
class LocalRun:
    """The nodes of one typed graph, run one after another on meta tensors of a rank's shapes."""

    typed: TypedGraph
    sizes: Sizes
    dtype_of: Callable[[torch.dtype], torch.dtype]
    """The dtype that a value has in compute, by the one that it was recorded with."""
    held: dict[int, Tensor] = field(factory=dict)
    """Value -> the tensor that stands for it."""

    def tensor(self, index: int) -> Tensor:
        """The local tensor that stands for a value."""
        found = self.held.get(index)
        if found is None:
            found = self.held[index] = self._empty(self.typed.layout(index), index)
        return found

    def _empty(self, layout: Layout, index: int) -> Tensor:
        dtype = self.dtype_of(self.typed.graph.values[index].dtype)
        return torch.empty(layout.shape, dtype=dtype, device="meta")

    def itemsize(self, index: int) -> int:
        """Bytes of an element of a value."""
        return self.dtype_of(self.typed.graph.values[index].dtype).itemsize

    def whole(self, index: int, kind: str = PASSING) -> Amount:
        """The bytes of a value in storage of its own."""
        return part(kind, self.typed.layout(index), self.itemsize(index), self.sizes)

    def operator(self, position: int, live: Sequence[bool]) -> Record:
        """What one operator does; where it cannot be run alone, it is taken to keep all that it reads and makes."""
        node = self.typed.graph.nodes[position]
        special = SPECIAL.get(self.typed.lowering.get(position, ""))
        if special is not None:
            return special(self, position, live)
        refs = node.operands
        read = [kind.layout for kind in self.typed.consumed.get(position, ())]
        operands = [self._as_read(ref.index, layout) for ref, layout in zip(refs, read, strict=True)]
        made = [index for index in node.outputs if index is not None]
        measure = Measure([self.typed.layout(index) for index in made], read, self.sizes)
        try:
            results, record = probe(lambda entered: self._call(position, refs, entered), operands, live, measure)
            shapes = [tuple(tensor.shape) for tensor in results]
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            shapes, results, record = [], [], Record()
        if shapes != [self.typed.layout(index).shape for index in made]:
            return self._careful(position, live)
        self.held.update(zip(made, results, strict=True))
        return record

    def _as_read(self, index: int, layout: Layout) -> Tensor:
        """A value's tensor; one of the shape that an operator reads it with where that is another."""
        held = self.tensor(index)
        return held if tuple(held.shape) == layout.shape else self._empty(layout, index)

    def _careful(self, position: int, live: Sequence[bool]) -> Record:
        node = self.typed.graph.nodes[position]
        made = [index for index in node.outputs if index is not None]
        own: tuple[Origin, ...] = tuple(self.whole(index) for index in made)
        grads = tuple(self.whole(ref.index) if wants else None for ref, wants in zip(node.operands, live, strict=True))
        return Record(
            outputs=own,
            operands_kept=frozenset(range(len(live))) if any(live) else frozenset(),
            outputs_kept=frozenset(range(len(made))) if any(live) else frozenset(),
            forward=Peaks.of([plus(*(self.whole(index) for index in made))]),
            backward=Peaks.of([plus(*(grad for grad in grads if grad is not None))]),
            grads=grads,
        )

    def _call(self, position: int, refs: Sequence[Ref], entered: list[Tensor]) -> Any:
        node = self.typed.graph.nodes[position]
        made = [self.typed.layout(index) for index in node.outputs if index is not None]
        if node.op in RESHAPES:
            return entered[0].reshape(made[0].shape)
        if node.op in EXPANDS:
            return entered[0].expand(made[0].shape)
        if node.op in FILLS:
            return self._empty(made[0], next(index for index in node.outputs if index is not None))
        if node.op in SPLITS:
            dim = named_arguments(node).get("dim") or 0
            return torch.split(entered[0], [layout.shape[dim] for layout in made], dim)
        given = {ref.index: tensor for ref, tensor in reversed(list(zip(refs, entered, strict=True)))}
        if not hasattr(node.func, "_schema"):
            args, kwargs = substitute((node.args, node.kwargs), lambda ref: given[ref.index])
            return node.func(*args, **kwargs)
        named = named_arguments(node)
        expected = self.typed.local.get(position, {})
        named |= {name: value for name, value in expected.items() if value is not ... and name in named}
        named = substitute(named, lambda ref: given[ref.index])
        if node.op in SLICES and named.get("step", 1) == 1:
            dim, start = named["dim"], int(named.get("start") or 0)
            return entered[0].narrow(dim, start % max(1, entered[0].shape[dim]), made[0].shape[dim])
        if node.op == "scaled_dot_product_attention" and fused(named):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(named[name] for name in ("query", "key", "value", "dropout_p", "is_causal")),
                attn_mask=named["attn_mask"],
                scale=named["scale"],
            )[0]
        if node.op == "to":
            return entered[0].to(made_dtype) if (made_dtype := self._cast(node)) else entered[0]
        return node.func(**named)

    def _cast(self, node: Node) -> torch.dtype | None:
        """What a `to` turns its operand into; None where the recorded one changed nothing."""
        values = self.typed.graph.values
        was, now = values[tensors(node.args)[0].index].dtype, values[node.outputs[0] or 0].dtype
        return None if was == now else now


def fused(named: Mapping[str, Any]) -> bool:
    """Whether attention of these arguments has a fused kernel, which keeps no scores."""
    mask = named["attn_mask"]
    return named["query"].ndim == 4 and not named["dropout_p"] and not (isinstance(mask, Tensor) and mask.requires_grad)


def moved(before: Layout, moves: Sequence[Move], itemsize: int, sizes: Sizes, shape: Sequence[int]) -> Peaks:
    """What a point's moves allocate at a time, as runtime/boundary.py runs them.

    Args:
        before: the layout that enters.
        shape: the global shape; dims of size one need no copy to be joined or cut behind them.
    """
    gathered: list[str] = []
    divided: list[str] = []
    peaks: list[Amount] = []
    now: Amount = NOTHING
    for move in moves:
        joined = (
            move.outer == 1 and not (move.runs or move.to_runs) and all(length == 1 for length in shape[: move.dim])
        )
        was, entering = now, part(COLLECTIVES, before, itemsize, sizes, gathered, divided)
        if move.kind == "all_gather":
            _take(divided, gathered, move.axis)
        elif move.kind in ("reduce_scatter", "slice"):
            _take(gathered, divided, move.axis)
        now = part(COLLECTIVES, before, itemsize, sizes, gathered, divided)
        between = NOTHING
        if move.kind == "all_to_all":
            between = entering
        elif move.kind in ("all_gather", "reduce_scatter") and not joined:
            between = now if move.kind == "all_gather" else entering
        peaks.append(plus(was, between, now))
    return Peaks.of(peaks)


def _take(source: list[str], target: list[str], axis: str) -> None:
    """Undo an axis in `source`, or else add it to `target`."""
    if axis in source:
        source.remove(axis)
    else:
        target.append(axis)


def _embedding(run: LocalRun, position: int, live: Sequence[bool]) -> Record:
    """Vocabulary-parallel embedding keeps each id's row among its own: runtime/vocab.py."""
    node = run.typed.graph.nodes[position]
    weight, ids = (ref.index for ref in node.operands)
    layout, item = run.typed.layout(ids), run.itemsize(weight)
    row = Layout(run.typed.layout(weight).dims[1:])
    out = run.whole(node.outputs[0] or 0)
    local, mask = (part(PASSING, layout, size, run.sizes) for size in (8, 1))
    table = plus(run.whole(weight), part(PASSING, row, item, run.sizes))
    return Record(
        outputs=(out,),
        kept=as_kind(KEPT, local) if live[0] else NOTHING,
        forward=Peaks.of([plus(local, mask, mask, mask, out)]),
        backward=Peaks.of([table]),
        grads=(table if live[0] else None, None),
    )


def _cross_entropy(run: LocalRun, position: int, live: Sequence[bool]) -> Record:
    """Vocabulary-parallel cross-entropy keeps the logits and four numbers a token: runtime/vocab.py."""
    node = run.typed.graph.nodes[position]
    logits, labels = (ref.index for ref in node.operands[:2])
    size, tokens = run.itemsize(logits), run.typed.layout(labels)
    wide = accumulation_dtype(run.dtype_of(run.typed.graph.values[logits].dtype)).itemsize
    number, mask, index = (part(PASSING, tokens, each, run.sizes) for each in (wide, 1, 8))
    chunk = part(PASSING, run.typed.layout(logits), wide, run.sizes, most=CHUNK_ELEMENTS * wide)
    grad = run.whole(logits)
    return Record(
        outputs=tuple(fixed(PASSING, run.itemsize(index)) for index in node.outputs if index is not None),
        operands_kept=frozenset({0}),
        kept=as_kind(KEPT, plus(number, mask, mask, index)),
        forward=Peaks.of([plus(index, mask, mask, *(number,) * 4, chunk)]),
        backward=Peaks.of([plus(grad, chunk if wide > size else NOTHING, number, number)]),
        grads=(grad if live[0] else None, *(None for _ in live[1:])),
    )


def _dropout(run: LocalRun, position: int, live: Sequence[bool]) -> Record:
    """Keyed dropout keeps what it multiplies with, and the global indices of its elements: runtime/attach.py."""
    node = run.typed.graph.nodes[position]
    made = node.outputs[0] or 0
    own = run.whole(made)
    wide, mask = (part(PASSING, run.typed.layout(made), size, run.sizes) for size in (8, 1))
    return Record(
        outputs=(own,),
        kept=as_kind(KEPT, plus(own, wide)),
        forward=Peaks.of([plus(wide, wide, mask), plus(wide, own, own, mask)]),
        backward=Peaks.of([own]),
        grads=tuple(own if wants else None for wants in live),
    )


def _context(run: LocalRun, position: int, live: Sequence[bool]) -> Record:
    """Attention over cp: `shardspec.contextrun`."""
    node, values = run.typed.graph.nodes[position], run.typed.graph.values
    made = node.outputs[0]
    assert made is not None, "attention has a result"
    refs = [ref.index for ref in node.operands]
    dtype = run.dtype_of(values[refs[0]].dtype)
    rows = Layout(run.typed.layout(refs[0]).dims[:-1])

    def held(size: int, sums: Held | None = None) -> Held:
        def of(index: int, times: tuple[str, ...] = ()) -> Amount:
            return part(PASSING, run.typed.layout(index), size, run.sizes, times)

        return Held(
            q=of(refs[0]),
            k=of(refs[1]),
            v=of(refs[2]),
            out=of(made),
            keys=of(refs[1], (AXIS,)),
            values=of(refs[2], (AXIS,)),
            lse=part(PASSING, rows, size, run.sizes),
            mask=of(refs[3]) if len(refs) > 3 else NOTHING,
            sums=sums,
        )

    sums = held(accumulation_dtype(dtype).itemsize)
    return record(run.typed.lowering[position], held(dtype.itemsize, sums), live, run.sizes[AXIS], masked=len(refs) > 3)


SPECIAL: Mapping[str, Callable[[LocalRun, int, Sequence[bool]], Record]] = {
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "dropout": _dropout,
    **dict.fromkeys(FORMS, _context),
}
"""What the runtime runs in an operator's place, by the name that the typing gives it."""
