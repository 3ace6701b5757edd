"""Vocabulary-parallel embedding and cross-entropy over plain local tensors and an explicit group.

Names carry dims: V the whole vocabulary, v this rank's part of it, N tokens, D features.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardspec.functional import accumulation_dtype, check_range, check_shapes, count

# Elements of one temporary of the row-wise passes: 64 MiB in float32, so that bf16 logits are never
# held a second time in float32.
CHUNK_ELEMENTS = 1 << 24


def cross_entropy_sharded(
    logits: Tensor,
    labels: Tensor,
    first: int,
    size_V: int,
    group: dist.ProcessGroup | None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The pair of `cross_entropy` from logits [..., v], columns [first, first + v) of V = size_V.

    Labels are global and equal on all ranks of `group`; the pair is replicated over it, and so must be
    the gradient that comes back. `group=None` is a world of one. Two collectives forward (a max, and one
    sum for both normaliser and picked logit), none backward. Megatron-LM, arXiv:1909.08053, section 3.
    """
    check_shapes(logits, labels)
    if first < 0 or first + logits.shape[-1] > size_V:
        raise ValueError(f"columns [{first}, {first + logits.shape[-1]}) are not within [0, {size_V})")
    check_range(labels, size_V, "label", ignore_index)
    weight = count(labels, ignore_index, accumulation_dtype(logits.dtype))
    return _ShardedCrossEntropy.apply(logits, labels, first, group, ignore_index), weight


def embedding_sharded(weight: Tensor, ids: Tensor, first: int, size_V: int, padding_idx: int | None = None) -> Tensor:
    """Look up ids [...] in rows [first, first + v) of a table of size_V rows: this rank's share [..., D].

    weight [v, D]. Rows of ids that other ranks own are zero, so that the result is pending-sum; its
    gradient reaches own rows only, and never row `padding_idx` (global), as in `F.embedding`. An id
    outside [0, size_V) is a ValueError on the CPU and a device-side assertion elsewhere.
    """
    check_range(ids, size_V, "id")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += size_V
    return _ShardedEmbedding.apply(weight, ids, first, padding_idx)


class _ShardedCrossEntropy(torch.autograd.Function):
    """nll = log(sum_v exp(x_v - m)) - (x_label - m), m = max_v x_v; d nll / d x = softmax(x) - onehot."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        first: int,
        group: dist.ProcessGroup | None,
        ignore_index: int,
    ) -> Tensor:
        logits_Nv = logits.reshape(-1, logits.shape[-1])
        labels_N = labels.reshape(-1).long()
        dtype = accumulation_dtype(logits.dtype)
        max_N = logits_Nv.amax(-1).to(dtype)
        if group is not None:
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)

        valid_N = labels_N != ignore_index
        own_N, local_N = _localise(labels_N, first, logits_Nv.shape[-1])
        own_N &= valid_N
        picked_N = logits_Nv.gather(1, local_N[:, None]).squeeze(1).to(dtype) - max_N
        parts_2N = torch.stack([torch.empty_like(max_N), picked_N.masked_fill_(~own_N, 0)])
        for rows in _row_chunks(logits_Nv):
            torch.sum((logits_Nv[rows] - max_N[rows, None]).exp_(), -1, out=parts_2N[0, rows])
        if group is not None:
            dist.all_reduce(parts_2N, group=group)

        log_sum_N = parts_2N[0].log()
        # The logits are alive anyway, so that saving them costs nothing: softmax is computed again.
        ctx.save_for_backward(logits, log_sum_N + max_N, own_N, local_N, valid_N)
        return (log_sum_N - parts_2N[1]).masked_fill_(~valid_N, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, log_normaliser_N, own_N, local_N, valid_N = ctx.saved_tensors
        logits_Nv = logits.reshape(-1, logits.shape[-1])
        grad_Nv = torch.empty_like(logits_Nv, memory_format=torch.contiguous_format)
        minus_own_N1 = -own_N.to(log_normaliser_N.dtype)[:, None]
        scale_N1 = (valid_N * grad)[:, None]
        wide = grad_Nv.dtype != log_normaliser_N.dtype
        for rows in _row_chunks(logits_Nv):
            # in the gradient's own memory, unless it is too narrow to compute in
            out = None if wide else grad_Nv[rows]
            softmax_nv = torch.sub(logits_Nv[rows], log_normaliser_N[rows, None], out=out).exp_()
            softmax_nv.scatter_add_(1, local_N[rows, None], minus_own_N1[rows])
            torch.mul(softmax_nv, scale_N1[rows], out=grad_Nv[rows])
        return grad_Nv.reshape(logits.shape), None, None, None, None


class _ShardedEmbedding(torch.autograd.Function):
    """F.embedding on the ids that this rank owns, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, first: int, padding_idx: int | None) -> Tensor:
        own, local = _localise(ids, first, weight.shape[0])
        out = F.embedding(local, weight).masked_fill_(~own.unsqueeze(-1), 0)
        if padding_idx is not None:
            own &= ids != padding_idx
        # torch's kernel skips one row, its padding_idx: send there all that must not be accumulated.
        ctx.save_for_backward(local.masked_fill_(~own, weight.shape[0]))
        ctx.rows = weight.shape[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (local,) = ctx.saved_tensors
        rows = ctx.rows
        grad_weight = torch.ops.aten.embedding_dense_backward(grad, local, rows + 1, rows, False)
        return grad_weight[:rows], None, None, None


def _localise(ids: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Return which ids lie in [first, first + size), and all ids relative to first, clamped into range."""
    local = ids.long() - first
    return (local >= 0) & (local < size), local.clamp_(0, size - 1)


def _row_chunks(tensor_Nv: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, tensor_Nv.shape[1]))
    return (slice(start, start + rows) for start in range(0, tensor_Nv.shape[0], rows))
