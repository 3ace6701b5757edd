"""Where a rank's part of a parameter lies, against torch's own splitting and plain index arithmetic."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from math import prod
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardspec.layout import Layout, dim_axes
from shardspec.mesh import AXES, Mesh
from shardspec.placement import RankMajor, local_index, placements_of, stored_shape
from shardspec.plan import ParamPlan
from shardspec.runtime.gather import split_rows
from shardspec.testing.simulate import positions
from tests.strategies import a_dim, a_layout, a_mesh, a_sum, merge, primes


def a_plan(layout: Layout, mesh: Mesh, storage: tuple[str, ...] = (), storage_dim: int = 0) -> ParamPlan:
    return ParamPlan(
        spec="",
        rule="",
        layout=layout,
        shape=layout.global_shape(mesh.shape),
        local_shape=(),
        dtype="float32",
        storage=storage,
        storage_dim=storage_dim,
        mesh_sizes=mesh.shape,
    )


def torchs_rows(
    placements: Sequence[Placement], dim: int, length: int, coordinate: dict[str, int], axes: Sequence[str], mesh: Mesh
) -> list[int]:
    """The rows of one dim that DTensor gives a rank over `axes`: each splits what those before it left."""
    rows = torch.arange(length).reshape(*[1] * dim, length)
    for axis, placement in zip(axes, placements, strict=False):
        if not isinstance(placement, Replicate) and placement.dim == dim:
            rows = torchs_split(placement, rows, mesh[axis])[coordinate[axis]]
    return rows.flatten().tolist()


def torchs_split(placement: Placement, rows: torch.Tensor, count: int) -> list[torch.Tensor]:
    return placement._split_tensor(rows, count, with_padding=False, contiguous=False)[0]


@st.composite
def stored(draw) -> tuple[ParamPlan, Mesh]:
    """A parameter, computed with in any layout, and stored over further axes where its rows are consecutive."""
    rng = draw(st.randoms(use_true_random=False))
    sizes = a_mesh(rng)
    storing = [axis for axis in ("fsdp", "cp") if axis in sizes and rng.random() < 0.7]
    mesh = Mesh(**sizes)
    rest = {axis: size for axis, size in sizes.items() if axis not in storing}
    dims = [primes(rng, 3) for _ in range(rng.randint(1, 3))]
    layout = a_layout(rng, dims, rest, kinds=(), may_pend={})
    if not storing:
        return a_plan(layout, mesh), mesh
    dim = rng.randrange(len(dims))
    axes = [digit for digit in layout.dims[dim] if isinstance(digit, str)]
    uneven = dim == 0 and len(storing) == 1
    rows = rng.randint(1, 9) if uneven else rng.randint(1, 3) * prod(sizes[axis] for axis in storing)
    dims_ = tuple(merge([*axes, rows]) if at == dim else digits for at, digits in enumerate(layout.dims))
    return a_plan(Layout(dims_), mesh, tuple(rng.sample(storing, len(storing))), dim), mesh


@given(stored())
@settings(max_examples=300, deadline=None)
def test_a_rank_stores_what_dtensor_says_that_it_does(case):
    """Law: the rows of `local_index` are those that torch's placements split off, in order, dim by dim."""
    plan, mesh = case
    placements = placements_of(plan)
    for coordinate in mesh.coordinates():
        index = local_index(plan, coordinate, mesh)
        for dim, length in enumerate(plan.shape):
            assert index[dim].tolist() == torchs_rows(placements, dim, length, coordinate, mesh.axes, mesh)
        assert stored_shape(plan, coordinate, mesh) == tuple(map(len, index))


@given(stored())
@settings(max_examples=150, deadline=None)
def test_torch_computes_the_same_local_shape_and_offset(case):
    """Law: torch's own arithmetic of a DTensor's local shape and first element agrees."""
    plan, mesh = case
    for coordinate in mesh.coordinates():
        place = [coordinate[axis] for axis in mesh.axes]
        shape, offset = _compute_local_shape_and_global_offset(
            plan.shape, tuple(mesh.shape.values()), place, placements_of(plan)
        )
        index = local_index(plan, coordinate, mesh)
        assert tuple(shape) == stored_shape(plan, coordinate, mesh)
        if all(map(len, index)):
            assert tuple(offset) == tuple(int(rows[0]) for rows in index)


