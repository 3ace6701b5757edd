"""Mixtral and DeepSeek-V3 as plain models: sizes, and what they compute beside loops over tokens, experts and heads."""

import json
import math

import attrs
import pytest
import torch
import torch.nn.functional as F

from models import deepseek, mixtral, train
from models import experts as experts_model
from models.deepseek.model import Attention, DeepSeekConfig, rope_angles
from models.deepseek.model import Router as DeepSeekRouter
from models.experts import Experts
from models.mixtral.model import MixtralConfig
from models.mixtral.model import Router as MixtralRouter

# published (671b with its 58 x 256 selection biases, which are buffers); the debug ones are counted by hand:
# 2*256*64 + 64 + 4*(2*64 + 2*64*128 + 2*64*64 + 8*64 + 8*3*64*128)
# 2*256*64 + 64 + 4*(2*64 + 64*48 + 48 + 48*4*24 + 64*40 + 32 + 32*4*32 + 4*16*64) + 3*64*256
#   + 3*(16*64 + 17*3*64*64)
SIZES = {
    mixtral: {"debug": 920_128, "8x7b": 46_702_792_704},
    deepseek: {"debug": 786_304, "671b": 671_026_419_200 - 58 * 256},
}
EVERY_PRESET = [pytest.param(family, preset, id=preset) for family in SIZES for preset in SIZES[family]]


@pytest.fixture(autouse=True)
def _float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize(("family", "preset"), EVERY_PRESET)
def test_a_preset_has_the_published_number_of_parameters(family, preset):
    with torch.device("meta"):
        model = family.build(preset)
    assert sum(p.numel() for p in model.parameters()) == SIZES[family][preset]
    assert family.PRESETS.keys() == SIZES[family].keys()


def loop_over_tokens(experts, hidden, ids, weights):
    """Each token through each of its experts, one by one."""
    rows = []
    for token in range(len(hidden)):
        out = torch.zeros_like(hidden[token])
        for place in range(ids.shape[1]):
            e, x = int(ids[token, place]), hidden[token]
            out = out + weights[token, place] * (experts.w2[e] @ (F.silu(experts.w1[e] @ x) * (experts.w3[e] @ x)))
        rows.append(out)
    return torch.stack(rows) if rows else hidden * 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("chosen", ["any", "one expert alone", "one choice", "no tokens"])
def test_experts_are_a_loop_over_tokens(chosen, dtype):
    experts = Experts(5, 8, 12, 0.3, 0.3).to(dtype)
    tokens, choices = (0 if chosen == "no tokens" else 7), (1 if chosen == "one choice" else 3)
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    ids = torch.rand(tokens, 5).argsort(dim=-1)[:, :choices]
    ids = torch.full_like(ids, 4) if chosen == "one expert alone" else ids
    weights = torch.rand(tokens, choices, dtype=dtype, requires_grad=True)
    leaves = [hidden, weights, *experts.parameters()]
    pull = torch.randn(tokens, 8, dtype=dtype)
    ours, theirs = experts(hidden, ids, weights), loop_over_tokens(experts, hidden, ids, weights)
    near = {"atol": 1e-12 if dtype == torch.float64 else 1e-5, "rtol": 0}
    torch.testing.assert_close(ours, theirs, **near)
    got = torch.autograd.grad((ours * pull).sum(), leaves)
    wanted = torch.autograd.grad((theirs * pull).sum(), leaves, allow_unused=True, materialize_grads=True)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, **near)


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 6, 0], [0, 0, 0, 0]])
def test_the_grouped_product_of_torch_is_the_loop_and_so_are_its_gradients(counts):
    x = torch.randn(sum(counts), 8, dtype=torch.float32, requires_grad=True)
    w = torch.randn(4, 12, 8, dtype=torch.float32, requires_grad=True)
    pull = torch.randn(sum(counts), 12, dtype=torch.float32)
    made = [product(x, w, torch.tensor(counts)) for product in (experts_model.fused, experts_model.grouped)]
    torch.testing.assert_close(*made)
    for one, two in zip(*(torch.autograd.grad((item * pull).sum(), [x, w]) for item in made), strict=True):
        torch.testing.assert_close(one, two)


