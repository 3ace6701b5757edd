"""Put a sharded tensor together from its placements: `ss.full`."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from shardspec.layout import global_size
from shardspec.mesh import Mesh
from shardspec.placement import RankMajor
from shardspec.torch_private import local_of


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank of its mesh; a plain tensor is whole already.

    `DTensor.full_tensor` is wrong for uneven shards over two mesh dims in torch 2.13, so each dim is gathered here,
    innermost placement first, by the rows that each rank holds.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        kept = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=kept)
    local, mesh, found = local_of(tensor).detach(), tensor.device_mesh, _rows(tensor)
    shared = {placement.dim: placement for placement in tensor.placements if isinstance(placement, RankMajor)}
    if all(rows is None for rows in found) and not shared:
        return local.clone()  # a step would write to the state's own
    local = local.to(mesh.device_type)  # from the host's memory, where a policy has it lie there
    for position, rows in reversed(list(enumerate(found))):
        if rows is None:
            continue
        dim, every, length = rows
        local = _gather_dim(local, dim, every, length, mesh, position)
    for placement in shared.values():
        local = _gather_rank_major(local, placement, tensor.shape[placement.dim], mesh)
    return local


def positions(tensor: DTensor) -> tuple[Tensor, ...]:
    """The positions in the whole, dim by dim, of what this rank holds of a DTensor that is nowhere pending."""
    index = [torch.arange(length) for length in tensor.shape]
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "the rank belongs to the tensor's mesh"
    for mine, rows in zip(place, _rows(tensor), strict=True):
        if rows is not None:
            dim, every, _ = rows
            index[dim] = index[dim][every[mine]]
    names, sizes = tensor.device_mesh.mesh_dim_names or (), tensor.device_mesh.shape
    for placement in tensor.placements:
        if isinstance(placement, RankMajor):
            mesh = Mesh(**dict(zip(names, sizes, strict=True)))  # pyright: ignore[reportArgumentType]
            index[placement.dim] = placement.rows(dict(zip(names, place, strict=True)), mesh)
    return tuple(index)


def _gather_rank_major(local: Tensor, placement: RankMajor, length: int, device_mesh: DeviceMesh) -> Tensor:
    """Put every rank's rows where they belong in the whole.

    Raises:
        ValueError: for a tensor whose dim has another length than the placement describes.
    """
    names, dim = device_mesh.mesh_dim_names or (), placement.dim
    sizes = {name: device_mesh.size(position) for position, name in enumerate(names)}
    mesh = Mesh(**sizes)  # pyright: ignore[reportArgumentType]
    if global_size(placement.digits, sizes) != length:
        raise ValueError(
            f"dim {dim} has {length} rows, and {placement} describes {global_size(placement.digits, sizes)}"
        )
    places = itertools.product(*(range(sizes[axis]) for axis in placement.axes))
    every = [placement.rows(dict(zip(placement.axes, place, strict=True)), mesh) for place in places]
    shape = list(local.shape)
    shape[dim] = max(map(len, every))
    parts = local.new_zeros(shape)
    parts.narrow(dim, 0, local.shape[dim]).copy_(local)
    for axis in reversed(placement.axes):
        held = [torch.empty_like(parts) for _ in range(sizes[axis])]
        dist.all_gather(held, parts, group=device_mesh.get_group(axis))
        parts = torch.stack(held)
    whole = local.new_empty((*local.shape[:dim], length, *local.shape[dim + 1 :]))
    for rows, part in zip(every, parts.reshape(-1, *shape), strict=True):
        whole.index_copy_(dim, rows.to(whole.device), part.narrow(dim, 0, len(rows)))
    return whole


def _rows(tensor: DTensor) -> list[tuple[int, list[Tensor], int] | None]:
    """For each mesh dim: the tensor dim it splits, the positions that each of its ranks holds in what the mesh dims
    before it left, and how long that is; None where it splits nothing."""
    mesh, placements = tensor.device_mesh, tensor.placements
    lengths = list(tensor.shape)
    place = mesh.get_coordinate()
    assert place is not None, "the rank belongs to the tensor's mesh"
    found: list[tuple[int, list[Tensor], int] | None] = []
    for position, placement in enumerate(placements):
        if not placement.is_shard() and not hasattr(placement, "split_factor"):
            found.append(None)
            continue
        dim = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
        every = split_rows(placement, lengths[dim], mesh.size(position))
        found.append((dim, every, lengths[dim]))
        lengths[dim] = len(every[place[position]])
    return found


def split_rows(placement: Placement, length: int, count: int) -> list[Tensor]:
    """The positions that each of `count` ranks holds of a dim of `length`.

    A plain shard is torch.chunk; a strided one chunks each of `split_factor` chunks
    (torch/distributed/tensor/placement_types.py).
    """
    rows = torch.arange(length)
    factor = getattr(placement, "split_factor", 1)
    if isinstance(placement, Shard) and not hasattr(placement, "split_factor"):
        factor = 1
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    for outer in _chunk(rows, factor):
        for part, chunk in zip(parts, _chunk(outer, count), strict=True):
            part.append(chunk)
    return [torch.cat(part) for part in parts]


def _chunk(rows: Tensor, count: int) -> list[Tensor]:
    """`torch.chunk` that always gives `count` chunks, the last ones short or empty."""
    size = -(-len(rows) // count)
    return [rows[index * size : (index + 1) * size] for index in range(count)]


def _gather_dim(local: Tensor, dim: int, every: list[Tensor], length: int, mesh: DeviceMesh, position: int) -> Tensor:
    longest = max(map(len, every))
    padded = local.new_zeros((*local.shape[:dim], longest, *local.shape[dim + 1 :]))
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    if mesh.size(position) == 1:
        parts = [padded]
    else:
        parts = [torch.empty_like(padded) for _ in every]
        dist.all_gather(parts, padded, group=mesh.get_group(position))
    whole = local.new_empty((*local.shape[:dim], length, *local.shape[dim + 1 :]))
    for rows, part in zip(every, parts, strict=True):
        whole.index_copy_(dim, rows.to(whole.device), part.narrow(dim, 0, len(rows)))
    return whole
