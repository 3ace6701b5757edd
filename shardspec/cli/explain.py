"""`shardspec explain SS301`. Imports no torch, so that it answers at once."""

import difflib

import click

from shardspec.catalog import CATALOG
from shardspec.cli.options import color_option


@click.command()
@click.argument("code", required=False)
@color_option
def explain(code: str | None) -> None:
    """Say what a diagnostic's CODE means and how to mend it; list all codes where none is given."""
    if code is None:
        for entry in CATALOG.values():
            click.echo(f"{entry.code}  {entry.title}")
        return
    wanted = code.upper().removeprefix("ERROR[").rstrip("]:")
    wanted = wanted if wanted.startswith("SS") else f"SS{wanted}"
    if wanted not in CATALOG:
        near = difflib.get_close_matches(wanted, CATALOG, n=3, cutoff=0.6)
        meant = f"; did you mean {' or '.join(near)}?" if near else "; `shardspec explain` lists them"
        raise click.UsageError(f"no code {code}{meant}")
    click.echo(str(CATALOG[wanted]))
