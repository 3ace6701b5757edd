"""What one operator keeps for its backward and allocates on the way: torch's own answer, on meta tensors.

The operator runs once on tensors of the local shapes, forward and backward, under a mode that sees every storage
come and go. A storage's size in the axes is that of the operand or result whose shape it has.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from shardspec.amounts import NOTHING, Amount, as_kind, fixed, minus, part, plus
from shardspec.layout import DimLayout, Layout, Sizes
from shardspec.nests import tensor_leaves
from shardspec.peaks import NONE, Peaks
from shardspec.torch_private import TorchDispatchMode, storage_key

Shape = tuple[int, ...]

KEPT, PASSING = "activations", "temporary"
"""What is kept for backward, and what comes and goes within a forward or backward."""

Origin = int | Amount
"""Of an operator's result: the operand whose storage it shares, or -1-n for that of its n-th result, or the bytes of
a storage of its own. Of a gradient: the result whose gradient it shares, or bytes."""


@frozen(kw_only=True, eq=False)
class Record:
    """What an operator, or a block of them, does to memory."""

    outputs: tuple[Origin, ...] = ()
    operands_kept: frozenset[int] = frozenset()
    outputs_kept: frozenset[int] = frozenset()
    kept: Amount = field(factory=dict)
    """What else is kept for backward."""
    forward: Peaks = NONE
    """The most that is allocated at a time, beyond what was at its start."""
    backward: Peaks = NONE
    """Likewise; what is kept counts as there at its start, so that this may fall below nothing."""
    grads: tuple[Origin | None, ...] = ()
    """For each operand, its gradient; None where it wants none."""
    left: Amount = field(factory=dict)
    """What its backward leaves behind: the gradients of parameters."""
    halves: "Halves | None" = None
    """Its backward where the gradients of inputs come first and those of parameters later."""

    def input_view(self) -> "Record":
        """The same with the first of its halves for a backward."""
        first = self.halves or Halves()
        return evolve(self, backward=first.backward, grads=first.grads, left=NOTHING)


@frozen(kw_only=True, eq=False)
class Halves:
    """A backward in two halves, as torch.distributed.pipelining runs one: nothing that is kept for it is let go of in
    the first, which holds a gradient for each operator that the second begins at."""

    backward: Peaks = NONE
    """Of the half for inputs."""
    grads: tuple[Origin | None, ...] = ()
    held: Amount = field(factory=dict)
    """Gradients that are held for the half for parameters."""
    held_outputs: frozenset[int] = frozenset()
    """The results whose gradients are held for it, in storages that are there already."""
    over: Amount = field(factory=dict)
    """What is kept behind the last operator with parameters, which goes when the first half ends."""
    weights: Peaks = NONE
    """Of the half for parameters, the most that one of its operators allocates."""


class Watch(TorchDispatchMode):
    """Sees each storage that operators allocate, and when it is gone."""

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        """Storage -> a reference to it, and the number under which it is told of; 0 where it is not."""
        self.shapes: dict[int, tuple[Shape, torch.dtype, int]] = {}
        """Number -> shape, dtype and elements of the tensor with which the storage was first seen."""
        self.told: list[tuple[int, bool]] = []
        """(number, whether it came), in order."""
        for tensor in held:
            self.seen[storage_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.sweep()
        out = func(*args, **(kwargs or {}))
        for tensor in tensor_leaves(out):
            self.number(tensor)
        return out

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which has come now where it is new."""
        key = storage_key(tensor)
        if key not in self.seen:
            number = len(self.shapes) + 1
            elements = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
            self.shapes[number] = (tuple(tensor.shape), tensor.dtype, elements)
            self.seen[key] = (StorageWeakRef(tensor.untyped_storage()), number)
            self.told.append((number, True))
        return self.seen[key][1]

    def sweep(self) -> None:
        """Tell of what is gone."""
        for key in [key for key, (reference, _) in self.seen.items() if reference.expired()]:
            number = self.seen.pop(key)[1]
            if number:
                self.told.append((number, False))

    def peaks(self, size: Callable[[int], Amount]) -> Peaks:
        """What was held at most, by the bytes of each storage."""
        now: Amount = NOTHING
        found: list[Amount] = []
        for number, came in self.told:
            now = plus(now, size(number)) if came else minus(now, size(number))
            found += [now] if came else []
        return Peaks.of(found) if found else NONE


Dims = tuple[DimLayout, ...]


def _as_it_is(shape: Shape, layout: Layout) -> Dims | None:
    return layout.dims if shape == layout.shape else None


def _reduced(shape: Shape, layout: Layout) -> Dims | None:
    if len(shape) != len(layout.dims) or any(a not in (1, b) for a, b in zip(shape, layout.shape, strict=True)):
        return None
    return tuple(dim if one == all_ else () for one, all_, dim in zip(shape, layout.shape, layout.dims, strict=True))


def _without(shape: Shape, layout: Layout) -> Dims | None:
    """The layout's dims from the front, some left out."""
    found: list[DimLayout] = []
    rest = list(shape)
    for length, dim in zip(layout.shape, layout.dims, strict=True):
        if rest and length == rest[0]:
            found.append(dim)
            rest.pop(0)
    return None if rest else tuple(found)


