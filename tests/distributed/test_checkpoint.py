"""States as files: any mesh to any other, kills, and what several ranks must agree on."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardspec as ss
from benchmarks.kills import run_kills
from tests.distributed import lasting, parity
from tests.distributed.harness import RankError, run_ranks

CHAIN = ["", "fsdp=3", "tp=2", "fsdp=2,tp=2", "dp=2", "fsdp=4", ""]
"""Every mesh saves, and every mesh restores; `make sweep` runs all pairs."""


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    was, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(was)
    torch.set_num_threads(threads)


def test_what_one_mesh_saves_another_restores_bitwise_and_goes_on_with_the_same_losses(tmp_path: Path):
    """Uneven rows, rows of two runs, ties; dropout and a written buffer go on too."""
    pairs = [*itertools.pairwise(CHAIN), ("fsdp=2,tp=2", "fsdp=2,tp=2")]
    outcomes = list(lasting.run_pairs("mixed", pairs, tmp_path))
    assert [(one.saved, one.restored) for one in outcomes if one.fails] == []
    assert {(one.saved, one.restored) for one in outcomes} == set(pairs)


def test_uneven_strided_rows_are_written_once_and_in_global_order(tmp_path: Path):
    """What lies in the files is read by torch's own loader, which knows nothing of meshes."""

    def run(rank: int, world: int) -> dict[str, Tensor]:
        sharded = lasting.shard("mixed", "fsdp=2,tp=2")
        state, _ = lasting.go_on(sharded, sharded.init(ss.adamw(lr=1e-2), seed=1), 1)
        ss.save(state, tmp_path / "state")
        return sharded.state_dict(state)

    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    whole = run_ranks(4, run)[0]
    stored = FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    found = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(found, checkpoint_id=tmp_path / "state", no_dist=True)
    assert torch.equal(whole.pop("head.weight"), whole["embed.weight"])
    for name, tensor in whole.items():
        kind = "buffers" if name == "seen" else "params"
        assert torch.equal(found[f"{kind}/{name}"], tensor), name
    assert len(stored["params/embed.weight"].chunks) == 4  # 10 rows: 3 and 2 of each tp rank's 5
    assert len(stored["params/up.weight"].chunks) == 4  # two runs of each tp rank, once
    assert len(stored["params/down.bias"].chunks) == 1


