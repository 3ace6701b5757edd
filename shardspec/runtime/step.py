"""Pure steps: forward, backward, one reduction of what is owed, one of the scalars, one update."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, evolve
from torch import Tensor

from shardspec.diagnostics import calling_line, refuse
from shardspec.lower import reduced_by_hand
from shardspec.mesh import degree
from shardspec.plan import LossPlan, ParamPlan, Plan
from shardspec.runtime.attach import Local
from shardspec.runtime.buffers import BufferUpdate, changed_buffers
from shardspec.runtime.failure import explain
from shardspec.runtime.parts import PartsOnly, are_split
from shardspec.runtime.pipeline import Flight, StagedModel
from shardspec.runtime.rank_major import state_view
from shardspec.runtime.routing import routed_here, routing_metrics
from shardspec.runtime.sharded import Batch, LossFn, Sharded
from shardspec.runtime.state import Finite, Metric, OptState, Store, TrainState, copy_tree, next_rng
from shardspec.torch_private import foreach_copy_, foreach_norm

Metrics = dict[str, Tensor]


@define(eq=False)
class Sums:
    """What a rank has after its microbatches: loss and weight, summed over them but not over ranks."""

    loss: Any = None
    weight: Any = None
    routed: Tensor | None = None
    """[modules, experts + 1]: what was asked of each expert, and dropped; of all ranks once they are summed."""

    def add(self, loss: Any, weight: Any) -> None:
        """Add a microbatch's."""
        loss, weight = (item.detach() if isinstance(item, Tensor) else item for item in (loss, weight))
        self.loss = loss if self.loss is None else self.loss + loss
        self.weight = weight if self.weight is None else self.weight + weight


def run(sharded: Sharded, plan: Plan, batch: Batch, loss_fn: LossFn, *, rng: int = 0, backward: bool) -> Sums:
    """Forward, loss and backward of every microbatch; gradients are left with the parameters, as plain sums."""
    assert plan.loss is not None, "a step's plan knows its loss"
    sharded.activate(plan)
    sums = Sums()
    sharded.wiring.rng = rng
    parts = sharded.microbatches(plan, batch)
    arguments = [
        {
            name: cast(item, sharded.policy.param_dtype)
            for name, item in part.items()
            if name in sharded.compiler.names.arguments
        }
        for part in parts
    ]

    def begin(index: int) -> None:
        sharded.wiring.microbatch = index

    def finish(output: Any, index: int) -> Tensor:
        with Local(sharded.wiring, "loss"):
            loss, weight = loss_fn(output, parts[index])
        if backward and not (isinstance(loss, Tensor) and loss.requires_grad):
            refuse(
                "SS310",
                "the loss's sum has no gradient",
                why="a step differentiates it, and it depends on no parameter",
                advice=("do not detach the sum, nor make a Python number of it",),
            )
        sums.add(loss, weight)
        return loss

    if isinstance(sharded.local, StagedModel) and plan.pipeline is not None:
        policy = sharded.policy
        # A half that computes again would do so once for inputs and once for weights; compiled code has no halves.
        Flight(
            sharded.local,
            plan.pipeline,
            sharded.fabric,
            arguments,
            begin,
            finish,
            backward,
            whole_backward=bool(policy.remat or policy.compile),
            dtype=policy.param_dtype,
        ).run()
        sums.routed = routed_here(sharded.wiring, plan.experts, sharded.fabric)
        return sums
    for index, named in enumerate(arguments):
        begin(index)
        loss = finish(sharded.module(**named), index)
        if backward:
            loss.backward()
    sums.routed = routed_here(sharded.wiring, plan.experts, sharded.fabric)
    return sums


def cast(item: Any, dtype: torch.dtype | None) -> Any:
    """A floating-point argument of forward in the parameters' compute dtype; anything else as it is."""
    floating = dtype is not None and isinstance(item, Tensor) and item.is_floating_point()
    return item.to(dtype) if floating else item


def reduce_owed(sharded: Sharded, plan: Plan, grads: Mapping[str, Tensor]) -> None:
    """One coalesced all-reduce for each set of axes (and dtype) that gradients are owed over, in place."""
    groups: dict[tuple[tuple[str, ...], torch.dtype], list[Tensor]] = {}
    for name, grad in grads.items():
        axes = reduced_by_hand(plan.params[name])
        if axes and grad.numel():
            groups.setdefault((axes, grad.dtype), []).append(grad)
    for (axes, _), owing in sorted(groups.items(), key=lambda item: item[0][0]):
        coalesced_all_reduce(owing, sharded.fabric.group(axes), sharded.fabric.device)


