"""Torch's schedules in time: every action once, in an order that can run, with the bubbles of the papers."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.messages import orders_of
from shardspec.schedule import (
    FOLDED,
    SCHEDULES,
    SINGLE,
    SPLIT_BACKWARD,
    Action,
    needs,
    orders,
    placement,
    stages_per_rank,
)
from shardspec.timeline import SCALED, StageCosts, Timeline, comparison, simulate, timeline
from shardspec.torch_private import pipeline_actions
from tests.markdown import run_page

PAGE = Path(__file__).parent.parent / "docs" / "pipelines.md"

GRID = [(ranks, count, virtual) for ranks in (1, 2, 3, 4) for count in range(1, 13) for virtual in (1, 2, 3)]
"""(ranks, microbatches, stages a rank)"""


def equal(stages: int, forward: float = 1, half: float = 1) -> StageCosts:
    return StageCosts(forward=[forward] * stages, backward_input=[half] * stages, backward_weight=[half] * stages)


def acts(text: str) -> tuple[Action, ...]:
    """The actions of `0F0 1SEND_B2`."""
    found = re.findall(r"(\d+)([A-Z_]+)(\d+)", text)
    return tuple(Action(stage=int(stage), kind=kind, microbatch=int(number)) for stage, kind, number in found)


def computed(schedule: str, ranks: int, count: int, virtual: int) -> list[str]:
    """By rank, the names of what it computes, without sends."""
    order = orders(schedule, ranks, count, virtual)
    return [" ".join(str(action) for action in actions if "SEND" not in action.kind) for actions in order]


# What torch runs


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_demand_is_unmet_exactly_where_torchs_own_class_refuses(schedule):
    for ranks, count, virtual in GRID:
        if schedule in SINGLE and virtual > 1:
            assert needs(schedule, ranks, count, virtual)
            continue
        try:
            pipeline_actions(schedule, ranks, count, virtual)
            refused = False
        except ValueError:
            refused = True
        assert bool(needs(schedule, ranks, count, virtual)) == refused, (ranks, count, virtual)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_advice_names_would_run(schedule):
    for ranks, count, virtual in GRID:
        for unmet in needs(schedule, ranks, count, virtual):
            counts = re.findall(r"microbatches=(\d+)(?: or (\d+))?", unmet.advice)
            for named in (int(number) for pair in counts for number in pair if number):
                assert not any("microbatches=" in other.advice for other in needs(schedule, ranks, named, virtual))
            stages = re.match(r"(\d+) stages", unmet.advice)
            if stages:
                assert not needs(schedule, ranks, 24, int(stages[1]) // ranks)
            assert counts or stages


@pytest.mark.parametrize(
    ("schedule", "ranks", "count", "virtual", "why", "advice"),
    [
        ("1F1B", 4, 3, 1, "3 < 4", "microbatches=4 or more"),
        ("1F1B", 4, 8, 2, "one stage a rank", "4 stages on pp=4"),
        ("ZBVZeroBubble", 4, 8, 1, "exactly two stages a rank", "8 stages on pp=4"),
        ("DualPipeV", 4, 7, 2, "7 < 8", "microbatches=8 or more"),
        ("Interleaved1F1B", 4, 9, 2, "2 does not divide 9", "microbatches=8 or 10"),
        ("InterleavedZeroBubble", 2, 7, 2, "3 does not divide 7", "microbatches=6 or 8"),
        ("GPipe", 2, 0, 1, "at least one microbatch", "microbatches=1"),
        ("1f1b", 2, 4, 1, "GPipe, 1F1B", 'did you mean schedule="1F1B"?'),
        ("Interleaved", 2, 4, 1, "torch's schedules are", "Interleaved1F1B"),
        ("nothing at all", 2, 4, 1, "torch's schedules are", "take one of them"),
    ],
)
def test_an_unmet_demand_says_the_arithmetic_and_what_would_do(schedule, ranks, count, virtual, why, advice):
    (unmet,) = needs(schedule, ranks, count, virtual)
    assert why in unmet.why
    assert advice in unmet.advice
    with pytest.raises(ValueError, match=re.escape(why)):
        orders(schedule, ranks, count, virtual)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stage_stands_on_the_rank_that_runs_it(schedule):
    for ranks, count, virtual in GRID:
        if needs(schedule, ranks, count, virtual):
            continue
        places = placement(schedule, ranks, virtual)
        assert len(places) == ranks * virtual
        for rank, actions in enumerate(orders(schedule, ranks, count, virtual)):
            assert {action.stage for action in actions} == {s for s, place in enumerate(places) if place == rank}


def test_a_loop_goes_round_and_a_v_comes_back():
    assert placement("Interleaved1F1B", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert placement("ZBVZeroBubble", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert placement("1F1B", 3, 1) == (0, 1, 2)
    assert {name: stages_per_rank(name) for name in SCHEDULES} == {
        name: 1 if name in ("GPipe", "1F1B") else 2 for name in SCHEDULES
    }


def test_gpipe_runs_all_forwards_and_then_all_backwards():
    assert computed("GPipe", 2, 3, 1) == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]


def test_1f1b_warms_up_by_its_distance_from_the_end_and_then_alternates():
    assert computed("1F1B", 3, 4, 1) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_what_torch_calls_overlapped_runs_the_forward_first():
    """Written down from the steps of torch's class, of which the fourth overlaps 1F1 with 0B0."""
    assert computed("DualPipeV", 1, 2, 2) == ["0F0 1F0 0F1 1B0 1F1 0B0 1B1 0I1 0W1"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_that_split_a_backward_are_named(schedule):
    virtual = stages_per_rank(schedule)
    kinds = {action.kind for actions in orders(schedule, 3, 6, virtual) for action in actions}
    assert ("I" in kinds) == ("W" in kinds) == (schedule in SPLIT_BACKWARD)


# Time


def check(shown: Timeline, stages: int, count: int, costs: StageCosts) -> None:
    """Each action once and after what it needs; a rank does one thing at a time, and begins when something ended."""
    spans = [span for rank in shown.ranks for span in rank]
    once = Counter((span.action.stage, span.action.kind, span.action.microbatch) for span in spans)
    assert set(once.values()) == {1}
    end: dict[tuple[int, str, int], float] = {}
    for span in spans:
        action = span.action
        halves = {"F": ["F"], "B": ["I", "W"], "I": ["I"], "W": ["W"]}[action.kind]
        for half in halves:
            key = (action.stage, half, action.microbatch)
            assert key not in end
            end[key] = span.end
    assert set(end) == {(s, kind, m) for s in range(stages) for kind in "FIW" for m in range(count)}
    for rank in shown.ranks:
        for before, after in pairwise(rank):
            assert before.end <= after.start
    for span in spans:
        stage, kind, number = span.action.stage, span.action.kind, span.action.microbatch
        if kind == "F" and stage:
            assert span.start >= end[stage - 1, "F", number]
        if kind in ("B", "I"):
            assert span.start >= end[stage, "F", number]
            if stage + 1 < stages:
                assert span.start >= end[stage + 1, "I", number]
        if kind == "W":
            assert span.start >= end[stage, "I", number]
        ends = {other.end for other in spans} | {0.0}
        assert span.start in ends
    work = sum(map(sum, (costs.forward, costs.backward_input, costs.backward_weight))) * count
    assert sum(span.end - span.start for span in spans) == pytest.approx(work)
    assert shown.bubble == pytest.approx(1 - work / (len(shown.ranks) * shown.makespan))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_accepted_step_runs_to_its_end_with_each_action_once_and_none_too_early(schedule):
    for ranks, count, virtual in GRID:
        if not needs(schedule, ranks, count, virtual):
            costs = StageCosts.of_products([1.0 + stage % 3 for stage in range(ranks * virtual)])
            check(timeline(schedule, ranks, count, virtual, costs), ranks * virtual, count, costs)


@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([2, 3, 4]),
    st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=8, max_size=8),
)
def test_stages_of_any_cost_run_in_an_order_that_can_run(schedule, rounds, ranks, drawn):
    count, stages = 2 * ranks * rounds, ranks * stages_per_rank(schedule)
    forward, inputs, weights = zip(*drawn[:stages], strict=True)
    costs = StageCosts(forward=[1 + one for one in forward], backward_input=inputs, backward_weight=weights)
    check(timeline(schedule, ranks, count, stages_per_rank(schedule), costs), stages, count, costs)


