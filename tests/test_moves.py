"""Moves against a simulation of every rank: what a transition leaves is what the declared layout says."""

from collections.abc import Mapping, Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardspec.layout import Layout, Sum
from shardspec.moves import Move, NoTransition, adjoint, transition
from shardspec.runtime.boundary import _put, _take
from shardspec.testing.simulate import REDUCE, SHARE_UNIT, Ranks, difference, group, scatter
from tests.strategies import a_layout, laid_out


def run_move(ranks: Ranks, move: Move, sizes: Mapping[str, int]) -> Ranks:
    """One move on every rank, as runtime/boundary.py does it on one."""
    n = sizes[move.axis]
    out: Ranks = {}
    for place in ranks:
        mine = dict(place)[move.axis]
        held = [ranks[other] for other in group(place, move.axis, sizes)]
        assert all(array.shape == move.shape for array in held), "a move knows the local shape before it"
        if move.kind == "all_gather":
            out[place] = _put(torch.stack(held), move.dim, move.outer, move.runs)
        elif move.kind == "slice":
            out[place] = _take(ranks[place], move.dim, move.outer, n, move.runs)[mine]
        elif move.kind == "reduce_scatter":
            assert move.reduce in ("sum", "avg"), "the runtime scatters sums only"
            out[place] = REDUCE[move.reduce](
                torch.stack([_take(array, move.dim, move.outer, n, move.runs)[mine] for array in held])
            )
        elif move.kind == "all_reduce":
            out[place] = REDUCE[move.reduce](torch.stack(held))
        elif move.kind == "all_to_all":
            parts = [_take(array, move.to_dim, move.to_outer, n, move.to_runs)[mine] for array in held]
            out[place] = _put(torch.stack(parts), move.dim, move.outer, move.runs)
        else:
            assert move.kind == "scale"
            out[place] = ranks[place] / n
    return out


def run_moves(ranks: Ranks, moves: Sequence[Move], sizes: Mapping[str, int]) -> Ranks:
    for move in moves:
        ranks = run_move(ranks, move, sizes)
    return ranks


def tensor(dims: list[list[int]], seed: int = 1) -> torch.Tensor:
    """Whole numbers, on which every reduction here is exact."""
    shape = [prod(primes) for primes in dims]
    generator = torch.Generator().manual_seed(seed)
    return SHARE_UNIT * torch.randint(2, 50, shape, generator=generator).to(torch.float64)


@st.composite
def pairs(draw, kinds=("sum", "avg")):
    """A mesh, a tensor's dims, and two layouts of it between which there is a way."""
    rng = draw(st.randoms(use_true_random=False))
    sizes, dims, before = laid_out(rng, kinds)
    return sizes, dims, before, a_layout(rng, dims, sizes, may_pend=dict(before.pending))


@given(pairs(kinds=("sum", "avg")))
@settings(max_examples=500, deadline=None)
def test_a_transition_turns_the_parts_of_one_layout_into_those_of_the_other(case):
    """Law: run_moves(parts of x under `before`, transition(before, after)) are parts of x under `after`."""
    sizes, dims, before, after = case
    whole = tensor(dims)
    ranks = scatter(whole, before, sizes)
    assert not difference(ranks, whole, before, sizes)
    assert not difference(run_moves(ranks, transition(before, after, sizes), sizes), whole, after, sizes)


