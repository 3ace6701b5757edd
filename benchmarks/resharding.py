"""Checkpoints of every mesh restored on every mesh, in float64.

    python -m benchmarks.resharding [--write]

Two models, six meshes, all 36 pairs of each: two steps of AdamW and a save on the one, a restore and ten steps on the
other. Parameters, buffers, moments, step and randomness must be bitwise the same, and the ten losses those of the run
that went on: to 1e-10, bitwise on the same mesh. Status 1: a pair that differs.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.page import write_section
from tests.distributed.lasting import MESHES, MODELS, Outcome, run_pairs

PAGE = Path("docs/checkpoints.md")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.resharding", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE}")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="resharding-") as root:
        for model in MODELS:
            for outcome in run_pairs(model, list(itertools.product(MESHES, MESHES)), Path(root)):
                print(f"{'FAIL' if outcome.fails else 'ok':4}  {outcome}", flush=True)
                outcomes.append(outcome)
    failed = sum(outcome.fails for outcome in outcomes)
    summary = f"{len(outcomes)} pairs, {failed} failed"
    print(summary)
    if options.write:
        tables = "\n".join(table(model, outcomes) for model in MODELS)
        write_section(PAGE, "pairs", f"{tables}\n{summary}; torch {torch.__version__}.\n")
    return int(failed > 0)


def table(model: str, outcomes: list[Outcome]) -> str:
    """A row for each mesh that saved, a column for each that restored."""
    found = {(one.saved, one.restored): cell(one) for one in outcomes if one.model == model}
    names = [mesh or "one rank" for mesh in MESHES]
    lines = [f"| {model}: saved on | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for saved, name in zip(MESHES, names, strict=True):
        lines.append(f"| {name} | {' | '.join(found[saved, restored] for restored in MESHES)} |")
    return "\n".join(lines) + "\n"


def cell(outcome: Outcome) -> str:
    """The largest difference of the ten losses, or what of the state differs."""
    if outcome.differ:
        return f"**{len(outcome.differ)} tensors differ**"
    text = f"{outcome.loss:.0e}" if outcome.loss else "0"
    return f"**{text}**" if outcome.fails else text


if __name__ == "__main__":
    sys.exit(main())
