"""The bytes of one graph, node by node: forward, with what is gathered for it, and then backward."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen

from shardspec.amounts import NOTHING, Amount, as_kind, minus, plus
from shardspec.footprint import KEPT, Halves, Origin, Record
from shardspec.infer import TypedGraph, absolute
from shardspec.layout import Sizes
from shardspec.peaks import NONE, Noted, Peaks
from shardspec.program import Node

GRADIENTS, GATHERED = "gradients", "gathered"


@frozen(kw_only=True, eq=False)
class Gathering:
    """What FSDP2 holds of a unit, in bytes on a rank."""

    message: Amount
    """The flat result of its all-gather."""
    whole: Amount
    """The parameters that are copied out of it."""
    grads: Amount
    """Their gradients, until they are reduced."""
    last: Amount
    """The gradient that is copied in last, which `foreach_reduce` holds until it returns."""
    scattered: Amount
    """The flat input of the reduce-scatter."""
    shards: Amount
    """What the reduce-scatter leaves."""
    frees: bool
    """Whether the parameters are freed between forward and backward."""


@frozen(kw_only=True, eq=False)
class Setting:
    """What a walk needs to know beside the program."""

    sizes: Sizes
    units: Mapping[str, Gathering]
    """Unit -> what is gathered of it, for those that store anything."""
    unit_of: Callable[[str], str | None]
    """FQN of a module -> the innermost unit that holds it."""
    remat: Callable[[str], bool]
    inside: Mapping[str, tuple[Any, ...]]
    """Module -> what units and policy say of the modules within it: alike for blocks that are walked once."""
    accumulate: int
    adds: bool
    """Whether every gradient is added to one that is there: a later microbatch of a pipeline's stage, whose stored
    parameters stay gathered and have whole gradients to the end."""
    casts: bool
    """Whether compute reads casts of parameters."""
    dtype_of: Callable[[torch.dtype], torch.dtype]
    stored: Callable[[str], bool]
    """Whether FSDP2 gathers a parameter: its gradient counts with its unit."""
    prefetch: int | None
    """How many units ahead are gathered; None is FSDP2's own way."""


@define(eq=False)
class Spans:
    """Where the units of a graph begin and end, in the order in which they run."""

    first: dict[int, list[str]] = field(factory=dict)
    """Node -> the units whose first it is."""
    last: dict[int, list[str]] = field(factory=dict)
    order: list[str] = field(factory=list)

    @classmethod
    def of(cls, setting: Setting, typed: TypedGraph, fqn: str) -> "Spans":
        """Those of the units that lie within the module `fqn`, for the unit that holds it is its caller's."""
        nodes = typed.graph.nodes
        runs: dict[str, list[int]] = {}
        for position, node in enumerate(nodes):
            path = node.func.fqn if node.op == "block" else node.path
            unit = setting.unit_of(absolute(fqn, path)) if node.op != "point" else None
            if unit is not None and unit in setting.units and (not fqn or unit.startswith(f"{fqn}.")):
                runs.setdefault(unit, []).append(position)
        if "" in setting.units and not fqn:
            runs = {"": [0, len(nodes) - 1], **runs}
        spans = cls(order=list(runs))
        for unit, positions in runs.items():
            spans.first.setdefault(positions[0], []).append(unit)
            spans.last.setdefault(positions[-1], []).append(unit)
        return spans

    def before(self, unit: str, count: int) -> list[str]:
        """The units that ran before another, the nearest first."""
        at = self.order.index(unit)
        return self.order[max(0, at - count) : at][::-1]

    def behind(self, unit: str, count: int) -> list[str]:
        """The units that run behind another, the nearest first; the root is nobody's neighbour."""
        at = self.order.index(unit)
        return self.order[at + 1 : at + 1 + count] if unit else []


@define(eq=False)
class Gradients:
    """The gradients of values that wait for their producers, and the storages that they lie in."""

    of: dict[int, int] = field(factory=dict)
    """Value -> storage."""
    size: dict[int, Amount] = field(factory=dict)
    users: dict[int, int] = field(factory=dict)
    kept: set[int] = field(factory=set)
    """Storages that are held to the end."""

    def make(self, amount: Amount) -> int:
        """A new storage that nobody uses yet."""
        storage = len(self.size)
        self.size[storage], self.users[storage] = amount, 0
        return storage

    def put(self, value: int, storage: int) -> None:
        """Have a value's gradient lie in a storage."""
        self.of[value] = storage
        self.users[storage] += 1

    def drop(self, value: int) -> Amount:
        """Forget a value's gradient; what that frees."""
        storage = self.of.pop(value)
        self.users[storage] -= 1
        return NOTHING if self.users[storage] else self.size[storage]


