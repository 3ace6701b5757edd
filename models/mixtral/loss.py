"""What a Mixtral is trained on: the cross-entropy of the next token and the losses of the routing."""

from typing import Any

import torch

import shardspec as ss


def loss_fn(output: tuple[torch.Tensor, torch.Tensor], batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a sum and its weight, the number of labels that count, for what forward returns.

    The routers' loss is that of the whole microbatch and weighs as much as its labels do: the quotient of the sums is
    the mean cross-entropy, plus the routers' losses of the microbatches, averaged by their labels.
    """
    logits_BSV, aux = output
    total, weight = ss.cross_entropy(logits_BSV, batch["labels"])
    return total + aux * weight, weight
