"""The operator rules against brute force, at large: what docs/coverage.md says.

    python -m benchmarks.operators [--out docs/coverage.md] [--seeds 5] [--samples 5] [--trials 20000] [--jobs 2]

PyTorch's own `op_db`, its samples laid out in many ways; directed fuzz until so many trials were accepted; and the
wrong rules that are planted, with the oracles that catch them. Status 1: an acceptance that the ranks do not keep,
or a planted bug that nobody caught.
"""

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from shardspec.rules.operator import RULES
from tests.operators.cases import CASES
from tests.operators.coverage import ASKED, RUN, TYPED, Report, Row, aten_name, cover
from tests.operators.fuzz import Fuzz, fuzz
from tests.operators.planted import APART, PLANTED, Planted, by_dry_run, by_fuzz, by_op_db, by_program
from tests.operators.samples import op_db

OUT = Path("docs/coverage.md")
ORACLES = (by_fuzz, by_op_db, by_program, by_dry_run)
FUZZES = 8
"""Parts of the fuzz."""
FUZZ_START = 1000
"""The first seed of the first part, and how far the others are apart: those below are the test suite's."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.operators", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=5, help="draws of op_db's samples, their layouts and values")
    parser.add_argument("--samples", type=int, default=5, help="the most samples of an operator in one draw")
    parser.add_argument("--trials", type=int, default=20_000, help="fuzz until so many trials were accepted")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began, report = time.monotonic(), Report()
    draws = [(seed, options.samples) for seed in range(options.seeds)]
    fuzzes = [(-(-options.trials // FUZZES), FUZZ_START * (part + 1)) for part in range(FUZZES)]
    fuzzed = Fuzz()
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for seed, drawn in enumerate(pool.imap(draw, draws)):
            print(f"seed {seed}: {drawn.validated} validated, {len(drawn.wrong)} wrong", flush=True)
            report.add(drawn)
        for part in pool.starmap(fuzz, fuzzes, chunksize=1):
            fuzzed.add(part)
        print(f"fuzz: {fuzzed.total} accepted of {fuzzed.trials}, {len(fuzzed.wrong)} wrong", flush=True)
        caught = dict(zip(PLANTED, pool.map(oracles, range(len(PLANTED)), chunksize=1), strict=True))
    for wrong in (*report.wrong, *fuzzed.wrong):
        print(f"WRONG {wrong}")
    options.out.write_text(render(report, fuzzed, caught, options.seeds, options.samples))
    print(f"written: {options.out}, {time.monotonic() - began:.0f} s")
    missed = [bug.bug for bug, (one, two, *_) in caught.items() if not one or not two]
    return int(bool(report.wrong or fuzzed.wrong or missed))


def draw(options: tuple[int, int]) -> Report:
    """One draw of all of `op_db`: (seed, the most samples of an operator)."""
    report = Report()
    cover(op_db(), *options, report)
    return report


def oracles(bug: int) -> list[str]:
    """How each oracle sees a planted bug."""
    return [oracle(PLANTED[bug]) for oracle in ORACLES]


def render(report: Report, fuzzed: Fuzz, caught: dict[Planted, list[str]], seeds: int, samples: int) -> str:
    """The page."""
    return "\n".join([*_summary(report, seeds, samples), *_fuzz(fuzzed), *_planted(caught), *_tables(report)]) + "\n"


def _summary(report: Report, seeds: int, samples: int) -> list[str]:
    rows = {name: row for name, row in report.rows.items() if row.rule}
    over = sum(row.over for row in rows.values())
    some = sum(row.over > 0 for row in rows.values())
    met = sum(row.asked for row in rows.values())
    return [
        "# Operator rules against brute force",
        "",
        f"`make sweep` wrote this with torch {torch.__version__} on the CPU (`python -m benchmarks.operators`).",
        "",
        "## PyTorch's own samples",
        "",
        f"{seeds} draws of at most {samples} samples of each of `op_db`'s {len(op_db())} operators in float64, one in",
        "another dtype and two of its in-place form. Each is typed on choices of layouts on one axis (of 2, 3 or 5; at",
        f"most {TYPED} choices on each of two sizes): contiguous, strided and pending. Of those that are accepted",
        f"{RUN} are run on all ranks, values and gradients compared with the whole's, and as many that join two of",
        "them on two axes.",
        "",
        "| | |",
        "|---|---|",
        f"| `op_db` operators exercised | {len(report.names)} |",
        f"| of those, with a sample that calls an operator without a rule | {len(report.unruled)} |",
        f"| `op_db` operators of which nothing could be recorded | {len(set(report.skipped) - report.names)} |",
        f"| ATen operators exercised that have a rule | {len(rows)} |",
        f"| accepted at least once | {sum(row.accepted > 0 for row in rows.values())} |",
        f"| validated at least once | {sum(row.validated > 0 for row in rows.values())} |",
        f"| programs typed | {report.typed} |",
        f"| accepted | {report.accepted} |",
        f"| run on all ranks and validated | {report.validated} |",
        f"| **wrong** | **{len(report.wrong)}** |",
        f"| refused for their gradients alone (SS307) | {report.owing} |",
        f"| over-rejected samples, of {met}, at most | {over} (of {some} operators) |",
        "",
        "A sample is *over-rejected* for an operator where every layout of its operands was refused, although for one",
        f"of {ASKED} refusals some layout of the results was what the ranks compute. That is an upper bound:",
        "only forward is looked at, on one draw of values, and operands pending a maximum are left out. Most are 0-dim",
        "operands that are pending (a sign that agrees by chance), and weights of norms, in which a norm is linear.",
        "",
    ]


def _fuzz(fuzzed: Fuzz) -> list[str]:
    least = min(fuzzed.accepted, key=lambda name: fuzzed.accepted[name])
    return [
        "## Directed fuzz",
        "",
        f"{len(CASES)} cases, random shapes, meshes of up to 8 ranks and layouts that mostly agree: {fuzzed.trials}",
        f"trials, {fuzzed.total} accepted and run, values and gradients: **{len(fuzzed.wrong)} wrong**. The case that",
        f'is accepted least often is "{least}", {fuzzed.accepted[least]} times.',
        "",
    ]


def _planted(caught: dict[Planted, list[str]]) -> list[str]:
    said = {"": "not seen", APART: "not reached"}
    rows = [
        f"| {bug.bug} | `{aten_name(bug.target)}` | {' | '.join(said.get(found, found) for found in oracles)} |"
        for bug, oracles in caught.items()
    ]
    return [
        "## Planted rule bugs",
        "",
        "Each is a wrong rule in the right one's place. *values*: values or gradients differ; *raises*: torch refuses",
        "a rank's parts; *shapes*: the dry run's calls are not those that the types imply. The dry run compares shapes",
        "and arguments, never values: it is there for the model's mistakes, not for a rule's.",
        "",
        "| bug | operator | fuzz | `op_db` | a program on simulated ranks | dry run |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _tables(report: Report) -> list[str]:
    head = ["| operator | samples | tried | accepted | validated | over-rejected |", "|---|---|---|---|---|---|"]
    ruled = {name: report.rows.get(name, Row()) for name in map(aten_name, RULES)}
    tagged = {name: row for name, row in report.rows.items() if row.rule == "tag"}
    unruled = sorted((name, row) for name, row in report.rows.items() if not row.rule)
    sound = [f"`{name}` {row.over}/{row.asked}" for name, row in unruled if row.over]
    never = [f"`{name}`" for name, row in unruled if not row.over]
    return [
        "## Operators with a rule of their own",
        "",
        *head,
        *_rows(ruled),
        "",
        "## Pointwise operators, by torch's tag",
        "",
        *head,
        *_rows(tagged),
        "",
        "## Operators without a rule",
        "",
        "They pass where every operand is replicated, and are refused elsewhere. With the samples for which some",
        "layout was sound, of those that met the operator (an upper bound, as above):",
        "",
        ", ".join(sound) + ".",
        "",
        f"No layout was sound, or the samples met none: {', '.join(never)}.",
    ]


def _rows(rows: dict[str, Row]) -> Sequence[str]:
    def cells(row: Row) -> Iterable[str]:
        return map(str, (row.samples, row.tried, row.accepted, row.validated, f"{row.over}/{row.asked}"))

    return sorted(f"| `{name}` | {' | '.join(cells(row))} |" for name, row in rows.items())


if __name__ == "__main__":
    sys.exit(main())
