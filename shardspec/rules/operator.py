"""How an operator's rule is written: name each operand's dims by factor, and let `unify` do the rest."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen

from shardspec.layout import (
    AVG,
    MAX,
    MIN,
    SUM,
    DimLayout,
    Layout,
    Sizes,
    canonical,
    dim_axes,
    dim_text,
    replicated,
)
from shardspec.program import Node, Ref, Value, tensors

Label = Hashable
"""A factor's name in one operator's rule; None is a broadcast dim of size one."""


@frozen(cache_hash=True)
class Type:
    """What is known of a value: its layout, and the dims along which every element is the same.

    A uniform dim adopts the layout of the partner that it meets.
    """

    layout: Layout
    uniform: frozenset[int] = frozenset()
    zero: bool = False
    """Whether it was just made of zeros: a sum over ranks may take it for a share, as it is."""


@define(eq=False)
class Typed:
    """An operator's answer: the outputs' types, and the layouts that its operands were read with."""

    outputs: tuple[Type, ...]
    consumed: tuple[Type, ...]
    """What each operand was read as; its dims that are still uniform may have any local length."""
    local: dict[str, Any] = field(factory=dict)
    """Argument name -> the value that the local call must have, where it is not the global one."""
    divides: tuple[tuple[tuple[str, ...], int], ...] = ()
    """(axes, number): the product of the axes' sizes must divide the number, for a cut to miss them."""
    lowering: str = ""
    """Names the local form, where the local call is not the same operator on local tensors."""


class Refusal(Exception):
    """An operator cannot be typed; carries what the diagnostic needs."""

    def __init__(
        self,
        code: str,
        what: str,
        why: str = "",
        operands: Iterable[int] = (),
        axis: str = "",
        advice: Iterable[str] = (),
    ) -> None:
        self.code, self.what, self.why, self.axis = code, what, why, axis
        self.operands, self.advice = tuple(operands), tuple(advice)
        super().__init__(what)


@define(eq=False)
class Call:
    """One call of an operator, with a type for each tensor operand in order of appearance."""

    node: Node
    values: Sequence[Value]
    """The graph's values, for shapes and dtypes."""
    types: tuple[Type, ...]
    sizes: Sizes
    refs: tuple[Ref, ...] = ()
    _named: dict[str, Any] | None = None
    strategy: str = ""
    """How attention reads a sequence that is split over cp; nothing where it may not be split."""

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by the schema's names, defaults filled in, tensors as `Ref`."""
        if self._named is None:
            self._named = named_arguments(self.node)
        return self._named

    def position(self, argument: str) -> int | None:
        """Which of the tensor operands the argument is, or None where it is absent."""
        ref = self.named.get(argument)
        if not isinstance(ref, Ref):
            return None
        at = 0
        for name, value in self.named.items():
            if name == argument:
                return at
            at += len(tensors(value))
        return None

    def operand(self, index: int) -> str:
        """What stands for an operand in a refusal's text: the typing puts the tensor's name in its place."""
        return f"<value {self.refs[index].index}>" if index < len(self.refs) else f"operand {index}"

    def shape(self, operand: int) -> tuple[int, ...]:
        """An operand's global shape."""
        return self.values[self.refs[operand].index].shape

    def dtype(self, operand: int) -> torch.dtype:
        """An operand's dtype."""
        return self.values[self.refs[operand].index].dtype

    def out(self, output: int = 0) -> Value:
        """An output's value: global shape and dtype."""
        index = self.node.outputs[output]
        assert index is not None
        return self.values[index]


def named_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen node by its schema's names, in the schema's order."""
    schema = getattr(node.func, "_schema", None)
    if schema is None:
        return {**{str(index): arg for index, arg in enumerate(node.args)}, **node.kwargs}
    named: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            named[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


OperatorRule = Callable[[Call], Typed]

RULES: dict[Any, OperatorRule] = {}
"""Operator (an ATen overload, or a function taken whole) -> its rule."""


META: dict[Any, Callable[..., Any]] = {}
"""Operator -> what gives its result on meta, where torch's own form there refuses what its kernels take."""


