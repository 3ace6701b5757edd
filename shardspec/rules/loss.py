"""`ss.cross_entropy`, taken whole: the vocabulary may be split, the result is a sum and a weight."""

from typing import Any

import torch

from shardspec.functional import accumulation_dtype, check_shapes, cross_entropy
from shardspec.layout import SUM, dim_axes
from shardspec.rules.operator import Call, Label, Refusal, Type, Typed, rule, unify


def _meta(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> Any:
    """The results' shapes: two 0-dim tensors."""
    del ignore_index
    check_shapes(logits, labels)
    dtype = accumulation_dtype(logits.dtype)
    return torch.empty((), dtype=dtype, device="meta"), torch.empty((), dtype=dtype, device="meta")


cross_entropy.meta = _meta  # pyright: ignore[reportFunctionMemberAccess]


@rule(cross_entropy)
def token_loss(call: Call) -> Typed:
    """logits [..., V], labels [...] -> the sum of the losses and the count of tokens, pending over the tokens' axes."""
    lead: list[Label] = list(range(len(call.shape(1))))
    kind = call.types[0]
    classes = kind.layout.dims[-1]
    split = dim_axes(classes)
    if split and classes[: len(split)] != split:
        raise Refusal(
            "SS304",
            "cross_entropy reads a vocabulary that a rank holds in strides",
            operands=(0,),
            axis=split[0],
        )
    typed = unify(call, [[*lead, "V"], lead], [[], []])
    kept = tuple((axis, SUM) for axis, _ in typed.outputs[0].layout.pending if axis not in split)
    outputs = tuple(Type(type(kind.layout)((), kept)) for _ in range(2))
    return Typed(outputs, typed.consumed, lowering="cross_entropy" if split else "")
