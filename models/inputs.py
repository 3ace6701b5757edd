"""Global batches by shape alone, on meta: what a table is checked with from a command line.

A family's package has one of them as `inputs`; `shardspec` calls it with those of model, batch and seq that it takes.
"""

import torch
from torch import Tensor, nn


def tokens(batch: int, seq: int) -> dict[str, Tensor]:
    """A language model's batch: tokens and labels, each [batch, seq]."""
    return {name: torch.empty(batch, seq, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def positioned(batch: int, seq: int) -> dict[str, Tensor]:
    """The same with positions [seq], for a sequence that is split over cp."""
    return {**tokens(batch, seq), "positions": torch.empty(seq, dtype=torch.long, device="meta")}


def images(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """An image model's batch: images [batch, channels, size, size] as its config says, and labels [batch]."""
    config = model.config
    size = config.image_size
    return {
        "images": torch.empty(batch, config.channels, size, size, device="meta"),
        "labels": torch.empty(batch, dtype=torch.long, device="meta"),
    }
