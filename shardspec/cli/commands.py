"""`shardspec check`, `plan` and `legal`."""

from pathlib import Path
from typing import Any

import click
from attrs import evolve
from rich.text import Text

from shardspec.cli.emit import STAGES, emit
from shardspec.cli.options import Asked, mesh_option, model_options, policy_options
from shardspec.cli.target import load_rules, load_target
from shardspec.diagnostics import ShardingError
from shardspec.mesh import Mesh
from shardspec.plan import Plan
from shardspec.policy import Policy
from shardspec.report import as_text, new_table
from shardspec.summary import mesh_text, size_text, stored, volumes

MESH = "Sizes of the mesh's axes; one rank where it is not given."


@click.command()
@click.argument("table", metavar="MODULE:RULES")
@model_options(required=True)
@mesh_option(MESH)
@policy_options
def check(table: str, asked: Asked, mesh: Mesh, policy: dict[str, Any]) -> None:
    """Check a table against a model on a mesh.

    MODULE:RULES names the table, as models.llama:RULES. The model is built on meta; no device is touched.
    """
    rules = load_rules(table)
    chosen = Policy(**policy)
    plan = evolve(load_target(asked), policy=chosen).plan(rules, mesh)
    click.echo(f"{table} passes for {asked.model} on {mesh_text(plan)}")


@click.command()
@click.argument("table", metavar="MODULE:RULES")
@model_options(required=True)
@mesh_option(MESH)
@policy_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, for `diff` and ss.Plan.from_json.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan as a page with pictures.")
@click.option("--emit", "stage", type=click.Choice(STAGES), default="plan", help="Print what a stage makes.")
def plan(
    table: str, asked: Asked, mesh: Mesh, policy: dict[str, Any], as_json: bool, html: Path | None, stage: str
) -> None:
    """Show what lies where and every collective of a step.

    MODULE:RULES names the table, as models.llama:RULES. With --html nothing is printed but what --json or --emit asks
    for.
    """
    emitted = click.get_current_context().get_parameter_source("stage") is not click.core.ParameterSource.DEFAULT
    if as_json and emitted:
        raise click.UsageError("--json and --emit both print: give one of them")
    rules = load_rules(table)
    chosen = Policy(**policy)
    target = evolve(load_target(asked), policy=chosen)
    if stage != "plan":
        text, found = emit(stage, target, rules, mesh)
        click.echo(text)
        if found:
            target.plan(rules, mesh)  # raises the same, with the fixes that were tried
            raise ShardingError(found)
    if stage == "plan" or html:
        made = target.plan(rules, mesh)
        if html:
            _write(html, made.to_html())
        if as_json:
            click.echo(made.to_json())
        elif stage == "plan" and (emitted or not html):
            click.echo(str(made))


@click.command()
@click.argument("table", metavar="MODULE:RULES")
@click.option("--world", type=click.IntRange(min=1), required=True, help="How many ranks a mesh has.")
@model_options(required=True)
@mesh_option("A mesh of any size to set beside them.")
@policy_options
def legal(table: str, world: int, asked: Asked, mesh: Mesh, policy: dict[str, Any]) -> None:
    """List the meshes of --world ranks that pass the check, and what each costs.

    MODULE:RULES names the table, as models.llama:RULES.
    """
    rules = load_rules(table)
    target = evolve(load_target(asked), policy=Policy(**policy))
    compiler = target.compiler(rules)
    given = [compiler.plan(mesh, target.inputs, target.loss)] if mesh.world > 1 else []
    plans = list(compiler.legal_plans(world, target.inputs, target.loss))
    if not plans:
        compiler.plan(Mesh(), target.inputs, target.loss)  # raises where the table is refused on one rank too
    count = f"{len(plans)} mesh{'es' * (len(plans) != 1)}"
    click.echo(f"{count} of {world:,} rank{'s' * (world > 1)} pass{'es' * (len(plans) == 1)} for {asked.model}")
    if plans or given:
        click.echo(_costs(plans, given))


def _costs(plans: list[Plan], given: list[Plan]) -> str:
    axes = list(dict.fromkeys(name for plan in (*given, *plans) for name in volumes(plan)))
    title = "parameters on a rank, and bytes of the messages of a step"
    table = new_table(title, "mesh", "on a rank>", *(f"over {name}>" for name in axes), "all messages>", "")
    for plan in (*given, *plans):
        sizes = {name: sum(by_phase.values()) for name, by_phase in volumes(plan).items()}
        table.add_row(
            Text(str(plan.mesh) or "one rank"),
            size_text(stored(plan).bytes),
            *(size_text(sizes[name]) if sizes.get(name) else "" for name in axes),
            size_text(sum(sizes.values())),
            "given" if plan in given else "",
        )
    return as_text([table])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"--html {path}: {error.strerror}") from None
