"""What a pipeline schedule takes: its ranks' actions laid out in time, with the bubble and what is held meanwhile."""

import math
from collections.abc import Callable, Mapping, Sequence

from attrs import field, frozen

from shardspec.schedule import SCHEDULES, Action, needs, orders, placement, stages_per_rank

IDLE, BOTH = ".", "="
LABELLED = 100
"""Columns into which every action's name must fit to be shown; the names take a column for each letter."""
SCALED = 96
"""Columns of a timeline that is too long for names."""


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@frozen(kw_only=True)
class StageCosts:
    """The time of each stage for one microbatch, in any one unit; a whole backward takes what its halves take."""

    forward: tuple[float, ...] = field(converter=_floats)
    backward_input: tuple[float, ...] = field(converter=_floats)
    backward_weight: tuple[float, ...] = field(converter=_floats)

    def __attrs_post_init__(self) -> None:
        if len({len(self.forward), len(self.backward_input), len(self.backward_weight)}) != 1:
            raise ValueError("a stage has one forward and both halves of a backward")
        if any(cost < 0 for cost in (*self.forward, *self.backward_input, *self.backward_weight)):
            raise ValueError("no action takes less than no time")
        if not any(self.forward):
            raise ValueError("a stage's forward takes time, or there is no timeline")

    @classmethod
    def of_products(cls, forward: Sequence[float]) -> "StageCosts":
        """Of stages that are matrix products: each half of a backward takes what the forward takes."""
        return cls(forward=forward, backward_input=forward, backward_weight=forward)

    def duration(self, action: Action) -> float:
        """How long a stage computes in an action.

        Torch leaves out the input half of the first stage, which nobody waits for, and runs its whole backward as the
        weight half (torch/distributed/pipelining/stage.py, `backward_weight_one_chunk`).
        """
        stage = action.stage
        whole = self.backward_input[stage] + self.backward_weight[stage]
        if action.kind == "F":
            return self.forward[stage]
        if action.kind == "B":
            return whole
        if action.kind == "I":
            return self.backward_input[stage] if stage else 0.0
        return self.backward_weight[stage] if stage else whole


@frozen(kw_only=True)
class Span:
    """An action and when it runs."""

    start: float
    end: float
    action: Action


@frozen(kw_only=True)
class Timeline:
    """A step of a pipeline: what each rank computes when, with transfers and the optimizer free.

    Attributes:
        ranks: by rank, its actions in order.
        title: what stands above the picture.
        kept: by rank, the most bytes that it keeps for backwards at a time; empty where that is not known.
    """

    ranks: tuple[tuple[Span, ...], ...]
    title: str = ""
    kept: tuple[int, ...] = ()

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return max(spans[-1].end for spans in self.ranks)

    @property
    def idle(self) -> tuple[float, ...]:
        """By rank, the share of the makespan in which it computes nothing."""
        return tuple(1 - sum(span.end - span.start for span in spans) / self.makespan for spans in self.ranks)

    @property
    def bubble(self) -> float:
        """The share of the makespan in which a rank computes nothing, mean over ranks."""
        return sum(self.idle) / len(self.idle)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """By rank, the most forwards whose backward is not complete, each of one stage for one microbatch."""
        return tuple(int(peak) for peak in self.held(lambda _: 1))

    def held(self, size: Callable[[int], float]) -> tuple[float, ...]:
        """By rank, the most that it holds at a time, where a stage holds `size(stage)` for a microbatch in flight.

        In flight is what a forward began and no backward completed; of a split one, the weight half completes it.
        """
        peaks: list[float] = []
        for spans in self.ranks:
            peak = now = 0.0
            for span in spans:
                if span.action.kind == "F":
                    now += size(span.action.stage)
                    peak = max(peak, now)
                elif span.action.kind in ("B", "W"):
                    now -= size(span.action.stage)
            peaks.append(peak)
        return tuple(peaks)

    def __str__(self) -> str:
        return _picture(self)


