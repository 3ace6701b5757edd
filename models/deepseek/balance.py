"""Balance without a loss: selection biases move by the choices of a whole step (arXiv 2412.19437, section 2.1.2)."""

from collections.abc import Mapping

import torch

SPEED = 0.001


def balanced(buffers: Mapping[str, torch.Tensor], *, speed: float = SPEED) -> dict[str, torch.Tensor]:
    """Return the selection biases after a step, and its counts set back to zero.

    An expert that was chosen less often than the mean is preferred by `speed` more from now on, one that was chosen
    more often by as much less. Give it to `ss.train_step(..., buffers=balanced)`.
    """
    found: dict[str, torch.Tensor] = {}
    for name, counts_E in buffers.items():
        router, _, leaf = name.rpartition(".")
        if leaf == "counts":
            bias_E = buffers[f"{router}.bias"]
            load_E = counts_E.to(bias_E.dtype)
            found[f"{router}.bias"] = bias_E + speed * torch.sign(load_E.mean() - load_E)
            found[name] = torch.zeros_like(counts_E)
    return found
