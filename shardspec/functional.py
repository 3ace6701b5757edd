"""What a model or a loss may call by name: `ss.name` and `ss.cross_entropy`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

HALF = (torch.float16, torch.bfloat16)


def name(tensor: Tensor, label: str) -> Tensor:
    """Name an activation `<module fqn>.<label>`, so that a rule can stand there; the identity otherwise."""
    if has_torch_function((tensor,)):
        return handle_torch_function(name, (tensor,), tensor, label)
    return tensor


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """The sum of the negative log likelihoods, and the number of tokens that count.

    logits [..., V]; labels [...], integers in [0, V) or `ignore_index`. Both results are 0-dim, float32 for
    half precision logits and else of the logits' dtype; the second is detached. On a mesh `logits` may be
    split over its vocabulary.

    Raises:
        IndexError: on the CPU, for a label that is neither; elsewhere a device-side assertion.
    """
    if has_torch_function((logits, labels)):
        return handle_torch_function(cross_entropy, (logits, labels), logits, labels, ignore_index=ignore_index)
    dtype = accumulation_dtype(logits.dtype)
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(dtype),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="sum",
    )
    return total, count(labels, ignore_index, dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss is summed."""
    return torch.float32 if dtype in HALF else dtype


def count(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How many labels are not masked, as a 0-dim tensor of `dtype`."""
    return (labels != ignore_index).sum().to(dtype)
