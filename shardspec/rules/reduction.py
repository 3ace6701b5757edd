"""Operators that reduce or normalise over whole dims."""

from collections.abc import Iterable

import torch
from attrs import evolve

from shardspec.layout import AVG, MAX, MIN, SUM, Layout
from shardspec.rules.operator import (
    COPY,
    NONLINEAR,
    PRODUCT,
    Call,
    Label,
    Refusal,
    Type,
    Typed,
    aligned,
    aligned_output,
    dim_index,
    rule,
    unify,
)

aten = torch.ops.aten

PARTIAL = {
    aten.sum.default: SUM,
    aten.sum.dim_IntList: SUM,
    aten.nansum.default: SUM,
    aten.count_nonzero.default: SUM,
    aten.count_nonzero.dim_IntList: SUM,
    aten.mean.default: AVG,
    aten.mean.dim: AVG,
    aten.amax.default: MAX,
    aten.amin.default: MIN,
    aten.max.default: MAX,
    aten.min.default: MIN,
}
"""Reductions of which a rank's part leaves a pending value of this kind."""


COUNTS = (aten.nansum.default, aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
"""Sums of something that is not linear in the elements."""


def _dims(call: Call) -> list[int]:
    rank = len(call.shape(0))
    dims = call.named.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dim_index(dim, rank) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _outputs(call: Call, dims: Iterable[int]) -> list[Label]:
    dims = set(dims)
    kept: list[Label] = [index if index not in dims else None for index in range(len(call.shape(0)))]
    return kept if call.named.get("keepdim") else [label for index, label in enumerate(kept) if index not in dims]


@rule(*PARTIAL)
def partial(call: Call) -> Typed:
    """A reduction over dims that may be split: each rank reduces its part."""
    kind, dims = PARTIAL[call.node.func], _dims(call)
    names: list[Label] = list(range(len(call.shape(0))))
    pending = {found for _, found in call.types[0].layout.pending}
    linear = PRODUCT if kind in (SUM, AVG) else COPY if pending <= {kind} else NONLINEAR
    linear = linear if call.node.func not in COUNTS else NONLINEAR
    return unify(call, [names], [_outputs(call, dims)], linear=linear, contracted=kind)


@rule(
    aten.var.correction,
    aten.var.dim,
    aten.var.default,
    aten.std.correction,
    aten.std.dim,
    aten.prod.dim_int,
    aten.prod.default,
    aten.any.default,
    aten.any.dim,
    aten.all.default,
    aten.all.dim,
    aten.logsumexp.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.norm.ScalarOpt_dim,
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.median.default,
    aten.nanmedian.dim,
    aten.nanmedian.default,
    aten.kthvalue.default,
    aten.mode.default,
    aten.any.dims,
    aten.all.dims,
    aten.std_mean.correction,
    aten.var_mean.correction,
    aten.aminmax.default,
)
def whole(call: Call) -> Typed:
    """A reduction over dims that must be whole."""
    dims = _dims(call)
    names: list[Label] = list(range(len(call.shape(0))))
    outputs = [_outputs(call, dims) for _ in call.node.outputs]
    return unify(call, [names], outputs, whole=dims)


NORMS = {0: SUM, 1: SUM, float("inf"): MAX, float("-inf"): MIN}
"""Order of a norm that a rank's part has a share of -> what is left to do."""


@rule(aten.linalg_vector_norm.default)
def norm_of_vectors(call: Call) -> Typed:
    """A norm over dims: of most orders they must be whole; sums of magnitudes and extremes may be split."""
    contracted, names = NORMS.get(call.named["ord"]), list(range(len(call.shape(0))))
    if contracted is None:
        return whole(call)
    return unify(call, [names], [_outputs(call, _dims(call))], contracted=contracted)


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten.sort.default,
    aten.sort.stable,
    aten.cummax.default,
    aten.cummin.default,
    aten.argsort.default,
    aten.logcumsumexp.default,
    aten.cumprod.default,
    aten.cumprod_.default,
    aten.glu.default,
)
def along(call: Call) -> Typed:
    """An operator along one dim, which must be whole."""
    rank = len(call.shape(0))
    dim = dim_index(call.named["dim"], rank)
    names: list[Label] = list(range(rank))
    out: list[Label] = [
        "fresh" if index == dim and call.out().shape[dim] != call.shape(0)[dim] else index for index in range(rank)
    ]
    sizes = {"fresh": call.out().shape[dim]} if rank else {}
    return unify(call, [names], [out for _ in call.node.outputs], whole=[dim], out_sizes=sizes)


