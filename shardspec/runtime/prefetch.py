"""Gather units before they are needed: how far ahead is policy, the order is what the first forward shows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def prefetch(root: nn.Module, units: Sequence[Sequence[FSDPModule]], ahead: int) -> None:
    """Have each unit, while it computes, gather the `ahead` units behind it, and in backward those in front of it.

    Settled when the first forward has ended, for only then is the order of the units known. The root's own
    parameters are gathered before anything else.

    Args:
        units: the modules of each unit; they share what FSDP2 knows of it.
    """
    order: list[FSDPModule] = []
    handles: list[Any] = []

    def note(unit: FSDPModule, *_: Any) -> None:
        if unit not in order:
            order.append(unit)

    def settle(*_: Any) -> None:
        for handle in handles:
            handle.remove()
        for at, unit in enumerate(order):
            unit.set_modules_to_forward_prefetch(order[at + 1 : at + 1 + ahead])
            unit.set_modules_to_backward_prefetch(order[max(0, at - ahead) : at][::-1])

    for modules in units:
        handles += [module.register_forward_pre_hook(partial(note, modules[0])) for module in _modules(modules)]
    # a stage of a pipeline leaves its forward early
    handles.append(root.register_forward_hook(settle, always_call=True))


def _modules(unit: Sequence[FSDPModule]) -> list[nn.Module]:
    return [module for module in unit if isinstance(module, nn.Module)]
