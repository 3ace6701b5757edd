"""Compare shardspec with training steps written by hand, side by side in one run.

    python -m benchmarks.bench [--quick] [--json PATH] [--page]

Each plan's sides step in turn in the same ranks; the ratio is the median of the paired ones, with a
95 % bootstrap interval, against the faster hand-written form. A rank has one thread. A plan fails where
the whole interval lies above its budget, or its peak bytes above theirs. The check of a 405B model for
16,384 ranks is timed against a plain meta forward of it, and against the same model with 4 layers.
Status 1: something failed.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import attrs
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import shardspec as ss
from benchmarks.measure import CallCount, Ratio, Step, alternate, resident_bytes, transient_bytes
from benchmarks.page import write_section
from benchmarks.sides import CASES, ByHand, Case, Sharded, make_batch
from models.llama import PRESETS, RULES, LlamaConfig, build
from tests.distributed.harness import RankError, run_ranks

CHECK_MESH = {"fsdp": 2048, "tp": 8}
CHECK_BUDGETS = {"meta forward": 0.5, "4 layers": 1.5}
MEMORY_BUDGET = 1.0
PAGE = Path("docs/bench.md")
MIB = 1 << 20


@attrs.frozen(kw_only=True)
class Result:
    """What one plan's comparison found: side -> median seconds of a step, peak bytes of a rank; and paired ratios."""

    case: Case
    seconds: dict[str, float]
    bytes: dict[str, int]
    ratios: dict[str, Ratio]
    calls: dict[str, int]

    @property
    def best(self) -> str:
        """The faster of the hand-written forms."""
        return min(self.ratios, key=self.seconds.__getitem__)

    @property
    def memory(self) -> float:
        """Our peak bytes over that form's."""
        return self.bytes["shardspec"] / self.bytes[self.best]

    @property
    def failures(self) -> list[str]:
        found = ["time"] if self.ratios[self.best].exceeds(self.case.budget) else []
        return found + (["memory"] if round(self.memory, 2) > MEMORY_BUDGET else [])


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() and not options.page else 120, record=options.page)
    config = LlamaConfig(
        dim=options.dim,
        n_layers=options.layers,
        n_heads=8,
        n_kv_heads=4,
        ffn_dim=options.dim * 11 // 4,
        vocab_size=options.vocab,
        max_seq_len=options.seq,
    )
    report = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}, "cases": []}
    table, broken, failed = new_table(config, options), [], False
    for case in CASES:
        if options.cases and case.name not in options.cases:
            continue
        try:
            result = run_case(case, config, options)
        except RankError as error:
            broken.append((case.name, str(error)))
            continue
        add_row(table, result)
        failed |= bool(result.failures)
        figures = {"best": result.best, "memory": result.memory, "failed": result.failures}
        report["cases"].append(attrs.asdict(result) | figures)
    console.print(table)
    if not options.no_check:
        report["check"] = run_check(3 if options.quick else 7)
        failed |= print_check(console, report["check"])
    for name, error in broken:
        console.print(f"{name}: broken\n{error}", markup=False, highlight=False)
    report["broken"] = dict(broken)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.page:
        write_section(PAGE, "figures", f"```\n{console.export_text(styles=False).rstrip()}\n```\n")
    return int(failed or bool(broken))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--page", action="store_true", help=f"write the tables into {PAGE}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a result")
    parser.add_argument("--rounds", type=int, help="timed steps of each side (default 60, quick 12)")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each side that are not timed")
    parser.add_argument("--dim", type=int, default=256, help="width; 8 heads")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="global rows")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="some plans only")
    parser.add_argument("--no-check", action="store_true", help="leave out the check of the 405B model")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (12 if options.quick else 60)
    return options


def machine() -> dict[str, object]:
    return {"torch": torch.__version__, "cpus": os.cpu_count(), "platform": platform.platform()}


def run_case(case: Case, config: LlamaConfig, options: argparse.Namespace) -> Result:
    """Compare one plan's sides in ranks of their own."""
    found = run_ranks(
        case.world, measure_case, case, config, options.batch, options.rounds, options.warmup, timeout=1800
    )
    seconds, peaks, calls = found[0]
    ours = seconds["shardspec"]
    return Result(
        case=case,
        seconds={side: statistics.median(each) for side, each in seconds.items()},
        bytes={side: max(each[1][side] for each in found) for side in peaks},
        ratios={side: Ratio.of(ours, each) for side, each in seconds.items() if side != "shardspec"},
        calls=calls,
    )


