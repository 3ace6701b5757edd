"""GPT-2 and ViT compute on every mesh what their plain programs compute."""

import attrs
import pytest
import torch
from torch import Tensor, nn

from models import gpt2, vit
from tests.distributed import parity
from tests.distributed.harness import run_ranks
from tests.distributed.parity import ROWS, TOLERANCE, Case, Family

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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_gradients_norms_and_parameters_after_five_steps_are_the_plain_programs(world: int):
    cases = [case for case in cases_of(MESHES) if case.world == world]
    cases += [attrs.evolve(case, accumulate=2, remat=True) for case in cases if case.mesh in ("fsdp=2,tp=2", "")]
    found = dict(zip(cases, run_ranks(world, parity.on_rank, cases)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if max(wrong.values()) > TOLERANCE} == {}
