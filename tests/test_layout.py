"""Layouts against index arithmetic: what a rank's digits say is where numpy finds its elements."""

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardspec.layout import (
    CutError,
    Layout,
    Sum,
    canonical,
    dim_axes,
    dim_text,
    direct_sum,
    flatten,
    global_size,
    local_size,
    parts_of,
    replicated,
    split,
    with_pending,
)
from tests.strategies import a_dim, a_layout, a_mesh, a_sum, merge, primes

RANDOM = st.randoms(use_true_random=False)


def ranks(sizes):
    """Every rank's index along every axis."""
    for index in np.ndindex(*sizes.values()):
        yield dict(zip(sizes, index, strict=True))


def held(length: int, dim: tuple, place: dict, sizes: dict) -> np.ndarray:
    """The indices that a rank holds of a dim: the dim as an array of its digits, its own index at each axis; of a
    direct sum, those of each part, which starts where the one before it ends."""
    if dim and isinstance(dim[0], Sum):
        lengths = [prod(sizes[one] if isinstance(one, str) else one for one in part) for part in dim[0].parts]
        assert sum(lengths) == length
        parts = zip(np.cumsum([0, *lengths]), lengths, dim[0].parts, strict=False)
        return np.concatenate([start + held(size, part, place, sizes) for start, size, part in parts])
    digits = np.arange(length).reshape([sizes[digit] if isinstance(digit, str) else digit for digit in dim])
    return digits[tuple(place[digit] if isinstance(digit, str) else slice(None) for digit in dim)].reshape(-1)


# Digits


@given(st.lists(st.integers(1, 4) | st.sampled_from(["dp", "cp", "tp"]), max_size=6))
def test_the_canonical_form_is_one_and_means_the_same(digits):
    """Law: no ones, no neighbours that are integers, the same order of axes, the same extents between them."""
    form = canonical(digits)
    assert 1 not in form
    assert not any(isinstance(a, int) and isinstance(b, int) for a, b in pairwise(form))
    assert canonical(form) == form

    def runs(dim):
        extents = [1]
        for digit in dim:
            extents = [*extents, digit, 1] if isinstance(digit, str) else [*extents[:-1], extents[-1] * digit]
        return extents

    assert runs(form) == runs(digits)


def test_an_empty_dim_keeps_its_zero():
    assert canonical([0]) == (0,)
    assert canonical([3, 0]) == (0,)
    assert replicated((2, 0, 1)) == Layout(((2,), (0,), ()))


def test_the_sizes_of_a_known_dim():
    dim = ("tp", 1024)
    assert canonical(["tp", 8, 128]) == dim
    assert local_size(dim) == 1024
    assert global_size(dim, {"tp": 16}) == 16384
    assert dim_axes((2, "cp", "tp", 4)) == ("cp", "tp")


@given(RANDOM)
@settings(max_examples=100, deadline=None)
def test_a_rank_holds_as_much_as_its_local_size_says(rng):
    """Law: the parts have `local_size` elements, and all of them together are the dim, each as often as it is held."""
    sizes = a_mesh(rng)
    dim = a_dim(rng, primes(rng), list(sizes), sizes, eager=0.7)
    length = global_size(dim, sizes)
    parts = [held(length, dim, place, sizes) for place in ranks(sizes)]
    assert {len(part) for part in parts} == {local_size(dim)}
    counts = np.bincount(np.concatenate(parts), minlength=length)
    assert set(counts) == {prod(size for axis, size in sizes.items() if axis not in dim_axes(dim))}


# Flatten and split