@rule(
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.binary_cross_entropy.default,
)
def loss(call: Call) -> Typed:
    """A function of each pair of elements, then their mean or their sum, or neither."""
    reduction = int(call.named.get("reduction", 1))
    names = aligned(call)
    out = aligned_output(torch.broadcast_shapes(*map(call.shape, range(len(call.types))))) if reduction == 0 else []
    return unify(call, names, [out], contracted=SUM if reduction == 2 else AVG)


@rule(aten.cumsum.default, aten.cumsum_.default)
def cumsum(call: Call) -> Typed:
    """Linear, along a dim that must be whole."""
    rank = len(call.shape(0))
    names: list[Label] = list(range(rank))
    return unify(call, [names], [names], linear=PRODUCT, whole=[dim_index(call.named["dim"], rank)])


@rule(aten.topk.default)
def topk(call: Call) -> Typed:
    """The largest along a dim, which must be whole."""
    rank = len(call.shape(0))
    dim = dim_index(call.named.get("dim", -1), rank)
    names: list[Label] = list(range(rank))
    out: list[Label] = ["fresh" if index == dim else index for index in range(rank)]
    sizes = {"fresh": call.out().shape[dim]} if rank else {}
    return unify(call, [names], [out, out], whole=[dim], out_sizes=sizes)


@rule(aten.rms_norm.default, aten.layer_norm.default)
def norm(call: Call) -> Typed:
    """Normalised over the last dims, which must be whole; scaled and shifted there."""
    shape = call.shape(0)
    count = len(call.named["normalized_shape"])
    names: list[Label] = list(range(-len(shape), 0))
    tail: list[Label] = list(range(-count, 0))
    return unify(call, [names, *([tail] * (len(call.types) - 1))], [names], whole=tail)


@rule(aten.cross_entropy_loss.default)
def cross_entropy(call: Call) -> Typed:
    """Classes must be whole; a mean over split tokens weighs ranks, not tokens, and is refused."""
    return _class_loss(call, "cross_entropy")


@rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll_loss(call: Call) -> Typed:
    """As cross-entropy; and the weight that the mean is taken over, which adds up as the loss does."""
    typed = _class_loss(call, "nll_loss")
    loss = typed.outputs[0]
    return evolve(typed, outputs=(loss, Type(Layout((), loss.layout.pending))))


def _class_loss(call: Call, name: str) -> Typed:
    logits, target = call.shape(0), call.shape(1)
    reduction = int(call.named.get("reduction", 1))
    if len(target) == len(logits) and not call.dtype(1).is_floating_point:
        raise Refusal("SS305", f"{name} with this shape of target has no rule")
    lead: list[Label] = [0, *range(2, len(logits))] if len(logits) > 1 else []
    classes: Label = 1 if len(logits) > 1 else 0
    names: list[Label] = list(range(len(logits)))
    target_names = names if call.dtype(1).is_floating_point else lead
    labels = [names, target_names] + ([[classes]] if len(call.types) > 2 else [])
    out = lead if reduction == 0 else []
    try:
        typed = unify(call, labels, [out], whole=[classes])
    except Refusal as refusal:
        if refusal.code == "SS304" and refusal.operands == (0,):
            refusal.why += (
                "\nss.cross_entropy(logits, labels) reads a split vocabulary; its result is a sum and a weight"
            )
        raise
    if reduction == 1 and typed.outputs[0].layout.pending:
        axis = typed.outputs[0].layout.pending[0][0]
        raise Refusal(
            "SS311",
            f"{name} takes a mean over tokens that are split over {axis}",
            why="masked tokens differ between ranks, so a mean of the ranks' means is not the mean",
            operands=(1,),
            axis=axis,
            advice=("return ss.cross_entropy(logits, labels): a sum and its weight, which add up over ranks",),
        )
    return typed
