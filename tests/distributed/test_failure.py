"""A step that fails on one rank: it says where, by whose rule; the others say which rank failed, and nothing goes on
as if nothing had happened."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES, build
from tests.distributed import parity
from tests.distributed.harness import run_ranks

CONFIG = parity.make_config(tied=False)
TIMEOUT = 60


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


def batch_of(rows: int) -> dict[str, Tensor]:
    return {name: item[:rows] for name, item in parity.make_batch(0).items()}


def hang_up() -> None:
    """Close this process's connections to the other ranks, as its end would; the harness's own pipe stays."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found = socket.socket(fileno=os.dup(fd))
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.getpeername():
                    found.shutdown(socket.SHUT_RDWR)
                found.close()
        except OSError:
            continue


def spoil_dtype(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"tokens": batch["tokens"].double()}


def fewer_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: item[:4] for name, item in batch.items()}


def spoil_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["labels"] + 1000}


def spoil_tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"tokens": batch["tokens"] + 1000}


FSDP, TP = "fsdp=2", "tp=2"


def wrong_on_one(rank: int, world: int, mesh: str, spoil: Callable[..., Any]) -> tuple[str, str]:
    """What rank 0, whose batch is good, and rank 1, whose is not, are told in the second step."""
    sharded = ss.shard(lambda: build(CONFIG), RULES, ss.Mesh.parse(mesh), batch_of(16))
    sharded.notices.patience = timedelta(seconds=1)
    state = sharded.init(ss.sgd(lr=0.1))
    step = ss.train_step(sharded, parity.loss_fn)
    state, _ = step(state, sharded.local_batch(batch_of(16)))
    batch = sharded.local_batch(batch_of(16))
    try:
        step(state, spoil(batch) if rank == 1 else batch)
    except Exception as error:
        told = type(error).__name__, str(error)
        if rank == 1:
            hang_up()
        return told
    return "", ""


@pytest.mark.parametrize(
    ("mesh", "spoil", "kind", "code", "words"),
    [
        (FSDP, spoil_dtype, "ShardingError", "SS402", "float64"),
        (FSDP, fewer_rows, "ShardingError", "SS403", "this rank has a batch of tokens (4, 8) int64"),
        (FSDP, spoil_labels, "ValueError", "SS421", "the loss on rank 1"),
        (TP, spoil_labels, "ValueError", "SS421", "label 10"),
        (FSDP, spoil_tokens, "IndexError", "SS421", "tok_embeddings fails in forward on rank 1: IndexError"),
    ],
)
def test_what_is_wrong_on_one_rank_after_the_first_step_every_rank_is_told(mesh, spoil, kind, code, words):
    zero, one = run_ranks(2, wrong_on_one, mesh, spoil, timeout=TIMEOUT)
    assert one[0] == kind
    assert f"error[{code}]" in one[1]
    assert words in one[1]
    assert zero[0] == "ShardingError"
    assert "error[SS403]: rank 1 failed, and this one waited for it" in zero[1]
    assert words in zero[1]


def test_a_new_shape_of_batch_on_every_rank_goes_on():
    def run(rank: int, world: int) -> list[float]:
        sharded = ss.shard(lambda: build(CONFIG), RULES, ss.Mesh(fsdp=2), batch_of(16))
        state = sharded.init(ss.sgd(lr=0.1))
        step, losses = ss.train_step(sharded, parity.loss_fn), []
        for rows in (16, 8, 16, 4):
            state, metrics = step(state, sharded.local_batch(batch_of(rows)))
            losses.append(float(metrics["loss"]))
        return losses

    zero, one = run_ranks(2, run, timeout=TIMEOUT)
    assert zero == one
    assert len(set(zero)) == 4


def test_a_rank_whose_step_failed_alone_does_not_go_on_into_the_midst_of_the_others():
    """Its next collective would pair with another one of theirs, of the same shape, in silence."""

    def run(rank: int, world: int) -> tuple[str, str]:
        sharded = ss.shard(lambda: build(CONFIG), RULES, ss.Mesh(tp=2), batch_of(16))
        sharded.notices.patience = timedelta(seconds=1)
        state = sharded.init(ss.sgd(lr=0.1))
        step = ss.train_step(sharded, parity.loss_fn)
        batch = sharded.local_batch(batch_of(16))
        try:
            step(state, spoil_labels(batch) if rank == 1 else batch)
        except Exception as error:
            if rank == 0:
                return "", str(error)
        with pytest.raises(ss.ShardingError) as caught:
            step(state, batch)
        hang_up()
        return caught.value.diagnostics[0].what, str(caught.value)

    _, one = run_ranks(2, run, timeout=TIMEOUT)
    assert one[0] == "the last step failed on this rank, and not on all"
    assert "label 10" in one[1]