@pytest.mark.parametrize("kind", ["max", "min"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_so_it_does_for_a_pending_maximum(kind, data):
    """Law: the same, for reductions that are not linear."""
    sizes, dims, before, after = data.draw(pairs(kinds=(kind,)))
    whole = tensor(dims)
    ranks = run_moves(scatter(whole, before, sizes), transition(before, after, sizes), sizes)
    assert not difference(ranks, whole, after, sizes)


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_a_message_is_as_long_as_the_whole_that_is_gathered_or_scattered(case):
    """Law: `elements` is the larger of what a rank holds before and after a collective."""
    sizes, dims, before, after = case
    ranks = scatter(tensor(dims), before, sizes)
    for move in transition(before, after, sizes):
        held = next(iter(ranks.values())).numel()
        ranks = run_move(ranks, move, sizes)
        assert move.elements(sizes) == max(held, next(iter(ranks.values())).numel())


@given(st.randoms(use_true_random=False))
def test_a_layout_needs_no_move_to_itself(rng):
    """Law: transition(l, l) is empty."""
    sizes, _, layout = laid_out(rng)
    assert transition(layout, layout, sizes) == ()


def stride(dim: tuple, axis: str, sizes: Mapping[str, int]) -> int:
    return prod(digit if isinstance(digit, int) else sizes[digit] for digit in dim[dim.index(axis) + 1 :])


@given(pairs())
@settings(max_examples=300, deadline=None)
def test_no_axis_moves_that_need_not(case):
    """Law: an axis that splits a dim at one stride before and after is in no move, and no other is in two, but
    to be gathered here and sliced there, or reduced and sliced; nothing is gathered that an exchange could do alone."""
    sizes, _, before, after = case
    moves = transition(before, after, sizes)
    for axis in sizes:
        kinds = [move.kind for move in moves if move.axis == axis]
        old, new = before.sharded.get(axis), after.sharded.get(axis)
        if old is not None and old == new:
            still = stride(before.dims[old], axis, sizes) == stride(after.dims[new], axis, sizes)
            assert kinds == ([] if still else ["all_gather", "slice"])
        elif old is not None and new is not None:
            assert kinds in (["all_to_all"], ["all_gather", "slice"])
        elif old is not None:
            assert kinds == ["all_gather"]
        elif before.pending_kind(axis) and not after.pending_kind(axis):
            assert kinds == (["all_reduce"] if new is None else ["reduce_scatter"])
        elif new is not None:
            assert kinds == ["slice"]
        else:
            assert kinds == []
    if len(moves) == 2 and [move.kind for move in moves] == ["all_gather", "slice"]:
        assert moves[0].axis != moves[1].axis or before.sharded[moves[0].axis] == after.sharded[moves[1].axis]


# The adjoint


def cotangent(whole: torch.Tensor, layout: Layout, owed: set[str], sizes: Mapping[str, int], seed: int) -> Ranks:
    """What ranks hold of the cotangent of a value with a layout: sharded where the value is, the same on every rank
    where the value is a pending sum (1/n of it for a mean), shares of it where it is owed."""
    mean = prod(sizes[axis] for axis, kind in layout.pending if kind == "avg")
    return scatter(whole / mean, Layout(layout.dims, tuple((axis, "sum") for axis in sorted(owed))), sizes, seed)


def off_cotangent(ranks: Ranks, whole: torch.Tensor, layout: Layout, owed: set[str], sizes: Mapping[str, int]) -> str:
    mean = prod(sizes[axis] for axis, kind in layout.pending if kind == "avg")
    return difference(ranks, whole / mean, Layout(layout.dims, tuple((axis, "sum") for axis in sorted(owed))), sizes)


def inner(values: Ranks, cotangents: Ranks, layout: Layout, owed: set[str], sizes: Mapping[str, int]) -> float:
    """<x, y> over all ranks: what is held by many ranks and complete on each counts once."""
    copies = prod(
        size
        for axis, size in sizes.items()
        if axis not in layout.sharded and not layout.pending_kind(axis) and axis not in owed
    )
    return sum(float((values[place] * cotangents[place]).sum()) for place in values) / copies


@st.composite
def owing(draw):
    """A pair of layouts, and axes over which the result's cotangent is owed: some on which it is replicated."""
    sizes, dims, before, after = draw(pairs())
    may = [axis for axis in sizes if axis not in after.sharded and not after.pending_kind(axis)]
    return sizes, dims, before, after, draw(st.sets(st.sampled_from(may)) if may else st.just(set()))


@given(owing())
@settings(max_examples=400, deadline=None)
def test_the_backward_of_a_transition_is_its_adjoint(case):
    """Law: <T x, y> = <x, T' y>, and T' y is a cotangent of a value laid out as `before`."""
    sizes, dims, before, after, owed = case
    x, y = tensor(dims), tensor(dims, 2)
    moves = transition(before, after, sizes)
    behind = run_moves(scatter(x, before, sizes, 2), moves, sizes)
    arriving = cotangent(y, after, owed, sizes, 3)
    shape = next(iter(behind.values())).shape
    back, left = adjoint(moves, owed, shape)
    leaving = run_moves(arriving, back, sizes)
    assert not left & (set(before.sharded) | dict(before.pending).keys())
    assert not off_cotangent(leaving, y, before, left, sizes)
    whole = inner(behind, arriving, after, owed, sizes)
    assert whole == pytest.approx(float((x * y).sum()), rel=1e-12)
    assert inner(scatter(x, before, sizes, 2), leaving, before, left, sizes) == pytest.approx(whole, rel=1e-12)


@given(owing())
@settings(max_examples=100, deadline=None)
def test_what_is_owed_stays_owed_where_nothing_moves(case):
    """Law: an owed axis that the value was replicated on, before and after, is still owed before."""
    sizes, _, before, after, owed = case
    moves = transition(before, after, sizes)
    _, left = adjoint(moves, owed, after.shape)
    assert left == {axis for axis in owed if axis not in before.sharded and not before.pending_kind(axis)}


# The transitions that every table has


SIZES = {"dp": 2, "cp": 2, "tp": 4}


@pytest.mark.parametrize(
    ("before", "after", "moves"),
    [
        ((("dp", 4), ("tp", 8), (6,)), (("dp", 4), (32,), (6,)), [("all_gather", 1)]),
        ((("dp", 4), (32,), (6,)), (("dp", 4), ("tp", 8), (6,)), [("slice", 1)]),
        ((("dp", 4), ("tp", 8), (8,)), (("dp", 4), (32,), ("tp", 2)), [("all_to_all", 1)]),
        ((("cp", "tp", 2), (8,)), (("cp", 8), (8,)), [("all_gather", 0)]),
        ((("cp", 8), (8,)), (("cp", "tp", 2), (8,)), [("slice", 0)]),
        ((("cp", 8), (4, "tp", 2)), (("cp", 8), (32,)), [("all_gather", 1)]),
        # An axis that stays where it is, though the digits before it change, does not move.
        (((2, "dp", 4), (8,)), (("cp", "dp", 4), (8,)), [("slice", 0)]),
        ((("cp", "dp", 4), (8,)), ((2, "dp", 4), (8,)), [("all_gather", 0)]),
        # What goes for good goes first, and makes room for an exchange.
        ((("dp", 4), ("cp", 4)), ((8,), ("dp", 4)), [("all_gather", 1), ("all_to_all", 0)]),
        # Two axes change places.
        ((("dp", 2), ("cp", 2)), (("cp", 2), ("dp", 2)), [("all_gather", 0), ("all_to_all", 1), ("slice", 1)]),
    ],
)
def test_a_known_transition_takes_the_moves_that_a_person_would_write(before, after, moves):
    found = transition(Layout(before), Layout(after), SIZES)
    assert [(move.kind, move.dim) for move in found] == moves


@pytest.mark.parametrize(
    ("after", "kinds"),
    [
        (Layout(((16,), (8,))), ["all_reduce"]),
        (Layout((("tp", 4), (8,))), ["reduce_scatter"]),
        (Layout(((16,), (2, "tp"))), ["reduce_scatter"]),
        (Layout(((16,), (8,)), (("tp", "sum"),)), []),
        (Layout((("cp", "tp", 2), (8,))), ["slice", "reduce_scatter"]),
    ],
)
def test_a_pending_sum_is_reduced_into_its_place(after, kinds):
    before = Layout(((16,), (8,)), (("tp", "sum"),))
    assert [move.kind for move in transition(before, after, SIZES)] == kinds


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (Layout(((4,),)), "the rule leaves the value pending over tp, and it is replicated over tp"),
        (Layout((("tp",),)), "the rule leaves the value pending over tp, and it is sharded over tp on dim 0"),
        (Layout(((4,),), (("tp", "avg"),)), "the rule leaves the value pending over tp, and it is pending avg over tp"),
    ],
)
def test_a_rule_cannot_leave_pending_what_is_not(before, message):
    with pytest.raises(NoTransition) as caught:
        transition(before, Layout(((4,),), (("tp", "sum"),)), SIZES)
    assert str(caught.value) == message