@pytest.mark.parametrize("mesh", ["fsdp=2", ""])
def test_killed_runs_leave_the_latest_complete_checkpoint(mesh: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("benchmarks.kills.MESHES", (mesh,))
    kills = list(run_kills(3 if mesh else 2, seed=len(mesh), root=tmp_path))
    assert [kill for kill in kills if kill.problem] == []


# Optimizers of a user's own.


class Averages(NamedTuple):
    """A state that is a tuple with names."""

    moments: dict[str, Tensor]
    count: int
    scale: Tensor
    nested: list[Any]


def averaging(lr: float) -> ss.Optimizer:
    """Momentum with an average of the weights, beside a number, a scalar tensor and a nest."""

    def init(params: dict[str, Tensor]) -> Averages:
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return Averages(zeros, 0, torch.ones(()), [{"average": params}, "kept"])

    def update(grads: Any, state: Averages, params: Any, step: int) -> Any:
        moments = {name: 0.9 * state.moments[name] + grads[name] for name in grads}
        fresh = {name: params[name] - lr * state.scale * moments[name] for name in grads}
        old = state.nested[0]["average"]
        average = {name: 0.9 * old[name] + 0.1 * fresh[name] for name in fresh}
        return fresh, Averages(moments, state.count + 1, state.scale * 0.99, [{"average": average}, "kept"])

    return ss.Optimizer(init=init, update=update)


def test_a_nest_of_a_users_own_optimizer_is_restored_and_its_average_can_be_evaluated(tmp_path: Path):
    def go(mesh: str, first: bool) -> Any:
        def run(rank: int, world: int) -> Any:
            sharded = lasting.shard("mixed", mesh)
            optimizer = averaging(0.05)
            if first:
                state, _ = lasting.go_on(sharded, sharded.init(optimizer, seed=1), 2)
                ss.save(state, tmp_path / "own")
            else:
                state = ss.restore(sharded, tmp_path / "own", optimizer=optimizer)
            assert state.opt_state is not None
            moments, count, scale, nested = state.opt_state.slots
            assert (count, nested[1]) == (2, "kept")
            average = nested[0]["average"]
            assert all(isinstance(tensor, DTensor) for tensor in (*average.values(), *moments.values()))
            averaged = state.with_params(average)
            batch = sharded.local_batch(lasting.make_batch(50))
            evaluated = float(ss.eval_step(sharded, parity.loss_fn)(averaged, batch)["loss"])
            (loss, _), grads = sharded.value_and_grad(parity.loss_fn)(average, batch, 7)
            assert grads.keys() == average.keys()
            kept = {name: ss.full(tensor).clone() for name, tensor in average.items()}
            whole = [ss.full(t).clone() for slot in (moments, average) for t in slot.values()]
            exported = sharded.state_dict(averaged)
            assert all(torch.equal(exported[name], ss.full(tensor)) for name, tensor in average.items())
            after, losses = lasting.go_on(sharded, state, 3)
            assert float(ss.eval_step(sharded, parity.loss_fn)(averaged, batch)["loss"]) == evaluated
            assert after.step == 5
            return whole, float(scale), [evaluated, float(loss), *losses], kept

        return run_ranks(ss.Mesh.parse(mesh).world, run)[0]

    first, then = go("fsdp=2,tp=2", True), go("fsdp=3", False)
    assert all(torch.equal(one, two) for one, two in zip(first[0], then[0], strict=True))
    assert first[1] == then[1]
    assert max(abs(a - b) for a, b in zip(first[2], then[2], strict=True)) < 1e-10
    plain = lasting.Mixed().eval()
    averages = {name: first[3][name] for name, _ in plain.named_parameters()}
    plain.load_state_dict(averages | {"seen": plain.seen, "head.weight": averages["embed.weight"]}, strict=True)
    batch = lasting.make_batch(50)
    with torch.no_grad():
        logits = plain(batch["tokens"])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert abs(float(expected) - first[2][0]) < 1e-10


def test_dtensors_in_an_optimizers_state_move_to_another_mesh_too(tmp_path: Path):
    """One lies as a parameter does, unevenly and in strides; one lies in a way of its own."""

    def shadow(sharded: ss.Sharded) -> ss.Optimizer:
        def init(params: dict[str, Tensor]) -> Any:
            views = sharded.state(dict(params), None, 0).params
            mesh = sharded.fabric.device_mesh
            placements = [Shard(0), *[Replicate()] * (mesh.ndim - 1)]
            own = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, placements)
            return {"shadow": {name: tensor * 1 for name, tensor in views.items()}, "own": own}

        def update(grads: Any, state: Any, params: Any, step: int) -> Any:
            fresh = {name: params[name] - grads[name] for name in grads}
            return fresh, {"shadow": {n: t * 3 for n, t in state["shadow"].items()}, "own": state["own"] * 2}

        return ss.Optimizer(init=init, update=update)

    def go(mesh: str, first: bool) -> Any:
        def run(rank: int, world: int) -> Any:
            sharded = lasting.shard("mixed", mesh)
            if first:
                state, _ = lasting.go_on(sharded, sharded.init(shadow(sharded), seed=1), 1)
                ss.save(state, tmp_path / "shadow")
            else:
                state = ss.restore(sharded, tmp_path / "shadow", optimizer=shadow(sharded))
            assert state.opt_state is not None
            kept = state.opt_state.raw["shadow"] | {"own": state.opt_state.raw["own"]}
            assert all(isinstance(tensor, DTensor) for tensor in kept.values())
            initial = sharded.init(ss.sgd(lr=0.1), seed=1).params
            assert all(torch.equal(ss.full(kept[name]), 3 * ss.full(initial[name])) for name in initial)
            return {name: ss.full(tensor) for name, tensor in kept.items()}

        return run_ranks(ss.Mesh.parse(mesh).world, run)[0]

    first, then = go("fsdp=2,tp=2", True), go("fsdp=3", False)
    assert torch.equal(first["own"], 2 * torch.arange(10.0).reshape(5, 2))
    assert all(torch.equal(first[name], then[name]) for name in first)


