"""Pointwise operators: an element of the result reads one element of each operand."""

import torch

from shardspec.rules.operator import (
    COPY,
    FIRST,
    JOINT,
    NONLINEAR,
    PRODUCT,
    Call,
    Typed,
    aligned,
    aligned_output,
    rule,
    unify,
)
from shardspec.torch_private import OpOverload

aten = torch.ops.aten

LINEAR = {
    aten.neg.default: PRODUCT,
    aten.neg_.default: PRODUCT,
    aten._conj.default: PRODUCT,
    aten.mul.Tensor: PRODUCT,
    aten.mul.Scalar: PRODUCT,
    aten.div.Tensor: FIRST,
    aten.div.Scalar: FIRST,
    aten.add.Tensor: JOINT,
    aten.add.Scalar: JOINT,
    aten.sub.Tensor: JOINT,
    aten.sub.Scalar: JOINT,
    aten.rsub.Scalar: JOINT,
    aten.rsub.Tensor: JOINT,
    aten.mul_.Tensor: PRODUCT,
    aten.div_.Tensor: FIRST,
    aten.add_.Tensor: JOINT,
    aten.sub_.Tensor: JOINT,
}
"""The pointwise operators that let a pending sum through; every other one is nonlinear."""

UNTAGGED = (
    aten.polar.default,
    aten.complex.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.log_sigmoid.default,
    aten._prelu_kernel.default,
    aten.floor_divide.default,
    aten.floor_divide_.Tensor,
    aten.abs_.default,
    aten.mish_.default,
    aten.threshold_.default,
    aten.copysign_.Tensor,
    *(
        getattr(getattr(aten, name), kind)
        for name in ("eq_", "ne_", "lt_", "le_", "gt_", "ge_")
        for kind in ("Tensor", "Scalar")
    ),
)
"""Pointwise and nonlinear operators that torch does not tag as pointwise."""

CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)


def is_pointwise(operator: object) -> bool:
    """Whether torch's own tags call the operator pointwise."""
    return isinstance(operator, OpOverload) and torch.Tag.pointwise in operator.tags


def _has_number(call: Call) -> bool:
    """Whether a number is added that is not zero: `sum` of Python begins with one that is."""
    return any(isinstance(arg, (int, float, complex)) and arg != 0 for arg in call.node.args[1:2])


def pointwise(call: Call) -> Typed:
    """Type a pointwise operator with broadcasting."""
    linear = LINEAR.get(call.node.func, NONLINEAR)
    return unify(
        call,
        aligned(call),
        [aligned_output(call.out(output).shape) for output in range(len(call.node.outputs))],
        linear=linear,
        scalars=linear == JOINT and _has_number(call),
    )


rule(*LINEAR, *UNTAGGED)(pointwise)


@rule(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
)
def copy(call: Call) -> Typed:
    """The same elements under another name."""
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=COPY)


@rule(*CASTS)
def cast(call: Call) -> Typed:
    """A cast to a floating type is linear, up to rounding; one to integers or booleans is not."""
    exact = call.dtype(0) == call.out().dtype
    linear = exact or (call.out().dtype.is_floating_point and not call.dtype(0).is_complex)
    # Of a second operand only the dtype is read: its layout, and what it still owes, are no matter.
    cast = Call(call.node, call.values, call.types[:1], call.sizes, call.refs[:1])
    labels = aligned(cast)
    typed = unify(cast, labels, labels, linear=COPY if exact else FIRST if linear else NONLINEAR)
    return Typed(typed.outputs, (*typed.consumed, *call.types[1:]))


@rule(aten.where.self)
def where(call: Call) -> Typed:
    """Linear in the two branches together; the condition must be complete."""
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=JOINT, fixed=(0,))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def masked_fill(call: Call) -> Typed:
    """Linear in the first operand when it fills with zero."""
    linear = FIRST if call.named.get("value") == 0 else NONLINEAR
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=linear)
