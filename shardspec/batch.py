"""A batch before it runs: what decides its program, its entries' layouts, its microbatches."""

import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardspec.diagnostics import Diagnostic, Location, refuse, shorten
from shardspec.lower import entry_plan
from shardspec.mesh import BATCH_AXES, Mesh, degree
from shardspec.plan import ActivationPlan
from shardspec.rules.fit import check_rank, dims_of, layout_of
from shardspec.rules.match import assign
from shardspec.rules.parse import Table
from shardspec.spec import Dim
from shardspec.survey import Survey
from shardspec.tracing import HostRead
from shardspec.twin import required_arguments

Batch = Mapping[str, Any]


class LocalBatch(dict[str, Any]):
    """A rank's part of a global batch; `balanced` where its sequence lies head and tail over cp."""

    balanced: bool = False


def check_order(batch: Batch, *, balanced: bool) -> None:
    """SS411 for a batch whose sequence is in another order than a program reads it in: no shape would tell."""
    if getattr(batch, "balanced", False) != balanced:
        order = "head and tail, two chunks on each rank" if balanced else "in order, one run on each rank"
        other = "in order" if balanced else "head and tail"
        refuse(
            "SS411",
            f"the batch is not as local_batch cuts it: its sequence is taken to lie {other} over cp",
            why=f"the plan lays the sequence {order}: attention masks by the place in the whole, and labels and "
            "positions must lie as tokens do",
            advice=(
                "hand on what sharded.local_batch(batch) returns, as it is: it cuts every entry by its rule",
                "where a loader reads its own consecutive part, leave the sequence in order: ss.Policy(balance=False)",
            )
            if balanced
            else ("hand on what sharded.local_batch(batch) of the same sharded model returns",),
        )


def batch_key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a batch decides its program: names, shapes, dtypes, and what is no tensor."""
    return tuple(
        (name, tuple(item.shape), item.dtype) if isinstance(item, torch.Tensor) else (name, repr(item))
        for name, item in inputs.items()
    )


def describe(batch: Mapping[str, Any]) -> str:
    """A batch's names, shapes and dtypes, in words."""
    said = (
        f"{name} {tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}"
        if isinstance(item, torch.Tensor)
        else f"{name}={item!r}"
        for name, item in batch.items()
    )
    return f"a batch of {', '.join(said)}"


def check_inputs(inputs: Mapping[str, Any], names: Survey) -> None:
    """SS401 for a batch that forward cannot be called with."""
    missing = [name for name in required_arguments(names.model) if name not in inputs]
    if missing:
        refuse(
            "SS401",
            f"the batch has no entry {missing[0]}, which forward needs",
            why=f"forward takes ({', '.join(names.arguments)}); the batch has ({', '.join(inputs)})",
        )


def host_read(error: HostRead) -> Diagnostic:
    """SS313 for Python that depends on a tensor's value; SS318 and SS319 for what the walk cannot follow."""
    return Diagnostic(
        code=error.code,
        what=str(error),
        why=error.why,
        locations=(
            Location(file=shorten(error.file), line=error.line, text=linecache.getline(error.file, error.line).strip()),
        ),
        advice=(error.advice,),
    )


def entry_plans(
    table: Table, known: Mapping[str, int], mesh: Mesh, batch: Batch
) -> tuple[dict[str, ActivationPlan], list[Diagnostic]]:
    """The plans of a global batch's entries; SS202 for one that no rule claims, SS205 and SS301 for one that does
    not fit."""
    shapes = {name: tuple(item.shape) for name, item in batch.items() if isinstance(item, torch.Tensor)}
    claimed, found = assign(
        table.activations, shapes, what=lambda _: "batch entry", alive=lambda _: True, place=table.rules.location
    )
    plans: dict[str, ActivationPlan] = {}
    for name, entry in claimed.items():
        problem = check_rank(entry, name, shapes[name])
        if problem is None:
            layout, _, problem = layout_of(entry, name, shapes[name], known, mesh, storage=False)
            plans[name] = entry_plan(name, entry, layout, str(batch[name].dtype))
        found += [problem] if problem else []
    return plans, found


def global_shapes(table: Table, mesh: Mesh, batch: Batch) -> dict[str, Any]:
    """The whole batch that a local one is a part of, on meta."""

    def whole(name: str, shape: Sequence[int], dims: Sequence[Dim]) -> list[int]:
        del name
        return [length * degree(mesh, dim.all_axes) for length, dim in zip(shape, dims, strict=True)]

    return _reshaped(table, batch, whole)


def microbatch_shapes(table: Table, mesh: Mesh, batch: Batch, count: int) -> dict[str, Any]:
    """One of `count` microbatches of a global batch, on meta.

    Raises:
        ShardingError: SS301 where the rows cannot be cut so.
    """

    def part(name: str, shape: Sequence[int], dims: Sequence[Dim]) -> list[int]:
        cut = list(shape)
        at = next((i for i, dim in enumerate(dims) if any(axis in BATCH_AXES for axis in dim.all_axes)), None)
        if at is not None:
            check_rows(cut[at], count, degree(mesh, dims[at].all_axes), name)
            cut[at] //= count
        return cut

    return dict(batch) if count == 1 else _reshaped(table, batch, part)


def _reshaped(
    table: Table, batch: Batch, change: Callable[[str, Sequence[int], Sequence[Dim]], list[int]]
) -> dict[str, Any]:
    """A batch on meta with other shapes, by each entry's name, shape and dims; what no rule fits stays as it is."""
    changed: dict[str, Any] = {}
    for name, item in batch.items():
        entry = next((entry for entry in table.activations if entry.regex.fullmatch(name)), None)
        if not isinstance(item, torch.Tensor) or entry is None or len(entry.spec.dims) > item.ndim:
            changed[name] = item
            continue
        shape = change(name, item.shape, dims_of(entry.spec, item.ndim))
        changed[name] = torch.empty(shape, dtype=item.dtype, device="meta")
    return changed


def check_rows(rows: int, count: int, share: int, name: str) -> None:
    """SS301 for rows that microbatches and data ranks do not divide."""
    if rows % (count * share):
        refuse(
            "SS301",
            f"{name}: {rows} rows cannot be cut into {count} microbatches on this mesh",
            why=f"{count} microbatches x {share} data ranks = {count * share}, which does not divide {rows}",
        )
