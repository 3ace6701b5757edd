"""A plan as a file, and two plans side by side."""

import json
from collections.abc import Iterator
from typing import Any

import cattrs
from attrs import fields

from shardspec.layout import Digit
from shardspec.mesh import Mesh
from shardspec.plan import Plan

VERSION = 1


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Digit, lambda value, _: value)
    converter.register_unstructure_hook(Mesh, lambda mesh: dict(mesh.shape))
    converter.register_structure_hook(Mesh, lambda shape, _: Mesh(**shape))
    return converter


CONVERTER = _converter()


def write_plan(plan: Plan) -> str:
    """The plan as JSON with a version; equal plans are equal texts."""
    kept: dict[str, Any] = {
        field.name: CONVERTER.unstructure(getattr(plan, field.name)) for field in fields(Plan) if field.name != "legal"
    }
    return json.dumps({"version": VERSION, **kept})


def read_plan(text: str) -> Plan:
    """Read what `write_plan` wrote.

    Raises:
        ValueError: for text that is no plan, or one of another version.
    """
    try:
        kept = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no plan: {error}") from error
    version = kept.pop("version", None) if isinstance(kept, dict) else None
    if version != VERSION:
        raise ValueError(f"the plan has version {version!r}, this shardspec reads version {VERSION}")
    try:
        return CONVERTER.structure({**kept, "legal": None}, Plan)
    except (cattrs.errors.BaseValidationError, KeyError, TypeError) as error:
        raise ValueError(f"the plan cannot be read: {'; '.join(cattrs.transform_error(error))}") from error


def difference(one: Plan, two: Plan) -> str:
    """What moved from one plan to another: parameters, activations, collectives and their bytes; "" where nothing."""
    return "\n".join(_lines(one, two))


def _lines(one: Plan, two: Plan) -> Iterator[str]:
    if one.mesh != two.mesh:
        yield f"mesh: {one.mesh or 'one rank'} -> {two.mesh or 'one rank'}"
    for kind, before, after in (
        ("parameter", one.params, two.params),
        ("activation", one.activations, two.activations),
    ):
        for name in sorted({*before, *after}):
            left, right = before.get(name), after.get(name)
            was = "absent" if left is None else _placed(left)
            now = "absent" if right is None else _placed(right)
            if was != now:
                yield f"{kind} {name}: {was} -> {now}"
    counts = [{(c.phase, c.kind, c.axes, c.where, c.bytes): c.count for c in plan.collectives} for plan in (one, two)]
    for key in sorted({*counts[0], *counts[1]}):
        was, now = counts[0].get(key, 0), counts[1].get(key, 0)
        if was != now:
            phase, kind, axes, where, size = key
            yield f"collective {phase} {kind} over {','.join(axes)} at {where}, {size} bytes each: {was} -> {now}"
    volumes = [sum(c.total_bytes for c in plan.collectives) for plan in (one, two)]
    if volumes[0] != volumes[1]:
        yield f"message bytes of a step: {volumes[0]} -> {volumes[1]} ({volumes[1] - volumes[0]:+})"


def _placed(item: Any) -> str:
    storage = getattr(item, "storage", ())
    stored = f" stored over {','.join(storage)} on dim {item.storage_dim}" if storage else ""
    return f"{item.layout}{stored}"
