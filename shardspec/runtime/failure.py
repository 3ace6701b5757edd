"""What a step that fails says: the module, the model's line, the rules and the tensors, in front of torch's own words;
and, on the ranks that waited for it, which rank failed and why."""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch.distributed as dist
from attrs import define
from torch import nn

from shardspec.diagnostics import Diagnostic, DonatedError, Location, ShardingError, refuse
from shardspec.plan import Plan
from shardspec.tracing import user_frame

DISTRIBUTED = os.path.dirname(os.path.abspath(dist.__file__)) + os.sep
BACKWARD = frozenset({"_engine_run_backward", "backward"})

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for the others where only it may have come; less than torch waits in a collective."""

MOST_NOTICES = 4
"""How many notices are read, the latest first."""


@define(eq=False)
class Notices:
    """What a rank tells the others outside of collectives, where it cannot take part in one: in the world's store.

    In a step that goes well nothing is written or read.
    """

    store: dist.Store | None
    """None where there is one rank."""
    prefix: str = ""
    rank: int = 0
    world: int = 1
    begun: int = 0
    """How many steps this rank has begun; as many as the others, for they wait for each other."""
    failed: str = ""
    """How this rank's last step failed, until all ranks are known to have failed in it."""
    met: int = 0
    patience: timedelta = PATIENCE

    @classmethod
    def of_world(cls, store: dist.Store | None, rank: int, world: int) -> "Notices":
        """Notices under a name of their own; every rank makes as many, in one order."""
        if store is None:
            return cls(None)
        number = store.add(f"shardspec/{rank}/made", 1)
        return cls(store, f"shardspec/{number}", rank, world)

    def begin(self) -> None:
        """Begin a step.

        Raises:
            ShardingError: SS403 after a step that failed on some ranks alone: the others are in the midst of it.
        """
        if self.failed and not self._arrive(f"failed/{self.begun}", count=0):
            refuse(
                "SS403",
                "the last step failed on this rank, and not on all",
                why=f"the others are in the midst of it, and would take what comes next for the rest\n{self.failed}",
                advice=("end the process, and start all ranks again from the last checkpoint",),
            )
        self.failed = ""
        self.begun += 1

    def post(self, text: str) -> None:
        """Tell the others how this rank's step failed, in the midst of it."""
        self.failed = text
        with suppress(RuntimeError):  # the store's host may be gone
            self._leave(text, self.begun)
            self._arrive(f"failed/{self.begun}", wait=False)

    def tell(self, text: str) -> None:
        """Tell the others why this rank does not begin the step that they may be in."""
        with suppress(RuntimeError):
            self._leave(text, self.begun + 1)

    def _leave(self, text: str, step: int) -> None:
        if self.store is not None:
            number = self.store.add(f"{self.prefix}/notices", 1)
            self.store.set(f"{self.prefix}/notice/{number}", f"{self.rank} {step}\n{text}")

    def heard(self) -> tuple[int, str] | None:
        """The latest notice of another rank on this step: (rank, text). A rank that only waited leaves none."""
        if self.store is None:
            return None
        with suppress(RuntimeError):
            last = self.store.add(f"{self.prefix}/notices", 0)
            for number in range(last, max(0, last - MOST_NOTICES), -1):
                head, _, text = self.store.get(f"{self.prefix}/notice/{number}").decode().partition("\n")
                rank, step = map(int, head.split())
                if rank != self.rank and step >= self.begun:
                    return rank, text
        return None

    def meet(self, what: str) -> None:
        """Go on when every rank is here: called in front of a collective that others may not come to.

        Raises:
            ShardingError: SS403 where they do not come in time.
        """
        self.met += 1
        if not self._arrive(f"met/{self.met}"):
            self.failed = f"this rank has {what}"
            refuse(
                "SS403",
                f"this rank has {what}, and other ranks have not",
                why=f"they did not come to it in {self.patience.total_seconds():g} s: they run another program",
                advice=("give every rank the same names, shapes and dtypes in a step",),
            )

    def _arrive(self, name: str, *, count: int = 1, wait: bool = True) -> bool:
        """Count this rank at a place; whether all ranks have come there, in time."""
        if self.store is None:
            return True
        place, everyone = f"{self.prefix}/{name}", f"{self.prefix}/{name}/all"
        if self.store.add(place, count) == self.world:
            self.store.set(everyone, "")
        try:
            if wait:
                self.store.wait([everyone], self.patience)
        except RuntimeError:
            return False
        return True


