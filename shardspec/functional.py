"""What a model or a loss may call by name: `ss.name` and `ss.cross_entropy`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from shardspec import torch_private


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
        ValueError: on the CPU, for a label that is neither; elsewhere a device-side assertion.
    """
    if has_torch_function((logits, labels)):
        return handle_torch_function(cross_entropy, (logits, labels), logits, labels, ignore_index=ignore_index)
    check_shapes(logits, labels)
    dtype = accumulation_dtype(logits.dtype)
    try:
        total = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).to(dtype),
            labels.reshape(-1).long(),
            ignore_index=ignore_index,
            reduction="sum",
        )
    except IndexError:
        # Torch's kernel checks the range too; only then is it worth a look at which label it was.
        check_range(labels, logits.shape[-1], "label", ignore_index)
        raise
    return total, count(labels, ignore_index, dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss is summed."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def count(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How many labels are not masked, as a 0-dim tensor of `dtype`."""
    return (labels != ignore_index).sum().to(dtype)


def check_shapes(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that do not match the logits: flattened, [2, 3] and [3, 2] would agree silently."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {list(labels.shape)} do not match logits {list(logits.shape)} without V")


def check_range(ids: Tensor, size_V: int, noun: str, ignore_index: int | None = None) -> None:
    """Refuse ids outside [0, size_V) other than ignore_index, without a sync on an accelerator."""
    if ids.is_meta:
        return
    good = (ids >= 0) & (ids < size_V)
    if ignore_index is not None:
        good |= ids == ignore_index
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        torch_private.assert_async(good.all(), f"{noun} outside [0, {size_V})")
    elif not good.all():
        _raise_out_of_range(ids, (~good).nonzero(), size_V, noun, ignore_index)


def _raise_out_of_range(ids: Tensor, bad: Tensor, size_V: int, noun: str, ignore_index: int | None) -> None:
    where = tuple(bad[0].tolist())
    excepted = "" if ignore_index is None else f" and is not ignore_index={ignore_index}"
    more = f" ({len(bad)} such {noun}s)" if len(bad) > 1 else ""
    raise ValueError(f"{noun} {ids[where].item()} at {list(where)} is outside [0, {size_V}){excepted}{more}")