@pytest.mark.parametrize("schedule", SINGLE)
@pytest.mark.parametrize(("forward", "half"), [(1, 1), (3, 1), (2, 5)])
def test_equal_stages_idle_as_the_formula_says(schedule, forward, half):
    """(p - 1) / (m + p - 1), whatever a backward costs beside a forward."""
    for ranks in (1, 2, 3, 4, 8):
        for count in (ranks, ranks + 1, 2 * ranks, 3 * ranks + 2):
            shown = timeline(schedule, ranks, count, 1, equal(ranks, forward, half))
            assert shown.bubble == pytest.approx((ranks - 1) / (count + ranks - 1))
            assert shown.makespan == (count + ranks - 1) * (forward + 2 * half)


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "LoopedBFS"])
def test_interleaved_equal_stages_idle_as_the_formula_says(schedule):
    """(p - 1) / (v m + p - 1): each rank waits for p - 1 of its v smaller stages."""
    for ranks in (2, 3, 4):
        for virtual in (1, 2, 3):
            for rounds in (1, 2, 3):
                count = ranks * rounds
                shown = timeline(schedule, ranks, count, virtual, equal(ranks * virtual))
                assert shown.bubble == pytest.approx((ranks - 1) / (virtual * count + ranks - 1))


@pytest.mark.parametrize("schedule", sorted(SPLIT_BACKWARD))
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_schedule_that_splits_the_backward_idles_less_than_1f1b(schedule, ranks):
    for count in (2 * ranks, 4 * ranks):
        split = timeline(schedule, ranks, count, 2, equal(2 * ranks))
        assert split.bubble < timeline("1F1B", ranks, count, 1, equal(ranks)).bubble


