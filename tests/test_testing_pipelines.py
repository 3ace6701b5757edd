"""`assert_parity` of pipelines, whose ranks are threads."""

import gc
import threading
import time

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardspec as ss
from models import gpt2, llama
from models.llama import LlamaConfig
from shardspec.runtime import pipeline, step
from shardspec.testing import ParityError, assert_parity
from tests.distributed import parity

BATCH = parity.make_batch(0)
GPT2 = gpt2.GPT2Config(
    dim=24, n_layers=4, n_heads=8, head_dim=4, ffn_dim=40, vocab_size=40, max_seq_len=11, dropout=0.1
)


@pytest.fixture(autouse=True)
def _clean():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    assert not dist.is_initialized()
    assert gc.isenabled()


def build(*, tied: bool = False) -> nn.Module:
    sizes = attrs.asdict(parity.make_config(tied=tied))
    return llama.build(LlamaConfig(**{**sizes, "n_layers": 4}))


def compare(mesh: str, loss_fn=parity.loss_fn, *, tied: bool = False, rules=llama.RULES, **policy) -> None:
    chosen = ss.Policy(**policy) if policy else None
    assert_parity(lambda: build(tied=tied), rules, ss.Mesh.parse(mesh), BATCH, loss_fn, policy=chosen, timeout=60)


@pytest.mark.parametrize(
    ("mesh", "policy"),
    [
        ("pp=2", {}),
        ("pp=2", {"tied": True, "schedule": "LoopedBFS", "microbatches": 2}),
        ("pp=4", {"schedule": "GPipe", "microbatches": 2, "remat": True}),
        ("pp=2,tp=2", {"tied": True, "schedule": "ZBVZeroBubble", "microbatches": 4}),
        ("pp=2,fsdp=2", {"schedule": "Interleaved1F1B", "microbatches": 4}),
        ("dp=2,pp=2", {"stages": (1, 3), "accumulate": 4}),
    ],
    ids=str,
)
def test_a_pipeline_has_parity_under_its_schedule(mesh, policy):
    compare(mesh, **policy)


def test_dropout_draws_by_global_microbatch_in_a_pipeline_too():
    batch = {name: item[:12] for name, item in BATCH.items()}
    assert_parity(lambda: gpt2.build(GPT2), gpt2.RULES, ss.Mesh(pp=2, tp=2), batch, parity.loss_fn)


def test_a_gradient_that_lacks_its_other_home_is_seen(monkeypatch):
    monkeypatch.setattr(step, "sum_over_homes", lambda sharded, grads: None)
    compare("pp=2")
    with pytest.raises(
        ParityError, match=r"gradient of tok_embeddings.weight: differs by \S+ at \[\d+, \d+\] on rank [01]"
    ):
        compare("pp=2", tied=True)


def test_a_gradient_that_crosses_as_another_is_seen_on_the_stages_before_alone(monkeypatch):
    real = pipeline.Flight._arrived

    def doubled(self, kind, *at):
        return [tensor * (1 + (kind == "B" and at[1] == 1)) for tensor in real(self, kind, *at)]

    monkeypatch.setattr(pipeline.Flight, "_arrived", doubled)
    with pytest.raises(ParityError) as caught:
        compare("pp=2", schedule="GPipe", microbatches=2)
    wrong = {difference.what for difference in caught.value.differences if difference.what.startswith("gradient")}
    assert wrong >= {"gradient of layers.0.attention.wq.weight", "gradient of tok_embeddings.weight"}
    assert not any("layers.2" in what or "layers.3" in what or "output" in what for what in wrong)


def test_a_rank_that_fails_frees_those_that_wait_for_its_messages():
    def only_the_last(output, batch):
        if output.device.type != "meta" and threading.current_thread().name == "rank 1":
            raise ZeroDivisionError("in the loss")
        return parity.loss_fn(output, batch)

    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        compare("pp=2", only_the_last, microbatches=4)
    assert time.monotonic() - begin < 30
    compare("pp=2", microbatches=4)


def test_a_pipeline_wants_a_loss_of_its_own():
    with pytest.raises(ValueError, match="2 microbatches need a loss_fn"):
        assert_parity(build, llama.RULES, ss.Mesh(pp=2), {"tokens": BATCH["tokens"]})
    assert torch.get_default_dtype() == torch.float32
