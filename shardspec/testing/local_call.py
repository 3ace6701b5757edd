"""One operator on one simulated rank: a rank's sizes where the call says the whole's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardspec.program import Node, Ref, substitute
from shardspec.rules.operator import named_arguments

VIEWS = frozenset({"view", "_unsafe_view", "reshape", "flatten", "unflatten", "view_as"})
EXPANDS = frozenset({"expand", "broadcast_to", "expand_as"})
FILLS = frozenset({"full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty"})
PARTS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split"})


def call_locally(
    node: Node, read: Callable[[Ref], Tensor], local: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]
) -> Any:
    """One operator on a rank's operands, with a rank's sizes for the sizes in its arguments."""
    if not hasattr(node.func, "_schema"):
        return node.func(*substitute(node.args, read), **substitute(node.kwargs, read))
    named: dict[str, Any] = {name: substitute(item, read) for name, item in named_arguments(node).items()}
    named.update({name: item for name, item in local.items() if item is not ... and name in named})
    if named.get("device") is not None:
        named["device"] = torch.device("cpu")
    if node.op in VIEWS:
        return named["self"].reshape(shapes[0])
    if node.op in EXPANDS:
        return named["self"].expand(shapes[0])
    if node.op == "repeat":
        counts = named["repeats"]
        old = (1,) * (len(counts) - named["self"].ndim) + tuple(named["self"].shape)
        named["repeats"] = [new // length if length else 1 for new, length in zip(shapes[0], old, strict=True)]
    if node.op in PARTS:
        dim = int(named.get("dim") or 0)
        return named["self"].split([shape[dim] for shape in shapes], dim)
    if node.op in FILLS:
        named["size"] = list(shapes[0])
    if node.op == "slice":
        dim, step = int(named.get("dim") or 0), int(named.get("step") or 1)
        start = int(named.get("start") or 0)
        length = shapes[0][dim]
        start = max(0, start + named["self"].shape[dim]) if start < 0 else start
        named.update(start=start, end=start + (length - 1) * step + 1 if length else start)
    if node.op == "narrow":
        named["length"] = shapes[0][int(named["dim"])]
    return node.func(**named)


def masked_lookup(node: Node, read: Callable[[Ref], Tensor], first: int) -> Tensor:
    """A rank's share of an embedding whose rows it holds from `first` on: zero for what lies on others."""
    named = {name: substitute(item, read) for name, item in named_arguments(node).items()}
    weight, ids = named["weight"], named["indices"] - first
    held = (ids >= 0) & (ids < weight.shape[0])
    padding = int(named["padding_idx"])
    rows = nn.functional.embedding(torch.where(held, ids, 0), weight)
    if padding >= 0:
        rows = torch.where((ids == padding - first).unsqueeze(-1), rows.detach(), rows)
    return rows * held.unsqueeze(-1)
