"""The mesh: sizes of six axes, rank order, and every mistake in them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.diagnostics import ShardingError
from shardspec.mesh import AXES, BATCH_AXES, Mesh, degree

SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})


def refused(code: str, *words: str):
    """A context in which one diagnostic is raised, with a code and words in its text."""
    return pytest.raises(ShardingError, match="(?s)" + ".*".join([rf"error\[{code}\]", *words]))


def test_absent_axes_have_size_one():
    mesh = Mesh(fsdp=2, tp=4)
    assert mesh.sizes == (1, 1, 2, 1, 1, 4)
    assert (mesh["pp"], mesh["fsdp"], mesh["tp"]) == (1, 2, 4)
    assert mesh.axes == ("fsdp", "tp")
    assert mesh.shape == {"fsdp": 2, "tp": 4}
    assert mesh.world == 8


def test_a_mesh_of_one_rank_has_no_axes():
    assert Mesh() == Mesh(tp=1) == Mesh.parse("")
    assert Mesh().axes == ()
    assert Mesh().world == 1
    assert [dict(place) for place in Mesh().coordinates()] == [dict.fromkeys(AXES, 0)]


def test_meshes_are_values():
    assert Mesh(tp=2) == Mesh(tp=2) != Mesh(cp=2)
    assert len({Mesh(tp=2), Mesh(dp=1, tp=2)}) == 1
    assert eval(repr(Mesh(fsdp=2, tp=2))) == Mesh(fsdp=2, tp=2)


@given(SIZES)
def test_ranks_count_along_the_axes_outermost_first(sizes):
    """Law: rank order is the row-major order of the coordinates pp, dp, fsdp, ep, cp, tp."""
    mesh = Mesh(**sizes)
    expected = list(itertools.product(*(range(sizes[axis]) for axis in ("pp", "dp", "fsdp", "ep", "cp", "tp"))))
    assert [tuple(place[axis] for axis in AXES) for place in mesh.coordinates()] == expected
    assert [mesh.coordinate(rank) for rank in range(mesh.world)] == list(mesh.coordinates())


def test_neighbours_along_tp_are_neighbours_in_rank():
    mesh = Mesh(dp=2, tp=2)
    assert [(mesh.coordinate(rank)["dp"], mesh.coordinate(rank)["tp"]) for rank in range(4)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


@given(SIZES)
def test_text_and_back(sizes):
    """Law: parse(str(mesh)) is the mesh."""
    mesh = Mesh(**sizes)
    assert Mesh.parse(str(mesh)) == mesh


@pytest.mark.parametrize("text", ["fsdp=2,tp=3", " tp = 3 , fsdp=2 ", "tp=3,fsdp=2,dp=1,"])
def test_parse_allows_any_order_and_spaces(text):
    assert Mesh.parse(text) == Mesh(fsdp=2, tp=3)


def test_replace_changes_the_axes_named_only():
    assert Mesh(fsdp=2, tp=4).replace(tp=1, cp=3) == Mesh(fsdp=2, cp=3)


def test_degree_is_the_product_of_sizes():
    assert degree(Mesh(fsdp=2, tp=3), ("fsdp", "tp", "dp")) == 6
    assert degree(Mesh(fsdp=2), ()) == 1


def test_the_batch_axes_are_those_whose_ranks_read_other_rows():
    assert BATCH_AXES == ("dp", "fsdp", "ep")


# auto


def test_auto_takes_what_the_world_leaves():
    assert Mesh(fsdp="auto", tp=2, world=16) == Mesh(fsdp=8, tp=2)
    assert Mesh.parse("fsdp=auto,tp=2", world=16) == Mesh(fsdp=8, tp=2)
    assert Mesh(fsdp="auto", tp=4, world=4) == Mesh(tp=4)


def test_auto_reads_the_launchers_variable_and_the_argument_goes_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert Mesh(fsdp="auto", tp=2) == Mesh(fsdp=3, tp=2)
    assert Mesh(fsdp="auto", tp=2, world=8) == Mesh(fsdp=4, tp=2)


def test_without_auto_the_launchers_variable_is_no_matter(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert Mesh(tp=4).world == 4


def test_auto_without_a_world_is_an_error(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with refused("SS101", "fsdp is 'auto'", "neither world= nor the variable WORLD_SIZE"):
        Mesh(fsdp="auto")


def test_two_autos_are_an_error():
    with refused("SS101", "two axes are 'auto': fsdp, tp"):
        Mesh(fsdp="auto", tp="auto", world=4)


@pytest.mark.parametrize("text", ["many", "", "-2", "0"])
def test_a_world_size_that_is_none_is_an_error(text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", text)
    with refused("SS101", "WORLD_SIZE"):
        Mesh(fsdp="auto")


# Mistakes


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", None, True])
def test_a_size_is_a_whole_number_of_at_least_one(size):
    with refused("SS101", "mesh axis tp has size", "a whole number of at least 1"):
        Mesh(tp=size)


def test_a_world_that_the_sizes_do_not_make_up_is_an_error():
    with refused("SS102", "the mesh holds 4 ranks, the world 8", "fsdp=2 x tp=2 = 4"):
        Mesh(fsdp=2, tp=2, world=8)
    with refused("SS102", "do not divide a world of 8", "tp=3 = 3; 8 / 3 is not whole, so fsdp has no size"):
        Mesh(fsdp="auto", tp=3, world=8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpp=2", "'tpp=2' is not axis=size"),
        ("tp", "'tp' is not axis=size"),
        ("tp:2", "'tp:2' is not axis=size"),
        ("tp=2,tp=2", "tp is given twice"),
        ("tp=two", "'two' is not a size"),
        ("tp=-2", "'-2' is not a size"),
        ("tp=2.0", "'2.0' is not a size"),
        ("tp=", "'' is not a size"),
        ("tp=0", "mesh axis tp has size 0"),
    ],
)
def test_text_that_is_no_mesh_is_an_error(text, words):
    with refused("SS101", words):
        Mesh.parse(text)


def test_an_unknown_axis_is_an_error_of_python():
    with pytest.raises(TypeError, match="sp"):
        Mesh(sp=2)
