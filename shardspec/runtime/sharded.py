"""`ss.shard`: a model with a plan, on this rank."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from shardspec.arguments import as_model, check_arguments, check_batch
from shardspec.batch import LocalBatch, batch_key, check_order, check_rows, describe
from shardspec.compiler import Compiler, settle
from shardspec.diagnostics import Diagnostic, ShardingError, calling_line, refuse
from shardspec.mesh import BATCH_AXES, Mesh, degree
from shardspec.pipelining import microbatch_count
from shardspec.placement import local_index, stored_shape
from shardspec.plan import ActivationPlan, PipelinePlan, Plan
from shardspec.policy import Policy
from shardspec.rules.match import fold, folded
from shardspec.runtime.agreement import agree, details_of, fingerprint
from shardspec.runtime.apply import LocalModel, apply, build_source, local_part
from shardspec.runtime.arguments import as_optimizer, check_policy, check_seed, unmatched_policy
from shardspec.runtime.attach import Wiring, attach
from shardspec.runtime.experts import attach_experts
from shardspec.runtime.fabric import Fabric, check_world, connect, join_world
from shardspec.runtime.failure import Notices
from shardspec.runtime.gather import gather
from shardspec.runtime.init import NotReplayable, materialise
from shardspec.runtime.optim import Optimizer
from shardspec.runtime.pipeline import StagedModel, apply_stages
from shardspec.runtime.state import OptState, Specs, Store, TrainState
from shardspec.runtime.weights import given_name, misfits
from shardspec.sequence import AXIS
from shardspec.staging import staged_params
from shardspec.survey import Model, survey
from shardspec.torch_private import default_store, local_of, make_spec

LossFn = Callable[[Any, dict[str, Any]], tuple[Any, Any]]
Batch = Mapping[str, Any]


class Sharded:
    """A model laid over a mesh. `plan` is None until a batch is known, where none was given."""

    def __init__(self, model: Model, rules: Any, mesh: Mesh, inputs: Batch | None, policy: Policy) -> None:
        self.mesh, self.policy = mesh, policy
        self.plan: Plan | None = None
        world = join_world()
        self.compiler = agree(world, "the plan", lambda: self._compile(model, rules, inputs, world), self._details)
        self.fabric: Fabric = connect(mesh)
        own, self.source = build_source(model)
        self.sequenced = {name: buffer for name, buffer in own.named_buffers() if self._is_sequenced(name)}
        """The buffers that lie over cp, whole: how they are cut hangs on the program."""
        self.local: LocalModel | StagedModel = self._apply(own)
        self.specs: Specs = self._specs()
        self.buffers: dict[str, Tensor] = self.local.held_buffers()
        """What persistent buffers are in a new state."""
        self.optimizer: Optimizer | None = None
        """What the last state was made with."""
        self.wiring = Wiring(self.fabric)
        self.notices = Notices.of_world(default_store() if world > 1 else None, self.fabric.rank, world)
        self.programs: dict[Any, Plan] = {}
        self._cut: dict[tuple[str, bool], Tensor] = {}
        """(buffer over cp, whether head and tail) -> this rank's part."""
        self._hooked: dict[int, set[tuple[str, str]]] = {}
        self._entries: dict[Any, tuple[dict[str, ActivationPlan], bool]] = {}
        """Shapes of a global batch -> its entries, and whether the sequence lies head and tail."""

    def _apply(self, module: nn.Module) -> LocalModel | StagedModel:
        """This rank's own, of a module of ours; every rank must call it."""
        if self.pipeline is None:
            return apply(module, self.params, self.units, self.attributes, self.fabric, self.policy)
        self.fabric.reserve_homes(homes for homes in map(self.pipeline.homes, self.params) if len(homes) > 1)
        return apply_stages(module, self.pipeline, self.params, self.units, self.attributes, self.fabric, self.policy)

    @property
    def module(self) -> nn.Module:
        """This rank's own module; its parameters are those of the last step."""
        return self.local.module

    @property
    def key(self) -> str:
        """What two shardings share if a state of the one fits the other."""
        placed = sorted(
            (name, str(plan.layout), plan.storage, plan.storage_dim, plan.stage) for name, plan in self.params.items()
        )
        return f"{self.mesh}:{hash(tuple(map(str, placed))) & 0xFFFFFFFF:08x}"

    def _compile(
        self, model: Model, rules: Any, inputs: Batch | None, world: int
    ) -> tuple[Compiler, Mapping[str, str]]:
        """Check everything that can be before a device is touched; and what must be the same on every rank."""
        check_arguments(rules, self.mesh, inputs)
        compiler = Compiler(survey(as_model(model)), rules, self.policy)
        self.params, self.units, self.attributes = compiler.static(self.mesh)
        if inputs is not None:
            check_batch(inputs)
            compiler.entries(self.mesh, inputs)
            self.plan = compiler.plan(self.mesh, inputs)
        elif self.mesh["pp"] > 1:
            refuse(
                "SS401",
                f"pp={self.mesh['pp']} and no inputs",
                why="which parameters lie on which stage is decided on the recorded forward, before any is made",
                locations=(calling_line(),),
                advice=("give ss.shard(..., inputs) a global batch, or its shapes on meta",),
            )
        self.pipeline = self.plan.pipeline if self.plan is not None and self.mesh["pp"] > 1 else None
        if self.pipeline is not None:
            self.params = staged_params(self.params, self.pipeline)
        settle(unmatched_policy(self.policy, self.units))
        check_world(self.mesh, world)
        if world == 1:
            return compiler, {}
        placed = "; ".join(sorted(f"{name}: {plan}" for name, plan in self.params.items()))
        values = [*model.named_parameters(), *model.named_buffers()] if isinstance(model, nn.Module) else ()
        return compiler, {
            "mesh": str(self.mesh),
            "policy": str(self.policy),
            "plan": self.plan.hash if self.plan is not None else hashlib.sha256(placed.encode()).hexdigest()[:16],
            "weights": fingerprint(values),
        }

    def _details(self, _: Any) -> dict[str, str]:
        return {"mesh": str(self.mesh), "policy": str(self.policy)} | details_of(self.params, self.plan)

    def _specs(self) -> dict[str, Any]:
        mesh = self.fabric.state_mesh
        specs: dict[str, Any] = {}
        for name, plan in self.params.items():
            placements = plan.placements or placements_of_one(mesh)
            specs[name] = make_spec(mesh, placements, plan.shape, getattr(torch, plan.dtype))
        return specs

    # Programs.

    def program(self, batch: Batch, loss_fn: LossFn | None, *, training: bool | None = None) -> Plan:
        """The plan for a shape of local batch and a loss; typed when first met, before anything runs."""
        check_batch(batch)
        key = (batch_key(batch), loss_fn, training)
        found = self.programs.get(key)
        if found is None:

            def typed() -> tuple[Plan, Mapping[str, str]]:
                whole = self.compiler.global_shapes(self.mesh, batch)
                self.compiler.entries(self.mesh, whole)
                plan = self.compiler.plan(self.mesh, whole, loss_fn, training=training)
                check_stages(self.pipeline, plan.pipeline if self.pipeline is not None else None)
                return plan, {"plan": plan.hash}

            try:
                # Where a program is known already, the others may be running it and not come here.
                meet = functools.partial(self.notices.meet, describe(batch)) if self.programs else None
                found = agree(self.mesh.world, "the batch", typed, lambda plan: details_of(plan.params, plan), meet)
            except ShardingError as error:
                if self.programs:
                    self.notices.tell(str(error))
                raise
            self.programs[key] = found
            if self.plan is None:
                self.plan = found
            self._hook(found)
        if self.mesh[AXIS] > 1:
            check_order(batch, balanced=found.balanced)
        return found

    def _hook(self, plan: Plan) -> None:
        self.fabric.reserve(families_of(plan))
        compiled = bool(self.policy.compile)
        if isinstance(self.local, StagedModel):
            for index, stage in self.local.stages.items():
                done, foreign = self._hooked.setdefault(index, set()), self.local.foreign[index]
                attach(stage.local.module, self.wiring, plan.points, plan.substitutions, done, foreign)
                attach_experts(stage.local.module, self.wiring, plan.experts, done, foreign, compiled=compiled)
            return
        done = self._hooked.setdefault(0, set())
        attach(self.module, self.wiring, plan.points, plan.substitutions, done)
        attach_experts(self.module, self.wiring, plan.experts, done, compiled=compiled)
        for unit in self.units:
            if unit.modules and unit.name == plan.last_unit:
                child = self.module.get_submodule(unit.modules[0])
                if isinstance(child, FSDPModule):
                    child.set_reshard_after_forward(False, recurse=False)

    def activate(self, plan: Plan) -> None:
        """Have the hooks follow a plan."""
        self.wiring.points, self.wiring.experts = plan.points, plan.experts
        self.wiring.routed.clear()
        self.wiring.substitutions = plan.local_calls
        for name, whole in self.sequenced.items():
            key = (name, plan.balanced)
            if key not in self._cut:
                layout = self.params[name].layout
                part = local_part(whole, layout, self.fabric.coordinate, self.mesh, balanced=plan.balanced)
                self._cut[key] = part.to(self.fabric.device)
            path, _, leaf = name.rpartition(".")
            for module in self._modules():
                module.get_submodule(path)._buffers[leaf] = self._cut[key]

    def _is_sequenced(self, name: str) -> bool:
        return AXIS in self.params[name].layout.sharded

    def _modules(self) -> list[nn.Module]:
        """This rank's modules: one, or one for each stage."""
        if isinstance(self.local, StagedModel):
            return [stage.local.module for stage in self.local.stages.values()]
        return [self.module]

    # Batches.

    def local_batch(self, batch: Batch) -> dict[str, Any]:
        """This rank's part of a global batch, on its device.

        With `accumulate=M` a rank takes its part of each microbatch: rows [iB/M, (i+1)B/M) of the whole.

        Raises:
            ShardingError: SS401, SS301 for entries that the table does not know or the mesh does not divide.
        """
        check_batch(batch)
        key = batch_key(batch)
        if key not in self._entries:
            self._entries[key] = self.compiler.entries(self.mesh, batch), self.compiler.balanced(self.mesh, batch)
        entries, balanced = self._entries[key]
        parts = LocalBatch()
        parts.balanced = balanced
        for name, item in batch.items():
            if not isinstance(item, Tensor):
                parts[name] = item
                continue
            part = self._local_entry(entries[name], item, balanced=balanced)
            parts[name] = part.to(self.fabric.device, non_blocking=True)
        return parts

    def _local_entry(self, entry: ActivationPlan, item: Tensor, *, balanced: bool) -> Tensor:
        count = self.count
        place, mesh = self.fabric.coordinate, self.mesh
        if count == 1 or entry.batch_dim is None:
            return local_part(item, entry.layout, place, mesh, balanced=balanced)
        check_rows(item.shape[entry.batch_dim], count, degree(mesh, BATCH_AXES), entry.name)
        layout = entry.microbatch(count)
        return torch.cat(
            [local_part(chunk, layout, place, mesh, balanced=balanced) for chunk in item.chunk(count, entry.batch_dim)],
            entry.batch_dim,
        )

    def microbatches(self, plan: Plan, batch: Batch) -> list[dict[str, Any]]:
        """A local batch as the microbatches that it holds."""
        count = self.count
        if count == 1:
            return [dict(batch)]
        parts: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, item in batch.items():
            dim = plan.entries[name].batch_dim if isinstance(item, Tensor) else None
            chunks = [item] * count if dim is None else item.chunk(count, dim)
            for part, chunk in zip(parts, chunks, strict=True):
                part[name] = chunk
        return parts

    @property
    def count(self) -> int:
        """How many microbatches a step has."""
        return microbatch_count(self.policy, self.mesh)

    # States.

    def init(
        self, optimizer: Optimizer, seed: int = 0, init: Mapping[str, Callable[[Tensor], Any]] | None = None
    ) -> TrainState:
        """A state with initial values: bitwise the same on every mesh.

        Args:
            optimizer: `ss.adamw(...)`, or any pair of pure functions.
            seed: of the weights and of the run's randomness.
            init: regex -> function that fills a parameter (whole, on the CPU, in place), for those whose
                constructor cannot be replayed.

        Raises:
            ShardingError: SS406 for a parameter or buffer that nothing gives a value, SS203 for a pattern of `init`
                that matches nothing, SS405 for a seed that is none.
        """
        check_seed(seed)
        names = [name for name, plan in self.params.items() if plan.first == name and not plan.buffer]

        def made() -> tuple[dict[str, Tensor], Mapping[str, str]]:
            locals_: dict[str, Tensor] = {}
            without: dict[str, str] = {}
            problems: list[Diagnostic] = [
                Diagnostic(code="SS203", what=f'init: r"{pattern}" matches no parameter')
                for pattern in init or {}
                if not any(re.fullmatch(pattern, name) for name in names)
            ]
            for name in self.local.params:
                try:
                    locals_[name] = self._initial(name, seed, init or {})
                except (NotReplayable, LookupError) as error:
                    without[name] = str(error.args[-1] if isinstance(error, LookupError) else error)
            settle([*problems, *without_values(without | self.hollow_buffers())])
            return locals_, {"seed": str(seed)}

        # Under pp a stage's mistakes are its own ranks' alone: the others are told.
        return self.state(agree(self.mesh.world, "the state", made), optimizer, seed)

    def _initial(self, name: str, seed: int, init: Mapping[str, Callable[[Tensor], Any]]) -> Tensor:
        plan = self.params[name]
        dtype = getattr(torch, plan.dtype)
        place, device = self.fabric.coordinate, self.fabric.device
        target = self.local.empty(name, stored_shape(plan, place, self.mesh), dtype, device)
        index = local_index(plan, place, self.mesh)
        given = next((fill for pattern, fill in init.items() if re.fullmatch(pattern, name)), None)
        if given is not None:
            whole = torch.empty(plan.shape, dtype=dtype)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(_seed_of(seed, name))
                given(whole)
            value = take(whole, index)
        elif name in self.source.tensors:
            value = take(self.source.tensors[name], index)
        elif name in self.source.recipes:
            value = materialise(self.source.recipes[name], name, seed, plan.shape, index, dtype, device)
        else:
            raise LookupError("the model was given on meta, so that nothing says what its values are")
        with torch.no_grad():
            target.copy_(value)
        return target

    def hollow_buffers(self) -> dict[str, str]:
        hollow = [name for name, buffer in self.module.named_buffers() if buffer.device.type == "meta"]
        return dict.fromkeys(hollow, "the buffer is on meta, and a buffer is not initialised")

    def load(self, state_dict: Mapping[str, Tensor], optimizer: Optimizer | None = None, seed: int = 0) -> TrainState:
        """A state with given weights: whole tensors (or DTensors) by name; `init` uses them from then on.

        Raises:
            ShardingError: SS404 that lists every missing, surplus or misshapen entry; SS403 where ranks give
                different weights, SS405 for a seed that is none.
        """
        check_seed(seed)

        def fits() -> tuple[None, Mapping[str, str]]:
            settle(misfits(state_dict, self.params, calling_line()))
            plain = ((name, item) for name, item in state_dict.items() if not isinstance(item, DTensor))
            return None, {"seed": str(seed), "weights": fingerprint(plain) if self.mesh.world > 1 else ""}

        agree(self.mesh.world, "the state dict", fits)
        for name in self.local.params:
            self.source.tensors[name] = full(state_dict[given_name(name, state_dict, self.params)]).detach()
        for name in self.buffers:
            whole = full(state_dict[given_name(name, state_dict, self.params)])
            part = local_part(whole, self.params[name].layout, self.fabric.coordinate, self.mesh)
            self.buffers[name] = part.detach().to(self.fabric.device, copy=True)
        self.local.lend_buffers(self.buffers)
        settle(without_values(self.hollow_buffers()))
        locals_ = {name: self._initial(name, seed, {}) for name in self.local.params}
        return self.state(locals_, optimizer, seed)

    def state(self, locals_: dict[str, Tensor], optimizer: Optimizer | None, seed: int) -> TrainState:
        """A state of step 0 over local tensors."""
        return TrainState(
            step=0,
            rng=seed,
            home=self,
            params=Store(locals_, self.specs),
            buffers=Store(dict(self.buffers), self.specs),
            opt=None if optimizer is None else self.opt_state(locals_, optimizer),
        )

    def opt_state(self, locals_: Mapping[str, Tensor], optimizer: Optimizer) -> OptState:
        """An optimizer's first state over local tensors.

        Raises:
            ShardingError: SS407 for what is no optimizer, or one whose groups do not fit the model's names.
        """
        optimizer = as_optimizer(optimizer)
        trained = [
            name for name, plan in self.params.items() if plan.first == name and plan.trained and not plan.buffer
        ]
        if optimizer.check is not None:
            try:
                optimizer.check(trained)
            except ValueError as error:
                refuse("SS407", str(error), why=f"the model trains {', '.join(dict.fromkeys(map(fold, trained)))}")
        self.optimizer = optimizer
        raw = optimizer.init({name: local for name, local in locals_.items() if self.params[name].trained})
        shapes = {name: tuple(local.shape) for name, local in locals_.items()}
        return OptState(optimizer, raw, self.specs, shapes)

    def state_dict(self, state: TrainState) -> dict[str, Tensor]:
        """FQN -> whole tensor on the CPU, for parameters (under all their names) and persistent buffers.

        Every rank must call it.
        """
        self.check_state(state)
        views = {**state.params, **state.buffers}
        whole = {name: full(view) for name, view in views.items()}
        if self.pipeline is not None:
            whole = self._from_all_stages(whole)
        whole = {name: tensor.cpu() for name, tensor in whole.items()}
        return {
            name: whole[plan.first]
            for name, plan in self.params.items()
            if plan.first in whole and (plan.persistent or not plan.buffer)
        }

    def elsewhere(self, name: str) -> str:
        """Where a parameter lies that does not lie on this rank; nothing where none has the name."""
        plan = self.params.get(name)
        if plan is None or self.pipeline is None:
            return ""
        if plan.first != name:
            return f"{name} is {plan.first}, under whose name it lies"
        homes = " and ".join(f"pp={place}" for place in self.pipeline.homes(name))
        return (
            f"{name} lies on stage {plan.stage}, on the ranks of {homes}, and this one is on "
            f"pp={self.fabric.coordinate['pp']}; sharded.state_dict(state) gives all on every rank"
        )

    def _from_all_stages(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each stage holds, on the ranks of all."""
        assert self.pipeline is not None, "there are stages"
        group, found = self.fabric.group(("pp",)), dict[str, Tensor]()
        for name, plan in self.params.items():
            if plan.first != name or not (plan.persistent or not plan.buffer):
                continue
            home = self.pipeline.homes(name)[0]
            if self.fabric.coordinate["pp"] == home:
                found[name] = whole[name].contiguous()
            else:
                found[name] = torch.empty(plan.shape, dtype=getattr(torch, plan.dtype), device=self.fabric.device)
            dist.broadcast(found[name], dist.get_global_rank(group, home), group=group)
        return found

    def check_state(self, state: TrainState) -> None:
        """SS407 for what is no state, or one that another sharding made.

        Raises:
            DonatedError: for a state that a step has consumed.
        """
        if not isinstance(state, TrainState):
            refuse(
                "SS407",
                f"a step takes (state, batch), and was given a {type(state).__name__} for a state",
                why="a state is what sharded.init, sharded.load or a step returns",
            )
        state.live()
        if state.home is not self and state.home.key != self.key:
            refuse(
                "SS407",
                "the state belongs to another plan",
                why=f"it was made for the mesh {state.home.mesh or 'of one rank'}, this plan is for "
                f"{self.mesh or 'one rank'}",
                advice=("init or load a state with this sharded model",),
            )

    def locals_of(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The local tensors of a dict of parameters, foreign ones too.

        Raises:
            ShardingError: SS407 for a missing or unknown name, or one that lies otherwise than the plan says.
        """
        surplus = [name for name in params if name not in self.local.params]
        missing = [name for name in self.local.params if name not in params]
        if surplus or missing:
            refuse(
                "SS407",
                f"the parameters have no {missing[0]}" if missing else f"{surplus[0]} is no parameter of this plan",
                why="grad_fn takes a tensor for every parameter, and nothing else",
            )
        return {name: self.local_like(name, params[name], "parameter") for name in self.local.params}

    def local_like(self, name: str, tensor: Tensor, what: str) -> Tensor:
        """The local part of a tensor that lies as the plan says of the parameter of that name; else SS407."""
        plan, spec = self.params[name], self.specs[name]
        local = local_of(tensor)
        wanted = stored_shape(plan, self.fabric.coordinate, self.mesh)
        if tuple(local.shape) != wanted:
            why = f"this rank's part has shape {tuple(local.shape)}, the plan's {wanted}"
        elif str(local.dtype) != f"torch.{plan.dtype}":
            why = f"it is {local.dtype}, the plan's is torch.{plan.dtype}"
        elif isinstance(tensor, DTensor) and tuple(tensor.placements) != tuple(spec.placements):
            why = f"its placements are {tensor.placements}, the plan's {spec.placements}"
        else:
            return local
        return refuse("SS407", f"the {what} {name} does not fit this plan", why=why)

    def copy_locals(self, locals_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values in storage of their own."""
        copied: dict[str, Tensor] = {}
        for name, local in locals_.items():
            copied[name] = self.local.empty(name, tuple(local.shape), local.dtype, local.device)
            copied[name].copy_(local)
        return copied

    def value_and_grad(self, loss_fn: LossFn) -> Callable[..., Any]:
        """`grad_fn(params, batch, rng=0) -> ((loss, metrics), grads)`; gradients are global and normalised."""
        from shardspec.runtime.step import value_and_grad

        return value_and_grad(self, loss_fn)


def placements_of_one(mesh: Any) -> tuple[Any, ...]:
    """Replicated on the one dim of the mesh of one rank."""
    return (Replicate(),) * mesh.ndim


def check_stages(one: PipelinePlan | None, two: PipelinePlan | None) -> None:
    """SS331 for a batch, loss or mode with which parameters would lie on other stages."""
    placed = [[(stage.layers, stage.params) for stage in plan.stages] if plan else [] for plan in (one, two)]
    if placed[0] != placed[1]:
        refuse(
            "SS331",
            "with this batch the forward reads its parameters on other stages than with the first one",
            why="a parameter lies where it was first laid",
            advice=("give ss.shard a batch with which the model runs as in a step",),
        )


def families_of(plan: Plan) -> list[tuple[str, ...]]:
    """The sets of axes for which a plan needs a process group of its own."""
    return [row.axes for row in plan.collectives if len(row.axes) > 1]


def take(whole: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """The elements at the given indices of each dim."""
    for dim, rows in enumerate(index):
        if len(rows) != whole.shape[dim]:
            whole = whole.index_select(dim, rows.to(whole.device))
    return whole


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big")


def without_values(found: Mapping[str, str]) -> Iterator[Diagnostic]:
    """SS406 for names without values, once a reason."""
    for why in dict.fromkeys(found.values()):
        names = [name for name, reason in found.items() if reason == why]
        kinds = folded(names)
        yield Diagnostic(
            code="SS406",
            what=f"{names[0]} has no value" if len(names) == 1 else f"{len(names)} tensors have no value",
            why=why,
            matches=", ".join(kinds) if len(names) > 1 else "",
            advice=(
                "give ss.shard the function that builds the model",
                "give values with sharded.load(state_dict), or sharded.init(..., init={regex: function})",
            ),
        )


def shard(
    model: Model, rules: Any, mesh: Mesh, inputs: Batch | None = None, *, policy: Policy | None = None
) -> Sharded:
    """Check a table and lay a copy of the model over the mesh's devices; the model is left as it was.

    Args:
        model: a module, or a function that builds one (then its initial values can be made shard by shard).
        inputs: a global batch, or only its shapes; without it the typing waits for the first batch.

        policy: how it is run, where the defaults are not what is wanted.

    Raises:
        ShardingError: for a table that does not fit, a world of another size, or ranks that disagree.
    """
    check_policy(policy)
    return Sharded(model, rules, mesh, inputs, policy or Policy())


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of a state, on every rank; all ranks must call it.

    Shards of unequal length and strided ones are put together from their placements alone.
    """
    return gather(tensor)