@given(stored())
@settings(max_examples=150, deadline=None)
def test_every_element_lies_on_as_many_ranks_as_share_it(case):
    """Law: each element is stored world / (sharded and storage degree) times."""
    plan, mesh = case
    owners = Counter(
        element
        for coordinate in mesh.coordinates()
        for element in product(*map(list, map(torch.Tensor.tolist, local_index(plan, coordinate, mesh))))
    )
    degree = prod(mesh[axis] for axis in {*plan.layout.sharded, *plan.storage})
    assert set(owners) == set(product(*map(range, plan.shape)))
    assert set(owners.values()) == {mesh.world // degree}


@st.composite
def shared(draw) -> tuple[ParamPlan, Mesh]:
    """A parameter of which a dim is a direct sum, or strided, and may be stored over fsdp."""
    rng = draw(st.randoms(use_true_random=False))
    sizes = {**a_mesh(rng), "tp": rng.choice((2, 3))}
    mesh = Mesh(**sizes)
    storing = [axis for axis in ("fsdp",) if axis in sizes and rng.random() < 0.8]
    free = [axis for axis in sizes if axis not in storing]
    dims = (a_sum(rng, [*primes(rng, 4, 2), sizes["tp"]], free, sizes), a_dim(rng, primes(rng, 2), free, sizes, 0.5))
    return a_plan(Layout(dims), mesh, tuple(storing), 0), mesh


@given(shared())
@settings(max_examples=100, deadline=None)
def test_rows_that_no_dtensor_describes_are_named_by_their_placement(case):
    """Law: a rank stores consecutive rows of what compute leaves to it of every part, in chunks as torch.chunk cuts
    them; each row lies on as many ranks as share it; and every axis on the dim has the placement that says so."""
    plan, mesh = case
    dim, length = plan.layout.dims[0], plan.shape[0]
    axes = (*dim_axes(dim), *plan.storage)
    placements = dict(zip(mesh.axes, placements_of(plan), strict=True))
    owners: Counter[int] = Counter()
    for coordinate in mesh.coordinates():
        held = torch.tensor(positions(dim, coordinate, mesh.shape))
        for axis in plan.storage:
            chunks = [*held.chunk(mesh[axis]), *[held[:0]] * mesh[axis]]
            held = chunks[coordinate[axis]]
        rows = local_index(plan, coordinate, mesh)[0]
        assert rows.tolist() == held.tolist()
        assert stored_shape(plan, coordinate, mesh)[0] == len(held)
        owners.update(rows.tolist())
        for axis in axes:
            if isinstance(placements[axis], RankMajor):
                assert placements[axis].rows(coordinate, mesh).tolist() == held.tolist()
            else:
                assert torchs_rows(placements_of(plan), 0, length, coordinate, mesh.axes, mesh) == held.tolist()
    assert set(owners) == set(range(length))
    assert set(owners.values()) == {mesh.world // prod(mesh[axis] for axis in axes)}


def test_a_rank_major_placement_is_a_value_that_torch_takes_for_no_shard():
    one, two = (RankMajor(0, (2, "tp", 3), ("fsdp",)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != RankMajor(0, (2, "tp", 3), ())
    assert one != Shard(0)
    assert not one.is_shard()
    assert not one.is_replicate()
    assert not one.is_partial()
    assert repr(one) == "RankMajor(dim=0, 2.tp.3, stored over fsdp)"


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
def test_uneven_rows_are_stored_as_fully_shard_pads_them(rows, degree):
    """FSDP2 stores chunk i of `torch.chunk(rows, degree)`, nothing where there are fewer chunks."""
    mesh = Mesh(fsdp=degree)
    plan = a_plan(Layout((merge([rows]), (4,))), mesh, ("fsdp",) if degree > 1 else ())
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(degree)]
    chunks += [[]] * (degree - len(chunks))
    stored = [local_index(plan, coordinate, mesh)[0].tolist() for coordinate in mesh.coordinates()]
    assert stored == chunks
    assert [stored_shape(plan, c, mesh) for c in mesh.coordinates()] == [(len(chunk), 4) for chunk in chunks]


@pytest.mark.parametrize(
    ("digits", "storage", "placements"),
    [
        (("tp", 8), (), [Replicate(), Shard(0)]),
        ((16,), ("fsdp",), [Shard(0), Replicate()]),
        # V@(tp,fsdp): tp outside, though fsdp comes first in the mesh.
        (("tp", 8), ("fsdp",), [_StridedShard(0, split_factor=2), Shard(0)]),
        # (2 F@tp): a fused projection.
        ((2, "tp", 4), (), [Replicate(), _StridedShard(0, split_factor=2)]),
        (("fsdp", "tp", 4), (), [Shard(0), Shard(0)]),
    ],
)
def test_the_placements_of_known_layouts(digits, storage, placements):
    mesh = Mesh(fsdp=4, tp=2)
    assert list(placements_of(a_plan(Layout((digits,)), mesh, storage))) == placements


def test_a_layout_without_axes_is_replicated_on_every_one():
    mesh = Mesh(dp=2, tp=2)
    assert placements_of(a_plan(Layout(((6,), ())), mesh)) == (Replicate(), Replicate())


# How `ss.full` puts shards together


@given(length=st.integers(0, 40), count=st.integers(1, 9), factor=st.integers(1, 5))
def test_split_rows_gives_each_rank_what_torch_splits_off(length, count, factor):
    """Law: the positions are those of torch's own `_split_tensor`, even or not, plain or strided."""
    for placement in (Shard(0), _StridedShard(0, split_factor=factor)):
        expected = torchs_split(placement, torch.arange(length), count)
        assert [rows.tolist() for rows in split_rows(placement, length, count)] == [rows.tolist() for rows in expected]


@given(length=st.integers(0, 40), count=st.integers(1, 9), factor=st.integers(1, 5))
def test_split_rows_puts_every_row_on_one_rank(length, count, factor):
    """Law: the parts are disjoint and make up the dim."""
    parts = split_rows(_StridedShard(0, split_factor=factor), length, count)
    assert sorted(torch.cat(parts).tolist()) == list(range(length))


@given(stored(), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_the_parts_of_a_parameter_make_it_up_again(case, seed):
    """Law: undoing each mesh dim's `split_rows`, the last first, gives back the tensor whose parts were stored."""
    plan, mesh = case
    whole = torch.arange(prod(plan.shape)).reshape(plan.shape)
    parts = {}
    for coordinate in mesh.coordinates():
        held = whole
        for dim, rows in enumerate(local_index(plan, coordinate, mesh)):
            held = held.index_select(dim, rows)
        parts[tuple(coordinate[axis] for axis in mesh.axes)] = held
    placements = placements_of(plan)
    for position in reversed(range(len(mesh.axes))):
        parts = joined(parts, placements, position, plan.shape, mesh)
    assert len(parts) == 1
    assert torch.equal(parts[()], whole)


def joined(parts: dict, placements: Sequence[Placement], position: int, shape: Sequence[int], mesh: Mesh) -> dict:
    """The parts with one mesh dim gathered, as runtime/gather.py does it."""
    out = {}
    for place in {key[:position] for key in parts}:
        group = [parts[(*place, index)] for index in range(mesh[mesh.axes[position]])]
        placement = placements[position]
        if isinstance(placement, Replicate):
            assert all(torch.equal(one, group[0]) for one in group)
            out[place] = group[0]
            continue
        coordinate = dict(zip(mesh.axes, place, strict=False))
        known = mesh.axes[:position]
        length = len(torchs_rows(placements, placement.dim, shape[placement.dim], coordinate, known, mesh))
        every = split_rows(placement, length, len(group))
        whole = group[0].new_empty((*group[0].shape[: placement.dim], length, *group[0].shape[placement.dim + 1 :]))
        for rows, held in zip(every, group, strict=True):
            whole.index_copy_(placement.dim, rows, held)
        out[place] = whole
    return out


def test_the_mesh_order_is_the_one_that_placements_count_by():
    """An axis that a placement counts as later must be minor in rank order."""
    rng = Random(0)
    for _ in range(20):
        mesh = Mesh(**a_mesh(rng))
        assert [AXES.index(axis) for axis in mesh.axes] == sorted(AXES.index(axis) for axis in mesh.axes)
