"""Parity of pipelines with the plain program on the whole grid of meshes and schedules, in float64.

    python -m benchmarks.pipelines [--out docs/pipeline_sweep.md] [MESH ...]

Every mesh of up to 8 ranks with pp of 2 or 4 and dp, fsdp and tp; each of torch's schedules; with sequence
parallelism and without, tied and untied embeddings; masked labels. Status 1: a difference above the tolerance, or a
rank that failed.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from shardspec.schedule import SCHEDULES
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.parity import STEPS, TOLERANCE
from tests.distributed.test_pipeline import Case, run_case

OUT = Path("docs/pipeline_sweep.md")
KINDS = ("loss", "grads", "losses", "norms", "params", "evaluated")
HEAD = f"""# Parity of pipelines

`make sweep` wrote this with torch {torch.__version__} on the CPU, in float64. Each row is a run against the plain
program on the same weights and batches, {2 * 2} or {2 * 4} layers and as many microbatches: the largest absolute
difference in the first loss and its gradients, in the losses, gradient norms and parameters of {STEPS} AdamW steps
with clipping, and in the losses of an evaluation before each. A row fails above {TOLERANCE:g}.

| mesh | schedule | SP | tied | {" | ".join(KINDS)} | |
|---|---|---|---|{"---|" * len(KINDS)}---|
"""


def meshes() -> Iterator[str]:
    """Every mesh of up to 8 ranks with a pipeline."""
    for pp in (2, 4):
        for dp, fsdp, tp in itertools.product((1, 2, 4), repeat=3):
            if pp * dp * fsdp * tp <= 8:
                sizes = {"dp": dp, "pp": pp, "fsdp": fsdp, "tp": tp}
                yield ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def cases_on(mesh: str) -> list[Case]:
    pp = 4 if "pp=4" in mesh else 2
    return [
        Case(mesh, schedule, tied, sp, microbatches=2 * pp, layers=2 * pp)
        for schedule in SCHEDULES
        for sp in ((True, False) if "tp=" in mesh else (True,))
        for tied in (False, True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.pipelines", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=None, help=f"where the table goes ({OUT} for the whole grid)")
    parser.add_argument("meshes", nargs="*", metavar="MESH", help='only these, as "pp=2,tp=2"')
    options = parser.parse_args(argv)
    rows, failed, began = [], 0, time.monotonic()
    for mesh in options.meshes or meshes():
        for case, found in run_mesh(cases_on(mesh)):
            wrong = isinstance(found, str) or not max(found.values()) <= TOLERANCE
            failed += wrong
            text = found if isinstance(found, str) else f"{max(found.values()):.1e}"
            print(f"{'FAIL' if wrong else 'ok':4}  {case!s:50} {text}", flush=True)
            rows.append(render(case, found, wrong))
    print(f"{len(rows)} cases, {failed} failed, {time.monotonic() - began:.0f} s")
    out = options.out or (None if options.meshes else OUT)
    if out is not None:
        out.write_text(f"{HEAD}{''.join(rows)}\n{len(rows)} cases, {failed} failed.\n")
        print(f"written: {out}")
    return int(failed > 0)


def run_mesh(cases: list[Case]) -> Iterator[tuple[Case, dict[str, float] | str]]:
    """Every case of one mesh in the same ranks; each in ranks of its own where one of them fails."""

    def run(_rank: int, _world: int, these: list[Case]) -> list[dict[str, float]]:
        return [run_case(case) for case in these]

    try:
        yield from zip(cases, run_ranks(cases[0].world, run, cases, timeout=1200)[0], strict=True)
    except RankError as error:
        if len(cases) == 1:
            yield cases[0], str(error).strip().splitlines()[-1]
            return
        for case in cases:
            yield from run_mesh([case])


def render(case: Case, found: dict[str, float] | str, wrong: bool) -> str:
    """A row of the table."""
    yes = {True: "yes", False: "no"}
    cells = [case.mesh, case.schedule, yes[case.sp] if "tp=" in case.mesh else "", yes[case.tied]]
    cells += [found, *[""] * (len(KINDS) - 1)] if isinstance(found, str) else [f"{found[kind]:.1e}" for kind in KINDS]
    return f"| {' | '.join(cells)} | {'**fails**' if wrong else ''} |\n"


if __name__ == "__main__":
    sys.exit(main())
