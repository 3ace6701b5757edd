"""The part of a model that one stage of a pipeline runs, by inject and capture: the model's own code, unchanged.

The stage calls the whole model. What computes on other stages is hollow: a module before the first kept layer returns
a placeholder of the planned shape; in front of the first kept layer the received activation takes the placeholder's
place; and the next stage's first layer ends the forward with what would enter it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from shardspec.plan import ActivationPlan, ParamPlan, PipelinePlan, StagePlan
from shardspec.runtime.apply import LocalModel
from shardspec.torch_private import stage_backward_input, stage_backward_weight
from shardspec.twin import forward_arguments

Crossing = tuple[Tensor, ...]
"""What one stage hands to the next: the first argument of its first layer, and others that an earlier stage made."""


class Crossed(BaseException):
    """Ends a forward with what crosses to the next stage; no model catches it by accident."""

    def __init__(self, tensors: Crossing) -> None:
        super().__init__()
        self.tensors = tensors


@define(eq=False)
class Stage:
    """A stage on one of its ranks."""

    local: LocalModel
    standing: dict[str, ActivationPlan]
    """Hollow module -> what it returns in the program that runs now."""
    names: tuple[str, ...] = ()
    """The arguments that cross beside the first."""
    received: Crossing | None = None

    def follow(self, plan: StagePlan) -> None:
        """Have the hollow modules return what a program expects of them."""
        self.standing.update((module.name, module) for module in plan.hollow)

    def forward(self, arguments: Mapping[str, Any], received: Crossing | None) -> Any:
        """What crosses to the next stage, or the model's output on the last.

        Args:
            arguments: of the model's forward: a microbatch's own entries, on every stage.
            received: what crosses from the stage before; None on the first.
        """
        self.received = received
        try:
            return self.local.module(**arguments)
        finally:
            self.received = None

    def inject(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Have what was received enter the first layer, wherever the placeholders would."""
        assert self.received is not None, "a stage but the first runs on what it receives"
        placeholders = crossing(self.names, module, args, kwargs)
        places = list(zip(placeholders, self.received, strict=True))

        def swap(item: Any) -> Any:
            return next((came for placeholder, came in places if item is placeholder), item)

        return tuple(map(swap, args)), {name: swap(item) for name, item in kwargs.items()}

    def backward_input(self, made: Sequence[Tensor], received: Sequence[Tensor], grads: list[Tensor] | None) -> Any:
        """The half of a backward that the stage before waits for; gives what `backward_weight` needs."""
        return stage_backward_input(list(made), grads, list(received), self.local.module.parameters())[1]

    def backward_weight(self, groups: Any) -> None:
        """The other half: the gradients of parameters, added to what is there."""
        stage_backward_weight(self.local.module.parameters(), groups)


def crossing(names: Sequence[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The first tensor among a module's arguments, positional ones first, and those of the given names."""
    first = next((item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), None)
    if not names:
        return (first,)
    known = forward_arguments(module)
    given = {known[index] if index < len(known) else str(index): item for index, item in enumerate(args)} | kwargs
    return (first, *(given[name] for name in names))


def foreign_modules(module: nn.Module, pipeline: PipelinePlan, stage: StagePlan) -> set[str]:
    """The modules that a stage runs hollow or not at all, with all inside them."""
    outer = [module.name.partition(":")[0] for module in stage.hollow]
    outer += [layer for other in pipeline.stages if other.index != stage.index for layer in other.layers]
    return {path for path, _ in module.named_modules() for out in outer if path == out or path.startswith(f"{out}.")}


def hollow_out(
    module: nn.Module,
    pipeline: PipelinePlan,
    stage: StagePlan,
    params: Mapping[str, ParamPlan],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, ActivationPlan]:
    """Leave in a module of our own what a stage runs; gives what its hollow modules return, for `Stage`.

    Args:
        device: where placeholders lie.
        dtype: of the placeholders of floating-point activations, where compute is not in the traced one.
    """
    held = set(stage.names)
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for kept in (child._parameters, child._buffers):
            for name in [name for name, tensor in kept.items() if tensor is not None]:
                plan = params[prefix + name]
                if prefix + name not in held:
                    del kept[name]
                    # What a model reads of a parameter that it does not compute with here: its shape, dtype, device.
                    child.__dict__[name] = placeholder(plan.layout.shape, compute_dtype(plan.dtype, dtype), device)
    standing = {plan.name: plan for plan in stage.hollow}
    for name in standing:
        if ":" not in name:
            module.get_submodule(name).forward = functools.partial(stand_in, standing, name, device, dtype, stage.dense)
    if stage.index + 1 < len(pipeline.stages):
        following = pipeline.stages[stage.index + 1]
        first = module.get_submodule(following.layers[0])
        first.forward = functools.partial(leave, beside_names(following), first)
    module.forward = functools.partial(until_crossed, module.forward)
    return standing


def beside_names(stage: StagePlan) -> tuple[str, ...]:
    """The names of the arguments that cross into a stage beside the first."""
    return tuple(plan.name.rpartition(":in.")[2] for plan in stage.beside)


def compute_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of an activation that was traced with another: floating-point ones take that of the parameters."""
    traced: torch.dtype = getattr(torch, name)
    return dtype if dtype is not None and traced.is_floating_point else traced


def dtype_of(plan: ActivationPlan, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which an activation crosses: a scalar, which changes no other's, in that of the trace."""
    return compute_dtype(plan.dtype, dtype if plan.layout.dims else None)


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape that holds one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def stand_in(
    standing: Mapping[str, ActivationPlan],
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    dense: bool,
    *_: Any,
    **__: Any,
) -> Any:
    """The forward of a module that computes on another stage."""
    plans, place = [standing[name]], 1
    while f"{name}:out.{place}" in standing:
        plans.append(standing[f"{name}:out.{place}"])
        place += 1
    found = [placeholder(plan.layout.shape, dtype_of(plan, dtype), device) for plan in plans]
    found = [tensor.contiguous() for tensor in found] if dense else found
    return found[0] if len(found) == 1 else tuple(found)


def leave(names: Sequence[str], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the next stage's first layer."""
    raise Crossed(crossing(names, module, args, kwargs))


def until_crossed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model's forward up to where the next stage goes on."""
    try:
        return forward(*args, **kwargs)
    except Crossed as crossed:
        return crossed.tensors
