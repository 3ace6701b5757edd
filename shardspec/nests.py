"""Tensors in nests of tuples, lists and dicts, as forward takes and returns them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in tensor_leaves(item)]
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in tensor_leaves(item)]
    return []


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
