"""`assert_parity`: the runtime on ranks that are threads, against the plain program, in float64."""

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from torch import Tensor, nn

from shardspec.arguments import check_arguments, check_batch
from shardspec.compiler import Compiler
from shardspec.diagnostics import refuse
from shardspec.mesh import Mesh
from shardspec.nests import tensor_leaves
from shardspec.pipelining import microbatch_count
from shardspec.placement import digits_index, local_index
from shardspec.plan import Plan
from shardspec.policy import Policy
from shardspec.rules.table import Rules
from shardspec.runtime.optim import sgd
from shardspec.runtime.sharded import shard, take
from shardspec.runtime.step import train_step
from shardspec.survey import Model, survey
from shardspec.testing.plain import Expected, LossFn, check_tells, in_float64, own_model, run_plain, weighted, wide
from shardspec.testing.threads import run_ranks
from shardspec.torch_private import local_of
from shardspec.twin import forward_arguments

LR = 0.125
SHOWN = 8
"""How many differences a message shows."""

FLOAT32 = 1e-5
"""What rounding to float32 leaves of a value, relative to it, after some operations."""


@frozen(eq=False, kw_only=True)
class Difference:
    """Where a rank and the plain program are not equal."""

    what: str
    """"loss", "gradient of layers.0.wq.weight"."""
    size: float
    """The largest difference of an element."""
    relative: float
    """The same in units of what is allowed."""
    rank: int
    index: tuple[int, ...] = ()
    """Of that element, in the whole tensor."""
    ours: float
    plain: float
    ratio: float | None = None
    """What all elements of the rank's part are multiplied with, where it is one number."""
    rule: str = ""
    """The rule that placed the tensor."""

    def __str__(self) -> str:
        at = f" at {list(self.index)}" if self.index else ""
        lines = [f"{self.what}: differs by {self.size:.3g}{at} on rank {self.rank}"]
        times = f" ({self.ratio:.6g} times it everywhere)" if self.ratio is not None else ""
        lines.append(f"    is {self.ours:.12g}, the plain program's is {self.plain:.12g}{times}")
        return "\n".join([*lines, f"    placed by {self.rule}"] if self.rule else lines)


class ParityError(AssertionError):
    """A sharded program computes something else than the plain one; `differences` holds where, the worst first."""

    def __init__(self, mesh: Mesh, differences: tuple[Difference, ...], mode: str = "") -> None:
        self.mesh, self.differences = mesh, differences
        shown = "\n".join(f"  {difference}" for difference in differences[:SHOWN])
        more = f"\n  and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        if all(difference.size <= FLOAT32 * abs(difference.plain) for difference in differences):
            more += "\n  all of them as small as a rounding to float32: where the model casts within, tolerance=1e-5"
        super().__init__(f"no parity on {mesh!r}{mode}: {len(differences)} of what is compared differ\n{shown}{more}")


