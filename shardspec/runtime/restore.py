"""`ss.restore`: a state from files of any mesh, over torch.distributed.checkpoint."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from shardspec.compiler import settle
from shardspec.diagnostics import Diagnostic, ShardingError, refuse
from shardspec.placement import stored_shape
from shardspec.runtime.agreement import agree, exchange, on_first
from shardspec.runtime.arguments import as_optimizer
from shardspec.runtime.contents import Contents, contents
from shardspec.runtime.manifest import Entry, Manifest, damage, misfit, misfits, read_manifest, surplus
from shardspec.runtime.optim import Optimizer, rebuild
from shardspec.runtime.pieces import PieceLoader, entry, leaves, with_leaves
from shardspec.runtime.publish import MANIFEST, locate
from shardspec.runtime.save import alone, written
from shardspec.runtime.sharded import Sharded, without_values
from shardspec.runtime.state import OptState, Store, TrainState

ATTEMPTS = 5
"""How often a checkpoint is read again that another run replaces meanwhile."""


@frozen(kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    name: str
    """As the user wrote it."""
    place: Path
    """Where it lies: beside its name where a save was killed that replaced it."""
    manifest: Manifest


def restore(sharded: Sharded, path: str | os.PathLike[str], optimizer: Optimizer | None = None) -> TrainState:
    """The state in a folder that `ss.save` wrote, on any mesh, laid over this one's.

    Every rank must call it. `optimizer` may have other options than the one that was saved, a new learning rate for
    instance; without it, the one that the checkpoint describes is made again. A checkpoint describes `ss.adamw` and
    `ss.sgd` whose learning rates are numbers; of another kind, the one that `sharded` made its last state with is
    taken.

    Raises:
        ShardingError: SS408 for entries that are missing, surplus or of another shape or dtype, and for another
            kind of optimizer; SS409 where there is no checkpoint, or damaged files.
    """
    if not isinstance(sharded, Sharded):
        refuse("SS407", f"ss.restore takes (sharded, path), and was given a {type(sharded).__name__} to restore")
    world = sharded.mesh.world
    agree(world, "the restore", lambda: (None, {"path": written(path)}))
    for _ in range(ATTEMPTS):
        checkpoint = on_first(world, lambda: _find(path))
        problem: ShardingError | None = None
        state: TrainState | None = None
        try:
            _check_files(world, sharded.fabric.rank, checkpoint)
            state = _restored(sharded, checkpoint, optimizer)
        except ShardingError as error:
            problem = error
        # Another run may have replaced what was read, or half of it: then nothing of it counts.
        if on_first(world, lambda: _find(path)) == checkpoint:
            if problem is not None:
                raise problem
            assert state is not None, "a state is restored or a reason is given"
            return state
    return refuse("SS409", f"{written(path)} was replaced {ATTEMPTS} times while it was read")


def _find(path: str | os.PathLike[str]) -> Checkpoint:
    """The complete checkpoint that goes by a name."""
    folder = Path(os.path.realpath(path))
    place = locate(folder)
    if place is None:
        why = "nothing has that name"
        if folder.exists():
            why = f"it has no {MANIFEST}, which ss.save writes last" if folder.is_dir() else "it is no folder"
        refuse("SS409", f"there is no checkpoint {written(path)}", why=why)
    return Checkpoint(name=written(path), place=place, manifest=read_manifest(place, written(path)))


def _check_files(world: int, rank: int, checkpoint: Checkpoint) -> None:
    """SS409 that names every damaged file; each rank reads its share of them."""
    files = checkpoint.manifest.files
    mine = list(damage(checkpoint.place, {name: files[name] for name in sorted(files)[rank::world]}))
    lines = mine if world == 1 else [line for part in exchange(world, mine) for line in part]
    if lines:
        count = "a file" if len(lines) == 1 else f"{len(lines)} files"
        refuse(
            "SS409", f"{count} of the checkpoint {checkpoint.name} cannot be relied on", why="\n".join(sorted(lines))
        )


def _restored(sharded: Sharded, checkpoint: Checkpoint, given: Optimizer | None) -> TrainState:
    """A state filled from files that were found whole."""
    world, manifest = sharded.mesh.world, checkpoint.manifest

    def prepared() -> tuple[tuple[Contents, Callable[[Mapping[str, Any]], TrainState]], Mapping[str, str]]:
        found, finish = _template(sharded, checkpoint, given)
        settle(_misfits(found, checkpoint))
        return (found, finish), {}

    found, finish = agree(world, "the checkpoint", prepared)
    unasked = [name for name in (*manifest.entries, *manifest.values) if name not in _names(found)]
    every = [unasked] if world == 1 else exchange(world, unasked)
    settle(surplus(manifest, [name for name in every[0] if all(name in part for part in every)], checkpoint.name))
    with alone(world), _rereading():
        dcp.load(
            {},
            storage_reader=dcp.FileSystemReader(checkpoint.place),
            planner=PieceLoader(found.pieces),
            no_dist=world == 1,
        )
    return finish({name: manifest.values[name] for name in found.values})


@contextmanager
def _rereading() -> Generator[None]:
    """A file that goes while it is read, as SS409: it was whole a moment ago."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, OSError):
            raise
        refuse("SS409", "the checkpoint cannot be read to its end", why=f"rank {rank}: {cause}")


