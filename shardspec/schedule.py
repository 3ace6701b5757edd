"""Torch's pipeline schedules: where each puts its stages, what it demands, and the very actions that its ranks run."""

import difflib
from collections.abc import Iterator

from attrs import frozen

from shardspec.torch_private import pipeline_actions

SINGLE = ("GPipe", "1F1B")
"""Schedules of one stage a rank."""

LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
"""Schedules of any number of stages a rank: stage s on rank s mod p."""

FOLDED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules of two stages a rank: down the ranks and up again, so that the first rank holds both ends."""

SCHEDULES = (*SINGLE, *LOOPED, *FOLDED)
"""Those that torch offers by name."""

SPLIT_BACKWARD = frozenset({"InterleavedZeroBubble", *FOLDED})
"""Schedules that run a backward in two halves (inputs, then weights): torch refuses compiled modules under them."""


@frozen(kw_only=True)
class Action:
    """One thing that a rank does: F, B, I or W (forward, backward, its input and weight halves), SEND_F or SEND_B."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@frozen(kw_only=True)
class Unmet:
    """A demand that is not met: `why` with the arithmetic, `advice` a setting that would meet it."""

    why: str
    advice: str


def stages_per_rank(schedule: str) -> int:
    """How many stages a rank holds under a schedule when nobody says: the least that it is worth using with."""
    return 1 if schedule in SINGLE else 2


def placement(schedule: str, ranks: int, virtual: int) -> tuple[int, ...]:
    """The rank of each stage, for `virtual` stages a rank; loops go round the ranks, a V comes back by the way it went.

    For `LOOPED` and three ranks of two stages (0, 1, 2, 0, 1, 2), for `FOLDED` (0, 1, 2, 2, 1, 0).
    """
    there = tuple(range(ranks))
    back = there[::-1] if schedule in FOLDED else there
    return tuple(rank for turn in range(virtual) for rank in (back if turn % 2 else there))


def needs(schedule: str, ranks: int, microbatches: int, virtual: int) -> tuple[Unmet, ...]:
    """What a schedule demands that these numbers do not meet; nothing where it can run.

    Args:
        ranks: the size of pp.
        microbatches: of a step.
        virtual: stages a rank.
    """
    return tuple(_unmet(schedule, ranks, microbatches, virtual))


def _unmet(schedule: str, ranks: int, microbatches: int, virtual: int) -> Iterator[Unmet]:
    if schedule not in SCHEDULES:
        lower = {name.lower(): name for name in SCHEDULES}
        near = difflib.get_close_matches(schedule.lower(), lower, n=1)
        yield Unmet(
            why=f"torch's schedules are {', '.join(SCHEDULES)}",
            advice=f'did you mean schedule="{lower[near[0]]}"?' if near else "take one of them",
        )
        return
    if microbatches < 1:
        yield Unmet(why="a step has at least one microbatch", advice="microbatches=1, or more")
        return
    if schedule in SINGLE and virtual != 1:
        yield Unmet(why=f"{schedule} runs one stage a rank, not {virtual}", advice=f"{ranks} stages on pp={ranks}")
    if schedule in FOLDED and virtual != 2:
        yield Unmet(
            why=f"{schedule} runs exactly two stages a rank, down the ranks and up again, not {virtual}",
            advice=f"{2 * ranks} stages on pp={ranks}",
        )
    if virtual < 1:
        yield Unmet(why="a rank holds at least one stage", advice=f"{ranks} stages on pp={ranks}, or a multiple")
    if schedule == "1F1B" and microbatches < ranks:
        yield Unmet(
            why=f"1F1B has as many microbatches in flight as there are stages, and {microbatches} < {ranks}",
            advice=f'microbatches={ranks} or more, or schedule="GPipe"',
        )
    if schedule == "DualPipeV" and microbatches < 2 * ranks:
        yield Unmet(
            why=f"DualPipeV fills both directions of {2 * ranks} stages, and {microbatches} < {2 * ranks}",
            advice=f'microbatches={2 * ranks} or more, or schedule="ZBVZeroBubble"',
        )
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and not _in_rounds(ranks, microbatches):
        rounds = microbatches // ranks
        near = [m for m in range(microbatches - ranks, microbatches + ranks + 1) if m > 0 and _in_rounds(ranks, m)]
        below, above = max(m for m in near if m < microbatches), min(m for m in near if m > microbatches)
        yield Unmet(
            why=f"{schedule} runs {microbatches} microbatches on {ranks} ranks in {microbatches} // {ranks} = {rounds} "
            f"rounds of equal length, and {rounds} does not divide {microbatches}",
            advice=f"microbatches={below} or {above}; every multiple of {ranks} will do",
        )


def _in_rounds(ranks: int, microbatches: int) -> bool:
    """Whether microbatches // ranks rounds (at least one) are of equal length."""
    return microbatches % max(1, microbatches // ranks) == 0


def orders(schedule: str, ranks: int, microbatches: int, virtual: int) -> tuple[tuple[Action, ...], ...]:
    """What each rank does in a step, in the order in which torch's own class does it; needs no process group.

    Raises:
        ValueError: where `needs` finds a demand that is not met.
    """
    if unmet := needs(schedule, ranks, microbatches, virtual):
        raise ValueError("; ".join(one.why for one in unmet))
    return tuple(
        tuple(Action(stage=stage, kind=kind, microbatch=microbatch) for stage, kind, microbatch in actions)
        for actions in pipeline_actions(schedule, ranks, microbatches, virtual)
    )
