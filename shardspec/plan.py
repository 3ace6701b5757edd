"""The plan: what a table comes to on one mesh. Frozen values only; the runtime reads nothing else."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from shardspec.constraints import Constraint
from shardspec.layout import Layout, canonical
from shardspec.mesh import Mesh
from shardspec.moves import Move


@frozen(kw_only=True)
class ParamPlan:
    """One parameter or buffer on one rank."""

    spec: str
    rule: str
    """The pattern that claims it."""
    layout: Layout
    """As compute reads it."""
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    """What rank 0 stores; other ranks may store less where the storage is uneven."""
    dtype: str
    storage_dim: int = 0
    storage: tuple[str, ...] = ()
    """The axes that divide how it is stored, major to minor."""
    owed: tuple[str, ...] = ()
    """The axes over which its gradient is summed."""
    trained: bool = True
    buffer: bool = False
    persistent: bool = True
    first: str = ""
    """The name that the tensor goes by: another one where it is tied."""
    unit: str = ""
    stage: int = 0
    mesh_sizes: Mapping[str, int] = field(factory=dict)
    """The mesh's axes larger than one, in mesh order."""

    @property
    def placements(self) -> tuple[Any, ...]:
        """A DTensor placement for each mesh axis larger than one, in mesh order."""
        from shardspec.placement import placements_of

        return placements_of(self)


