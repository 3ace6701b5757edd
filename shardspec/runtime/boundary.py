"""Collectives at declared points: a move on a local tensor, and a whole transition with its adjoint."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardspec import torch_private
from shardspec.layout import AVG, MAX, MIN
from shardspec.moves import Move
from shardspec.runtime.fabric import Fabric
from shardspec.sequence import order, places

REDUCE = {MAX: dist.ReduceOp.MAX, MIN: dist.ReduceOp.MIN}


def all_gather(tensor: Tensor, move: Move, fabric: Fabric) -> Tensor:
    """[.., outer * inner, ..] -> [.., outer * n * inner, ..]."""
    n = fabric.mesh[move.axis]
    parts = tensor.new_empty((n, *tensor.shape))
    torch_private.all_gather(parts, tensor.contiguous(), fabric.group((move.axis,)))
    return _put(parts, move.dim, move.outer, move.runs, halves=move.halves)


def reduce_scatter(tensor: Tensor, move: Move, fabric: Fabric) -> Tensor:
    """[.., outer * n * inner, ..] -> the sum over ranks of [.., outer * inner, ..]."""
    n = fabric.mesh[move.axis]
    parts = _take(tensor, move.dim, move.outer, n, move.runs, halves=move.halves)
    out = parts.new_empty(parts.shape[1:])
    torch_private.reduce_scatter(out, parts, fabric.group((move.axis,)))
    return out.div_(n) if move.reduce == AVG else out


def all_reduce(tensor: Tensor, move: Move, fabric: Fabric) -> Tensor:
    """The reduction over ranks, in a tensor of its own."""
    out = tensor.contiguous().clone() if tensor.is_contiguous() else tensor.contiguous()
    dist.all_reduce(out, REDUCE.get(move.reduce, dist.ReduceOp.SUM), group=fabric.group((move.axis,)))
    return out.div_(fabric.mesh[move.axis]) if move.reduce == AVG else out


def all_to_all(tensor: Tensor, move: Move, fabric: Fabric) -> Tensor:
    """Gather `dim` and split `to_dim`: the exchange that moves an axis from one dim to another."""
    n = fabric.mesh[move.axis]
    parts = _take(tensor, move.to_dim, move.to_outer, n, move.to_runs, halves=move.to_halves)
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=fabric.group((move.axis,)))
    return _put(out, move.dim, move.outer, move.runs, halves=move.halves)


def slice_(tensor: Tensor, move: Move, fabric: Fabric) -> Tensor:
    """[.., outer * n * inner, ..] -> this rank's [.., outer * inner, ..]."""
    n, place = fabric.mesh[move.axis], fabric.coordinate[move.axis]
    if move.runs:
        return torch.cat(
            [run.chunk(n, move.dim)[place] for run in _whole_runs(tensor, move.dim, move.runs, n)], move.dim
        )
    if move.outer == 1 and not move.halves:
        return tensor.chunk(n, move.dim)[place].contiguous()
    return _take(tensor, move.dim, move.outer, n, halves=move.halves)[place].contiguous()


def scale(tensor: Tensor, move: Move, fabric: Fabric) -> Tensor:
    """A rank's share of the cotangent of a mean."""
    return tensor / fabric.mesh[move.axis]


def _whole_runs(tensor: Tensor, dim: int, runs: Sequence[int], n: int) -> tuple[Tensor, ...]:
    """The runs of a direct sum that n ranks share, each n times as long as on a rank."""
    return tensor.split([n * length for length in runs], dim)


def _take(tensor: Tensor, dim: int, outer: int, n: int, runs: Sequence[int] = (), *, halves: bool = False) -> Tensor:
    """[.., outer * n * inner, ..] -> [n, .., outer * inner, ..], contiguous; a view where torch can make one."""
    if runs:
        chunks = [run.chunk(n, dim) for run in _whole_runs(tensor, dim, runs, n)]
        return torch.stack([torch.cat(held, dim) for held in zip(*chunks, strict=True)])
    shape = list(tensor.shape)
    if halves:
        split = tensor.unflatten(dim, (outer, 2 * n, shape[dim] // outer // (2 * n)))
        pairs = split.new_empty((n, *shape[:dim], outer, 2, *split.shape[dim + 2 :]))
        for at, chunk in enumerate(order(n, balanced=True)):
            pairs[at // 2].select(dim + 1, at % 2).copy_(split.select(dim + 1, chunk))
        return pairs.flatten(dim + 1, dim + 3)
    if outer == 1:
        shape[dim] //= n
        if tensor.is_contiguous() and all(length == 1 for length in shape[:dim]):
            return tensor.view(n, *shape)
        return torch.stack(tensor.chunk(n, dim))
    split = tensor.reshape(*shape[:dim], outer, n, shape[dim] // outer // n, *shape[dim + 1 :])
    shape[dim] //= n
    return split.movedim(dim + 1, 0).reshape(n, *shape).contiguous()


def _put(parts: Tensor, dim: int, outer: int, runs: Sequence[int] = (), *, halves: bool = False) -> Tensor:
    """[n, .., outer * inner, ..] -> [.., outer * n * inner, ..]."""
    n, *shape = parts.shape
    if halves:
        pairs = parts.unflatten(dim + 1, (outer, 2, shape[dim] // outer // 2))
        chunks = [pairs[at // 2].select(dim + 1, at % 2) for at in places(n)]
        return torch.stack(chunks, dim + 1).flatten(dim, dim + 2)
    if runs:
        held = [part.split(list(runs), dim) for part in parts.unbind(0)]
        return torch.cat([piece for run in zip(*held, strict=True) for piece in run], dim)
    if outer == 1:
        if all(length == 1 for length in shape[:dim]):
            return parts.view(*shape[:dim], n * shape[dim], *shape[dim + 1 :])
        return torch.cat(parts.unbind(0), dim)
    split = parts.reshape(n, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :])
    shape[dim] *= n
    return split.movedim(0, dim + 1).reshape(shape)


MOVES: dict[str, Callable[[Tensor, Move, Fabric], Tensor]] = {
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_reduce": all_reduce,
    "all_to_all": all_to_all,
    "slice": slice_,
    "scale": scale,
}


def run_moves(tensor: Tensor, moves: Sequence[Move], fabric: Fabric) -> Tensor:
    """The moves one after another."""
    for move in moves:
        tensor = MOVES[move.kind](tensor, move, fabric)
    return tensor


class _Transition(torch.autograd.Function):
    """Forward runs a point's moves; backward runs the moves that the typing derived for its cotangent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Sequence[Move], backward: Sequence[Move], fabric: Fabric) -> Tensor:
        ctx.moves, ctx.fabric = backward, fabric
        return run_moves(tensor, forward, fabric) if forward else tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return run_moves(grad, ctx.moves, ctx.fabric), None, None, None


def pass_point(tensor: Tensor, forward: Sequence[Move], backward: Sequence[Move], fabric: Fabric) -> Tensor:
    """Take an activation through a declared point."""
    return _Transition.apply(tensor, forward, backward, fabric)  # pyright: ignore[reportReturnType]
