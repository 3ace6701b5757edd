"""Operators that are not torch's, for the tests of `ss.register_rule`."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import shardspec as ss
from shardspec.rules.operator import RULES


@torch.library.custom_op("own::scaled_gelu", mutates_args=())
def scaled_gelu(x: Tensor, w: Tensor, eps: float = 1.0) -> Tensor:
    """gelu(x) * w * eps; x [..., d], w [d]."""
    return F.gelu(x) * w * eps


@scaled_gelu.register_fake
def _(x: Tensor, w: Tensor, eps: float = 1.0) -> Tensor:
    return torch.empty_like(x)


def _save_all(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(item for item in inputs if isinstance(item, Tensor)))
    ctx.rest = [item for item in inputs if not isinstance(item, Tensor)]


def _gelu_backward(ctx, grad):
    x, w = ctx.saved_tensors
    (eps,) = ctx.rest
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (grad_x,) = torch.autograd.grad(F.gelu(leaf), leaf, grad * w * eps)
    return grad_x, (grad * F.gelu(x) * eps).sum(tuple(range(x.ndim - 1))), None


scaled_gelu.register_autograd(_gelu_backward, setup_context=_save_all)


def define(name: str, function, backward=None):
    """A custom operator of namespace `own`, whose backward is that of `function` unless another is given."""
    made = torch.library.custom_op(f"own::{name}", function, mutates_args=())
    made.register_fake(function)

    def derived(ctx, *grads):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in ctx.saved_tensors]
            given = iter(leaves)
            out = function(*(next(given) if item is ... else item for item in ctx.layout))
            outs, cots = (out, grads) if isinstance(out, tuple) else ((out,), grads[:1])
            pairs = [(one, cot) for one, cot in zip(outs, cots, strict=True) if one.requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad([one for one, _ in pairs], wanted, [cot for _, cot in pairs]))
        given = iter(leaves)
        return tuple(
            None if item is not ... else (next(found) if next(given).requires_grad else None) for item in ctx.layout
        )

    def save(ctx, inputs, output):
        ctx.save_for_backward(*(item for item in inputs if isinstance(item, Tensor)))
        ctx.layout = [... if isinstance(item, Tensor) else item for item in inputs]

    made.register_autograd(backward or derived, setup_context=save)
    return made


def _softmax(x: Tensor, dim: int = -1) -> Tensor:
    return F.softmax(x, dim)


def _sum_of_squares(x: Tensor) -> Tensor:
    return (x * x).sum(-1)


def _total(x: Tensor) -> Tensor:
    return x.sum(-1)


def _peak(x: Tensor) -> Tensor:
    return x.amax(-1)


def _turn(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).clone()


def _norm_heads(x: Tensor, n_heads: int) -> Tensor:
    b, s, d = x.shape
    return F.normalize(x.view(b, s, n_heads, d // n_heads), dim=-1).reshape(b, s, d)


def _gate(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return (x @ w).sigmoid(), x.sum(-1)


def _average(x: Tensor, y: Tensor) -> Tensor:
    return (x + y) / 2


def _merge(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.exp() if bias is None else x.exp() + bias


def _relu_scaled(x: Tensor) -> Tensor:
    return x.relu() * 2


def _mean_backward(ctx, grad):
    """A backward that divides by the number of rows that it sees: right on the whole, another on a part."""
    (x,) = ctx.saved_tensors
    return grad * (x > 0) * 2 * (8 / x.shape[0])


softmax = define("softmax", _softmax)
sum_of_squares = define("sum_of_squares", _sum_of_squares)
total = define("total", _total)
peak = define("peak", _peak)
turn = define("turn", _turn)
norm_heads = define("norm_heads", _norm_heads)
gate = define("gate", _gate)
average = define("average", _average)
merge = define("merge", _merge)
wrong_backward = define("wrong_backward", _relu_scaled, _mean_backward)


@torch.library.custom_op("own::no_backward", mutates_args=())
def no_backward(x: Tensor) -> Tensor:
    """An operator that is never differentiated."""
    return x * 2


no_backward.register_fake(torch.empty_like)


@torch.library.custom_op("own::no_fake", mutates_args=())
def no_fake(x: Tensor) -> Tensor:
    """An operator without a shape function."""
    return x * 2


@torch.library.custom_op("own::writes", mutates_args={"x"})
def writes(x: Tensor) -> None:
    """An operator that writes to its argument."""
    x.mul_(2)


@contextlib.contextmanager
def own_rules() -> Iterator[None]:
    """Forget afterwards what was registered meanwhile."""
    before = dict(RULES)
    try:
        yield
    finally:
        RULES.clear()
        RULES.update(before)


def register_all() -> None:
    """Right rules for the operators that the models of the tests use."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ss.register_rule(scaled_gelu, "... d, d -> ... d", samples=[(noise(4, 4), noise(4))], linear="w")
    ss.register_rule(softmax, "b s !d -> b s !d", samples=[noise(4, 4, 4)])
    ss.register_rule(norm_heads, "b s (h !e) -> b s (h !e)", samples=[(noise(4, 4, 12), 4)], sizes={"n_heads": "h"})