def test_a_rank_may_hold_some_experts_with_ids_from_its_first():
    whole, part = Experts(6, 8, 12, 0.3, 0.3), Experts(2, 8, 12, 0.3, 0.3)
    part.load_state_dict({name: weight[2:4] for name, weight in whole.state_dict().items()})
    hidden, ids, weights = torch.randn(9, 8), torch.randint(0, 2, (9, 1)), torch.rand(9, 1)
    torch.testing.assert_close(part(hidden, ids, weights), whole(hidden, ids + 2, weights))


MIXTRAL = MixtralConfig(
    dim=8, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=12, n_experts=5, top_k=2, vocab_size=20, max_seq_len=16,
    balance_coef=0.7, z_coef=0.3,
)  # fmt: skip


def test_mixtral_routes_each_token_to_the_most_probable_and_weighs_them_to_one():
    router, x = MixtralRouter(MIXTRAL), torch.randn(11, 8) * 30
    ids, weights, loss = router(x)
    share, mean, square = [0.0] * 5, [0.0] * 5, 0.0
    for token in range(11):
        logits = [float(row.detach() @ x[token]) for row in router.gate.weight]
        powers = [math.exp(logit) for logit in logits]
        best = sorted(range(5), key=lambda expert: -logits[expert])[:2]
        assert ids[token].tolist() == best
        both = sum(powers[expert] for expert in best)
        assert weights[token].tolist() == pytest.approx([powers[expert] / both for expert in best])
        for expert in range(5):
            share[expert] += (expert in best) / 22
            mean[expert] += powers[expert] / sum(powers) / 11
        square += math.log(sum(powers)) ** 2 / 11
    balance = 5 * sum(one * two for one, two in zip(share, mean, strict=True))
    assert float(loss) == pytest.approx(0.7 * balance + 0.3 * square)


def test_mixtrals_loss_adds_the_routers_losses_once_a_label():
    model, labels = mixtral.build(MIXTRAL), torch.randint(0, 20, (3, 6))
    labels[0, :4] = -100
    logits, aux = model(torch.randint(0, 20, (3, 6)))
    total, weight = mixtral.loss_fn((logits, aux), {"labels": labels})
    assert weight == 14
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(total / weight) == pytest.approx(float(mean + aux))
    assert float(aux) > 0.5


DEEPSEEK = DeepSeekConfig(
    dim=8, n_layers=3, n_dense_layers=1, n_heads=3, q_rank=7, kv_rank=5, nope_dim=4, rope_dim=4, v_dim=6, ffn_dim=12,
    moe_dim=10, n_experts=12, top_k=3, n_groups=4, top_groups=2, vocab_size=20, max_seq_len=16,
)  # fmt: skip


