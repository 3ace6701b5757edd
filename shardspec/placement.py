"""Where a rank's part of a parameter lies in the whole: DTensor placements and global indices."""

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.tensor import Placement, Replicate, Shard

from shardspec.layout import Layout
from shardspec.mesh import AXES, Mesh
from shardspec.plan import ParamPlan
from shardspec.rules.parse import Storage
from shardspec.torch_private import strided_shard


def placements_of(param: ParamPlan) -> tuple[Placement, ...]:
    """A placement for each axis of `param.mesh_sizes`.

    An axis that lies inside a finer split of its dim (tp outside, fsdp inside, in a mesh whose fsdp comes first)
    is a strided shard: torch/distributed/tensor/placement_types.py, `_StridedShard`.
    """
    return tuple(_placement(param, axis) for axis in param.mesh_sizes)


def _placement(param: ParamPlan, axis: str) -> Placement:
    for dim, digits in enumerate(param.layout.dims):
        order = [*digits]
        if dim == param.storage_dim and param.storage:
            # Storage divides what compute leaves: its digits come behind the last axis digit of the dim.
            last = max((i for i, digit in enumerate(order) if isinstance(digit, str)), default=-1)
            order[last + 1 : last + 1] = list(param.storage)
        if axis not in order:
            continue
        split = 1
        for digit in order[: order.index(axis)]:
            if isinstance(digit, int):
                split *= digit
            elif AXES.index(digit) > AXES.index(axis):
                split *= param.mesh_sizes[digit]
        return Shard(dim) if split == 1 else strided_shard(dim, split)
    return Replicate()


def local_index(param: ParamPlan, coordinate: Mapping[str, int], mesh: Mesh) -> tuple[torch.Tensor, ...]:
    """The global indices, dim by dim, of the elements that a rank stores."""
    index = [
        digits_index(digits, coordinate, mesh) if any(isinstance(d, str) for d in digits) else torch.arange(length)
        for digits, length in zip(param.layout.dims, param.shape, strict=True)
    ]
    if param.storage:
        rows = index[param.storage_dim]
        start, stop = storage_rows(len(rows), param.storage, coordinate, mesh)
        index[param.storage_dim] = rows[start:stop]
    return tuple(index)


def digits_index(digits: Sequence[int | str], coordinate: Mapping[str, int], mesh: Mesh) -> torch.Tensor:
    """The global indices of a rank's part of one dim."""
    index = torch.zeros(1, dtype=torch.long)
    for digit in digits:
        if isinstance(digit, str):
            index = index * mesh[digit] + coordinate[digit]
        else:
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