def simulate(order: Sequence[Sequence[Action]], costs: StageCosts, title: str = "") -> Timeline:
    """Lay the actions of each rank out in time, each as early as it can be.

    A rank runs its actions in order. A forward waits for the forward of the stage before, a backward for that of the
    stage after and for its own forward; from another rank either comes when that rank reaches the sending of it.

    Raises:
        ValueError: where no rank can go on, and for actions that run twice.
    """
    home = {action.stage: rank for rank, actions in enumerate(order) for action in actions if action.kind == "F"}
    done: dict[tuple[int, str, int], float] = {}
    spans: list[list[Span]] = [[] for _ in order]
    clock, at = [0.0] * len(order), [0] * len(order)

    def awaited(action: Action, rank: int) -> list[tuple[int, str, int]]:
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "F":
            sent = "F" if home.get(stage - 1) == rank else "SEND_F"
            return [(stage - 1, sent, microbatch)] if stage else []
        if action.kind in ("B", "I"):
            sent = "B" if home.get(stage + 1) == rank else "SEND_B"
            # The backward of the stage after waited for its forward, and that for this stage's.
            return [(stage + 1, sent, microbatch) if stage + 1 in home else (stage, "F", microbatch)]
        return [(stage, {"W": "I", "SEND_F": "F", "SEND_B": "B"}[action.kind], microbatch)]

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(order):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                keys = awaited(action, rank)
                if not all(key in done for key in keys):
                    break
                if action.kind.startswith("SEND"):
                    end = clock[rank]
                else:
                    start = max(clock[rank], *(done[key] for key in keys)) if keys else clock[rank]
                    end = start + costs.duration(action)
                    spans[rank].append(Span(start=start, end=end, action=action))
                _finish(done, action, end)
                clock[rank], at[rank], moved = end, at[rank] + 1, True
    waiting = [f"rank {rank} at {actions[at[rank]]}" for rank, actions in enumerate(order) if at[rank] < len(actions)]
    if waiting:
        raise ValueError(f"no rank can go on: {', '.join(waiting)}")
    return Timeline(ranks=tuple(map(tuple, spans)), title=title)


def _finish(done: dict[tuple[int, str, int], float], action: Action, end: float) -> None:
    """Note an action; either kind of backward gives the input's gradient, which is what others wait for."""
    kinds = ("B", "I") if action.kind == "I" else (action.kind,)
    for kind in kinds:
        key = (action.stage, kind, action.microbatch)
        if key in done:
            raise ValueError(f"{action} runs twice")
        done[key] = end


def timeline(schedule: str, ranks: int, microbatches: int, virtual: int, costs: StageCosts) -> Timeline:
    """The timeline of one of torch's schedules.

    Raises:
        ValueError: where `needs` finds a demand that is not met, or for other than ranks * virtual stages.
    """
    stages = ranks * virtual
    if len(costs.forward) != stages:
        raise ValueError(f"{ranks} ranks of {virtual} stages are {stages} stages, and {len(costs.forward)} have costs")
    title = f"{schedule}: {stages} stages on {ranks} ranks, {microbatches} microbatches"
    return simulate(orders(schedule, ranks, microbatches, virtual), costs, title)


# The picture


def _picture(shown: Timeline) -> str:
    single = all(len({span.action.stage for span in spans}) == 1 for spans in shown.ranks)
    scale, names = _names_scale(shown, single)
    legend = [f"held: the most in flight; {IDLE} is idle"]
    if scale * shown.makespan <= LABELLED:
        rows = [_labelled(spans, shown.makespan, scale, names) for spans in shown.ranks]
        legend[0] += "; a number is a microbatch" if single else "; a name is stage, kind, microbatch"
    else:
        rows = [_scaled(spans, shown.makespan) for spans in shown.ranks]
        legend[0] += f"; a column is {shown.makespan / SCALED:.4g}"
        legend += [f"{BOTH} is forwards and backwards in turn"] if any(BOTH in row for row in rows) else []
        legend += [] if single else ["small letters are a rank's second stage, fourth, ..."]
    width = len(str(len(rows) - 1))
    kept = [f"{size / 1e6:.4g}" for size in shown.kept]
    wide = max((len(text) for text in (*kept, "MB") if kept), default=-1) + 1
    lines = [
        f"{shown.title}; makespan {shown.makespan:.6g}, bubble {shown.bubble:.1%}",
        f"{'':{width + 5}} idle held{'MB' if kept else '':>{wide}}",
    ]
    lines += [
        f"rank {rank:>{width}} {idle:>4.0%} {held:>4}{size:>{wide}} |{row}|"
        for rank, (row, idle, held, size) in enumerate(
            zip(rows, shown.idle, shown.in_flight, kept or [""] * len(rows), strict=True)
        )
    ]
    legend += ["MB: the most bytes of activations that are kept for backwards, in millions"] if kept else []
    return "\n".join([*lines, *legend])


