"""Experts over ep: rows travel to the rank of their expert, the module's own forward runs on them, and they return.

Names carry dims: N tokens, k choices, A assignments (N * k, or those that are kept), R rows received, E experts, e this
rank's, D features. Assignments are sorted by expert, and so by rank. Each autograd function is an exchange whose
backward is the exchange the other way. Every rank takes part in each of them, forward and backward, with no rows too.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shardspec.functional import check_range
from shardspec.layout import DimLayout
from shardspec.mesh import Mesh, degree
from shardspec.placement import digits_index
from shardspec.plan import ExpertsPlan
from shardspec.runtime.attach import Wiring, wrap_forward
from shardspec.runtime.fabric import Fabric
from shardspec.torch_private import all_gather, in_backward
from shardspec.twin import argument_names


@frozen(eq=False)
class Exchange:
    """Which assignment goes where, and what comes from where."""

    group: dist.ProcessGroup | None
    """None where every rank has all experts: nothing travels."""
    shape: tuple[int, int]
    """N, k."""
    order: Tensor
    """[A]: the assignments (token * k + choice), sorted by expert."""
    sent: Sequence[int]
    """Rows to each rank of the group."""
    received: Sequence[int]
    """Rows from each rank of the group."""
    experts: Tensor
    """[R, 1]: the received rows' experts, counted from this rank's first; those of one rank after another."""

    def there(self, tensor_A: Tensor) -> Tensor:
        """[A, ...] -> [R, ...]."""
        return _all_to_all(tensor_A, self.received, self.sent, self.group)

    def back(self, tensor_R: Tensor) -> Tensor:
        """[R, ...] -> [A, ...]."""
        return _all_to_all(tensor_R, self.sent, self.received, self.group)

    def spread(self, tensor_ND: Tensor) -> Tensor:
        """A row for each assignment, in their order: [N, D] -> [A, D]."""
        return tensor_ND.index_select(0, self.order // self.shape[1])

    def gather(self, tensor_AD: Tensor) -> Tensor:
        """The sum over each token's assignments, in the order of its choices: [A, D] -> [N, D]."""
        return self.unsorted(tensor_AD).unflatten(0, self.shape).sum(1)

    def unsorted(self, tensor_A: Tensor) -> Tensor:
        """By token and choice, zeros where an assignment was dropped: [A, ...] -> [N * k, ...]."""
        whole = len(tensor_A) == self.shape[0] * self.shape[1]
        size = (self.shape[0] * self.shape[1], *tensor_A.shape[1:])
        out = tensor_A.new_empty(size) if whole else tensor_A.new_zeros(size)
        return out.index_copy_(0, self.order, tensor_A)


