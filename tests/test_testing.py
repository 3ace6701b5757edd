"""The kit for users' tables: parity by threads, and what it finds; totality, goldens, strategies."""

import copy
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import attrs
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import FSDPModule

import shardspec as ss
from models import gpt2, llama
from shardspec import testing
from shardspec.runtime import attach, boundary, sharded, step
from shardspec.testing import ParityError, RanksLateError, assert_parity, assert_total, golden, layouts, meshes, shapes
from shardspec.testing.simulate import positions
from shardspec.testing.threads import run_ranks
from tests.distributed import parity

BATCH = parity.make_batch(0)
TOKENS = {"tokens": BATCH["tokens"]}
SQUARE = ss.Mesh(fsdp=2, tp=2)
GPT2 = gpt2.GPT2Config(
    dim=24, n_layers=2, n_heads=8, head_dim=4, ffn_dim=40, vocab_size=40, max_seq_len=11, dropout=0.1
)


def untied() -> nn.Module:
    return llama.build(parity.make_config(tied=False))


def tied() -> nn.Module:
    return llama.build(parity.make_config(tied=True))


def dropping() -> nn.Module:
    return gpt2.build(GPT2)


def is_clean() -> bool:
    """Whether nothing of a run is left in the process."""
    ranks = [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    return not dist.is_initialized() and not ranks and gc.isenabled() and torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True)
def _clean():
    assert is_clean()
    yield
    assert is_clean()


# Parity, where there is parity.


@pytest.mark.parametrize("mesh", ["", "dp=2", "fsdp=2,tp=2", "tp=4", "dp=2,fsdp=2,tp=2"])
@pytest.mark.parametrize("build", [untied, tied])
def test_the_llama_has_parity(build, mesh):
    assert_parity(build, llama.RULES, ss.Mesh.parse(mesh), BATCH, parity.loss_fn)


@pytest.mark.parametrize("rules", [llama.RULES, llama.WITHOUT_SP], ids=["sp", "no sp"])
@pytest.mark.parametrize("mesh", ["", "fsdp=2,tp=2"])
def test_the_llama_has_parity_without_a_loss(rules, mesh):
    assert_parity(untied, rules, ss.Mesh.parse(mesh), TOKENS)


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=2", "fsdp=3"])
def test_dropout_has_parity(mesh):
    batch = {name: item[:12] for name, item in BATCH.items()}
    assert_parity(dropping, gpt2.RULES, ss.Mesh.parse(mesh), batch, parity.loss_fn)


def test_microbatches_and_rematerialisation_have_parity():
    policy = ss.Policy(accumulate=2, remat=True)
    assert_parity(untied, llama.RULES, SQUARE, BATCH, parity.loss_fn, policy=policy)
    with pytest.raises(ValueError, match="microbatches need a loss_fn"):
        assert_parity(untied, llama.RULES, SQUARE, TOKENS, policy=policy)


