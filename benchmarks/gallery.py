"""Parity of every right table and model of the gallery, in float64, on its own mesh and on others.

    python -m benchmarks.gallery [--seed N] [VARIANT ...]

What the checker accepts is run by `shardspec.testing.assert_parity`; what it refuses on another mesh is counted.
Status 1: something that was accepted computes anything else than the plain program, or fell.
"""

import argparse
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

import shardspec as ss
from shardspec.testing import assert_parity
from tests.gallery.case import Case
from tests.gallery.right import VARIANTS

ROWS, SEQ, WORDS = 12, 16, 200
MESHES = ("dp=2", "fsdp=2", "tp=2", "fsdp=2,tp=2", "dp=2,tp=2", "fsdp=3")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gallery", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="only these")
    options = parser.parse_args(argv)
    began, counts = time.monotonic(), Counter[str]()
    for variant in VARIANTS:
        if options.variants and str(variant) not in options.variants:
            continue
        case = variant.make()
        for mesh in dict.fromkeys((case.mesh, *MESHES)):
            outcome = run(case, mesh, options.seed)
            kind = outcome.partition(":")[0]
            counts[kind] += 1
            if kind == "FAIL":
                print(f"{variant!s} on {mesh or 'one rank'}: {outcome}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f", {time.monotonic() - began:.0f} s")
    return int(counts["FAIL"] > 0)


def run(case: Case, mesh: str, seed: int) -> str:
    """ "parity", "refused", or "FAIL: " and why."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: shortened(name, item, generator) for name, item in case.inputs.items()}
    try:
        assert_parity(case.model, case.rules, ss.Mesh.parse(mesh), batch, case.loss, seed=seed)
    except ss.ShardingError:
        return "refused"
    except Exception as error:  # each outcome is counted
        return f"FAIL: {type(error).__name__}: {error}"
    return "parity"


def shortened(name: str, item: Any, generator: torch.Generator) -> Any:
    """A batch entry with fewer rows and positions and random words, the labels of some masked."""
    if not isinstance(item, Tensor) or item.is_floating_point():
        return item
    if item.ndim == 1:
        return item[:SEQ]
    words = torch.randint(0, WORDS, (ROWS, SEQ), generator=generator)
    masked = torch.rand(ROWS, SEQ, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
    return words.masked_fill(masked, -100) if name == "labels" else words


if __name__ == "__main__":
    sys.exit(main())
