"""Attention over a split sequence: the numbers stay those of the plain program, by each strategy."""

import pytest

from tests.distributed.context import TOLERANCE, Case, compare
from tests.distributed.harness import run_ranks

COVERING = [
    Case("cp=2", "allgather", balance=True, kv_heads=2),
    Case("cp=2", "allgather", balance=False, value_dim=2),
    Case("cp=2", "allgather", "documents", balance=True, kv_heads=1),
    Case("cp=2", "allgather", "biased"),
    Case("cp=2", "allgather", "padded", balance=True),
    Case("cp=2", "ring", balance=True, kv_heads=1, remat=True),
    Case("cp=2", "ring", "full", balance=True, value_dim=2),
    Case("cp=2", "ring", balance=False, accumulate=2),
    Case("cp=2", "ulysses", balance=True, kv_heads=2),
    Case("cp=2", "ulysses", "documents"),
    Case("cp=2", "ulysses", "biased", balance=True),
    Case("cp=2,tp=2", "ring", kv_heads=2),
    Case("cp=2,tp=2", "allgather", "biased", remat=True),
    Case("cp=2,tp=2", "ulysses"),
    Case("fsdp=2,cp=2", "ring", "full"),
    Case("fsdp=2,cp=2", "allgather", accumulate=2),
    Case("dp=2,cp=2", "ulysses", "documents"),
    Case("cp=4", "ring", kv_heads=2),
    Case("cp=4", "ring", balance=False),
    Case("cp=4", "allgather", "full", value_dim=2),
    Case("cp=4", "allgather", kv_heads=1),
]


@pytest.mark.parametrize("world", sorted({case.world for case in COVERING}))
def test_loss_gradients_and_parameters_are_the_plain_programs(world: int):
    cases = [case for case in COVERING if case.world == world]

    def run(rank: int, size: int) -> list[dict[str, float]]:
        return [compare(case) for case in cases]

    found = dict(zip(cases, run_ranks(world, run)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if not max(wrong.values()) <= TOLERANCE} == {}
