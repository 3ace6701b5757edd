"""Whether a refused operator could have been accepted: some layout of its results is what the ranks compute."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardspec.aliasing import writes
from shardspec.infer import Issue
from shardspec.layout import AVG, MAX, MIN, SUM, Layout, replicated
from shardspec.program import Ref, substitute, tensors
from shardspec.testing.simulate import Ranks, coordinates, difference, scatter
from tests.strategies import merge

UNCHECKED = frozenset(
    {
        "segment_reduce",
        "linalg_ldl_solve",
        "lu_unpack",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_impl_index",
        "instance_norm",
        "batch_norm",
        "cudnn_batch_norm",
        "_batch_norm_with_update",
    }
)
"""Operators whose kernels read beyond operands that do not fit each other."""


def some_layout_is_sound(issue: Issue, inputs: Sequence[Tensor], sizes: dict[str, int]) -> bool:
    """Whether the refused operator, run unchanged on each rank's parts, gives parts of its global result.

    An upper bound of what a rule could accept: gradients are not looked at, and one draw of values may agree by
    chance. An operator whose arguments would have to be a rank's own counts as not sound.

    Args:
        issue: the refusal, of a program typed on a mesh of one axis.
        sizes: that mesh.
    """
    node, typed = issue.typed.graph.nodes[issue.node], issue.typed
    refs = list(dict.fromkeys(tensors(node.args) + tensors(node.kwargs)))
    kinds = {ref: typed.types[ref.index] for ref in refs}
    if not refs or node.op in UNCHECKED or any(kind is None or kind.uniform for kind in kinds.values()):
        return False
    try:
        values = _values(issue, inputs)
        parts = {ref: scatter(values[ref.index], typed.layout(ref.index), sizes, seed=ref.index) for ref in refs}
        whole = _flat(_call(node, {ref.index: values[ref.index].clone() for ref in refs}))
        made = {
            at: _flat(_call(node, {ref.index: parts[ref][at].clone() for ref in refs})) for at in coordinates(sizes)
        }
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    if not whole or any(len(outs) != len(whole) for outs in made.values()):
        return False
    if any(result.device.type == "meta" for result in whole):
        return False  # it was asked for there, and has no values
    fixed = typed.layout(refs[0].index) if writes(node.func) else None
    if fixed is not None and (len(whole) > 1 or whole[0].shape != values[refs[0].index].shape):
        return False
    return all(
        any(
            _holds({at: outs[number] for at, outs in made.items()}, result, layout, sizes)
            for layout in _candidates(result, sizes, fixed)
        )
        for number, result in enumerate(whole)
    )


def _values(issue: Issue, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """The whole values of a program up to the refused node."""
    graph = issue.typed.graph
    values = {index: inputs[int(name[1:])].clone() for name, index in graph.params.items()}
    values |= {index: value.data for index, value in enumerate(graph.values) if value.data is not None}
    for node in graph.nodes[: issue.node]:
        for index, out in zip(node.outputs, _flat(_call(node, values)), strict=False):
            if index is not None:
                values[index] = out
    return values


def _call(node: Any, values: dict[int, Tensor]) -> Any:
    def read(ref: Ref) -> Tensor:
        return values[ref.index]

    kwargs = substitute(node.kwargs, read)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    return node.func(*substitute(node.args, read), **kwargs)


def _flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _candidates(result: Tensor, sizes: dict[str, int], fixed: Layout | None) -> Iterator[Layout]:
    """Every layout of a result on one axis."""
    if fixed is not None:
        yield fixed
        return
    ((axis, size),) = sizes.items()
    whole = replicated(result.shape)
    yield whole
    for dim, length in enumerate(result.shape):
        for outer in range(1, length // size + 1):
            if length % (outer * size) == 0:
                digits = merge([outer, axis, length // outer // size])
                yield Layout((*whole.dims[:dim], digits, *whole.dims[dim + 1 :]))
    for kind in (SUM, AVG, MAX, MIN):
        yield Layout(whole.dims, ((axis, kind),))


def _holds(ranks: Ranks, result: Tensor, layout: Layout, sizes: dict[str, int]) -> bool:
    kinds = {kind for _, kind in layout.pending}
    if any(part.dtype != result.dtype for part in ranks.values()):
        return False
    if layout.pending and any(part.shape != result.shape for part in ranks.values()):
        return False
    if (kinds & {MAX, MIN} and result.is_complex()) or (AVG in kinds and not result.is_floating_point()):
        return False
    if result.dtype in (torch.complex32, torch.uint64) or (kinds and result.dtype is torch.bool):
        return False  # torch does not index or add them
    tolerance = 1e-9 if result.is_floating_point() or result.is_complex() else 0.0
    return not difference(ranks, result, layout, sizes, tolerance=tolerance)
