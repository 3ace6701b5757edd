"""Parity of pipelines with the plain program on the whole grid of meshes and schedules, in float64.

    python -m benchmarks.pipelines [--out docs/pipeline_sweep.md] [MESH ...]

Every mesh of up to 8 ranks with pp of 2 or 4 and dp, fsdp and tp; each of torch's schedules; with sequence
parallelism and without, tied and untied embeddings; masked labels. Status 1: a difference above the tolerance, or a
rank that failed.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.grid import Grid, run_grid
from shardspec.schedule import SCHEDULES
from tests.distributed.harness import run_ranks
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
    return run_grid(
        Grid(head=HEAD, kinds=KINDS, cells=cells, run=run),
        argv,
        prog="benchmarks.pipelines",
        description=__doc__.split("\n", maxsplit=1)[0],
        out=OUT,
        meshes=meshes(),
        cases_on=cases_on,
    )


def run(cases: list[Case]) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case of a mesh with its largest differences, all in the same ranks."""

    def on_rank(_rank: int, _world: int) -> list[dict[str, float]]:
        return [run_case(case) for case in cases]

    yield from zip(cases, run_ranks(cases[0].world, on_rank, timeout=1200)[0], strict=True)


def cells(case: Case) -> list[str]:
    """What a row says of its case."""
    yes = {True: "yes", False: "no"}
    return [case.mesh, case.schedule, yes[case.sp] if "tp=" in case.mesh else "", yes[case.tied]]


if __name__ == "__main__":
    sys.exit(main())