@define(eq=False)
class Timeline:
    """What one graph holds beyond what was held at its start."""

    setting: Setting
    typed: TypedGraph
    records: Sequence[Record]
    live: set[int]
    """The values that a gradient reaches."""
    fqn: str
    results: Sequence[int]
    """The values that it hands out."""
    roots: dict[int, int] = field(factory=dict)
    """Value -> its storage: the first value that lies in it. Parameters, buffers and entries have none here."""
    size: dict[int, Amount] = field(factory=dict)
    """Storage that the graph makes -> its bytes."""
    kept: dict[int, int] = field(factory=dict)
    """Storage that is kept for backward -> the first node that keeps it."""
    now: Amount = NOTHING
    noted: Noted = field(factory=Noted)
    gathered: set[str] = field(factory=set)
    ready: set[str] = field(factory=set)
    """The units whose all-gather has begun, and whose parameters are not copied out yet."""
    message: Amount = NOTHING
    """The flat result of the last all-gather, or the flat input of the last reduce-scatter."""
    joins: Mapping[int, frozenset[int]] | None = None
    """In the half of a backward that is for inputs: node -> the results whose gradients are held for the other."""
    held: Amount = NOTHING
    held_seeds: set[int] = field(factory=set)

    def record(self) -> Record:
        """The graph as one operator that reads its inputs."""
        graph = self.typed.graph
        self._find_storages()
        spans = Spans.of(self.setting, self.typed, self.fqn)
        results = [self.roots.get(index, index) for index in self.results]
        own = {root for root in results if root in self.size}
        self._forward(spans, set(results))
        forward, self.noted = self.noted.peaks(), Noted()
        inner = plus(*(self.size[root] for root in self.kept if root in self.size and root not in own))
        inner = plus(inner, *(record.kept for record in self.records))
        inner = plus(inner, *(self.setting.units[unit].whole for unit in self.gathered))
        grads, left = self._backward(spans, own)
        made: list[Origin] = []
        for at, root in enumerate(results):
            if root in own:
                made.append(-1 - results.index(root) if root in results[:at] else self.size[root])
            else:
                made.append(graph.inputs.index(root) if root in graph.inputs else NOTHING)
        return Record(
            outputs=tuple(made),
            operands_kept=frozenset(at for at, index in enumerate(graph.inputs) if index in self.kept),
            outputs_kept=frozenset(at for at, root in enumerate(results) if root in own and root in self.kept),
            kept=inner,
            forward=forward,
            backward=self.noted.peaks(),
            grads=grads,
            left=left,
        )

    def input_half(self, weights: Peaks) -> Halves:
        """What `record` is told as a backward of which this is the half for inputs: its records, and what is live, are
        those of that half.

        Args:
            weights: of the half for parameters.
        """
        record = self.record()
        own = {self.roots.get(index, index) for index in self.results}
        last = max(self.joins or {}, default=-1)
        over = [
            self.size[root] for root, at in self.kept.items() if at > last and root in self.size and root not in own
        ]
        over += [record.kept for record in self.records[last + 1 :]]
        return Halves(
            backward=record.backward,
            grads=record.grads,
            held=self.held,
            held_outputs=frozenset(self.held_seeds),
            over=plus(*over) if last >= 0 else NOTHING,
            weights=weights,
        )

    def _find_storages(self) -> None:
        """Whose storage each value lies in, how large each is, and which are kept for backward."""
        graph = self.typed.graph
        for index in graph.inputs:
            self.roots[index] = index
        for position, (node, record) in enumerate(zip(graph.nodes, self.records, strict=True)):
            made = [index for index in node.outputs if index is not None]
            refs = [ref.index for ref in node.operands]
            for index, origin in zip(made, record.outputs, strict=False):
                if isinstance(origin, int):
                    source = refs[origin] if origin >= 0 else made[-1 - origin]
                    if source in self.roots:
                        self.roots[index] = self.roots[source]
                else:
                    self.roots[index] = index
                    self.size[index] = origin
            held = [*(refs[at] for at in record.operands_kept), *(made[at] for at in record.outputs_kept)]
            for index in held:
                if index in self.roots:
                    self.kept.setdefault(self.roots[index], position)
        for root in self.kept.keys() & self.size.keys():
            self.size[root] = as_kind(KEPT, self.size[root])

    def _forward(self, spans: Spans, results: set[int]) -> None:
        nodes = self.typed.graph.nodes
        ending = self._last_reads(results)
        for position, (node, record) in enumerate(zip(nodes, self.records, strict=True)):
            quiet = self._is_inside(position)
            for unit in spans.first.get(position, ()):
                self._gather(spans, unit, quiet=quiet)
            self._note(record.forward, quiet=quiet)
            new = [self.size[i] for i in node.outputs if i is not None and i in self.size]
            self.now = plus(self.now, record.kept, *new)
            self._note(quiet=quiet)
            for root in ending.get(position, ()):
                self.now = minus(self.now, self.size[root])
            for unit in spans.last.get(position, ()):
                if self.setting.units[unit].frees:
                    self.now = minus(self.now, self.setting.units[unit].whole)
                    self.gathered.discard(unit)
        self.now, self.message = minus(self.now, self.message), NOTHING

    def _last_reads(self, results: set[int]) -> dict[int, list[int]]:
        """Node -> the storages that nothing needs behind it."""
        last: dict[int, int] = {}
        for position, node in enumerate(self.typed.graph.nodes):
            for index in (*(ref.index for ref in node.operands), *(i for i in node.outputs if i is not None)):
                if index in self.roots:
                    last[self.roots[index]] = position
        ending: dict[int, list[int]] = {}
        for root, position in last.items():
            if root in self.size and root not in results and root not in self.kept:
                ending.setdefault(position, []).append(root)
        return ending

    def _is_inside(self, position: int) -> bool:
        """Whether a node is far within a row of blocks that run alike: what is held changes evenly along the row, so
        that it is the most at an end."""
        near = self.records[max(0, position - 2) : position + 3]
        return len(near) == 5 and all(record is near[0] for record in near)

    def _note(self, beyond: Peaks = NONE, *, quiet: bool) -> None:
        if not quiet:
            self.noted.note(self.now, beyond)

    def _begin(self, units: Iterable[str], *, quiet: bool) -> None:
        """Begin to gather what is neither gathered nor on its way."""
        for unit in units:
            if unit not in self.gathered and unit not in self.ready:
                self.ready.add(unit)
                self.now = plus(self.now, self.setting.units[unit].message)
                self._note(quiet=quiet)

    def _gather(self, spans: Spans, unit: str, *, quiet: bool) -> None:
        held = self.setting.units[unit]
        self._begin([unit], quiet=quiet)
        self.ready.discard(unit)
        self.gathered.add(unit)
        # The result of the gather before is freed when this one is copied out: FSDPParamGroup.wait_for_unshard.
        self.now, self.message = plus(minus(self.now, self.message), held.whole), held.message
        self._note(quiet=quiet)
        self._begin(spans.behind(unit, self.setting.prefetch or 0), quiet=quiet)

    def _backward(self, spans: Spans, own: set[int]) -> tuple[tuple[Origin | None, ...], Amount]:
        """The gradients of the graph's inputs, and what is left of those of its parameters."""
        graph = self.typed.graph
        self.now = NOTHING
        gradients = Gradients()
        seeds = {index: gradients.make(NOTHING) for index in self.results if index in self.live}
        for index, storage in seeds.items():
            gradients.put(index, storage)
        releases: dict[int, list[Amount]] = {}
        for root, position in self.kept.items():
            if root in self.size and root not in own:
                releases.setdefault(position, []).append(self.size[root])
        reached: set[int] = set()
        left: Amount = NOTHING
        for position in reversed(range(len(graph.nodes))):
            node, record = graph.nodes[position], self.records[position]
            quiet = self._is_inside(position)
            made = [index for index in node.outputs if index in gradients.of]
            if self.joins is not None:
                self._hold(position, gradients, seeds)
            if made and any(grad is not None for grad in record.grads):
                for unit in spans.last.get(position, ()):
                    self._unshard(spans, unit, quiet=quiet)
                self._note(record.backward, quiet=quiet)
                new = plus(record.left, self._hand_on(node, record, gradients, reached))
                left = plus(left, new)
                self.now = plus(self.now, new)
                if record.halves is not None:
                    self.held, self.now = plus(self.held, record.halves.held), plus(self.now, record.halves.held)
            for index in made:
                self.now = minus(self.now, gradients.drop(index))
            if self.joins is None:
                self.now = minus(self.now, plus(record.kept, *releases.get(position, ())))
            for unit in spans.first.get(position, ()):
                left = plus(left, self._reduce(unit, quiet=quiet))
        self.now = minus(self.now, self.message)
        found = [gradients.of.get(index) for index in graph.inputs]
        outer = {storage: self.results.index(index) for index, storage in seeds.items()}
        given = [None if s is None else outer[s] if s in outer else gradients.size[s] for s in found]
        return tuple(given), left

    def _hand_on(self, node: Node, record: Record, gradients: Gradients, reached: set[int]) -> Amount:
        """Give each operand its gradient; what that leaves with parameters."""
        graph = self.typed.graph
        left: Amount = NOTHING
        fresh: dict[int, Amount] = {}
        made = [index for index in node.outputs if index is not None]
        for ref, grad in zip(node.operands, record.grads, strict=False):
            if grad is None or (isinstance(grad, int) and made[grad] not in gradients.of):
                continue
            index, value = ref.index, graph.values[ref.index]
            if value.kind == "param":
                amount = NOTHING if isinstance(grad, int) else grad
                if index not in reached:
                    reached.add(index)
                    left = plus(left, self._of_parameter(absolute(self.fqn, value.name), amount))
                continue
            storage = gradients.of[made[grad]] if isinstance(grad, int) else gradients.make(grad)
            if not isinstance(grad, int):
                fresh[storage] = grad
                self.now = plus(self.now, grad)
            if index not in gradients.of:
                gradients.put(index, storage)
            else:
                self._accumulate(index, storage, gradients)
        for storage, amount in fresh.items():
            if not gradients.users[storage]:
                self.now = minus(self.now, amount)
        return left

    def _hold(self, position: int, gradients: Gradients, seeds: Mapping[int, int]) -> None:
        """Keep the gradients that the half for parameters begins with."""
        for at in (self.joins or {}).get(position, ()):
            index = self.typed.graph.nodes[position].outputs[at]
            storage = gradients.of.get(index) if index is not None else None
            if storage is None or storage in gradients.kept:
                continue
            gradients.kept.add(storage)
            gradients.users[storage] += 1
            places = [self.results.index(seed) for seed, lies in seeds.items() if lies == storage]
            self.held_seeds.update(places)
            self.held = plus(self.held, gradients.size[storage])

    def _accumulate(self, index: int, storage: int, gradients: Gradients) -> None:
        """Add to a gradient that is there: in place where nobody else holds its storage (torch's input_buffer.cpp)."""
        there = gradients.of[index]
        if gradients.users[there] == 1 and gradients.size[there]:
            return
        amount = gradients.size[there] or gradients.size[storage]
        total = gradients.make(amount)
        self.now = plus(self.now, amount)
        self._note(quiet=False)
        self.now = minus(self.now, gradients.drop(index))
        gradients.put(index, total)

    def _of_parameter(self, name: str, amount: Amount) -> Amount:
        """What a parameter's gradient leaves: it is added to one that is there where microbatches accumulate."""
        if self.setting.adds:
            return NOTHING
        if self.setting.stored(name):
            return as_kind(GATHERED, amount)
        return as_kind(GRADIENTS, amount) if self.setting.accumulate == 1 else NOTHING

    def _unshard(self, spans: Spans, unit: str, *, quiet: bool) -> None:
        """Gather a unit again, and begin with those that ran before it: FSDPParamGroup.pre_backward."""
        held = self.setting.units[unit]
        if unit not in self.gathered:
            if unit in self.ready:
                self.ready.discard(unit)
            else:
                self.now = plus(self.now, held.message)
            self.gathered.add(unit)
            self.now = plus(self.now, held.whole)
            self._note(quiet=quiet)
            self.now = minus(self.now, held.message)
        self._begin(spans.before(unit, self.setting.prefetch or 1), quiet=quiet)

    def _reduce(self, unit: str, *, quiet: bool) -> Amount:
        """Free a unit and scatter its gradients: FSDPParamGroup.post_backward. What that changes for good."""
        held = self.setting.units[unit]
        self.now = minus(self.now, plus(held.whole, self.message))
        self.now, self.message = plus(self.now, held.scattered), held.scattered
        self._note(quiet=quiet)
        self.now = plus(minus(self.now, held.grads), held.shards, held.last)
        self._note(quiet=quiet)
        self.now = minus(self.now, held.last)
        if self.setting.accumulate == 1:
            return minus(held.shards, held.grads)
        self.now = minus(self.now, held.shards)
        return minus(NOTHING, held.grads)
