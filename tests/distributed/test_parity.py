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

from shardspec.moves import Move
from shardspec.runtime import apply, attach, boundary, step, vocab
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
    patch.setattr(step, "coalesced_all_reduce", lambda tensors, group: right(tensors[:1], group))


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
