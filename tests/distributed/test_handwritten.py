"""The hand-written training steps that shardspec is measured against compute what the plain loop does."""

from collections.abc import Callable

import attrs
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.experts_by_hand import ExpertsTrainer
from benchmarks.handwritten import IGNORED, Batch, Options, Trainer
from benchmarks.pipeline_by_hand import PipelineTrainer
from benchmarks.sides import SHARED_SIZES
from models import mixtral
from models.llama import LlamaConfig, build
from models.mixtral import MixtralConfig
from tests.distributed.harness import CollectiveLog, run_ranks

CONFIG = LlamaConfig(dim=32, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=48, vocab_size=64, max_seq_len=16)
BATCH, SEQ, STEPS = 4, 16, 2
CLIP = 0.05  # below the gradient's norm, so that clipping matters
MESHES = [
    ({"tp": 2}, True),
    ({"tp": 2}, False),
    ({"tp": 4}, True),
    ({"tp": 4}, False),
    ({"fsdp": 2}, True),
    ({"fsdp": 4}, True),
    ({"dp": 2, "fsdp": 2}, True),
    ({"fsdp": 2, "tp": 2}, True),
    ({"fsdp": 2, "tp": 2}, False),
]


@pytest.mark.parametrize("form", ["styles", "tuned"])
@pytest.mark.parametrize(("sizes", "sp"), MESHES)
def test_two_steps_on_a_mesh_equal_two_plain_ones(sizes: dict[str, int], sp: bool, form: str):
    def train_on_mesh(rank: int, world: int):
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return train(Trainer.make(model(), mesh, Options(sp=sp, form=form, clip=CLIP)))

    world = torch.tensor(list(sizes.values())).prod().item()
    expected = plain_loop()
    for result in run_ranks(world, train_on_mesh):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 2, "tp": 2}])
def test_two_steps_of_a_pipeline_equal_two_plain_ones(sizes: dict[str, int]):
    def train_stage(rank: int, world: int):
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        trainer = PipelineTrainer.make(model(), mesh, Options(clip=CLIP), microbatches=2)
        metrics = [trainer.step(batch) for batch in batches()]
        return metrics[-1], trainer.full_parameters()

    expected, world = plain_loop(), torch.tensor(list(sizes.values())).prod().item()
    held = {}
    for metrics, parameters in run_ranks(world, train_stage):
        held |= parameters
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(metrics[name], expected["metrics"][name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(held, expected["parameters"], rtol=1e-10, atol=1e-12)


def test_two_steps_of_a_mixture_over_ep_equal_two_plain_ones():
    def train_mixture(rank: int, world: int):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
        return train(ExpertsTrainer.make(mixture(), mesh, Options(clip=CLIP)))

    expected = plain_loop(mixture)
    for result in run_ranks(2, train_mixture):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_the_trainer_of_one_rank_is_the_plain_loop():
    assert torch.equal(
        train(Trainer.make(model(), None, Options(clip=CLIP)))["parameters"]["norm.weight"],
        plain_loop()["parameters"]["norm.weight"],
    )


@pytest.mark.parametrize("form", ["styles", "tuned"])
def test_a_block_has_two_reductions_over_tp_in_forward_and_two_in_backward(form: str):
    def log_tp(rank: int, world: int) -> tuple[int, int]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        trainer = Trainer.make(model(), mesh, Options(sp=False, form=form))
        with CollectiveLog() as log:
            trainer.backward(batches()[0])
        stream = BATCH * SEQ * CONFIG.dim * 8
        return sum(call.bytes == stream for call in log.collectives), {call.kind for call in log.collectives}

    embedding, head = 1, 1
    per_block = 2 + 2
    assert run_ranks(2, log_tp)[0] == (embedding + head + per_block * CONFIG.n_layers, {"all_reduce"})


def test_the_tuned_sequence_parallel_step_sums_its_norms_in_one_all_reduce():
    def log_sp(rank: int, world: int) -> list[int]:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        trainer = Trainer.make(model(), mesh, Options(sp=True))
        with CollectiveLog() as log:
            trainer.step(batches()[0])
        return [call.bytes for call in log.collectives if call.kind == "all_reduce"]

    max_and_sums = [BATCH * SEQ * 8, 2 * BATCH * SEQ * 8]
    norms = (2 * CONFIG.n_layers + 1) * CONFIG.dim * 8
    assert run_ranks(2, log_sp)[0] == [*max_and_sums, norms, 8]


def train(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Return the first step's gradients and metrics, and the parameters after the last."""
    for index, batch in enumerate(batches()):
        metrics = trainer.backward(trainer.local_batch(batch))
        if index == 0:
            gradients = trainer.full_gradients()
        norm = trainer.update()
    return {
        "gradients": gradients,
        "metrics": metrics | {"grad_norm": norm},
        "parameters": trainer.full_parameters(),
    }


def plain_loop(make: Callable[[], nn.Module] | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """The same from the plainest loop there is; a mixture's forward gives the routers' loss too, to be added."""
    plain, gradients = (make or model)(), {}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for batch in batches():
        counted = batch["labels"] != IGNORED
        output = plain(batch["tokens"])
        logits, aux = output if isinstance(output, tuple) else (output, 0)
        log_p = logits.log_softmax(-1)[counted]
        loss = aux - log_p.gather(1, batch["labels"][counted][:, None]).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in plain.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
    assert norm > CLIP
    return {
        "gradients": gradients,
        "metrics": {"loss": loss.detach(), "weight": counted.sum().double(), "grad_norm": norm},
        "parameters": {name: p.detach() for name, p in plain.named_parameters()},
    }


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(CONFIG).double()


def mixture() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = attrs.asdict(CONFIG, filter=lambda field, _: field.name in SHARED_SIZES)
    return mixtral.build(MixtralConfig(**sizes, n_experts=4, ffn_dim=24)).double()


def batches() -> list[Batch]:
    """Global batches whose masked labels lie unevenly over the rows."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, CONFIG.vocab_size, (STEPS, BATCH, SEQ + 1), generator=generator)
    labels = rows[..., 1:].clone()
    labels[:, 0, 3:] = IGNORED
    labels[:, 2, :2] = IGNORED
    return [{"tokens": tokens, "labels": label} for tokens, label in zip(rows[..., :-1], labels, strict=True)]
