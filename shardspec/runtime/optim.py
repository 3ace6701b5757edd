"""Optimizers as pairs of pure functions over local shards, run by torch's own fused kernels."""

import functools
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from shardspec import torch_private

Tensors = dict[str, Tensor]
OptState = dict[str, Any]
LearningRate = float | Callable[[int], float]
Options = dict[str, Any]
Groups = Mapping[str, Mapping[str, Any]]


@attrs.frozen
class Optimizer:
    """A pair of pure functions, and what the runtime can use beside them where it is given.

    `init(params) -> opt_state` gives a state to each parameter in the dict (pass trainable ones only).
    `update(grads, opt_state, params, step) -> (params, opt_state)` leaves its arguments as they were;
    parameters without a gradient are returned as they are. Steps count from 1.
    `apply_(params, grads, opt_state, step, *, scale=None, found_inf=None)` is the same in place:
    gradients are divided by the 0-dim `scale` (and may be overwritten), and nothing changes, step count
    included, where the 0-dim float32 `found_inf` is 1. No host sync.
    `check(names)` refuses groups that do not fit the names of *all* the model's trainable parameters
    (`init` sees one pipeline stage's). `lr(step)` is the rate to report.
    `name` and `options` say how it was made, for a checkpoint's manifest; `rebuild` reads them.
    """

    init: Callable[[Tensors], OptState]
    update: Callable[[Tensors, OptState, Tensors, int], tuple[Tensors, OptState]]
    apply_: Callable[..., None] | None = None
    check: Callable[[Iterable[str]], None] | None = None
    lr: Callable[[int], float] | None = None
    name: str = ""
    options: Mapping[str, Any] | None = attrs.field(default=None, repr=False)


def adamw(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    groups: Groups | None = None,
) -> Optimizer:
    """AdamW (arXiv:1711.05101) as `torch.optim.AdamW(fused=True)` computes it.

    `lr` is a number or a function of the step. `groups` maps a regex, which must match a parameter's
    whole name, to the options that replace the ones given here.

    Raises:
        ValueError: for an option that does not exist, or a value that is out of range.
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _build("adamw", options, groups, lambda _: ("exp_avg", "exp_avg_sq"), _run_adamw)


def sgd(
    lr: LearningRate,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    groups: Groups | None = None,
) -> Optimizer:
    """SGD as `torch.optim.SGD(fused=True)` computes it; `lr` and `groups` as for `adamw`."""
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    return _build("sgd", options, groups, lambda o: ("momentum_buffer",) if o["momentum"] else (), _run_sgd)


def rebuild(name: str, options: Mapping[str, Any]) -> Optimizer:
    """The optimizer of a name and options that JSON has held.

    Raises:
        ValueError: for those that this version does not have.
    """
    builders: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "sgd": sgd}
    try:
        return builders[name](**options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"there is no optimizer {name}({', '.join(options)})") from error


def _run_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    slots: list[list[Tensor]],
    steps: list[Tensor],
    lr: float,
    options: Options,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = options["betas"]
    exp_avgs, exp_avg_sqs = slots
    # torch.optim.adamw.adamw() on top of this kernel adds 1 to each of `steps`: three times as slow, and
    # wrong for one tensor shared by all.
    torch_private.fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=scale,
        found_inf=found_inf,
    )


def _run_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    slots: list[list[Tensor]],
    _steps: list[Tensor],
    lr: float,
    options: Options,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    # A zero buffer at the first step is the same as torch's "first step copies the gradient", and stays
    # right when the first step was skipped.
    torch_private.fused_sgd_(
        params,
        grads,
        *(slots or [[]]),
        lr=lr,
        momentum=options["momentum"],
        weight_decay=options["weight_decay"],
        nesterov=options["nesterov"],
        dampening=0.0,
        maximize=False,
        is_first_step=False,
        grad_scale=scale,
        found_inf=found_inf,
    )


def _build(
    kind: str,
    defaults: Options,
    groups: Groups | None,
    slots_of: Callable[[Options], tuple[str, ...]],
    kernel: Callable[..., None],
) -> Optimizer:
    """Assemble an Optimizer; `slots_of(options)` names the state tensors that a parameter needs."""
    merged = _merge(defaults, groups or {})
    options_of: dict[str | None, Options] = {None: defaults, **merged}

    @functools.lru_cache(maxsize=8)
    def assign(names: tuple[str, ...]) -> list[tuple[Options, list[str]]]:
        """Split names by the options that they get."""
        members: dict[str | None, list[str]] = {}
        for name in names:
            members.setdefault(_group_of(name, merged), []).append(name)
        return [(options_of[pattern], found) for pattern, found in members.items()]

    def check(names: Iterable[str]) -> None:
        found = {_group_of(name, merged) for name in names}
        for pattern in merged:
            if pattern not in found:
                raise ValueError(f"optimizer group {pattern!r} matches no trainable parameter")

    def init(params: Tensors) -> OptState:
        device = next((p.device for p in params.values()), None)
        state: OptState = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        state |= {slot: {} for options in options_of.values() for slot in slots_of(options)}
        for options, names in assign(tuple(params)):
            for slot in slots_of(options):
                state[slot] |= {name: _zeros(params[name]) for name in names}
        return state

    @torch.no_grad()
    def apply_(
        params: Tensors,
        grads: Tensors,
        opt_state: OptState,
        step: int,
        *,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        count = opt_state["step"].add_(1)
        for options, names in assign(tuple(grads)):
            slots = [opt_state[slot] for slot in slots_of(options)]
            for (device, dtype), bucket in _buckets(names, params).items():
                state = [[tensors[name] for name in bucket] for tensors in (params, *slots)]
                dense, *dense_slots = [[t.contiguous() for t in tensors] for tensors in state]
                dense_grads, kernel_scale = _prepare([grads[name] for name in bucket], dtype, scale)
                flag = None if found_inf is None else found_inf.to(device, non_blocking=True)
                steps = [count.to(device, non_blocking=True)] * len(bucket)
                kernel(dense, dense_grads, dense_slots, steps, _rate(options, step), options, kernel_scale, flag)
                _copy_back(state, [dense, *dense_slots])
        if found_inf is not None:
            count.sub_(found_inf.to(count.device, non_blocking=True))

    def update(grads: Tensors, opt_state: OptState, params: Tensors, step: int) -> tuple[Tensors, OptState]:
        new_params = params | {name: params[name].detach().clone() for name in grads}
        new_state = {key: _clone(value) for key, value in opt_state.items()}
        apply_(new_params, grads, new_state, step)
        return new_params, new_state

    options = {**defaults, "groups": None if groups is None else {key: dict(value) for key, value in groups.items()}}
    return Optimizer(init, update, apply_, check, functools.partial(_rate, defaults), kind, options)


def _merge(defaults: Options, groups: Groups) -> dict[str, Options]:
    """Complete each group's options from the defaults, and refuse options that do not exist."""
    for pattern, options in groups.items():
        for key in options.keys() - defaults.keys():
            raise ValueError(f"optimizer group {pattern!r}: no option {key!r}; there are {', '.join(defaults)}")
    merged = {pattern: {**defaults, **options} for pattern, options in groups.items()}
    for options in (defaults, *merged.values()):
        _check_options(options)
        if options.get("nesterov") and not options["momentum"]:
            raise ValueError("nesterov needs a momentum above 0")
    return merged


