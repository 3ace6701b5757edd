"""Attention of one block of queries and keys, with what merges blocks: the log of each row's sum of exponentials.

Two functions make a kernel. `attend` gives the output and its log-sum-exp; `attend_backward`, from the output and
the log-sum-exp of *all* keys that a row reads, what this block adds to the gradients. So computed blocks add up:
FlashAttention-2 (arXiv 2307.08691), equations of section 3.1.
"""

import torch
from torch import Tensor

from shardspec import torch_private
from shardspec.functional import accumulation_dtype

FLASH_WIDEST = 256
"""The largest head of the CUDA flash kernel."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One block: q [B, H, L, E], k [B, K, S, E], v [B, K, S, Ev] -> out [B, H, L, Ev], lse [B, H, L].

    K divides H: query head i reads key head i // (H / K). `causal` takes L = S, and row i reads columns 0 to i.
    The log-sum-exp is natural, of the scaled scores, in float32 for half precision.
    """
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return torch_private.cpu_attention(q, k, v, causal, scale)
    if _has_flash(q, v):
        return torch_private.flash_attention(q, _repeated(k, q), _repeated(v, q), causal, scale)
    scores = _scores(q, _repeated(k, q), causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().to(v.dtype)
    return weights @ _repeated(v, q), lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients of q, k and v, from the output and log-sum-exp of whole rows."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return torch_private.cpu_attention_backward(grad, q, k, v, out, lse.contiguous(), causal, scale)
    keys, values = _repeated(k, q), _repeated(v, q)
    if _has_flash(q, v):
        dq, dk, dv = torch_private.flash_attention_backward(grad, q, keys, values, out, lse.contiguous(), causal, scale)
        return dq, _summed(dk, k), _summed(dv, v)
    wide = lse.dtype
    weights = (_scores(q, keys, causal, scale) - lse.unsqueeze(-1)).exp()
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    dv = weights.transpose(-2, -1) @ grad.to(wide)
    d_scores = weights * (grad.to(wide) @ values.to(wide).transpose(-2, -1) - delta) * scale
    dq, dk = d_scores @ keys.to(wide), d_scores.transpose(-2, -1) @ q.to(wide)
    return dq.to(q.dtype), _summed(dk.to(k.dtype), k), _summed(dv.to(v.dtype), v)


def _has_flash(q: Tensor, v: Tensor) -> bool:
    fits = q.shape[-1] == v.shape[-1] <= FLASH_WIDEST and q.shape[-1] % 8 == 0
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and fits


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """The scaled scores [B, H, L, S], in the dtype of sums; what a row does not read is -inf."""
    scores = (q @ k.transpose(-2, -1)).to(accumulation_dtype(q.dtype)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    """Keys or values with a head for each of the queries'."""
    groups = q.shape[1] // k.shape[1]
    return k if groups == 1 else k.repeat_interleave(groups, 1)


def _summed(grad: Tensor, k: Tensor) -> Tensor:
    """The gradient of keys or values from that of their repeated heads."""
    groups = grad.shape[1] // k.shape[1]
    return grad if groups == 1 else grad.unflatten(1, (k.shape[1], groups)).sum(2)