# Direct sums


@st.composite
def summed_pairs(draw):
    """A mesh, a tensor's dims, and two layouts, some of whose dims are direct sums; what may be owed behind."""
    rng = draw(st.randoms(use_true_random=False))
    sizes, dims, before = laid_out(rng, sums=0.6)
    after = a_layout(rng, dims, sizes, may_pend=dict(before.pending), sums=0.5)
    may = [axis for axis in sizes if axis not in after.sharded and not after.pending_kind(axis)]
    return sizes, dims, before, after, {axis for axis in may if rng.random() < 0.5}


@given(summed_pairs())
@settings(max_examples=400, deadline=None)
def test_direct_sums_are_gathered_cut_and_exchanged_run_by_run(case):
    """Law: as for other layouts, the parts under `before` become those under `after`, and the backward is the
    adjoint."""
    sizes, dims, before, after, owed = case
    x, y = tensor(dims), tensor(dims, 2)
    moves = transition(before, after, sizes)
    behind = run_moves(scatter(x, before, sizes, 2), moves, sizes)
    assert not difference(behind, x, after, sizes)
    back, left = adjoint(moves, owed, after.shape)
    leaving = run_moves(cotangent(y, after, owed, sizes, 3), back, sizes)
    assert not off_cotangent(leaving, y, before, left, sizes)


def test_a_direct_sum_is_gathered_in_one_message():
    before = Layout((("dp", 4), (Sum((("tp", 6), (2, "tp", 3))),)))
    after = Layout((("dp", 4), (48,)))
    (move,) = transition(before, after, SIZES)
    assert (move.kind, move.dim, move.runs) == ("all_gather", 1, (6, 3, 3))
    (back,) = transition(after, before, SIZES)
    assert (back.kind, back.dim, back.runs) == ("slice", 1, (6, 3, 3))
