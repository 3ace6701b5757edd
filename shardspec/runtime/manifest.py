"""The manifest of a checkpoint: what it holds, and the sums by which damage is seen."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cattrs
from attrs import asdict, field, frozen

from shardspec.diagnostics import Diagnostic, refuse
from shardspec.rules.match import fold
from shardspec.runtime.publish import MANIFEST

FORMAT = 1
LISTED = 12
"""Names that a message spells out; the others are folded."""


@frozen(kw_only=True)
class Entry:
    """A whole tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    spec: str = ""
    """How the table laid it when it was saved; restoring does not depend on it."""

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@frozen(kw_only=True)
class File:
    """A file as it was when the checkpoint was complete."""

    bytes: int
    blake2b: str


@frozen(kw_only=True)
class Manifest:
    """What lies in a checkpoint."""

    format: int = FORMAT
    torch: str
    mesh: str
    plan: str
    """The hash of the plan that was run, "" where none was known yet."""
    step: int
    rng: int
    optimizer: Mapping[str, Any] | None
    """Name and options; None for a state without one. Options are None where they are not numbers alone."""
    entries: Mapping[str, Entry]
    values: Mapping[str, Any] = field(factory=dict)
    """Python numbers in the optimizer's state."""
    files: Mapping[str, File]

    def to_json(self) -> str:
        """Text, with a sum over all of it."""
        kept = asdict(self)
        return json.dumps(kept | {"sum": _sum(kept)}, indent=1)


def _sum(kept: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_manifest(folder: Path, said_path: str) -> Manifest:
    """The manifest of a complete checkpoint, which a user knows by `said_path`.

    Raises:
        ShardingError: SS409 for one that is damaged, or that another version of the format has written.
    """
    place = f"{said_path}/{MANIFEST}"
    try:
        kept = json.loads((folder / MANIFEST).read_bytes())
        said = kept.pop("sum", None)
        if kept.get("format") == FORMAT:
            manifest = cattrs.Converter(forbid_extra_keys=True).structure(kept, Manifest)
            if said == _sum(kept):
                return manifest
    except OSError as error:
        refuse("SS409", f"{place} cannot be read", why=str(error))
    except (ValueError, AttributeError, TypeError, cattrs.errors.BaseValidationError):
        refuse("SS409", f"{place} is damaged", why="it is no manifest")
    if kept.get("format") != FORMAT:
        refuse(
            "SS409",
            f"{place} has format {kept.get('format')!r}",
            why=f"this version of shardspec reads format {FORMAT}",
        )
    return refuse("SS409", f"{place} is damaged", why="its sum is not the one that it states")


def measure(path: Path) -> File:
    """The length and the sum of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))  # pyright: ignore[reportArgumentType]
        return File(bytes=file.tell(), blake2b=digest.hexdigest())


def damage(folder: Path, files: Mapping[str, File]) -> Iterator[str]:
    """What is wrong with files of a checkpoint, a line a file."""
    for name, expected in files.items():
        try:
            found = measure(folder / name)
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        if found.bytes != expected.bytes:
            yield f"{name}: {found.bytes} bytes, {expected.bytes} were written"
        elif found != expected:
            yield f"{name}: its contents are not what was written"


def misfits(manifest: Manifest, wanted: Mapping[str, Entry], place: str) -> Iterator[Diagnostic]:
    """SS408 for what a state needs and a checkpoint does not have so: a diagnostic for each kind of misfit."""
    has = manifest.entries
    missing = [f"{name} ({entry})" for name, entry in wanted.items() if name not in has]
    shared = {name: entry for name, entry in wanted.items() if name in has}
    shapes = [
        f"{name}: {list(has[name].shape)} is saved, {list(entry.shape)} is needed"
        for name, entry in shared.items()
        if has[name].shape != entry.shape
    ]
    dtypes = [
        f"{name}: {has[name].dtype} is saved, {entry.dtype} is needed"
        for name, entry in shared.items()
        if has[name].dtype != entry.dtype
    ]
    for lines, what in (
        (missing, "does not have {} that the state needs"),
        (shapes, "has {} of another shape"),
        (dtypes, "has {} of another dtype: nothing is cast"),
    ):
        if lines:
            yield misfit(place, what, lines)


def surplus(manifest: Manifest, names: Iterable[str], place: str) -> Iterator[Diagnostic]:
    """SS408 for entries that nothing asks for."""
    lines = [f"{name} ({manifest.entries[name]})" if name in manifest.entries else name for name in names]
    if lines:
        yield misfit(place, "has {} that the state has no place for", lines)


def misfit(place: str, what: str, lines: list[str]) -> Diagnostic:
    """One diagnostic that lists entries: the first ones in full, the others with their indices folded."""
    count = "an entry" if len(lines) == 1 else f"{len(lines)} entries"
    listed, rest = lines[:LISTED], lines[LISTED:]
    kinds: dict[str, int] = {}
    for line in rest:
        kinds[fold(line)] = kinds.get(fold(line), 0) + 1
    listed += [f"{kind}{f', {number} times' if number > 1 else ''}" for kind, number in kinds.items()]
    return Diagnostic(code="SS408", what=f"the checkpoint {place} {what.format(count)}", why="\n".join(listed))
