"""Bad input on several ranks: every rank is told, by name, before anything hangs, and can go on afterwards."""

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES, build
from models.llama.rules import WITHOUT_SP
from tests.distributed import parity
from tests.distributed.harness import run_ranks

CONFIG = parity.make_config(tied=False)
TIMEOUT = 60  # a hang fails here, not in gloo


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


def llama() -> nn.Module:
    return build(CONFIG)


def shard(mesh: ss.Mesh, *, model: Any = llama, rules: ss.Rules = RULES, rows: int = 16, **policy: Any) -> ss.Sharded:
    """With the shapes of a batch of `rows`; 0 leaves the typing to the first batch."""
    inputs = batch_of(rows) if rows else None
    return ss.shard(model, rules, mesh, inputs, policy=ss.Policy(**policy))


def batch_of(rows: int) -> dict[str, Tensor]:
    return {name: item[:rows] for name, item in parity.make_batch(0).items()}


def told(call: Callable[[], Any]) -> tuple[str, str]:
    """The first code and the text of the ShardingError that a call raises."""
    with pytest.raises(ss.ShardingError) as caught:
        call()
    return caught.value.diagnostics[0].code, str(caught.value)


def everyone(world: int, code: str, words: str, call: Callable[[int], Any]) -> None:
    """`call(rank)` is refused on every rank with that code and words; a step goes through afterwards."""

    def run(rank: int, size: int) -> tuple[str, str]:
        said = told(lambda: call(rank))
        go_on(size)
        return said

    for rank, (found, said) in enumerate(run_ranks(world, run, timeout=TIMEOUT)):
        assert found == code, (rank, said)
        assert words in said, (rank, said)


def go_on(world: int) -> None:
    """A good step in the same processes."""
    sharded = shard(ss.Mesh(fsdp=world))
    state = sharded.init(ss.sgd(lr=0.1))
    _, metrics = ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(batch_of(16)))
    assert float(metrics["loss"]) > 0


MESHES = [("tp=4", 2), ("tp=2", 4), ("", 2), ("fsdp=2,tp=2", 2), ("dp=2,fsdp=4", 4)]


@pytest.mark.parametrize(("mesh", "world"), MESHES)
def test_a_world_of_another_size_than_the_mesh_is_refused(mesh: str, world: int):
    wanted = ss.Mesh.parse(mesh)
    everyone(
        world, "SS403", f"holds {wanted.world} ranks, the world {world}", lambda rank: shard(wanted, rules=WITHOUT_SP)
    )


def test_a_wrong_table_is_refused_on_every_rank_and_the_model_stays_as_it_was():
    wrong = RULES.override(drop=[r"output\.weight"])

    def call(rank: int) -> None:
        given = llama()
        before = [(id(tensor), tensor._version) for tensor in given.state_dict(keep_vars=True).values()]
        try:
            shard(ss.Mesh(tp=2), model=given, rules=wrong)
        finally:
            assert before == [(id(t), t._version) for t in given.state_dict(keep_vars=True).values()]
            assert not any(child._forward_hooks for child in given.modules())

    everyone(2, "SS202", "output.weight", call)


# Ranks that disagree: (what rank 0 does, what rank 1 does), and what every rank is told.

TP, FSDP = ss.Mesh(tp=2), ss.Mesh(fsdp=2)


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return llama()


def step_with(rows: int) -> None:
    """A first step of rows of one's own, with nothing said before."""
    sharded = shard(FSDP, rows=0)
    mine = {name: item[:rows] for name, item in parity.make_batch(0).items()}
    ss.train_step(sharded, parity.loss_fn)(sharded.init(ss.sgd(lr=0.1)), mine)


def step_with_loss(scale: float) -> None:
    """A step whose loss needs other collectives on one rank."""
    sharded = shard(TP)

    def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        total, weight = ss.cross_entropy(output, batch["labels"])
        return (total, weight) if scale == 1 else (total, weight + ss.cross_entropy(output, batch["labels"])[0])

    ss.train_step(sharded, loss_fn)(sharded.init(ss.sgd(lr=0.1)), sharded.local_batch(batch_of(16)))