def assert_parity(
    model: Model,
    rules: Rules,
    mesh: Mesh,
    batch: Mapping[str, Any],
    loss_fn: LossFn | None = None,
    *,
    policy: Policy | None = None,
    seed: int = 0,
    tolerance: float = 1e-9,
    timeout: float = 300.0,
) -> None:
    """Run a table's program on every rank of a mesh, and compare it with the plain program in float64.

    The ranks are threads of this process: no launcher, and no process group is left behind. What runs is the runtime
    itself: `ss.shard`, `value_and_grad`, and a clipped step of SGD. On every rank the loss, its weight, the norm of
    the gradients, and the rank's part of every gradient, of every parameter after the step and of every persistent
    buffer are compared with the plain program's.

    A model that draws random numbers (dropout) draws by global index on a mesh, and otherwise in the plain program:
    it is compared with its own run on the mesh of one rank, and that one in eval mode with the plain program.

    Args:
        model: left as it was; its copy is in float64, each parameter moved at random by a tenth of its own size.
        batch: the global batch of real tensors; floating ones are read in float64.
        loss_fn: `loss_fn(output, batch) -> (sum, weight)`. Without it: the sum of every floating output of forward
            times weights in [0.5, 1.5) that depend on the element's place alone.
        policy: `accumulate`, `remat`, `reshard_after_forward`, and under pp `schedule`, `microbatches`, `stages`;
            dtypes and `compile` are set aside.
        seed: of what a constructor, the moved parameters and dropout draw.
        tolerance: of a difference, relative to the largest element of the same tensor (at least a thousandth of the
            largest of all gradients). A model that casts to float32 within may need more, about 1e-5.
        timeout: seconds for all ranks together.

    Raises:
        ParityError: an AssertionError that names each tensor that differs, where, by how much, and its rule.
        ShardingError: for all that `ss.compile` refuses; SS403 in a process that has a process group or a launcher,
            SS406 for a model on meta.
        ValueError: where parity would say nothing (a loss that is not finite, gradients that are all zero), or no
            loss can be made of the outputs.
    """
    check_arguments(rules, mesh, batch)
    check_alone()
    check_batch(batch)
    check_values(batch)
    policy = evolve(policy or Policy(), param_dtype=None, reduce_dtype=None, compile=False)
    count = microbatch_count(policy, mesh)
    policy = evolve(policy, accumulate=1, microbatches=count) if mesh["pp"] > 1 else policy
    with in_float64(seed):
        own = own_model(model, seed, copy.deepcopy)
        batch = {name: wide(item) if isinstance(item, Tensor) else item for name, item in batch.items()}
        if loss_fn is None:
            if count > 1:
                raise ValueError(
                    f"{count} microbatches need a loss_fn: the weights of the outputs are those of a whole batch"
                )
            plan = Compiler(survey(own), rules, policy).plan(mesh, batch)
            with torch.no_grad():
                outputs = tensor_leaves(copy.deepcopy(own)(**_arguments(own, batch)))
            rules, entries, loss_fn = weighted(rules, mesh, plan, outputs, seed)
            batch |= entries
        plan = Compiler(survey(own), rules, policy).plan(mesh, batch, loss_fn)
        subject = Subject(own, rules, batch, loss_fn, policy, seed)
        expected = subject.reference(plan, tolerance)
        norm = float(torch.stack([grad.norm() for grad in expected.grads.values()]).norm())
        clip = norm / 2
        if mesh.world == 1:
            found = [subject.measure(mesh, clip)]
        else:
            found = run_ranks(mesh.world, lambda _: subject.measure(mesh, clip), timeout=timeout)
        check(Comparison(mesh, plan, rules, subject.parameters(), expected, norm, clip, tolerance), found)


def check_alone() -> None:
    """SS403 in a process that belongs to a world of processes."""
    launched = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if dist.is_initialized() or launched:
        refuse(
            "SS403",
            "assert_parity makes ranks of its own, and this process is one of a world's",
            why="it has a default process group" if dist.is_initialized() else "RANK and WORLD_SIZE are set",
            advice=("call it in a process that was started alone, before or after init_process_group's group lives",),
        )


def check_values(batch: Mapping[str, Any]) -> None:
    """SS401 for an entry that has a shape and no values."""
    for name, item in batch.items():
        if isinstance(item, Tensor) and item.device.type == "meta":
            refuse("SS401", f"the batch's {name} is on meta", why="parity is of values: give real tensors")


def _arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    names = forward_arguments(model)
    return {name: item for name, item in batch.items() if name in names}


@frozen(eq=False, kw_only=True)
class Found:
    """What one rank computed: numbers, and its parts of tensors by name."""

    loss: float
    weight: float
    norm: float
    step_loss: float
    grads: dict[str, Tensor]
    params: dict[str, Tensor]
    """After a step."""
    buffers: dict[str, Tensor]
    """After a step."""