def selected(scores, bias, groups, top_groups, top_k):
    """The experts of one token, by sorting lists."""
    swayed = [score + lean for score, lean in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    sums = [sum(sorted(swayed[group * size : (group + 1) * size])[-2:]) for group in range(groups)]
    open_ = sorted(range(groups), key=lambda group: -sums[group])[:top_groups]
    allowed = [expert for expert in range(len(scores)) if expert // size in open_]
    return sorted(allowed, key=lambda expert: -swayed[expert])[:top_k]


@pytest.mark.parametrize("lean", [0.0, 0.2, -3.0])
def test_deepseek_selects_in_the_best_groups_and_the_bias_sways_the_choice_alone(lean):
    router, x = DeepSeekRouter(DEEPSEEK), torch.randn(40, 8) * 30
    router.bias.uniform_(-abs(lean), abs(lean)).add_(min(lean, 0.0))
    ids, weights = router(x)
    counts = [0] * 12
    for token in range(40):
        scores = [1 / (1 + math.exp(-float(row.detach() @ x[token]))) for row in router.gate.weight]
        wanted = selected(scores, router.bias.tolist(), 4, 2, 3)
        assert ids[token].tolist() == wanted
        whole = sum(scores[expert] for expert in wanted)
        assert weights[token].tolist() == pytest.approx([2.5 * scores[expert] / whole for expert in wanted])
        for expert in wanted:
            counts[expert] += 1
    assert router.counts.tolist() == counts


def test_all_the_choices_of_a_step_are_counted_and_those_of_an_evaluation_are_not():
    model, tokens = deepseek.build(DEEPSEEK), torch.randint(0, 20, (2, 8))
    for _ in range(3):
        model(tokens)
    model.eval()(tokens)
    assert [int(layer.moe.router.counts.sum()) for layer in model.layers[1:]] == [3 * 2 * 8 * 3] * 2


def test_biases_move_by_the_sign_of_what_an_expert_lacks_and_the_counts_begin_anew():
    buffers = {
        "layers.1.moe.router.bias": torch.tensor([0.5, 0.0, -0.25, 1.0]),
        "layers.1.moe.router.counts": torch.tensor([4, 0, 9, 3]),
    }
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    after = deepseek.balanced(buffers, speed=0.125)
    assert after["layers.1.moe.router.bias"].tolist() == [0.5, 0.125, -0.375, 1.125]
    assert after["layers.1.moe.router.counts"].tolist() == [0, 0, 0, 0]
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def test_latent_attention_is_a_loop_over_heads_and_positions():
    config = attrs.evolve(DEEPSEEK, rope_factor=40.0, rope_trained=8)
    attention, x = Attention(config, 0.3), torch.randn(6, 8)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    angles = rope_angles(config).double()

    def normed(vector, weight):
        return vector / (vector.square().mean() + 1e-6).sqrt() * weight

    def turned(vector, position):
        pairs = torch.complex(vector[:2], vector[2:]) * torch.polar(torch.ones(2), angles[position, :2])
        return torch.cat((pairs.real, pairs.imag))

    rows = []
    for at in range(6):
        heads = []
        for head in range(3):
            latent = normed(attention.wq_a.weight @ x[at], attention.q_norm.weight)
            query = attention.wq_b.weight[head * 8 : head * 8 + 8] @ latent
            scores, values = [], []
            for before in range(at + 1):
                made = attention.wkv_a.weight @ x[before]
                both = attention.wkv_b.weight[head * 10 : head * 10 + 10] @ normed(made[:5], attention.kv_norm.weight)
                score = query[:4] @ both[:4] + turned(query[4:], at) @ turned(made[5:], before)
                scores.append(score / 8**0.5 * (0.1 * math.log(40) + 1) ** 2)
                values.append(both[4:])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(attention.wo.weight @ torch.cat(heads))
    cos, sin = (table[:6].double().unsqueeze(1) for table in (rope_angles(config).cos(), rope_angles(config).sin()))
    torch.testing.assert_close(attention(x[None], cos, sin)[0], torch.stack(rows), atol=1e-6, rtol=1e-6)


def test_yarn_keeps_what_turns_often_in_pretraining_and_stretches_what_turns_less_than_once():
    plain = attrs.evolve(deepseek.PRESETS["671b"], max_seq_len=2, rope_factor=1.0)
    stretched = attrs.evolve(plain, rope_factor=40.0)
    one, two = (rope_angles(config)[1, :32].double() for config in (plain, stretched))
    turns = one * 4096 / (2 * math.pi)
    assert torch.equal(one[turns > 32], two[turns > 32])
    assert two[turns < 1].tolist() == pytest.approx((one[turns < 1] / 40).tolist())
    between = (turns < 30) & (turns > 1.2)
    assert bool(((two < one) & (two > one / 40))[between].all())
    assert int(between.sum()) > 5


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_the_job_that_trains_takes_a_familys_loss_and_its_update_of_buffers(family, tmp_path, capfd):
    torch.set_default_dtype(torch.float32)  # the job sets its own
    line = f"--family {family} --steps 2 --batch 2 --seq 16 --metrics {tmp_path / 'metrics'} --out {tmp_path / 'run'}"
    assert train.main(line.split()) == 0
    assert "done: mesh= steps=2 loss=" in capfd.readouterr().out
    first = json.loads((tmp_path / "metrics").read_text().splitlines()[0])
    plain = {"mixtral": math.log(256) + 0.02 + 0.001 * math.log(8) ** 2, "deepseek": math.log(256)}
    assert first["loss"] == pytest.approx(plain[family], abs=0.1 if family == "deepseek" else 0.06)