def rule(*operators: Any) -> Callable[[OperatorRule], OperatorRule]:
    """Register the decorated function as the rule of `operators`."""

    def register(function: OperatorRule) -> OperatorRule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


# What an operator does to pending operands.
NONLINEAR = "nonlinear"
PRODUCT = "product"
"""Linear in each operand separately."""
JOINT = "joint"
"""Linear in all operands together: add, sub, cat."""
FIRST = "first"
"""Linear in operand 0, the others fixed: div, index."""
COPY = "copy"
"""Moves or repeats elements and computes nothing."""

Linear = str | tuple[frozenset[int], ...]
"""One of the above; or sets of operands, in each of which together the operator is linear, the others fixed."""


def name_of(call: Call) -> str:
    """The operator as a reader knows it: `mul`, `softmax`."""
    return call.node.op


def _digits(call: Call, labels: Sequence[Sequence[Label]]) -> tuple[dict[Label, DimLayout], set[Label]]:
    """The digits of each factor, which all operands that have it must agree on; and the uniform factors."""
    digits: dict[Label, DimLayout] = {}
    source: dict[Label, tuple[int, int]] = {}
    uniform: dict[Label, DimLayout] = {}
    for operand, (kind, names) in enumerate(zip(call.types, labels, strict=True)):
        for dim, label in enumerate(names):
            if label is None:
                continue
            found = kind.layout.dims[dim]
            if dim in kind.uniform:
                uniform.setdefault(label, found)
            elif label not in digits:
                digits[label], source[label] = found, (operand, dim)
            elif digits[label] != found:
                raise _disagree(call, (operand, dim), source[label])
    return {**uniform, **digits}, set(uniform) - set(digits)


def _disagree(call: Call, one: tuple[int, int], two: tuple[int, int]) -> Refusal:
    dims = [(call.types[operand].layout.dims[dim], operand, dim) for operand, dim in sorted((one, two))]
    (left, first, first_dim), (right, second, second_dim) = dims
    axes = [axis for axis in (*dim_axes(left), *dim_axes(right)) if (axis in left) != (axis in right)] or dim_axes(left)
    axis = axes[0] if axes else ""
    whole = (first if axis not in left else second) if axis else first
    return Refusal(
        "SS302",
        f"{name_of(call)} meets dims that disagree: {dim_text(left)} against {dim_text(right)}",
        why=(
            f"dim {first_dim} of {call.operand(first)} is {dim_text(left)}, dim {second_dim} of "
            f"{call.operand(second)} is {dim_text(right)}\n"
            "a rank would pair elements that do not belong together, and nothing is sliced or gathered between two "
            "declared points"
        ),
        operands=(whole, first, second),
        axis=axis,
    )


def _one_factor_an_axis(
    call: Call, labels: Sequence[Sequence[Label]], digits: Mapping[Label, DimLayout]
) -> dict[str, Label]:
    owner: dict[str, Label] = {}

    def place(label: Label) -> str:
        operand = next(i for i, names in enumerate(labels) if label in names)
        return f"{call.operand(operand)} along dim {list(labels[operand]).index(label)}"

    for label, dim in digits.items():
        for axis in dim_axes(dim):
            if axis in owner:
                raise Refusal(
                    "SS302",
                    f"{name_of(call)} meets {axis} on two different factors",
                    why=f"{place(owner[axis])} and {place(label)} are both split over {axis}: a rank would compute "
                    f"one block of {call.sizes[axis]} x {call.sizes[axis]}",
                    operands=[i for i, kind in enumerate(call.types) if axis in kind.layout.sharded],
                    axis=axis,
                )
            owner[axis] = label
    return owner