def test_an_average_in_a_step_of_ones_own_lies_as_the_parameters_do(tmp_path: Path):
    """DTensor arithmetic on parameters of a state, uneven and strided rows included; checked against plain tensors."""

    def run(rank: int, world: int) -> float:
        sharded = lasting.shard("mixed", "fsdp=2,tp=2")
        state = sharded.init(ss.sgd(lr=0.1), seed=1)
        grad_fn = sharded.value_and_grad(parity.loss_fn)
        average = {name: tensor.clone() for name, tensor in state.params.items()}
        expected = {name: ss.full(tensor).clone() for name, tensor in average.items()}
        for step in range(3):
            batch = sharded.local_batch(lasting.make_batch(step))
            _, grads = grad_fn(state.params, batch, state.rng)
            state = ss.update(state, grads)
            average = {name: 0.75 * average[name] + 0.25 * p for name, p in state.params.items()}
            expected = {name: 0.75 * expected[name] + 0.25 * ss.full(p) for name, p in state.params.items()}
        assert all(torch.equal(ss.full(average[name]), expected[name]) for name in expected)
        (loss, _), grads = grad_fn(average, batch)
        assert grads.keys() == average.keys()
        fixed = state.with_params(state.params)
        evaluate = ss.eval_step(sharded, parity.loss_fn)
        before = float(evaluate(fixed, batch)["loss"])
        lasting.go_on(sharded, state, 1)
        assert float(evaluate(fixed, batch)["loss"]) == before
        with pytest.raises(ss.ShardingError, match="no optimizer"):
            ss.train_step(sharded, parity.loss_fn)(fixed, batch)
        return float(loss)

    run_ranks(4, run)


def test_what_a_rank_alone_holds_and_no_parameter_lies_like_is_refused_on_every_rank(tmp_path: Path):
    """A sum over a rank's own rows is neither a part of a tensor nor the same on every rank."""

    def run(rank: int, world: int) -> None:
        sharded = lasting.shard("mixed", "fsdp=2")
        sums = lambda params: {name: p.sum() for name, p in params.items()}  # noqa: E731
        state = sharded.init(ss.Optimizer(init=sums, update=lambda grads, kept, params, step: (params, kept)))
        assert not isinstance(state.opt_state["embed.weight"], DTensor)
        with pytest.raises(ss.ShardingError, match=r"optimizer/embed\.weight is another value on rank 1") as caught:
            ss.save(state, tmp_path / "sums")
        assert caught.value.diagnostics[0].code == "SS410"

    run_ranks(2, run)


def test_ranks_that_save_different_steps_or_paths_are_told(tmp_path: Path):
    def run(rank: int, world: int) -> None:
        sharded = lasting.shard("mixed", "fsdp=2")
        state = sharded.init(ss.sgd(lr=0.1))
        with pytest.raises(ss.ShardingError, match="path is another on rank 1"):
            ss.save(state, tmp_path / f"{rank}")
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ss.ShardingError, match="SS410"):
                ss.save(state, path)
        with pytest.raises(ss.ShardingError, match="SS409"):
            ss.restore(sharded, tmp_path / "absent")
        ss.save(state, tmp_path / "fine")
        victim = sorted((tmp_path / "fine").glob("*.distcp"))[1]
        if rank == 1:
            victim.write_bytes(victim.read_bytes()[:-1])
        with pytest.raises(ss.ShardingError, match=f"{victim.name}.* bytes"):
            ss.restore(sharded, tmp_path / "fine")

    run_ranks(2, run)


def test_a_rank_that_dies_while_it_saves_leaves_the_one_before(tmp_path: Path, monkeypatch):
    def run(rank: int, world: int) -> None:
        sharded = lasting.shard("mixed", "fsdp=2")
        state = sharded.init(ss.sgd(lr=0.1), seed=3)
        ss.save(state, tmp_path / "state")
        state, _ = lasting.go_on(sharded, state, 1)
        if rank == 1:
            monkeypatch.setattr("shardspec.runtime.save.measure", lambda _: 1 / 0)
        ss.save(state, tmp_path / "state")

    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_ranks(2, run)
    sharded = lasting.shard("mixed", "")
    assert ss.restore(sharded, tmp_path / "state").step == 0