class RunError(ShardingError):
    """An error of a step with what is known of its place in front; also of the class of the error itself."""

    kind: type[Exception] = Exception

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        # Not the other class's `__init__`, which may want what only its raiser knew.
        self.diagnostics = tuple(diagnostics)
        Exception.__init__(self, self.diagnostics)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _again, (self.kind, self.diagnostics)


@functools.lru_cache(maxsize=64)
def run_error(kind: type[Exception]) -> type[RunError]:
    """`RunError` that is also of another class; of RuntimeError where the two cannot be one.

    A StopIteration would end the generators that it passes.
    """
    try:
        if issubclass(kind, StopIteration):
            return run_error(RuntimeError)
        return type(kind.__name__, (RunError, kind), {"kind": kind, "__module__": kind.__module__})
    except TypeError:
        return run_error(RuntimeError)


def _again(kind: type[Exception], diagnostics: Sequence[Diagnostic]) -> RunError:
    return run_error(kind)(diagnostics)


def explain(
    error: BaseException, module: nn.Module, plan: Plan, rules: Mapping[str, Location], notices: Notices
) -> NoReturn:
    """Raise what a failed step raises, and tell the other ranks.

    Args:
        rules: pattern -> where the rule stands.

    Raises:
        RunError: SS421, of the error's own class too, with the module, its rules and its tensors.
        ShardingError: SS403 where another rank failed and this one only waited for it; or the error itself, where it
            is one of ours, or no `Exception`.
    """
    frames = list(_frames(error.__traceback__))
    lost = notices.heard() if frames and _in_collective(frames[-1]) else None
    if lost is not None:
        rank, text = lost
        notices.failed = f"it waited for rank {rank}"
        told = Diagnostic(code="SS403", what=f"rank {rank} failed, and this one waited for it", why=text)
        raise ShardingError([told]) from error
    if not isinstance(error, Exception) or isinstance(error, (ShardingError, DonatedError)):
        notices.post(str(error) or type(error).__name__)
        raise error
    found = place(error, frames, module, plan, rules, notices)
    notices.post(str(found))
    raise run_error(type(error))([found]) from error


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _in_collective(frame: FrameType) -> bool:
    """Whether an error comes from torch.distributed: a connection that another rank closed, a time that ran out."""
    return os.path.abspath(frame.f_code.co_filename).startswith(DISTRIBUTED)


def place(
    error: Exception,
    frames: Sequence[FrameType],
    module: nn.Module,
    plan: Plan,
    rules: Mapping[str, Location],
    notices: Notices,
) -> Diagnostic:
    """SS421: where a step failed, as far as the frames tell."""
    paths = {id(child): path for path, child in module.named_modules()}
    running = [paths[id(owner)] for owner in map(_owner, frames) if id(owner) in paths]
    backward = any(frame.f_code.co_name in BACKWARD for frame in frames)
    if running:
        path, where = running[-1], running[-1] or "the model"
    else:
        path, where = None, "the step"
    waiting = not running and bool(frames) and _in_collective(frames[-1])
    phase = "backward" if backward else "forward" if running else "a wait for other ranks" if waiting else "the loss"
    first, *rest = str(error).strip().splitlines() or [""]
    rank = f" on rank {notices.rank}" if notices.world > 1 else ""
    kept = [*_tensors(path, plan)]
    patterns = dict.fromkeys(pattern for _, pattern in kept)
    return Diagnostic(
        code="SS421",
        what=f"{where} fails in {phase}{rank}: {type(error).__name__}: {first}",
        why="\n".join([*rest, *(line for line, _ in kept)]),
        locations=(*user_frame(error), *(rules[pattern] for pattern in patterns if pattern in rules)),
    )


def _owner(frame: FrameType) -> Any:
    """The object whose method runs in a frame."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _tensors(path: str | None, plan: Plan) -> Iterator[tuple[str, str]]:
    """What lies on a rank of a module's own parameters and declared points, or of the batch; with the rules."""
    if path is None:
        for name, entry in plan.entries.items():
            yield f"{name} is {entry.layout.shape} on a rank: {entry.layout}", entry.rule
        return
    for name, param in plan.params.items():
        if name.rpartition(".")[0] == path:
            whole = f", of {param.shape}" if param.layout.shape != param.shape else ""
            yield f"{name} is {param.layout.shape} on a rank{whole}: {param.layout}", param.rule
    for name, point in plan.activations.items():
        if point.rule and name.partition(":")[0] == path:
            yield f"{name} is {point.layout.shape} on a rank: {point.layout}", point.rule
