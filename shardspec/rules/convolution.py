"""Convolutions and pooling: batch and channels may be split, rows and columns may not."""

import torch

from shardspec.rules.contraction import with_bias
from shardspec.rules.operator import NONLINEAR, PRODUCT, Call, Label, Typed, rule, unify

aten = torch.ops.aten

LINEAR_POOLS = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
"""Mean of a window -> over how many of the last dims it lies."""

MAX_POOLS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
"""Maximum of a window -> over how many of the last dims it lies."""


@rule(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
def convolution(call: Call) -> Typed:
    """x [b, i, ...], weight [o, i, ...] ([i, o, ...] where transposed), bias [o] -> [b, o, ...].

    With several groups the channels are whole: a rank that holds some of them would need another `groups`.
    """
    count = len(call.shape(1)) - 2
    lead: list[Label] = ["b"] if len(call.shape(0)) > count + 1 else []
    place: list[Label] = [("place", index) for index in range(count)]
    kernel: list[Label] = [("kernel", index) for index in range(count)]
    after: list[Label] = [("after", index) for index in range(count)]
    channels: list[Label] = ["i", "o"] if call.named.get("transposed") else ["o", "i"]
    whole = [*place, *kernel]
    if call.named.get("groups", 1) != 1:
        channels[1] = "of a group"
        whole += ["i", "o", "of a group"]
    labels = [[*lead, "i", *place], [*channels, *kernel]]
    sizes = dict(zip(["o", *after], call.out().shape[len(lead) :], strict=True))
    out: list[Label] = [*lead, "o", *after]
    return with_bias(call, labels, out, call.position("bias"), ["o"], whole=whole, out_sizes=sizes)


@rule(*LINEAR_POOLS, *MAX_POOLS)
def pool(call: Call) -> Typed:
    """x [..., y, x]: a window over the last dims; the mean of whole numbers is rounded."""
    linear = call.node.func in LINEAR_POOLS and call.dtype(0).is_floating_point
    count = LINEAR_POOLS.get(call.node.func) or MAX_POOLS[call.node.func]
    lead: list[Label] = list(range(len(call.shape(0)) - count))
    place: list[Label] = [("place", index) for index in range(count)]
    after: list[Label] = [("after", index) for index in range(count)]
    sizes = dict(zip(after, call.out().shape[-count:], strict=True))
    outputs = [[*lead, *after] for _ in call.node.outputs]
    names: list[Label] = [*lead, *place]
    return unify(call, [names], outputs, linear=PRODUCT if linear else NONLINEAR, whole=place, out_sizes=sizes)