def _joined(shape: Shape, layout: Layout) -> Dims | None:
    """Any other shape of as many elements."""
    return layout.dims if torch.Size(shape).numel() == torch.Size(layout.shape).numel() else None


FITS: tuple[Callable[[Shape, Layout], Dims | None], ...] = (_as_it_is, _reduced, _joined, _without)
"""The ways in which a tensor's shape can be a layout's, the likeliest first."""


@frozen(eq=False)
class Measure:
    """The bytes of storages by the layouts that an operator makes and reads.

    A tensor has the axes of a layout whose local shape it has: as it is; with some dims reduced to one; with neighbours
    joined; without some. What fits none is taken not to depend on the mesh.
    """

    made: Sequence[Layout]
    read: Sequence[Layout]
    sizes: Sizes

    def of(self, shape: Shape, dtype: torch.dtype, elements: int, known: Layout | None = None) -> Amount:
        """Bytes of a storage; `known` is the layout that its tensor has, if it is as long."""
        shape = shape if torch.Size(shape).numel() == elements else (elements,)
        if known is not None and torch.Size(known.shape).numel() == elements:
            return part(PASSING, known, dtype.itemsize, self.sizes)
        for fit in FITS:
            for layout in (*self.made, *self.read):
                dims = fit(shape, layout)
                if dims is not None:
                    return part(PASSING, Layout(dims), dtype.itemsize, self.sizes)
        return fixed(PASSING, elements * dtype.itemsize)


def probe(
    run: Callable[[list[Tensor]], Any], operands: Sequence[Tensor], live: Sequence[bool], measure: Measure
) -> tuple[list[Tensor], Record]:
    """Run an operator on meta tensors, and its backward where `live` operands want a gradient.

    Returns:
        Its results, detached, and what it did.
    """
    entered = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(operands, live, strict=True)]
    places = {storage_key(tensor): index for index, tensor in reversed(list(enumerate(entered)))}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(storage_key(tensor), tensor.detach())
        return tensor

    watch = Watch(entered)
    with torch.enable_grad() if any(live) else torch.no_grad():
        with watch, saved_tensors_hooks(pack, lambda tensor: tensor):
            made = run(entered)
        outs = tensor_leaves(made)
        del made
        watch.sweep()
        keys = [storage_key(tensor) for tensor in outs]
        known = {
            watch.number(tensor): layout
            for key, tensor, layout in zip(keys, outs, measure.made, strict=False)
            if key not in places
        }

        def size(number: int) -> Amount:
            return measure.of(*watch.shapes[number], known.get(number)) if number else NOTHING

        outputs: list[Origin] = []
        for at, (key, tensor) in enumerate(zip(keys, outs, strict=True)):
            own = -1 - keys.index(key) if keys.index(key) < at else size(watch.number(tensor))
            outputs.append(places.get(key, own))
        others = {
            key: (StorageWeakRef(tensor.untyped_storage()), as_kind(KEPT, size(watch.number(tensor))))
            for key, tensor in kept.items()
            if key not in places and key not in keys
        }
        record = Record(
            outputs=tuple(outputs),
            operands_kept=frozenset(index for index, tensor in enumerate(entered) if storage_key(tensor) in kept),
            outputs_kept=frozenset(index for index, key in enumerate(keys) if key in kept and key not in places),
            kept=plus(*(amount for _, amount in others.values())),
            forward=watch.peaks(size),
        )
        kept.clear()
        results = [tensor.detach() for tensor in outs]
        if any(tensor.requires_grad for tensor in outs):
            record = _with_backward(record, outs, entered, live, measure, others)
    return results, record


def _with_backward(
    record: Record,
    outs: list[Tensor],
    entered: list[Tensor],
    live: Sequence[bool],
    measure: Measure,
    others: Mapping[int, tuple[StorageWeakRef, Amount]],
) -> Record:
    moving = [at for at, tensor in enumerate(outs) if tensor.requires_grad]
    targets = [outs[at] for at in moving]
    incoming = [torch.empty_like(tensor).detach() for tensor in targets]
    wanted = [tensor for tensor, wants in zip(entered, live, strict=True) if wants]
    watch = Watch([*entered, *outs, *incoming])
    freed: dict[int, Amount] = {}
    for number, (key, (reference, amount)) in enumerate(others.items(), 1):
        # What is kept is there already, and its going is told of.
        watch.seen[key], freed[-number] = (reference, -number), amount
    with watch:
        found = torch.autograd.grad(targets, wanted, incoming, allow_unused=True)
    watch.sweep()
    places = {storage_key(tensor): at for at, tensor in zip(moving, incoming, strict=True)}
    gradients = iter(found)
    given = [next(gradients) if wants else None for wants in live]
    known = {
        watch.number(gradient): layout
        for gradient, layout in zip(given, measure.read, strict=True)
        if gradient is not None and storage_key(gradient) not in places
    }

    def size(number: int) -> Amount:
        return (
            freed[number] if number < 0 else measure.of(*watch.shapes[number], known.get(number)) if number else NOTHING
        )

    grads = tuple(
        None if gradient is None else places.get(storage_key(gradient), size(watch.number(gradient)))
        for gradient in given
    )
    return evolve(record, backward=watch.peaks(size), grads=grads)
