"""A state dict against a plan: what is missing, surplus or does not fit, before any of it is used."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardspec.arguments import kind_of
from shardspec.diagnostics import Diagnostic
from shardspec.plan import ParamPlan


def misfits(state_dict: Mapping[str, Tensor], params: Mapping[str, ParamPlan]) -> list[Diagnostic]:
    """SS404 for every entry of a state dict that is missing, surplus or of another shape, dtype or value."""
    found: list[Diagnostic] = []
    if not isinstance(state_dict, Mapping):
        return [Diagnostic(code="SS404", what=f"a state dict maps names to tensors; this is a {kind_of(state_dict)}")]
    for name, item in state_dict.items():
        if not isinstance(item, Tensor):
            found.append(Diagnostic(code="SS404", what=f"{name} is a {kind_of(item)}, not a tensor"))
    state_dict = {name: item for name, item in state_dict.items() if isinstance(item, Tensor)}
    names = {plan.first: [] for plan in params.values()}
    for name, plan in params.items():
        names[plan.first].append(name)
    for first, every in names.items():
        given = [state_dict[name] for name in every if name in state_dict]
        if not given and (params[first].persistent or not params[first].buffer):
            found.append(Diagnostic(code="SS404", what=f"the state dict has no {first}"))
        if any(not same_tensor(given[0], other) for other in given[1:]):
            found.append(
                Diagnostic(
                    code="SS404",
                    what=f"{' and '.join(every)} are one tensor, and the state dict has two",
                    why="their values differ",
                )
            )
    for name, tensor in state_dict.items():
        plan = params.get(name)
        if plan is None:
            found.append(Diagnostic(code="SS404", what=f"the state dict has {name}, which the model does not"))
        elif tuple(tensor.shape) != plan.shape:
            found.append(
                Diagnostic(
                    code="SS404",
                    what=f"{name} has shape {tuple(tensor.shape)}, the model's has {plan.shape}",
                )
            )
        elif str(tensor.dtype).removeprefix("torch.") != plan.dtype:
            found.append(Diagnostic(code="SS404", what=f"{name} is {tensor.dtype}, the model's is torch.{plan.dtype}"))
    return found


def given_name(first: str, state_dict: Mapping[str, Tensor], params: Mapping[str, ParamPlan]) -> str:
    """The name by which a tensor is in a state dict: any of those that it has in the model."""
    return next(name for name, plan in params.items() if plan.first == first and name in state_dict)


def same_tensor(one: Tensor, two: Tensor) -> bool:
    """Whether two entries of a state dict hold the same; DTensors are not put together to see."""
    if one is two or isinstance(one, DTensor) or isinstance(two, DTensor):
        return True
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)
