"""Attention over a split sequence: parity on a grid, work by rank, bytes on the wire, memory as cp grows.

    python -m benchmarks.context [--ranks 8] [--few] [--out docs/context_sweep.md] [MESH ...]

The grid: each strategy, head and tail and in order, causal, full and with documents, 1, 2 and 8 key-value heads, on
every mesh of up to 8 ranks with cp of 2 or 4 and at most one other axis. Status 1: a difference above the tolerance, a
rank that failed, or a message that the plan does not have.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

import shardspec as ss
from benchmarks.grid import Grid
from benchmarks.measure import own_bytes
from models.llama import PRESETS, RULES, build
from shardspec.policy import STRATEGIES
from shardspec.runtime import context
from tests import reader
from tests.distributed.context import STEPS, TOLERANCE, Case, compare
from tests.distributed.harness import CollectiveLog, run_ranks

OUT = Path("docs/context_sweep.md")
KINDS = ("loss", "grads", "losses", "params")
KV_HEADS = (1, 2, 8)
LONG = 2048
HEAD = f"""# Attention over a split sequence, measured

`python -m benchmarks.context` wrote this with torch {torch.__version__} on the CPU and gloo.
"""
GRID = f"""
## Parity

Float64, against the plain program on the same weights and batches: the largest absolute difference in the first loss
and its gradients, in the losses of {STEPS} AdamW steps and of an evaluation before each, and in the parameters after
them. A row fails above {TOLERANCE:g}.

| mesh | strategy | attention | order | key-value heads | {" | ".join(KINDS)} | |
|---|---|---|---|---|{"---|" * len(KINDS)}---|
"""


def meshes(ranks: int) -> Iterator[str]:
    """cp of 2 or 4, alone or with one other axis of 2 or 4."""
    for cp in (2, 4):
        yield f"cp={cp}"
    for cp, size, axis in itertools.product((2, 4), (2, 4), ("dp", "fsdp", "tp", "pp")):
        if cp * size <= ranks:
            yield f"cp={cp},tp={size}" if axis == "tp" else f"{axis}={size},cp={cp}"


def cases_on(mesh: str, *, few: bool) -> Iterator[Case]:
    """What can be run there; of `few`, with 8 key-value heads and head and tail alone."""
    sizes = ss.Mesh.parse(mesh)
    heads, orders = ((8,), (True,)) if few else (KV_HEADS, (True, False))
    for strategy, kind, kv_heads, balance in itertools.product(
        STRATEGIES, ("causal", "full", "documents"), heads, orders
    ):
        held = kv_heads / sizes["tp"]
        exchanged = strategy != "ulysses" or held % sizes["cp"] == 0
        if held >= 1 and exchanged and (strategy, kind) != ("ring", "documents"):
            yield Case(mesh, strategy, kind, balance=balance, kv_heads=kv_heads)


def run(cases: list[Case]) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case of a mesh with its largest differences, all in the same ranks."""

    def on_rank(_rank: int, _world: int) -> list[dict[str, float]]:
        return [compare(case) for case in cases]

    yield from zip(cases, run_ranks(cases[0].world, on_rank, timeout=3000)[0], strict=True)


def cells(case: Case) -> list[str]:
    """What a row of the table of parity says of its case."""
    order = "head and tail" if case.balance else "in order"
    return [case.mesh, case.strategy, case.kind, order, str(case.kv_heads)]


def parity(chosen: list[str], *, few: bool) -> Iterator[tuple[str, int]]:
    """The table of parity as far as it has come, and how many rows of it fail; once for each mesh."""
    grid = Grid(head=GRID, kinds=KINDS, cells=cells, run=run)
    for done, mesh in enumerate(chosen, 1):
        grid.add(list(cases_on(mesh, few=few)))
        grid.say()
        left = f" Not run: {', '.join(chosen[done:])}." if done < len(chosen) else ""
        yield grid.page(where=f" on {done} meshes", rest=left), grid.failed


def count_scores(_rank: int, _world: int, case: Case) -> int:
    """The scores of one head and one row of a batch that this rank computes in a forward."""
    sharded, counted = case.shard(), Counter()
    plain = context.attend

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float):
        rows, columns = q.shape[-2], k.shape[-2]
        counted["scores"] += rows * (rows + 1) // 2 if causal else rows * columns
        return plain(q, k, v, causal=causal, scale=scale)

    state, evaluate = sharded.init(ss.sgd(lr=0.1)), ss.eval_step(sharded, reader.loss_fn)
    context.attend = attend
    evaluate(state, sharded.local_batch(case.batch()))
    return counted["scores"] // 2  # two layers


def work() -> str:
    """Scores by rank, counted in runs."""
    lines = [
        "\n## Work by rank\n",
        "Scores of a causal head over 16 positions that each rank computes, counted in a run.\n",
    ]
    lines += ["| cp | strategy | order | scores by rank | most / mean |", "|---|---|---|---|---|"]
    for cp, strategy, balance in itertools.product((2, 4), ("allgather", "ring"), (False, True)):
        case = Case(f"cp={cp}", strategy, balance=balance)
        found = run_ranks(cp, count_scores, case)
        order = "head and tail" if balance else "in order"
        most = max(found) * cp / sum(found)
        lines.append(f"| {cp} | {strategy} | {order} | {', '.join(map(str, found))} | {most:.2f} |")
    return "\n".join(lines) + "\n"


