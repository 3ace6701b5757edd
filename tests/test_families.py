"""The GPT-2 and ViT families: sizes, what a model computes, and that their tables pass the check."""

import attrs
import pytest
import torch
import torch.nn.functional as F

import shardspec as ss
from models import gpt2, train, vit

# published; the debug ones are counted by hand:
# 256*128 + 1024*128 + 2*128 + 4*(12*128*128 + 13*128)
# 128*(3*4*4 + 1) + (1 + 65)*128 + 2*128 + 10*128 + 10 + 4*(12*128*128 + 13*128)
SIZES = {
    gpt2: {
        "debug": 957_184,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    },
    vit: {"debug": 809_354, "b16": 86_567_656, "l16": 304_326_632},
}
EVERY_PRESET = [pytest.param(family, preset, id=preset) for family in SIZES for preset in SIZES[family]]


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    return gpt2.build("debug").double()


@pytest.fixture
def image_model():
    torch.manual_seed(0)
    return vit.build("debug").double()


@pytest.mark.parametrize(("family", "preset"), EVERY_PRESET)
def test_a_preset_has_the_published_number_of_parameters(family, preset):
    with torch.device("meta"):
        model = family.build(preset)
    assert sum(p.numel() for p in model.parameters()) == SIZES[family][preset]
    assert family.PRESETS.keys() == SIZES[family].keys()


@pytest.mark.parametrize(
    ("family", "preset", "mesh"),
    [
        (gpt2, "gpt2", "dp=2,fsdp=8,tp=4"),
        (gpt2, "gpt2-medium", "fsdp=16,tp=8"),
        (gpt2, "gpt2-large", "fsdp=32,tp=4"),
        (gpt2, "gpt2-xl", "fsdp=8,tp=5"),
        (vit, "b16", "dp=2,fsdp=8,tp=4"),
        (vit, "l16", "fsdp=32,tp=8"),
    ],
)
def test_a_published_size_passes_the_check_on_a_mesh_of_its_own(family, preset, mesh):
    size = 5 * 128 if preset == "gpt2-xl" else 512
    entries = {
        gpt2: {"tokens": (32, size), "labels": (32, size)},
        vit: {"images": (32, 3, 224, 224), "labels": (32,)},
    }
    inputs = {
        name: torch.empty(shape, dtype=torch.float if name == "images" else torch.long, device="meta")
        for name, shape in entries[family].items()
    }

    def loss_fn(output, batch):
        return ss.cross_entropy(output, batch["labels"])

    for rules in {family.RULES, getattr(family, "WITHOUT_SP", family.RULES)}:
        plan = ss.compile(lambda: family.build(preset), rules, ss.Mesh.parse(mesh), inputs, loss_fn)
        assert sum(torch.Size(p.shape).numel() for n, p in plan.params.items() if n == p.first) == SIZES[family][preset]


def test_logits_have_one_row_a_token(language_model, tokens):
    assert language_model(tokens).shape == (2, 12, 256)


def test_a_token_does_not_see_those_after_it(language_model, tokens):
    changed = tokens.clone()
    changed[:, 7:] += 1
    before, after = language_model(tokens), language_model(changed % 256)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-13)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def test_positions_from_zero_are_the_default_and_each_has_a_row(language_model, tokens):
    assert torch.equal(language_model(tokens, positions=torch.arange(12)), language_model(tokens))
    moved = language_model(tokens, positions=torch.arange(12) + 1)
    assert (moved - language_model(tokens)).abs().max() > 1e-3


def test_the_head_is_the_embedding(language_model):
    assert language_model.lm_head.weight is language_model.wte.weight


def test_dropout_is_of_training_alone(tokens):
    model = gpt2.build(attrs.evolve(gpt2.PRESETS["debug"], dropout=0.1))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_weights_start_with_the_deviation_asked_for(language_model, image_model):
    block = language_model.h[0]
    for weight, std in [
        (language_model.wte.weight, 0.02),
        (language_model.wpe.weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.attn.c_proj.weight, 0.02 / 8**0.5),
        (block.mlp.c_proj.weight, 0.02 / 8**0.5),
        # cut at two deviations: sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)) of the whole's
        (image_model.blocks[0].attn.qkv.weight, 0.02 * 0.8796),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert not block.attn.c_proj.bias.any()


def test_an_image_has_one_row_of_logits_that_every_pixel_moves(image_model, images):
    logits = image_model(images)
    assert logits.shape == (2, 10)
    changed = images.clone()
    changed[0, :, 31, 31] += 1
    moved = (image_model(changed) - logits).abs()
    assert moved[0].max() > 1e-6
    assert not moved[1].any()


def test_a_patch_is_a_square_of_the_image_times_a_matrix(image_model, images):
    embed = image_model.patch_embed
    squares = images.unflatten(3, (8, 4)).unflatten(2, (8, 4)).permute(0, 2, 4, 1, 3, 5).reshape(2, 64, 3 * 4 * 4)
    expected = F.linear(squares, embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(embed(images), expected)


@pytest.mark.parametrize(
    ("attention", "fused", "out"),
    [
        (lambda: gpt2.build("debug").h[0].attn, "c_attn", "c_proj"),
        (lambda: vit.build("debug").blocks[0].attn, "qkv", "proj"),
    ],
)
def test_a_model_cut_to_half_its_heads_runs_as_it_is(attention, fused, out):
    """Queries, keys and values of half the heads: the module must not know the full number."""
    whole, x = attention(), torch.randn(2, 12, 128)
    halves = []
    for half in (0, 1):
        part = attention()
        for name in ("weight", "bias"):
            pieces = getattr(getattr(whole, fused), name).unflatten(0, (3, 2, -1))[:, half].flatten(0, 1)
            setattr(getattr(part, fused), name, torch.nn.Parameter(pieces))
        columns = getattr(whole, out).weight.chunk(2, dim=1)[half]
        getattr(part, out).weight = torch.nn.Parameter(columns)
        getattr(part, out).bias = torch.nn.Parameter(getattr(whole, out).bias / 2)
        halves.append(part(x))
    torch.testing.assert_close(sum(halves), whole(x))


def test_storage_divides_rows_that_tp_left_in_three_pieces():
    rules = gpt2.RULES.override(params={r"h\.\d+\.attn\.c_attn\.weight": "(3 H@tp hd)@fsdp D"})
    inputs = {name: torch.zeros(8, 16, dtype=torch.long) for name in ("tokens", "labels")}
    plan = ss.compile(lambda: gpt2.build("debug"), rules, ss.Mesh(fsdp=2, tp=2), inputs)
    assert plan.params["h.0.attn.c_attn.weight"].local_shape == (96, 128)


def test_the_text_job_refuses_a_family_that_reads_images(capsys):
    assert train.main(["--family", "vit"]) == 2
    assert capsys.readouterr().err == "error: family 'vit' reads images: this job trains on text\n"
