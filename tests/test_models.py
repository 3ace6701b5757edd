"""The Llama family: sizes, causality, ties and positions."""

import attrs
import pytest
import torch

from models.llama import PRESETS, build

# published: Llama 3 and 3.1 8B and 70B, 3.1 405B, 3.2 1B; debug is counted by hand:
# 2*256*128 + 128 + 4*(2*128*128 + 2*64*128 + 3*448*128 + 2*128)
SIZES = {
    "debug": 951_424,
    "1b": 1_235_814_400,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("debug").double()


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", SIZES)
def test_a_preset_has_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = build(preset)
    assert sum(p.numel() for p in model.parameters()) == SIZES[preset]
    assert PRESETS.keys() == SIZES.keys()


def test_logits_have_one_row_a_token(model, tokens):
    assert model(tokens).shape == (2, 12, 256)


def test_a_token_does_not_see_those_after_it(model, tokens):
    changed = tokens.clone()
    changed[:, 7:] += 1
    before, after = model(tokens), model(changed % 256)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-13)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def test_a_tied_model_has_one_matrix_under_two_names():
    model = build(attrs.evolve(PRESETS["debug"], tied=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) == SIZES["debug"] - 256 * 128


def test_positions_from_zero_are_the_default(model, tokens):
    assert torch.equal(model(tokens, positions=torch.arange(12)), model(tokens))


def test_only_distances_between_positions_matter(model, tokens):
    torch.testing.assert_close(model(tokens, positions=torch.arange(12) + 100), model(tokens), rtol=1e-4, atol=1e-6)
    stretched = model(tokens, positions=torch.arange(12) * 3)
    assert (stretched - model(tokens)).abs().max() > 1e-3


def test_a_model_cut_to_half_its_heads_runs_as_it_is(tokens):
    """Keep query heads 0-3 with their key-value heads 0-1: the module must not know the full number."""
    attention = build("debug").layers[0].attention
    x, cos, sin = torch.randn(2, 12, 128), torch.ones(12, 1, 16), torch.zeros(12, 1, 16)
    whole = attention(x, cos, sin)
    halves = []
    for half in (0, 1):
        part = build("debug").layers[0].attention
        for name in ("wq", "wk", "wv"):
            part.get_submodule(name).weight = torch.nn.Parameter(getattr(attention, name).weight.chunk(2)[half])
        part.wo.weight = torch.nn.Parameter(attention.wo.weight.chunk(2, dim=1)[half])
        halves.append(part(x, cos, sin))
    torch.testing.assert_close(sum(halves), whole)


def test_weights_start_with_the_deviation_asked_for(model):
    block = model.layers[0]
    scaled = 0.02 / 8**0.5
    for weight, std in [
        (model.tok_embeddings.weight, 0.02),
        (block.attention.wq.weight, 0.02),
        (block.attention.wo.weight, scaled),
        (block.feed_forward.w2.weight, scaled),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(block.ffn_norm.weight, torch.ones(128, dtype=torch.float64))


def test_long_context_scaling_divides_slow_turns_and_keeps_fast_ones():
    plain = build(attrs.evolve(PRESETS["debug"], n_layers=1, dim=512, n_heads=4, n_kv_heads=4, head_dim=128))
    scaled = build(attrs.evolve(plain.config, rope_scale=8.0))
    angle = [torch.atan2(m.rope_sin[1], m.rope_cos[1]) for m in (plain, scaled)]
    torch.testing.assert_close(angle[1][:16], angle[0][:16])
    torch.testing.assert_close(angle[1][60:64] * 8, angle[0][60:64])


def test_the_rules_are_there_with_and_without_sequence_parallelism():
    from models.llama import RULES, WITHOUT_SP

    assert RULES != WITHOUT_SP
