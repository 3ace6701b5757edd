"""A plan as text and as a file, and two plans side by side."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attrs import evolve, fields

import shardspec as ss
from models import gpt2, llama, vit
from shardspec.amounts import Row, Term, Usage
from shardspec.constraints import Constraint
from shardspec.diagnostics import Location
from shardspec.layout import Layout
from shardspec.moves import Move
from shardspec.plan import (
    ActivationPlan,
    Collective,
    LossPlan,
    ParamPlan,
    Plan,
    PointPlan,
    Substitution,
    UnitPlan,
)
from shardspec.summary import itemsize, param_rows, size_text, stored, volumes

LLAMA = llama.LlamaConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=32, max_seq_len=16)
GPT2 = gpt2.GPT2Config(dim=16, n_layers=2, n_heads=4, vocab_size=32, max_seq_len=16, dropout=0.1)
VIT = vit.ViTConfig(dim=16, n_layers=2, n_heads=4, patch_size=4, image_size=8, n_classes=8)


def loss_fn(output: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return ss.cross_entropy(output, batch["labels"])


def plan_of(family: Any, config: Any, mesh: ss.Mesh, rules: ss.Rules | None = None, **options: Any) -> Plan:
    with torch.device("meta"):
        model = family.build(config)
    inputs = family.inputs(model, 8) if family is vit else family.inputs(8, 16)
    return ss.compile(model, rules or family.RULES, mesh, inputs, **options)


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan_of(llama, evolve(LLAMA, n_layers=1), ss.Mesh(fsdp=2, tp=2), loss=loss_fn)


PLANS = [
    (llama, LLAMA, ss.Mesh(), {}),
    (llama, LLAMA, ss.Mesh(fsdp=2, tp=2), {"loss": loss_fn}),
    (llama, evolve(LLAMA, tied=True), ss.Mesh(dp=2, fsdp=2), {}),
    (gpt2, GPT2, ss.Mesh(dp=2, tp=2), {"loss": loss_fn}),
    (vit, VIT, ss.Mesh(fsdp=2, tp=2), {}),
]


# As a file


@pytest.mark.parametrize(("family", "config", "mesh", "options"), PLANS)
def test_what_is_written_is_read_back_the_same(family, config, mesh, options):
    plan = plan_of(family, config, mesh, **options)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.hash == plan.hash
    assert str(again) == str(plan)
    assert plan.diff(again) == again.diff(plan) == ""


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value, lists and objects included."""
    yield path
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(item, (*path, key))


def kinds_of_place(tree: Any) -> list[tuple[Any, ...]]:
    """A path for each kind of place: the first among names and numbers that stand for one another."""
    first: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for path in leaves(tree):
        names = tuple(part if part in FIELDS else "*" for part in path)
        first.setdefault((names, type(at(tree, path))), path)
    return [path for path in first.values() if path]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def put(text: str, path: tuple[Any, ...], value: Any) -> str:
    tree = json.loads(text)
    at(tree, path[:-1])[path[-1]] = value
    return json.dumps(tree)


KINDS = (Plan, ParamPlan, ActivationPlan, Collective, PointPlan, Move, Substitution, UnitPlan, LossPlan, Layout)
FIELDS = {field.name for kind in (*KINDS, Constraint, Location, Usage, Row, Term) for field in fields(kind)} | {"usage"}


def test_a_value_of_another_kind_is_refused_wherever_it_stands(small):
    text = small.to_json()
    tree = json.loads(text)
    places = kinds_of_place(tree)
    assert len(places) > 60
    read: list[tuple[object, ...]] = []
    for path in places:
        now = at(tree, path)
        for other in (str(now), 7, 1.0, True, [], {}, ["x"], {"x": 1}, None):
            optional = now is None or (path[-1] in ("batch_dim", "layout", "before", "loss", "usage") and other is None)
            digit = path[-3:-2] == ("dims",) and type(other) in (int, str)
            if type(other) is not type(now) and not optional and not digit:
                try:
                    Plan.from_json(put(text, path, other))
                except ValueError:
                    continue
                read.append((path, now, other))
    assert not read


def test_a_change_of_any_value_is_a_difference_both_ways(small):
    text = small.to_json()
    tree = json.loads(text)
    for path in kinds_of_place(tree):
        now = at(tree, path)
        if path[0] in ("version", "mesh", "usage") or isinstance(now, (dict, list, type(None))):
            continue
        other = (not now) if isinstance(now, bool) else now + 1 if isinstance(now, int) else f"{now}x"
        if path[-1] == "phase":
            other = "step" if now != "step" else "forward"
        changed = Plan.from_json(put(text, path, other))
        assert changed != small
        assert small.diff(changed), path
        assert changed.diff(small), path
        assert changed.hash != small.hash


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plan", "this is no plan: "),
        ("3", "this is no plan: "),
        ('{"version": 1}', "this is no plan: "),
        ('{"version": 3}', "the plan has version 3, written by a newer shardspec; this one reads version 2"),
        ('{"version": 0, "mesh": {}}', "the plan has version 0, this shardspec reads version 2"),
        ('{"version": true, "mesh": {}}', "the plan has version True, this shardspec reads version 2"),
        ('{"version": 2, "mesh": {"data": 2}}', "the plan cannot be read: "),
        ("[" * 100_000, "this is no plan: "),
    ],
)
def test_a_text_that_is_no_plan_is_a_value_error_that_says_so(text, told):
    with pytest.raises(ValueError, match="^" + told):
        Plan.from_json(text)


