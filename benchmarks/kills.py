"""SIGKILL at random moments of runs that save after every step.

    python -m benchmarks.kills [--count 50] [--seed 0] [--write]

A run of one or two ranks steps and saves to one path, and goes on from there when it is started again. Every rank, or
one, is killed at a random moment. Then the path must restore, to a step that is not older than the last one whose save
had returned, with bitwise the values that the run had at that step. Status 1: a kill after which it does not.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

import shardspec as ss
from benchmarks.page import write_section
from shardspec.runtime.publish import previous, staging
from tests.distributed import lasting
from tests.distributed.harness import join_group

PAGE = Path("docs/checkpoints.md")
MESHES = ("fsdp=2", "", "tp=2")
LONGEST_S = 0.6
"""After the run's first save, how long a kill waits at most."""


@attrs.frozen
class Kill:
    """What one kill left behind."""

    mesh: str
    victims: str
    moment: str
    """Where the save was when it came."""
    acknowledged: int
    """The step of the last save that had returned."""
    restored: int
    """The step that was restored; -1 where nothing was."""
    problem: str = ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"put the count into {PAGE}")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        found = []
        for kill in run_kills(options.count, options.seed, Path(root)):
            print(kill, flush=True)
            found.append(kill)
    failed = sum(bool(kill.problem) for kill in found)
    moments = {moment: sum(kill.moment == moment for kill in found) for moment in MOMENTS}
    parts = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    text = f"{len(found)} kills ({parts}): {len(found) - failed} left the latest complete checkpoint, {failed} did not."
    print(text)
    if options.write:
        write_section(PAGE, "kills", f"{text}\n")
    return int(failed > 0)


MOMENTS = ("during a step", "while files were written", "between the two renames", "while the old one was removed")


def run_kills(count: int, seed: int, root: Path) -> Iterator[Kill]:
    """So many kills of runs that go on from one another's checkpoints: a run and a path for each mesh."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    one = lasting.shard("mixed", "")
    for index in range(count):
        mesh = MESHES[index % len(MESHES)]
        folder = root / (mesh or "one") / "last"
        world = ss.Mesh.parse(mesh).world
        victims = list(range(world)) if rng.random() < 0.7 else [rng.randrange(world)]
        yield run_and_kill(mesh, folder, victims, rng.random() * LONGEST_S, one)


def run_and_kill(mesh: str, folder: Path, victims: list[int], delay: float, one: ss.Sharded) -> Kill:
    """One run, killed `delay` seconds after its first save, and what its path restores to."""
    world = ss.Mesh.parse(mesh).world
    log = folder.parent / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = len(read_log(log))
    with tempfile.TemporaryDirectory(prefix="store-") as store:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=train, args=(rank, world, mesh, folder, log, Path(store) / "store"), daemon=True)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        until = time.monotonic() + 60
        while not any("saved" in line for line in read_log(log)[before:]) and time.monotonic() < until:
            time.sleep(0.005)
        assert any("saved" in line for line in read_log(log)[before:]), (
            f"no save: {log.with_suffix('.err').read_text()}"
        )
        time.sleep(delay)
        for victim in victims:
            os.kill(ranks[victim].pid or 0, signal.SIGKILL)
        for victim in victims:
            ranks[victim].join()
        time.sleep(0.05 if len(victims) < world else 0)  # what the others do with a lost peer is part of it
        for rank in ranks:
            rank.kill()
            rank.join()
    lines = read_log(log)
    acknowledged = max((line["saved"] for line in lines if "saved" in line), default=-1)
    digests = {line["saving"]: line["digest"] for line in lines if "saving" in line}
    who = "all ranks" if len(victims) == world else f"rank {victims[0]}"
    moment = MOMENTS[0]
    if previous(folder).exists():
        moment = MOMENTS[3] if folder.exists() else MOMENTS[2]
    elif staging(folder).exists():
        moment = MOMENTS[1]
    try:
        state = ss.restore(one, folder)
    except ss.ShardingError as error:
        return Kill(mesh, who, moment, acknowledged, -1, str(error).strip())
    problem = ""
    if state.step < acknowledged:
        problem = "an older step than one that was saved"
    elif digest(state) != digests.get(state.step):
        problem = "other values than the run had at that step"
    return Kill(mesh, who, moment, acknowledged, state.step, problem)


def train(rank: int, world: int, mesh: str, folder: Path, log: Path, store: Path) -> None:
    """Go on from the checkpoint, or begin; save after every step, for ever.

    Rank 0 says what it saves, and what it has saved.
    """
    torch.set_num_threads(1)
    with log.with_suffix(".err").open("a") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    if world > 1:
        join_group(rank, world, store, 60)
    sharded = lasting.shard("mixed", mesh)
    optimizer = ss.adamw(**lasting.OPTIMIZER)
    going_on = bool(read_log(log)) and any("saved" in line for line in read_log(log))
    state = ss.restore(sharded, folder) if going_on else sharded.init(optimizer, seed=5)
    with log.open("a", buffering=1) as file:
        while True:
            state, _ = lasting.go_on(sharded, state, 1)
            values = digest(state)
            if rank == 0:
                file.write(json.dumps({"saving": state.step, "digest": values}) + "\n")
            ss.save(state, folder)
            if rank == 0:
                file.write(json.dumps({"saved": state.step}) + "\n")


def read_log(log: Path) -> list[dict]:
    """What was said; the last line may be cut."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]


def digest(state: ss.TrainState) -> str:
    """A sum over every tensor of a state, put together; all ranks call it."""
    found = hashlib.blake2b(f"{state.step} {state.rng}".encode(), digest_size=16)
    for name, tensor in lasting.whole(state).items():
        found.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
