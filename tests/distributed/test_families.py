"""GPT-2 and ViT compute on every mesh what their plain programs compute."""

import re
from collections.abc import Callable

import attrs
import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from models import gpt2, vit
from tests.distributed import parity
from tests.distributed.harness import run_ranks
from tests.distributed.parity import ROWS, TOLERANCE, Case, Family, Outcome
from tests.distributed.test_collectives import compare_step

MESHES = ["", "tp=2", "fsdp=2", "dp=2", "fsdp=2,tp=2", "dp=2,tp=2", "tp=4", "fsdp=4"]


def enlarged(model: nn.Module) -> nn.Module:
    """Weights ten times the usual and biases that are not zero, so that every path carries gradients."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "cls_token":
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.mul_(10)
    return model


# D is 24, for columns are stored evenly; 50 rows of vocabulary and 9 classes divide over no storage ranks.
GPT2_SIZES = gpt2.GPT2Config(
    dim=24, n_layers=2, n_heads=8, head_dim=4, ffn_dim=40, vocab_size=50, max_seq_len=11, dropout=0.0
)
VIT_SIZES = vit.ViTConfig(
    dim=24, n_layers=2, n_heads=8, head_dim=4, ffn_dim=40, patch_size=2, image_size=6, n_classes=9
)


def make_images(step: int) -> dict[str, Tensor]:
    """A global batch of 16 images; the label of the third counts nothing."""
    generator = torch.Generator().manual_seed(200 + step)
    images = torch.randn(ROWS, 3, 6, 6, generator=generator)
    labels = torch.randint(0, VIT_SIZES.n_classes, (ROWS,), generator=generator)
    labels[2] = -100
    return {"images": images, "labels": labels}


def images_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"], ignore_index=-100)


GPT2 = Family(
    name="gpt2",
    make=lambda tied: enlarged(gpt2.build(GPT2_SIZES)),
    rules={True: gpt2.RULES, False: gpt2.WITHOUT_SP},
    batch=parity.make_batch,
    plain_loss=parity.plain_loss,
)
VIT = Family(
    name="vit",
    make=lambda tied: enlarged(vit.build(VIT_SIZES)),
    rules={False: vit.RULES},
    batch=make_images,
    plain_loss=images_loss,
)


def cases_of(meshes: list[str]) -> list[Case]:
    """Every mesh with each family and table."""
    return [
        Case(mesh, sp=sp, tied=family is GPT2, family=family)
        for mesh in meshes
        for family in (GPT2, VIT)
        for sp in family.rules
    ]


def on_images_of(channels: int) -> Callable[[int], dict[str, Tensor]]:
    """Batches of images with another number of channels."""

    def batch(step: int) -> dict[str, Tensor]:
        images = torch.randn(ROWS, channels, 6, 6, generator=torch.Generator().manual_seed(300 + step))
        return {**make_images(step), "images": images}

    return batch


def frozen(family: Family, pattern: str) -> Family:
    """The family with some of its parameters not trained."""

    def make(tied: bool) -> nn.Module:
        model = family.make(tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not re.fullmatch(pattern, name))
        return model

    return attrs.evolve(family, name=f"{family.name} without {pattern}", make=make)


def varied(family: Family, name: str, rules: ss.Rules, **changes: object) -> Family:
    """The family under another table."""
    return attrs.evolve(family, name=f"{family.name} {name}", rules={True: rules}, **changes)


VARIANTS = [
    varied(
        GPT2,
        "with its vocabulary split",
        gpt2.RULES.override(
            drop=["tokens", r"labels|wte:in"],
            params={r"wte\.weight|lm_head\.weight": "V@(tp,fsdp) D"},
            activations={
                "tokens|labels": "B@(dp,fsdp) S@cp",
                "wte": "B@(dp,fsdp) S@(cp,tp) D",
                "lm_head:in": "B@(dp,fsdp) S@cp D",
                "lm_head": "B@(dp,fsdp) S@cp V@tp",
            },
        ),
    ),
    varied(
        GPT2,
        "with both embeddings pending until dropout",
        gpt2.RULES.override(
            drop=["tokens", r"labels|wte:in", "wpe:in"],
            params={r"wte\.weight|lm_head\.weight": "V@(tp,fsdp) D", r"wpe\.weight": "T@fsdp D +tp"},
            activations={
                "tokens|labels": "B@(dp,fsdp) S@cp",
                "drop:in": "B@(dp,fsdp) S@(cp,tp) D",
                "lm_head:in": "B@(dp,fsdp) S@cp D",
                "lm_head": "B@(dp,fsdp) S@cp V@tp",
            },
        ),
    ),
    # A value without a batch, declared: what it owes over data axes goes on to the parameter behind it.
    varied(
        GPT2,
        "with positions declared behind their lookup",
        gpt2.RULES.override(drop=["wpe:in"], activations={"wpe": "S@(cp,tp) D"}),
    ),
    varied(
        GPT2,
        "with rows that storage divides unevenly behind tp",
        gpt2.RULES,
        make=lambda tied: enlarged(gpt2.build(attrs.evolve(GPT2_SIZES, ffn_dim=42))),
    ),
    frozen(GPT2, r"wte.*|wpe.*|h\.0\..*"),
    frozen(GPT2, r".*weight"),
    varied(
        VIT,
        "with a convolution split over what it makes",
        vit.RULES.override(
            params={
                r"patch_embed\.proj\.weight": "D@(tp,fsdp) C p p",
                r"patch_embed\.proj\.bias": "D@(tp,fsdp)",
            },
            activations={"patch_embed": "B@(dp,fsdp) N D"},
        ),
    ),
    varied(
        VIT,
        "with a convolution split over what it reads",
        vit.RULES.override(
            params={
                r"patch_embed\.proj\.weight": "D@fsdp C@tp p p",
                r"patch_embed\.proj\.bias": "D@fsdp +tp",
            },
            activations={"images": "B@(dp,fsdp) C@tp Y X", "patch_embed": "B@(dp,fsdp) N D"},
        ),
        make=lambda tied: enlarged(vit.build(attrs.evolve(VIT_SIZES, channels=4))),
        batch=on_images_of(4),
    ),
    varied(
        VIT,
        "with a class token that no rank divides",
        vit.RULES.override(params={"cls_token": "1 1 D", "pos_embed": "1 T@fsdp D"}),
    ),
]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_gradients_norms_and_parameters_after_five_steps_are_the_plain_programs(world: int):
    cases = [case for case in cases_of(MESHES) if case.world == world]
    cases += [attrs.evolve(case, accumulate=2, remat=True) for case in cases if case.mesh in ("fsdp=2,tp=2", "")]
    found = dict(zip(cases, run_ranks(world, parity.on_rank, cases)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if max(wrong.values()) > TOLERANCE} == {}


def test_other_tables_and_frozen_parameters_are_the_plain_program_too():
    cases = [Case("fsdp=2,tp=2", sp=True in family.rules, family=family) for family in VARIANTS]
    found = dict(zip(cases, run_ranks(4, parity.on_rank, cases)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if max(wrong.values()) > TOLERANCE} == {}


# A plan tells the bytes of the rank that stores most; here all store alike.
EVEN = attrs.evolve(GPT2, make=lambda tied: enlarged(gpt2.build(attrs.evolve(GPT2_SIZES, max_seq_len=12))))


@pytest.mark.parametrize(
    "case",
    [
        Case("fsdp=2,tp=2", family=EVEN),
        Case("fsdp=2,tp=2", family=EVEN, remat=True),
        Case("dp=2,tp=2", family=VIT, sp=False, remat=True),
        Case("fsdp=2,tp=2", family=frozen(EVEN, r".*weight")),
    ],
    ids=str,
)
def test_a_step_runs_the_collectives_of_its_plan(case: Case):
    for expected, ran in run_ranks(case.world, compare_step, case):
        assert ran == expected


def outcomes(rank: int, world: int, cases: list[Case]) -> list[Outcome | None]:
    torch.set_num_threads(1)
    found = [parity.run_sharded(case) for case in cases]
    return [outcome if rank == 0 else None for outcome in found]


def test_dropout_is_the_same_on_every_mesh():
    def make(tied: bool) -> nn.Module:
        return enlarged(gpt2.build(attrs.evolve(GPT2_SIZES, dropout=0.1)))

    family = attrs.evolve(GPT2, name="gpt2 with dropout", make=make)
    alone, undropped = run_ranks(1, outcomes, [Case("", family=family), Case("", family=GPT2)])[0]
    assert abs(alone.loss - undropped.loss) > 1e-3
    cases = [Case("fsdp=2,tp=2", family=family), Case("dp=2,tp=2", sp=False, family=family, remat=True)]
    for case, found in zip(cases, run_ranks(4, outcomes, cases)[0], strict=True):
        assert max(parity.differences(alone, found).values()) < TOLERANCE, case


def half_losses(rank: int, world: int, mesh: str) -> list[float]:
    """The first loss of ViT in float32, and with its parameters read in bfloat16."""
    torch.set_num_threads(1)
    batch = {name: item.float() if item.is_floating_point() else item for name, item in make_images(0).items()}
    losses: list[float] = []
    for policy in (ss.Policy(), ss.Policy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)):
        sharded = ss.shard(lambda: VIT.make(False), vit.RULES, ss.Mesh.parse(mesh), batch, policy=policy)
        state = sharded.init(ss.adamw(lr=1e-3), seed=3)
        _, metrics = ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(batch))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(("world", "mesh"), [(1, ""), (2, "tp=2"), (2, "fsdp=2")])
def test_images_are_read_in_the_dtype_of_the_parameters_with_storage_and_without(world: int, mesh: str):
    whole, half = run_ranks(world, half_losses, mesh)[0]
    assert whole != half
    assert half == pytest.approx(whole, rel=5e-3)
