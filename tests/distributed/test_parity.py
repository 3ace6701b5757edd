"""Sharded training computes what the plain program computes, on every mesh of up to 8 ranks."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import shardspec as ss
from models.llama import RULES
from shardspec.moves import Move
from shardspec.runtime import apply, attach, boundary, step, vocab
from tests.distributed import parity
from tests.distributed.harness import run_ranks
from tests.distributed.parity import TOLERANCE, Case, all_meshes, on_rank

VARIANTS = {"sp": (True, False), "tied": (False, True), "accumulate": (1, 2), "remat": (False, True)}


def covering_set() -> Iterator[Case]:
    """Two opposite variants for every mesh, so that it meets each option both ways; one of them on 8 ranks."""
    variants = list(itertools.product(*VARIANTS.values()))
    for index, mesh in enumerate(all_meshes()):
        one = index % (len(variants) // 2)
        both = [Case(mesh, *variants[one]), Case(mesh, *variants[len(variants) - 1 - one])]
        yield from both if both[0].world < 8 else both[index % 2 :: 2]


COVERING = list(covering_set())


def test_the_covering_set_has_every_mesh_and_every_pair_of_options():
    assert {case.mesh for case in COVERING} == set(all_meshes())
    assert len({case.mesh for case in COVERING}) == 20
    for one, two in itertools.combinations(VARIANTS, 2):
        pairs = {(getattr(case, one), getattr(case, two)) for case in COVERING}
        assert pairs == set(itertools.product(VARIANTS[one], VARIANTS[two]))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_loss_gradients_norms_and_parameters_after_five_steps_are_the_plain_programs(world: int):
    cases = [case for case in COVERING if case.world == world]
    found = dict(zip(cases, run_ranks(world, on_rank, cases)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if max(wrong.values()) > TOLERANCE} == {}


# A wrong version of each reduction. Every one leaves shapes as they are, and runs to the end.

Plant = Callable[[pytest.MonkeyPatch], None]
BUGS: dict[str, tuple[Case, Plant]] = {}


def bug(name: str, case: Case) -> Callable[[Plant], Plant]:
    """Record a wrong version under what it does, with a case that meets it."""

    def record(plant: Plant) -> Plant:
        BUGS[name] = (case, plant)
        return plant

    return record


def replace_moves(patch: pytest.MonkeyPatch, phase: str, kind: str, wrong: Callable[..., Tensor]) -> None:
    """Have every move of a kind, in one phase only, be a wrong one."""
    right = boundary.pass_point

    def spoil(moves: Sequence[Move], where: str) -> tuple[Move, ...]:
        return tuple(attrs.evolve(m, kind="wrong") if (m.kind, where) == (kind, phase) else m for m in moves)

    def pass_point(tensor: Tensor, forward: Sequence[Move], backward: Sequence[Move], fabric: Any) -> Tensor:
        return right(tensor, spoil(forward, "forward"), spoil(backward, "backward"), fabric)

    patch.setitem(boundary.MOVES, "wrong", wrong)
    patch.setattr(attach, "pass_point", pass_point)


def leave(tensor: Tensor, move: Move, fabric: Any) -> Tensor:
    """No sum."""
    return tensor.clone()


def repeat(tensor: Tensor, move: Move, fabric: Any) -> Tensor:
    """This rank's part in every place."""
    return torch.cat([tensor] * fabric.mesh[move.axis], move.dim)


SP, NO_SP = Case("tp=2"), Case("tp=2", sp=False)

for phase, kind, wrong, case in [
    ("forward", "all_reduce", leave, NO_SP),
    ("backward", "all_reduce", leave, NO_SP),
    ("forward", "reduce_scatter", boundary.slice_, SP),
    ("backward", "reduce_scatter", boundary.slice_, SP),
    ("forward", "all_gather", repeat, SP),
    ("backward", "all_gather", repeat, SP),
]:
    named = bug(f"the {phase} {kind} of points is {wrong.__name__.strip('_')}", case)
    named(lambda patch, args=(phase, kind, wrong): replace_moves(patch, *args))


def drop_backward(patch: pytest.MonkeyPatch, point: str) -> None:
    """One point passes its cotangent on as it is."""
    right = attach.Wiring.through

    def through(self: attach.Wiring, name: str, tensor: Any) -> Any:
        if name != point:
            return right(self, name, tensor)
        return boundary.pass_point(tensor, self.points[name].forward, (), self.fabric)

    patch.setattr(attach.Wiring, "through", through)


for point in ("layers.0.attention:in", "layers.1.feed_forward:in", "output:in"):
    named = bug(f"the backward all-reduce at {point} is dropped", NO_SP)
    named(lambda patch, point=point: drop_backward(patch, point))


