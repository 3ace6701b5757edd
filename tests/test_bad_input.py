"""What a user gets wrong is refused by name before anything runs, and nothing of theirs is touched."""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES, LlamaConfig, build

CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=32, max_seq_len=16)
ROWS, SEQ = 4, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama() -> nn.Module:
    return build(CONFIG)


def make_batch() -> dict[str, Tensor]:
    tokens = torch.arange(ROWS * SEQ).reshape(ROWS, SEQ) % CONFIG.vocab_size
    return {"tokens": tokens, "labels": tokens.flip(1)}


def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return ss.cross_entropy(output, batch["labels"])


def shard(model: Any = llama, rules: Any = RULES, mesh: Any = None, inputs: Any = None, **policy: Any) -> ss.Sharded:
    return ss.shard(model, rules, ss.Mesh() if mesh is None else mesh, inputs, policy=ss.Policy(**policy))


def diagnosis(call: Callable[[], Any]) -> tuple[set[str], str]:
    """The codes and the text of the ShardingError that a call raises."""
    with pytest.raises(ss.ShardingError) as caught:
        call()
    return {diagnostic.code for diagnostic in caught.value.diagnostics}, str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=x", "'x' is not a size"),
        ("tp", "'tp' is not axis=size"),
        ("foo=2", "'foo=2' is not axis=size"),
        ("TP=2", "'TP=2'"),
        ("tp=2,tp=2", "tp is given twice"),
        ("tp=0", "size 0"),
        ("tp=-1", "'-1'"),
        ("tp=2.0", "'2.0'"),
        ("tp=2;fsdp=2", "'2;fsdp=2'"),
    ],
)
def test_a_wrong_mesh_string_is_refused_with_the_part_that_is_wrong(text: str, words: str):
    codes, said = diagnosis(lambda: ss.Mesh.parse(text))
    assert codes == {"SS101"}
    assert words in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"mesh": "tp=2"}, "SS101", "'tp=2'"),
        ({"rules": {"weight": "D"}}, "SS401", "the table is a dict"),
        ({"model": None}, "SS401", "the model is a NoneType"),
        ({"model": dict}, "SS401", "dict"),
        ({"inputs": torch.zeros(2)}, "SS401", "the batch is a Tensor"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], code: str, words: str):
    codes, said = diagnosis(lambda: shard(**arguments))
    assert codes == {code}
    assert words in said


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"params": {r"norm\.wieght": "D"}}, "SS203", r"norm\.wieght"),
        ({"drop": [r"output\.weight"]}, "SS202", "output.weight"),
        ({"params": {r"norm\.weight|output\.weight": "D"}}, "SS204", "norm.weight"),
        ({"params": {r"output\.weight": "V@(tp,fsdp) D E"}}, "SS205", "output.weight"),
        ({"params": {r"output\.weight": "V@dp D"}}, "SS208", "dp"),
        ({"params": {r"output\.weight": "V@gpu D"}}, "SS103", "gpu"),
        ({"params": {r"output\.weight": "V@(tp D"}}, "SS103", "output"),
        ({"activations": {r"output": "B@(dp,fsdp) S@cp V@tp V"}}, "SS205", "output"),
        ({"units": [r"layer\.\d+"]}, "SS211", r"layer\.\d+"),
    ],
)
def test_a_wrong_table_is_refused_and_the_model_stays_as_it_was(changes: dict[str, Any], code: str, words: str):
    given = llama()
    before = {name: (id(tensor), tensor._version) for name, tensor in given.state_dict(keep_vars=True).items()}
    attributes = [sorted(child.__dict__) for child in given.modules()]
    codes, said = diagnosis(lambda: shard(given, RULES.override(**changes), inputs=make_batch()))
    assert code in codes
    assert words in said
    assert before == {name: (id(t), t._version) for name, t in given.state_dict(keep_vars=True).items()}
    assert attributes == [sorted(child.__dict__) for child in given.modules()]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in given.modules())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": [(r"norm\.weight", "D")]}, "params is"),
        ({"params": {1: "D"}}, "a key is 1"),
        ({"attributes": {r"layers\.\d+": "H@tp"}}, "attribute -> spec"),
        ({"attributes": ["n_heads"]}, "attributes is"),
        ({"sizes": 3}, "sizes is 3"),
        ({"pipeline": 4}, "pipeline is 4"),
        ({"experts": [r"layers\.\d+"]}, "experts is"),
        ({"units": [3]}, "units is [3]"),
    ],
)
def test_an_argument_of_a_table_that_is_of_another_kind_is_refused_where_the_table_is_written(
    changes: dict[str, Any], words: str
):
    for make in (RULES.override, functools.partial(ss.Rules, params={r"norm\.weight": "D"})):
        with pytest.raises(ss.ShardingError) as raised:
            make(**changes)
        (found,) = raised.value.diagnostics
        assert found.code == "SS103"
        assert words in str(raised.value)
        assert found.locations[0].file.endswith("test_bad_input.py")