def _check_options(options: Options) -> None:
    """ValueError for a number that would spoil the parameters without a word, with torch's own bounds."""
    for key in options.keys() & {"lr", "eps", "weight_decay", "momentum"}:
        value = options[key]
        if not (key == "lr" and callable(value)) and not _within(value, math.inf):
            function = ", or a function of the step" if key == "lr" else ""
            raise ValueError(f"{key}={value!r}: a finite number of at least 0{function}")
    betas = options.get("betas", (0.0, 0.0))
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(_within(beta, 1.0) for beta in betas):
        raise ValueError(f"betas={betas!r}: two numbers of at least 0 and below 1")


def _within(value: Any, end: float) -> bool:
    """Whether a value is a number from 0 up to `end`, which is not in it."""
    return isinstance(value, (numbers.Real, Tensor)) and 0 <= float(value) < end


def _group_of(name: str, groups: Mapping[str, Any]) -> str | None:
    """Return the one pattern that matches name, None where none does."""
    matches = [pattern for pattern in groups if re.fullmatch(pattern, name)]
    if len(matches) > 1:
        raise ValueError(f"parameter {name!r} is in two optimizer groups: {matches[0]!r} and {matches[1]!r}")
    return matches[0] if matches else None


def _rate(options: Mapping[str, Any], step: int) -> float:
    lr: LearningRate = options["lr"]
    return float(lr(step) if callable(lr) else lr)


def _buckets(names: Iterable[str], params: Tensors) -> dict[tuple[torch.device, torch.dtype], list[str]]:
    """Split names by what one kernel call can take."""
    buckets: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name in names:
        buckets.setdefault((params[name].device, params[name].dtype), []).append(name)
    return buckets


def _prepare(grads: list[Tensor], dtype: torch.dtype, scale: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Return contiguous gradients of the parameters' dtype, and the scale left for the kernel to divide by.

    The CPU kernel ignores strides and takes its scale in float32, which float64 must not pass through.
    """
    grads = [grad.to(dtype).contiguous() for grad in grads]
    if scale is None:
        return grads, None
    grads = list(_unshare(grads))
    device = grads[0].device
    if dtype != torch.float64:
        return grads, scale.to(device, torch.float32, non_blocking=True)
    divisor = scale.to(device, dtype, non_blocking=True)
    torch_private.foreach_div_(grads, divisor)
    return grads, None


def _unshare(grads: list[Tensor]) -> Iterator[Tensor]:
    """Copy a gradient seen before: autograd hands out one tensor for both terms of a sum, and dividing
    it in place for the one would divide it again for the other.
    """
    seen: set[int] = set()
    for grad in grads:
        yield grad.clone() if grad.data_ptr() in seen else grad
        seen.add(grad.data_ptr())


def _copy_back(targets: list[list[Tensor]], sources: list[list[Tensor]]) -> None:
    for target, source in zip(targets, sources, strict=True):
        for old, new in zip(target, source, strict=True):
            if old is not new:
                old.copy_(new)


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.contiguous_format, requires_grad=False)


def _clone(value: Tensor | Tensors) -> Tensor | Tensors:
    if isinstance(value, Tensor):
        return value.clone()
    return {name: tensor.clone() for name, tensor in value.items()}