def test_the_first_stage_runs_its_whole_backward_as_the_weight_half():
    costs = StageCosts(forward=[1, 1], backward_input=[2, 2], backward_weight=[4, 4])
    order = [acts("0F0 0SEND_F0 0I0 0W0"), acts("1F0 1I0 1SEND_B0 1W0")]
    shown = simulate(order, costs)
    assert [(span.start, span.end) for span in shown.ranks[0]] == [(0, 1), (4, 4), (4, 10)]
    assert [(span.start, span.end) for span in shown.ranks[1]] == [(1, 2), (2, 4), (4, 8)]


def test_a_neighbour_waits_for_the_sending_and_not_only_for_the_forward():
    order = [acts("0F0 0F1 0SEND_F0 0SEND_F1 0B0 0B1"), acts("1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1")]
    shown = simulate(order, StageCosts(forward=[3, 1], backward_input=[1, 1], backward_weight=[0, 0]))
    assert [span.start for span in shown.ranks[1]] == [6, 7, 8, 9]


def test_gradients_too_arrive_when_they_are_sent():
    order = [acts("0F0 0SEND_F0 0F1 0SEND_F1 0B0 0B1"), acts("1F0 1F1 1B0 1B1 1SEND_B0 1SEND_B1")]
    shown = simulate(order, StageCosts(forward=[1, 1], backward_input=[2, 2], backward_weight=[0, 0]))
    assert [span.start for span in shown.ranks[0]] == [0, 1, 7, 9]


