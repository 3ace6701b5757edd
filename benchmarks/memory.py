"""`plan.memory` against what a rank holds: resident bytes, and the peak of a step.

    python -m benchmarks.memory [--out docs/memory.md] [CASE ...]

Each case runs a few training steps on ranks of this machine and reads the allocator's account. Status 1: a peak that is
more than 5 % off, or resident bytes more than 0.1 %.
"""

import argparse
import re
import sys
from pathlib import Path

import attrs
import torch

import shardspec as ss
from benchmarks.measure import own_bytes, resident_bytes, transient_bytes
from benchmarks.sides import loss_fn, make_batch
from models.llama import PRESETS, RULES, WITHOUT_SP, LlamaConfig, build
from tests.distributed.harness import run_ranks

OUT = Path("docs/memory.md")
WITHIN = 0.05
RESIDENT_WITHIN = 0.001
BLOCKS = r"layers\.\d+"
COLUMNS = (
    *("model", "mesh", "policy", "rows x tokens", "resident MB", "formula", "error"),
    *("peak MB", "formula", "error", "fullest", "peak with gloo's copies MB"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"
RULE = f"|{'---|' * 4}{'---:|' * 6}---|---:|"

CONFIGS = {
    "debug": attrs.evolve(PRESETS["debug"], max_seq_len=128),
    # 97,009,280 parameters
    "97M": LlamaConfig(dim=640, n_layers=12, n_heads=8, n_kv_heads=4, ffn_dim=1792, vocab_size=32000, max_seq_len=256),
}


@attrs.frozen(kw_only=True)
class Case:
    """A run to measure; `mesh` as the command line writes it."""

    model: str = "debug"
    mesh: str = ""
    rows: int = 8
    sp: bool = True
    remat: bool = False
    accumulate: int = 1
    bf16: bool = False
    prefetch: int | None = None
    schedule: str = "1F1B"
    microbatches: int | None = None
    """Of a pipeline."""

    @property
    def policy(self) -> ss.Policy:
        return ss.Policy(
            schedule=self.schedule,
            microbatches=self.microbatches,
            remat=BLOCKS if self.remat else False,
            accumulate=self.accumulate,
            param_dtype=torch.bfloat16 if self.bf16 else None,
            reduce_dtype=torch.float32 if self.bf16 else None,
            prefetch=self.prefetch,
        )

    def __str__(self) -> str:
        words = [self.model, self.mesh or "one rank", *self.words]
        return " ".join(words)

    @property
    def words(self) -> list[str]:
        """What its policy is, and how it differs from the table."""
        named = {
            f"{self.schedule}, {self.microbatches} microbatches": self.microbatches is not None,
            "no SP": not self.sp,
            "remat": self.remat,
            f"accumulate {self.accumulate}": self.accumulate > 1,
            "bf16": self.bf16,
            f"prefetch {self.prefetch}": self.prefetch is not None,
        }
        return [word for word, holds in named.items() if holds]


CASES = (
    Case(),
    Case(mesh="tp=2", sp=False),
    Case(mesh="tp=2"),
    Case(mesh="fsdp=2"),
    Case(mesh="dp=2"),
    Case(mesh="fsdp=2,tp=2"),
    Case(mesh="dp=2,fsdp=2"),
    Case(mesh="fsdp=2", remat=True),
    Case(mesh="fsdp=2,tp=2", accumulate=2),
    Case(mesh="fsdp=2", bf16=True),
    Case(mesh="fsdp=2", prefetch=2),
    Case(mesh="pp=2", microbatches=4),
    Case(mesh="pp=2", schedule="GPipe", microbatches=4),
    Case(mesh="pp=2", schedule="InterleavedZeroBubble", microbatches=4),
    Case(mesh="pp=2,fsdp=2", microbatches=4),
    Case(mesh="pp=2,fsdp=2", microbatches=4, remat=True),
    Case(mesh="pp=2,fsdp=2", schedule="ZBVZeroBubble", microbatches=4),
    Case(mesh="pp=2,tp=2", schedule="Interleaved1F1B", microbatches=4),
    Case(mesh="pp=2,tp=2", schedule="ZBVZeroBubble", microbatches=4),
    Case(model="97M", rows=2),
    Case(model="97M", mesh="dp=2", rows=2),
    Case(model="97M", mesh="fsdp=2", rows=2, remat=True),
    Case(model="97M", mesh="fsdp=2,tp=2", rows=4),
)


@attrs.frozen(kw_only=True)
class Found:
    """Bytes of the rank that holds the most: measured, and by the plan's formulas."""

    resident: int
    peak: int
    peak_with_backend: int
    resident_formula: int
    peak_formula: int
    phase: str
    ranks: tuple[tuple[int, int, int], ...]
    """By rank: its place on pp, and what it held between steps and at its peak."""

    @property
    def resident_error(self) -> float:
        return self.resident_formula / self.resident - 1

    @property
    def error(self) -> float:
        return self.peak_formula / self.peak - 1

    @property
    def wrong(self) -> bool:
        return abs(self.error) > WITHIN or abs(self.resident_error) > RESIDENT_WITHIN


def measure(case: Case, repeats: int = 3) -> Found:
    """Run a case on ranks of its own."""
    mesh = ss.Mesh.parse(case.mesh)
    ranks = run_ranks(mesh.world, measure_rank, case, repeats, timeout=600)
    at = ranks[0][3]
    return Found(
        ranks=tuple((mesh.coordinate(rank)["pp"], each[0], each[0] + each[1]) for rank, each in enumerate(ranks)),
        resident=max(each[0] for each in ranks),
        peak=max(each[0] + each[1] for each in ranks),
        peak_with_backend=max(each[0] + each[2] for each in ranks),
        resident_formula=at[0],
        peak_formula=at[1],
        phase=at[2],
    )


def measure_rank(_rank: int, _world: int, case: Case, repeats: int) -> tuple[int, int, int, tuple[int, int, str]]:
    """Bytes that lie on this rank between steps, what a step adds at most, without what gloo allocates and with it, and
    the plan's resident, total and phase."""
    torch.set_num_threads(1)
    config, mesh = CONFIGS[case.model], ss.Mesh.parse(case.mesh)
    whole = make_batch(config, case.rows)
    with resident_bytes() as resident:
        sharded = ss.shard(lambda: build(config), RULES if case.sp else WITHOUT_SP, mesh, whole, policy=case.policy)
        state = sharded.init(ss.adamw(lr=1e-3), seed=0)
        train = ss.train_step(sharded, loss_fn, clip=1.0)
        part = {name: item.clone() for name, item in sharded.local_batch(whole).items()}

        def step() -> dict[str, torch.Tensor]:
            nonlocal state
            state, metrics = train(state, part)
            return metrics

        for _ in range(2):
            step()
        held = resident()
    at = sharded.program(part, loss_fn).memory(optimizer="adamw").at(mesh)
    return held, own_bytes(step, repeats), transient_bytes(step, repeats), (at.resident, at.total, at.phase)


def row(case: Case, found: Found) -> str:
    """A line of the table."""
    cells = [
        case.model,
        case.mesh or "one rank",
        ", ".join(case.words),
        f"{case.rows} x {CONFIGS[case.model].max_seq_len}",
        f"{found.resident / 1e6:.2f}",
        f"{found.resident_formula / 1e6:.2f}",
        f"{100 * found.resident_error:+.2f} %",
        f"{found.peak / 1e6:.2f}",
        f"{found.peak_formula / 1e6:.2f}",
        f"{100 * found.error:+.2f} %",
        found.phase,
        f"{found.peak_with_backend / 1e6:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=None, help=f"the page whose table is written ({OUT} for all cases)")
    parser.add_argument("cases", nargs="*", metavar="CASE", help='only these, by their names: "debug fsdp=2 remat"')
    options = parser.parse_args(argv)
    chosen = [case for case in CASES if not options.cases or str(case) in options.cases]
    lines, wrong = [HEAD, RULE], 0
    for case in chosen:
        # What a backend lets go of late differs more between steps with many ranks on few cores.
        found = measure(case, repeats=12 if case.microbatches else 3)
        wrong += found.wrong
        lines.append(row(case, found))
        print(f"{'FAIL' if found.wrong else 'ok':4}  {lines[-1]}", flush=True)
    out = options.out or (None if options.cases else OUT)
    if out is not None:
        out.write_text(with_table(out.read_text(), lines))
    return int(wrong > 0)


def with_table(page: str, lines: list[str]) -> str:
    """A page with another table between its two marks."""
    table = "\n".join(["<!-- table -->", f"torch {torch.__version__}, CPU and gloo:", "", *lines, "<!-- end -->"])
    return re.sub(r"<!-- table -->.*<!-- end -->", lambda _: table, page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
