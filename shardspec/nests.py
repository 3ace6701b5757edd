"""Tensors in nests of tuples, lists and dicts, as forward takes and returns them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in order."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _collect(item, found)
    elif tree is not None and isinstance(tree, Mapping):
        for item in tree.values():
            _collect(item, found)


def replace_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nest with `change(tensor)` for each tensor."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        items = [replace_tensors(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        changed = copy.copy(tree)
        for key, item in tree.items():
            changed[key] = replace_tensors(item, change)
        return changed
    return tree


def distinct(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, each object once."""
    return list({id(tensor): tensor for tensor in leaves}.values())