def _names_scale(shown: Timeline, single: bool) -> tuple[float, Mapping[Action, str]]:
    """Columns a unit of time at which every name fits into its action with a blank behind it; and the names."""
    scale, names = 0.0, dict[Action, str]()
    for spans in shown.ranks:
        for span in spans:
            action = span.action
            names[action] = f"{action.kind}{action.microbatch}" if single else str(action)
            if span.end > span.start:
                scale = max(scale, (len(names[action]) + 1) / (span.end - span.start))
    return scale, names


def _labelled(spans: Sequence[Span], makespan: float, scale: float, names: Mapping[Action, str]) -> str:
    row = [IDLE] * round(makespan * scale)
    for span in spans:
        start, end = round(span.start * scale), round(span.end * scale)
        row[start:end] = f"{names[span.action]:<{end - start}}"[: end - start]
    return "".join(row)


def _scaled(spans: Sequence[Span], makespan: float) -> str:
    """The letter of what takes most of each column; every other of a rank's stages in small letters."""
    stages = sorted({span.action.stage for span in spans})
    letters = {stage: str.lower if turn % 2 else str.upper for turn, stage in enumerate(stages)}
    column = makespan / SCALED
    shares: list[dict[str, float]] = [{IDLE: 1.0} for _ in range(SCALED)]
    for span in spans:
        letter = letters[span.action.stage](span.action.kind)
        start, end = span.start / column, span.end / column
        for index in range(int(start), min(math.ceil(end), SCALED)):
            part = min(end, index + 1) - max(start, index)
            shares[index][letter] = shares[index].get(letter, 0.0) + part
            shares[index][IDLE] -= part
    coarse = column > min((span.end - span.start for span in spans if span.end > span.start), default=column)
    return "".join(_letter(share, coarse) for share in shares)


def _letter(shares: Mapping[str, float], coarse: bool) -> str:
    """What stands for a column; where both directions share a coarse one, a sign of its own."""
    forward = sum(share for letter, share in shares.items() if letter in "Ff")
    backward = sum(share for letter, share in shares.items() if letter in "BbIiWw")
    if coarse and min(forward, backward) > 1 / 8:
        return BOTH
    return max(shares, key=lambda letter: shares[letter])


def comparison(ranks: int, microbatches: int) -> str:
    """A table in Markdown of torch's schedules on equal stages that are matrix products.

    A rank has the same layers under each, in as many stages as the schedule takes when nobody says. In flight is
    counted in microbatches of all of a rank's layers, on the rank that holds most.
    """
    lines = ["| schedule | stages a rank | stage to rank | bubble | in flight |", "|---|---|---|---|---|"]
    for schedule in SCHEDULES:
        virtual = stages_per_rank(schedule)
        places = " ".join(map(str, placement(schedule, ranks, virtual)))
        if needs(schedule, ranks, microbatches, virtual):
            lines.append(f"| {schedule} | {virtual} | {places} | cannot run | |")
            continue
        shown = timeline(schedule, ranks, microbatches, virtual, StageCosts.of_products([1.0] * ranks * virtual))
        held = max(shown.in_flight) / virtual
        lines.append(f"| {schedule} | {virtual} | {places} | {shown.bubble:.1%} | {held:g} |")
    return "\n".join(lines)
