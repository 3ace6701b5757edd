"""`plan.memory`: formulas against plans of other meshes, published sizes, and what torch itself keeps for backward."""

import functools
import itertools
import re

import attrs
import pytest
import sympy
import torch
from torch.autograd.graph import saved_tensors_hooks

import shardspec as ss
from models.llama import PRESETS, RULES, WITHOUT_SP, LlamaConfig, build
from shardspec.compiler import Compiler
from shardspec.survey import survey

SMALL = attrs.evolve(PRESETS["debug"], n_layers=3)


def loss_fn(output, batch):
    return ss.cross_entropy(output, batch["labels"])


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    return {name: torch.empty(rows, length, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def compiler_of(config: LlamaConfig, rules: ss.Rules = RULES, policy: ss.Policy | None = None) -> Compiler:
    with torch.device("meta"):
        return Compiler(survey(build(config)), rules, policy or ss.Policy())


@functools.cache
def plan_of(mesh: str = "fsdp=2,tp=2", policy: ss.Policy | None = None, layers: int = 3) -> ss.Plan:
    config = attrs.evolve(SMALL, n_layers=layers)
    return compiler_of(config, policy=policy).plan(ss.Mesh.parse(mesh), batch_of(16, 64), loss_fn)


@pytest.mark.parametrize(
    ("rules", "policy", "tied", "worlds"),
    [
        (RULES, ss.Policy(), False, (2, 4, 8, 16)),
        (WITHOUT_SP, ss.Policy(remat=r"layers\.\d+", accumulate=2), True, (2, 4, 8)),
    ],
    ids=["as it is", "no SP, remat, two microbatches, tied"],
)
def test_the_formulas_of_a_plan_give_the_bytes_of_the_plans_of_all_meshes_with_the_same_axes(
    rules, policy, tied, worlds
):
    compiler, inputs = compiler_of(attrs.evolve(SMALL, tied=tied), rules, policy), batch_of(16, 64)
    legal = [mesh for world in worlds for mesh in compiler.legal_meshes(world, inputs, loss_fn)]
    plans = {mesh: compiler.plan(mesh, inputs, loss_fn) for mesh in legal}
    pairs = [(one, two) for one, two in itertools.permutations(legal, 2) if one.axes == two.axes]
    assert len(pairs) >= 24
    for one, two in pairs:
        foretold, own = plans[one].memory().at(two), plans[two].memory().at(two)
        assert dict(foretold) == dict(own), (one, two)
        assert (foretold.total, foretold.resident, foretold.moment) == (own.total, own.resident, own.moment)


def test_the_parameters_of_the_405b_model_are_the_rows_that_each_rank_stores():
    mesh, config = ss.Mesh(fsdp=2048, tp=8), PRESETS["405b"]
    plan = compiler_of(config).plan(mesh, batch_of(4096, 8192), loss_fn)
    # dim 0 after tp, other dims after tp; fsdp divides what is left of dim 0, rounded up
    split = {
        r".*(wq|wk|wv|w1|w3)\.weight|tok_embeddings\.weight|output\.weight": (8, 1),
        r".*(wo|w2)\.weight": (1, 8),
        r".*norm\.weight": (1, 1),
    }
    expected = 0
    with torch.device("meta"):
        for name, parameter in build(config).named_parameters():
            first, second = next(shares for pattern, shares in split.items() if re.fullmatch(pattern, name))
            rows, *rest = parameter.shape
            expected += -(-rows // first // 2048) * (rest[0] // second if rest else 1) * 4
    memory = plan.memory(optimizer="adamw")
    assert memory.at(mesh)["parameters"] == expected
    assert memory.at(mesh)["gradients"] == expected
    assert memory.at(mesh)["optimizer"] == 2 * expected + 4
    sizes = {sympy.Symbol(axis, integer=True, positive=True): size for axis, size in mesh.shape.items()}
    assert memory["parameters"].subs(sizes) == expected
    assert memory.total.subs(sizes) == memory.at(mesh).total


@pytest.mark.parametrize("remat", [False, True])
def test_the_activations_on_one_rank_are_the_storages_that_autograd_saves(remat):
    config = attrs.evolve(SMALL, max_seq_len=64)
    model = build(config)
    inputs = {name: torch.randint(config.vocab_size, (4, 64)) for name in ("tokens", "labels")}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    known |= {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = loss_fn(model(inputs["tokens"]), inputs)
    assert loss.requires_grad
    expected = sum(size for storage, size in saved.items() if storage not in known)
    policy = ss.Policy(remat=r"layers\.\d+" if remat else False)
    plan = compiler_of(config, policy=policy).plan(ss.Mesh(), inputs, loss_fn)
    found = plan.memory().at(ss.Mesh())["activations"]
    if remat:
        assert found < expected / 2
    else:
        assert found == expected


def test_a_plan_from_a_file_knows_its_memory_and_keeps_its_hash():
    plan = plan_of()
    read = ss.Plan.from_json(plan.to_json())
    assert read.to_json() == plan.to_json()
    assert read.hash == plan.hash
    for mesh in (plan.mesh, ss.Mesh(fsdp=8, tp=4)):
        assert dict(read.memory().at(mesh)) == dict(plan.memory().at(mesh))
        assert read.memory().at(mesh).total == plan.memory().at(mesh).total


def test_an_optimizer_is_counted_by_its_name_and_by_what_it_makes_alike():
    plan = plan_of()
    for name, optimizer, slots in (
        ("adamw", ss.adamw(lr=1e-3), 2),
        ("sgd", ss.sgd(lr=0.1), 0),
        ("momentum", ss.sgd(lr=0.1, momentum=0.9), 1),
    ):
        by_name, by_itself = plan.memory(name).at(plan.mesh), plan.memory(optimizer).at(plan.mesh)
        assert by_name["optimizer"] == slots * by_name["parameters"] + 4
        assert dict(by_name) == dict(by_itself)
    assert plan.memory(None).at(plan.mesh)["optimizer"] == 0
    wide = plan.memory((lambda params: {name: item.double() for name, item in params.items()}, None))
    assert wide.at(plan.mesh)["optimizer"] == 2 * wide.at(plan.mesh)["parameters"]


def test_the_kinds_at_the_fullest_moment_sum_to_the_total_and_none_exceeds_its_most():
    for mesh in ("", "dp=2", "fsdp=2", "fsdp=2,tp=2"):
        at = plan_of(mesh).memory().at(ss.Mesh.parse(mesh))
        assert sum(at.moment.values()) == at.total
        assert all(at.moment[kind] <= most for kind, most in at.items())
        assert at.total <= sum(at.values())


def test_what_a_policy_changes_shows():
    mesh = ss.Mesh(fsdp=2, tp=2)
    plain = plan_of().memory().at(mesh)
    kept = plan_of(policy=ss.Policy(reshard_after_forward=False)).memory().at(mesh)
    assert kept["gathered"] > plain["gathered"]
    halves = plan_of(policy=ss.Policy(accumulate=2)).memory().at(mesh)
    assert halves["activations"] < 0.6 * plain["activations"]
    assert halves["batch"] == plain["batch"]
    assert halves.moment["gradients"] == plain["gradients"]
    narrow = plan_of(policy=ss.Policy(param_dtype=torch.bfloat16)).memory().at(mesh)
    assert narrow["parameters"] == plain["parameters"]
    assert narrow["gathered"] < 0.6 * plain["gathered"]
    assert narrow["activations"] < 0.7 * plain["activations"]


def test_each_layer_adds_alike():
    three, six, nine = (plan_of(layers=layers).memory().at(ss.Mesh(fsdp=2, tp=2)) for layers in (3, 6, 9))
    for kind in ("parameters", "optimizer", "gradients", "activations"):
        assert nine[kind] - six[kind] == six[kind] - three[kind] > 0
    assert nine["temporary"] == three["temporary"]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda plan: plan.memory().at(ss.Mesh(tp=2)), "is over tp"),
        (lambda plan: plan.memory().at(ss.Mesh(fsdp=2, tp=8)), "not legal"),
        (lambda plan: plan.memory("adam"), "'adam' is no optimizer"),
        (lambda plan: plan.memory(stage=1), "no stage 1"),
    ],
)
def test_what_cannot_be_answered_is_refused(ask, says):
    with pytest.raises(ss.ShardingError) as caught:
        ask(plan_of())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "SS401"
    assert says in diagnostic.what


@functools.cache
def pipelined(mesh: str, schedule: str, microbatches: int, stages: int = 4, **options: object) -> ss.Plan:
    """Two rows and 64 tokens a microbatch and data rank."""
    config, axes = attrs.evolve(SMALL, n_layers=stages), ss.Mesh.parse(mesh)
    policy = ss.Policy(schedule=schedule, microbatches=microbatches, **options)
    return compiler_of(config, policy=policy).plan(axes, batch_of(2 * microbatches * axes["fsdp"], 64), loss_fn)


def test_gpipe_keeps_every_microbatch_and_1f1b_as_many_as_stages_are_to_come():
    """Stage s of p has p - s in flight under 1F1B, however many there are; GPipe has all. The last stage may have been
    sent what it runs next: two rows of 64 tokens of 128 float32."""
    for stage in range(4):
        kept = [pipelined("pp=4", "GPipe", m).memory(stage=stage).at(ss.Mesh(pp=4))["activations"] for m in (4, 5, 8)]
        one = kept[1] - kept[0]
        assert one > 0
        assert kept[2] == 8 * one
        for m in (4, 8):
            held = pipelined("pp=4", "1F1B", m).memory(stage=stage).at(ss.Mesh(pp=4))["activations"]
            assert 0 <= held - (4 - stage) * one <= (2 * 64 * 128 * 4 if stage == 3 else 0)


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_a_pipelines_formulas_are_those_of_its_other_meshes_and_its_most_is_that_of_a_rank(schedule):
    stages = 2 if schedule == "1F1B" else 4
    compiler = compiler_of(attrs.evolve(SMALL, n_layers=stages), policy=ss.Policy(schedule=schedule, microbatches=4))
    one, two = (
        compiler.plan(ss.Mesh.parse(mesh), batch_of(64, 64), loss_fn) for mesh in ("pp=2,fsdp=2", "pp=2,fsdp=8")
    )
    for stage in (None, *range(stages)):
        foretold, own = one.memory(stage=stage).at(two.mesh), two.memory(stage=stage).at(two.mesh)
        assert dict(foretold) == dict(own)
        assert (foretold.total, foretold.resident, foretold.moment) == (own.total, own.resident, own.moment)
        assert one.memory(stage=stage).total.subs({sympy.Symbol("fsdp", integer=True, positive=True): 8}) == own.total
    alone = [two.memory(stage=stage).at(two.mesh) for stage in range(stages)]
    if schedule == "1F1B":
        assert two.memory().at(two.mesh).total == max(at.total for at in alone)
    assert sum(at["parameters"] for at in alone) == sum(
        4 * torch.Size(item.local_shape).numel() for item in two.params.values() if not item.buffer
    )
    read = ss.Plan.from_json(two.to_json())
    assert read.memory().total == two.memory().total
    assert str(read) == str(two)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda plan: plan.memory(stage=2), "no stage 2"),
        (lambda plan: plan.memory(stage=-1), "no stage -1"),
        (lambda plan: plan.memory().at(ss.Mesh(pp=4)), "for pp=2"),
        (lambda plan: plan.memory().at(ss.Mesh(fsdp=2)), "is over fsdp"),
    ],
)
def test_what_a_pipeline_cannot_answer_is_refused(ask, says):
    with pytest.raises(ss.ShardingError) as caught:
        ask(pipelined("pp=2", "1F1B", 4))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "SS401"
    assert says in diagnostic.what


def test_a_printed_pipeline_says_what_each_stage_keeps_and_is_short_with_many():
    four = pipelined("pp=4", "1F1B", 8)
    for stage in range(4):
        kept = four.memory(stage=stage).at(four.mesh)["activations"]
        assert re.search(rf"\n {stage} +{stage} +layers.{stage} .* {4 - stage} +{kept / 2**20:.1f} MiB", str(four))
        assert f"{kept / 1e6:.4g} |" in str(four.schedule).splitlines()[2 + stage]
    many = pipelined("pp=16", "Interleaved1F1B", 32, stages=32)
    lines = str(many).splitlines()
    assert len(lines) < 110
    assert sum(bool(re.match(r" \d+ ( to \d+)? ", line)) for line in lines) <= 4
    assert any(re.match(r" 1 to 30 +0 to 15 +layers.1 to layers.30 +", line) for line in lines)
    assert any("each of stages 0 to 30 to the next" in line for line in lines)


def test_a_printed_plan_says_what_a_rank_holds():
    at = plan_of().memory().at(ss.Mesh(fsdp=2, tp=2))
    assert re.search(rf"at once, in {at.phase} +{at.total / 2**20:.1f} MiB", str(plan_of()))