DISAGREE: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "table": (lambda: shard(TP), lambda: shard(TP, rules=WITHOUT_SP), "tok_embeddings"),
    "table, before a batch": (
        lambda: shard(FSDP, rows=0),
        lambda: shard(FSDP, rows=0, rules=RULES.override(params={r"output\.weight": "V@tp D"})),
        "output.weight",
    ),
    "mesh": (lambda: shard(TP, rules=WITHOUT_SP), lambda: shard(FSDP, rules=WITHOUT_SP), "fsdp=2 on rank 1"),
    "model": (
        lambda: shard(FSDP),
        lambda: shard(FSDP, model=lambda: build(attrs.evolve(CONFIG, n_layers=1))),
        "layers.1",
    ),
    "weights": (
        lambda: shard(FSDP, model=seeded(0)),
        lambda: shard(FSDP, model=seeded(1)),
        "weights",
    ),
    "policy": (lambda: shard(FSDP), lambda: shard(FSDP, accumulate=2), "accumulate=2"),
    "shapes": (lambda: shard(FSDP), lambda: shard(FSDP, rows=8), "tokens"),
    "seed": (
        lambda: shard(FSDP).init(ss.sgd(lr=0.1), seed=0),
        lambda: shard(FSDP).init(ss.sgd(lr=0.1), seed=1),
        "seed",
    ),
    "first batch": (lambda: step_with(4), lambda: step_with(2), "tokens"),
    "loss": (lambda: step_with_loss(1), lambda: step_with_loss(2), "loss"),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_ranks_that_disagree_are_all_told_on_what(what: str):
    zero, one, words = DISAGREE[what]
    everyone(2, "SS403", words, lambda rank: one() if rank else zero())


def test_ranks_with_other_arrangements_of_as_many_ranks_are_told_before_groups_are_made():
    meshes = [ss.Mesh(dp=2, fsdp=2), ss.Mesh(fsdp=4)]
    everyone(4, "SS403", "dp=2,fsdp=2", lambda rank: shard(meshes[rank == 3]))


@pytest.mark.parametrize("mesh", [FSDP, ss.Mesh(), ss.Mesh(tp=4)], ids=["its mesh", "a mesh of one", "a larger mesh"])
def test_what_one_rank_alone_refuses_every_rank_is_told(mesh: ss.Mesh):
    def run(rank: int, world: int) -> tuple[str, str]:
        wrong = rank == 1
        rules = RULES.override(drop=[r"output\.weight"]) if wrong and mesh is FSDP else RULES
        said = told(lambda: shard(mesh if wrong else FSDP, rules=rules))
        go_on(world)
        return said

    zero, one = run_ranks(2, run, timeout=TIMEOUT)
    assert zero[0] == "SS403"
    assert "rank 1 refuses the plan" in zero[1]
    assert one[0] in zero[1]
    assert "rank 1 refuses" not in one[1]


def test_a_first_batch_that_one_rank_refuses_stops_the_others_too():
    def run(rank: int, world: int) -> tuple[str, str, bool]:
        sharded = shard(FSDP, rows=0)
        state = sharded.init(ss.sgd(lr=0.1))
        batch = sharded.local_batch(batch_of(16))
        if rank == 1:
            batch["tokens"] = batch["tokens"].double()
        step = ss.train_step(sharded, parity.loss_fn)
        said = told(lambda: step(state, batch))
        step(state, sharded.local_batch(batch_of(16)))
        return *said, state.held.donated != ""

    zero, one = run_ranks(2, run, timeout=TIMEOUT)
    assert (zero[0], one[0]) == ("SS403", "SS402")
    assert "rank 1 refuses the batch" in zero[1]
    assert "float64" in one[1]
    assert zero[2]
    assert one[2]


# What every rank gets wrong alike.


def mean_loss(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, float]:
    return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten()), 1.0