@bug("what norms owe over tp is not summed", SP)
def drop_owed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "reduce_owed", lambda sharded, plan, grads: None)


@bug("of the gradients that are summed in one message the first alone is", SP)
def reduce_the_first(patch: pytest.MonkeyPatch) -> None:
    right = step.coalesced_all_reduce
    patch.setattr(step, "coalesced_all_reduce", lambda tensors, *where: right(tensors[:1], *where))


@bug("gradients are not summed over dp", Case("dp=2"))
def drop_dp(patch: pytest.MonkeyPatch) -> None:
    drop_owed(patch)


@bug("FSDP2 does not sum over the replicas of dp", Case("dp=2,fsdp=2"))
def drop_replicas(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(apply, "storage_mesh", lambda fabric, axes: fabric.device_mesh[axes[0]])


@bug("FSDP2 divides the gradients by its world", Case("fsdp=2"))
def divide(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


@bug("the loss and the weight are those of the last microbatch", Case("tp=2", accumulate=2))
def forget_microbatch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step.Sums, "add", set_sums)


def set_sums(sums: step.Sums, loss: Tensor, weight: Tensor) -> None:
    sums.loss, sums.weight = loss.detach(), weight.detach()


def alter_scalars(patch: pytest.MonkeyPatch, alter: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Have `alter(total, weight, squared, sums, square)` decide what the scalars come to."""
    right = step.reduce_scalars

    def reduce_scalars(sharded: Any, loss: Any, sums: step.Sums, square: Tensor | None) -> Any:
        return alter(*right(sharded, loss, sums, square), sums, square)

    patch.setattr(step, "reduce_scalars", reduce_scalars)


@bug("the loss is not summed over ranks", Case("dp=2"))
def local_loss(patch: pytest.MonkeyPatch) -> None:
    alter_scalars(patch, lambda total, weight, squared, sums, square: (sums.loss.double(), weight, squared))


@bug("the weight is not summed over ranks", Case("fsdp=2"))
def local_weight(patch: pytest.MonkeyPatch) -> None:
    alter_scalars(patch, lambda total, weight, squared, sums, square: (total, sums.weight.double(), squared))


@bug("the loss and the weight are counted once for each rank that has copies", Case("tp=2"))
def count_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "_copies", lambda sharded, pending: 1)


@bug("the norm is not summed over ranks", Case("fsdp=2"))
def local_norm(patch: pytest.MonkeyPatch) -> None:
    alter_scalars(
        patch,
        lambda total, weight, squared, sums, square: (total, weight, squared if square is None else square),
    )


@bug("replicated gradients count in the norm once for each copy", Case("fsdp=2,tp=2"))
def norm_of_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "sharing_degree", lambda sharded, plan: 1)


@bug("the embedding of tokens that another rank owns is not zero", SP)
def drop_mask(patch: pytest.MonkeyPatch) -> None:
    def lookup(weight: Tensor, ids: Tensor, first: int, size_V: int, padding_idx: int | None = None) -> Tensor:
        return nn.functional.embedding((ids - first).clamp(0, len(weight) - 1), weight)

    patch.setattr(attach, "embedding_sharded", lookup)


def drop_cross_entropy(patch: pytest.MonkeyPatch, dropped: dist.ReduceOp) -> None:
    """The vocabulary-parallel cross-entropy leaves out one of its two reductions."""

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if op != dropped:
            dist.all_reduce(tensor, op, group=group)

    patch.setattr(vocab, "dist", SimpleNamespace(all_reduce=all_reduce, ReduceOp=dist.ReduceOp))


@bug("the cross-entropy takes the maximum of a rank's own logits", SP)
def drop_maximum(patch: pytest.MonkeyPatch) -> None:
    drop_cross_entropy(patch, dist.ReduceOp.MAX)


@bug("the cross-entropy sums over a rank's own logits", SP)
def drop_sum(patch: pytest.MonkeyPatch) -> None:
    drop_cross_entropy(patch, dist.ReduceOp.SUM)


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_planted_in_a_reduction_fails_the_parity_check(name: str):
    case, plant = BUGS[name]

    def run_with_bug(rank: int, world: int) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            return on_rank(rank, world, [case], lambda: plant(patch))

    [found] = run_ranks(case.world, run_with_bug)[0]
    assert max(found.values()) > 1e-6, found


# What the Llama of the grid has not: biases, columns in storage, parameters that are not trained.


class Feed(nn.Module):
    """Two products with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def feed_loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return (output - batch["y"]).square().sum(), batch["w"].sum()


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("bias", ["D +tp", "D@fsdp +tp"])
def test_the_bias_of_a_row_parallel_product_counts_once(bias: str, remat: bool):
    rules = ss.Rules(
        params={
            r"up\.weight": "F@(tp,fsdp) D",
            r"up\.bias": "F@(tp,fsdp)",
            r"down\.weight": "D@fsdp F@tp",
            r"down\.bias": bias,
        },
        activations={"x|y": "B@(dp,fsdp) D", "w": "B@(dp,fsdp)", "down": "B@(dp,fsdp) D"},
        units=["up", "down"],
    )

    def run(rank: int, world: int) -> None:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        plain = Feed()
        batch = {"x": torch.randn(8, 6), "y": torch.randn(8, 6), "w": torch.rand(8)}
        sharded = ss.shard(plain, rules, ss.Mesh(fsdp=2, tp=2), batch, policy=ss.Policy(remat=remat))
        state = sharded.init(ss.sgd(lr=0.1))
        (loss, _), grads = sharded.value_and_grad(feed_loss)(state.params, sharded.local_batch(batch))
        total, weight = feed_loss(plain(batch["x"]), batch)
        (total / weight).backward()
        assert abs(float(loss) - float((total / weight).detach())) < TOLERANCE
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(ss.full(grads[name]), parameter.grad, rtol=0, atol=TOLERANCE)

    run_ranks(4, run)


COLUMNS = RULES.override(
    params={
        r"tok_embeddings\.weight": "V@tp D@fsdp",
        r"layers\.\d+\.feed_forward\.w[13]\.weight": "F@tp D@fsdp",
        r"layers\.\d+\.feed_forward\.w2\.weight": "D F@(tp,fsdp)",
    }
)


@pytest.mark.parametrize("frozen", [(), ("norm", "tok_embeddings", "wq")], ids=["all trained", "some frozen"])
def test_columns_in_storage_and_parameters_that_are_not_trained(frozen: tuple[str, ...]):
    def make() -> nn.Module:
        model = parity.make_model(parity.make_config(tied=False))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(all(part not in name for part in frozen))
        return model

    def run(rank: int, world: int) -> None:
        torch.set_default_dtype(torch.float64)
        sharded = ss.shard(make, COLUMNS, ss.Mesh(fsdp=2, tp=2), parity.make_batch(0))
        state = sharded.init(ss.adamw(**parity.OPTIMIZER))
        plain = make()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(ss.full(state.params[name]))
        trained = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
        assert list(state.opt_state["exp_avg"]) == trained
        optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], **parity.OPTIMIZER)
        step = ss.train_step(sharded, parity.loss_fn, clip=parity.CLIP)
        for index in range(3):
            batch = parity.make_batch(index)
            state, metrics = step(state, sharded.local_batch(batch))
            optimizer.zero_grad()
            parity.plain_loss(plain, batch).backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters(), parity.CLIP)
            optimizer.step()
            assert abs(float(metrics["grad_norm"]) - float(norm)) < TOLERANCE
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(ss.full(state.params[name]), parameter.detach(), rtol=0, atol=TOLERANCE)

    run_ranks(4, run)


