"""The lists of actions that a pipeline's ranks run, and when the sender of a message can know that it has come."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from attrs import frozen

from shardspec.schedule import placement
from shardspec.torch_private import schedule_actions

Step = tuple[str, int, int]
"""(kind, stage, microbatch); kinds are F, B, I and W, SEND_F, RECV_F, SEND_B, RECV_B."""


@frozen(kw_only=True)
class Orders:
    """What each rank of a pipeline does in a step, in order."""

    steps: tuple[tuple[Step, ...], ...]
    acknowledged: tuple[Mapping[int, tuple[Step, ...]], ...]
    """Rank -> position -> its sends that have come once that step is done: what it waited for was sent by a rank that
    had waited for them before. The tensors of other sends are held to the end."""


@lru_cache(maxsize=64)
def orders_of(schedule: str, degree: int, per_rank: int, microbatches: int, *, backward: bool = True) -> Orders:
    """The lists of one of torch's schedules; without `backward` what is left of them in an evaluation.

    Raises:
        ValueError: where the schedule does not take that many microbatches or stages.
    """
    steps = tuple(
        tuple(step for step in order if backward or step[0] in ("F", "SEND_F", "RECV_F"))
        for order in schedule_actions(schedule, degree, per_rank, microbatches)
    )
    return Orders(steps=steps, acknowledged=acknowledged(steps, placement(schedule, degree, per_rank)))


def awaited(step: Step) -> Step | None:
    """The receive that a step waits for, if a rank sends it; the first stage's whole backward runs as its W."""
    kind, stage, microbatch = step
    if kind == "F":
        return ("RECV_F", stage, microbatch)
    waits = kind in ("B", "I" if stage else "W")
    return ("RECV_B", stage, microbatch) if waits else None


def acknowledged(orders: Sequence[Sequence[Step]], places: Sequence[int]) -> tuple[Mapping[int, tuple[Step, ...]], ...]:
    """See `Orders.acknowledged`; `places` is the rank of each stage."""
    arrives: dict[Step, int] = {}
    sends: dict[tuple[int, int], list[tuple[int, Step]]] = defaultdict(list)
    for rank, order in enumerate(orders):
        for position, step in enumerate(order):
            receive = awaited(step)
            if receive is not None:
                arrives[receive] = position
            elif step[0].startswith("SEND"):
                sends[rank, places[_receive(step)[1]]].append((position, step))
    told: list[dict[int, tuple[Step, ...]]] = [{} for _ in orders]
    for (sender, receiver), sent in sends.items():
        answers = sends.get((receiver, sender), [])
        after = [position for position, _ in answers]
        for _, step in sent:
            following = bisect_right(after, arrives[_receive(step)])
            if following < len(answers):
                at = arrives[_receive(answers[following][1])]
                told[sender][at] = (*told[sender].get(at, ()), step)
    return tuple(told)


def _receive(send: Step) -> Step:
    """The receive that belongs to a send."""
    kind, stage, microbatch = send
    return ("RECV_F", stage + 1, microbatch) if kind == "SEND_F" else ("RECV_B", stage - 1, microbatch)