def sum_over_homes(sharded: Sharded, grads: Mapping[str, Tensor]) -> None:
    """Sum the gradients of parameters that lie on several stages, in place: each home then holds the same."""
    if sharded.pipeline is None:
        return
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
    for name, grad in grads.items():
        homes = sharded.pipeline.homes(name)
        if len(homes) > 1 and grad.numel():
            groups.setdefault((homes, grad.dtype), []).append(grad)
    for (homes, _), shared in sorted(groups.items(), key=lambda item: item[0][0]):
        coalesced_all_reduce(shared, sharded.fabric.homes[homes], sharded.fabric.device)


def coalesced_all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    """Sum several tensors over a group in one message, in place; those that lie elsewhere by way of the device."""
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device == device:
        dist.all_reduce(tensors[0], group=group)
        return
    flat = torch.cat([tensor.reshape(-1).to(device) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def sharing_degree(sharded: Sharded, plan: ParamPlan) -> int:
    """On how many ranks each element of a parameter lies."""
    axes = {*plan.layout.sharded, *plan.storage}
    homes = 1 if sharded.pipeline is None else len(sharded.pipeline.homes(plan.first))
    return homes * (stage_world(sharded) // prod(sharded.mesh[axis] for axis in axes))


def stage_world(sharded: Sharded) -> int:
    """How many ranks run one stage."""
    return sharded.mesh.world // sharded.mesh["pp"]


def squared_norm(sharded: Sharded, params: Mapping[str, ParamPlan], grads: Mapping[str, Tensor]) -> Tensor:
    """This rank's share of the squared norm of all gradients: the shares of all ranks sum to it. Float64, 0-dim."""
    groups: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
    for name, grad in grads.items():
        if grad.numel():
            groups.setdefault((sharing_degree(sharded, params[name]), grad.dtype, grad.device), []).append(grad)
    shares = [
        torch.stack(foreach_norm(parts)).to(sharded.fabric.device, torch.float64).square().sum() / copies
        for (copies, _, _), parts in groups.items()
    ]
    return sum(shares[1:], shares[0]) if shares else sharded.fabric.zero()


def reduce_scalars(
    sharded: Sharded, loss: LossPlan, sums: Sums, square: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's sum, its weight and the squared norm over all ranks, in one all-reduce; with them goes what `sums`
    tells of experts."""
    device = sharded.fabric.device
    total, weight = _scalar(sums.loss, device), _scalar(sums.weight, device)
    square = sharded.fabric.zero() if square is None else square
    if sharded.mesh.world == 1:
        return total, weight, square
    shares = [total / _copies(sharded, loss.sum_axes), weight / _copies(sharded, loss.weight_axes), square]
    packed = torch.stack(shares)
    if sums.routed is not None:
        packed = torch.cat((packed, sums.routed.flatten()))
    dist.all_reduce(packed, group=sharded.fabric.group(sharded.mesh.axes))
    if sums.routed is not None:
        sums.routed = packed[3:].view_as(sums.routed)
    total, weight, square = packed[:3].unbind()
    return total, weight, square


def _scalar(value: Any, device: torch.device) -> Tensor:
    """A number of this rank's; 0 where it has none, on the stages that run no loss."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return torch.tensor(float(value or 0.0), dtype=torch.float64, device=device)


def _copies(sharded: Sharded, pending: tuple[str, ...]) -> int:
    return stage_world(sharded) // degree(sharded.mesh, pending)


def clip_factor(norm: Tensor, clip: float | None) -> Tensor:
    """What gradients are multiplied with: torch.nn.utils.clip_grad_norm_'s, 1e-6 included."""
    return torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)


def train_step(
    sharded: Sharded,
    loss_fn: LossFn,
    *,
    clip: float | None = None,
    donate: bool = True,
    buffers: BufferUpdate | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The ready-made pure step: `step(state, batch) -> (state, metrics)`.

    `loss_fn(output, batch) -> (sum, weight)`, scalars over this rank's part; the loss is the quotient of their
    sums over ranks and microbatches. `batch` is this rank's part. Metrics are 0-dim tensors, equal on every rank:
    loss, weight, grad_norm (before clipping), lr; and of experts what `routing_metrics` tells.

    Args:
        clip: the largest norm of all gradients together.
        donate: consume the state that the step is given; with False its tensors are copied.
        buffers: `update(buffers) -> changed`, a pure function that runs once at the end of a step: persistent buffers
            by name, as forward left them, and those that change. It is given what every rank holds whole; under pp
            those of the rank's own stages.

    Raises:
        ShardingError: where the loss or the batch does not fit, before anything runs.
        NonFiniteError: where the step that made the state met a loss or gradient that is not finite.
    """
    check_sharded(sharded, "ss.train_step")
    check_clip(clip)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        sharded.check_state(state)
        state.check_finite()
        held = with_optimizer(state)
        plan = sharded.program(batch, loss_fn)
        assert plan.loss is not None, "a step's plan knows its loss"
        with lent(sharded, plan, held.params.locals, held.buffers.locals):
            sums = run(sharded, plan, batch, loss_fn, rng=state.rng, backward=True)
            grads = sharded.local.gradients()
            reduce_owed(sharded, plan, grads)
            sum_over_homes(sharded, grads)
            square = squared_norm(sharded, plan.params, grads)
            total, weight, squared = reduce_scalars(sharded, plan.loss, sums, square)
            left = changed_buffers(sharded, sharded.local.take_buffers(), buffers)
        weight = divisor(weight, plan.loss)
        loss, norm = total / weight, squared.sqrt() / weight
        scale = weight / clip_factor(norm, clip)
        finite = Finite(state.step + 1, (~torch.isfinite(loss + norm)).to(torch.float32))
        new = updated(state, grads, left, scale, finite, donate=donate, by="train_step")
        sharded.local.clear_gradients()
        told = routing_metrics(sums.routed, plan.experts)
        return new, metrics_of(new, finite, loss=loss, weight=weight, grad_norm=norm, **told)

    return step


def check_sharded(sharded: Any, what: str) -> None:
    """SS407 for what `ss.shard` did not make."""
    if not isinstance(sharded, Sharded):
        refuse("SS407", f"{what} takes what ss.shard returns, and was given a {type(sharded).__name__}")


def check_clip(clip: float | None) -> None:
    """SS405 for a norm that is none."""
    if clip is not None and not clip > 0:
        refuse(
            "SS405",
            f"clip={clip}",
            why="gradients are scaled so that their norm is at most this, which must be above 0",
            locations=(calling_line(),),
            advice=("give clip=None not to clip",),
        )


@contextmanager
def lent(sharded: Sharded, plan: Plan, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Generator[None]:
    """Have the model compute with these, without gradients so far; where that fails leave nothing behind, and say
    where it did."""
    sharded.notices.begin()
    sharded.local.bind(params)
    sharded.local.lend_buffers(buffers)
    sharded.local.clear_gradients()
    try:
        yield
    except BaseException as error:
        sharded.local.reset()
        rules = {rule.pattern: rule.location for rule in sharded.compiler.rules.rules}
        explain(error, sharded.module, plan, rules, sharded.notices)


def with_optimizer(state: TrainState) -> Any:
    """What a state holds; SS407 where it has no optimizer."""
    held = state.live()
    if held.opt is None:
        refuse("SS407", "the state has no optimizer", advice=("give sharded.init or sharded.load one",))
    return held


def divisor(weight: Tensor, loss: LossPlan) -> Tensor:
    """What the loss is divided by: 1 where nothing counts, for all labels may be masked."""
    return weight if loss.number else weight + (weight == 0)


def metrics_of(state: TrainState, finite: Finite, **values: Tensor) -> Metrics:
    """Metrics that raise when they are read after a step that was not finite."""
    opt = state.opt_state
    lr = opt.optimizer.lr if opt is not None else None
    if lr is not None:
        values["lr"] = torch.tensor(lr(state.step), dtype=torch.float64)
    return {name: Metric.wrap(value, finite) for name, value in values.items()}


def updated(
    state: TrainState,
    grads: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    scale: Tensor,
    finite: Finite,
    *,
    donate: bool,
    by: str,
) -> TrainState:
    """The state after an update with local gradients that are to be divided by `scale`; the same where not finite."""
    held = state.live()
    assert held.opt is not None, "an update needs an optimizer"
    optimizer, raw, found_inf = held.opt.optimizer, held.opt.raw, finite.found_inf
    params, old_buffers = held.params.locals, held.buffers.locals
    if optimizer.apply_ is not None:
        if donate:
            state.donate(by)
        else:
            params, raw = state.home.copy_locals(params), copy_tree(raw)
        trained = {name: params[name] for name in grads}
        exact = next(iter(trained.values())).dtype == torch.float64 if trained else False
        with torch.no_grad():
            optimizer.apply_(
                trained, dict(grads), raw, state.step + 1,
                scale=scale if exact else scale.to(torch.float32), found_inf=found_inf,
            )  # fmt: skip
    else:
        trained = {name: params[name] for name in grads}
        divided = {name: grad / scale.to(grad) for name, grad in grads.items()}
        # A stage's parameters are a part of all, of which a norm over a list would be taken.
        parts = state.home.pipeline is not None
        parts = parts or are_split((trained[name], torch.Size(state.home.params[name].shape)) for name in trained)
        with PartsOnly() if parts else nullcontext():
            fresh, fresh_raw = optimizer.update(divided, raw, trained, state.step + 1)
        params = {**params, **{name: _select(found_inf, params[name], fresh[name]) for name in fresh}}
        raw = _select(found_inf, raw, fresh_raw)
        if donate:
            state.donate(by)
    kept = {
        name: new if new is old_buffers[name] else torch.where(found_inf > 0, old_buffers[name], new)
        for name, new in buffers.items()
    }
    return TrainState(
        step=state.step + 1,
        rng=next_rng(state.rng),
        home=state.home,
        params=Store(params, held.params.specs),
        buffers=Store(kept, held.buffers.specs),
        opt=evolve_opt(held.opt, raw),
        finite=finite,
    )


def evolve_opt(opt: OptState, raw: Any) -> OptState:
    """The optimizer's state with other tensors."""
    return evolve(opt, raw=raw, stores=[])


def _select(found_inf: Tensor, old: Any, new: Any) -> Any:
    """The old tensors where a step is skipped, the new ones elsewhere."""
    if isinstance(new, Tensor):
        return torch.where(found_inf.to(new.device) > 0, old, new)
    if isinstance(new, dict):
        return {key: _select(found_inf, old[key], value) for key, value in new.items()}
    if isinstance(new, (list, tuple)):
        items = [_select(found_inf, one, two) for one, two in zip(old, new, strict=True)]
        return type(new)(*items) if hasattr(new, "_fields") else type(new)(items)
    return new


def value_and_grad(sharded: Sharded, loss_fn: LossFn) -> Callable[..., Any]:
    """The pieces for a pure step of one's own; see `Sharded.value_and_grad`."""

    def grad_fn(params: Mapping[str, Tensor], batch: Batch, rng: int = 0) -> Any:
        plan = sharded.program(batch, loss_fn)
        assert plan.loss is not None, "a step's plan knows its loss"
        with lent(sharded, plan, sharded.locals_of(params), sharded.local.held_buffers()):
            sums = run(sharded, plan, batch, loss_fn, rng=rng, backward=True)
            grads = sharded.local.gradients()
            reduce_owed(sharded, plan, grads)
            sum_over_homes(sharded, grads)
            total, weight, _ = reduce_scalars(sharded, plan.loss, sums, None)
        weight = divisor(weight, plan.loss)
        sharded.local.clear_gradients()
        scaled = {name: state_view(grad / weight.to(grad), sharded.specs[name]) for name, grad in grads.items()}
        loss = total / weight
        told = routing_metrics(sums.routed, plan.experts)
        return (loss, {"loss": loss, "weight": weight, **told}), scaled

    return grad_fn


def update(
    state: TrainState, grads: Mapping[str, Tensor], *, clip: float | None = None, donate: bool = True
) -> TrainState:
    """Update a state with global, normalised gradients, as `value_and_grad` gives them; consumes the state.

    Parameters without a gradient stay as they are.

    Raises:
        DonatedError: for a state that was consumed already.
        ShardingError: SS407 for gradients of parameters that the state does not train, or of another layout.
        NonFiniteError: where the update that made the state met a gradient that is not finite.
    """
    check_clip(clip)
    if not isinstance(state, TrainState):
        refuse("SS407", f"ss.update takes (state, grads), and was given a {type(state).__name__} for a state")
    home: Sharded = state.home
    home.check_state(state)
    state.check_finite()
    held = with_optimizer(state)
    local: dict[str, Tensor] = {}
    for name, grad in grads.items():
        if name not in held.params.locals or not home.params[name].trained:
            refuse("SS407", f"a gradient is given for {name}, which is no parameter that this state trains")
        local[name] = home.local_like(name, grad, "gradient of").clone()
    square = squared_norm(home, home.params, local)
    if home.mesh.world > 1:
        dist.all_reduce(square, group=home.fabric.group(home.mesh.axes))
    finite = Finite(state.step + 1, (~torch.isfinite(square)).to(torch.float32))
    scale = 1.0 / clip_factor(square.sqrt(), clip)
    return updated(state, local, held.buffers.locals, scale, finite, donate=donate, by="update")


def eval_step(sharded: Sharded, loss_fn: LossFn) -> Callable[[TrainState, Batch], Metrics]:
    """`evaluate(state, batch) -> {"loss", "weight"}`: the loss in eval mode, without gradients; donates nothing."""

    check_sharded(sharded, "ss.eval_step")

    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        sharded.check_state(state)
        plan = sharded.program(batch, loss_fn, training=False)
        assert plan.loss is not None, "a step's plan knows its loss"
        held = state.live()
        modes = {module: module.training for module in sharded.module.modules()}
        sharded.module.eval()
        try:
            with lent(sharded, plan, held.params.locals, held.buffers.locals), torch.no_grad():
                sums = run(sharded, plan, batch, loss_fn, backward=False)
        finally:
            for module, mode in modes.items():
                module.training = mode
            sharded.local.reset()
        total, weight, _ = reduce_scalars(sharded, plan.loss, sums, None)
        weight = divisor(weight, plan.loss)
        return {"loss": total / weight, "weight": weight}

    return evaluate
