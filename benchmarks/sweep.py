"""Parity with the plain program on the whole grid of meshes and variants, in float64.

    python -m benchmarks.sweep [--out docs/sweep.md] [MESH ...]

Every mesh of up to 8 ranks over dp, fsdp and tp, with sequence parallelism and without, tied and untied
embeddings, one and two microbatches, with rematerialisation and without: the largest difference in loss,
gradients, norms and parameters after 5 AdamW steps. Status 1: a difference above the tolerance, or a rank
that failed.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from tests.distributed.harness import RankError
from tests.distributed.parity import STEPS, TOLERANCE, Case, all_meshes, run_cases

OUT = Path("docs/sweep.md")
KINDS = ("loss", "grads", "losses", "norms", "params")
HEAD = f"""# Parity sweep

`make sweep` wrote this with torch {torch.__version__} on the CPU, in float64. Each row is a run against the plain
program on the same weights and batches: the largest absolute difference in the first loss and its gradients, and in
the losses, gradient norms and parameters of {STEPS} AdamW steps with clipping. A row fails above {TOLERANCE:g}.

| mesh | SP | tied | microbatches | remat | {" | ".join(KINDS)} | |
|---|---|---|---|---|{"---|" * len(KINDS)}---|
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=None, help=f"where the table goes ({OUT} for the whole grid)")
    parser.add_argument("meshes", nargs="*", metavar="MESH", help='only these, as "fsdp=2,tp=2"')
    options = parser.parse_args(argv)
    rows, failed, began = [], 0, time.monotonic()
    for mesh in options.meshes or all_meshes():
        for case, found in run_mesh(mesh):
            wrong = not isinstance(found, dict) or not max(found.values()) <= TOLERANCE
            failed += wrong
            print(f"{'FAIL' if wrong else 'ok':4}  {case!s:55} {largest(found)}", flush=True)
            rows.append(render(case, found, wrong))
    seconds = time.monotonic() - began
    print(f"{len(rows)} cases, {failed} failed, {seconds:.0f} s")
    out = options.out or (None if options.meshes else OUT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"{HEAD}{''.join(rows)}\n{len(rows)} cases, {failed} failed.\n")
        print(f"written: {out}")
    return int(failed > 0)


def run_mesh(mesh: str) -> list[tuple[Case, dict[str, float] | str]]:
    """Every variant on one mesh; the message of what failed in a difference's place."""
    grid = itertools.product((True, False), (False, True), (1, 2), (False, True))
    cases = [Case(mesh, *variant) for variant in grid]
    try:
        return list(run_cases(cases))
    except RankError:
        return [(case, run_alone(case)) for case in cases]


def run_alone(case: Case) -> dict[str, float] | str:
    """One case in ranks of its own, so that its failure is its own."""
    try:
        return next(found for _, found in run_cases([case]))
    except RankError as error:
        return str(error).strip().splitlines()[-1]


def largest(found: dict[str, float] | str) -> str:
    return f"{max(found.values()):.1e}" if isinstance(found, dict) else found


def render(case: Case, found: dict[str, float] | str, wrong: bool) -> str:
    """A row of the table."""
    yes = {True: "yes", False: "no"}
    cells = [case.mesh or "one rank", yes[case.sp], yes[case.tied], str(case.accumulate), yes[case.remat]]
    cells += [f"{found[kind]:.1e}" for kind in KINDS] if isinstance(found, dict) else [found, *[""] * (len(KINDS) - 1)]
    return f"| {' | '.join(cells)} | {'**fails**' if wrong else ''} |\n"


if __name__ == "__main__":
    sys.exit(main())
