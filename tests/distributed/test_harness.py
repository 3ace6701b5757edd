"""The multi-rank harness reports failures as they were, and its log agrees with bytes counted by hand."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed.harness import Collective, CollectiveLog, RankError, run_ranks


def test_each_rank_returns_its_own_result_in_order():
    def sum_of_ranks(rank: int, world: int, offset: int) -> tuple[int, float]:
        total = torch.tensor(float(rank + offset))
        dist.all_reduce(total)
        return rank, float(total)

    assert run_ranks(4, sum_of_ranks, 10) == [(rank, 46.0) for rank in range(4)]


def test_one_rank_runs_in_its_own_process_without_a_group():
    def look(rank: int, world: int) -> tuple[int, int, bool, int]:
        return rank, world, dist.is_initialized(), os.getpid()

    [(rank, world, initialized, pid)] = run_ranks(1, look)
    assert (rank, world, initialized) == (0, 1, False)
    assert pid != os.getpid()


def test_tensors_come_back_whole_after_their_process_is_gone():
    def make(rank: int, world: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((300, 300), rank, dtype=torch.float64)}

    results = run_ranks(2, make)
    assert [float(result["x"].mean()) for result in results] == [0.0, 1.0]
    assert results[1]["x"].dtype == torch.float64


def test_backward_works_in_ranks_forked_after_a_backward_in_the_parent():
    torch.ones(512, 512, requires_grad=True).mm(torch.ones(512, 512)).sum().backward()

    def grad(rank: int, world: int) -> float:
        x = torch.ones(512, 512, requires_grad=True)
        x.mm(torch.ones(512, 512)).sum().backward()
        return float(x.grad[0, 0])

    assert run_ranks(2, grad) == [512.0, 512.0]


def test_the_rank_that_failed_first_is_named_with_its_traceback():
    def fail_on_two(rank: int, world: int) -> None:
        if rank == 2:
            raise ValueError("rows of rank 2 are wrong")
        dist.all_reduce(torch.ones(1))

    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 2 of 4 failed first:(.|\n)*fail_on_two(.|\n)*rows of rank 2") as info:
        run_ranks(4, fail_on_two)
    assert info.value.rank == 2
    assert time.monotonic() - began < 10


def test_lost_connections_do_not_hide_the_failure_that_caused_them():
    def fail_and_leave(rank: int, world: int) -> None:
        if rank == 1:
            dist.destroy_process_group()  # the peers lose their connection before the report comes
            time.sleep(0.1)
            raise ValueError("the cause")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match="the cause") as info:
        run_ranks(3, fail_and_leave)
    assert info.value.rank == 1


def test_of_two_failures_the_earlier_is_reported():
    def fail_in_turn(rank: int, world: int) -> None:
        time.sleep(0.1 if rank == 1 else 0.2)
        raise ValueError(f"failure of rank {rank}")

    with pytest.raises(RankError, match="failure of rank 1"):
        run_ranks(2, fail_in_turn)


def test_a_rank_killed_by_a_signal_leaves_its_stack():
    def crash(rank: int, world: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match=r"rank 1 of 2 failed first:\ndied: SIGSEGV(.|\n)*in crash"):
        run_ranks(2, crash)


def test_ranks_out_of_time_show_where_they_stand():
    def hang(rank: int, world: int) -> None:
        if rank == 1:
            dist.all_reduce(torch.ones(1))

    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 not done after 1 s(.|\n)*in hang") as info:
        run_ranks(2, hang, timeout=1)
    assert info.value.rank is None
    assert time.monotonic() - began < 5


def test_a_result_that_cannot_be_pickled_is_a_failure():
    with pytest.raises(RankError, match="pickle"):
        run_ranks(1, lambda rank, world: lambda: None)


def test_every_kind_is_logged_with_its_group_and_bytes():
    def log_kinds(rank: int, world: int) -> dict[str, list[Collective]]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        x = torch.ones(12)  # 48 bytes
        world_group, inner = dist.group.WORLD, mesh["inner"]
        calls = {
            "all_reduce": lambda: dist.all_reduce(x),
            "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(48), x),
            "all_gather list": lambda: dist.all_gather([torch.empty(12) for _ in range(4)], x),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(3), x),
            "all_to_all": lambda: dist.all_to_all_single(torch.empty(12), x),
            "broadcast": lambda: dist.broadcast(x, 0),
            "functional all_reduce": lambda: funcol.all_reduce(x, "sum", inner).sum(),
            "functional all_gather": lambda: funcol.all_gather_tensor(x, 0, inner).sum(),
            "functional reduce_scatter": lambda: funcol.reduce_scatter_tensor(x, "sum", 0, inner).sum(),
            "functional all_to_all": lambda: funcol.all_to_all_single(x, None, None, inner).sum(),
            "functional coalesced": lambda: funcol.all_reduce_coalesced([x, x[:4]], "sum", inner),
            "coalesced": lambda: all_reduce_together(x, x[:4].clone(), group=world_group),
            "dtensor": lambda: distribute_tensor(x, inner, [Shard(0)], src_data_rank=None).full_tensor(),
            "barrier": dist.barrier,
        }
        return {name: logged(call) for name, call in calls.items()}

    for rank, log in enumerate(run_ranks(4, log_kinds)):
        everyone, inner = (0, 1, 2, 3), (0, 1) if rank < 2 else (2, 3)
        assert log == {
            "all_reduce": [Collective("all_reduce", everyone, 48)],
            "all_gather": [Collective("all_gather", everyone, 192)],
            "all_gather list": [Collective("all_gather", everyone, 192)],
            "reduce_scatter": [Collective("reduce_scatter", everyone, 48)],
            "all_to_all": [Collective("all_to_all", everyone, 48)],
            "broadcast": [Collective("broadcast", everyone, 48)],
            "functional all_reduce": [Collective("all_reduce", inner, 48)],
            "functional all_gather": [Collective("all_gather", inner, 96)],
            "functional reduce_scatter": [Collective("reduce_scatter", inner, 48)],
            "functional all_to_all": [Collective("all_to_all", inner, 48)],
            "functional coalesced": [Collective("all_reduce", inner, 64)],
            "coalesced": [Collective("all_reduce", everyone, 64)],
            "dtensor": [Collective("all_gather", inner, 48)],
            "barrier": [],
        }


def test_the_log_sees_a_backward_of_an_autograd_function():
    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return funcol.all_reduce(grad, "sum", dist.group.WORLD).wait()

    def log_backward(rank: int, world: int) -> tuple[list[Collective], list[Collective]]:
        x = torch.ones(5, dtype=torch.float64, requires_grad=True)
        with CollectiveLog() as forward:
            y = Copy.apply(x).sum()
        with CollectiveLog() as backward:
            y.backward()
        return forward.collectives, backward.collectives

    assert run_ranks(2, log_backward)[0] == ([], [Collective("all_reduce", (0, 1), 40)])


def test_the_log_of_an_fsdp_step_agrees_with_bytes_counted_by_hand():
    def log_step(rank: int, world: int) -> list[list[Collective]]:
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False))
        for module in (*model, model):
            fully_shard(module)
        optimizer = torch.optim.AdamW(model.parameters())
        with CollectiveLog() as forward:
            loss = model(torch.ones(2, 8)).sum()
        with CollectiveLog() as backward:
            loss.backward()
        with CollectiveLog() as step:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
            optimizer.step()
        return [forward.collectives, backward.collectives, step.collectives]

    both = (0, 1)
    first = 8 * 8 * 4
    second = 4 * 8 * 4  # 3 rows, padded to 2 on each of 2 ranks
    for forward, backward, step in run_ranks(2, log_step):
        assert forward == [Collective("all_gather", both, first), Collective("all_gather", both, second)]
        assert sorted(backward, key=lambda call: (call.kind, call.bytes)) == [
            Collective("all_gather", both, second),
            Collective("all_gather", both, first),
            Collective("reduce_scatter", both, second),
            Collective("reduce_scatter", both, first),
        ]
        assert step == [Collective("all_reduce", both, 2 * 4)]  # one norm a parameter


def test_totals_count_and_add_by_kind_and_group():
    def log_totals(rank: int, world: int) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
        with CollectiveLog() as log:
            dist.all_reduce(torch.ones(2))
            dist.all_reduce(torch.ones(3))
            dist.broadcast(torch.ones(1), 0)
        return log.totals()

    assert run_ranks(2, log_totals)[0] == {("all_reduce", (0, 1)): (2, 20), ("broadcast", (0, 1)): (1, 4)}


def test_a_collective_without_an_entry_is_an_error_not_a_gap():
    def call_unknown(rank: int, world: int) -> None:
        with CollectiveLog():
            torch.ops._c10d_functional.isend(torch.ones(1), 1 - rank, 0, dist.group.WORLD.group_name)

    with pytest.raises(RankError, match=r"no entry for _c10d_functional\.isend"):
        run_ranks(2, call_unknown)


def logged(call) -> list[Collective]:
    with CollectiveLog() as log:
        call()
    return log.collectives


def all_reduce_together(*tensors: torch.Tensor, group: dist.ProcessGroup) -> None:
    with dist._coalescing_manager(group=group, async_ops=True) as work:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    work.wait()
