"""Pipelines under policies that change speed alone: the same numbers as without, on ranks that are processes."""

from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

import shardspec as ss
from models import llama
from tests.distributed import parity
from tests.distributed.harness import run_ranks
from tests.distributed.test_pipeline import gathered, make_model

LAYERS = r"layers\.\d+"


@attrs.frozen
class Run:
    """Losses and gradients of two batches, and what was compiled."""

    losses: tuple[float, ...]
    grads: tuple[dict[str, Tensor], ...]
    compiled: dict[str, int]
    """Module that was to be compiled -> how many graphs of it were."""


def run_policy(mesh: str, policy: ss.Policy) -> Run:
    """On every rank; what is compiled runs as traced by AOT autograd, no kernel is generated."""
    torch.set_default_dtype(torch.float64)
    compiled: dict[str, int] = {}

    def compiling(self: nn.Module) -> None:
        name = f"{type(self).__name__} {len(compiled)}"
        compiled[name] = 0
        aot: Any = lookup_backend("aot_eager")

        def backend(graph: Any, inputs: Any, **options: Any) -> Any:
            compiled[name] += 1
            return aot(graph, inputs, **options)

        real(self, backend=backend)

    batches = [parity.make_batch(index) for index in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        real = nn.Module.compile
        patch.setattr(nn.Module, "compile", compiling)
        sharded = ss.shard(lambda: make_model(tied=False), llama.RULES, ss.Mesh.parse(mesh), batches[0], policy=policy)
    state = sharded.init(ss.adamw(lr=1e-3), seed=3)
    grad_fn = sharded.value_and_grad(parity.loss_fn)
    found = [grad_fn(state.params, sharded.local_batch(batch), state.rng) for batch in batches]
    return Run(tuple(float(loss) for (loss, _), _ in found), tuple(gathered(grads) for _, grads in found), compiled)


CASES = [
    ("pp=2", "1F1B", {"compile": LAYERS}),
    ("pp=2,fsdp=2", "Interleaved1F1B", {"compile": True}),
    ("pp=2,tp=2", "ZBVZeroBubble", {"remat": True, "compile": LAYERS}),
    ("pp=2", "InterleavedZeroBubble", {"remat": LAYERS}),
]


@pytest.mark.parametrize(("mesh", "schedule", "options"), CASES, ids=str)
def test_compiled_and_rematerialised_units_compute_what_others_do(mesh, schedule, options):
    def run(rank: int, world: int) -> tuple[Run, Run]:
        plain = ss.Policy(schedule=schedule, microbatches=4)
        return run_policy(mesh, plain), run_policy(mesh, attrs.evolve(plain, **options))

    for plain, other in run_ranks(ss.Mesh.parse(mesh).world, run, timeout=300):
        assert other.losses == pytest.approx(plain.losses, abs=1e-12)
        for one, two in zip(plain.grads, other.grads, strict=True):
            assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-12
        assert not plain.compiled
        if "compile" in options:
            # Two layers of four lie on each rank.
            assert [graphs > 0 for name, graphs in other.compiled.items() if "Block" in name] == [True, True]
        else:
            assert not other.compiled
