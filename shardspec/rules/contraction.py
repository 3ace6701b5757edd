"""Products that sum over a factor: linear, matmul and their kin."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shardspec.program import Ref
from shardspec.rules.operator import (
    JOINT,
    PRODUCT,
    Call,
    Label,
    Refusal,
    Typed,
    rule,
    unify,
)

aten = torch.ops.aten


def with_bias(
    call: Call,
    labels: list[list[Label]],
    out: list[Label],
    bias: int | None,
    bias_labels: list[Label],
    *,
    whole: Iterable[Label] = (),
    out_sizes: Mapping[Any, int] | None = None,
) -> Typed:
    """A product of two operands, and a bias that is added to it."""
    if bias is None:
        return unify(call, labels, [out], linear=PRODUCT, whole=whole, out_sizes=out_sizes)
    order = [index for index in range(len(call.types)) if index != bias]
    product = Call(
        call.node,
        call.values,
        tuple(call.types[i] for i in order),
        call.sizes,
        tuple(call.refs[i] for i in order),
    )
    try:
        typed = unify(product, labels, [out], linear=PRODUCT, whole=whole, out_sizes=out_sizes)
    except Refusal as refusal:
        refusal.operands = tuple(order[operand] for operand in refusal.operands)
        raise
    added = Call(
        call.node,
        call.values,
        (typed.outputs[0], call.types[bias]),
        call.sizes,
        (Ref(call.node.outputs[0] or 0), call.refs[bias]) if call.refs else (),
    )
    try:
        result = unify(added, [out, bias_labels], [out], linear=JOINT)
    except Refusal as refusal:
        refusal.operands = (bias, order[1])
        if refusal.code == "SS303":
            refusal.what = f"{call.node.op} adds {call.operand(bias)} to a product that is still to be summed over "
            refusal.what += refusal.axis
        raise
    consumed = dict(zip(order, typed.consumed, strict=True)) | {bias: result.consumed[1]}
    return Typed(result.outputs, tuple(consumed[index] for index in range(len(call.types))))


@rule(aten.linear.default)
def linear(call: Call) -> Typed:
    """x [..., i], weight [o, i], bias [o] -> [..., o]."""
    lead = [("b", index) for index in range(len(call.shape(0)) - 1)]
    bias = 2 if len(call.types) > 2 else None
    weight: list[Label] = ["o", "i"] if len(call.shape(1)) == 2 else ["i"]
    out: list[Label] = [*lead, "o"] if len(weight) == 2 else list(lead)
    return with_bias(call, [[*lead, "i"], weight], out, bias, ["o"])


@rule(aten.mm.default)
def mm(call: Call) -> Typed:
    """[m, k] x [k, n]."""
    return unify(call, [["m", "k"], ["k", "n"]], [["m", "n"]], linear=PRODUCT)


@rule(aten.bmm.default)
def bmm(call: Call) -> Typed:
    """[b, m, k] x [b, k, n]."""
    return unify(call, [["b", "m", "k"], ["b", "k", "n"]], [["b", "m", "n"]], linear=PRODUCT)


@rule(aten.addmm.default)
def addmm(call: Call) -> Typed:
    """bias [n] or [m, n], plus [m, k] x [k, n]."""
    names = _broadcast(call.shape(0), ["m", "n"])
    return with_bias(call, [["m", "k"], ["k", "n"]], ["m", "n"], 0, names)


@rule(aten.baddbmm.default)
def baddbmm(call: Call) -> Typed:
    """bias broadcast against [b, m, n], plus [b, m, k] x [b, k, n]."""
    names = _broadcast(call.shape(0), ["b", "m", "n"])
    return with_bias(call, [["b", "m", "k"], ["b", "k", "n"]], ["b", "m", "n"], 0, names)


def _broadcast(shape: Sequence[int], labels: Sequence[Label]) -> list[Label]:
    """The labels of an operand that broadcasts against a product with these."""
    last = labels[len(labels) - len(shape) :]
    return [None if length == 1 else label for length, label in zip(shape, last, strict=True)]


@rule(aten.mv.default)
def mv(call: Call) -> Typed:
    """[m, k] x [k]."""
    return unify(call, [["m", "k"], ["k"]], [["m"]], linear=PRODUCT)


@rule(aten.dot.default)
def dot(call: Call) -> Typed:
    """[k] x [k]."""
    return unify(call, [["k"], ["k"]], [[]], linear=PRODUCT)


@rule(aten.matmul.default)
def matmul(call: Call) -> Typed:
    """torch.matmul: the last two dims multiply, those before broadcast."""
    left, right, out = call.shape(0), call.shape(1), call.out().shape
    lead = len(out) - (len(left) > 1) - (len(right) > 1)
    names = [
        _batch(left[:-2]) + (["m", "k"] if len(left) > 1 else ["k"]),
        _batch(right[:-2]) + (["k", "n"] if len(right) > 1 else ["k"]),
    ]
    result = _batch(out[:lead]) + (["m"] if len(left) > 1 else []) + (["n"] if len(right) > 1 else [])
    return unify(call, names, [result], linear=PRODUCT)


def _batch(shape: Sequence[int]) -> list[Label]:
    return [None if size == 1 else ("b", index - len(shape)) for index, size in enumerate(shape)]


@rule(aten.einsum.default)
def einsum(call: Call) -> Typed:
    """The equation is the rule."""
    equation = str(call.named["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if "..." in equation:
        raise Refusal("SS305", "einsum with an ellipsis has no rule", why="name every dim in the equation")
    names = [list(part) for part in left.split(",")]
    for index, part in enumerate(names):
        if len(set(part)) != len(part):
            raise Refusal(
                "SS305", f"einsum reads a diagonal of {call.operand(index)}", why=f"{''.join(part)!r} repeats a dim"
            )
    if not arrow:
        letters = left.replace(",", "")
        right = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return unify(call, names, [list(right)], linear=PRODUCT)
