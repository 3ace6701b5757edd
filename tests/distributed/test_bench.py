"""The benchmark measures what it says: bytes and ratios counted by hand, and sides that compute the same."""

import numpy as np
import pytest
import torch

from benchmarks.bench import measure_case
from benchmarks.measure import CallCount, Ratio, alternate, resident_bytes, transient_bytes
from benchmarks.sides import CASES, Case
from models.llama import LlamaConfig
from tests.distributed.harness import run_ranks

TINY = LlamaConfig(dim=32, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=48, vocab_size=64, max_seq_len=16)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_sides_of_every_plan_agree_and_are_measured(case: Case):
    for seconds, peaks, calls in run_ranks(case.world, measure_case, case, TINY, 4, 2, 1):
        sides = {"shardspec", *case.by_hand.values()}
        assert set(seconds) == set(peaks) == set(calls) == sides
        assert all(len(each) == 2 for each in seconds.values())


def test_a_ratio_is_the_median_of_the_paired_ones():
    ratio = Ratio.of([1.0, 30.0, 6.0], [2.0, 10.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 0.5, 3.0)


def test_a_budget_fails_only_where_the_whole_interval_is_above_it():
    noisy = Ratio.of(list(np.linspace(0.8, 1.4, 9)), [1.0] * 9)
    assert noisy.median > 1.0
    assert not noisy.exceeds(1.0)
    assert Ratio.of([1.2, 1.1, 1.3], [1.0, 1.0, 1.0]).exceeds(1.0)


def test_sides_take_turns_and_every_second_round_is_reversed():
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = alternate(sides, rounds=3, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_resident_bytes_count_each_storage_once():
    with resident_bytes() as resident:
        kept = torch.ones(1000, dtype=torch.float64)
        views = [kept[5:], torch.nn.Parameter(kept), kept.view(10, 100)]
        assert resident() == 8000
        del kept, views
        assert resident() == 0


def test_transient_bytes_are_the_peak_of_a_step_not_its_sum():
    def step() -> None:
        for _ in range(3):
            torch.ones(1000, dtype=torch.float64).add_(1)
        torch.ones(500, dtype=torch.float64) + torch.ones(500, dtype=torch.float64)

    assert transient_bytes(step) == 3 * 4000


def test_calls_are_counted_by_operator():
    with CallCount() as count:
        torch.ones(2) + torch.ones(2)
    assert count.calls == {"aten.ones.default": 2, "aten.add.Tensor": 1}