def step_on(mesh: ss.Mesh, batch: Callable[[ss.Sharded], Any], loss_fn: Any = parity.loss_fn, **options: Any) -> None:
    sharded = shard(mesh, **options)
    state = sharded.init(ss.sgd(lr=0.1))
    try:
        ss.train_step(sharded, loss_fn)(state, batch(sharded))
    finally:
        assert not state.held.donated


def local(**changes: Any) -> Callable[[ss.Sharded], Any]:
    """This rank's part of a good batch, with some entries changed; `None` takes one away."""

    def make(sharded: ss.Sharded) -> dict[str, Any]:
        batch = sharded.local_batch(batch_of(16)) | changes
        return {name: item for name, item in batch.items() if item is not None}

    return make


LONGS = torch.zeros(8, 8, dtype=torch.long)

WRONG: dict[str, tuple[Callable[[], Any], str, str]] = {
    "inputs that do not divide": (lambda: shard(FSDP, rows=3), "SS301", "3"),
    "a batch that does not divide": (lambda: shard(FSDP).local_batch(batch_of(3)), "SS301", "tokens"),
    "rows that microbatches do not divide": (
        lambda: shard(FSDP, rows=0, accumulate=4).local_batch(batch_of(4)),
        "SS301",
        "4 microbatches x 2 data ranks",
    ),
    "a part that microbatches do not divide": (
        lambda: step_on(FSDP, local(tokens=LONGS[:5], labels=LONGS[:5]), accumulate=2),
        "SS301",
        "2 microbatches",
    ),
    "a name that no rule claims": (lambda: step_on(FSDP, local(tokns=LONGS)), "SS202", "tokns"),
    "an entry that is missing": (lambda: step_on(FSDP, local(tokens=None)), "SS401", "tokens"),
    "labels that are missing": (lambda: step_on(FSDP, local(labels=None)), "SS402", "'labels'"),
    "tokens of floats": (lambda: step_on(FSDP, local(tokens=LONGS.double())), "SS402", "float64"),
    "a row instead of a batch": (lambda: step_on(FSDP, local(tokens=LONGS[0])), "SS205", "tokens"),
    "a sequence that tp does not divide": (
        lambda: step_on(TP, lambda sharded: {name: item[:, :7] for name, item in batch_of(16).items()}),
        "SS301",
        "7",
    ),
    "a mean for a loss": (lambda: step_on(FSDP, local(), mean_loss), "SS311", "mean"),
    "one value for a loss": (lambda: step_on(FSDP, local(), lambda o, b: o.sum()), "SS310", "one tensor"),
    "a loss for each token": (lambda: step_on(FSDP, local(), lambda o, b: (o.sum(-1), 1.0)), "SS310", "shape"),
    "a loss without a gradient": (
        lambda: step_on(FSDP, local(), lambda o, b: (o.detach().sum(), 1.0)),
        "SS310",
        "no gradient",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_every_rank_gets_wrong_alike_every_rank_is_told(what: str):
    call, code, words = WRONG[what]
    everyone(2, code, words, lambda rank: call())


def test_a_state_from_another_mesh_is_refused():
    def call(rank: int) -> None:
        ours, theirs = shard(FSDP), shard(TP)
        state = theirs.init(ss.sgd(lr=0.1))
        batch = ours.local_batch(batch_of(16))
        others = (
            lambda: ss.eval_step(ours, parity.loss_fn)(state, batch),
            lambda: ours.state_dict(state),
            lambda: ours.value_and_grad(parity.loss_fn)(state.params, batch),
            lambda: ss.update(ours.init(ss.sgd(lr=0.1)), state.params),
        )
        assert [told(other)[0] for other in others] == ["SS407"] * 4
        ss.train_step(ours, parity.loss_fn)(state, batch)

    everyone(2, "SS407", "made for the mesh tp=2", call)


def test_a_state_of_a_like_plan_is_taken():
    def run(rank: int, world: int) -> None:
        state = shard(FSDP).init(ss.sgd(lr=0.1))
        again = shard(FSDP)
        state, metrics = ss.train_step(again, parity.loss_fn)(state, again.local_batch(batch_of(16)))
        assert float(metrics["loss"]) > 0

    run_ranks(2, run, timeout=TIMEOUT)
