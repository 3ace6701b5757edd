"""What must be the same on every rank is compared before anything is touched, and one rank's refusal is told to all."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shardspec.diagnostics import ShardingError, refuse
from shardspec.plan import ParamPlan, Plan

T = TypeVar("T")

SAMPLES = 16
"""Elements of a tensor that a fingerprint reads."""


def agree(
    world: int,
    what: str,
    attempt: Callable[[], tuple[T, Mapping[str, str]]],
    details: Callable[[T], Mapping[str, str]] | None = None,
    meet: Callable[[], None] | None = None,
) -> T:
    """Run `attempt` on every rank; what it gives, if no rank refuses and all say the same.

    Args:
        what: what is agreed on, in words.
        attempt: gives its result and, by name, digests of what must be the same on every rank.
        details: by name, what to compare where the digests differ.
        meet: where the others may not come here: waits for them. This rank's refusal is then its own alone.

    Raises:
        ShardingError: this rank's own; SS403 on every other rank, and where the ranks differ.
    """
    if world == 1:
        return attempt()[0]
    failed: ShardingError | None = None
    found: tuple[T, Mapping[str, str]] | None = None
    try:
        found = attempt()
    except ShardingError as error:
        failed = error
    if meet is not None:
        if failed is not None:
            raise failed
        meet()
    every = exchange(world, (found[1] if found else {}, failed.diagnostics if failed else ()))
    if failed is not None:
        raise failed
    assert found is not None, "an attempt gives a result or raises"
    for rank, (_, diagnostics) in enumerate(every):
        if diagnostics:
            refuse("SS403", f"rank {rank} refuses {what}, and this one does not", why=str(diagnostics[0]))
    said = [digests for digests, _ in every]
    if details is not None and any(each != said[0] for each in said):
        check_same(what, exchange(world, details(found[0])))
    check_same(what, said)
    return found[0]


def exchange(world: int, mine: Any) -> list[Any]:
    """What every rank gave, in rank order."""
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    return every


def on_first(world: int, attempt: Callable[[], T]) -> T:
    """Run on rank 0 what one rank does for all, and give every rank the result; the others wait for it.

    Raises:
        ShardingError: rank 0's, on every rank.
    """
    if world == 1:
        return attempt()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(True, attempt())]
        except ShardingError as error:
            outcome = [(False, error)]
    dist.broadcast_object_list(outcome, src=0)
    fine, value = outcome[0]
    if not fine:
        raise value
    return value


def check_same(what: str, every: Sequence[Mapping[str, str]]) -> None:
    """SS403 where a rank says something else than rank 0."""
    for rank, said in enumerate(every):
        differ = [name for name in {**every[0], **said} if said.get(name) != every[0].get(name)]
        if differ:
            here, there = (each.get(differ[0], "absent") for each in (said, every[0]))
            refuse(
                "SS403",
                f"the ranks disagree on {what}: {differ[0]} is another on rank {rank} than on rank 0",
                why=f"{here} on rank {rank}, {there} on rank 0",
                advice=("give every rank the same model, table, mesh, policy, seed and batch shapes",),
            )


def details_of(params: Mapping[str, ParamPlan], plan: Plan | None) -> dict[str, str]:
    """What a plan says, by name, in words."""
    said = {name: f'"{param.spec}" {list(param.shape)}' for name, param in params.items()}
    if plan is not None:
        said |= {name: str(entry.layout) for name, entry in {**plan.entries, **plan.activations}.items()}
        said |= {f"{row.phase} {row.kind} at {row.where}": f"{row.count} x {row.bytes}" for row in plan.collectives}
    return said


def fingerprint(values: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of a few elements of each tensor: what differs on purpose or by a seed shows in them."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in values:
        if tensor.device.type != "meta" and tensor.numel():
            some = tensor.detach().reshape(-1)[:: -(-tensor.numel() // SAMPLES)].contiguous()
            digest.update(name.encode() + bytes(some.cpu().view(torch.uint8).tolist()))
    return digest.hexdigest()
