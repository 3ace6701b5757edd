"""Parity of many cases with the plain program, mesh by mesh: one row of a table for each."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from tests.distributed.harness import RankError
from tests.distributed.parity import TOLERANCE

Found = dict[str, float] | str
"""Kind -> the largest difference, or why a rank failed."""


@attrs.define(kw_only=True)
class Grid:
    """A table under way.

    `run` gives each of the cases of a mesh with what was found, all of them in the same ranks; `cells` are the first
    cells of a case's row, those that say which it is.
    """

    head: str
    kinds: tuple[str, ...]
    cells: Callable[[Any], list[str]]
    run: Callable[[list[Any]], Iterable[tuple[Any, dict[str, float]]]]
    rows: list[str] = attrs.field(factory=list)
    failed: int = 0
    began: float = attrs.field(factory=time.monotonic)

    def add(self, cases: list[Any]) -> None:
        """Run the cases of one mesh, and print and keep what was found."""
        for case, found in self._found(cases):
            wrong = isinstance(found, str) or not max(found.values()) <= TOLERANCE
            self.failed += wrong
            text = found if isinstance(found, str) else f"{max(found.values()):.1e}"
            print(f"{'FAIL' if wrong else 'ok':4}  {case!s:60} {text}", flush=True)
            self.rows.append(self._row(case, found, wrong=wrong))

    def _found(self, cases: list[Any]) -> Iterator[tuple[Any, Found]]:
        """Every case in the same ranks; each in ranks of its own where one of them fails."""
        try:
            yield from self.run(cases)
        except RankError as error:
            if len(cases) == 1:
                yield cases[0], str(error).strip().splitlines()[-1]
                return
            for case in cases:
                yield from self._found([case])

    def _row(self, case: Any, found: Found, *, wrong: bool) -> str:
        cells = self.cells(case)
        if isinstance(found, str):
            cells += [found, *[""] * (len(self.kinds) - 1)]
        else:
            cells += [f"{found[kind]:.1e}" for kind in self.kinds]
        return f"| {' | '.join(cells)} | {'**fails**' if wrong else ''} |\n"

    def say(self) -> None:
        """Print how far it has come."""
        print(f"{len(self.rows)} cases, {self.failed} failed, {time.monotonic() - self.began:.0f} s", flush=True)

    def page(self, where: str = "", rest: str = "") -> str:
        """The table so far with its head, and a line that counts: ` on 3 meshes` is a `where`."""
        return f"{self.head}{''.join(self.rows)}\n{len(self.rows)} cases{where}, {self.failed} failed.{rest}\n"


def run_grid(
    grid: Grid,
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    out: Path,
    meshes: Iterable[str],
    cases_on: Callable[[str], list[Any]],
) -> int:
    """The command `prog [--out PAGE] [MESH ...]`; status 1 where a row fails."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--out", type=Path, default=None, help=f"where the table goes ({out} for the whole grid)")
    parser.add_argument("meshes", nargs="*", metavar="MESH", help='only these, as "pp=2,tp=2"')
    options = parser.parse_args(argv)
    for mesh in options.meshes or meshes:
        grid.add(cases_on(mesh))
    grid.say()
    page = options.out or (None if options.meshes else out)
    if page is not None:
        page.write_text(grid.page())
        print(f"written: {page}")
    return int(grid.failed > 0)
