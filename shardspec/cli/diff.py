"""`shardspec diff A B`: plans from files or from tables. Two files are compared without importing torch."""

import importlib
from pathlib import Path

import click

from shardspec.cli.options import Asked, MeshType, mesh_option, model_options
from shardspec.mesh import Mesh
from shardspec.plan import Plan


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@model_options(required=False)
@mesh_option("The mesh of a table that names none.")
def diff(before: str, after: str, asked: Asked | None, mesh: Mesh) -> None:
    """Show what moves from plan A to plan B, and what it costs.

    Each is a file that `plan --json` wrote, a table as MODULE:RULES, or a table on a mesh of its own as
    MODULE:RULES@fsdp=8,tp=2; tables need --model and the rest. Prints nothing for equal plans.
    """
    sides = [before, after]
    plans = {side: _read(Path(side)) for side in sides if is_file(side)}
    tables = [side for side in dict.fromkeys(sides) if side not in plans]
    if tables:
        if asked is None:
            raise click.UsageError(f"{tables[0]} is a table, or no file: a table needs --model")
        late = importlib.import_module("shardspec.cli.target")
        parts = [(side, *_table_and_mesh(side, mesh)) for side in tables]
        rules = {side: late.load_rules(reference) for side, reference, _ in parts}
        target = late.load_target(asked)
        plans |= {side: target.plan(rules[side], place) for side, _, place in parts}
    text = plans[before].diff(plans[after])
    if text:
        click.echo(text)


def is_file(side: str) -> bool:
    """Whether a side is meant as a file: it is one, or reads like one."""
    return Path(side).is_file() or side.endswith(".json") or ":" not in side


def _table_and_mesh(side: str, mesh: Mesh) -> tuple[str, Mesh]:
    reference, at, text = side.partition("@")
    return reference, MeshType().convert(text, None, click.get_current_context()) if at else mesh


def _read(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"{path}: this is no plan: it is not even text") from None
    except ValueError as error:
        raise click.UsageError(f"{path}: {error}") from None