def test_stages_on_one_rank_wait_for_each_other_without_a_sending():
    order = [acts("0F0 0SEND_F0 0B0"), acts("1F0 2F0 2B0 1B0 1SEND_B0")]
    shown = simulate(order, equal(3))
    assert [span.start for rank in shown.ranks for span in rank] == [0, 7, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["0F0 0B0 0SEND_F0", "1F0 1B0 1SEND_B0"], "rank 0 at 0B0, rank 1 at 1F0"),
        (["0F0 0B0", "1F0 1B0 1SEND_B0"], "rank 0 at 0B0, rank 1 at 1F0"),
        (["0B0 0F0"], "rank 0 at 0B0"),
        (["0F0 0W0 0I0"], "rank 0 at 0W0"),
    ],
)
def test_an_order_in_which_no_rank_can_go_on_is_an_error_that_says_where_each_stands(order, message):
    with pytest.raises(ValueError, match=message):
        simulate([acts(rank) for rank in order], equal(len(order)))


@pytest.mark.parametrize("order", ["0F0 0F0", "0F0 0B0 0B0", "0F0 0I0 0B0"])
def test_an_action_that_runs_twice_is_an_error(order):
    with pytest.raises(ValueError, match="runs twice"):
        simulate([acts(order)], equal(1))


def test_costs_for_other_stages_and_below_nothing_are_errors():
    with pytest.raises(ValueError, match="2 ranks of 2 stages are 4 stages, and 2 have costs"):
        timeline("LoopedBFS", 2, 4, 2, equal(2))
    with pytest.raises(ValueError, match="no action takes less than no time"):
        StageCosts(forward=[-1], backward_input=[1], backward_weight=[1])
    with pytest.raises(ValueError, match="takes time"):
        StageCosts(forward=[0, 0], backward_input=[1, 1], backward_weight=[1, 1])
    with pytest.raises(ValueError, match="both halves"):
        StageCosts(forward=[1, 1], backward_input=[1], backward_weight=[1])


# What is held


def test_gpipe_holds_every_microbatch_and_1f1b_as_many_as_there_are_stages_behind():
    for ranks in (2, 3, 4):
        for count in (ranks, 3 * ranks):
            assert timeline("GPipe", ranks, count, 1, equal(ranks)).in_flight == (count,) * ranks
            held = timeline("1F1B", ranks, count, 1, equal(ranks)).in_flight
            assert held == tuple(ranks - rank for rank in range(ranks))


def test_interleaving_holds_what_its_warmup_ran_and_one_more():
    """2 (p - 1 - r) + (v - 1) p warm up (Narayanan et al., 2021), and the steady state begins with a forward."""
    held = timeline("Interleaved1F1B", 4, 16, 3, equal(12)).in_flight
    assert held == tuple(2 * (3 - rank) + 2 * 4 + 1 for rank in range(4))


def test_what_is_held_weighs_each_stage_and_a_split_backward_lets_go_with_its_weight_half():
    order = [acts("0F0 1F0 1I0 0F1 1W0 0I0 0W0 1F1 1B1 0B1")]
    shown = simulate(order, equal(2))
    assert shown.in_flight == (3,)
    assert shown.held(lambda stage: [10.0, 100.0][stage]) == (120.0,)


# The picture


def test_a_short_step_is_drawn_with_the_name_of_every_action():
    assert str(timeline("GPipe", 2, 2, 1, equal(2))).splitlines() == [
        "GPipe: 2 stages on 2 ranks, 2 microbatches; makespan 9, bubble 33.3%",
        "       idle held",
        "rank 0  33%    2 |F0 F1 .........B0    B1    |",
        "rank 1  33%    2 |...F0 F1 B0    B1    ......|",
        "held: the most in flight; . is idle; a number is a microbatch",
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_long_step_is_drawn_to_scale_in_lines_that_a_terminal_holds(schedule):
    virtual = stages_per_rank(schedule)
    shown = timeline(schedule, 16, 64, virtual, equal(16 * virtual))
    text = str(shown)
    lines = text.splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("rank")]
    assert len(rows) == 16
    assert {len(row) for row in rows} == {SCALED}
    assert max(map(len, lines)) <= 120
    assert f"bubble {shown.bubble:.1%}" in text
    assert rows[0].startswith("FFFF")
    assert rows[15].startswith("...")
    column = shown.makespan / SCALED
    for row, idle in zip(rows, shown.idle, strict=True):
        # idle columns in the picture are about the idle time: the rest of it lies in columns that are mostly busy
        assert row.count(".") <= idle * shown.makespan / (column / 2)
    assert all(not re.search("[a-z]", row) for row in rows) == (virtual == 1)


