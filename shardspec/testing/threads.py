"""Ranks as threads of this process: a function run on each, with a process group, no launcher and no trace left."""

import gc
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from attrs import define, field

from shardspec.testing.letters import Letters, with_letters
from shardspec.torch_private import (
    THREADS,
    collectives_ended,
    end_collectives,
    forget_collectives,
    thread_worlds,
)

T = TypeVar("T")

GRACE_S = 10.0
"""How long ranks that wait in a collective may take to leave it, once the run is over."""

_ONE_RUN = threading.Lock()  # what a process group belongs to is a setting of the process


class RanksLateError(RuntimeError):
    """Ranks were not done in time; the message holds their stacks."""


@define(eq=False)
class _Run:
    """One run of a function on all ranks."""

    world: int
    function: Callable[[int], Any]
    group: Any
    store: dist.HashStore = field(factory=dist.HashStore)
    reports: "queue.SimpleQueue[tuple[int, bool, Any]]" = field(factory=queue.SimpleQueue)
    """(rank, whether it failed, what it returned or raised), in the order of time."""
    over: threading.Event = field(factory=threading.Event)

    def rank(self, rank: int) -> None:
        """Be one rank."""
        try:
            dist.init_process_group(THREADS, rank=rank, world_size=self.world, store=self.store)
            try:
                self.reports.put((rank, False, self.function(rank)))
            finally:
                dist.destroy_process_group()
        except BaseException as error:  # SystemExit too: so a thread leaves a collective that has been ended
            self._fail(rank, error)

    def _fail(self, rank: int, error: BaseException) -> None:
        self.reports.put((rank, True, error))
        if not self.over.is_set():
            _end(self.group)


def run_ranks(world: int, function: Callable[[int], T], *, timeout: float = 300.0) -> list[T]:
    """Run `function(rank)` on `world` ranks that are threads of this process; what each returned, in rank order.

    Each thread has a default process group on the CPU. Where a rank raises, the others are freed from the collectives
    that they wait in, and the error of the first to raise is raised here, with its rank noted.

    Args:
        timeout: seconds for all of it.

    Raises:
        RanksLateError: where ranks are not done by then.
        RuntimeError: where a rank of an earlier run never ended and still runs.
    """
    collecting = gc.isenabled()
    with _ONE_RUN, thread_worlds(_extended) as group:
        if collectives_ended(group):
            raise RuntimeError("a rank of an earlier run still runs in this process: start another one")
        run = _Run(world, function, group)
        threads = [threading.Thread(target=run.rank, args=(r,), name=f"rank {r}", daemon=True) for r in range(world)]
        try:
            for thread in threads:
                thread.start()
            return _collect(run, threads, time.monotonic() + timeout, timeout)
        finally:
            _stop(run, threads)
            # The compiler keeps the collector off, each rank for itself: they may leave it in another's state.
            (gc.enable if collecting else gc.disable)()


def _extended(group: Any) -> Any:
    """The class of groups that ranks have; its messages are kept where torch keeps those of its collectives."""
    group.letters = Letters()
    return with_letters(group, group.letters, lambda: collectives_ended(group))


def _end(group: Any) -> None:
    end_collectives(group)
    group.letters.wake()


def _collect(run: _Run, threads: list[threading.Thread], deadline: float, timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < run.world:
        try:
            rank, failed, what = run.reports.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            late = [thread for rank, thread in enumerate(threads) if rank not in found]
            stacks = "\n".join(f"-- {thread.name}\n{_stack(thread)}" for thread in late)
            raise RanksLateError(f"{len(late)} of {run.world} ranks not done after {timeout:g} s\n{stacks}") from None
        if failed:
            what.add_note(f"on rank {rank} of {run.world}")
            raise what
        found[rank] = what
    return [found[rank] for rank in range(run.world)]


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "ended\n"


def _stop(run: _Run, threads: list[threading.Thread]) -> None:
    """End every thread; where one does not end, no later run may meet it in a collective."""
    run.over.set()
    deadline = time.monotonic() + GRACE_S
    started = [thread for thread in threads if thread.ident is not None]
    for thread in started:
        thread.join(0.0)
    if any(thread.is_alive() for thread in started):
        _end(run.group)
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    if not any(thread.is_alive() for thread in started):
        forget_collectives(run.group)
        run.group.letters.held.clear()