def test_a_mesh_of_several_ranks_asks_for_a_launcher_after_the_table_was_checked():
    codes, said = diagnosis(lambda: shard(mesh=ss.Mesh(tp=2), inputs=make_batch()))
    assert codes == {"SS403"}
    assert "torchrun --nproc-per-node 2" in said
    wrong = RULES.override(drop=[r"output\.weight"])
    assert diagnosis(lambda: shard(rules=wrong, mesh=ss.Mesh(tp=2)))[0] == {"SS202"}


BATCHES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, str]] = {
    "a name that no rule claims": (lambda b: {"tokns": b["tokens"], "labels": b["labels"]}, "SS202", "tokns"),
    "an entry too many": (lambda b: b | {"mask": b["tokens"]}, "SS202", "mask"),
    "an entry that forward needs is missing": (lambda b: {"labels": b["labels"]}, "SS401", "tokens"),
    "nothing": (lambda b: {}, "SS401", "tokens"),
    "tokens of floats": (lambda b: b | {"tokens": b["tokens"].float()}, "SS402", "tokens (4, 8) float32"),
    "a row instead of a batch": (lambda b: b | {"tokens": b["tokens"][0]}, "SS205", "tokens has 1"),
    "a dim too many": (lambda b: b | {"tokens": b["tokens"][None]}, "SS205", "tokens has 3"),
    "labels of other rows": (lambda b: b | {"labels": b["labels"][:2]}, "SS206 SS402", "labels"),
    "more positions than there are": (lambda b: {k: v.repeat(1, 5) for k, v in b.items()}, "SS402", "(4, 40)"),
    "a list of tokens": (lambda b: b | {"tokens": b["tokens"].tolist()}, "SS402", "list"),
    "a tensor": (lambda b: b["tokens"], "SS401", "Tensor"),
}


@pytest.mark.parametrize("what", BATCHES)
def test_a_wrong_batch_is_refused_by_name_wherever_it_comes_in(what: str):
    change, code, words = BATCHES[what]
    batch = change(make_batch())
    sharded = shard()
    state = sharded.init(ss.sgd(lr=0.1))
    before = ss.full(state.params["norm.weight"])
    uses = [
        lambda: shard(inputs=batch),
        lambda: ss.train_step(sharded, loss_fn)(state, batch),
        lambda: ss.eval_step(sharded, loss_fn)(state, batch),
        lambda: sharded.value_and_grad(loss_fn)(state.params, batch),
    ]
    for use in uses:
        codes, said = diagnosis(use)
        assert codes <= set(code.split())
        assert words in said
    assert torch.equal(ss.full(state.params["norm.weight"]), before)
    state, _ = ss.train_step(sharded, loss_fn)(state, make_batch())
    assert state.step == 1


def test_labels_missing_from_the_batch_are_named_with_the_line_that_reads_them():
    sharded = shard()
    state = sharded.init(ss.sgd(lr=0.1))
    batch = {"tokens": make_batch()["tokens"]}
    codes, said = diagnosis(lambda: ss.train_step(sharded, loss_fn)(state, batch))
    assert codes == {"SS402"}
    assert "'labels'" in said
    assert "test_bad_input.py" in said