def _names(found: Contents) -> set[str]:
    return {*found.pieces, *found.values}


def _misfits(found: Contents, checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    wanted = {
        name: Entry(shape=piece.shape, dtype=str(piece.local.dtype).removeprefix("torch."))
        for name, piece in found.pieces.items()
    }
    yield from misfits(checkpoint.manifest, wanted, checkpoint.name)
    absent = [f"{name} (a number)" for name in found.values if name not in checkpoint.manifest.values]
    if absent:
        yield misfit(checkpoint.name, "does not have {} that the state needs", absent)


def _template(
    sharded: Sharded, checkpoint: Checkpoint, given: Optimizer | None
) -> tuple[Contents, Callable[[Mapping[str, Any]], TrainState]]:
    """What is to be filled, and what makes a state of it when it is; given the Python numbers of the files."""
    optimizer = _optimizer(sharded, checkpoint, given)
    fabric, mesh = sharded.fabric, sharded.mesh

    def empty(name: str) -> Tensor:
        plan = sharded.params[name]
        shape, dtype = stored_shape(plan, fabric.coordinate, mesh), getattr(torch, plan.dtype)
        if plan.buffer:
            return torch.empty(shape, dtype=dtype, device=fabric.device)
        return sharded.local.empty(name, shape, dtype, fabric.device)

    params = {name: empty(name) for name in sharded.local.params}
    buffers = {name: empty(name) for name in sharded.buffers}
    opt = None if optimizer is None else _fresh(sharded.opt_state(params, optimizer))
    found = contents(sharded, params, buffers, opt)

    def finish(values: Mapping[str, Any]) -> TrainState:
        sharded.local.lend_buffers(buffers)
        settle(without_values(sharded.hollow_buffers()))
        return TrainState(
            step=checkpoint.manifest.step,
            rng=checkpoint.manifest.rng,
            home=sharded,
            params=Store(params, sharded.specs),
            buffers=Store(buffers, sharded.specs),
            opt=None if opt is None else _with_values(opt, values),
        )

    return found, finish


def _fresh(opt: OptState) -> OptState:
    """An optimizer's state in storage of its own: what `init` made may be a parameter itself, or expanded."""
    found = {path: _own(leaf) for path, leaf in leaves(opt.raw)}
    return OptState(opt.optimizer, with_leaves(opt.raw, found), opt.specs, opt.shapes)


def _own(leaf: Any) -> Any:
    if isinstance(leaf, DTensor):
        return leaf.clone()
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf


def _with_values(opt: OptState, values: Mapping[str, Any]) -> OptState:
    found = {path: values.get(entry("optimizer", *path), leaf) for path, leaf in leaves(opt.raw)}
    return OptState(opt.optimizer, with_leaves(opt.raw, found), opt.specs, opt.shapes)


def _optimizer(sharded: Sharded, checkpoint: Checkpoint, given: Optimizer | None) -> Optimizer | None:
    """The optimizer of a restored state.

    Raises:
        ShardingError: SS408 where it is another kind than the one that was saved, or not known.
    """
    given = None if given is None else as_optimizer(given)
    said, name = checkpoint.manifest.optimizer, checkpoint.name
    if said is None or (given is not None and given.name == said["name"]):
        return given
    if given is not None:
        refuse(
            "SS408",
            f"the checkpoint {name} was made with {_called(said['name'])}, and the optimizer is {_called(given.name)}",
            why="the state of one means nothing to the other",
        )
    if said["options"] is not None:
        try:
            return rebuild(said["name"], said["options"])
        except ValueError as error:
            refuse("SS408", f"the optimizer of the checkpoint {name} cannot be made", why=str(error))
    if sharded.optimizer is not None and sharded.optimizer.name == said["name"]:
        return sharded.optimizer
    return refuse(
        "SS408",
        f"the checkpoint {name} was made with {_called(said['name'])}, and no file can hold its functions",
        why="a learning rate that is a function, or an optimizer of your own, has to be given again",
        advice=("give it: ss.restore(sharded, path, optimizer=...)",),
    )


def _called(name: str) -> str:
    return f"ss.{name}" if name else "an optimizer of your own"
