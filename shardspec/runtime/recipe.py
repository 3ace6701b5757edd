"""The recipe of an initial value, and its evaluation for any part of a parameter, on any mesh alike.

Arithmetic is in float64, each operation rounded exactly, and rounded to the parameter's dtype once at
the end. Random steps read the counter-based streams of `rng` at the global index of each element.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from shardspec.runtime import rng
from shardspec.runtime.rng import Key

Part = Sequence[Tensor]  # the open mesh of a block's global indices
_NO_KEY = Key((0, 0), (0, 0))  # of a step that draws nothing


class NotReplayable(ValueError):
    """A parameter's initial value cannot be computed for a part of it."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason
        fix = f"give one with init={{r'{re.escape(name)}': fn}}"
        super().__init__(f"the initial value of {name} cannot be replayed: {reason}; {fix}")


@attrs.frozen(kw_only=True)
class Step:
    """One recorded operation: `region` has a range for each dim (None: all), `stream` its random numbers."""

    op: str
    args: tuple[Any, ...] = ()
    region: tuple[range, ...] | None = None
    stream: tuple[str, int] | None = None


@attrs.frozen(kw_only=True)
class Recipe:
    """The steps that make a parameter's initial value, or the reason why there are none."""

    steps: tuple[Step, ...] = ()
    reason: str | None = None

    @property
    def complete(self) -> bool:
        """Whether some step writes every element."""
        return any(step.region is None and step.op in SOURCES for step in self.steps)


def materialise(
    recipe: Recipe,
    name: str,
    seed: int,
    shape: Sequence[int],
    index: Sequence[Tensor | slice],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return the part `index` of parameter `name` of global `shape`: [len(i) for i in index] of `dtype`.

    `index` holds for each dim a 1-D int64 tensor of global indices, or a slice. The values are bitwise
    those of the whole, however it is cut. NotReplayable where the recipe has a reason.
    """
    if recipe.reason is not None:
        raise NotReplayable(name, recipe.reason)
    device = torch.device(device)
    spans = [
        torch.arange(size, device=device)[i] if isinstance(i, slice) else i.to(device)
        for size, i in zip(shape, index, strict=True)
    ]
    out = torch.empty([len(span) for span in spans], dtype=dtype, device=device)
    for block in _blocks(out.shape, rng.chunk_size(device)):
        part = _open_mesh([span[rows] for span, rows in zip(spans, block, strict=True)])
        value = _evaluate(recipe, seed, part, shape)
        if not recipe.complete and value.isnan().any():
            raise NotReplayable(name, "some of its elements are never written")
        out[block] = _rounded(value, dtype)
    return out


# What a step computes. Sources write a value whatever was there: f(key, part, shape, *args).


def _fill(_key: Key, part: Part, _shape: Sequence[int], value: float) -> Tensor:
    sizes = torch.broadcast_shapes(*(i.shape for i in part))
    device = part[0].device if part else None
    return torch.full(sizes, float(value), dtype=torch.float64, device=device)


def _constant(_key: Key, part: Part, _shape: Sequence[int], value: Tensor) -> Tensor:
    return value[tuple(i.to(value.device) for i in part)].to(part[0].device if part else None).double()


def _uniform(key: Key, part: Part, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
    return rng.uniform(key, _linear(part, shape)) * (high - low) + low


def _normal(key: Key, part: Part, shape: Sequence[int], mean: float = 0.0, std: float = 1.0) -> Tensor:
    return rng.normal(key, _linear(part, shape)) * std + mean


def _trunc_normal(
    key: Key, part: Part, shape: Sequence[int], mean: float, std: float, low: float, high: float
) -> Tensor:
    """By the inverse distribution function, on the side of the mean where that is accurate."""
    below, above = (low - mean) / std, (high - mean) / std
    sign = 1.0
    if below > 0:
        below, above, sign = -above, -below, -1.0
    p = rng.uniform(key, _linear(part, shape)) * (rng.ndtr(above) - rng.ndtr(below)) + rng.ndtr(below)
    return (rng.ndtri(p) * (sign * std) + mean).clamp(low, high)


SOURCES: dict[str, Callable[..., Tensor]] = {
    "fill": _fill,
    "constant": _constant,
    "uniform": _uniform,
    "normal": _normal,
    "trunc_normal": _trunc_normal,
}
RANDOM = {"uniform", "normal", "trunc_normal"}

# Elementwise steps, by ATen's names and arguments. Each is one IEEE operation: what ATen rounds
# differently in a vector's tail (exp, log, tanh) is not here.
ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, other, alpha=1: x + other * alpha,
    "sub": lambda x, other, alpha=1: x - other * alpha,
    "rsub": lambda x, other, alpha=1: other - x * alpha,
    "mul": lambda x, other: x * other,
    # CUDA multiplies by the reciprocal of a Python number, which rounds twice.
    "div": lambda x, other: x / x.new_tensor(other),
    "clamp": lambda x, min=None, max=None: x.clamp(min, max),  # noqa: A006
    "clamp_min": lambda x, min: x.clamp(min=min),  # noqa: A006
    "clamp_max": lambda x, max: x.clamp(max=max),  # noqa: A006
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "sqrt": lambda x: x.sqrt(),
    "erfinv": rng.erfinv,
    "clone": lambda x, **_: x,
    "_to_copy": lambda x, dtype=None, **_: x if dtype is None else _rounded(x, dtype).double(),
}


def _evaluate(recipe: Recipe, seed: int, part: Part, shape: Sequence[int]) -> Tensor:
    value = _fill(_NO_KEY, part, shape, math.nan)
    for step in recipe.steps:
        if step.op in SOURCES:
            key = _NO_KEY if step.stream is None else rng.stream_key(seed, *step.stream)
            new = SOURCES[step.op](key, part, shape, *step.args)
        else:
            new = ELEMENTWISE[step.op](value, *step.args)
        value = new if step.region is None else torch.where(_inside(step.region, part), new, value)
    return value


def _inside(region: Sequence[range], part: Part) -> Tensor:
    inside = torch.ones((), dtype=torch.bool, device=part[0].device)
    for span, i in zip(region, part, strict=True):
        inside = inside & (i >= span.start) & (i < span.stop) & ((i - span.start) % span.step == 0)
    return inside


def _linear(part: Part, shape: Sequence[int]) -> Tensor:
    """Return the row-major global index of every element of part."""
    linear = torch.zeros((), dtype=torch.int64, device=part[0].device if part else None)
    for i, stride in zip(part, strides(shape), strict=True):
        linear = linear + i * stride
    return linear


def strides(shape: Sequence[int]) -> list[int]:
    """Return the row-major strides of an array of `shape`."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _open_mesh(spans: Sequence[Tensor]) -> list[Tensor]:
    """Reshape each dim's indices so that together they broadcast to the block."""
    return [span.reshape([-1 if d == dim else 1 for d in range(len(spans))]) for dim, span in enumerate(spans)]


def _blocks(sizes: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Yield slices that cover an array of `sizes`, none of more than `limit` elements."""
    if not sizes:
        yield ()
        return
    rows = max(1, limit // max(1, math.prod(sizes[1:])))
    for start in range(0, sizes[0], rows):
        for rest in _blocks(sizes[1:], limit):
            yield (slice(start, start + rows), *rest)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float64; by way of float32 to half precision, as every device does, but said here."""
    return value.float().to(dtype) if dtype in (torch.bfloat16, torch.float16) else value.to(dtype)
