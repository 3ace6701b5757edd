"""Run the stages of a pipeline in the order of a schedule of torch's."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, evolve, field
from torch import Tensor, nn

from shardspec.messages import orders_of
from shardspec.plan import ActivationPlan, ParamPlan, PipelinePlan, UnitPlan
from shardspec.policy import Policy
from shardspec.runtime.apply import LocalModel, apply
from shardspec.runtime.fabric import Fabric, storage_mesh
from shardspec.runtime.stage import Crossing, Stage, beside_names, dtype_of, foreign_modules, hollow_out
from shardspec.staging import stage_units
from shardspec.torch_private import hold_gradients, reduce_gradients, wait_for_peer


class Whole(nn.Module):
    """The stages of a rank as one module, under the names of the model."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def named_modules(self, *_: Any, **__: Any) -> Any:
        """Each stage's modules under the names that they have in the model."""
        return itertools.chain.from_iterable(part.named_modules() for part in self.parts)


@define(eq=False, slots=False)
class StagedModel:
    """What a rank holds of a pipeline: the same as `LocalModel`, over the stages that it runs."""

    stages: dict[int, Stage]
    foreign: dict[int, set[str]]
    """Stage -> the modules that do not run there."""

    @cached_property
    def module(self) -> nn.Module:
        """The modules of all stages."""
        return Whole([stage.local.module for stage in self.stages.values()])

    @cached_property
    def params(self) -> dict[str, ParamPlan]:
        """First name -> plan, for the parameters that lie here."""
        return {name: plan for local in self.locals for name, plan in local.params.items()}

    @cached_property
    def locals(self) -> list[LocalModel]:
        """The model of each stage."""
        return [stage.local for stage in self.stages.values()]

    def bind(self, locals_: Mapping[str, Tensor]) -> None:
        """Have every stage compute with these local tensors."""
        for local in self.locals:
            local.bind({name: locals_[name] for name in local.params})

    def lend_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Have forward read a state's persistent buffers, and write to copies."""
        for local in self.locals:
            local.lend_buffers(buffers)

    def held_buffers(self) -> dict[str, Tensor]:
        """The persistent buffers as they lie in the stages."""
        return {name: buffer for local in self.locals for name, buffer in local.held_buffers().items()}

    def take_buffers(self) -> dict[str, Tensor]:
        """The persistent buffers after a step that they were lent to."""
        return {name: buffer for local in self.locals for name, buffer in local.take_buffers().items()}

    def gradients(self) -> dict[str, Tensor]:
        """First name -> local gradient; a parameter that two stages here read has the sum of theirs."""
        found: dict[str, Tensor] = {}
        for local in self.locals:
            for name, grad in local.gradients().items():
                found[name] = found[name] + grad if name in found else grad
        return found

    def clear_gradients(self) -> None:
        """Forget the gradients."""
        for local in self.locals:
            local.clear_gradients()

    def reset(self) -> None:
        """Be as before a step."""
        for local in self.locals:
            local.reset()

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Storage for a rank's part of a parameter."""
        home = next(local for local in self.locals if name in local.params)
        return home.empty(name, shape, dtype, device)


def apply_stages(
    module: nn.Module,
    pipeline: PipelinePlan,
    params: Mapping[str, ParamPlan],
    units: tuple[UnitPlan, ...],
    attributes: Mapping[str, Mapping[str, int]],
    fabric: Fabric,
    policy: Policy,
) -> StagedModel:
    """Turn a module of our own into the stages that this rank runs; every rank must call it."""
    for axes in {plan.storage for plan in params.values() if plan.storage}:
        storage_mesh(fabric, axes)  # made by all ranks at once, whether their stages store anything or not
    kept = evolve(policy, reshard_after_forward=False)
    staged = StagedModel({}, {})
    own = pipeline.on(fabric.coordinate["pp"])
    for number, plan in enumerate(own):
        part = module if number == len(own) - 1 else copy.deepcopy(module)
        standing = hollow_out(part, pipeline, plan, params, fabric.device, policy.param_dtype)
        local = apply(part, params, stage_units(units, params, plan), attributes, fabric, kept, held=set(plan.params))
        stage = Stage(local, standing, beside_names(plan))
        if plan.receives is not None:
            first = part.get_submodule(plan.layers[0])
            first.register_forward_pre_hook(stage.inject, prepend=True, with_kwargs=True)
        staged.stages[plan.index] = stage
        staged.foreign[plan.index] = foreign_modules(part, pipeline, plan)
    return staged