@frozen(kw_only=True)
class ActivationPlan:
    """A value at a module's boundary or a batch entry."""

    name: str
    layout: Layout
    rule: str = ""
    """The pattern that declares it; empty where the layout was inferred."""
    before: Layout | None = None
    """What was inferred, where the rule changes it."""
    dtype: str = ""
    batch_dim: int | None = None
    """The dim that the rule lays over batch axes: microbatches are cut there."""

    @property
    def floating(self) -> bool:
        """Whether a gradient can reach it."""
        return self.dtype.startswith(("float", "bfloat", "complex"))

    def microbatch(self, count: int) -> Layout:
        """The layout of one of `count` microbatches."""
        dims = list(self.layout.dims)
        assert self.batch_dim is not None, "an entry with no batch dim is not cut"
        *axes, rows = dims[self.batch_dim]
        assert isinstance(rows, int), "a batch dim ends in its local rows"
        dims[self.batch_dim] = canonical((*axes, rows // count))
        return Layout(tuple(dims))


@frozen(kw_only=True)
class Collective:
    """Collectives of one kind at one place, over a step.

    `bytes` is the length of one message: of the whole that a gather makes or a scatter takes, of the tensor
    for an all-reduce or an all-to-all. `count` says how many such messages a step sends.
    """

    kind: str
    axes: tuple[str, ...]
    where: str
    phase: str
    """"forward", "backward" or "step"."""
    count: int
    bytes: int
    why: str = ""
    """The rule, or what it is for."""
    stage: int | None = None
    """The stage of a pipeline whose ranks make it; None: all do."""
    expected: bool = False
    """Whether `bytes` is what is expected: the message's length hangs on what a router chooses."""

    @property
    def total_bytes(self) -> int:
        return self.count * self.bytes


@frozen(kw_only=True)
class PointPlan:
    """What the runtime does at a declared point, forward and backward."""

    name: str
    forward: tuple[Move, ...] = ()
    backward: tuple[Move, ...] = ()


@frozen(kw_only=True)
class Substitution:
    """The n-th call of `function` while module `path` runs: a call whose local form is another one."""

    path: str
    function: str
    ordinal: int = 0
    inert: bool = False
    """The call is as it is; it is listed so that the others keep their count."""
    axes: tuple[str, ...] = ()
    """The axes over which the vocabulary is split."""
    size: int = 0
    """The global size of the vocabulary."""
    layout: Layout | None = None
    """Of what random numbers are drawn for, whose global index keys them."""
    strategy: str = ""
    """How attention reads a sequence that is split over cp."""
    balanced: bool = False
    """Whether cp lies head and tail."""


@frozen(kw_only=True)
class ExpertsPlan:
    """How an experts module runs on a rank."""

    name: str
    count: int
    """Experts over all ranks."""
    tokens: Layout
    """Of the ids: tokens, and the choices of each."""
    features: int
    exchanged: bool
    """Whether its experts are laid over ep, so that rows travel."""
    capacity: int = 0
    """The most assignments that an expert takes of a microbatch; 0: all."""
    balanced: bool = False
    """Whether the tokens of a sequence lie head and tail over cp."""
    hidden_axes: tuple[str, ...] = ()
    """The axes over which it sums the gradient of the rows that enter it."""
    weights_axes: tuple[str, ...] = ()
    """Likewise of their weights."""


@frozen(kw_only=True)
class UnitPlan:
    """Modules that are gathered together, and the parameters that they hold."""

    name: str
    modules: tuple[str, ...]
    params: tuple[str, ...]


@frozen(kw_only=True)
class LossPlan:
    """How the loss and its weight are summed."""

    sum_axes: tuple[str, ...] = ()
    weight_axes: tuple[str, ...] = ()
    number: bool = False
    """Whether the weight is a Python number."""
    beside: int = 0
    """How many other numbers are summed with them: what a step tells of experts."""


@frozen(kw_only=True)
class StagePlan:
    """One stage of a pipeline: what its ranks run of the model, and what they are given to run it."""

    index: int
    rank: int
    """The place on pp of the ranks that run it."""
    layers: tuple[str, ...]
    params: tuple[str, ...]
    """First names of the parameters and buffers that it holds; a tied one may have several homes."""
    names: tuple[str, ...]
    """The names under which its modules read them: of a tied one some."""
    cost: int = 0
    """Operations of a microbatch's forward over all its ranks, and parameter elements that it reads."""
    hollow: tuple[ActivationPlan, ...] = ()
    """The modules that come before its first layer and compute on other stages: what they return in their place; of
    one that returns several tensors each, under `layers.0`, `layers.0:out.1` and so on."""
    dense: bool = False
    """Whether what stands for them is written to, and needs a number for each element."""
    receives: ActivationPlan | None = None
    """What enters its first layer, of which every rank sends and receives its own part; None on the first stage."""
    beside: tuple[ActivationPlan, ...] = ()
    """The other arguments of its first layer that an earlier stage made, as `layers.2:in.aux`."""

    @property
    def crossing(self) -> tuple[ActivationPlan, ...]:
        """All that crosses into it."""
        return () if self.receives is None else (self.receives, *self.beside)


@frozen(kw_only=True)
class PipelinePlan:
    """How layers lie over pp."""

    schedule: str
    degree: int
    microbatches: int
    stages: tuple[StagePlan, ...]

    def on(self, rank: int) -> tuple[StagePlan, ...]:
        """The stages that the ranks at a place on pp run."""
        return tuple(stage for stage in self.stages if stage.rank == rank)

    def homes(self, first: str) -> tuple[int, ...]:
        """The places on pp where a parameter lies."""
        return tuple(sorted({stage.rank for stage in self.stages if first in stage.params}))


@frozen(kw_only=True, slots=False)
class Plan:
    """A table, proved right for a model, on one mesh.

    What a plan says of each layer is written out when it is first asked for: the check itself does not need it.
    """

    mesh: Mesh
    params: Mapping[str, ParamPlan]
    activations: Mapping[str, ActivationPlan]
    collectives: tuple[Collective, ...]
    units: tuple[UnitPlan, ...]
    points: Mapping[str, PointPlan]
    substitutions: tuple[Substitution, ...] = ()
    entries: Mapping[str, ActivationPlan] = field(factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(factory=dict)
    """Module -> attribute -> its local value."""
    loss: LossPlan | None = None
    output: tuple[Layout, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    """What the sizes of the mesh's axes must divide, for a mesh with the same axes larger than one."""
    last_unit: str = ""
    """The unit that runs last, which stays gathered until its backward."""
    pipeline: PipelinePlan | None = None
    experts: Mapping[str, ExpertsPlan] = field(factory=dict)
    """FQN -> how an experts module runs."""
    balanced: bool = False
    """Whether the sequence lies head and tail over cp (`shardspec.sequence`)."""
    legal: Any = field(default=None, eq=False, repr=False)
    """Checks another mesh; absent from a plan that was read from a file."""

    counted: Any = field(default=None, eq=False, repr=False)
    """What a step holds on a rank, as `shardspec.amounts.Usage`, or what counts it when it is asked for."""

    @classmethod
    def deferred(cls, mesh: Mesh, legal: Callable[[int], tuple[Mesh, ...]], write: Callable[[], "Plan"]) -> "Plan":
        """A plan that is proved and whose rows `write` gives when one is asked for."""
        plan = cls.__new__(cls)
        plan.__dict__.update(mesh=mesh, legal=legal, _write=write)
        return plan

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            write = self.__dict__.get("_write")
            if write is None:
                raise AttributeError(f"a plan has no attribute {name!r}")
            self.__dict__.update({**write().__dict__, "legal": self.legal, "_write": None})
            return getattr(self, name)

    def __str__(self) -> str:
        from shardspec.report import render

        return render(self)

    @cached_property
    def usage(self) -> Any:
        """What a step holds on a rank before an optimizer's state; None where nothing tells."""
        return self.counted() if callable(self.counted) else self.counted

    def memory(self, optimizer: Any = "adamw", *, stage: int | None = None) -> Any:
        """The bytes on the rank that holds the most: kind -> sympy expression in the sizes of the axes.

        The expressions hold for meshes with the same axes larger than one; `.at(mesh)` evaluates them, `.total` is
        the most at any one moment of a step, `.resident` what lies there between steps.

        Args:
            optimizer: "adamw", "sgd" or "momentum"; an optimizer or any pair (init, update); None for no state.
            stage: a pipeline stage; the fullest one where it is None.

        Raises:
            ShardingError: SS401 for what is no optimizer, or a stage that there is not.
        """
        from shardspec.memory import memory

        return memory(self, optimizer, stage)

    @property
    def schedule(self) -> Any:
        """The timeline of a pipeline's step, in the costs of its stages' forwards; None where there is no pipeline.

        It is drawn with what a rank of each place on pp holds of activations at most, in bytes.
        """
        from shardspec.timeline import StageCosts, timeline

        if self.pipeline is None:
            return None
        costs = StageCosts.of_products([stage.cost for stage in self.pipeline.stages])
        found = self.pipeline
        made = timeline(found.schedule, found.degree, found.microbatches, len(found.stages) // found.degree, costs)
        return made if self.usage is None else evolve(made, kept=self.usage.most("activations", self.mesh.shape))

    @property
    def local_calls(self) -> dict[str, dict[tuple[str, int], Substitution]]:
        """Module -> (function, n-th call) -> its local form."""
        calls: dict[str, dict[tuple[str, int], Substitution]] = {}
        for entry in self.substitutions:
            calls.setdefault(entry.path, {})[(entry.function, entry.ordinal)] = entry
        return calls

    @property
    def hash(self) -> str:
        """A digest that two plans share if they run the same program."""
        from shardspec.artifact import write_plan

        return hashlib.sha256(write_plan(self, usage=False).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The plan as JSON, with a version; equal plans are equal texts."""
        from shardspec.artifact import write_plan

        return write_plan(self)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: for another version, or text that is no plan.
        """
        from shardspec.artifact import read_plan

        return read_plan(text)

    def to_html(self) -> str:
        """The plan as a page of its own, with a picture of the mesh and of each tensor's shards."""
        from shardspec.page import page

        return page(self)

    def diff(self, other: "Plan") -> str:
        """What moves from this plan to another, and what it costs; empty where they are equal.

        Raises:
            TypeError: for what is no plan.
        """
        from shardspec.difference import difference

        return difference(self, other)

    def legal_meshes(self, world: int) -> tuple[Mesh, ...]:
        """Every mesh of `world` ranks, over the axes that the table names, that passes the check.

        Meshes with pp are among them where the table has `pipeline=`: those that pass with the policy's schedule and
        microbatches.

        Raises:
            ValueError: for a plan that was read from a file, which no longer knows its model.
        """
        if self.legal is None:
            raise ValueError("this plan was read from a file: compile the table again to ask for other meshes")
        return self.legal(world)
