"""The command line. A command is imported when it runs, so that `explain` need not wait for torch.

Results go to stdout, diagnostics to stderr. Status 0; 1 for a table that is refused; 2 for a line that cannot be run.
"""

import contextlib
import difflib
import errno
import importlib
import os
import sys
from typing import Any

import click

from shardspec.cli.options import color_option, paint
from shardspec.diagnostics import ShardingError

COMMANDS = {
    "check": ("shardspec.cli.commands", "Check a table against a model on a mesh."),
    "plan": ("shardspec.cli.commands", "Show what lies where and every collective of a step."),
    "legal": ("shardspec.cli.commands", "List the meshes of a world that pass the check, and what each costs."),
    "diff": ("shardspec.cli.diff", "Show what moves from one plan to another, and what it costs."),
    "explain": ("shardspec.cli.explain", "Say what a diagnostic's code means."),
}
"""Command -> the module that holds it, and what it is for."""


class Late(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            answer = super().invoke(ctx)
            sys.stdout.flush()
        except ShardingError as error:
            click.echo(paint(str(error).strip()), err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # a reader that left: click ends in silence
            forget_output()
            raise click.ClickException(f"the answer cannot be written: {error.strerror}") from None
        else:
            return answer


def forget_output() -> None:
    """Let what could not be written not be tried again when Python ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(name="shardspec", cls=Late, context_settings={"help_option_names": ["-h", "--help"]})
@color_option
def main() -> None:
    """Sharding tables for PyTorch models, checked before they run.

    \b
    shardspec check models.llama:RULES --model models.llama:405b \\
        --mesh fsdp=2048,tp=8 --batch 4096 --seq 8192
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
