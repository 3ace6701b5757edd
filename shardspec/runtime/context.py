"""Attention over a sequence that is split over cp: by gathered keys, by a ring, or by an exchange of heads.

Gathered and ring attention compute blocks of scores and merge them by their log-sum-exps (Ring Attention, arXiv
2310.01889; the merge is that of FlashAttention-2, arXiv 2307.08691). The exchange is DeepSpeed Ulysses' (arXiv
2309.14509). All keep q, k and v as a rank holds them, so that what is kept falls with the ranks.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attrs import define, frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardspec.functional import accumulation_dtype
from shardspec.moves import Move, adjoint
from shardspec.plan import Substitution
from shardspec.runtime.boundary import all_gather, all_to_all, pass_point, reduce_scatter
from shardspec.runtime.fabric import Fabric
from shardspec.runtime.kernels import attend, attend_backward
from shardspec.sequence import AXIS, Grid, chunks_of, grid


@frozen(eq=False)
class Job:
    """One attention over cp."""

    fabric: Fabric
    balanced: bool
    causal: bool
    scale: float

    @property
    def ranks(self) -> int:
        return self.fabric.mesh[AXIS]

    @property
    def place(self) -> int:
        return self.fabric.coordinate[AXIS]

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of the sequence that a rank of cp holds."""
        return chunks_of(rank, self.ranks, balanced=self.balanced)

    def grid(self, source: int) -> Grid:
        """What this rank's queries compute with the keys of another."""
        return grid(self.chunks(self.place), self.chunks(source), causal=self.causal)

    def grid_of_all(self) -> Grid:
        """What they compute with all keys, in the order of the sequence."""
        rows = self.chunks(self.place)
        return grid(rows, range(len(rows) * self.ranks), causal=self.causal)

    def move(self, kind: str, dim: int, to_dim: int = 0) -> Move:
        """A move of the sequence dim."""
        return Move(kind, AXIS, dim, to_dim=to_dim, halves=self.balanced)


