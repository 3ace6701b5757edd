"""The part of a model that one stage of a pipeline runs, by inject and capture: the model's own code, unchanged.

The stage calls the whole model. What computes on other stages is hollow: a module before the first kept layer returns
a placeholder of the planned shape; in front of the first kept layer the received activation takes the placeholder's
place; and the next stage's first layer ends the forward with what would enter it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from shardspec.plan import ActivationPlan, ParamPlan, PipelinePlan, StagePlan
from shardspec.runtime.apply import LocalModel
from shardspec.torch_private import stage_backward_input, stage_backward_weight


class Crossed(BaseException):
    """Ends a forward with the activation that crosses to the next stage; no model catches it by accident."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@define(eq=False)
class Stage:
    """A stage on one of its ranks."""

    local: LocalModel
    standing: dict[str, ActivationPlan]
    """Hollow module -> what it returns in the program that runs now."""
    received: Tensor | None = None

    def follow(self, plan: StagePlan) -> None:
        """Have the hollow modules return what a program expects of them."""
        self.standing.update((module.name, module) for module in plan.hollow)

    def forward(self, arguments: Mapping[str, Any], received: Tensor | None) -> Any:
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

    def inject(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Have the received activation enter the first layer, wherever the placeholder would."""
        assert self.received is not None, "a stage but the first runs on what it receives"
        placeholder = first_tensor(args, kwargs)

        def swap(item: Any) -> Any:
            return self.received if item is placeholder else item

        return tuple(map(swap, args)), {name: swap(item) for name, item in kwargs.items()}

    def backward_input(self, made: Tensor, received: Tensor, grad: Tensor | None) -> Any:
        """The half of a backward that the stage before waits for; gives what `backward_weight` needs."""
        outputs, seeds = [made], None if grad is None else [grad]
        return stage_backward_input(outputs, seeds, [received], self.local.module.parameters())[1]

    def backward_weight(self, groups: Any) -> None:
        """The other half: the gradients of parameters, added to what is there."""
        stage_backward_weight(self.local.module.parameters(), groups)


def first_tensor(args: Any, kwargs: Any) -> Any:
    """The first tensor among a module's arguments, positional ones first."""
    return next((item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), None)


def foreign_modules(module: nn.Module, pipeline: PipelinePlan, stage: StagePlan) -> set[str]:
    """The modules that a stage runs hollow or not at all, with all inside them."""
    outer = [module.name for module in stage.hollow]
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
        module.get_submodule(name).forward = functools.partial(stand_in, standing, name, device, dtype, stage.dense)
    if stage.index + 1 < len(pipeline.stages):
        following = pipeline.stages[stage.index + 1].layers[0]
        module.get_submodule(following).forward = leave
    module.forward = functools.partial(until_crossed, module.forward)
    return standing


def compute_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of an activation that was traced with another: floating-point ones take that of the parameters."""
    traced: torch.dtype = getattr(torch, name)
    return dtype if dtype is not None and traced.is_floating_point else traced


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
) -> Tensor:
    """The forward of a module that computes on another stage."""
    plan = standing[name]
    found = placeholder(plan.layout.shape, compute_dtype(plan.dtype, dtype), device)
    return found.contiguous() if dense else found


def leave(*args: Any, **kwargs: Any) -> Any:
    """The forward of the next stage's first layer."""
    raise Crossed(first_tensor(args, kwargs))


def until_crossed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model's forward up to where the next stage goes on."""
    try:
        return forward(*args, **kwargs)
    except Crossed as crossed:
        return crossed.tensor
