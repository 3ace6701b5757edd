"""Attention, taken whole: batch and heads may be split, sequence and features may not."""

from collections.abc import Sequence

import torch

from shardspec.layout import DimLayout, Layout, canonical, dim_axes, dim_text
from shardspec.program import Ref
from shardspec.rules.operator import Call, Label, Refusal, Type, Typed, rule, unify

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Typed:
    """q [..., Hq, L, E], k and v [..., Hk, S, E] -> [..., Hq, L, E]; Hk may be smaller with `enable_gqa`."""
    grouped = bool(call.named.get("enable_gqa")) and call.shape(0)[-3] != call.shape(1)[-3]
    original = call.types
    if grouped:
        _check_groups(call)
        call.types = (original[0], *(_with_heads(kind, original[0]) for kind in original[1:3]), *original[3:])
    names = [_names(call.shape(operand), grouped) for operand in range(3)]
    labels = [[*names[0], "L", "E"], [*names[1], "S", "E"], [*names[2], "S", "Ev"]]
    if isinstance(call.named.get("attn_mask"), Ref):
        mask = call.shape(3)
        ends = [None if mask[-2] == 1 else "L", None if mask[-1] == 1 else "S"]
        lead = names[0][max(0, len(names[0]) - len(mask) + 2) :] if len(mask) > 2 else []
        labels.append([*(None if size == 1 else label for size, label in zip(mask[:-2], lead, strict=True)), *ends])
    # Where the queries are of one batch and the keys of several, the result is of several.
    batch = max(names, key=lambda labels: sum(label is not None for label in labels))
    typed = unify(call, labels, [[*batch, "L", "Ev"]], whole=["L", "S", "E"])
    if call.named.get("dropout_p"):
        typed.lowering = "attention"
    if grouped:
        typed.consumed = (typed.consumed[0], *original[1:3], *typed.consumed[3:])
    return typed


def _with_heads(kind: Type, queries: Type) -> Type:
    """A key's or value's type with the head dim of the queries, for the two are cut alike."""
    dims = (*kind.layout.dims[:-3], queries.layout.dims[-3], *kind.layout.dims[-2:])
    return Type(Layout(dims, kind.layout.pending), kind.uniform)


def _names(shape: Sequence[int], grouped: bool) -> list[Label]:
    """Labels of batch and heads; of size one they broadcast, but for the heads of a group."""
    heads = len(shape) - 3 if grouped else None
    return [
        None if size == 1 and index != heads else ("b", index - len(shape)) for index, size in enumerate(shape[:-2])
    ]


def _check_groups(call: Call) -> None:
    """Query head i reads key head i // (Hq / Hk): the queries' heads are the keys', times the group's."""
    heads: list[DimLayout] = [call.types[operand].layout.dims[-3] for operand in range(3)]
    axes = dim_axes(heads[0])
    for operand, dim in enumerate(heads):
        if canonical((*dim, call.shape(0)[-3] // call.shape(operand)[-3])) != heads[0]:
            held = [axis for axis in (*axes, *dim_axes(dim)) if axis not in axes or axis not in dim]
            raise Refusal(
                "SS302",
                "attention meets query and key heads that are laid out differently",
                why=f"the heads of {call.operand(0)} are {dim_text(heads[0])}, those of {call.operand(operand)} "
                f"{dim_text(dim)}: a rank's queries "
                "would read other heads than theirs",
                operands=(operand, 0),
                axis=(held or list(axes))[0],
            )
