"""What changes speed and memory and never meaning."""

import re
from collections.abc import Mapping, Sequence

import torch
from attrs import field, frozen

from shardspec.diagnostics import calling_line, refuse
from shardspec.schedule import SCHEDULES, needs


def _patterns(value: bool | str | Sequence[str]) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    return (value,) if isinstance(value, str) else tuple(value)


STRATEGIES = ("allgather", "ring", "ulysses")
"""How attention reads a sequence that is split over cp."""


def _strategies(value: str | Mapping[str, str] | tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str):
        return ((".*", value),)
    return value if isinstance(value, tuple) else tuple(value.items())


@frozen(kw_only=True)
class Policy:
    """How a plan is run.

    Args:
        param_dtype: the dtype that compute reads parameters in; what is stored keeps its own.
        reduce_dtype: the dtype in which stored gradients are summed over data ranks.
        remat: units (by regex, or all) whose activations are computed again in backward.
        accumulate: microbatches of a step, one after another, with one update.
        compile: units (by regex, or all) that `torch.compile` compiles.
        reshard_after_forward: units (by regex, or all) whose gathered parameters are freed between forward
            and backward, and gathered again; under pp a stage gathers once a step.
        prefetch: how many units ahead are gathered while one computes, in forward and in backward, from the second
            step on. None is FSDP2's own: in backward one, in forward none.
        offload: units (by regex, or all) whose stored parameters, their gradients and optimizer states lie in the
            host's memory, and are copied to the device when they are gathered. What fsdp does not store stays.
        schedule: the order of a pipeline's forwards and backwards, by torch's name.
        microbatches: of a step, with one update: in a pipeline those in flight, elsewhere one after another (then the
            same as `accumulate`). None: as many as the pipeline has stages, where there is one.
        stages: how many layers each stage of a pipeline has, in order; balanced where it is None.
        attention: how attention reads a sequence split over cp: "allgather", "ring" or "ulysses", for all modules or
            by a regex of the FQN of the module that calls it; of several that match the first, of none "allgather".
        balance: whether ranks of cp hold the sequence head and tail, two chunks each, so that causal attention is as
            much work for each. None: where a causal attention runs by "allgather" or "ring" and 2 cp divides the
            sequence.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    remat: bool | tuple[str, ...] = field(default=False, converter=_patterns)
    accumulate: int = 1
    compile: bool | tuple[str, ...] = field(default=False, converter=_patterns)
    reshard_after_forward: bool | tuple[str, ...] = field(default=True, converter=_patterns)
    prefetch: int | None = None
    offload: bool | tuple[str, ...] = field(default=False, converter=_patterns)
    schedule: str = "1F1B"
    microbatches: int | None = None
    stages: tuple[int, ...] | None = field(default=None, converter=lambda cut: None if cut is None else tuple(cut))
    attention: tuple[tuple[str, str], ...] = field(default=((".*", STRATEGIES[0]),), converter=_strategies)
    balance: bool | None = None

    def __attrs_post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                refuse(
                    "SS405",
                    f"{name}={dtype!r}",
                    why="parameters are read, and gradients summed, in a dtype of torch that holds fractions",
                    locations=(calling_line(),),
                    advice=(f"give {name}=torch.bfloat16, or leave it out to keep each parameter's own",),
                )
        if self.accumulate < 1:
            refuse(
                "SS405",
                f"accumulate={self.accumulate}",
                why="a step has at least one microbatch",
                locations=(calling_line(),),
                advice=("give accumulate=1, or leave it out, for a step of one microbatch",),
            )
        if self.prefetch is not None and (
            isinstance(self.prefetch, bool) or not isinstance(self.prefetch, int) or self.prefetch < 1
        ):
            refuse(
                "SS405",
                f"prefetch={self.prefetch!r}",
                why="so many units are gathered ahead: a whole number of at least 1",
                locations=(calling_line(),),
                advice=("leave it out for what FSDP2 does of itself",),
            )
        if self.microbatches is not None and (self.microbatches < 1 or self.accumulate > 1):
            refuse(
                "SS405",
                f"microbatches={self.microbatches}" + (f", accumulate={self.accumulate}" * (self.accumulate > 1)),
                why="a step has at least one microbatch, and one number says how many",
                locations=(calling_line(),),
                advice=("give microbatches= alone: without pp it accumulates",),
            )
        if self.schedule not in SCHEDULES:
            unmet = needs(self.schedule, 1, 1, 1)[0]
            refuse(
                "SS405",
                f"schedule={self.schedule!r}",
                why=unmet.why,
                locations=(calling_line(),),
                advice=(unmet.advice,),
            )
        if self.stages is not None and (not self.stages or min(self.stages) < 1):
            refuse(
                "SS405",
                f"stages={list(self.stages)}",
                why="a stage has at least one layer",
                locations=(calling_line(),),
            )
        for _, strategy in self.attention:
            if strategy not in STRATEGIES:
                refuse(
                    "SS405",
                    f"attention={strategy!r}",
                    why="attention over a split sequence gathers keys and values, passes them round, or exchanges "
                    f"sequence for heads: {', '.join(STRATEGIES)}",
                    locations=(calling_line(),),
                    advice=('give attention="allgather", or a mapping from modules (by regex) to strategies',),
                )


def strategy_of(policy: Policy, path: str) -> str:
    """The strategy by which attention that a module calls reads a split sequence."""
    found = (strategy for pattern, strategy in policy.attention if re.fullmatch(pattern, path))
    return next(found, STRATEGIES[0])


def chosen(option: bool | tuple[str, ...], name: str) -> bool:
    """Whether a policy's option takes a module."""
    return option if isinstance(option, bool) else any(re.fullmatch(pattern, name) for pattern in option)