def test_an_entry_that_is_unknown_is_refused_by_name(small):
    with pytest.raises(ValueError, match="sharps"):
        Plan.from_json(put(small.to_json(), ("sharps",), 3))


# Side by side


def test_a_difference_says_what_moved_and_what_it_costs():
    mesh = ss.Mesh(fsdp=2, tp=2)
    one = plan_of(llama, LLAMA, mesh)
    two = plan_of(llama, LLAMA, mesh, rules=llama.WITHOUT_SP)
    text = one.diff(two)
    rows = [line.split() for line in text.splitlines()]
    # 4 rows of 16 tokens, 16 wide, in float32: 4096 bytes; with SP a layer has 4 exchanges in forward and 4 in
    # backward, the embedding and the output one each; without, 2 all-reduces and 1.
    assert ["messages", "over", "tp,", "forward", "40.0", "KiB", "20.0", "KiB", "-20.0", "KiB", "(-50.0", "%)"] in rows
    assert ["activation", "layers.*", "2", "leaves", "[4@fsdp,", "8@tp,", "16]", "[4@fsdp,", "16,", "16]"] in rows
    assert ["parameter", "norm.weight", "1", "owed", "over", "fsdp,", "tp", "fsdp"] in rows
    assert "mesh:" not in text
    assert "parameters on a rank" not in text


def test_a_difference_of_meshes_begins_with_them_and_folds_layers():
    one = plan_of(llama, evolve(LLAMA, n_layers=2), ss.Mesh(fsdp=2))
    two = plan_of(llama, evolve(LLAMA, n_layers=2), ss.Mesh(fsdp=2, tp=2))
    text = one.diff(two)
    assert text.startswith("mesh: fsdp=2 -> fsdp=2,tp=2\n")
    assert "layers.0" not in text
    more = plan_of(llama, evolve(LLAMA, n_layers=9), ss.Mesh(fsdp=2))
    most = plan_of(llama, evolve(LLAMA, n_layers=9), ss.Mesh(fsdp=2, tp=2))
    assert len(more.diff(most).splitlines()) == len(text.splitlines())


def test_a_plan_is_compared_with_a_plan_only(small):
    with pytest.raises(TypeError, match="not with a str"):
        small.diff("plan.json")


# As text


def test_a_plan_of_many_layers_is_as_long_as_one_of_few_and_fits_a_screen():
    few = str(plan_of(llama, evolve(LLAMA, n_layers=2), ss.Mesh(fsdp=2, tp=2))).splitlines()
    many = str(plan_of(llama, evolve(LLAMA, n_layers=40), ss.Mesh(fsdp=2, tp=2))).splitlines()
    assert len(few) == len(many) < 100
    assert max(map(len, many)) <= 130
    assert not any(line != line.rstrip() for line in many)


def test_rows_stand_for_every_parameter_once(small):
    rows = param_rows(small)
    assert sum(row.count for row in rows) == len(small.params)
    assert {row.block for row in rows} == {"", "layers.*"}


def test_bytes_on_a_rank_are_those_of_the_shards():
    # Embedding and output 32 x 16, both over fsdp and tp; a layer has wq and wo 16 x 16, wk and wv 8 x 16, three of
    # 24 x 16 for the feed-forward; five norms of 16 are stored over fsdp alone. Float32; tables of 16 x 4 angles.
    matrices = 2 * 32 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16)
    plan = plan_of(llama, LLAMA, ss.Mesh(fsdp=2, tp=2))
    assert stored(plan).numbers == matrices // 4 + 5 * 16 // 2
    assert stored(plan).bytes == 4 * stored(plan).numbers
    assert stored(plan, buffers=True).bytes == 2 * 16 * 4 * 4


def test_a_tied_tensor_is_counted_once():
    tied, untied = (plan_of(llama, evolve(LLAMA, tied=tie), ss.Mesh(fsdp=2)) for tie in (True, False))
    assert stored(untied).numbers - stored(tied).numbers == 32 * 16 // 2


def test_volumes_add_up_to_the_collectives(small):
    found = volumes(small)
    for axes, by_phase in found.items():
        for phase, size in by_phase.items():
            rows = [row for row in small.collectives if (",".join(row.axes), row.phase) == (axes, phase)]
            assert size == sum(row.count * row.bytes for row in rows)
    assert sum(sum(each.values()) for each in found.values()) == sum(row.total_bytes for row in small.collectives)


def test_a_name_that_looks_like_markup_is_printed_as_it_is(small):
    param = small.params["norm.weight"]
    odd = evolve(small, params={"[red]x[/red]": evolve(param, first="[red]x[/red]", spec="[b]:smile:")})
    assert "[red]x[/red]" in str(odd)
    assert "[b]:smile:" in str(odd)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (102_298, "99.9 KiB"), (102_400, "100 KiB"),
        (1024**2 - 1, "1.0 MiB"), (1024**3, "1.0 GiB"), (1024**4, "1.0 TiB"), (5 * 1024**5, "5.0 PiB"),
        (5000 * 1024**5, "5000 PiB"), (-1536, "-1.5 KiB"),
    ],
)  # fmt: skip
def test_bytes_are_shown_in_the_unit_that_reads_best(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.complex64])
def test_a_dtypes_name_tells_its_bytes(dtype):
    assert itemsize(str(dtype)) == dtype.itemsize
    assert itemsize(str(dtype).removeprefix("torch.")) == dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_whose_name_has_more_digits_tells_its_bytes(dtype):
    assert itemsize(str(dtype)) == 1