@given(RANDOM)
@settings(max_examples=150, deadline=None)
def test_flattening_dims_is_flattening_every_part(rng):
    """Law: what a rank holds of the flattened tensor, by `flatten`'s digits, is its part of the tensor, flattened."""
    sizes = a_mesh(rng)
    layout = a_layout(rng, [primes(rng, 3) for _ in range(rng.randint(1, 3))], sizes, may_pend={})
    shape = layout.global_shape(sizes)
    whole = np.arange(prod(shape)).reshape(shape)
    for place in ranks(sizes):
        part = whole[np.ix_(*(held(n, dim, place, sizes) for n, dim in zip(shape, layout.dims, strict=True)))]
        assert held(whole.size, flatten(layout.dims), place, sizes).tolist() == part.reshape(-1).tolist()


@given(RANDOM)
@settings(max_examples=200, deadline=None)
def test_splitting_a_dim_is_splitting_every_part_or_an_error(rng):
    """Law: where `split` gives dims, a rank's part of the view is its part, viewed; where it does not, none could."""
    sizes = a_mesh(rng)
    factors = primes(rng)
    dim = a_dim(rng, factors, list(sizes), sizes, eager=0.7)
    cuts = sorted(rng.randint(0, len(factors)) for _ in range(rng.randint(0, 2)))
    shuffled = rng.sample(factors, len(factors))
    lengths = [prod(shuffled[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
    whole = np.arange(prod(lengths)).reshape(lengths)
    try:
        dims = split(dim, lengths, sizes)
    except CutError as error:
        named = error.axis in dim_axes(dim)
        assert named
        assert not is_a_box(dim, lengths, sizes)
        return
    assert tuple(global_size(one, sizes) for one in dims) == tuple(lengths)
    for place in ranks(sizes):
        part = whole[np.ix_(*(held(n, one, place, sizes) for n, one in zip(lengths, dims, strict=True)))]
        assert held(whole.size, dim, place, sizes).tolist() == part.reshape(-1).tolist()


def is_a_box(dim: tuple, lengths: list[int], sizes: dict) -> bool:
    """Whether every rank's part of a dim, seen with other lengths, is a choice of indices along each, in order, of
    the same number on every rank and moved apart by one rank's step alone: what digits for each length can say."""
    step: dict[str, set] = {axis: set() for axis in dim_axes(dim)}
    shapes = set()
    for place in ranks(sizes):
        part = held(prod(lengths), dim, place, sizes)
        index = np.unravel_index(part, lengths)
        choices = [list(dict.fromkeys(along.tolist())) for along in index]
        if prod(map(len, choices)) != len(part):
            return False
        if not np.array_equal(np.ravel_multi_index(np.ix_(*choices), lengths).reshape(-1), part):
            return False
        shapes.add(tuple(map(len, choices)))
        for axis, found in step.items():
            other = {**place, axis: (place[axis] + 1) % sizes[axis]}
            moved = np.unravel_index(held(prod(lengths), dim, other, sizes), lengths)
            found.add(tuple(not np.array_equal(a, b) for a, b in zip(index, moved, strict=True)))
    return len(shapes) == 1 and all(sum(changed) <= 1 for found in step.values() for changed in found)


@given(RANDOM)
def test_splitting_undoes_flattening(rng):
    """Law: split(flatten(dims), their lengths) == dims, but for what stands at a cut between an axis and a one."""
    sizes = a_mesh(rng)
    layout = a_layout(rng, [primes(rng, 3, 1) for _ in range(rng.randint(1, 3))], sizes, may_pend={})
    shape = layout.global_shape(sizes)
    assert split(flatten(layout.dims), shape, sizes) == layout.dims


@pytest.mark.parametrize(
    ("dim", "lengths", "parts"),
    [
        # (H@tp hd) into heads.
        (("tp", 1024), (128, 128), (("tp", 8), (128,))),
        # [B, S@cp] flattened, and back: DTensor loses this one.
        ((4, "cp", 8), (4, 16), ((4,), ("cp", 8))),
        (("dp", 2, "cp", 8), (4, 16), (("dp", 2), ("cp", 8))),
        # A fused projection cut into its two parts.
        ((2, "tp", 64), (2, 128), ((2,), ("tp", 64))),
        (("tp", 6), (1, 12, 1), ((), ("tp", 6), ())),
        ((12,), (3, 4), ((3,), (4,))),
        ((), (1, 1), ((), ())),
        (("tp",), (2,), (("tp",),)),
    ],
)
def test_known_cuts(dim, lengths, parts):
    assert split(dim, lengths, {"tp": 16 if 1024 in dim else 2, "cp": 2, "dp": 2}) == parts


@pytest.mark.parametrize(
    ("dim", "lengths", "axis"),
    [
        (("tp", 2), (4, 4), "tp"),  # four heads over eight ranks
        (("tp", 3), (3, 8), "tp"),  # the cut lies within the axis
        ((3, "tp"), (2, 12), "tp"),
        (("dp", "tp", 2), (8, 8), "tp"),
    ],
)
def test_a_cut_through_an_axis_names_it(dim, lengths, axis):
    sizes = {"tp": 8, "dp": 4}
    with pytest.raises(CutError) as caught:
        split(dim, lengths, sizes)
    assert caught.value.axis == axis


# Direct sums


@given(RANDOM)
@settings(max_examples=150, deadline=None)
def test_a_direct_sum_has_one_form_however_it_is_made(rng):
    """Law: parts that are cut anywhere between two of their runs, and summed again, are the same dim; a rank holds its
    rows of each part, and as many as the local size says."""
    sizes = a_mesh(rng)
    dim = a_sum(rng, primes(rng, 5, 1), list(sizes), sizes)
    pieces = []
    for part in parts_of(dim):
        count, *run = part if part and isinstance(part[0], int) and len(part) > 1 else (1, *part)
        first = rng.randint(0, count)
        pieces += [canonical((number, *run)) for number in (first, count - first) if number]
    assert direct_sum(pieces) == dim
    assert direct_sum([direct_sum(pieces[:1]), direct_sum(pieces)]) == direct_sum([pieces[0], dim])
    length = global_size(dim, sizes)
    parts = [held(length, dim, place, sizes) for place in ranks(sizes)]
    assert {len(part) for part in parts} == {local_size(dim)}
    assert all((np.diff(part) > 0).all() for part in parts)
    assert set(np.concatenate(parts)) == set(range(length))


@given(RANDOM)
@settings(max_examples=150, deadline=None)
def test_different_direct_sums_hold_different_rows(rng):
    """Law: two dims are equal tuples exactly where every rank holds the same rows under both."""
    sizes = {"tp": rng.choice((2, 3))}
    factors = primes(rng, 3, 1)
    one, two = (a_sum(rng, [*factors, sizes["tp"]], ["tp"], sizes) for _ in range(2))
    length = global_size(one, sizes)
    same = all(np.array_equal(held(length, one, p, sizes), held(length, two, p, sizes)) for p in ranks(sizes))
    assert (one == two) == same


@given(RANDOM)
@settings(max_examples=150, deadline=None)
def test_a_direct_sum_is_cut_and_flattened_as_every_part_of_it(rng):
    """Law: `flatten` puts whole dims behind a direct sum, and `split` cuts them off again."""
    sizes = a_mesh(rng)
    free = list(sizes)
    dim, behind = a_sum(rng, primes(rng, 4, 1), free, sizes), a_dim(rng, primes(rng, 2), [], sizes, eager=0)
    lengths = [global_size(dim, sizes), global_size(behind, sizes)]
    whole = np.arange(prod(lengths)).reshape(lengths)
    flat = flatten([dim, behind])
    for place in ranks(sizes):
        part = whole[np.ix_(held(lengths[0], dim, place, sizes), held(lengths[1], behind, place, sizes))]
        assert held(whole.size, flat, place, sizes).tolist() == part.reshape(-1).tolist()
    assert split(flat, lengths, sizes) == (dim, behind)
    assert split(flat, [1, lengths[0], 1, lengths[1]], sizes) == ((), dim, (), behind)


SUMMED = (Sum((("tp", 8), (2, "tp", 4))),)


@pytest.mark.parametrize(
    ("parts", "dim"),
    [
        ([("tp", 8), ("tp", 4), ("tp", 4)], SUMMED),
        ([("tp", 8), (2, "tp", 4)], SUMMED),
        ([SUMMED], SUMMED),
        ([("tp", 4), ("tp", 4)], (2, "tp", 4)),
        ([("tp", 4)], ("tp", 4)),
        ([(8,), (4,)], (12,)),
        ([(), ()], (2,)),
        ([("tp",), ("tp",)], (2, "tp")),
        ([(2, "tp", 4), ("tp", 4)], (3, "tp", 4)),
        ([SUMMED, ("tp", 4)], (Sum((("tp", 8), (3, "tp", 4))),)),
    ],
)
def test_a_known_direct_sum(parts, dim):
    assert direct_sum(parts) == dim


@pytest.mark.parametrize(
    ("dim", "lengths", "message"),
    [
        (SUMMED, (2, 16), "the parts would be cut differently"),
        (SUMMED, (4, 8), "the parts would be cut differently"),
        ((Sum((("tp", 4), ("tp", 2))),), (4, 3), "3 does not divide the part of 8"),
        ((Sum((("tp", 6), ("tp", 3))),), (3, 6), "6 is not a multiple|6 and 3 do not|is left over|cut differently"),
    ],
)
def test_a_direct_sum_is_not_cut_within_its_parts(dim, lengths, message):
    with pytest.raises(CutError, match=message) as caught:
        split(dim, lengths, {"tp": 2})
    assert caught.value.axis == "tp"


def test_a_direct_sum_behind_another_dim_is_no_dim():
    with pytest.raises(CutError, match=r"the direct sum \(8@tp \+ 4@tp \+ 4@tp\) lies behind another dim"):
        flatten([(2,), SUMMED])


# Layouts


def test_what_a_layout_tells():
    layout = Layout((("dp", 4), (8,), (2, "tp", 3)), (("cp", "sum"),))
    sizes = {"dp": 2, "cp": 2, "tp": 4}
    assert layout.shape == (4, 8, 6)
    assert layout.global_shape(sizes) == (8, 8, 24)
    assert layout.sharded == {"dp": 0, "tp": 2}
    assert layout.pending_kind("cp") == "sum"
    assert layout.pending_kind("tp") is None
    assert layout.describe("cp") == "pending sum over cp"
    assert layout.describe("tp") == "sharded over tp on dim 2"
    assert layout.describe("fsdp") == "replicated over fsdp"
    assert str(layout) == "[4@dp, 8, 2.tp.3] +cp"
    assert str(Layout(((),), (("tp", "max"),))) == "[1] +tp:max"


def test_layouts_are_values_with_their_pending_axes_sorted():
    assert with_pending(replicated((2,)), [("tp", "sum"), ("cp", "avg")]).pending == (("cp", "avg"), ("tp", "sum"))
    assert len({replicated((2, 3)), Layout(((2,), (3,)))}) == 1


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        ((), "1"),
        ((4096,), "4096"),
        (("tp",), "1@tp"),
        (("tp", 1024), "1024@tp"),
        (("dp", "fsdp", 4), "4@(dp,fsdp)"),
        ((2, "tp", 64), "2.tp.64"),
        ((2, "tp"), "2.tp"),
        (("dp", 2, "tp"), "dp.2.tp"),
        ((Sum((("tp", 8), (2, "tp", 4))),), "(8@tp + 4@tp + 4@tp)"),
        ((Sum(((9, "tp", 8), ("tp", 4))),), "(9.tp.8 + 4@tp)"),
    ],
)
def test_a_dim_reads_as(dim, text):
    assert dim_text(dim) == text


def test_the_strategies_make_canonical_dims():
    assert merge([2, 3, "tp", 1, 2, 2]) == canonical([2, 3, "tp", 1, 2, 2]) == (6, "tp", 4)
