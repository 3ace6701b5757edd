"""A plan as a file: what is written is read back the same, and nothing else is read."""

import json
from collections.abc import Callable
from typing import Any

import cattrs
from attrs import fields

from shardspec.amounts import PipelineUsage, Usage
from shardspec.diagnostics import ShardingError
from shardspec.layout import Digit, Sum
from shardspec.mesh import Mesh
from shardspec.plan import Plan

VERSION = 2

MOST_TOLD = 3
"""How much of what is wrong with a file is told."""

_NAMES = {field.name for field in fields(Plan)}


def _exact(kind: type) -> Callable[[Any, Any], Any]:
    """A reader of one kind of value that casts nothing."""

    def read(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{value!r} is no {kind.__name__}")
        return value

    return read


def _digit(value: Any, _: Any) -> Digit:
    if type(value) is dict and value.keys() == {"parts"} and all(type(part) is list for part in value["parts"]):
        parts = [tuple(_plain_digit(one) for one in part) for part in value["parts"]]
        if len(parts) > 1 and all(parts):
            return Sum(tuple(parts))
    return _plain_digit(value)


def _plain_digit(value: Any) -> int | str:
    if type(value) not in (int, str):
        raise ValueError(f"{value!r} is no digit of a layout")
    return value


def _mesh(shape: Any, _: Any) -> Mesh:
    try:
        return Mesh(**shape)
    except (ShardingError, TypeError) as error:
        raise ValueError(f"{shape!r} is no mesh: {str(error).strip()}") from error


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _exact(kind))
    converter.register_structure_hook(Digit, _digit)
    converter.register_unstructure_hook(Sum, lambda value: {"parts": [list(part) for part in value.parts]})
    converter.register_unstructure_hook(Mesh, lambda mesh: dict(mesh.shape))
    converter.register_structure_hook(Mesh, _mesh)
    return converter


CONVERTER = _converter()


def write_plan(plan: Plan, *, usage: bool = True) -> str:
    """The plan as JSON with a version; equal plans are equal texts.

    Args:
        usage: write what a step holds too, which is counted for that.
    """
    kept: dict[str, Any] = {
        field.name: CONVERTER.unstructure(getattr(plan, field.name))
        for field in fields(Plan)
        if field.name not in ("legal", "counted")
    }
    return json.dumps({"version": VERSION, **kept, "usage": CONVERTER.unstructure(plan.usage) if usage else None})


def read_plan(text: str) -> Plan:
    """Read what `write_plan` wrote.

    Raises:
        ValueError: for text that is no plan, one of another version, or one that holds what no plan does.
    """
    try:
        kept = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"this is no plan: {error}") from error
    version = kept.get("version") if isinstance(kept, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"the plan has version {version}, written by a newer shardspec; this one reads version {VERSION}"
        )
    if not isinstance(kept, dict) or "version" not in kept or not _NAMES & kept.keys():
        raise ValueError("this is no plan: a JSON object with a version, a mesh, params and the rest was expected")
    del kept["version"]
    if type(version) is not int or version != VERSION:
        raise ValueError(f"the plan has version {version!r}, this shardspec reads version {VERSION}")
    try:
        usage = kept["usage"]
        counted = None if usage is None else CONVERTER.structure(usage, PipelineUsage if "ranks" in usage else Usage)
        rest = {name: value for name, value in kept.items() if name != "usage"}
        plan = CONVERTER.structure({**rest, "legal": None, "counted": counted}, Plan)
    except (cattrs.errors.BaseValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        told = cattrs.transform_error(error, path="plan")
        raise ValueError(f"the plan cannot be read: {'; '.join(told[:MOST_TOLD])}") from error
    if json.loads(write_plan(plan)) != {"version": version, **kept}:
        raise ValueError("the plan cannot be read: it holds something of another kind than a plan does")
    return plan
