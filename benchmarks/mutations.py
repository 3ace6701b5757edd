"""Single edits of right tables, at large: each is refused, or computes what the plain program does.

    python -m benchmarks.mutations [--count 500] [--seed 0] [--out docs/mutations.md]

Random edits of the tables of Llama and GPT-2, half of them damaging by intent and half meant to keep the meaning,
each checked and, where it is accepted, run on a mesh in float64 beside the plain program: loss, every gradient, and
parameters after two AdamW steps. The fixes that a refusal proposes are applied, checked and run too. Status 1: an
edit that is neither refused nor in parity, a fix that does not pass, or too few accepted of those that keep the
meaning.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.mutation.fixes import mended
from tests.mutation.outcome import PARITY, REFUSED, TOLERANCE, Mutant, Outcome, check, draw, run
from tests.mutation.subjects import MESHES, SUBJECTS

OUT = Path("docs/mutations.md")
ACCEPTED = 0.98
INTENTS = ("damaging", "preserving")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.mutations", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=500, help="how many edits")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each seed draws others")
    parser.add_argument("--out", type=Path, default=OUT, help="where the counts go")
    options = parser.parse_args(argv)
    began = time.monotonic()
    found = judge(draw(options.count, options.seed))
    fixed = judge([mutant for outcome in found for _, mutant in mended(outcome)])
    text = render(found, fixed, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(f"{text}\n{time.monotonic() - began:.0f} s; written: {options.out}")
    return int(failures(found, fixed) > 0 or accepted(found) < ACCEPTED)


def judge(mutants: Sequence[Mutant]) -> list[Outcome]:
    """The outcome of each, told while it is found where it is a third one."""
    found: list[Outcome] = []
    passing: list[Mutant] = []
    for mutant in mutants:
        refusal = check(mutant)
        found += [refusal] if refusal else []
        passing += [] if refusal else [mutant]
    found += run(passing)
    for outcome in found:
        if outcome.third:
            print(outcome, flush=True)
    return found


def failures(found: Sequence[Outcome], fixed: Sequence[Outcome]) -> int:
    """Third outcomes, and fixes whose tables are anything but in parity."""
    return sum(outcome.third for outcome in found) + sum(outcome.verdict != PARITY for outcome in fixed)


def accepted(found: Sequence[Outcome]) -> float:
    """The share of the edits that keep the meaning which pass the check."""
    meant = [outcome for outcome in found if outcome.mutant.intent == "preserving"]
    return sum(outcome.verdict != REFUSED for outcome in meant) / max(1, len(meant))


def render(found: Sequence[Outcome], fixed: Sequence[Outcome], seed: int) -> str:
    """The page: counts by intent, by kind of edit, and by code."""
    lines = [
        "# Edited tables",
        "",
        f"`python -m benchmarks.mutations --count {len(found)} --seed {seed}` wrote this; torch {torch.__version__}.",
        "Random single edits of right tables, half of them damaging by intent, half meant to keep the meaning; each is",
        "checked, and run where it is accepted: float64, beside the plain program, the loss, every gradient, and",
        f"losses, norms and parameters of two AdamW steps within {TOLERANCE:g}.",
        "",
        f"Tables: {'; '.join(map(str, SUBJECTS))}. Meshes, in turn: {'; '.join(MESHES)}.",
        "",
        "| | edits | refused | in parity | third outcome |",
        "|---|---|---|---|---|",
    ]
    lines += [
        _row(f"meant as {intent}", [each for each in found if each.mutant.intent == intent]) for intent in INTENTS
    ]
    lines += [_row("fixes of refusals, applied", fixed), ""]
    lines += [
        f"Of those that keep the meaning, {accepted(found):.1%} are accepted.",
        "",
        "| edit | edits | refused | in parity | third outcome |",
        "|---|---|---|---|---|",
    ]
    for intent in INTENTS:
        for name in sorted({each.mutant.mutator for each in found if each.mutant.intent == intent}):
            same = [each for each in found if each.mutant.mutator == name]
            lines.append(_row(name.replace("_", " "), same))
    codes = Counter(code for each in found if each.verdict == REFUSED for code in each.detail.split())
    lines += ["", "| code | refusals that hold it |", "|---|---|"]
    lines += [f"| {code} | {count} |" for code, count in sorted(codes.items())]
    return "\n".join(lines) + "\n"


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    counts = Counter(outcome.verdict for outcome in outcomes)
    third = sum(outcome.third for outcome in outcomes)
    return f"| {name} | {len(outcomes)} | {counts[REFUSED]} | {counts[PARITY]} | {third} |"


if __name__ == "__main__":
    sys.exit(main())