def attention(
    entry: Substitution,
    fabric: Fabric,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention of a sequence split over cp; the check has refused what a strategy cannot do.

    query [..., H, L/n, E], key [..., K, S/n, E], value [..., K, S/n, Ev] -> [..., H, L/n, Ev]; a mask has the rank's
    rows and all columns where keys are gathered, and is whole where heads are exchanged.
    """
    assert not dropout_p, "the check refuses dropout here"
    job = Job(fabric, entry.balanced, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)
    plain = functools.partial(F.scaled_dot_product_attention, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if entry.strategy == "ulysses":
        q, k, v = _ToHeads.apply(query, key, value, job)  # pyright: ignore[reportGeneralTypeIssues]
        return from_heads(plain(q, k, v, attn_mask=_own_heads(attn_mask, query, job)), job)
    if attn_mask is not None:
        return plain(query, gather_sequence(key, job), gather_sequence(value, job), attn_mask=attn_mask)
    lead = query.shape[:-3] if query.ndim > 3 else ()
    q, k, v = (_four_dims(each, lead) for each in (query, key, value))
    run = _Ring if entry.strategy == "ring" else _Gathered
    out: Tensor = run.apply(q, k, v, job)  # pyright: ignore[reportAssignmentType]
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _four_dims(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """[.., H, S, E] -> [B, H, S, E], of one batch as of all."""
    heads = tensor if tensor.ndim > 2 else tensor.unsqueeze(0)
    return heads.expand(*lead, *heads.shape[-3:]).reshape(-1, *heads.shape[-3:])


# Blocks.


@define(eq=False)
class Rows:
    """Attention of a rank's queries over the keys seen so far: [B, H, L, Ev] and [B, H, L], in the dtype of sums."""

    out: Tensor
    lse: Tensor

    @classmethod
    def none(cls, q: Tensor, v: Tensor) -> "Rows":
        """Before any key is seen."""
        wide = accumulation_dtype(q.dtype)
        shape = q.shape[:-1]
        return cls(q.new_zeros(*shape, v.shape[-1], dtype=wide), q.new_full(shape, float("-inf"), dtype=wide))

    def see(self, q: Tensor, k: Tensor, v: Tensor, found: Grid, scale: float) -> None:
        """Merge the scores of blocks: out = sum of exp(lse_i - lse) out_i, lse = log of sum of exp(lse_i)."""
        for at, of, causal in spans(found, q, k):
            out, lse = attend(q[:, :, at], k[:, :, of], v[:, :, of], causal=causal, scale=scale)
            before, own = self.lse[:, :, at], self.out[:, :, at]
            both = torch.logaddexp(before, lse)
            own.mul_((before - both).exp().unsqueeze(-1)).add_(out * (lse - both).exp().unsqueeze(-1))
            before.copy_(both)


@define(eq=False)
class Gradients:
    """The gradient of a rank's queries, in the dtype of sums, as far as blocks have added to it."""

    q: Tensor

    def add(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, found: Grid, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Add what blocks give; what they give keys and values."""
        wide = self.q.dtype
        d_k, d_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for at, of, causal in spans(found, q, k):
            read = (grad[:, :, at], q[:, :, at], k[:, :, of], v[:, :, of], out[:, :, at], lse[:, :, at])
            for total, part in zip(
                (self.q[:, :, at], d_k[:, :, of], d_v[:, :, of]),
                attend_backward(*read, causal=causal, scale=scale),
                strict=True,
            ):
                total.add_(part)
        return d_k, d_v


def spans(found: Grid, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, bool]]:
    """The rows and columns of each block, and whether it is causal."""
    rows, columns = q.shape[-2] // found.rows, k.shape[-2] // found.columns
    for block in found.blocks:
        yield _span(block.rows, rows), _span(block.columns, columns), block.causal


def _span(chunks: tuple[int, int], length: int) -> slice:
    return slice(chunks[0] * length, chunks[1] * length)


# Gathered keys.


class _Gathered(torch.autograd.Function):
    """Queries stay, keys and values are gathered; backward gathers them again and scatters the sum of gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: Job) -> Tensor:
        rows = Rows.none(q, v)
        keys, values = (all_gather(each, job.move("all_gather", 2), job.fabric) for each in (k, v))
        rows.see(q, keys, values, job.grid_of_all(), job.scale)
        out = rows.out.to(q.dtype)
        ctx.job = job
        ctx.save_for_backward(q, k, v, out, rows.lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        job: Job = ctx.job
        q, k, v, out, lse = ctx.saved_tensors
        keys, values = (all_gather(each, job.move("all_gather", 2), job.fabric) for each in (k, v))
        found = Gradients(torch.zeros_like(q, dtype=lse.dtype))
        summed = found.add(grad, q, keys, values, out, lse, job.grid_of_all(), job.scale)
        del keys, values
        own = [reduce_scatter(each, job.move("reduce_scatter", 2), job.fabric) for each in summed]
        return found.q.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype), None


def gather_sequence(tensor: Tensor, job: Job) -> Tensor:
    """[.., S/n, E] -> [.., S, E], in the order of the sequence; its gradient is summed over ranks and scattered."""
    move = job.move("all_gather", tensor.ndim - 2)
    return pass_point(tensor, (move,), adjoint((move,), {AXIS}, ())[0], job.fabric)


# The ring.


class _Ring(torch.autograd.Function):
    """Keys and values travel from rank to rank; backward they travel again, and their gradients behind them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: Job) -> Tensor:
        rows, held = Rows.none(q, v), _packed(k, v)
        for step in range(job.ranks):
            hop = Hop.start(held, job) if step + 1 < job.ranks else None
            rows.see(q, *_unpacked(held, k, v), job.grid((job.place - step) % job.ranks), job.scale)
            if hop is not None:
                held = hop.end()
        out = rows.out.to(q.dtype)
        ctx.job = job
        ctx.save_for_backward(q, k, v, out, rows.lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        job: Job = ctx.job
        q, k, v, out, lse = ctx.saved_tensors
        found, held = Gradients(torch.zeros_like(q, dtype=lse.dtype)), _packed(k, v)
        own, sums = held, None
        for step in range(job.ranks):
            hop = Hop.start(held, job) if step + 1 < job.ranks else None
            seen = job.grid((job.place - step) % job.ranks)
            added = _packed(*found.add(grad, q, *_unpacked(held, k, v), out, lse, seen, job.scale))
            if step == 0:
                own = added  # what a rank adds for its own keys stays
            else:
                # What the ranks behind this one have added for the same keys arrives; the sum goes on.
                sums = Hop.start(added if sums is None else added.add_(sums.end()), job)
            if hop is not None:
                held = hop.end()
        if sums is not None:
            own = own.add_(sums.end())
        d_k, d_v = _unpacked(own, k, v)
        return found.q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None


@define(eq=False)
class Hop:
    """A message to the next rank of cp, and the one from the rank before."""

    sent: Tensor
    received: Tensor
    work: dist.Work

    @classmethod
    def start(cls, message: Tensor, job: Job) -> "Hop":
        """Send a flat tensor on; every rank of cp must."""
        out, to = [0] * job.ranks, [0] * job.ranks
        to[(job.place + 1) % job.ranks] = out[(job.place - 1) % job.ranks] = message.numel()
        received = torch.empty_like(message)
        group = job.fabric.group((AXIS,))
        work = dist.all_to_all_single(received, message, out, to, group=group, async_op=True)
        assert work is not None, "what is asynchronous can be waited for"
        return cls(message, received, work)

    def end(self) -> Tensor:
        """What has arrived."""
        self.work.wait()
        return self.received


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one flat message."""
    return torch.cat((k.flatten(), v.flatten()))


def _unpacked(message: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What was packed, in the shapes of keys and values."""
    one, two = message.split([k.numel(), v.numel()])
    return one.view(k.shape), two.view(v.shape)


# Heads for sequence.


class _ToHeads(torch.autograd.Function):
    """[.., H, S/n, E] -> [.., H/n, S, E] of queries, keys and values, in the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: Job) -> tuple[Tensor, ...]:
        ctx.job = job
        return tuple(all_to_all(each, to_heads(each, job), job.fabric) for each in (q, k, v))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        job: Job = ctx.job
        return *(all_to_all(grad, to_sequence(grad, job), job.fabric) for grad in grads), None


def to_heads(tensor: Tensor, job: Job) -> Move:
    """The exchange that gathers the sequence and splits heads."""
    return job.move("all_to_all", tensor.ndim - 2, tensor.ndim - 3)


def to_sequence(tensor: Tensor, job: Job) -> Move:
    """The exchange that gathers heads and splits the sequence."""
    return adjoint((to_heads(tensor, job),), set(), ())[0][0]


def from_heads(tensor: Tensor, job: Job) -> Tensor:
    """[.., H/n, S, E] -> [.., H, S/n, E]."""
    return pass_point(tensor, (to_sequence(tensor, job),), (to_heads(tensor, job),), job.fabric)


def _own_heads(mask: Tensor | None, query: Tensor, job: Job) -> Tensor | None:
    """The heads of a mask that this rank computes after the exchange; `query` is as before it."""
    if mask is None or mask.ndim < 3 or mask.shape[-3] == 1:
        return mask
    heads = query.shape[-3] // job.ranks
    return mask.narrow(-3, job.place * heads, heads)
