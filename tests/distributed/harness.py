"""Run a function on several ranks of this machine, and log the collectives that it makes."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import attrs
import torch
import torch._dynamo  # so that a forked rank does not import it again: it takes seconds
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

FORK = multiprocessing.get_context("fork")
GRACE_S = 0.3  # how long other ranks may report an earlier failure after the first one heard of
LOST_PEER = re.compile(r"gloo/transport/tcp/|Connection (closed|reset) by peer|Broken pipe")


class RankError(AssertionError):
    """A rank failed; the message holds its traceback. `rank` is None where ranks were out of time."""

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


@attrs.frozen(kw_only=True)
class Failure:
    """What one rank said, or left, when it failed; `at` is on the clock that all processes share."""

    rank: int
    at: float
    text: str

    @property
    def lost_peer(self) -> bool:
        """Whether it only says that another rank went away."""
        return LOST_PEER.search(self.text) is not None


def run_ranks(world: int, function: Callable[..., Any], *args: object, timeout: float = 120) -> list[Any]:
    """Run `function(rank, world, *args)` on forked ranks with a gloo group; return what each returned.

    One rank runs in a process of its own too, without a process group. `timeout` is in seconds, for
    all of it. Raises `RankError` with the traceback of the rank that failed first, or with every
    rank's stack where time is up. `function` may be a closure: only results are pickled.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [Rank.start(rank, world, function, args, Path(folder), timeout) for rank in range(world)]
        try:
            return gather(ranks, time.monotonic() + timeout, timeout)
        finally:
            for rank in ranks:
                rank.stop()


@attrs.frozen(kw_only=True)
class Rank:
    """The parent's view of one forked process."""

    index: int
    process: BaseProcess
    pipe: Connection
    stacks: Path

    @classmethod
    def start(
        cls, rank: int, world: int, function: Callable[..., Any], args: tuple, folder: Path, timeout: float
    ) -> Self:
        here, there = FORK.Pipe()
        stacks = folder / f"stacks-{rank}"
        process = FORK.Process(
            target=rank_main,
            args=(rank, world, function, args, there, folder / "store", stacks, timeout),
            daemon=True,
        )
        process.start()
        there.close()
        return cls(index=rank, process=process, pipe=here, stacks=stacks)

    def read_stacks(self) -> str:
        return self.stacks.read_text() if self.stacks.exists() else ""

    def report(self) -> Any:
        """Return what the process reported, or a `Failure` that tells how it ended without a word."""
        if self.pipe.poll():
            with contextlib.suppress(EOFError):
                return pickle.loads(self.pipe.recv_bytes())
        self.process.join()
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Failure(rank=self.index, at=time.monotonic(), text=f"died: {how}\n{self.read_stacks()}")

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


def gather(ranks: list[Rank], deadline: float, timeout: float) -> list[Any]:
    """Collect one result a rank, let them all exit, and raise for what went wrong."""
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    for rank, report in reports(ranks, deadline):
        if isinstance(report, Failure):
            failures.append(report)
            break
        results[rank.index] = report
    if failures:
        rest = [rank for rank in ranks if rank.index not in {*results, failures[0].rank}]
        later = reports(rest, min(deadline, time.monotonic() + GRACE_S))
        failures += [report for _, report in later if isinstance(report, Failure)]
        first = min(failures, key=lambda failure: (failure.lost_peer, failure.at))
        raise RankError(f"rank {first.rank} of {len(ranks)} failed first:\n{first.text}", first.rank)
    if late := [rank for rank in ranks if rank.index not in results]:
        raise RankError(f"{names(late)} not done after {timeout:g} s\n{dump_stacks(late)}", None)
    for rank in ranks:  # only now: a rank that leaves early cuts off those still at work
        rank.pipe.send_bytes(b"leave")
    for rank in ranks:
        rank.process.join(10)
        if rank.process.exitcode != 0:
            raise RankError(f"rank {rank.index} did not leave after its result\n{dump_stacks([rank])}", rank.index)
    return [results[index] for index in range(len(ranks))]