@frozen(eq=False)
class Subject:
    """What is run: a model of our own in float64, a table, a batch and a loss."""

    model: nn.Module
    rules: Rules
    batch: Mapping[str, Any]
    loss_fn: LossFn
    policy: Policy
    seed: int

    def parameters(self) -> dict[str, Tensor]:
        """First name -> value before a step."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def measure(self, mesh: Mesh, clip: float | None) -> Found:
        """Run the runtime on this rank."""
        sharded = shard(apart(self.model), self.rules, mesh, self.batch if mesh["pp"] > 1 else None, policy=self.policy)
        state = sharded.init(sgd(lr=LR), seed=self.seed)
        batch = sharded.local_batch(self.batch)
        (loss, metrics), grads = sharded.value_and_grad(self.loss_fn)(state.params, batch, state.rng)
        kept = {name: _cpu(grad) for name, grad in grads.items()}
        new, stepped = train_step(sharded, self.loss_fn, clip=clip)(state, batch)
        return Found(
            loss=float(loss),
            weight=float(metrics["weight"]),
            norm=float(stepped["grad_norm"]),
            step_loss=float(stepped["loss"]),
            grads=kept,
            params={name: _cpu(value) for name, value in new.params.items()},
            buffers={name: _cpu(value) for name, value in new.buffers.items()},
        )

    def reference(self, plan: Plan, tolerance: float) -> Expected:
        """What the plain program computes; where it draws random numbers, what the mesh of one rank does."""
        if not any(call.layout is not None for call in plan.substitutions):
            return run_plain(
                copy.deepcopy(self.model), self.batch, plan, self.loss_fn, microbatch_count(self.policy, Mesh())
            )
        alone = Mesh()
        quiet = evolve(self, model=copy.deepcopy(self.model).eval())
        plan = Compiler(survey(quiet.model), self.rules, self.policy).plan(alone, self.batch, self.loss_fn)
        expected = run_plain(
            copy.deepcopy(quiet.model), self.batch, plan, self.loss_fn, microbatch_count(self.policy, Mesh())
        )
        norm = float(torch.stack([grad.norm() for grad in expected.grads.values()]).norm())
        comparison = Comparison(alone, plan, self.rules, self.parameters(), expected, norm, norm / 2, tolerance)
        check(comparison, [quiet.measure(alone, norm / 2)], " in eval mode")
        found = self.measure(alone, None)
        check_tells(found.loss, found.grads)
        return Expected(loss=found.loss, weight=found.weight, grads=found.grads, buffers=found.buffers)


def apart(model: nn.Module) -> nn.Module:
    """The model with the same tensors and all else its own: what a forward keeps in its module stays a rank's."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _cpu(tensor: Tensor) -> Tensor:
    return local_of(tensor).detach().to("cpu", copy=True)


