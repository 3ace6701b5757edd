"""What changes speed and memory and never meaning."""

import re
from collections.abc import Sequence

import torch
from attrs import field, frozen

from shardspec.diagnostics import calling_line, refuse


def _patterns(value: bool | str | Sequence[str]) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    return (value,) if isinstance(value, str) else tuple(value)


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
            and backward, and gathered again.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    remat: bool | tuple[str, ...] = field(default=False, converter=_patterns)
    accumulate: int = 1
    compile: bool | tuple[str, ...] = field(default=False, converter=_patterns)
    reshard_after_forward: bool | tuple[str, ...] = field(default=True, converter=_patterns)

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


def chosen(option: bool | tuple[str, ...], name: str) -> bool:
    """Whether a policy's option takes a module."""
    return option if isinstance(option, bool) else any(re.fullmatch(pattern, name) for pattern in option)