def measure_case(
    _rank: int, _world: int, case: Case, config: LlamaConfig, rows: int, rounds: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Build the sides, check that they agree, and return step times, peak bytes and dispatched calls."""
    batch = make_batch(config, rows)
    with resident_bytes() as resident:
        ours = Sharded(config=config, case=case, batch=batch)
        weights = ours.whole()
        found = {"shardspec": two_steps(ours.step)}
        peaks = {"shardspec": resident() - sum(tensor.nbytes for tensor in weights.values())}
    sides = {"shardspec": ours.step}
    for form, side in case.by_hand.items():
        with resident_bytes() as resident:
            by_hand = ByHand(config=config, case=case, batch=batch, form=form, weights=weights)
            found[side] = two_steps(by_hand.step)
            peaks[side] = resident()
        sides[side] = by_hand.step
    if not all(np.allclose(values, found["shardspec"], rtol=1e-3) for values in found.values()):
        raise AssertionError(f"the sides do not compute the same loss and gradient norm: {found}")
    del weights, ours, by_hand
    seconds = alternate(sides, rounds, warmup)
    for side, step in sides.items():
        gc.collect()
        peaks[side] += transient_bytes(step)
    return seconds, peaks, {side: count_calls(step) for side, step in sides.items()}


def two_steps(step: Step) -> list[float]:
    """Return loss and gradient norm of two steps: the second tells whether the updates agree."""
    return [float(metrics[name]) for metrics in (step(), step()) for name in ("loss", "grad_norm")]


def count_calls(step: Step) -> int:
    """Return how many operators a step sends to the dispatcher."""
    with CallCount() as count:
        step()
    return sum(count.calls.values())


def new_table(config: LlamaConfig, options: argparse.Namespace) -> Table:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    title = f"a training step: {size / 1e6:.1f}M parameters, batch {options.batch} x {options.seq}"
    table = Table(title=f"{title}, {options.rounds} rounds")
    for column in ("plan", "side", "ms", "ratio", "95 %", "budget", "peak MiB", "ratio", "calls", ""):
        table.add_column(column, justify="left" if column in {"plan", "side", ""} else "right")
    return table


def add_row(table: Table, result: Result) -> None:
    """Add one line a side: ours first, each hand-written form with our ratio to it."""
    for index, side in enumerate(result.seconds):
        ratio = result.ratios.get(side)
        best = side == result.best
        table.add_row(
            result.case.name if index == 0 else "",
            side,
            f"{1e3 * result.seconds[side]:.1f}",
            f"{ratio.median:.3f}" if ratio else "",
            f"{ratio.low:.3f} - {ratio.high:.3f}" if ratio else "",
            f"{result.case.budget:.2f}" if best else "",
            f"{result.bytes[side] / MIB:.1f}",
            f"{result.memory:.2f}" if best else "",
            f"{result.calls[side]}",
            ("above: " + ", ".join(result.failures) if result.failures else "within") if best else "",
            end_section=index == len(result.seconds) - 1,
        )


def run_check(rounds: int) -> dict[str, object]:
    """Time the check of the 405B preset in fresh processes, in turn with what it is compared to."""
    measures = {"check": check_seconds, "meta forward": forward_seconds, "4 layers": check_small_seconds}
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            seconds[name] += run_ranks(1, lambda _rank, _world, measure=measure: measure(), timeout=600)
    ratios = {name: Ratio.of(seconds["check"], seconds[name]) for name in CHECK_BUDGETS}
    return {
        "mesh": CHECK_MESH,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratios": {name: attrs.asdict(ratio) for name, ratio in ratios.items()},
        "failed": [name for name, budget in CHECK_BUDGETS.items() if ratios[name].exceeds(budget)],
    }


def check_seconds(config: LlamaConfig = PRESETS["405b"]) -> float:
    """Return the seconds of one `ss.compile` for all ranks, the model being built already."""
    model, inputs = meta_model(config), meta_inputs()
    began = time.perf_counter()
    ss.compile(model, RULES, ss.Mesh(**CHECK_MESH), inputs)
    return time.perf_counter() - began


def check_small_seconds() -> float:
    return check_seconds(attrs.evolve(PRESETS["405b"], n_layers=4))


def forward_seconds() -> float:
    """Return the seconds of one plain forward on meta tensors."""
    model, tokens = meta_model(PRESETS["405b"]), meta_inputs()["tokens"]
    began = time.perf_counter()
    with torch.no_grad():
        model(tokens)
    return time.perf_counter() - began


def meta_model(config: LlamaConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config)


def meta_inputs() -> dict[str, torch.Tensor]:
    """Return one sequence of 8192 tokens for each fsdp rank."""
    return {
        name: torch.empty(CHECK_MESH["fsdp"], 8192, dtype=torch.long, device="meta") for name in ("tokens", "labels")
    }


def print_check(console: Console, check: dict) -> bool:
    """Print the check's times; return whether a ratio is above its budget."""
    table = Table(title="check of Llama 3.1 405B for 16,384 ranks: fsdp=2048,tp=8")
    for column in ("against", "s", "ratio", "95 %", "budget", ""):
        table.add_column(column, justify="left" if column in {"against", ""} else "right")
    table.add_row("(the check)", f"{check['seconds']['check']:.3f}", "", "", "", "")
    for name, budget in CHECK_BUDGETS.items():
        ratio = check["ratios"][name]
        table.add_row(
            name,
            f"{check['seconds'][name]:.3f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} - {ratio['high']:.3f}",
            f"{budget:.2f}",
            "above" if name in check["failed"] else "within",
        )
    console.print(table)
    return bool(check["failed"])


if __name__ == "__main__":
    sys.exit(main())
