"""The folder of a run: `--out DIR`, what lies in it, and `--resume PATH`."""

import argparse
import json
from pathlib import Path

SETTINGS = "run.json"
KEPT = ("family", "preset", "seed", "batch", "seq", "dtype")
"""What a run that goes on must share with the one that was saved: the model, and the order of the data."""


def checkpoint_of(out: Path, step: int) -> Path:
    """Where a step is saved."""
    return out / f"step-{step:08d}"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `--resume` means: the one by that name, or the latest one of a run's folder."""
    if (path / "manifest.json").is_file():
        return path
    # One whose replacement was killed goes by its name still: `ss.restore` finds it.
    replaced = {
        path / place.name.removeprefix(".").removesuffix(".previous") for place in path.glob(".step-????????.previous")
    }
    return max({*path.glob("step-????????"), *replaced}, default=path)


def saved_step(checkpoint: Path) -> int:
    """The step of a checkpoint; 0 where that cannot be read, which restoring it will tell."""
    try:
        return int(json.loads((checkpoint / "manifest.json").read_bytes())["step"])
    except (OSError, ValueError, LookupError):
        return 0


def write_settings(out: Path, options: argparse.Namespace) -> None:
    """Make the folder of a run, and note what runs that go on from it must share."""
    out.mkdir(parents=True, exist_ok=True)
    written = out / f".{SETTINGS}"
    written.write_text(json.dumps({name: getattr(options, name) for name in KEPT}, indent=1))
    written.rename(out / SETTINGS)


def other_settings(checkpoint: Path, options: argparse.Namespace) -> str:
    """What differs from the run that was saved, in words; "" where nothing does or nothing was noted."""
    noted = checkpoint.parent / SETTINGS
    if not noted.is_file():
        return ""
    kept = json.loads(noted.read_text())
    for name in KEPT:
        if kept.get(name) != getattr(options, name):
            return f"--{name} {getattr(options, name)}: the run that was saved had {kept.get(name)}"
    return ""