class Lookups(nn.Module):
    """Lookups of a module's own between those of its children; some tables are split, some are not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(12, 6), nn.Embedding(10, 6)
        self.rows, self.kinds = nn.Parameter(torch.randn(16, 6)), nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(6, 8, bias=False)

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        x = self.one(a) + nn.functional.embedding(d, self.kinds)
        z = nn.functional.embedding(c, self.rows)
        return self.head(ss.name(x, "x") + self.two(b) + ss.name(z, "z"))


def lookup_loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ss.cross_entropy(output, batch["y"])


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_calls_of_a_module_and_of_its_children_are_told_apart(remat: bool):
    rules = ss.Rules(
        params={
            r"one\.weight": "A@tp D",
            r"two\.weight": "W D",
            "rows": "T@tp D",
            "kinds": "K D",
            r"head\.weight": "O D",
        },
        activations={"[abcdy]": "B@fsdp S", "one|z": "B@fsdp S D"},
        units=["one"],
    )

    def run(rank: int, world: int) -> None:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        plain = Lookups()
        batch = {name: torch.randint(0, n, (4, 5)) for name, n in zip("abcdy", (12, 10, 16, 4, 8), strict=True)}
        sharded = ss.shard(plain, rules, ss.Mesh(tp=2), batch, policy=ss.Policy(remat=remat))
        state = sharded.init(ss.sgd(lr=0.1))
        (loss, _), grads = sharded.value_and_grad(lookup_loss)(state.params, sharded.local_batch(batch))
        total, weight = lookup_loss(plain(*(batch[name] for name in "abcd")), batch)
        (total / weight).backward()
        assert abs(float(loss) - float((total / weight).detach())) < TOLERANCE
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(ss.full(grads[name]), parameter.grad, rtol=0, atol=TOLERANCE)

    run_ranks(2, run)
