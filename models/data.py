"""Bytes to train on, found on every machine: the source text of Python's own standard library."""

import hashlib
import sysconfig
from pathlib import Path

import attrs
import numpy as np
import torch

LIMIT = 8 * 2**20  # bytes; the library of Python 3.11 has a little less
VALIDATION_SHARE = 0.1
# installed packages, tests, tables and generated text: not the language that we want to learn
SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings",
    "pydoc_data", "ensurepip", "__pycache__", "__phello__",
}  # fmt: skip


@attrs.frozen(kw_only=True)
class Corpus:
    """Text as uint8 arrays, split by file."""

    train: np.ndarray
    validation: np.ndarray


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the *.py files under `root` (default: the standard library), in the order of their paths."""
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    left = LIMIT
    for name in source_names(root):
        text = (root / name).read_bytes()[:left]
        left -= len(text)
        parts[is_validation(name)].append(text)
    for held_out, texts in parts.items():
        if not any(texts):
            raise FileNotFoundError(f"no {'validation' if held_out else 'training'} text under {root}")
    train, validation = (np.frombuffer(b"".join(parts[key]), dtype=np.uint8) for key in (False, True))
    return Corpus(train=train, validation=validation)


def source_names(root: Path) -> list[str]:
    """Return the paths of the source files, relative to `root`, sorted."""
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        name.as_posix()
        for name in names
        if SKIPPED.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata")
    )


def is_validation(name: str) -> bool:
    """Say whether a file is held out: by the hash of its path, so the same on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] < VALIDATION_SHARE * 256


def train_batch(text: np.ndarray, *, seed: int, step: int, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Return the global batch of one step, {"tokens", "labels"}: [batch, seq] int64.

    Drawn by a counter-based generator from (seed, step) alone: the same on every mesh and after a resume.
    """
    rng = np.random.Generator(np.random.Philox(key=seed, counter=(0, step, 0, 0)))
    return windows(text, rng.integers(0, len(text) - seq, size=batch), seq)


def validation_batches(text: np.ndarray, *, count: int, batch: int, seq: int) -> list[dict[str, torch.Tensor]]:
    """Return `count` fixed global batches whose windows lie evenly over `text`."""
    starts = np.linspace(0, len(text) - seq - 1, count * batch).astype(np.int64)
    return [windows(text, part, seq) for part in starts.reshape(count, batch)]


def windows(text: np.ndarray, starts: np.ndarray, seq: int) -> dict[str, torch.Tensor]:
    """Cut windows of `seq` bytes, and the same moved by one as labels."""
    rows = torch.from_numpy(text[starts[:, None] + np.arange(seq + 1)].astype(np.int64))
    return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def with_positions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with the places of its tokens, [seq] int64: what a model whose sequence is split must be told."""
    return {**batch, "positions": torch.arange(batch["tokens"].shape[1])}


def entropy_unigram(train: np.ndarray, validation: np.ndarray) -> float:
    """Return the cross-entropy, in nats a byte, of `validation` under `train`'s byte frequencies.

    Counts start at one, so that a byte absent from `train` costs something finite.
    """
    counts = np.bincount(train, minlength=256) + 1
    log_p = np.log(counts / counts.sum())
    return float(-log_p[validation].mean())