def _all_to_all(tensor: Tensor, out: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return tensor
    made = tensor.new_empty((sum(out), *tensor.shape[1:]))
    dist.all_to_all_single(made, tensor.contiguous(), list(out), list(sent), group=group)
    return made


def meet(chosen_Nk: Tensor, counts_E: Tensor, group: dist.ProcessGroup | None) -> Exchange:
    """Tell the ranks of a group how many rows each of their experts gets; the one read of the host in an exchange.

    Args:
        chosen_Nk: the expert of each assignment; E for one that is dropped.
        counts_E: how many assignments each expert gets of this rank's.
    """
    shape = (chosen_Nk.shape[0], chosen_Nk.shape[1])
    sorted_A, order = chosen_Nk.reshape(-1).sort(stable=True)
    if group is None:
        kept = int(counts_E.sum())
        return Exchange(None, shape, order[:kept], [kept], [kept], sorted_A[:kept, None])
    ranks = dist.get_world_size(group)
    theirs = torch.empty_like(counts_E)
    dist.all_to_all_single(theirs, counts_E, group=group)
    # Both tables in one copy to the host: rows for each rank, and rows of each of this rank's experts by rank.
    sent, received = torch.stack((counts_E, theirs)).view(2, ranks, -1).sum(2).tolist()
    own = torch.arange(len(counts_E) // ranks, device=counts_E.device).repeat(ranks)
    experts = torch.repeat_interleave(own, theirs, output_size=sum(received))
    return Exchange(group, shape, order[: sum(sent)], sent, received, experts[:, None])


class _Dispatch(torch.autograd.Function):
    """hidden [N, D], weights [N, k] -> rows [R, D], their weights [R, 1]."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weights_Nk: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        rows_RD = exchange.there(exchange.spread(hidden_ND))
        return rows_RD, exchange.there(weights_Nk.reshape(-1, 1).index_select(0, exchange.order))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor, grad_R1: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        exchange: Exchange = ctx.exchange
        hidden, weights, _ = ctx.needs_input_grad
        hidden_ND = exchange.gather(exchange.back(grad_RD)) if hidden else None
        weights_Nk = exchange.unsorted(exchange.back(grad_R1)).view(exchange.shape) if weights else None
        return hidden_ND, weights_Nk, None


class _Computed(torch.autograd.Function):
    """What the module gave, tied to what it was given: a rank whose experts got no rows has the others' graph too.

    It keeps a tensor and asks for it, so that where forward is run again in backward every rank begins to at the same
    place, and runs it as far as here, whatever its rows need.
    """

    @staticmethod
    def forward(ctx: Any, made_RD: Tensor, rows_RD: Tensor, weights_R1: Tensor, anchor: Tensor | None) -> Tensor:
        del weights_R1, anchor
        ctx.save_for_backward(rows_RD.new_empty(0))
        return made_RD.view_as(made_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors
        return (grad_RD if ctx.needs_input_grad[0] else None), None, None, None


class _Combine(torch.autograd.Function):
    """made [R, D] -> the sum over each token's choices [N, D]."""

    @staticmethod
    def forward(ctx: Any, made_RD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(exchange.back(made_RD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        exchange: Exchange = ctx.exchange
        return exchange.there(exchange.spread(grad_ND)), None


class _Complete(torch.autograd.Function):
    """hidden and weights as they are; backward, their gradients' sums over the axes that split what experts compute."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weights_Nk: Tensor, plan: ExpertsPlan, fabric: Fabric
    ) -> tuple[Tensor, Tensor]:
        ctx.axes, ctx.fabric = (plan.hidden_axes, plan.weights_axes), fabric
        ctx.set_materialize_grads(False)
        return hidden_ND.view_as(hidden_ND), weights_Nk.view_as(weights_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups: dict[tuple[tuple[str, ...], torch.dtype], list[int]] = {}
        for index, (grad, axes) in enumerate(zip(grads, ctx.axes, strict=True)):
            if grad is not None and axes:
                groups.setdefault((axes, grad.dtype), []).append(index)
        summed = list(grads)
        for (axes, _), indices in groups.items():
            parts = [grad.reshape(-1) for index in indices if (grad := grads[index]) is not None]
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=ctx.fabric.group(axes))
            for index, part in zip(indices, flat.split([len(part) for part in parts]), strict=True):
                like = grads[index]
                summed[index] = part.view(like.shape) if like is not None else None
        return *summed, None, None


def run_experts(
    wiring: Wiring, fqn: str, module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """An experts module's forward on this rank: with the experts that it has, and all rows that chose them."""
    plan = wiring.experts.get(fqn)
    if plan is None:
        return forward(*args, **kwargs)
    names = argument_names(type(module).forward)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden_ND, ids_Nk, weights_Nk = (given[name] for name in names[:3])
    if plan.hidden_axes or plan.weights_axes:
        hidden_ND, weights_Nk = _Complete.apply(hidden_ND, weights_Nk, plan, wiring.fabric)  # pyright: ignore[reportGeneralTypeIssues]
    check_range(ids_Nk, plan.count, "expert")
    chosen_Nk = ids_Nk.long()
    asked_E = count(chosen_Nk, plan.count)
    counts_E = asked_E
    if plan.capacity:
        chosen_Nk = within_capacity(chosen_Nk, plan, wiring.fabric)
        counts_E = count(chosen_Nk, plan.count)
    if not in_backward():
        wiring.routed.setdefault(fqn, []).append(torch.cat((asked_E, (asked_E - counts_E).sum()[None])))
    if not (plan.exchanged or plan.capacity):
        return forward(hidden_ND, ids_Nk, weights_Nk)
    exchange = meet(chosen_Nk, counts_E, wiring.fabric.group(("ep",)) if plan.exchanged else None)
    rows_RD, weights_R1 = _Dispatch.apply(hidden_ND, weights_Nk, exchange)  # pyright: ignore[reportGeneralTypeIssues]
    made_RD = forward(rows_RD, exchange.experts, weights_R1)
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    anchor = rows_RD.new_empty(0).requires_grad_() if trained else None
    made_RD = _Computed.apply(made_RD, rows_RD, weights_R1, anchor)
    return _Combine.apply(made_RD, exchange)  # pyright: ignore[reportReturnType]


def count(chosen_Nk: Tensor, size_E: int) -> Tensor:
    """How many assignments each expert has: [E], whole numbers; those of E, which are dropped, are not counted."""
    flat = chosen_Nk.reshape(-1)
    return torch.zeros(size_E + 1, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))[
        :-1
    ]


def within_capacity(chosen_Nk: Tensor, plan: ExpertsPlan, fabric: Fabric) -> Tensor:
    """The choices with E in the place of those that come too late: an expert takes the first `plan.capacity`
    assignments of a microbatch, by token and choice in the order of the whole, on every mesh alike.

    A rank's tokens are runs of the whole's. What each expert was asked for by each run of each rank is gathered: from
    that follows how many come before a run.
    """
    digits, size_E, mesh = plan.tokens.dims[0], plan.count, fabric.mesh
    axes = tuple(axis for axis in mesh.axes if axis in plan.tokens.sharded)
    length, starts_rank = token_runs(digits, mesh, tuple(fabric.coordinate.items()), axes, plan.balanced)
    rows = plan.tokens.shape[0]
    runs = rows // length
    flat = chosen_Nk.reshape(-1)
    run = (
        torch.arange(rows, device=flat.device)
        .div(length, rounding_mode="floor")
        .repeat_interleave(plan.tokens.shape[1])
    )
    key = run * size_E + flat
    asked = torch.zeros(runs * size_E, dtype=torch.long, device=flat.device).scatter_add_(0, key, torch.ones_like(key))
    every = asked[None]
    if axes:
        every = asked.new_empty((degree(mesh, axes), runs * size_E))
        all_gather(every, asked, fabric.group(axes))
    starts = starts_rank.reshape(-1).to(flat.device)
    before = torch.empty_like(every.view(-1, size_E))
    in_order = starts.argsort()
    counted = every.view(-1, size_E)[in_order]
    before[in_order] = counted.cumsum(0) - counted
    own = before.view(len(starts_rank), runs * size_E)[fabric.place(axes)]
    order = key.argsort(stable=True)
    first = asked.cumsum(0) - asked
    position = torch.empty_like(key)
    position[order] = torch.arange(len(key), device=key.device) - first[key[order]]
    late = position + own[key] >= plan.capacity
    return flat.masked_fill(late, size_E).view_as(chosen_Nk)


@functools.lru_cache(maxsize=64)
def token_runs(
    digits: DimLayout, mesh: Mesh, place: tuple[tuple[str, int], ...], axes: tuple[str, ...], balanced: bool
) -> tuple[int, Tensor]:
    """How long the runs of consecutive tokens of the whole are that a rank holds, and where they begin on each of the
    ranks that differ from `place` on `axes`: [ranks, runs]."""
    every = itertools.product(*(range(mesh[axis]) for axis in axes))
    held = [
        digits_index(digits, {**dict(place), **dict(zip(axes, at, strict=True))}, mesh, balanced=balanced)
        for at in every
    ]
    breaks = (1 + (rows.diff() != 1).nonzero().flatten() for rows in held)
    length = gcd(len(held[0]), *(int(at) for each in breaks for at in each))
    return length, torch.stack([rows[::length] for rows in held])


def attach_experts(
    model: nn.Module,
    wiring: Wiring,
    plans: Mapping[str, ExpertsPlan],
    done: set[tuple[str, str]],
    foreign: AbstractSet[str] = frozenset(),
    *,
    compiled: bool = False,
) -> None:
    """Have each experts module of a plan run so; `done` is not done again.

    Args:
        foreign: the modules that do not run here.
        compiled: torch.compile compiles units: an exchange breaks their graphs, and its rows are never as many again.
    """
    run = torch.compiler.disable(run_experts) if compiled else run_experts
    for fqn in plans:
        if fqn not in foreign and (fqn, "experts") not in done:
            module = model.get_submodule(fqn)
            wrap_forward(module, functools.partial(run, wiring, fqn, module))
            done.add((fqn, "experts"))