def _pending(
    call: Call, owner: Mapping[str, Label], linear: Linear, scalars: bool, fixed: Collection[int]
) -> list[tuple[str, str]]:
    """The pending reductions that pass the operator (rules 4 to 6 of the design)."""
    passed: list[tuple[str, str]] = []
    axes = {axis: kind for typed in call.types for axis, kind in typed.layout.pending}
    for axis in sorted(axes):
        kinds = [typed.layout.pending_kind(axis) for typed in call.types]
        held = [index for index, kind in enumerate(kinds) if kind]
        if axis in owner:
            split = next(i for i, typed in enumerate(call.types) if axis in typed.layout.sharded)
            raise _pending_refusal(call, axis, held, f"{call.operand(split)} is split over {axis}")
        found = {kinds[index] for index in held}
        kind = axes[axis]
        if len(found) > 1:
            raise _pending_refusal(
                call, axis, held, f"the operands are pending in two ways ({', '.join(map(str, found))})"
            )
        if not isinstance(linear, str):
            # A mean passes what is affine; a sum needs all that are linear together to be shares of it.
            if kind not in (SUM, AVG) or not any(
                group == set(held) or (kind == AVG and group.issuperset(held)) for group in linear
            ):
                raise _pending_refusal(call, axis, held, f"{name_of(call)} is not declared linear in that alone")
            passed.append((axis, kind))
            continue
        if linear == NONLINEAR or (kind not in (SUM, AVG) and linear != COPY):
            raise _pending_refusal(call, axis, held, f"{name_of(call)} is not linear, so f(a) + f(b) is not f(a + b)")
        if linear == PRODUCT and len(held) > 1:
            raise _pending_refusal(
                call, axis, held, "both factors are pending: a1*b1 + a2*b2 is not (a1 + a2)*(b1 + b2)"
            )
        if any(index in fixed for index in held):
            chooses = next(index for index in held if index in fixed)
            raise _pending_refusal(call, axis, [chooses], f"{call.operand(chooses)} says which elements are taken")
        if linear == FIRST and held != [0]:
            raise _pending_refusal(call, axis, held, f"{name_of(call)} is linear in {call.operand(0)} only")
        other = next(
            (i for i, pending in enumerate(kinds) if not pending and i not in fixed and not call.types[i].zero), None
        )
        if linear == JOINT and kind == SUM and (other is not None or scalars):
            whole = call.operand(other) if other is not None else "the number that is added"
            raise _pending_refusal(
                call, axis, held, f"{whole} is complete: it would be counted {call.sizes[axis]} times"
            )
        passed.append((axis, kind))
    return passed


STILL = {SUM: "still to be summed", AVG: "still to be averaged", MAX: "still a maximum", MIN: "still a minimum"}


def _pending_refusal(call: Call, axis: str, held: Sequence[int], why: str) -> Refusal:
    kind = call.types[held[0]].layout.pending_kind(axis) or SUM
    return Refusal(
        "SS303",
        f"{name_of(call)} reads {call.operand(held[0])}, which is {STILL[kind]} over {axis}",
        why=why,
        operands=held,
        axis=axis,
    )


