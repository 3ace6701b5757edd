"""Where a rank's part of a parameter lies in the whole: DTensor placements and global indices."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.tensor import Placement, Replicate, Shard

from shardspec.layout import DimLayout, Layout, dim_axes, dim_text, global_size, is_sum, local_size, parts_of
from shardspec.mesh import AXES, Mesh
from shardspec.plan import ParamPlan
from shardspec.rules.parse import Storage
from shardspec.sequence import AXIS, chunks_of
from shardspec.torch_private import strided_shard


class RankMajor(Placement):
    """How mesh axes share the rows of a dim that no DTensor placement describes: rank after rank, each with its rows
    of every part of a direct sum, or of a strided dim that is stored in slices.

    Torch knows no operator for it and refuses; `runtime.rank_major` computes with what is so placed.

    Args:
        dim: the dim of the tensor.
        digits: as compute splits it.
        storage: the axes that divide what that leaves to a rank.
    """

    def __init__(self, dim: int, digits: DimLayout, storage: tuple[str, ...]) -> None:
        super().__init__()
        self.dim, self.digits, self.storage = dim, digits, storage

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that share the rows."""
        return (*dim_axes(self.digits), *self.storage)

    def rows(self, coordinate: Mapping[str, int], mesh: Mesh) -> torch.Tensor:
        """The rows of the whole that a rank holds, in its order."""
        index = digits_index(self.digits, coordinate, mesh)
        start, stop = storage_rows(len(index), self.storage, coordinate, mesh)
        return index[start:stop]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankMajor) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[int, DimLayout, tuple[str, ...]]:
        return self.dim, self.digits, self.storage

    def __repr__(self) -> str:
        stored = f", stored over {','.join(self.storage)}" if self.storage else ""
        return f"RankMajor(dim={self.dim}, {dim_text(self.digits)}{stored})"

    __str__ = __repr__


def placements_of(param: ParamPlan) -> tuple[Placement, ...]:
    """A placement for each axis of `param.mesh_sizes`.

    An axis that lies inside a finer split of its dim (tp outside, fsdp inside, in a mesh whose fsdp comes first)
    is a strided shard: torch/distributed/tensor/placement_types.py, `_StridedShard`.
    """
    return tuple(_placement(param, axis) for axis in param.mesh_sizes)


def _placement(param: ParamPlan, axis: str) -> Placement:
    for dim, digits in enumerate(param.layout.dims):
        storage = param.storage if dim == param.storage_dim else ()
        if axis not in (*dim_axes(digits), *storage):
            continue
        if is_sum(digits) or (storage and runs(digits) > 1):
            return RankMajor(dim, digits, storage)
        # Storage divides what compute leaves: its digits come behind the last axis digit of the dim.
        last = max((i for i, digit in enumerate(digits) if isinstance(digit, str)), default=-1)
        order = [*digits[: last + 1], *storage, *digits[last + 1 :]]
        split = 1
        for digit in order[: order.index(axis)]:
            if isinstance(digit, int):
                split *= digit
            elif isinstance(digit, str) and AXES.index(digit) > AXES.index(axis):
                split *= param.mesh_sizes[digit]
        return Shard(dim) if split == 1 else strided_shard(dim, split)
    return Replicate()


def runs(digits: DimLayout) -> int:
    """In how many runs of consecutive rows a rank's part of a dim lies that is no direct sum."""
    axes = [index for index, digit in enumerate(digits) if isinstance(digit, str)]
    return local_size(digits[: axes[-1]]) if axes else 1


def local_index(param: ParamPlan, coordinate: Mapping[str, int], mesh: Mesh) -> tuple[torch.Tensor, ...]:
    """The global indices, dim by dim, of the elements that a rank stores."""
    index = [
        digits_index(digits, coordinate, mesh) if dim_axes(digits) else torch.arange(length)
        for digits, length in zip(param.layout.dims, param.shape, strict=True)
    ]
    if param.storage:
        rows = index[param.storage_dim]
        start, stop = storage_rows(len(rows), param.storage, coordinate, mesh)
        index[param.storage_dim] = rows[start:stop]
    return tuple(index)


def digits_index(
    digits: DimLayout, coordinate: Mapping[str, int], mesh: Mesh, *, balanced: bool = False
) -> torch.Tensor:
    """The global indices of a rank's part of one dim.

    Args:
        balanced: cp lies head and tail (`shardspec.sequence`).
    """
    if balanced and AXIS in digits:
        at = digits.index(AXIS)
        before = digits_index(digits[:at], coordinate, mesh)
        behind = digits_index(digits[at + 1 :], coordinate, mesh)
        chunk = global_size(digits[at + 1 :], mesh.shape) // 2
        held = torch.tensor(chunks_of(coordinate[AXIS], mesh[AXIS], balanced=True))
        own = held[behind // chunk] * chunk + behind % chunk
        return (before[:, None] * (2 * chunk * mesh[AXIS]) + own).flatten()
    if is_sum(digits):
        parts = parts_of(digits)
        starts = itertools.accumulate((global_size(part, mesh.shape) for part in parts), initial=0)
        return torch.cat(
            [start + digits_index(part, coordinate, mesh) for start, part in zip(starts, parts, strict=False)]
        )
    index = torch.zeros(1, dtype=torch.long)
    for digit in digits:
        if isinstance(digit, str):
            index = index * mesh[digit] + coordinate[digit]
        elif isinstance(digit, int):
            index = (index[:, None] * digit + torch.arange(digit)).flatten()
    return index


def storage_rows(rows: int, axes: Sequence[str], coordinate: Mapping[str, int], mesh: Mesh) -> tuple[int, int]:
    """The rows [start, stop) that a rank stores of `rows`: chunks of ceil(rows / n), the last ones short or empty."""
    place, degree = 0, 1
    for axis in axes:
        place = place * mesh[axis] + coordinate[axis]
        degree *= mesh[axis]
    chunk = -(-rows // degree)
    return min(place * chunk, rows), min((place + 1) * chunk, rows)


def stored_shape(param: ParamPlan, coordinate: Mapping[str, int], mesh: Mesh) -> tuple[int, ...]:
    """The shape of what a rank stores."""
    return part_shape(param.layout, Storage(param.storage_dim, param.storage), coordinate, mesh)


def part_shape(layout: Layout, storage: Storage, coordinate: Mapping[str, int], mesh: Mesh) -> tuple[int, ...]:
    """The shape of a rank's part of what lies so in compute and is stored so."""
    shape = list(layout.shape)
    if storage.axes:
        start, stop = storage_rows(shape[storage.dim], storage.axes, coordinate, mesh)
        shape[storage.dim] = stop - start
    return tuple(shape)
