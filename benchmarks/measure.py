"""How a side is measured: interleaved step times, bytes at its peak, and what a ratio can be trusted for."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator

import attrs
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], dict[str, torch.Tensor]]


def alternate(sides: dict[str, Step], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Time one step of each side in turn, `rounds` times; every second round in reverse order.

    Returns side -> seconds of each round, the slowest rank's. Garbage is collected between steps only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            order = list(sides) if index % 2 == 0 else list(reversed(sides))
            for name in order:
                taken = time_step(sides[name])
                if index >= 0:
                    seconds[name].append(taken)
            if index % 8 == 0:
                gc.collect()
    finally:
        gc.enable()
    return seconds


def time_step(step: Step) -> float:
    """Run one step on all ranks at once; return the slowest rank's seconds."""
    if not dist.is_initialized():
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    dist.barrier()
    began = time.perf_counter()
    step()
    slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


@attrs.frozen(kw_only=True)
class Ratio:
    """A paired ratio: its median, and the 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: list[float], theirs: list[float], draws: int = 10_000) -> "Ratio":
        ratios = np.asarray(ours) / np.asarray(theirs)
        rows = np.random.default_rng(0).integers(0, len(ratios), (draws, len(ratios)))
        low, high = np.quantile(np.median(ratios[rows], axis=1), (0.025, 0.975))
        return cls(median=float(np.median(ratios)), low=float(low), high=float(high))

    def exceeds(self, budget: float) -> bool:
        """Whether the whole interval lies above the budget."""
        return self.low > budget


@contextlib.contextmanager
def resident_bytes() -> Iterator[Callable[[], int]]:
    """Yield a function that says how many more bytes of tensors live than when the block began."""
    before = live_bytes()
    yield lambda: live_bytes() - before


def live_bytes() -> int:
    """Return the bytes of all storages that a Python tensor of this process holds, each counted once."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            for storage in storages(thing):
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """Return the storage of a plain tensor; a wrapper's parts are tensors that are found themselves."""
    return [] if type(tensor) not in {torch.Tensor, torch.nn.Parameter} else [tensor.untyped_storage()]


def transient_bytes(step: Step, repeats: int = 5) -> int:
    """Return the most bytes that a step has allocated beyond what lived before it.

    The allocator's own account; memory that was allocated earlier and is freed in the step counts as held.
    The least of several steps: when a collective lets go of its buffers depends on threads.
    """
    return min(peak_of_one(step) for _ in range(repeats))


def peak_of_one(step: Step) -> int:
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def own_bytes(step: Step, repeats: int = 5) -> int:
    """Like `transient_bytes`, without what a backend of collectives allocates for itself: gloo copies its messages."""
    return min(own_peak_of_one(step) for _ in range(repeats))


def own_peak_of_one(step: Step) -> int:
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    told: list[tuple[int, int, int, bool]] = []
    pending = [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while pending:
        event, inside = pending.pop()
        inside = inside or event.name.startswith(("c10d::", "gloo:"))
        if event.name == "[memory]":
            told.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size, inside))
        pending += [(child, inside) for child in event.children]
    foreign: set[int] = set()
    held = peak = 0
    for _, address, size, inside in sorted(told):
        if inside and size > 0:
            foreign.add(address)
        elif size < 0 and address in foreign:
            foreign.remove(address)
        else:
            held += size
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what C++ code writes to stderr: the profiler announces itself there."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


class CallCount(TorchDispatchMode):
    """Counts the operators that a block runs on plain tensors; what DTensor makes of one counts, not itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))