def unify(
    call: Call,
    labels: Sequence[Sequence[Label]],
    outputs: Sequence[Sequence[Label]],
    *,
    linear: Linear = NONLINEAR,
    contracted: str = SUM,
    whole: Iterable[Label] = (),
    scalars: bool = False,
    fixed: Collection[int] = (),
    out_sizes: Mapping[Any, int] | None = None,
) -> Typed:
    """Type an operator from the factors of its operands' dims.

    Args:
        labels: for each tensor operand, a label a dim.
        outputs: for each output, a label a dim; a label that no operand has is a fresh local dim.
        linear: what the operator does to pending operands.
        contracted: the kind of reduction over the factors that no output has.
        whole: factors that must not be split.
        scalars: True when a Python number takes part as a complete operand of a `JOINT` operator.
        fixed: operands that only say which elements of the others are taken: a condition, an index.
        out_sizes: sizes of fresh dims.

    Raises:
        Refusal: SS302 for disagreeing operands, SS303 for a pending operand, SS304 for a split whole factor.
    """
    whole = set(whole)
    _check_whole(call, labels, whole)
    digits, uniform = _digits(call, labels)
    owner = _one_factor_an_axis(call, labels, digits)
    pending = _pending(call, owner, linear, scalars, fixed)
    kept = {label for names in outputs for label in names}
    for label, dim in digits.items():
        if label not in kept:
            pending += [(axis, contracted) for axis in dim_axes(dim)]
    uniform = {label for label in uniform if label in kept and label not in whole}
    kinds = [
        Type(
            Layout(tuple(_output_dim(label, digits, out_sizes) for label in names), tuple(sorted(pending))),
            _where(names, uniform),
        )
        for names in outputs
    ]
    shares = tuple(sorted(pending)) if linear == JOINT else ()
    consumed = [
        Type(
            Layout(
                tuple(() if label is None else digits[label] for label in names),
                shares if kind.zero and not kind.layout.pending else kind.layout.pending,
            ),
            _where(names, uniform),
        )
        for kind, names in zip(call.types, labels, strict=True)
    ]
    return Typed(tuple(kinds), tuple(consumed))


def _where(names: Sequence[Label], chosen: set[Label]) -> frozenset[int]:
    return frozenset(index for index, label in enumerate(names) if label in chosen)


def _check_whole(call: Call, labels: Sequence[Sequence[Label]], whole: set[Label]) -> None:
    for operand, (kind, names) in enumerate(zip(call.types, labels, strict=True)):
        for at, (label, dim) in enumerate(zip(names, kind.layout.dims, strict=True)):
            if label not in whole or not dim_axes(dim):
                continue
            axis = dim_axes(dim)[0]
            raise Refusal(
                "SS304",
                f"{name_of(call)} needs the whole of dim {at} of {call.operand(operand)}, which is split over {axis}",
                why=f"each rank holds {dim_text(dim)}; {name_of(call)} of a part is not a part of the whole's",
                operands=(operand,),
                axis=axis,
            )


def _output_dim(label: Label, digits: Mapping[Label, DimLayout], fresh: Mapping[Any, int] | None) -> DimLayout:
    if label is None:
        return ()
    if label in digits:
        return digits[label]
    assert fresh is not None, f"no size for the fresh factor {label!r}"
    assert label in fresh, f"no size for the fresh factor {label!r}"
    return canonical((fresh[label],))


def dim_index(dim: Any, rank: int) -> int:
    """A dim's index from the front; of a 0-dim tensor torch takes 0 and -1 for its one element."""
    return int(dim) % max(rank, 1)


def aligned(call: Call) -> list[list[Label]]:
    """Labels for operands that broadcast against each other, right-aligned: dim -1 is label -1."""
    labels: list[list[Label]] = []
    for operand in range(len(call.types)):
        shape = call.shape(operand)
        labels.append([None if length == 1 else index - len(shape) for index, length in enumerate(shape)])
    return labels


def aligned_output(shape: Sequence[int]) -> list[Label]:
    """The labels of a broadcast result."""
    return [None if length == 1 else index - len(shape) for index, length in enumerate(shape)]


def unsplit(shape: Sequence[int]) -> Type:
    """The type of a value that every rank makes alike."""
    return Type(replicated(shape))


def uniform(shape: Sequence[int]) -> Type:
    """The type of a constant filling of a shape."""
    return Type(replicated(shape), frozenset(range(len(shape))))


def all_replicated(call: Call) -> bool:
    """Whether every operand is whole and complete on every axis."""
    return all(not kind.layout.sharded and not kind.layout.pending for kind in call.types)


def as_replicated(call: Call) -> Typed:
    """The answer for any operator whose operands are all replicated: so is the result."""
    outputs = tuple(unsplit(call.values[index].shape) for index in call.node.outputs if index is not None)
    return Typed(outputs, tuple(Type(kind.layout) for kind in call.types))