@define(eq=False)
class Flight:
    """One step's microbatches on their way through the stages of a rank."""

    staged: StagedModel
    pipeline: PipelinePlan
    """Of the program that runs now: the shapes of what crosses are its own."""
    fabric: Fabric
    arguments: Sequence[Mapping[str, Any]]
    """Of forward, for each microbatch."""
    begin: Callable[[int], None]
    """Called in front of whatever runs for a microbatch, forward or backward."""
    finish: Callable[[Any, int], Tensor]
    """The loss's sum of a microbatch, from the output."""
    backward: bool
    whole_backward: bool
    """Run both halves of a backward at once, where a schedule parts them."""
    dtype: torch.dtype | None
    pending: dict[tuple[str, int, int], tuple[Any, Crossing]] = field(factory=dict)
    """What is being received: (kind, stage, microbatch) -> its works and its place."""
    entered: dict[tuple[int, int], Crossing] = field(factory=dict)
    seeds: dict[tuple[int, int], Crossing] = field(factory=dict)
    made: dict[tuple[int, int], tuple[Crossing, Crossing | None]] = field(factory=dict)
    """(stage, microbatch) -> what its forward made and what it was given."""
    halves: dict[tuple[int, int], Any] = field(factory=dict)
    outgoing: dict[tuple[str, int, int], Crossing] = field(factory=dict)
    sent: dict[tuple[str, int, int], tuple[Any, Crossing]] = field(factory=dict)
    """What was sent and may not have come yet: its work, and the tensor that must live so long."""
    left: dict[int, int] = field(factory=dict)
    """Stage -> backwards to come."""

    def run(self) -> None:
        """Do what the schedule says, to the end; gradients are left with the parameters, summed over data ranks."""
        pipeline = self.pipeline
        for index, part in self.staged.stages.items():
            part.follow(pipeline.stages[index])
        per_rank = len(pipeline.stages) // pipeline.degree
        orders = orders_of(pipeline.schedule, pipeline.degree, per_rank, pipeline.microbatches, backward=self.backward)
        does: dict[str, Callable[[int, int], None]] = {
            "F": self._forward,
            "SEND_F": self._send,
            "RECV_F": self._receive,
        }
        if self.backward:
            does |= {"B": self._backward, "I": self._backward_input, "W": self._backward_weight}
            does |= {"SEND_B": self._send_back, "RECV_B": self._receive_back}
            for index, stage in self.staged.stages.items():
                self.left[index] = pipeline.microbatches
                hold_gradients(stage.local.module)
        rank = self.fabric.coordinate["pp"]
        for position, (kind, stage, microbatch) in enumerate(orders.steps[rank]):
            does[kind](stage, microbatch)
            for come in orders.acknowledged[rank].get(position, ()):
                wait_for_peer(self.sent.pop(come)[0])
        for work, _ in self.sent.values():
            wait_for_peer(work)

    # Messages.

    def _post(
        self, kind: str, stage: int, microbatch: int, peer: int, tensors: Crossing, way: Callable[..., Any]
    ) -> list[Any]:
        """Send to, or receive from, the stage `peer`; a message is known by what it holds, not by when it comes."""
        stages = self.pipeline.stages
        group = self.fabric.group(("pp",))
        backward = kind.endswith("B")
        tag = (microbatch * len(stages) + stage) * 2 + backward
        most = max(len(other.crossing) for other in stages)
        rank = dist.get_global_rank(group, stages[peer].rank)
        return [way(tensor, rank, group=group, tag=tag * most + place) for place, tensor in enumerate(tensors)]

    def _space(self, stage: int, *, gradient: bool = False) -> Crossing:
        """Room for what crosses into a stage, or for its gradients."""

        def room(plan: ActivationPlan) -> Tensor:
            return torch.empty(plan.layout.shape, dtype=dtype_of(plan, self.dtype), device=self.fabric.device)

        return tuple(room(plan) for plan in self.pipeline.stages[stage].crossing if plan.floating or not gradient)

    def _receive(self, stage: int, microbatch: int) -> None:
        space = self._space(stage)
        work = self._post("RECV_F", stage, microbatch, stage - 1, space, dist.irecv)
        self.pending["F", stage, microbatch] = (work, space)

    def _receive_back(self, stage: int, microbatch: int) -> None:
        space = self._space(stage + 1, gradient=True)
        work = self._post("RECV_B", stage + 1, microbatch, stage + 1, space, dist.irecv)
        self.pending["B", stage, microbatch] = (work, space)

    def _send(self, stage: int, microbatch: int) -> None:
        tensor = self.outgoing.pop(("F", stage, microbatch))
        work = self._post("SEND_F", stage + 1, microbatch, stage + 1, tensor, dist.isend)
        self.sent["SEND_F", stage, microbatch] = (work, tensor)

    def _send_back(self, stage: int, microbatch: int) -> None:
        tensor = self.outgoing.pop(("B", stage, microbatch))
        work = self._post("SEND_B", stage, microbatch, stage - 1, tensor, dist.isend)
        self.sent["SEND_B", stage, microbatch] = (work, tensor)

    def _arrived(self, kind: str, stage: int, microbatch: int) -> Crossing:
        works, space = self.pending.pop((kind, stage, microbatch))
        wait_for_peer(works)
        return space

    # Computation.

    def _forward(self, stage: int, microbatch: int) -> None:
        self.begin(microbatch)
        at, received = (stage, microbatch), None
        if stage:
            received = self.entered.pop(at, None)
            received = self._arrived("F", *at) if received is None else received
            for tensor in floating(received):
                tensor.requires_grad_(self.backward)
        made = self.staged.stages[stage].forward(self.arguments[microbatch], received)
        if stage + 1 == len(self.pipeline.stages):
            made = (self.finish(made, microbatch),)
        else:
            made = self._checked(made, stage + 1)
            self._hand(tuple(tensor.detach() for tensor in made), "F", at, stage + 1)
        if self.backward:
            self.made[at] = (made, received)

    def _checked(self, made: Crossing, stage: int) -> Crossing:
        """What crosses into a stage, as that expects it."""
        found: list[Tensor] = []
        for tensor, plan in zip(made, self.pipeline.stages[stage].crossing, strict=True):
            wanted = (plan.layout.shape, dtype_of(plan, self.dtype))
            scalar = tensor.to(wanted[1]) if not tensor.ndim else tensor
            if (tuple(scalar.shape), scalar.dtype) != wanted:
                raise TypeError(
                    f"{plan.name} is {tuple(tensor.shape)} {tensor.dtype} where a stage ends; the next one expects "
                    f"{wanted[0]} {wanted[1]}"
                )
            found.append(scalar)
        return tuple(found)

    def _hand(self, tensors: Crossing, kind: str, at: tuple[int, int], to: int) -> None:
        """Give tensors to a stage: one of this rank, or one that they will be sent to."""
        if to in self.staged.stages:
            (self.entered if kind == "F" else self.seeds)[to, at[1]] = tensors
        else:
            self.outgoing[kind, *at] = tuple(tensor.contiguous() for tensor in tensors)

    def _seed(self, stage: int, microbatch: int) -> list[Tensor] | None:
        """The gradients of what a stage made; None on the last, which made the loss."""
        if stage + 1 == len(self.pipeline.stages):
            return None
        seed = self.seeds.pop((stage, microbatch), None)
        return list(self._arrived("B", stage, microbatch) if seed is None else seed)

    def _backward(self, stage: int, microbatch: int) -> None:
        self.begin(microbatch)
        made, received = self.made.pop((stage, microbatch))
        backward_from(made, self._seed(stage, microbatch))
        self._hand_back(received, stage, microbatch)
        self._done(stage)

    def _backward_input(self, stage: int, microbatch: int) -> None:
        at = (stage, microbatch)
        made, received = self.made[at]
        if received is None:
            return
        if self.whole_backward:
            self.halves[at] = None
            self.begin(microbatch)
            backward_from(made, self._seed(*at))
        else:
            self.begin(microbatch)
            self.halves[at] = self.staged.stages[stage].backward_input(
                floating(made), floating(received), self._seed(*at)
            )
        del self.made[at]
        self._hand_back(received, stage, microbatch)

    def _backward_weight(self, stage: int, microbatch: int) -> None:
        at = (stage, microbatch)
        if at in self.made:  # the first stage has nothing to give back: it runs its backward as one
            self._backward(stage, microbatch)
            return
        groups = self.halves.pop(at)
        if groups is not None:
            self.begin(microbatch)
            self.staged.stages[stage].backward_weight(groups)
        self._done(stage)

    def _hand_back(self, received: Crossing | None, stage: int, microbatch: int) -> None:
        if received is None:
            return
        grads: list[Tensor] = []
        for tensor in floating(received):
            grads.append((tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)).detach())
            tensor.grad = None
        self._hand(tuple(grads), "B", (stage, microbatch), stage - 1)

    def _done(self, stage: int) -> None:
        """Count a backward; after the last one of a stage its gradients are summed over data ranks."""
        self.left[stage] -= 1
        if not self.left[stage]:
            reduce_gradients(self.staged.stages[stage].local.module)


def floating(tensors: Crossing) -> Crossing:
    """Those that a gradient can reach."""
    return tuple(tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex())


def backward_from(made: Crossing, seeds: list[Tensor] | None) -> None:
    """Run the backward of what a stage made, where anything in it has one."""
    outputs = floating(made)
    given = seeds if seeds is not None else [None] * len(outputs)
    live = [(output, seed) for output, seed in zip(outputs, given, strict=True) if output.requires_grad]
    if live:
        torch.autograd.backward([output for output, _ in live], [seed for _, seed in live])