def test_rows_that_microbatches_do_not_divide_are_refused():
    for call in (
        lambda: shard(inputs=make_batch(), accumulate=3),
        lambda: shard(accumulate=3).local_batch(make_batch()),
        lambda: ss.train_step((one := shard(accumulate=3)), loss_fn)(one.init(ss.sgd(lr=0.1)), make_batch()),
    ):
        codes, said = diagnosis(call)
        assert codes == {"SS301"}
        assert "3 microbatches" in said


def summed(output: Tensor) -> Tensor:
    return output.float().sum()


LOSSES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "one value": (lambda o, b: loss_fn(o, b)[0], "SS310", "one tensor"),
    "nothing": (lambda o, b: None, "SS310", "NoneType"),
    "three values": (lambda o, b: (summed(o), 1.0, 2.0), "SS310", "3 values"),
    "a sum for each token": (lambda o, b: (o.sum(-1), 1.0), "SS310", "(4, 8)"),
    "a number for a sum": (lambda o, b: (1.0, 1.0), "SS310", "sum is a float"),
    "a sum of integers": (lambda o, b: ((b["labels"] > 0).sum(), 1.0), "SS310", "int64"),
    "a complex sum": (lambda o, b: (summed(o) * 1j, 1.0), "SS310", "complex"),
    "a sum without a gradient": (lambda o, b: (summed(o.detach()), 1.0), "SS310", "no gradient"),
    "text": (lambda o, b: ("sum", "weight"), "SS310", "str"),
    "a value read on the host": (lambda o, b: (summed(o).item(), 1.0), "SS313", "host"),
    "a function of one argument": (lambda o: (summed(o), 1.0), "SS402", "argument"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_loss_that_returns_something_else_is_refused_before_an_update(what: str):
    wrong, code, words = LOSSES[what]
    sharded = shard()
    state = sharded.init(ss.sgd(lr=0.1))
    codes, said = diagnosis(lambda: ss.train_step(sharded, wrong)(state, make_batch()))
    assert codes == {code}
    assert words in said
    assert not state.held.donated


def test_a_mean_is_refused_where_ranks_may_hold_different_numbers_of_tokens():
    def of_tokens(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, float]:
        return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten()), 1.0

    def of_logits(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, float]:
        return output.square().mean(), 1.0

    for loss, code, words in ((of_tokens, "SS311", "mean over tokens"), (of_logits, "SS310", "avg over dp")):
        codes, said = diagnosis(lambda loss=loss: ss.compile(llama(), RULES, ss.Mesh(dp=2), make_batch(), loss))
        assert codes == {code}
        assert words in said


def test_a_weight_of_zero_is_not_finite_and_changes_nothing():
    sharded = shard()
    state = sharded.init(ss.sgd(lr=0.1))
    before = ss.full(state.params["norm.weight"])
    state, metrics = ss.train_step(sharded, lambda o, b: (summed(o), 0))(state, make_batch())
    with pytest.raises(ss.NonFiniteError):
        float(metrics["loss"])
    assert torch.equal(ss.full(state.params["norm.weight"]), before)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.AdamW, "AdamW"),
        (ss.adamw, "adamw"),
        ("adamw", "'adamw'"),
        (ss.adamw(groups={r"nothing\.here": {"weight_decay": 0.0}}), "matches no trainable parameter"),
    ],
)
def test_what_is_no_optimizer_of_this_model_is_refused(optimizer: Any, words: str):
    codes, said = diagnosis(lambda: shard().init(optimizer))
    assert codes == {"SS407"}
    assert words in said


def test_a_pair_of_functions_and_an_object_with_both_are_optimizers():
    sgd = ss.sgd(lr=0.1)

    class Pair:
        init, update = staticmethod(sgd.init), staticmethod(sgd.update)

    after = []
    for optimizer in (sgd, (sgd.init, sgd.update), Pair()):
        sharded = shard()
        state, _ = ss.train_step(sharded, loss_fn)(sharded.init(optimizer), make_batch())
        after.append(ss.full(state.params["layers.0.attention.wq.weight"]))
    assert torch.allclose(after[0], after[1])
    assert torch.equal(after[1], after[2])