def logged(_rank: int, _world: int, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """Kind -> bytes of attention's messages: by the plan, and of all messages that ran beside the step's own."""
    sharded = case.shard()
    state, batch = sharded.init(ss.sgd(lr=0.1)), sharded.local_batch(case.batch())
    step = ss.train_step(sharded, reader.loss_fn)
    state, _ = step(state, batch)
    with CollectiveLog() as log:
        step(state, batch)
    plan = sharded.program(batch, reader.loss_fn)
    planned: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for row in plan.collectives:
        kind = "all_to_all" if row.kind == "send_recv" else row.kind
        (planned if row.why.startswith("attention by") else others)[kind] += row.total_bytes
    ran: Counter[str] = Counter()
    for call in log.collectives:
        ran[call.kind] += call.bytes
    ran.subtract(others)
    return dict(planned), {kind: count for kind, count in ran.items() if count}


def formula(case: Case) -> dict[str, int]:
    """The same by hand, for two layers: k bytes of a rank's keys and as many of values, q of queries and of results."""
    cp, rows, length, width, size, layers = ss.Mesh.parse(case.mesh)["cp"], 8, 16, 4, 8, 2
    k = rows * case.kv_heads * (length // cp) * width * size
    q = rows * 8 * (length // cp) * width * size
    if case.strategy == "ring":
        return {"all_to_all": layers * (cp - 1) * 6 * k}
    if case.strategy == "ulysses":
        return {"all_to_all": layers * 4 * (q + k)}
    return {"all_gather": layers * 4 * cp * k, "reduce_scatter": layers * 2 * cp * k}


def wire() -> tuple[str, int]:
    """Messages of attention in a step by strategy: formula, plan, and what ran; how many rows disagree."""
    lines = ["\n## Bytes on the wire\n"]
    lines.append(
        "Bytes of attention's messages in a step of two layers, float64: by the formulas of docs/context.md, by the\n"
        "plan, and counted in a run. What the ring sends is counted as the exchange that carries it.\n"
    )
    lines += ["| cp | key-value heads | strategy | formula | plan | ran | |", "|---|---|---|---|---|---|---|"]
    failed = 0
    for cp, kv, strategy in itertools.product((2, 4), (2, 8), STRATEGIES):
        case = Case(f"cp={cp}", strategy, kv_heads=kv)
        if strategy == "ulysses" and kv % cp:
            continue
        told = [formula(case), *run_ranks(cp, logged, case)[0]]
        wrong = any(each != told[0] for each in told)
        failed += wrong
        shown = [", ".join(f"{kind} {count:,}" for kind, count in sorted(each.items())) for each in told]
        lines.append(f"| {cp} | {kv} | {strategy} | {' | '.join(shown)} | {'**differs**' if wrong else ''} |")
    return "\n".join(lines) + "\n", failed


def peak(_rank: int, _world: int, strategy: str) -> tuple[int, int, int]:
    """The most bytes that a step adds on this rank, by the plan, and the plan's activations."""
    torch.set_num_threads(1)
    config = attrs.evolve(PRESETS["debug"], n_layers=2, max_seq_len=LONG)
    whole = {name: torch.zeros(1, LONG, dtype=torch.long) for name in ("tokens", "labels")}
    whole["positions"] = torch.arange(LONG)
    policy, mesh = ss.Policy(attention=strategy), ss.Mesh(cp=_world)
    sharded = ss.shard(lambda: build(config), RULES, mesh, whole, policy=policy)
    state, step = sharded.init(ss.sgd(lr=1e-3), seed=0), ss.train_step(sharded, reader.loss_fn)
    part = sharded.local_batch(whole)

    def once() -> None:
        nonlocal state
        state, _ = step(state, part)

    once()
    once()
    at = sharded.program(part, reader.loss_fn).memory(optimizer="sgd").at(mesh)
    return own_bytes(once, 3), at.total - at.resident, at["activations"]


def memory(ranks: int) -> str:
    """Bytes of a step as cp grows, at one sequence."""
    lines = ["\n## Memory as cp grows\n"]
    lines.append(
        f"The debug Llama with 2 layers, one row of {LONG} tokens, float32: the most bytes that a step adds on the\n"
        "rank that holds the most, measured (without gloo's own copies) and by the plan; and the plan's activations.\n"
    )
    lines += [
        "| strategy | cp | peak MB | plan MB | error | activations MB | falls by |",
        "|---|---|---|---|---|---|---|",
    ]
    for strategy in STRATEGIES:
        first = 0
        for cp in (1, 2, 4, 8):
            if cp > ranks or (strategy == "ulysses" and cp > 4):
                continue  # the debug preset has four key-value heads
            found = run_ranks(cp, peak, strategy, timeout=900)
            most, planned, kept = max(each[0] for each in found), found[0][1], found[0][2]
            first = first or most
            cells = [f"{most / 1e6:.2f}", f"{planned / 1e6:.2f}", f"{100 * (planned / most - 1):+.1f} %"]
            lines.append(f"| {strategy} | {cp} | {' | '.join(cells)} | {kept / 1e6:.2f} | {first / most:.2f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the grid and the tables; only the grid where meshes are named."""
    parser = argparse.ArgumentParser(prog="benchmarks.context", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=None, help=f"where the tables go ({OUT} for all of them)")
    parser.add_argument("--ranks", type=int, default=8, help="of the largest mesh")
    parser.add_argument("--few", action="store_true", help="8 key-value heads, head and tail alone")
    parser.add_argument(
        "meshes", nargs="*", metavar="MESH", help='only these, as "cp=2,tp=2", without the other tables'
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = options.out or (None if options.meshes else OUT)
    tables, wrong, failures = "", 0, 0
    if not options.meshes:
        tables, wrong = wire()
        tables = work() + tables + memory(options.ranks)
    for page, failed in parity(options.meshes or list(meshes(options.ranks)), few=options.few):
        failures = failed
        if out is not None:
            out.write_text(HEAD + tables + page)
    return int(failures + wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
