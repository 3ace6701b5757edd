"""Whether an experts module computes the same for an expert whatever number it has, and however many others there are.

On a rank experts are numbered from 0, and are fewer. Its forward is recorded so and with all of them, and the two are
compared from both ends: a loop over experts is longer in one, and alike at its first and at its last.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shardspec.program import Graph, Node, tensors
from shardspec.rules.experts import refuse
from shardspec.rules.operator import named_arguments

OVER_ALL = frozenset(
    ["mean", "var", "std", "softmax", "_softmax", "log_softmax", "_log_softmax", "layer_norm", "rms_norm", "prod"]
) | {"logsumexp", "linalg_vector_norm", "amax", "amin", "cumprod", "median"}
"""Operators that give something else where a dim is shorter, and no sum of parts."""

OWN = (
    "keep what is an expert's own in a parameter that is stacked over experts, and the number of all where attributes= "
    "does not name it"
)


def check_numbers(fqn: str, part: Graph, whole: Graph) -> None:
    """Compare the forward of a rank's experts with that of all.

    Raises:
        Refusal: SS332 where a number, or the extent of a mean, hangs on which experts there are.
    """
    found = difference(part, whole)
    if found:
        raise refuse(
            f"the experts module {fqn} computes with numbers that hang on which experts it has",
            f"a rank's experts are numbered from 0, and are fewer\n{found}",
            advice=(OWN,),
        )


def check_rows(fqn: str, few: Graph, more: Graph) -> None:
    """Compare the forward of a few rows with that of more, and of more choices each.

    Raises:
        Refusal: SS332 where a number, or the extent of a mean, hangs on how many there are.
    """
    found = difference(few, more)
    if found:
        raise refuse(
            f"the experts module {fqn} does not compute each choice of a row by itself",
            f"a rank has other rows than the whole, one choice of each\n{found}",
            advice=("do what reads several rows outside of the module that experts= names",),
        )


def difference(few: Graph, more: Graph) -> str:
    """The first place where two recordings compute with other numbers, or nothing."""
    one, two = list(_of_rows(few)), list(_of_rows(more))
    for first, second in (*_alike(one, two), *_alike(one[::-1], two[::-1])):
        numbers = _number(few, first), _number(more, second)
        if numbers[0] != numbers[1]:
            place = first.location
            told = " and ".join(", ".join(map(str, given)) for given in numbers)
            return f"{first.op} computes with {told}\nat {place.file}:{place.line}   {place.text}"
    return ""


def _of_rows(graph: Graph) -> Iterator[Node]:
    """The nodes that read something made of the rows or of their weights."""
    made = set(graph.inputs)
    for node in graph.nodes:
        if any(ref.index in made for ref in node.operands):
            made.update(index for index in node.outputs if index is not None)
            yield node


def _alike(parts: Sequence[Node], wholes: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """The nodes in step, as far as the two run the same operators."""
    for one, two in zip(parts, wholes, strict=False):
        if one.op != two.op:
            return
        yield one, two


def _number(graph: Graph, node: Node) -> tuple[Any, ...]:
    """What must be equal in both: the numbers that an elementwise operator takes, and what a mean is over."""
    named = named_arguments(node)
    if node.op in OVER_ALL:
        shape = graph.values[node.operands[0].index].shape
        if "normalized_shape" in named:
            return tuple(named["normalized_shape"])
        dims = named.get("dim")
        dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        return tuple(shape[dim] for dim in dims)
    if torch.Tag.pointwise not in getattr(node.func, "tags", ()):
        return ()
    given = (value for value in named.values() if not tensors(value))
    values = (graph.values[ref.index] for ref in node.operands)
    known = (value.data.item() for value in values if value.data is not None and value.shape == ())
    return (*(value for value in given if isinstance(value, (int, float))), *known)