def reports(ranks: list[Rank], deadline: float) -> Iterator[tuple[Rank, Any]]:
    """Yield each rank's result or `Failure` as it comes, until all have reported or time is up."""
    waiting = list(ranks)
    while waiting:
        sources = {rank.pipe: rank for rank in waiting} | {rank.process.sentinel: rank for rank in waiting}
        ready = wait(list(sources), max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for rank in {sources[source].index: sources[source] for source in ready}.values():
            waiting.remove(rank)
            yield rank, rank.report()


def dump_stacks(ranks: list[Rank]) -> str:
    """Ask the ranks that still live for their Python stacks."""
    for rank in ranks:
        if rank.process.is_alive():
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(GRACE_S)
    return "\n".join(f"-- rank {rank.index}\n{rank.read_stacks()}" for rank in ranks)


def names(ranks: list[Rank]) -> str:
    return ", ".join(f"rank {rank.index}" for rank in ranks)


def rank_main(
    rank: int,
    world: int,
    function: Callable[..., Any],
    args: tuple,
    pipe: Connection,
    store: Path,
    stacks: Path,
    timeout: float,
) -> None:
    """Be one rank: set up, run, report, and stay until all have reported."""
    with stacks.open("w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        torch.set_num_threads(1)  # more would hang: OpenMP's threads do not survive a fork
        try:
            if world > 1:
                join_group(rank, world, store, timeout)
            report = pickle.dumps(function(rank, world, *args))
        except BaseException:  # KeyboardInterrupt and SystemExit are failures here too
            failure = Failure(rank=rank, at=time.monotonic(), text=traceback.format_exc())
            report = pickle.dumps(failure)
        pipe.send_bytes(report)
        with contextlib.suppress(EOFError):
            pipe.recv_bytes()
        faulthandler.disable()


def join_group(rank: int, world: int, store: Path, timeout: float) -> None:
    """Make the default gloo group, and the environment that torchrun makes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout + 10),  # ours comes first, and shows the stacks
    )


@attrs.frozen
class Collective:
    """One call: its kind, the global ranks of its group, and the message's length.

    `bytes` is the whole gathered output of an all-gather, the whole input of a reduce-scatter, and
    the tensor of any other kind; a coalesced call is one with the sum.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


# op -> (kind, the argument that is the message); `None` is the result
C10D_OPS = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "allgather_": ("all_gather", "output_tensors"),
    "allgather_coalesced_": ("all_gather", "output_lists"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "alltoall_base_": ("all_to_all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "gather_": ("gather", "input_tensors"),
    "scatter_": ("scatter", "output_tensors"),
    "send": ("send", "tensors"),
    "recv_": ("recv", "tensors"),
    "recv_any_source_": ("recv", "tensors"),
}
FUNCTIONAL_OPS = {
    "all_reduce": ("all_reduce", "input"),
    "all_reduce_": ("all_reduce", "input"),
    "all_reduce_coalesced": ("all_reduce", "inputs"),
    "all_reduce_coalesced_": ("all_reduce", "inputs"),
    "all_gather_into_tensor": ("all_gather", None),
    "all_gather_into_tensor_out": ("all_gather", None),
    "all_gather_into_tensor_coalesced": ("all_gather", None),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "all_to_all_single": ("all_to_all", "input"),
    "broadcast": ("broadcast", "input"),
    "broadcast_": ("broadcast", "input"),
}
OPS = {"c10d": C10D_OPS, "_c10d_functional": FUNCTIONAL_OPS}
NO_MESSAGE = {"barrier", "monitored_barrier_", "check_for_nan", "wait_tensor", "_wrap_tensor_autograd"}


class CollectiveLog(TorchDispatchMode):
    """Records every collective of this rank while it is active, forward, backward and step alike.

    It sees what reaches the dispatcher: `torch.distributed` calls, functional collectives, DTensor's
    and FSDP2's. Backward too on CPU, where autograd runs in the thread that calls it. A collective
    that it has no entry for is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def totals(self) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
        """Return (kind, ranks) -> (count, bytes)."""
        count = Counter((call.kind, call.ranks) for call in self.collectives)
        return {
            key: (times, sum(call.bytes for call in self.collectives if (call.kind, call.ranks) == key))
            for key, times in count.items()
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # DTensor first: what it does comes here again, on local tensors
        result = func(*args, **(kwargs or {}))
        if func.namespace in OPS and func._opname not in NO_MESSAGE:
            self.collectives.append(describe(func, args, kwargs or {}, result))
        return result


def describe(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any], result: object) -> Collective:
    """Read kind, ranks and bytes off one call of a collective operator."""
    entry = OPS[func.namespace].get(func._opname)
    if entry is None:
        raise NotImplementedError(f"CollectiveLog has no entry for {func}")
    kind, message = entry
    given = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | kwargs
    group = given["process_group"] if func.namespace == "c10d" else given["group_name"]
    return Collective(kind, group_ranks(group), count_bytes(result if message is None else given[message]))


def group_ranks(group: object) -> tuple[int, ...]:
    """Return the global ranks of a group given as a name, a `ProcessGroup` or its boxed form."""
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    elif isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(group))


def count_bytes(tensors: object) -> int:
    """Return the bytes of a tensor, or of all in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(count_bytes(tensor) for tensor in tensors)