def test_a_policy_that_matches_no_unit_is_refused():
    for option in ("remat", "compile", "reshard_after_forward"):
        codes, said = diagnosis(lambda option=option: shard(**{option: r"layres\.\d+"}))
        assert codes == {"SS405"}
        assert option in said
    assert diagnosis(lambda: ss.Policy(accumulate=0))[0] == {"SS405"}
    for clip in (0.0, -1.0, math.nan):
        assert diagnosis(lambda clip=clip: ss.train_step(shard(), loss_fn, clip=clip))[0] == {"SS405"}


def test_states_and_models_in_each_others_place_are_refused():
    sharded = shard()
    state = sharded.init(ss.sgd(lr=0.1))
    wrong = [
        lambda: ss.train_step(sharded, loss_fn)(make_batch(), state),
        lambda: ss.train_step(sharded, loss_fn)(state.params, make_batch()),
        lambda: ss.eval_step(sharded, loss_fn)(None, make_batch()),
        lambda: ss.update(state.params, {}),
        lambda: ss.train_step(llama(), loss_fn),
        lambda: ss.eval_step(llama(), loss_fn),
        lambda: ss.train_step(sharded, loss_fn)(sharded.load(sharded.state_dict(state)), make_batch()),
    ]
    for call in wrong:
        assert diagnosis(call)[0] == {"SS407"}


def test_a_state_of_another_model_is_refused():
    other = ss.shard(lambda: build(LlamaConfig(**{**SMALL, "dim": 32})), RULES, ss.Mesh())
    state = other.init(ss.sgd(lr=0.1))
    sharded = shard()
    for call in (
        lambda: ss.train_step(sharded, loss_fn)(state, make_batch()),
        lambda: ss.eval_step(sharded, loss_fn)(state, make_batch()),
        lambda: sharded.state_dict(state),
        lambda: sharded.value_and_grad(loss_fn)(state.params, make_batch()),
    ):
        assert diagnosis(call)[0] == {"SS407"}


SMALL = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 24, "vocab_size": 32, "max_seq_len": 16}


def test_a_state_dict_that_is_none_is_refused():
    sharded = shard()
    good = sharded.state_dict(sharded.init(ss.sgd(lr=0.1)))
    for wrong, words in (([1], "list"), ({**good, "norm.weight": 3}, "norm.weight is a int")):
        codes, said = diagnosis(lambda wrong=wrong: sharded.load(wrong))
        assert codes == {"SS404"}
        assert words in said


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("assert tokens.shape[1] <= 4, 'at most 4 tokens'", "at most 4 tokens"),
        ("1 // 0", "by zero"),
        ("raise LookupError('no such expert')", "no such expert"),
    ],
)
def test_whatever_a_models_forward_raises_is_told_with_its_line(tmp_path, monkeypatch, statement: str, said: str):
    source = f"from torch import nn\nclass Bad(nn.Identity):\n    def forward(self, tokens):\n        {statement}\n"
    (tmp_path / "bad_model.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import bad_model

    try:
        rules = ss.Rules(params={}, activations={"tokens|labels": "B@dp S"})
        with pytest.raises(ss.ShardingError) as caught:
            ss.compile(bad_model.Bad(), rules, ss.Mesh(), make_batch())
    finally:
        del sys.modules["bad_model"]
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "SS402"
    assert said in diagnostic.what
    assert diagnostic.locations[0].line == 4
    assert diagnostic.locations[0].text == statement


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"param_dtype": "bf16"}, "param_dtype='bf16'"),
        ({"reduce_dtype": "bf16"}, "reduce_dtype='bf16'"),
        ({"param_dtype": torch.int32}, "param_dtype=torch.int32"),
        ({"param_dtype": torch.complex64}, "param_dtype=torch.complex64"),
    ],
)
def test_a_policy_takes_dtypes_that_hold_fractions(options, words):
    codes, text = diagnosis(lambda: ss.Policy(**options))
    assert codes == {"SS405"}
    assert words in text