@frozen(eq=False)
class Comparison:
    """What every rank is compared with."""

    mesh: Mesh
    plan: Plan
    rules: Rules
    before: Mapping[str, Tensor]
    expected: Expected
    norm: float
    clip: float
    tolerance: float

    def differences(self, rank: int, found: Found) -> Iterator[Difference]:
        """Everything in which one rank differs."""
        for what, ours, plain in (
            ("loss", found.loss, self.expected.loss),
            ("weight of the loss", found.weight, self.expected.weight),
            ("loss of the step", found.step_loss, self.expected.loss),
            ("norm of the gradients", found.norm, self.norm),
        ):
            yield from self._numbers(rank, what, ours, plain)
        factor = LR * min(1.0, self.clip / (self.norm + 1e-6))
        largest = max(float(grad.abs().max()) for grad in self.expected.grads.values() if grad.numel())
        wrong: set[str] = set()
        held = self.held_on(rank)
        for name, plain in self.expected.grads.items():
            if name not in held:
                continue
            for difference in self._parts(rank, "gradient of ", name, found.grads[name], plain, 1e-3 * largest):
                wrong.add(name)
                yield difference
        for name, value in self.before.items():
            grad = self.expected.grads.get(name)
            plain = value if grad is None else value - factor * grad
            if name not in wrong and name in held:
                yield from self._parts(rank, "updated ", name, found.params[name], plain, 1e-3)
        for name, plain in self.expected.buffers.items():
            if name in held:
                yield from self._parts(rank, "buffer ", name, found.buffers[name], plain, 1e-3)

    def held_on(self, rank: int) -> set[str]:
        """The first names of the parameters and buffers that lie on a rank: all, or those of its stages."""
        pipeline = self.plan.pipeline
        if pipeline is None:
            return {plan.first for plan in self.plan.params.values()}
        return {name for stage in pipeline.on(self.mesh.coordinate(rank)["pp"]) for name in stage.params}

    def _numbers(self, rank: int, what: str, ours: float, plain: float) -> Iterator[Difference]:
        allowed = self.tolerance * max(1.0, abs(plain))
        if not abs(ours - plain) <= allowed:
            size = abs(ours - plain)
            yield Difference(what=what, size=size, relative=size / allowed, rank=rank, ours=ours, plain=plain)

    def _parts(
        self, rank: int, what: str, name: str, ours: Tensor, whole: Tensor, least: float
    ) -> Iterator[Difference]:
        plan, place = self.plan.params[name], self.mesh.coordinate(rank)
        index = (
            tuple(digits_index(digits, place, self.mesh) for digits in plan.layout.dims)
            if plan.buffer
            else local_index(plan, place, self.mesh)
        )
        plain = take(whole, index)
        assert ours.shape == plain.shape, f"rank {rank} holds {list(ours.shape)} of {name}, its part {plain.shape}"
        if not plain.numel():
            return
        gap = (ours - plain).abs().nan_to_num(nan=float("inf")).reshape(plain.shape).to(torch.float64)
        allowed = self.tolerance * max(least, float(whole.abs().max()))
        worst = int(gap.argmax())
        if float(gap.max()) <= allowed:
            return
        at = torch.unravel_index(torch.tensor(worst), gap.shape) if gap.ndim else ()
        yield Difference(
            what=what + name,
            size=float(gap.max()),
            relative=float(gap.max()) / allowed if allowed else float("inf"),
            rank=rank,
            index=tuple(int(rows[int(i)]) for rows, i in zip(index, at, strict=True)),
            ours=float(ours.reshape(-1)[worst].real),
            plain=float(plain.reshape(-1)[worst].real),
            ratio=_ratio(ours, plain),
            rule=self._rule(plan.rule),
        )

    def _rule(self, pattern: str) -> str:
        return next((str(rule.location) for rule in self.rules.params if rule.pattern == pattern), pattern)


def _ratio(ours: Tensor, plain: Tensor) -> float | None:
    """The one number that `ours` is times `plain`, if there is one."""
    top = int(plain.abs().argmax())
    whole = plain.reshape(-1)[top]
    if plain.is_complex() or not float(whole) or not bool(ours.isfinite().all()):
        return None
    ratio = float(ours.reshape(-1)[top] / whole)
    alike = torch.allclose(ours, ratio * plain, rtol=1e-6, atol=1e-9 * float(whole.abs()))
    return ratio if alike and abs(ratio) > 1e-6 else None


def check(comparison: Comparison, found: list[Found], mode: str = "") -> None:
    """Raise where any rank differs; of each tensor the worst is told, scalars first.

    Raises:
        ParityError: with all of it.
    """
    worst: dict[str, Difference] = {}
    for rank, one in enumerate(found):
        for difference in comparison.differences(rank, one):
            if difference.what not in worst or difference.relative > worst[difference.what].relative:
                worst[difference.what] = difference
    if worst:
        order = sorted(worst.values(), key=lambda one: (bool(one.rule), -one.relative))
        raise ParityError(comparison.mesh, tuple(order), mode)