def test_a_column_is_the_letter_of_what_takes_most_of_it():
    costs = StageCosts(forward=[SCALED], backward_input=[SCALED], backward_weight=[2 * SCALED])
    row = str(simulate([acts("0F0 0I0 0W0 0F1 0B1")], costs)).splitlines()[2].split("|")[1]
    assert row == "F0 W0       F1 B1       "
    order = [acts(" ".join(f"0F{m} 0I{m} 0W{m}" for m in range(12)))]
    scaled = str(simulate(order, costs)).splitlines()[2].split("|")[1]
    assert scaled == "FFWWWWWW" * 12


# The page


def test_the_page_runs_and_its_table_is_the_one_that_is_computed(capsys):
    run_page(PAGE, capsys)
    assert comparison(4, 8) in PAGE.read_text()


def test_the_table_says_what_cannot_run():
    rows = {line.split("|")[1].strip(): line for line in comparison(4, 2).splitlines()}
    assert "cannot run" in rows["1F1B"]
    assert "cannot run" in rows["DualPipeV"]
    assert rows["GPipe"].endswith("| 60.0% | 2 |")  # (p - 1) / (m + p - 1) = 3 / 5
    assert set(FOLDED) < set(rows)


# Messages


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 8), (3, 12)])
def test_a_send_is_let_go_of_only_when_its_coming_is_sure_whatever_the_speed_of_the_ranks(schedule, ranks, count):
    """The receiving step happens before the one that lets go, by orders of ranks and by messages alone."""
    virtual = stages_per_rank(schedule)
    orders_run = orders_of(schedule, ranks, virtual, count)
    places = placement(schedule, ranks, virtual)
    needed = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B", "W": "RECV_B"}
    before: dict[tuple[int, int], list[tuple[int, int]]] = {}
    where = {(step, rank): (rank, at) for rank, order in enumerate(orders_run.steps) for at, step in enumerate(order)}
    consumed: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, order in enumerate(orders_run.steps):
        received: set[tuple[str, int, int]] = set()
        for at, (kind, stage, microbatch) in enumerate(order):
            before[rank, at] = [(rank, at - 1)] if at else []
            wanted = (needed.get(kind, ""), stage, microbatch)
            if wanted in received and not (kind == "I" and stage == 0):
                received.remove(wanted)
                consumed[wanted] = (rank, at)
                peer = stage - 1 if kind == "F" else stage + 1
                sent = (wanted[0].replace("RECV", "SEND"), peer, microbatch)
                before[rank, at].append(where[sent, places[peer]])
            if kind.startswith("RECV"):
                received.add((kind, stage, microbatch))
    released = 0
    for rank, told in enumerate(orders_run.acknowledged):
        for at, sends in told.items():
            reached, rest = set(), [(rank, at)]
            while rest:
                for one in before[rest.pop()]:
                    if one not in reached:
                        reached.add(one)
                        rest.append(one)
            for kind, stage, microbatch in sends:
                released += 1
                there = stage + 1 if kind == "SEND_F" else stage - 1
                assert consumed[kind.replace("SEND", "RECV"), there, microbatch] in reached
    assert released > len([step for order in orders_run.steps for step in order if "SEND" in step[0]]) / 3
