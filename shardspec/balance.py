"""Which layers stand in which pipeline stage: the costs of a recorded program's layers, and the fairest cut of them.

Costs are whole numbers wherever they are counted from a program, so that every rank finds the same cut.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from attrs import frozen
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from shardspec.program import BlockCall, ExpertsCall, Graph, Node, Program, Value, substitute
from shardspec.torch_private import OpOverload

aten = torch.ops.aten


def _over_last(shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Of a contraction over the last dim of its first operand."""
    return 2 * math.prod(out_shape) * shape[-1]


PRODUCTS = {aten.mv: _over_last, aten.dot: _over_last, aten._grouped_mm: _over_last}
"""Contractions for which torch's counter has no formula."""

FREE = frozenset({"point", "written", "_unsafe_view"})
"""Nodes that compute nothing, beside the views that torch calls so."""


@frozen(kw_only=True)
class LayerCosts:
    """What one forward of the whole batch costs, by layer, in operations and parameter elements read.

    Attributes:
        layers: by the layer's index, in rising order, that of the indices which the program runs.
        first: what runs before the first layer.
        last: what runs after the last one, the loss included where the program has it.
    """

    layers: Mapping[int, int]
    first: int = 0
    last: int = 0

    @property
    def costs(self) -> tuple[int, ...]:
        """The layers' costs alone."""
        return tuple(self.layers.values())


def layer_costs(program: Program, pattern: str) -> LayerCosts:
    """The costs of the modules that a `pipeline=` pattern matches.

    A contraction of [M, K] with [K, N] counts 2*M*N*K, and what has a formula in torch's counter what that says; a
    view counts nothing, any other operator one for each element that it makes, and a parameter one for each element,
    in each module that reads it. What runs between two layers goes with the earlier.

    Args:
        pattern: fullmatch on a module's FQN; its group `pp` is the layer's index.
    """
    regex, blocks = re.compile(pattern), dict[int, int]()
    layers: dict[int, int] = {}
    first = pending = 0
    current: int | None = None
    for fqn, cost in _work(program, "", regex, blocks):
        index = _layer_of(fqn, regex)
        if index is None:
            pending += cost
            continue
        if current is None:
            first = pending
        else:
            layers[current] += pending
        layers[index] = layers.get(index, 0) + cost
        current, pending = index, 0
    return LayerCosts(layers=dict(sorted(layers.items())), first=first, last=pending)


def _layer_of(fqn: str, regex: re.Pattern[str]) -> int | None:
    """The index of the layer that a module is, or lies in."""
    for prefix in accumulate(fqn.split("."), "{}.{}".format):
        if found := regex.fullmatch(prefix):
            return int(found["pp"])
    return None


def _work(graph: Graph, prefix: str, regex: re.Pattern[str], blocks: dict[int, int]) -> Iterator[tuple[str, int]]:
    """(module, cost) of each node in order; a block within a layer is counted once, by its id, and given whole."""
    read: set[tuple[str, int]] = set()
    for node in graph.nodes:
        path = node.func.fqn if isinstance(node.func, BlockCall) else node.path
        fqn = (prefix + path).rstrip(".")
        if not isinstance(node.func, BlockCall):
            params = {(path, ref.index) for ref in node.operands if graph.values[ref.index].kind == "param"} - read
            read |= params
            yield fqn, operations(node, graph) + sum(math.prod(graph.values[index].shape) for _, index in params)
            continue
        block = node.func.block
        if _layer_of(fqn, regex) is None:
            yield from _work(block, fqn + ".", regex, blocks)
            continue
        if id(block) not in blocks:
            blocks[id(block)] = sum(cost for _, cost in _work(block, fqn + ".", regex, blocks))
        yield fqn, blocks[id(block)]


def operations(node: Node, graph: Graph) -> int:
    """The floating-point operations of a node that is no call of a block, as `layer_costs` counts them."""
    if node.op in FREE:
        return 0
    size = sum(math.prod(graph.values[index].shape) for index in node.outputs if index is not None)
    func = node.func
    if isinstance(func, ExpertsCall):
        _, _, ids, *stacked = (graph.values[ref.index].shape for ref in node.operands)
        return 2 * math.prod(ids) * sum(math.prod(shape[1:]) for shape in stacked)
    if not isinstance(func, OpOverload):
        return size
    packet = func.overloadpacket
    if packet in flop_registry or packet in PRODUCTS or func._can_decompose():
        args, kwargs = substitute((node.args, node.kwargs), lambda ref: _meta(graph.values[ref.index]))
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter, torch.no_grad():
            func(*args, **kwargs)
        if counted := counter.get_total_flops():
            return counted
    return 0 if _is_view(func) else size


def _meta(value: Value) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _is_view(func: Any) -> bool:
    aliases = [made.alias_info for made in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def balance(costs: Sequence[float], stages: int, first: float = 0, last: float = 0) -> tuple[int, ...]:
    """How many layers each stage takes, in order, so that the costliest stage costs as little as it can.

    Of the cuts that do equally well, the one whose stages cost most alike (least sum of squares), then the one whose
    stages have most nearly as many layers, then the one that leaves the longer stages to the end: early stages hold
    the most microbatches. Exact: numbers are compared as fractions.

    Args:
        costs: of the layers, none negative.
        first: of what runs before the first layer, which goes with the first stage.
        last: of what runs after the last layer, which goes with the last stage.

    Raises:
        ValueError: for fewer than one stage, more stages than layers, or a cost that is negative or not finite.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages of at least one layer each")
    if bad := [cost for cost in (*costs, first, last) if not 0 <= cost < math.inf]:
        raise ValueError(f"a cost is at least 0 and finite, and one is {bad[0]}")
    loads = [Fraction(cost) for cost in costs]
    loads[0] += Fraction(first)
    loads[-1] += Fraction(last)
    unit = math.lcm(*(load.denominator for load in loads))
    return _even([int(load * unit) for load in loads], stages)


def _least_peak(loads: Sequence[int], stages: int) -> int:
    """The least that the costliest of `stages` runs of loads can cost: bisection over whole numbers."""
    low, high = max(loads), sum(loads)
    while low < high:
        middle = (low + high) // 2
        runs, filled = 1, 0
        for load in loads:
            if filled + load > middle:
                runs, filled = runs + 1, 0
            filled += load
        low, high = (low, middle) if runs <= stages else (middle + 1, high)
    return low


def _even(loads: Sequence[int], stages: int) -> tuple[int, ...]:
    """The evenest cut among those whose costliest stage costs least: dynamic programming from the end."""
    peak, count = _least_peak(loads, stages), len(loads)
    before = (0, *accumulate(loads))
    # [stages left][first layer of theirs] -> (sum of squared costs, sum of squared counts, layers of the first stage)
    best: list[dict[int, tuple[int, int, int]]] = [{count: (0, 0, 0)}]
    for left in range(1, stages + 1):
        row: dict[int, tuple[int, int, int]] = {}
        for start in range(stages - left, count - left + 1):
            for end in range(start + 1, count - left + 2):
                cost = before[end] - before[start]
                if cost > peak:
                    break
                if end in best[-1]:
                    squares, counts, _ = best[-1][end]
                    found = (squares + cost**2, counts + (end - start) ** 2, end - start)
                    row[start] = min(row.get(start, found), found)
        best.append(row)
    cuts: list[int] = []
    for row in reversed(best[1:]):
        cuts.append(row[sum(cuts)][2])
    return tuple(cuts)
