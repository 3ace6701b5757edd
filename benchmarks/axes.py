"""Parity of a dense model and of two families of experts with the plain program on all six axes, in float64.

    python -m benchmarks.axes [--out docs/axes_sweep.md] [MESH ...]

Every subset of up to three axes of dp, fsdp, ep, cp, tp and pp, each of size 2 (the dense Llama on those without ep),
and three meshes of four axes on 16 ranks; two microbatches, masked labels, with sequence parallelism over tp and
without. Status 1: a difference above the tolerance, or a rank that failed.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.grid import Grid, run_grid
from tests.distributed.mixtures import FAMILIES, MODELS, STEPS, Case, run_cases
from tests.distributed.parity import TOLERANCE

OUT = Path("docs/axes_sweep.md")
AXES = ("dp", "fsdp", "ep", "cp", "tp", "pp")
LARGE = ("dp=2,fsdp=2,ep=2,tp=2", "fsdp=2,ep=2,tp=2,pp=2", "dp=2,fsdp=2,ep=2,pp=2")
KINDS = ("loss", "grads", "losses", "norms", "params", "buffers")
HEAD = f"""# Parity on six axes

`make sweep` wrote this with torch {torch.__version__} on the CPU, in float64. Each row is a run against the plain
program on the same weights, batches and two microbatches: the largest absolute difference in the first loss and its
gradients, in the losses and gradient norms of {STEPS} AdamW steps with clipping, and in the parameters and the
selection biases after them. Attention over cp gathers its keys. A row fails above {TOLERANCE:g}.

| family | mesh | SP | {" | ".join(KINDS)} | |
|---|---|---|{"---|" * len(KINDS)}---|
"""


def meshes() -> Iterator[str]:
    """Every subset of up to three axes, then the large ones."""
    for count in range(4):
        for axes in itertools.combinations(AXES, count):
            yield ",".join(f"{axis}=2" for axis in axes)
    yield from LARGE


def cases_on(mesh: str) -> list[Case]:
    """All that a mesh is for; with and without sequence parallelism where there is a tp."""
    return [
        Case(family, mesh, sp=sp, microbatches=2)
        for family in (FAMILIES if "ep=" in mesh else MODELS)
        for sp in ((True, False) if "tp=" in mesh else (True,))
    ]


def main(argv: list[str] | None = None) -> int:
    return run_grid(
        Grid(head=HEAD, kinds=KINDS, cells=cells, run=run),
        argv,
        prog="benchmarks.axes",
        description=__doc__.split("\n", maxsplit=1)[0],
        out=OUT,
        meshes=meshes(),
        cases_on=cases_on,
    )


def run(cases: list[Case]) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case of a mesh with its largest differences, all in the same ranks."""
    yield from run_cases(cases, timeout=1200)


def cells(case: Case) -> list[str]:
    """What a row says of its case."""
    sp = {True: "yes", False: "no"}[case.sp] if "tp=" in case.mesh else ""
    return [case.family, case.mesh or "one rank", sp]


if __name__ == "__main__":
    sys.exit(main())
