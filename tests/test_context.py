"""Attention over a split sequence in a plan: what is accepted, what it costs, what is laid how."""

import json
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES, build
from models.llama.model import Llama
from tests import reader
from tests.gallery.case import Case, llama, make_batch
from tests.markdown import run_page

INPUTS = make_batch(positions=True)


def plan_of(mesh: str, strategy: str, kind: str = "causal", **options) -> ss.Plan:
    model = reader.build(reader.Shape(kind=kind, kv_heads=options.pop("kv_heads", 8)))
    batch = reader.make_batch(length=options.pop("length", 16), documents=reader.has_documents(kind))
    policy = ss.Policy(attention=strategy, **options)
    rules = reader.table(kind, strategy)
    return ss.compile(model, rules, ss.Mesh.parse(mesh), batch, reader.loss_fn, policy)


def wire(plan: ss.Plan) -> dict[tuple[str, str], int]:
    """(phase, kind) -> bytes, of the messages of attention alone."""
    found: dict[tuple[str, str], int] = {}
    for row in plan.collectives:
        if row.why.startswith("attention by"):
            assert row.axes == ("cp",)
            found[row.phase, row.kind] = found.get((row.phase, row.kind), 0) + row.total_bytes
    return found


ROWS, LENGTH, LAYERS, WIDTH, FLOAT = 8, 16, 2, 4, 4


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kv", [1, 2, 8])
def test_the_messages_of_each_strategy_are_those_of_its_formula(ranks: int, kv: int):
    """k: the bytes of a rank's keys, as many as of its values; q: of its queries, as many as of the result."""
    k = ROWS * kv * (LENGTH // ranks) * WIDTH * FLOAT
    q = ROWS * 8 * (LENGTH // ranks) * WIDTH * FLOAT
    gathered = wire(plan_of(f"cp={ranks}", "allgather", kv_heads=kv))
    assert gathered == {
        ("forward", "all_gather"): LAYERS * 2 * ranks * k,
        ("backward", "all_gather"): LAYERS * 2 * ranks * k,
        ("backward", "reduce_scatter"): LAYERS * 2 * ranks * k,
    }
    ring = wire(plan_of(f"cp={ranks}", "ring", kv_heads=kv))
    assert ring == {
        ("forward", "send_recv"): LAYERS * (ranks - 1) * 2 * k,
        ("backward", "send_recv"): LAYERS * (ranks - 1) * 4 * k,
    }
    if kv % ranks == 0:
        exchanged = wire(plan_of(f"cp={ranks}", "ulysses", kv_heads=kv))
        assert exchanged == {
            ("forward", "all_to_all"): LAYERS * (2 * q + 2 * k),
            ("backward", "all_to_all"): LAYERS * (2 * q + 2 * k),
        }


def test_what_is_rematerialised_is_gathered_once_more():
    once, twice = (wire(plan_of("cp=2", "allgather", remat=remat)) for remat in (False, True))
    assert twice["backward", "all_gather"] == 2 * once["backward", "all_gather"]
    assert twice["forward", "all_gather"] == once["forward", "all_gather"]


def test_a_mapping_chooses_a_strategy_by_module_and_the_first_that_matches():
    policy = ss.Policy(attention={r"layers\.1\..*": "ulysses", r"layers\..*": "ring"})
    plan = ss.compile(lambda: build("debug"), RULES, ss.Mesh(cp=2), INPUTS, policy=policy)
    kinds = {entry.path: entry.strategy for entry in plan.substitutions}
    assert kinds == {
        **{f"layers.{layer}.attention": "ring" for layer in (0, 2, 3)},
        "layers.1.attention": "ulysses",
    }


def test_a_module_that_no_pattern_matches_gathers_keys():
    policy = ss.Policy(attention={r"layers\.0\..*": "ring"})
    plan = ss.compile(lambda: build("debug"), RULES, ss.Mesh(cp=2), INPUTS, policy=policy)
    assert [entry.strategy for entry in plan.substitutions] == ["ring", *["allgather"] * 3]


@pytest.mark.parametrize(
    ("strategy", "kind", "length", "balance", "expected"),
    [
        ("ring", "causal", 16, None, True),
        ("allgather", "causal", 16, None, True),
        ("ulysses", "causal", 16, None, False),
        ("ring", "full", 16, None, False),
        ("ring", "causal", 6, None, False),
        ("ring", "causal", 16, False, False),
        ("ring", "full", 16, True, True),
    ],
)
def test_the_sequence_lies_head_and_tail_where_that_evens_work_out(strategy, kind, length, balance, expected):
    assert plan_of("cp=2", strategy, kind, length=length, balance=balance).balanced == expected


def test_a_plan_says_its_order_in_a_file_too():
    plan = plan_of("cp=2", "ring")
    assert ss.Plan.from_json(plan.to_json()).balanced
    assert json.loads(plan.to_json())["balanced"] is True
    assert plan.hash != plan_of("cp=2", "ring", balance=False).hash
    assert plan.hash != plan_of("cp=2", "allgather").hash
    assert "rank r holds chunks r and 3 - r" in str(plan)


def test_without_cp_a_policy_of_attention_changes_nothing():
    plans = [plan_of("tp=2", strategy) for strategy in ("allgather", "ring", "ulysses")]
    assert len({plan.hash for plan in plans}) == 1


class WholeTable(Llama):
    """Llama whose rotary tables have just a row for each position, and are read uncut."""

    def forward(self, tokens: Tensor) -> Tensor:
        h_BSD = self.tok_embeddings(tokens)
        for layer in self.layers:
            h_BSD = layer(h_BSD, self.rope_cos.unsqueeze(1), self.rope_sin.unsqueeze(1))
        return self.output(self.norm(h_BSD))


def whole_table(model: nn.Module) -> None:
    model.__class__ = WholeTable


def test_a_buffer_as_long_as_the_sequence_lies_with_it():
    rules = RULES.override(drop=["positions"], params={r"rope_(cos|sin)": "S@cp hd"})
    plan = Case(model=llama(whole_table, max_seq_len=128), rules=rules, mesh="cp=2").compile()
    assert plan.params["rope_cos"].local_shape == (64, 16)
    assert plan.balanced


def test_a_buffer_that_is_in_the_state_does_not_lie_over_cp():
    def change(model: nn.Module) -> None:
        whole_table(model)
        for name in ("rope_cos", "rope_sin"):
            model.register_buffer(name, getattr(model, name), persistent=True)

    rules = RULES.override(drop=["positions"], params={r"rope_(cos|sin)": "S@cp hd"})
    with pytest.raises(ss.ShardingError, match="SS209"):
        Case(model=llama(change, max_seq_len=128), rules=rules, mesh="cp=2").compile()


class Cutting(nn.Module):
    """Sums runs of positions: each needs its own neighbours."""

    def __init__(self, run: int) -> None:
        super().__init__()
        self.run = run
        self.embed = nn.Embedding(8, 4)
        self.wq = nn.Linear(4, 4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        q = self.wq(h)[:, None]
        h = h + nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]
        return h.unflatten(1, (-1, self.run)).sum(2)


def cutting(run: int, **policy) -> ss.Plan:
    rules = ss.Rules(
        params={r"embed\.weight": "V D", r"wq\.weight": "D E"}, activations={r"tokens": "B@dp S@cp"}, sizes={"E": 4}
    )
    inputs = {"tokens": torch.zeros(2, 16, dtype=torch.long)}
    return ss.compile(Cutting(run), rules, ss.Mesh(cp=2), inputs, policy=ss.Policy(**policy))


def test_runs_within_a_chunk_may_be_cut_and_runs_across_two_are_refused():
    """Two chunks of 4 on each rank: runs of 2 and 4 lie in one, a run of 8 would be of both."""
    for run in (2, 4):
        assert cutting(run).balanced
    with pytest.raises(ss.ShardingError, match="SS343"):
        cutting(8)
    assert not cutting(8, balance=False).balanced


def test_queries_may_be_split_beside_whole_keys_without_a_causal_mask_alone():
    rules = reader.table("full", "allgather").override(
        activations={r"layers\.\d+\.attention\.w[kv]": "B@(dp,fsdp) S (K@tp hd)"}
    )
    batch = reader.make_batch(documents=False)
    plan = ss.compile(reader.build(reader.Shape(kind="full")), rules, ss.Mesh(cp=2), batch, reader.loss_fn)
    assert wire(plan) == {}
    with pytest.raises(ss.ShardingError, match="SS304"):
        ss.compile(reader.build(reader.Shape()), rules, ss.Mesh(cp=2), batch, reader.loss_fn)


@pytest.mark.parametrize("options", [{"attention": "flash"}, {"attention": {"layers": "all"}}])
def test_a_strategy_that_there_is_not_is_refused(options):
    with pytest.raises(ss.ShardingError, match="SS405"):
        ss.Policy(**options)


def test_a_pattern_of_attention_that_matches_no_module_is_refused():
    policy = ss.Policy(attention={r"layer\.\d+": "ring"})
    with pytest.raises(ss.ShardingError, match=r"layer\\\.\\d\+") as caught:
        ss.compile(lambda: build("debug"), RULES, ss.Mesh(cp=2), INPUTS, policy=policy)
    assert [each.code for each in caught.value.diagnostics] == ["SS405"]


def test_heads_are_exchanged_over_what_tp_left_of_them():
    shape = attrs.evolve(reader.Shape(), kv_heads=4)
    batch, policy = reader.make_batch(documents=False), ss.Policy(attention="ulysses")
    rules = reader.table("causal", "ulysses")
    plan = ss.compile(reader.build(shape), rules, ss.Mesh(cp=2, tp=2), batch, policy=policy)
    legal = {str(mesh) for mesh in plan.legal_meshes(8)}
    assert "cp=4,tp=2" not in legal
    assert {"fsdp=2,cp=2,tp=2", "fsdp=2,cp=4", "fsdp=4,cp=2"} <= legal


def test_the_page_on_long_context_runs_and_says_what_a_user_is_told(capsys, monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    run_page(root / "docs" / "context.md", capsys)


@pytest.mark.parametrize("strategy", ["allgather", "ring", "ulysses"])
def test_a_page_of_figures_has_no_row_that_fails(strategy: str):
    page = (Path(__file__).parent.parent / "docs" / "context_sweep.md").read_text()
    rows = [line for line in page.splitlines() if f"| {strategy} |" in line]
    assert len(rows) > 20
    assert "**" not in page
