"""What the commands share: the colour of messages, and the options that name a table, a model, a mesh and a batch."""

import functools
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import click
from attrs import frozen

from shardspec.diagnostics import ShardingError
from shardspec.mesh import Mesh

STYLES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"error\[SS\d{3}\]", {"fg": "red", "bold": True}),
    (r"  -->", {"fg": "blue", "bold": True}),
    (r"   = (?:why|matches)\b", {"fg": "blue"}),
    (r"   = fix:", {"fg": "green", "bold": True}),
    (r"   = help:", {"fg": "cyan"}),
)
"""The beginnings of a diagnostic's lines, and how each is shown."""


def paint(text: str) -> str:
    """Diagnostics in colour; click takes the colour off again where the stream is no terminal."""
    for begin, style in STYLES:
        text = re.sub(f"^{begin}", partial(_styled, style), text, flags=re.MULTILINE)
    return text


def _styled(style: dict[str, Any], match: re.Match[str]) -> str:
    return click.style(match.group(), **style)


def _choose_color(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value == "auto" and os.environ.get("NO_COLOR"):
        value = "never"
    if value in ("always", "never"):
        ctx.color = ctx.find_root().color = value == "always"


color_option = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Colour of diagnostics; auto is on a terminal only.",
    callback=_choose_color,
    expose_value=False,
)


class MeshType(click.ParamType[Mesh]):
    """`fsdp=2048,tp=8`; the empty text is one rank."""

    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mesh:
        if isinstance(value, Mesh):
            return value
        try:
            return Mesh.parse(value)
        except ShardingError as error:
            first = error.diagnostics[0]
            self.fail("; ".join(filter(None, (first.what, first.why, *first.advice))), param, ctx)


@frozen
class Asked:
    """What is compiled for which batch, in the words of a command line."""

    model: str
    batch: int | None
    seq: int | None
    inputs: str | None
    loss: str | None


def model_options(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that say what is compiled for which batch: a command gets them as `asked`, None without a model."""
    options = (
        click.option("--model", required=required, metavar="MODULE:NAME", help="A preset, a module or its builder."),
        click.option("--batch", type=click.IntRange(min=1), help="Rows of the global batch."),
        click.option("--seq", type=click.IntRange(min=1), help="Tokens in a row."),
        click.option("--inputs", metavar="MODULE:NAME", help="A function that makes the batch (default: the model's)."),
        click.option("--loss", metavar="MODULE:NAME", help="A loss(output, batch), to be checked with the model."),
        color_option,
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(
            *, model: str | None, batch: int | None, seq: int | None, inputs: str | None, loss: str | None, **rest: Any
        ) -> Any:
            return function(asked=None if model is None else Asked(model, batch, seq, inputs, loss), **rest)

        for option in reversed(options):
            run = option(run)
        return run

    return add


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--schedule`, `--microbatches` and `--attention`: a command gets them as `policy`, arguments of `ss.Policy`."""

    @functools.wraps(function)
    def run(*, schedule: str, microbatches: int | None, attention: str, **rest: Any) -> Any:
        policy = {"schedule": schedule, "microbatches": microbatches, "attention": attention}
        return function(policy=policy, **rest)

    schedule = click.option("--schedule", default="1F1B", metavar="NAME", help="Of a pipeline, by torch's name.")
    count = click.option("--microbatches", type=click.IntRange(min=1), help="Of a step (default: one for each stage).")
    attention = click.option(
        "--attention",
        default="allgather",
        metavar="NAME",
        help="Over a sequence split over cp: allgather, ring, ulysses.",
    )
    return schedule(count(attention(run)))


def mesh_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--mesh`."""
    return click.option("--mesh", type=MeshType(), default="", metavar="AXIS=SIZE,...", help=text)
