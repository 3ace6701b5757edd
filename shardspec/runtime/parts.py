"""What a user's optimizer may do with the parts of parameters that a rank holds: what is right on every part alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shardspec.diagnostics import refuse
from shardspec.runtime.rank_major import is_elementwise
from shardspec.torch_private import OpOverload, TorchDispatchMode, tree_leaves

aten = torch.ops.aten

SHAPES = frozenset({
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "contiguous",
})  # fmt: skip
"""Operators that give a part another shape, and change no element."""

FUSED = frozenset({"_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"})
"""Torch's own optimizers, each elementwise."""

WHOLE_LISTS = frozenset({"_foreach_norm", "_foreach_max"})
"""The operators on lists of tensors that are not elementwise."""


class PartsOnly(TorchDispatchMode):
    """Refuses an operator that would take a rank's part of a parameter for the whole of it.

    Elementwise operators give on each part the part of their result; a norm, a mean or a product does not, and
    numbers that are drawn would differ from mesh to mesh. Scalars may be computed with in any way.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.ndim for tensor in tensors) and not _is_right_on_parts(func):
            refuse(
                "SS407",
                f"the optimizer's update runs {func} on a rank's part of a parameter",
                why="on this mesh a rank holds a part of each: a norm, a mean or a product of it is not that of the "
                "whole; elementwise operators are right on every part",
                advice=(
                    "keep to elementwise operators in update",
                    "in a step of your own the gradients of sharded.value_and_grad are DTensors, with whole norms",
                ),
            )
        return func(*args, **kwargs)


def _is_right_on_parts(func: Any) -> bool:
    if not isinstance(func, OpOverload):
        return False
    name = func._schema.name.partition("::")[2]
    listed = name.startswith("_foreach_") and name not in WHOLE_LISTS
    return listed or name in SHAPES | FUSED or name.startswith("new_") or is_elementwise(func)


def are_split(locals_: Iterable[tuple[Tensor, torch.Size]]) -> bool:
    """Whether a rank holds less than the whole of any: (local tensor, global shape)."""
    return any(local.shape != shape for local, shape in locals_)
