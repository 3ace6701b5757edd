"""A folder that is complete or absent: it is written beside its name and renamed into place.

For a checkpoint `run/last` three names are used, all in `run`:

    .last.writing     what is being written; whatever lies there is never read
    last              the checkpoint; a folder takes this name only when everything in it is on disk
    .last.previous    the one before, from the moment when it gives up the name until its successor has it

A rename replaces no folder that holds something, so a replacement takes two. A kill between them leaves
`.last.previous`, which `locate` finds and `prepare` puts back.
"""

import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
"""The last file that is written; a folder without it is no checkpoint."""


def staging(folder: Path) -> Path:
    """Where a checkpoint is written."""
    return folder.with_name(f".{folder.name}.writing")


def previous(folder: Path) -> Path:
    """Where the one before lies while it is replaced."""
    return folder.with_name(f".{folder.name}.previous")


def locate(folder: Path) -> Path | None:
    """The complete checkpoint that goes by a name; None where there is none.

    The name is looked at twice: between the first two looks, a save that runs may have passed from one to the other.
    """
    return next((place for place in (folder, previous(folder), folder) if (place / MANIFEST).is_file()), None)


def occupied(folder: Path) -> bool:
    """Whether something other than a checkpoint goes by a name."""
    if not folder.is_dir():
        return os.path.lexists(folder)
    return not (folder / MANIFEST).is_file() and any(folder.iterdir())


def prepare(folder: Path) -> Path:
    """An empty folder to write to, after what a killed save has left is put right.

    Raises:
        OSError: as the file system says.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file() and (previous(folder) / MANIFEST).is_file():
        previous(folder).rename(folder)
    _remove(previous(folder))
    _remove(staging(folder))
    staging(folder).mkdir()
    return staging(folder)


def publish(folder: Path, manifest: str) -> None:
    """Give what was written its name; every file but the manifest lies on disk already.

    Raises:
        OSError: as the file system says.
    """
    made = staging(folder)
    with (made / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    _sync(made)
    if (folder / MANIFEST).is_file():
        folder.rename(previous(folder))
    made.rename(folder)
    _sync(folder.parent)
    _remove(previous(folder))


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
