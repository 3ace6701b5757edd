"""`ss.save`: a state as files that say nothing about a mesh, over torch.distributed.checkpoint."""

import json
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from shardspec.diagnostics import refuse
from shardspec.runtime.agreement import agree, exchange, on_first
from shardspec.runtime.contents import Contents, contents, merged
from shardspec.runtime.manifest import Entry, File, Manifest, measure
from shardspec.runtime.pieces import PieceSaver
from shardspec.runtime.publish import occupied, prepare, publish, staging
from shardspec.runtime.sharded import Sharded
from shardspec.runtime.state import TrainState


def save(state: TrainState, path: str | os.PathLike[str]) -> None:
    """Write a state to a folder: parameters, buffers, the optimizer's state, step and randomness.

    Every rank must call it, with a path that all of them see; each writes its own shards, a replica's once. The
    folder appears under its name when all of it is on disk; a checkpoint that has the name is replaced. A kill at
    any moment leaves the one before or the new one.

    Raises:
        ShardingError: SS410 for a path that cannot be written or is no checkpoint's, and for an optimizer's state
            that no file can hold; SS403 where ranks save different things.
        DonatedError: for a state that a step has consumed.
        NonFiniteError: where the step that made the state met a loss or gradient that is not finite.
    """
    if not isinstance(state, TrainState):
        refuse("SS407", f"ss.save takes (state, path), and was given a {type(state).__name__} for a state")
    home: Sharded = state.home
    world = home.mesh.world
    state.live()
    state.check_finite()

    def listed() -> tuple[Contents, Mapping[str, str]]:
        held = state.live()
        return contents(home, held.params.locals, held.buffers.locals, held.opt), {
            "path": written(path),
            "step": str(state.step),
        }

    found = agree(world, "the save", listed)
    values = merged(world, found)
    folder = on_first(world, lambda: _begin(path))
    with _refusing(path), alone(world):
        metadata = dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(staging(folder), sync_files=True),
            planner=PieceSaver(found.pieces),
            no_dist=world == 1,
        )
    files = _measured(world, home.fabric.rank, path, folder, metadata)

    def finish() -> None:
        with _refusing(path):
            publish(folder, _manifest(state, metadata, values, files).to_json())

    on_first(world, finish)


def written(path: Any) -> str:
    """A path as it was written.

    Raises:
        ShardingError: SS410 for what is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        refuse("SS410", f"a path is a string or a pathlib.Path, and this is a {type(path).__name__}")
    return str(os.fspath(path))


@contextmanager
def _refusing(path: str | os.PathLike[str]) -> Generator[None]:
    """Tell of what the file system refuses, on whichever rank, as SS410."""
    try:
        yield
    except OSError as error:
        refuse("SS410", f"{written(path)} cannot be written", why=str(error))
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, OSError):
            raise
        refuse("SS410", f"{written(path)} cannot be written", why=f"rank {rank}: {cause}")


@contextmanager
def alone(world: int) -> Generator[None]:
    """Without the warning that there is no process group, where none is needed."""
    if world > 1:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _begin(path: str | os.PathLike[str]) -> Path:
    """The folder that a path means, with an empty one beside it."""
    folder = Path(os.path.realpath(path))
    if occupied(folder):
        kind = "a folder that holds other things" if folder.is_dir() else "a file"
        refuse("SS410", f"{written(path)} is {kind}", why="a save replaces a checkpoint, and nothing else")
    with _refusing(path):
        prepare(folder)
    return folder


def _measured(world: int, rank: int, path: str | os.PathLike[str], folder: Path, metadata: Any) -> dict[str, File]:
    """Length and sum of each file that was written; each rank reads its share of them."""

    def listed() -> list[str]:
        with _refusing(path):
            names = sorted(file.name for file in staging(folder).iterdir())
        absent = {info.relative_path for info in metadata.storage_data.values()} - {*names}
        if absent:
            refuse(
                "SS410",
                f"rank 0 does not see {', '.join(sorted(absent))} in {staging(folder)}, which other ranks wrote",
                why="a checkpoint lies in a folder that every rank sees",
            )
        return names

    names = on_first(world, listed)
    mine: dict[str, File] = {}
    problem = ""
    try:
        mine = {name: measure(staging(folder) / name) for name in names[rank::world]}
    except OSError as error:
        problem = f"rank {rank}: {error}"
    every = [(mine, problem)] if world == 1 else exchange(world, (mine, problem))
    problems = [problem for _, problem in every if problem]
    if problems:
        refuse("SS410", f"{written(path)} cannot be written", why="\n".join(problems))
    return {name: file for part, _ in every for name, file in sorted(part.items())}


def _manifest(state: TrainState, metadata: Any, values: dict[str, Any], files: dict[str, File]) -> Manifest:
    home: Sharded = state.home
    opt = state.opt_state
    entries: dict[str, Entry] = {}
    for name, stored in metadata.state_dict_metadata.items():
        plan = home.params.get(name.rpartition("/")[2])
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        entries[name] = Entry(shape=tuple(stored.size), dtype=dtype, spec=plan.spec if plan is not None else "")
    return Manifest(
        torch=torch.__version__,
        mesh=str(home.mesh),
        plan=home.plan.hash if home.plan is not None else "",
        step=state.step,
        rng=state.rng,
        optimizer=None if opt is None else {"name": opt.optimizer.name, "options": _as_json(opt.optimizer.options)},
        entries=entries,
        values=values,
        files=files,
    )


def _as_json(options: Mapping[str, Any] | None) -> Any:
    """Options as JSON holds them; None where it cannot, as a schedule."""
    try:
        return None if options is None else json.loads(json.dumps(options))
    except TypeError:
        return None
