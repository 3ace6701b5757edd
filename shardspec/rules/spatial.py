"""Operators over rows and columns as vision and audio use them: padding, resampling, windows, transforms, norms."""

from collections.abc import Sequence
from typing import Any

import torch

from shardspec.program import Ref
from shardspec.rules.operator import (
    COPY,
    FIRST,
    NONLINEAR,
    PRODUCT,
    Call,
    Label,
    Refusal,
    Typed,
    dim_index,
    rule,
    unify,
)

aten = torch.ops.aten

PADS = {
    aten.reflection_pad1d.default: 1,
    aten.reflection_pad2d.default: 2,
    aten.reflection_pad3d.default: 3,
    aten.replication_pad1d.default: 1,
    aten.replication_pad2d.default: 2,
    aten.replication_pad3d.default: 3,
}
"""Padding by elements of the tensor itself -> over how many of the last dims it lies."""

RESAMPLINGS = {
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten._upsample_nearest_exact1d.vec: 1,
    aten._upsample_nearest_exact2d.vec: 2,
    aten._upsample_nearest_exact3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
    aten._upsample_bilinear2d_aa.vec: 2,
    aten._upsample_bicubic2d_aa.vec: 2,
}
"""Resampling, as `F.interpolate` calls it -> over how many of the last dims it lies."""


def over(call: Call, dims: Sequence[int], linear: str) -> Typed:
    """Type an operator of one tensor that reads the named dims whole, and keeps the number of dims."""
    rank, made = len(call.shape(0)), call.out().shape
    names: list[Label] = list(range(rank))
    out: list[Label] = [("made", index) if index in dims else index for index in range(rank)]
    return unify(
        call, [names], [out], linear=linear, whole=dims, out_sizes={("made", index): made[index] for index in dims}
    )


@rule(aten.constant_pad_nd.default)
def pad(call: Call) -> Typed:
    """Pads the last dims with a number, of which zero alone is linear; a dim that gets nothing may be split."""
    rank, amounts = len(call.shape(0)), [int(amount) for amount in call.named["pad"]]
    padded = [rank - 1 - index // 2 for index, amount in enumerate(amounts) if amount]
    return over(call, sorted(set(padded)), PRODUCT if call.named["value"] == 0 else NONLINEAR)


@rule(*PADS)
def pad_by_itself(call: Call) -> Typed:
    """Pads the last dims with elements of the tensor."""
    rank = len(call.shape(0))
    return over(call, range(rank - PADS[call.node.func], rank), COPY)


@rule(*RESAMPLINGS)
def resample(call: Call) -> Typed:
    """x [b, c, ...] to another number of rows and columns: linear but for whole numbers, which are rounded."""
    rank = len(call.shape(0))
    linear = PRODUCT if call.dtype(0).is_floating_point else NONLINEAR
    return over(call, range(rank - RESAMPLINGS[call.node.func], rank), linear)


@rule(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default)
def shuffle(call: Call) -> Typed:
    """[..., c, y, x]: elements move between channels, rows and columns."""
    rank = len(call.shape(0))
    dims = range(rank - 3, rank) if "pixel" in call.node.op else range(1, rank)
    return over(call, dims, COPY)


@rule(aten.unfold.default)
def windows(call: Call) -> Typed:
    """Windows of a whole dim; their elements are a new last dim."""
    rank, made = len(call.shape(0)), call.out().shape
    dim = dim_index(call.named["dimension"], rank)
    names: list[Label] = list(range(rank))
    out: list[Label] = ["windows" if index == dim else index for index in range(rank)]
    sizes = {"windows": made[dim] if rank else 1, "elements": made[-1]}
    return unify(call, [names], [[*out, "elements"]], linear=COPY, whole=[dim], out_sizes=sizes)


@rule(aten.im2col.default, aten.col2im.default)
def columns(call: Call) -> Typed:
    """Patches of [b, c, y, x] as columns [b, c * k, l], or back; only the batch may be split."""
    rank, made = len(call.shape(0)), call.out().shape
    lead: list[Label] = ["b"] if rank == (4 if call.node.op == "im2col" else 3) else []
    names: list[Label] = [*lead, *range(rank - len(lead))]
    out: list[Label] = [*lead, *(("made", index) for index in range(len(made) - len(lead)))]
    sizes = {("made", index): length for index, length in enumerate(made[len(lead) :])}
    return unify(call, [names], [out], linear=PRODUCT, whole=range(rank - len(lead)), out_sizes=sizes)


@rule(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def sample(call: Call) -> Typed:
    """x [b, c, ...] at the places grid [b, ..., 2 or 3] -> [b, c, ...]; linear in x."""
    count = len(call.shape(0)) - 2
    rows: list[Label] = [("row", index) for index in range(count)]
    places: list[Label] = [("place", index) for index in range(count)]
    labels = [["b", "c", *rows], ["b", *places, "coordinate"]]
    return unify(call, labels, [["b", "c", *places]], linear=FIRST, whole=[*rows, "coordinate"])


@rule(aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default)
def fourier(call: Call) -> Typed:
    """A discrete Fourier transform over whole dims: linear."""
    rank = len(call.shape(0))
    return over(call, sorted({dim_index(dim, rank) for dim in call.named["dim"]}), PRODUCT)


@rule(aten.group_norm.default)
def group_norm(call: Call) -> Typed:
    """x [b, c, ...], weight and bias [c]: each example by itself, its channels and places whole."""
    every: list[Label] = ["b", "c", *range(len(call.shape(0)) - 2)]
    names = every[: len(call.shape(0))]
    return unify(call, [names, *[["c"] for _ in call.types[1:]]], [names], whole=names[1:])


@rule(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(call: Call) -> Typed:
    """x [b, c, ...], and vectors of [c]: with the running statistics every element by itself.

    Statistics of the batch need all of it, those of an instance all of its places; where running ones are
    updated, every rank must update them alike.
    """
    if len(call.shape(0)) < 2 or any(len(call.shape(operand)) != 1 for operand in range(1, len(call.types))):
        raise Refusal("SS305", f"{call.node.op} of operands of these shapes has no rule", operands=(0,))
    named, places = call.named, list(range(len(call.shape(0)) - 2))
    names: list[Label] = ["b", "c", *places]
    whole: list[Any] = []
    if named.get("training") or named.get("use_input_stats"):
        whole = ["b", *places] if call.node.op == "batch_norm" else places
        if isinstance(named.get("running_mean"), Ref):
            whole = [*names]
    try:
        return unify(call, [names, *[["c"] for _ in call.types[1:]]], [names], whole=whole)
    except Refusal as refusal:
        if refusal.code == "SS304":
            refusal.advice = ("use a norm of each example (GroupNorm, LayerNorm), or call .eval() on the norm",)
        raise
