"""Legal meshes by symbol against the concrete check, on every mesh of up to 64 ranks over dp, fsdp and tp.

    python -m benchmarks.legal [--world 64] [--out docs/legal.md]

By symbol: what the sizes of the axes must divide, as the plan of one mesh states it, decides every mesh with the
same axes larger than one. Concrete: the whole check of each mesh. `plan.legal_meshes` is compared too. Status 1: a
disagreement.
"""

import argparse
import sys
import time
from pathlib import Path

from tests.legal import FAMILIES, Agreement, agreement

OUT = Path("docs/legal.md")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.legal", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--world", type=int, default=64, help="the largest number of ranks")
    parser.add_argument("--out", type=Path, default=OUT, help="where the table goes")
    options = parser.parse_args(argv)
    began = time.monotonic()
    found: list[Agreement] = []
    for family in FAMILIES:
        found.append(agreement(family, range(1, options.world + 1)))
        print(row(found[-1]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(found, options.world))
    print(f"{time.monotonic() - began:.0f} s; written: {options.out}")
    return int(any(each.disagreements for each in found))


def render(found: list[Agreement], world: int) -> str:
    """The page."""
    head = [
        "# Legal meshes",
        "",
        f"`python -m benchmarks.legal --world {world}` wrote this. Every mesh of up to {world} ranks over dp, fsdp and",
        "tp, debug presets: what the plan of one mesh says by symbol of the others, and what `plan.legal_meshes`",
        "lists, against the whole check of each mesh.",
        "",
        "| table | batch | meshes | legal | disagreements | facts |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(row, found)]) + "\n"


def row(each: Agreement) -> str:
    facts = "; ".join(each.facts).replace("|", "\\|")
    wrong = ", ".join(each.disagreements) or "0"
    return f"| {each.family} | {each.family.rows} | {each.meshes} | {each.legal} | {wrong} | {facts} |"


if __name__ == "__main__":
    sys.exit(main())
