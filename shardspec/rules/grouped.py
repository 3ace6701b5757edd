"""Grouped products: one weight for each run of rows, as `torch._grouped_mm` and `F.grouped_mm` have it."""

from typing import Any

import torch

from shardspec.program import Ref
from shardspec.rules.operator import META, PRODUCT, Call, Refusal, Typed, rule, unify

aten = torch.ops.aten


def _shape(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: Any = None,
) -> torch.Tensor:
    """The result's shape; torch's own form on meta takes bfloat16 alone."""
    del offs, bias
    wide = mat_a.ndim == mat_b.ndim
    lead = (mat_b.shape[0],) if wide and mat_b.ndim == 3 else ()
    return torch.empty((*lead, mat_a.shape[-2], mat_b.shape[-1]), dtype=out_dtype or mat_a.dtype, device="meta")


META[aten._grouped_mm.default] = _shape


@rule(aten._grouped_mm.default)
def grouped_product(call: Call) -> Typed:
    """rows [m, k], weights [g, k, n], ends of the groups [g] -> [m, n]: rows and groups are whole."""
    if len(call.shape(0)) != 2 or len(call.shape(1)) != 3 or not isinstance(call.named.get("offs"), Ref):
        raise Refusal("SS305", "a grouped product of other than rows by stacked weights has no rule", operands=(0, 1))
    if isinstance(call.named.get("bias"), Ref):
        raise Refusal("SS305", "a grouped product with a bias has no rule", operands=(0, 1))
    whole = ["m", "g"]
    return unify(call, [["m", "k"], ["g", "k", "n"], ["g"]], [["m", "n"]], linear=PRODUCT, whole=whole, fixed=(2,))
