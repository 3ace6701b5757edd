"""Messages between ranks that are threads: what torch's group of threads lacks for a pipeline."""

import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from attrs import define, field
from torch import Tensor

Key = tuple[Any, ...]


@define(eq=False)
class Letters:
    """The messages under way between the ranks of a run."""

    arrival: threading.Condition = field(factory=threading.Condition)
    held: dict[Key, Tensor] = field(factory=dict)

    def post(self, key: Key, tensor: Tensor) -> None:
        """Send a copy of a tensor."""
        with self.arrival:
            assert key not in self.held, f"{key} is sent twice"
            self.held[key] = tensor.detach().clone()
            self.arrival.notify_all()

    def take(self, key: Key, place: Tensor, ended: Callable[[], bool]) -> None:
        """Copy a message to its place, once it is there; leave by SystemExit where the run has ended first."""
        with self.arrival:
            self.arrival.wait_for(lambda: key in self.held or ended())
            if key not in self.held:
                sys.exit("the run has ended")
            message = self.held.pop(key)
        place.detach().copy_(message)

    def wake(self) -> None:
        """Have every thread that waits look whether the run has ended."""
        with self.arrival:
            self.arrival.notify_all()


class Done(dist.Work):
    """A message that needs no waiting for: it is a copy, on its way since it was sent."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Nothing to wait for."""
        del timeout
        return True


class Coming(dist.Work):
    """A message that is copied to its place when it is waited for."""

    def __init__(self, take: Callable[[], None]) -> None:
        super().__init__()
        self.take = take

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Wait for it, however long it takes: a run has a timeout of its own."""
        del timeout
        self.take()
        return True


def with_letters(group: Any, letters: Letters, ended: Callable[[], bool]) -> Any:
    """A class of groups of threads that send and receive too.

    Args:
        group: torch's, which knows its name and its rank.
        ended: whether the run is over, so that nobody waits for what will not come.
    """

    class ThreadGroup(group):
        def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
            """Send one tensor; `rank` is the receiver's in this group."""
            letters.post((self.pg_name, self.rank(), rank, tag), tensors[0])
            return Done()

        def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
            """Receive what `rank` sends with the same tag."""
            key = (self.pg_name, rank, self.rank(), tag)
            return Coming(lambda: letters.take(key, tensors[0], ended))

    return ThreadGroup
