"""What a rank holds of a state, by the names that it has in a checkpoint."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardspec.diagnostics import refuse
from shardspec.placement import local_index
from shardspec.rules.match import folded
from shardspec.runtime.agreement import exchange
from shardspec.runtime.gather import positions
from shardspec.runtime.pieces import Piece, entry, leaves
from shardspec.runtime.sharded import Sharded
from shardspec.runtime.state import OptState
from shardspec.torch_private import local_of

SCALAR = (bool, int, float, str, type(None))
"""What JSON holds."""


@frozen(kw_only=True)
class Contents:
    """What a rank holds of a state, by the names that a checkpoint has for it."""

    pieces: dict[str, Piece]
    values: dict[str, Any] = field(factory=dict)
    """Python numbers."""
    common: tuple[str, ...] = ()
    """The tensors that are said to be the same on every rank, and not by a table."""


def contents(
    home: Sharded, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], opt: OptState | None
) -> Contents:
    """What this rank holds of a state over these local tensors.

    Raises:
        ShardingError: SS410 for an optimizer's state that no file can hold.
    """
    pieces = {entry("params", name): in_global_order(home, name, local) for name, local in params.items()}
    pieces |= {entry("buffers", name): in_global_order(home, name, local) for name, local in buffers.items()}
    values: dict[str, Any] = {}
    common: list[str] = []
    for path, leaf in leaves(None if opt is None else opt.raw):
        name = entry("optimizer", *path)
        if opt is None:
            continue
        if name in pieces or name in values:
            refuse("SS410", f"two values of the optimizer's state go by the name {name}")
        if isinstance(leaf, DTensor):
            spec = home.specs.get(path[-1])
            if any(placement.is_partial() for placement in leaf.placements):
                refuse("SS410", f"{name} is a DTensor that is still to be summed", why=f"{leaf.placements}")
            elif spec is not None and leaf.shape == spec.shape and leaf.placements == spec.placements:
                pieces[name] = in_global_order(home, path[-1], local_of(leaf))
            else:
                pieces[name] = Piece(tuple(leaf.shape), local_of(leaf), positions(leaf))
        elif isinstance(leaf, Tensor) and path and opt.belongs(path[-1], leaf):
            pieces[name] = in_global_order(home, path[-1], leaf)
        elif isinstance(leaf, Tensor):
            pieces[name] = Piece.whole(leaf)
            common.append(name)
        elif isinstance(leaf, SCALAR):
            values[name] = leaf
        else:
            refuse(
                "SS410",
                f"{name} is a {type(leaf).__name__}, which a checkpoint cannot hold",
                why="an optimizer's state is a nest of dicts, lists and tuples of tensors and numbers",
            )
    return Contents(pieces=pieces, values=values, common=tuple(common))


def in_global_order(home: Sharded, name: str, local: Tensor) -> Piece:
    """A rank's part of what lies as a parameter or buffer does, with its place in the whole."""
    plan = home.params[name]
    return Piece(plan.shape, local, local_index(plan, home.fabric.coordinate, home.mesh))


def merged(world: int, contents: Contents) -> dict[str, Any]:
    """The numbers of every rank; SS410 where ranks have different ones, or different values of a common tensor."""
    digests = {name: _digest(contents.pieces[name].local) for name in contents.common}
    every = [(contents.values, digests)] if world == 1 else exchange(world, (contents.values, digests))
    _union([said for _, said in every])
    return _union([values for values, _ in every])


def _union(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks say together; SS410 that names what they say differently."""
    found: dict[str, Any] = {}
    differ: dict[str, int] = {}
    for rank, said in enumerate(every):
        for name, value in said.items():
            if repr(found.setdefault(name, value)) != repr(value):
                differ.setdefault(name, rank)
    if differ:
        first, rank = next(iter(differ.items()))
        refuse(
            "SS410",
            f"{first} is another value on rank {rank} than on the ranks before it",
            why="it has not the shape of a parameter's part: it is neither the parts of one tensor, as a parameter's "
            "are, nor the same on every rank",
            matches=", ".join(folded(differ)),
            advice=("keep in an optimizer's state what is elementwise, or reduced over all ranks",),
        )
    return found


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"