def test_a_dict_is_no_policy():
    codes, text = diagnosis(lambda: ss.shard(llama, RULES, ss.Mesh(), policy={"remat": True}))
    assert codes == {"SS405"}
    assert "the policy is a dict" in text


def test_what_stands_in_the_place_of_another_argument_is_told_by_its_kind_alone():
    codes, text = diagnosis(lambda: ss.compile(llama, ss.Mesh(), RULES, make_batch()))
    assert codes == {"SS101"}
    assert "the mesh is a Rules\n" in text
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    codes, text = diagnosis(lambda: shard().init(optimizer, seed=0))
    assert codes == {"SS407"}
    assert "the optimizer is a AdamW\n" in text


def test_a_size_for_a_factor_of_no_rule_is_refused_and_none_forgets_one():
    wrong = RULES.override(sizes={"hdd": 4})
    codes, text = diagnosis(lambda: ss.compile(llama, wrong, ss.Mesh(), make_batch()))
    assert codes == {"SS211"}
    assert "did you mean hd?" in text
    codes, text = diagnosis(lambda: ss.compile(llama, RULES.override(sizes={"hd": "4"}), ss.Mesh(), make_batch()))
    assert codes == {"SS211"}
    assert "hd is '4'" in text
    ss.compile(llama, wrong.override(sizes={"hdd": None}), ss.Mesh(), make_batch())


def test_one_pattern_is_one_unit_in_an_override_too():
    assert RULES.override(units=r"layers\.\d+").units == (r"layers\.\d+",)


def test_a_rule_in_the_wrong_part_of_the_table_is_told_where_it_belongs():
    text = diagnosis(
        lambda: ss.compile(llama, RULES.override(activations={r"norm\.weight": "D"}), ss.Mesh(), make_batch())
    )[1]
    assert "norm.weight is a name of params" in text


def test_an_error_of_the_loss_is_told_as_the_losss():
    def misnamed(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return ss.cross_entropy(output, batch["targets"])

    codes, text = diagnosis(lambda: ss.compile(llama, RULES, ss.Mesh(), make_batch(), misnamed))
    assert codes == {"SS402"}
    assert "the loss does not run on this batch: nothing is there under 'targets'" in text
    assert "loss(output, batch)" in text


def test_what_is_wrong_in_every_layer_of_a_state_dict_is_told_once():
    sharded = shard()
    good = sharded.state_dict(sharded.init(ss.sgd(lr=0.1)))
    codes, said = diagnosis(lambda: sharded.load({name: w for name, w in good.items() if "wq" not in name}))
    assert codes == {"SS404"}
    assert "the state dict has no layers.*.attention.wq.weight" in said
    assert "matches 2 entries" in said
    assert said.count("error[") == 1
    wide = {name: torch.zeros(3, 5) if "w1" in name else w for name, w in good.items()}
    said = diagnosis(lambda: sharded.load(wide))[1]
    assert "layers.*.feed_forward.w1.weight has shape (3, 5), the model's has (24, 16)" in said
    assert said.count("error[") == 1
    cast = {name: w.half() if "w1" in name else w for name, w in good.items()}
    said = diagnosis(lambda: sharded.load(cast))[1]
    assert "cast it: tensor.to(torch.float32)" in said
    assert said.count("error[") == 1


@pytest.mark.parametrize("seed", ["0", -1, 1.5, True, None, 1 << 63])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any):
    sharded = shard(inputs=make_batch())
    for begin in (
        sharded.init,
        lambda _, seed: sharded.load(sharded.state_dict(sharded.init(ss.sgd(lr=1.0))), seed=seed),
    ):
        codes, said = diagnosis(lambda begin=begin: begin(ss.sgd(lr=1.0), seed=seed))
        assert codes == {"SS405"}
        assert f"seed={seed!r}" in said