def test_a_connection_that_is_lost_later_is_not_blamed_on_an_earlier_failure():
    def run(rank: int, world: int) -> str:
        sharded = ss.shard(lambda: build(CONFIG), RULES, ss.Mesh(fsdp=2), batch_of(16))
        state = sharded.init(ss.sgd(lr=0.1))
        step = ss.train_step(sharded, parity.loss_fn)
        batch = sharded.local_batch(batch_of(16))
        with pytest.raises(ValueError, match="label 10"):
            step(state, spoil_labels(batch))
        state, _ = step(state, batch)
        if rank == 1:
            hang_up()
            return ""
        with pytest.raises(RuntimeError) as caught:
            step(state, batch)
        return str(caught.value)

    zero, _ = run_ranks(2, run, timeout=TIMEOUT)
    assert "error[SS421]" in zero
    assert "label" not in zero.splitlines()[1]
    assert "rank 1 failed" not in zero


def test_where_every_rank_failed_alike_all_go_on():
    def run(rank: int, world: int) -> float:
        sharded = ss.shard(lambda: build(CONFIG), RULES, ss.Mesh(fsdp=2), batch_of(16))
        state = sharded.init(ss.sgd(lr=0.1))
        step = ss.train_step(sharded, parity.loss_fn)
        batch = sharded.local_batch(batch_of(16))
        for _ in range(2):
            with pytest.raises(ValueError, match="label 10"):
                step(state, spoil_labels(batch))
        _, metrics = step(state, batch)
        return float(metrics["loss"])

    zero, one = run_ranks(2, run, timeout=TIMEOUT)
    assert zero == one > 0


# Where a step fails


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.when = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        if self.when == "forward":
            h = h @ torch.ones(3, 3)
        if self.when == "backward":
            h.register_hook(fail)
        return self.down(h)


def fail(grad: Tensor) -> Tensor:
    return grad.reshape(7, -1)


class Strange(Exception):
    """Of a class that wants two arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one, two)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Head() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


TABLE = ss.Rules(
    params={r"layers\.\d+\.up\.weight": "F@tp D", r"layers\.\d+\.down\.weight": "D F@tp"},
    activations={r"x|y|layers\.\d+(\.down)?|layers\.\d+\.up:in": "B D"},
    units=[r"layers\.\d+"],
)
BATCH = {"x": torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8), "y": torch.zeros(4, 8)}


def failing(when: str, *, mesh: str = "", remat: bool = False, raises: Any = None) -> Exception:
    """What a step raises that fails in layer 1, or in the loss."""

    def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        if when == "loss" and not output.is_meta:
            raise raises or RuntimeError("no such luck\nsecond line")
        return (output - batch["y"]).square().sum(), 4.0

    sharded = ss.shard(Model, TABLE, ss.Mesh.parse(mesh), BATCH, policy=ss.Policy(remat=remat))
    state = sharded.init(ss.sgd(lr=0.1))
    step = ss.train_step(sharded, loss_fn)
    batch = sharded.local_batch(BATCH)
    if when != "loss":
        state, _ = step(state, batch)  # what goes wrong only later
        sharded.module.layers[1].when = when
    with pytest.raises(ss.ShardingError) as caught:
        step(state, batch)
    return caught.value


@pytest.mark.parametrize("mesh", ["", "tp=2"])
def test_an_error_in_forward_tells_module_line_rules_and_tensors(mesh):
    def run(rank: int, world: int) -> tuple[bool, bool, str]:
        error = failing("forward", mesh=mesh)
        return isinstance(error, RuntimeError), isinstance(error.__cause__, RuntimeError), str(error)

    for rank, (same_class, chained, said) in enumerate(run_ranks(2 if mesh else 1, run, timeout=TIMEOUT)):
        assert same_class
        assert chained
        assert "error[SS421]: layers.1 fails in forward" in said
        assert (f"on rank {rank}" in said) == bool(mesh)
        assert "h = h @ torch.ones(3, 3)" in said
        assert 'r"x|y|layers\\.\\d+(\\.down)?|layers\\.\\d+\\.up:in": "B D"' in said
        assert "layers.1 is (4, 8) on a rank: [4, 8]" in said


def test_an_error_in_the_loss_tells_the_line_and_the_batch():
    error = failing("loss")
    (found,) = error.diagnostics
    assert type(error).__name__ == "RuntimeError"
    assert found.what == "the step fails in the loss: RuntimeError: no such luck"
    assert found.why.splitlines()[0] == "second line"
    assert "y is (4, 8) on a rank: [4, 8]" in found.why
    assert Path(found.locations[0].file).name == "test_failure.py"
    assert found.locations[0].text.startswith("raise raises or RuntimeError")


def test_an_error_in_backward_tells_the_line_that_is_known():
    (found,) = failing("backward").diagnostics
    assert found.what.startswith("the step fails in backward: RuntimeError: ")
    assert found.locations[0].text == "return grad.reshape(7, -1)"


@pytest.mark.parametrize("raised", [KeyError("k"), IndexError("i"), Strange("a", "b"), OSError(2, "o")])
def test_the_class_of_an_error_stays(raised):
    error = failing("loss", raises=raised)
    assert isinstance(error, ss.ShardingError)
    assert isinstance(error, type(raised))
    assert error.__cause__ is raised
    assert "error[SS421]" in str(error)


def test_our_own_refusals_and_interrupts_stay_as_they_are():
    refusal = ss.ShardingError([ss.Diagnostic(code="SS310", what="of one's own")])
    assert failing("loss", raises=refusal) is refusal
