"""Packed projections: where the sizes of their parts come from, and what the plan keeps of them."""

import json
import types

import pytest

import shardspec as ss
from shardspec.layout import Layout, Sum
from shardspec.testing import assert_parity
from shardspec.testing.plain import written
from shardspec.units import attribute_sizes
from tests import fused
from tests.distributed.parity import make_batch

WEIGHT = "layers.0.attention.wqkv.weight"
ATTENTION = r"layers\.\d+\.attention"
PACKED = (Sum((("tp", 12), (2, "tp", 4))),)


def plan_of(rules: ss.Rules = fused.RULES, mesh: str = "tp=2", kind: type = fused.FusedAttention) -> ss.Plan:
    return ss.compile(lambda: fused.build(kind), rules, ss.Mesh.parse(mesh), make_batch(0))


UNTOLD = fused.RULES.override(
    params={r"layers\.\d+\.attention\.wo\.weight": "D@fsdp O@tp", r"rope_(cos|sin)": "T E"},
    attributes={ATTENTION: {"n_heads": "x@tp", "n_kv_heads": "y@tp"}},
)
"""No other rule tells a head's width, or how many there are."""


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"sizes": {"H": 6, "K": 2, "hd": 4}}, "all given"),
        ({"sizes": {"H": 6, "K": 2}}, "the width from the length: hd (H + 2 K) is 40"),
        ({"sizes": {"H": 6, "hd": 4}}, "the part that is twice from what the other leaves"),
        ({"sizes": {"K": 2, "hd": 4}}, "the first part from what the others leave"),
        ({"attributes": {ATTENTION: {"n_heads": "H@tp", "n_kv_heads": "K@tp"}}}, "from attributes"),
        ({"attributes": {ATTENTION: {"n_heads": "H@tp", "n_kv_heads": "y@tp"}}, "sizes": {"hd": 4}}, "from both"),
    ],
)
def test_the_sizes_of_parts_come_from_the_length_from_sizes_or_from_attributes(change, what):
    plan = plan_of(UNTOLD.override(**change))
    assert plan.params[WEIGHT].layout.dims[0] == PACKED, what


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"H": 6, "K": 2, "hd": 5}, "H is 6, hd is 5, K is 2: 50 does not fit the 40"),
        ({"H": 6, "K": 3}, "H is 6, K is 3: 12 does not fit the 40"),
        ({"H": 7, "hd": 4}, "H is 7, hd is 4: 28 and a multiple of 8 do not make up the 40"),
        ({"H": 10, "hd": 4}, "H is 10, hd is 4: 40 and a multiple of 8 do not make up the 40"),
    ],
)
def test_parts_that_do_not_make_up_their_dim_are_told(sizes, message):
    with pytest.raises(ss.ShardingError, match="do not make up 40") as caught:
        plan_of(UNTOLD.override(sizes=sizes))
    assert message in str(caught.value)


def test_only_an_attribute_with_one_number_in_every_module_tells_a_size():
    names = {"n": "H@tp", "wide": "(H@tp hd)", "m": "K@tp", "text": "T"}
    rules = ss.Rules(params={}, attributes={r"layers\.\d+": names, "head": {"n": "V"}})
    modules = {f"layers.{index}": types.SimpleNamespace(n=6, wide=24, m=index, text="no") for index in range(2)}
    assert attribute_sizes(rules, {**modules, "other": types.SimpleNamespace(n=9)}) == {"H": 6}


def test_equal_parts_are_the_same_layout_however_they_are_written():
    weight = r"layers\.\d+\.feed_forward\.w13\.weight"
    one, two = (
        plan_of(fused.RULES.override(params={weight: spec})) for spec in ("(F@tp + F@tp)@fsdp D", "(2 F@tp)@fsdp D")
    )
    name = "layers.0.feed_forward.w13.weight"
    assert one.params[name].layout == two.params[name].layout
    assert one.params[name].layout.dims[0] == (2, "tp", 12)


@pytest.mark.parametrize("mesh", ["", "tp=2", "fsdp=2,tp=2"])
def test_a_plan_with_direct_sums_is_read_back_as_it_was_written(mesh):
    rules = fused.RULES.override(
        activations={
            r"layers\.\d+\.attention\.qkv": "B@(dp,fsdp) S@cp (H hd + K hd + K hd)",
            r"layers\.\d+\.attention\.again": "B@(dp,fsdp) S@cp (H@tp hd + K@tp hd + K@tp hd)",
        }
    )
    plan = plan_of(rules, mesh, fused.NamedAttention)
    read = ss.Plan.from_json(plan.to_json())
    assert read == plan
    assert read.hash == plan.hash
    assert read.params[WEIGHT].placements == plan.params[WEIGHT].placements
    assert plan.diff(read) == ""
    assert json.loads(plan.to_json())["params"][WEIGHT]["layout"]["dims"][0] == (
        [{"parts": [["tp", 12], [2, "tp", 4]]}] if "tp" in mesh else [40]
    )


def test_a_plan_prints_and_compares_direct_sums():
    split, whole = plan_of(), plan_of(mesh="")
    assert "(H@tp hd + K@tp hd + K@tp hd)@fsdp D" in str(split)
    assert "[(12@tp + 4@tp + 4@tp), 18]" in whole.diff(split)


def test_the_smallest_part_says_which_meshes_are_legal():
    plan = plan_of()
    assert ("tp",) in [fact.axes for fact in plan.constraints]
    assert min(fact.number for fact in plan.constraints if fact.axes == ("tp",)) == 2
    assert {mesh.get("tp", 1) for mesh in (dict(mesh.shape) for mesh in plan.legal_meshes(4))} == {1, 2}


def test_the_testing_kit_knows_direct_sums():
    layout = Layout((("dp", 4), PACKED))
    text, sizes = written(layout, ss.Mesh(dp=2, tp=2), "x")
    assert text == "x0@(dp) (x1@(tp) + x2 x3@(tp))"
    assert sizes == {"x0": 8, "x1": 24, "x2": 2, "x3": 8}
    assert_parity(fused.build, fused.RULES, ss.Mesh(tp=2), make_batch(0))
