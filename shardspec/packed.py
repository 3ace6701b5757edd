"""Edits for packed projections: a dim that a model cuts into parts, as the group or the direct sum that it is."""

import itertools
from collections.abc import Iterator, Sequence
from math import prod

from attrs import evolve

from shardspec.infer import Issue, Stop
from shardspec.rules.operator import named_arguments
from shardspec.rules.parse import STORAGE_AXES, RuleEdit, change
from shardspec.spec import Dim, Factor, Spec
from shardspec.stages import Claims

CUTS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_chunk"})
"""Operators that cut a dim into parts."""


def in_parts(issue: Issue, claims: Claims) -> Iterator[RuleEdit]:
    """A dim that is cut in parts as a group of them: `G@tp` in two is `(2 F@tp)`, in unequal ones a direct sum; of
    every parameter that the value comes from, a bias too."""
    node, axis = issue.typed.graph.nodes[issue.node], issue.refusal.axis
    shapes = [issue.typed.graph.values[index].shape for index in node.outputs if index is not None]
    if node.op not in CUTS:
        return
    at = int(named_arguments(node).get("dim") or 0)
    lengths = [shape[at] for shape in shapes]
    sources = {id(stop.entry): stop for stop in issue.trail if stop.source and stop.carries(axis)}
    packed = [
        (stop.entry, index, length)
        for stop in sources.values()
        if stop.entry is not None and stop.entry.rule.kind == "params" and isinstance(stop.entry.rule.value, str)
        for index, (dim, length) in enumerate(zip(stop.entry.spec.dims, stop.shape, strict=False))
        if axis in dim.all_axes and sum(lengths) and length % sum(lengths) == 0
    ]
    if not packed:
        return
    scale = packed[0][2] // sum(lengths)
    own = packed[0][0].spec.dims[packed[0][1]].factors[0].name
    for parts in _named_parts([one * scale for one in lengths], own, claims):
        edits = [change(entry, _with_parts(entry.spec, index, parts)) for entry, index, _ in packed]
        yield RuleEdit(
            "; ".join(edit.text for edit in edits),
            {pattern: value for edit in edits for pattern, value in edit.params.items()},
        )


def _with_parts(spec: Spec, index: int, parts: Sequence[tuple[Factor, ...]]) -> Spec:
    """The spec with a dim made of parts, each split as the dim was; what stored the dim stores the sum."""
    axes = spec.dims[index].all_axes
    compute = tuple(name for name in axes if name not in STORAGE_AXES)
    split = [(evolve(part[0], axes=compute), *part[1:]) for part in parts]
    alike = len(set(split)) == 1
    factors = (Factor("", len(split)), *split[0]) if alike else tuple(factor for part in split for factor in part)
    counts = () if alike else tuple(map(len, split))
    summed = Dim(factors, tuple(name for name in axes if name in STORAGE_AXES), grouped=True, counts=counts)
    return evolve(spec, dims=(*spec.dims[:index], summed, *spec.dims[index + 1 :]))


def _named_parts(lengths: Sequence[int], own: str, claims: Claims) -> Iterator[list[tuple[Factor, ...]]]:
    """Factors of the sizes of some parts, by names and groups that the table's parameters have; where none fits one
    length, it gets a name of its own."""
    known = claims.sizes.known
    dims = [dim for entry in claims.table.params for dim in entry.spec.dims if not dim.counts]
    groups = [tuple(factor.name for factor in dim.factors) for dim in dims]
    groups = [group for group in dict.fromkeys(groups) if group and all(name in known for name in group)]
    alone = [group for group in groups if len(group) == 1]
    heads = [group for group in groups if len(group) > 1]
    for order in (alone if len(set(lengths)) == 1 else heads, groups):
        fits = {length: next((g for g in order if prod(known[n] for n in g) == length), None) for length in lengths}
        minor = next((group[1:] for group in fits.values() if group is not None), ())
        if any(fits.values()) and sum(found is None for found in fits.values()) < 2:
            yield [tuple(map(Factor, fits[length] or (f"{own or 'part'}_", *minor))) for length in lengths]


def as_partners(stop: Stop, issue: Issue, axis: str) -> Iterator[RuleEdit]:
    """A dim as the direct sum that a partner's dim of its length is: the bias of a fused projection."""
    for partner in issue.trail:
        summed = (
            [dim for dim in partner.entry.spec.dims if dim.counts and axis in dim.all_axes] if partner.entry else []
        )
        for dim, length in itertools.product(summed, stop.shape):
            index = stop.shape.index(length)
            if stop.entry is not None and partner.source and length in partner.shape:
                spec = stop.entry.spec
                pending = tuple(name for name in spec.pending if name not in dim.all_axes)
                dims = (*spec.dims[:index], dim, *spec.dims[index + 1 :])
                yield change(stop.entry, evolve(spec, dims=dims, pending=pending))
