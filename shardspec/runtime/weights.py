"""A state dict against a plan: what is missing, surplus or does not fit, before any of it is used."""

import difflib
from collections.abc import Iterable, Mapping

import torch
from attrs import evolve
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardspec.arguments import kind_of
from shardspec.diagnostics import Diagnostic, Location
from shardspec.names import fold
from shardspec.plan import ParamPlan


def misfits(state_dict: Mapping[str, Tensor], params: Mapping[str, ParamPlan], place: Location) -> list[Diagnostic]:
    """SS404 for every entry of a state dict that is missing, surplus or of another shape, dtype or value.

    Args:
        place: the line that gives it.
    """

    def misfit(what: str, why: str, *advice: str) -> Diagnostic:
        return Diagnostic(code="SS404", what=what, why=why, locations=(place,), advice=advice)

    if not isinstance(state_dict, Mapping):
        kind = kind_of(state_dict)
        return [misfit("the state dict maps no names to tensors", f"it is a {kind}", "give model.state_dict()")]
    found = [
        misfit(f"{name} is a {kind_of(item)}, not a tensor", "every entry is a whole tensor, or a DTensor")
        for name, item in state_dict.items()
        if not isinstance(item, Tensor)
    ]
    state_dict = {name: item for name, item in state_dict.items() if isinstance(item, Tensor)}
    surplus = [name for name in state_dict if name not in params]
    names = {plan.first: [] for plan in params.values()}
    for name, plan in params.items():
        names[plan.first].append(name)
    for first, every in names.items():
        given = [state_dict[name] for name in every if name in state_dict]
        if not given and (params[first].persistent or not params[first].buffer):
            near = [name for name in surplus if tuple(state_dict[name].shape) == params[first].shape]
            near = difflib.get_close_matches(first, near, 1, cutoff=0.3)
            found.append(
                misfit(
                    f"the state dict has no {first}",
                    f"the model has it, {params[first].shape} of {params[first].dtype}: it would keep what it has",
                    *([f"rename {near[0]}, which has that shape"] if near else []),
                )
            )
        if any(not same_tensor(given[0], other) for other in given[1:]):
            found.append(
                misfit(
                    f"{' and '.join(every)} are one tensor, and the state dict has two",
                    "their values differ, and only one of them would be used",
                    f"leave one out, or tie them: state_dict[{every[1]!r}] = state_dict[{every[0]!r}]",
                )
            )
    found += [
        misfit(f"the state dict has {name}, which the model does not", "what it holds would be lost")
        for name in surplus
    ]
    for name, tensor in state_dict.items():
        plan = params.get(name)
        if plan is not None and tuple(tensor.shape) != plan.shape:
            why = f"an entry is whole, as on one rank; the table says {plan.spec!r} of it"
            found.append(misfit(f"{name} has shape {tuple(tensor.shape)}, the model's has {plan.shape}", why))
        elif plan is not None and str(tensor.dtype).removeprefix("torch.") != plan.dtype:
            found.append(
                misfit(
                    f"{name} is {tensor.dtype}, the model's is torch.{plan.dtype}",
                    "a cast may lose digits, and is not made in silence",
                    f"cast it: tensor.to(torch.{plan.dtype})",
                )
            )
    return told_once(found)


def told_once(found: Iterable[Diagnostic]) -> list[Diagnostic]:
    """One message for the entries of repeated blocks that have the same fault."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Diagnostic]] = {}
    for each in found:
        folded = " ".join(map(fold, each.what.split(" ")))
        groups.setdefault((folded, each.why, each.advice), []).append(each)
    return [
        evolve(same[0], what=what, matches=f"{len(same)} entries") if len(same) > 1 else same[0]
        for (what, *_), same in groups.items()
    ]


def given_name(first: str, state_dict: Mapping[str, Tensor], params: Mapping[str, ParamPlan]) -> str:
    """The name by which a tensor is in a state dict: any of those that it has in the model."""
    return next(name for name, plan in params.items() if plan.first == first and name in state_dict)


def same_tensor(one: Tensor, two: Tensor) -> bool:
    """Whether two entries of a state dict hold the same; DTensors are not put together to see."""
    if one is two or isinstance(one, DTensor) or isinstance(two, DTensor):
        return True
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)
