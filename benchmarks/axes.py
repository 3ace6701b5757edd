"""Parity of a dense model and of two families of experts with the plain program on all six axes, in float64.

    python -m benchmarks.axes [--out docs/axes_sweep.md] [MESH ...]

Every subset of up to three axes of dp, fsdp, ep, cp, tp and pp, each of size 2 (the dense Llama on those without ep),
and three meshes of four axes on 16 ranks; two microbatches, masked labels, with sequence parallelism over tp and
without. Status 1: a difference above the tolerance, or a rank that failed.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.distributed.harness import RankError
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
    parser = argparse.ArgumentParser(prog="benchmarks.axes", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=None, help=f"where the table goes ({OUT} for the whole grid)")
    parser.add_argument("meshes", nargs="*", metavar="MESH", help='only these, as "ep=2,tp=2"')
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
    try:
        yield from run_cases(cases, timeout=1200)
    except RankError as error:
        if len(cases) == 1:
            yield cases[0], str(error).strip().splitlines()[-1]
            return
        for case in cases:
            yield from run_mesh([case])


def render(case: Case, found: dict[str, float] | str, wrong: bool) -> str:
    """A row of the table."""
    cells = [case.family, case.mesh or "one rank", {True: "yes", False: "no"}[case.sp] if "tp=" in case.mesh else ""]
    cells += [found, *[""] * (len(KINDS) - 1)] if isinstance(found, str) else [f"{found[kind]:.1e}" for kind in KINDS]
    return f"| {' | '.join(cells)} | {'**fails**' if wrong else ''} |\n"


if __name__ == "__main__":
    sys.exit(main())