class Several(nn.Module):
    """Two outputs in a dict beside one of integers, a row-parallel product, a buffer that forward writes, a frozen
    layer, and a Python counter."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 4, bias=False)
        self.still = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.register_buffer("runs", torch.zeros(3))
        self.seen = []

    def forward(self, x):
        self.runs += 1
        self.seen.append(len(self.seen))
        h = self.up(x).relu()
        return {"h": h, "y": self.down(h) + self.still(x), "top": x.argmax(-1)}


SEVERAL = ss.Rules(
    params={r"up\.weight": "F@tp D", r"down\.weight": "D F@tp", r"still\.weight": "D E", "runs": "R"},
    activations={"x": "B@dp D", "down": "B@dp D"},
)


def test_all_floating_outputs_make_the_loss_and_written_buffers_are_compared(monkeypatch):
    x = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    assert_parity(Several, SEVERAL, ss.Mesh(dp=2, tp=2), x)
    monkeypatch.setattr(sharded.Sharded, "init", forgetful(sharded.Sharded.init))
    with pytest.raises(ParityError, match="buffer runs"):
        assert_parity(Several, SEVERAL, ss.Mesh(dp=2, tp=2), x)


def forgetful(init: Callable) -> Callable:
    """Buffers begin at five."""

    def wrong(self, *args, **kwargs):
        for buffer in self.buffers.values():
            buffer.fill_(5)
        return init(self, *args, **kwargs)

    return wrong


def test_a_module_that_is_given_is_left_as_it_was():
    model = Several().train()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert_parity(model, SEVERAL, ss.Mesh(tp=2), {"x": torch.ones(2, 4)})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    assert model.seen == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert next(model.parameters()).dtype == torch.float32


# Planted bugs: each must be told of, by the names of the parameters that it spoils.


def wrong_in(build: Callable, rules: ss.Rules, mesh: ss.Mesh, batch=BATCH) -> ParityError:
    with pytest.raises(ParityError) as caught:
        assert_parity(build, rules, mesh, batch, parity.loss_fn)
    return caught.value


def names_in(error: ParityError, kind: str) -> set[str]:
    return {each.what.removeprefix(kind) for each in error.differences if each.what.startswith(kind)}


def change_backward(monkeypatch, change: Callable) -> list:
    """Have the backward of every declared point run other moves; returns those that were changed, as they run."""
    real = boundary._Transition.backward
    changed = []

    def backward(ctx, grad):
        moves = tuple(new for move in ctx.moves for new in change(move))
        changed.extend(move for move in ctx.moves if move not in moves)
        ctx.moves = moves
        return real(ctx, grad)

    monkeypatch.setattr(boundary._Transition, "backward", staticmethod(backward))
    return changed


def test_an_adjoint_that_does_not_sum_is_seen(monkeypatch):
    changed = change_backward(
        monkeypatch, lambda move: [attrs.evolve(move, kind="slice") if move.kind == "reduce_scatter" else move]
    )
    error = wrong_in(untied, llama.RULES, ss.Mesh(tp=2))
    assert changed
    assert "loss" not in names_in(error, "")
    assert {"tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight"} <= names_in(error, "gradient of ")
    assert "output.weight" not in names_in(error, "gradient of ")  # nothing lies between it and the loss


def test_a_missing_all_reduce_of_the_backward_is_seen(monkeypatch):
    changed = change_backward(monkeypatch, lambda move: [move] if move.kind != "all_reduce" else [])
    error = wrong_in(untied, llama.WITHOUT_SP, ss.Mesh(tp=2))
    assert changed
    assert "loss" not in names_in(error, "")
    assert {"tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight"} <= names_in(error, "gradient of ")
    assert "output.weight" not in names_in(error, "gradient of ")
    assert "models/llama/rules.py:" in str(error)
    assert r'norm)\.weight": "D@fsdp"' in str(error)


def test_a_gradient_that_fsdp_divides_is_seen_with_its_factor(monkeypatch):
    real = FSDPModule.set_gradient_divide_factor
    monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, _: real(self, 2.0))
    error = wrong_in(untied, llama.RULES, ss.Mesh(fsdp=2))
    assert names_in(error, "gradient of ") == {name for name, _ in untied().named_parameters()}
    assert [each.ratio for each in error.differences if each.rule] == [pytest.approx(0.5)] * 21
    assert "0.5 times it everywhere" in str(error)


def test_an_owed_sum_that_is_forgotten_is_seen_in_the_norms_alone(monkeypatch):
    monkeypatch.setattr(step, "reduce_owed", lambda *_: None)
    error = wrong_in(untied, llama.RULES, SQUARE)
    norms = {name for name, _ in untied().named_parameters() if name.endswith("norm.weight")}
    assert names_in(error, "gradient of ") == norms


def test_a_bias_counted_on_each_rank_is_seen(monkeypatch):
    monkeypatch.setattr(attach._Share, "forward", staticmethod(lambda ctx, tensor, share: tensor * 1.0))
    error = wrong_in(lambda: gpt2.build(GPT2), gpt2.RULES, ss.Mesh(tp=2))
    assert "loss" in names_in(error, "")
    assert any(name.endswith("c_proj.bias") for name in names_in(error, "gradient of "))


def test_dropout_by_local_index_is_seen(monkeypatch):
    def local(self, entry, shape, device):
        return torch.arange(shape.numel()).reshape(shape)

    monkeypatch.setattr(attach.Wiring, "_global_index", local)
    assert "loss" in names_in(wrong_in(dropping, gpt2.RULES, ss.Mesh(dp=2)), "")


def test_what_one_rank_alone_does_wrong_is_seen_there(monkeypatch):
    real = sharded.Sharded.value_and_grad

    def wrong(self, loss_fn):
        grad_fn = real(self, loss_fn)

        def spoilt(params, batch, rng=0):
            value, grads = grad_fn(params, batch, rng)
            if self.fabric.rank == 3:
                grads["layers.1.attention.wo.weight"].to_local()[2, 5] += 1e-6
            return value, grads

        return spoilt

    monkeypatch.setattr(sharded.Sharded, "value_and_grad", wrong)
    (found,) = wrong_in(untied, llama.RULES, SQUARE).differences
    assert (found.what, found.rank) == ("gradient of layers.1.attention.wo.weight", 3)
    # wo is (18, 8 heads of 4): the rank of fsdp=1, tp=1 holds rows from 9 and columns from 16.
    assert found.index == (9 + 2, 16 + 5)
    assert found.size == pytest.approx(1e-6, rel=1e-6)
    assert found.ours - found.plain == pytest.approx(1e-6, rel=1e-6)


def test_a_norm_that_counts_shards_once_too_often_is_seen_in_the_step_alone(monkeypatch):
    monkeypatch.setattr(step, "sharing_degree", lambda *_: 1)
    error = wrong_in(untied, llama.RULES, ss.Mesh(dp=2))
    assert "norm of the gradients" in names_in(error, "")
    assert not names_in(error, "gradient of ")
    assert "output.weight" in names_in(error, "updated ")


def test_a_bias_of_zeros_is_moved_so_that_it_hides_nothing(monkeypatch):
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            nn.init.zeros_(self.a.bias)

        def forward(self, x):
            return self.a(x)

    rules = ss.Rules(params={r"a\.weight": "D F@tp", r"a\.bias": "D +tp"}, activations={"x": "B F@tp", "a": "B D"})
    x = {"x": torch.randn(2, 4)}
    assert_parity(Zeros, rules, ss.Mesh(tp=2), x)
    monkeypatch.setattr(attach._Share, "forward", staticmethod(lambda ctx, tensor, share: tensor * 1.0))
    with pytest.raises(ParityError, match="loss"):
        assert_parity(Zeros, rules, ss.Mesh(tp=2), x)


def test_a_difference_as_small_as_a_rounding_is_said_to_be_one():
    def error(size: float) -> str:
        found = testing.Difference(what="loss", size=size, relative=9.0, rank=0, ours=2.0 + size, plain=2.0)
        return str(ParityError(SQUARE, (found,)))

    assert "tolerance=1e-5" in error(1e-7)
    assert "tolerance=1e-5" not in error(1e-3)


# What says nothing, or cannot run.


def test_a_plain_program_with_which_all_would_agree_is_an_error():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.a(x) * 0

    rules = ss.Rules(params={r"a\.weight": "E D"}, activations={"x": "B@dp D"})
    with pytest.raises(ValueError, match="gradients are all zero"):
        assert_parity(Flat, rules, ss.Mesh(dp=2), {"x": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="loss is nan"):
        assert_parity(Flat, rules, ss.Mesh(dp=2), {"x": torch.full((2, 4), float("nan"))})


def test_what_the_compiler_refuses_is_refused_as_it_does():
    wrong = llama.RULES.override(drop=[r"output\.weight"])
    with pytest.raises(ss.ShardingError) as compiled:
        ss.compile(untied, wrong, SQUARE, BATCH)
    with pytest.raises(ss.ShardingError) as asserted:
        assert_parity(untied, wrong, SQUARE, BATCH, parity.loss_fn)
    assert [str(each) for each in asserted.value.diagnostics] == [str(each) for each in compiled.value.diagnostics]


def test_a_model_or_a_batch_without_values_is_an_error():
    with torch.device("meta"):
        hollow = untied()
    with pytest.raises(ss.ShardingError, match="SS406"):
        assert_parity(hollow, llama.RULES, SQUARE, BATCH, parity.loss_fn)
    with pytest.raises(ss.ShardingError, match="SS401"):
        assert_parity(untied, llama.RULES, SQUARE, {"tokens": BATCH["tokens"].to("meta")})


def test_a_process_of_a_world_is_told_to_be_alone(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ss.ShardingError, match="default process group"):
            assert_parity(untied, llama.RULES, SQUARE, BATCH, parity.loss_fn)
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ss.ShardingError, match="RANK and WORLD_SIZE are set"):
        assert_parity(untied, llama.RULES, SQUARE, BATCH, parity.loss_fn)


def test_an_error_in_the_model_on_a_rank_reaches_the_caller_at_once():
    class Falling(Several):
        def forward(self, x):
            if threading.current_thread().name == "rank 1" and x.device.type != "meta":
                raise LookupError("rank one falls")
            return super().forward(x)

    start = time.monotonic()
    with pytest.raises(LookupError, match="rank one falls") as caught:
        assert_parity(Falling, SEVERAL, ss.Mesh(dp=2, tp=2), {"x": torch.randn(4, 4)})
    assert caught.value.__notes__ == ["on rank 1 of 4"]
    assert time.monotonic() - start < 20


# Ranks as threads.


def test_two_calls_at_once_wait_for_each_other():
    failed = []

    def call():
        try:
            assert_parity(Several, SEVERAL, ss.Mesh(tp=2), {"x": torch.ones(2, 4)})
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed


def test_the_first_error_frees_the_ranks_that_wait():
    left = []

    def function(rank):
        if rank == 2:
            time.sleep(0.1)
            raise KeyError("two")
        try:
            dist.all_reduce(torch.ones(2))
        finally:
            left.append(rank)

    with pytest.raises(KeyError, match="two"):
        run_ranks(4, function, timeout=30)
    assert sorted(left) == [0, 1, 3]


def test_ranks_that_wait_for_one_that_has_left_are_ended_when_time_is_up():
    start = time.monotonic()
    with pytest.raises(RanksLateError, match=r"2 of 3 ranks not done after 0.5 s(.|\n)*all_reduce"):
        run_ranks(3, lambda rank: rank and dist.all_reduce(torch.ones(2)), timeout=0.5)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("world", [2, 8])
def test_ranks_meet_in_every_collective_that_the_runtime_uses(world):
    def function(rank):
        ones = torch.full((2,), float(rank))
        dist.all_reduce(ones)
        most = torch.tensor(float(rank))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        parts = torch.empty(world * 2)
        dist.all_gather_into_tensor(parts, torch.full((2,), float(rank)))
        mine = torch.empty(1)
        dist.reduce_scatter_tensor(mine, torch.arange(float(world)))
        swapped = torch.empty(world)
        dist.all_to_all_single(swapped, torch.arange(float(world)) + 10 * rank)
        objects = [None] * world
        dist.all_gather_object(objects, {"rank": rank})
        halves = [dist.new_group([*range(world // 2)]), dist.new_group([*range(world // 2, world)])]
        half = torch.ones(())
        dist.all_reduce(half, group=halves[rank * 2 // world])
        return ones.tolist(), float(most), parts.tolist(), mine.item(), swapped.tolist(), objects, float(half)

    total = world * (world - 1) / 2
    for rank, found in enumerate(run_ranks(world, function)):
        assert found == (
            [total, total],
            world - 1,
            [float(other) for other in range(world) for _ in range(2)],
            world * rank,
            [10.0 * other + rank for other in range(world)],
            [{"rank": other} for other in range(world)],
            world // 2,
        )


# Totality.


@pytest.mark.parametrize(
    ("rules", "build"),
    [(llama.RULES, untied), (llama.WITHOUT_SP, tied), (gpt2.RULES, dropping), (SEVERAL, Several)],
)
def test_the_tables_of_the_families_are_total(rules, build):
    assert_total(rules, build)
    assert_total(rules, build())


class Named(nn.Module):
    """An activation is named by `ss.name`, and another output has a key."""

    def __init__(self):
        super().__init__()
        self.block = Several()

    def forward(self, x):
        out = self.block(x)
        return ss.name(out["h"], "middle") + out["y"].sum()


NAMED = SEVERAL.override(drop=["x", "down", r"up\.weight", r"down\.weight", r"still\.weight", "runs"]).override(
    params={r"block\.(up|down|still)\.weight": ss.P(), r"block\.runs": "R"},
    activations={"x": "B D", "middle": "B D", r"block:out\.y": "B D", r"block:in\.x": "B D", "labels": "B"},
)


def test_names_that_only_a_run_tells_are_taken_in_the_rules_favour():
    assert_total(NAMED, Named)
    assert_total(NAMED.override(activations={r"block\.elsewhere": "B D"}), Named, names=["block.elsewhere"])


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("SS202", {"drop": [r"output\.weight"]}),
        ("SS203", {"params": {r"outptu\.weight": "V D"}}),
        ("SS204", {"params": {r"output\..*": "V D"}}),
        ("SS205", {"params": {r"output\.weight": "V"}}),
        ("SS203", {"activations": {r"layers\.\d+\.atention": "B S D"}}),
        ("SS203", {"activations": {r"layers\.\d+\.attention\.qq": "B S D"}}),
        ("SS204", {"activations": {r"layers\.0": "B S D"}}),
        ("SS211", {"units": [r"layer\.\d+"]}),
        ("SS211", {"attributes": {r"layer\.\d+": {"n_heads": "H"}}}),
        ("SS103", {"params": {r"output\.weight": "V@ D"}}),
    ],
)
def test_a_table_that_does_not_cover_the_model_is_refused_without_a_mesh_or_a_batch(code, changes):
    for kind in (ss.ShardingError, AssertionError):
        with pytest.raises(kind, match=code):
            assert_total(llama.RULES.override(**changes), untied)


def test_every_mistake_is_told_at_once():
    wrong = llama.RULES.override(
        drop=[r"output\.weight"], units=["nowhere"], activations={r"layers\.\d+\.nothing": "B S D"}
    )
    with pytest.raises(testing.NotTotalError) as caught:
        assert_total(wrong, untied)
    assert [each.code for each in caught.value.diagnostics] == ["SS202", "SS203", "SS211"]


# Goldens.


def test_a_golden_says_what_runs_and_nothing_of_this_machine():
    plan = ss.compile(untied, llama.RULES, SQUARE, BATCH, parity.loss_fn)
    text = golden(plan)
    assert text == golden(ss.compile(untied(), llama.RULES.override(), SQUARE, BATCH, parity.loss_fn))
    assert ".py" not in text
    assert "torch" not in text
    assert "0x" not in text
    assert '  layers.*.attention.wo.weight: "D@fsdp (H@tp hd)" [18, 32] float32, [9, 16] on a rank' in text
    assert "  layers.*.attention: [8@fsdp, 8, 18] +tp -> [8@fsdp, 4@tp, 18] float32  (x 2)" in text
    assert "  tp | H = 8" in text
    # Without sequence parallelism another layout and other collectives.
    assert golden(ss.compile(untied, llama.WITHOUT_SP, SQUARE, BATCH, parity.loss_fn)) != text


def test_a_golden_of_a_plan_read_from_a_file_is_the_same():
    plan = ss.compile(dropping, gpt2.RULES, SQUARE, BATCH, parity.loss_fn)
    assert golden(ss.Plan.from_json(plan.to_json())) == golden(plan)


# Strategies.

PLAN = ss.compile(untied, llama.RULES, ss.Mesh(), BATCH, parity.loss_fn)
LEGAL = meshes(PLAN)


@settings(max_examples=15)
@given(LEGAL)
def test_a_mesh_that_is_drawn_passes_the_check(mesh):
    assert mesh.world <= 8
    ss.compile(untied, llama.RULES, mesh, BATCH, parity.loss_fn)


def test_every_legal_mesh_can_be_drawn():
    drawn = set()

    @settings(max_examples=300, database=None)
    @given(LEGAL)
    def draw(mesh):
        drawn.add(mesh)

    draw()
    # dp, fsdp and tp in 1, 2, 4, 8: rows, vocabulary and heads divide by all; no dim divides by 3.
    assert {str(mesh) for mesh in drawn if mesh["pp"] == 1} == set(parity.all_meshes())
    # Two layers, and half of the ranks for each.
    halves = {mesh for mesh in parity.all_meshes() if ss.Mesh.parse(mesh).world <= 4}
    assert {str(mesh.replace(pp=1)) for mesh in drawn if mesh["pp"] > 1} == halves


@settings(max_examples=150)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12]), max_size=3),
    mesh=st.sampled_from([ss.Mesh(), ss.Mesh(tp=2), ss.Mesh(fsdp=2, tp=4), ss.Mesh(dp=2, fsdp=3, tp=2)]),
    data=st.data(),
)
def test_a_layout_that_is_drawn_gives_every_element_to_as_many_ranks(shape, mesh, data):
    layout = data.draw(layouts(shape, mesh))
    used = [axis for dim in layout.dims for axis in dim if isinstance(axis, str)] + [axis for axis, _ in layout.pending]
    assert len(used) == len(set(used))
    assert set(used) <= set(mesh.axes)
    for dim, length in zip(layout.dims, shape, strict=True):
        axes = [axis for axis in dim if isinstance(axis, str)]
        held = [at for place in mesh.coordinates() for at in positions(dim, place, mesh.shape)]
        share = mesh.world
        for axis in axes:
            share //= mesh[axis]
        assert sorted(held) == sorted(list(range(length)) * share)


def test_a_layout_may_stand_inside_a_dim_and_be_pending():
    drawn = set()

    @settings(max_examples=300, database=None)
    @given(layouts((4,), ss.Mesh(tp=2)))
    def draw(layout):
        drawn.add(str(layout))

    draw()
    assert drawn == {"[4]", "[2@tp]", "[2.tp]", "[4] +tp"}


@settings(max_examples=20)
@given(shape=shapes(PLAN, ss.Mesh(dp=2, fsdp=4), most=3))
def test_the_rows_of_a_batch_that_is_drawn_divide_over_the_data_ranks(shape):
    rows = shape["tokens"][0]
    assert rows in (8, 16, 24)
    assert shape == {"tokens": (rows, 8), "labels": (rows, 8)}
    batch = {name: torch.empty(size, dtype=torch.long) for name, size in shape.items()}
    ss.compile(untied, llama.RULES, ss.Mesh(dp=2, fsdp=4), batch)


@settings(max_examples=5)
@given(mesh=LEGAL, seed=st.integers(0, 1000))
def test_parity_runs_under_hypothesis(mesh, seed):
    draw = random.Random(seed)
    batch = {name: torch.tensor([[draw.randrange(40) for _ in range(8)] for _ in range(16)]) for name in BATCH}
    assert_parity(untied, llama.RULES, mesh, batch, parity.loss_fn)


def test_a_plan_from_a_file_has_no_meshes_to_draw():
    with pytest.raises(ValueError, match="read from a file"):
        meshes(ss.Plan.from_json(PLAN.to_json())).validate()


def test_without_hypothesis_the_kit_imports_and_a_strategy_says_what_it_needs():
    script = """
import sys
sys.modules["hypothesis"] = None
import shardspec as ss
from shardspec.testing import assert_parity, assert_total, golden, verify_operator
for strategy in (lambda: ss.testing.meshes(None), lambda: ss.testing.layouts((2,), ss.Mesh()),
                 lambda: ss.testing.shapes(None, ss.Mesh())):
    try:
        strategy()
    except ImportError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.count("need hypothesis, which is not installed: pip install 'shardspec[testing]'") == 3
