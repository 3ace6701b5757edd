"""The model's forward as a graph: what `trace` records, `infer` types, and `dryrun` compares.

A program is a list of nodes over values in static single assignment. Repeated blocks are recorded once and
called: their nodes live in a `Block`, whose inputs are the values that enter it.
"""

import linecache
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from attrs import define, field, frozen

from shardspec.diagnostics import Location, shorten


@frozen
class Ref:
    """A value's index in its graph, where an argument is a tensor."""

    index: int


@define(slots=True, eq=False)
class Value:
    """A tensor of the program: what is known of it before any layout is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""
    """FQN of a parameter or buffer (relative to the block), or the entry's name."""
    kind: str = "inner"
    """"inner", "param", "buffer", "entry", "formal" (a block's input), or "constant"."""
    requires_grad: bool = False
    data: torch.Tensor | None = None
    """The value itself, where it derives from constants alone."""

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


@define(slots=True, eq=False)
class Node:
    """One operation: an ATen overload, one taken whole, a point, or a call of a block."""

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int | None, ...]
    path: str
    """FQN of the module whose forward runs, relative to the block."""
    file: str
    line: int
    grad: bool = True
    """False under a `no_grad` of the model's own."""
    nested: Any = None
    """For a block's call: the structure of its outputs."""
    custom: bool = False
    """Whether it runs in the forward of an autograd function of the user's own."""
    unsafe: str = ""
    """Why a write cannot be followed through every alias; nothing where it can."""

    @cached_property
    def operands(self) -> tuple[Ref, ...]:
        """The tensors that it reads, in order; one that it reads twice is there twice."""
        return (*tensors(self.args), *tensors(self.kwargs))

    @property
    def location(self) -> Location:
        """The model's line."""
        return Location(file=shorten(self.file), line=self.line, text=linecache.getline(self.file, self.line).strip())


@define(slots=True, eq=False)
class Graph:
    """Nodes over values; `inputs` are the values that come from outside."""

    values: list[Value] = field(factory=list)
    nodes: list[Node] = field(factory=list)
    params: dict[str, int] = field(factory=dict)
    """FQN (relative) -> value, for the parameters and buffers that are read."""
    inputs: list[int] = field(factory=list)
    outputs: list[int] = field(factory=list)

    def add(self, value: Value) -> int:
        """Append a value and give its index."""
        self.values.append(value)
        return len(self.values) - 1


@define(slots=True, eq=False)
class Block(Graph):
    """A repeated module's graph, with names relative to the module."""

    first: str = ""
    """The FQN under which it was recorded."""


@frozen
class BlockCall:
    """The `func` of a block's node: which block, under which FQN."""

    block: Block
    fqn: str


@frozen(eq=False)
class ExpertsCall:
    """The `func` of a node that stands for a whole call of an experts module: (hidden, weights, ids, *parameters).

    Its body is recorded apart, once its parameters have shapes: those of a rank, which has some of the experts.
    """

    fqn: str
    """Of the module, relative to the graph."""
    module: Any
    """The model's own, which is only read."""
    names: tuple[str, ...] = ()
    """Of the parameters, relative to the module."""
    record: Callable[..., Graph] | None = None
    """hidden, weights, shapes of parameters, values of attributes, how often a few rows are repeated, how many choices
    each has -> its forward on them, as one rank runs it."""


@define(slots=True, eq=False)
class Program(Graph):
    """The whole forward, its entries by name, and its outputs in the structure that forward returned."""

    entries: dict[str, int] = field(factory=dict)
    result: Any = None
    """Forward's (or the loss's) return value, with `Ref` for tensors."""
    forward_nodes: int = 0
    """How many of the nodes are the model's; those after them are the loss's."""


def tensors(tree: Any) -> list[Ref]:
    """The refs in a nest of tuples, lists and dicts, in order."""
    found: list[Ref] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Ref]) -> None:
    kind = type(tree)
    if kind is Ref:
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, found)


def substitute(tree: Any, change: Any) -> Any:
    """The same nest with `change(ref)` for each ref."""
    if isinstance(tree, Ref):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        items = [substitute(item, change) for item in tree]
        if isinstance(tree, list):
            return items
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, dict):
        return {key: substitute(item, change) for key, item in tree.items()}
    return tree
