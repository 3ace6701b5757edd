"""Build a rank's own model: local parameters, FSDP2 units, real buffers. The model given is left as it was."""

import copy
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from shardspec.layout import Layout, dim_axes
from shardspec.mesh import Mesh
from shardspec.placement import digits_index
from shardspec.plan import ParamPlan, UnitPlan
from shardspec.policy import Policy, chosen
from shardspec.runtime.attach import Read, attach_read
from shardspec.runtime.buffers import Remat
from shardspec.runtime.fabric import Fabric, storage_mesh
from shardspec.runtime.init import Recipe, record
from shardspec.runtime.prefetch import prefetch
from shardspec.torch_private import (
    bind_fsdp,
    bound_as_is,
    empty_padded,
    fsdp_mesh_info,
    fsdp_records,
    local_of,
    materialise_fsdp,
    placed_over,
    reset_fsdp,
)

HOST = torch.device("cpu")


@define(eq=False)
class Source:
    """Where initial values come from: recipes, the given module's own tensors, or a loaded state dict."""

    recipes: dict[str, Recipe] = field(factory=dict)
    tensors: dict[str, Tensor] = field(factory=dict)


@define(eq=False)
class LocalModel:
    """A rank's model, and the places where its parameters are put."""

    module: nn.Module
    params: dict[str, ParamPlan]
    """First name -> plan, for parameters."""
    slots: dict[str, nn.Parameter] = field(factory=dict)
    """First name -> the Parameter, for those that FSDP2 does not manage."""
    records: dict[str, Any] = field(factory=dict)
    """First name -> FSDP2's record, for the others."""
    bound: dict[str, Tensor] = field(factory=dict)
    copied: set[str] = field(factory=set)
    """The names whose rows FSDP2 needed padded, in a copy."""
    buffers: dict[str, list[tuple[nn.Module, str]]] = field(factory=dict)
    """First name of a persistent buffer -> where it is put."""
    written: dict[bool, set[str]] = field(factory=dict)
    """Training mode -> the persistent buffers that forward writes, once one has run."""
    versions: dict[str, tuple[Tensor, int]] = field(factory=dict)
    hosted: set[str] = field(factory=set)
    """The names of what lies in the host's memory."""

    def bind(self, locals_: Mapping[str, Tensor]) -> None:
        """Have the model compute with these local tensors."""
        for name, local in locals_.items():
            if self.bound.get(name) is local and name not in self.copied:
                continue
            if name in self.records:
                bind_fsdp(self.records[name], local)
                (self.copied.discard if bound_as_is(self.records[name], local) else self.copied.add)(name)
            else:
                self.slots[name].data = local
            self.bound[name] = local

    def lend_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Have forward read a state's persistent buffers, and write to copies: the state stays as it was."""
        writes = self.written.get(self.module.training)
        for name, places in self.buffers.items():
            lent = buffers[name].clone() if writes is None or name in writes else buffers[name]
            self.versions[name] = (lent, lent._version)
            for module, leaf in places:
                module._buffers[leaf] = lent

    def held_buffers(self) -> dict[str, Tensor]:
        """The persistent buffers as they lie in the module."""
        held = {name: places[0][0]._buffers[places[0][1]] for name, places in self.buffers.items()}
        return {name: buffer for name, buffer in held.items() if buffer is not None}

    def take_buffers(self) -> dict[str, Tensor]:
        """The persistent buffers after a forward that they were lent to."""
        held = self.held_buffers()
        writes = self.written.setdefault(self.module.training, set())
        for name, (lent, version) in self.versions.items():
            if held[name] is not lent or lent._version != version:
                writes.add(name)
        return held

    def gradients(self) -> dict[str, Tensor]:
        """First name -> local gradient, for the trained parameters; zeros where the loss does not reach one."""
        found: dict[str, Tensor] = {}
        for name, plan in self.params.items():
            if not plan.trained:
                continue
            record = self.records.get(name)
            grad = record.sharded_param.grad if record is not None else self.slots[name].grad
            found[name] = torch.zeros_like(self.bound[name]) if grad is None else local_of(grad)
        return found

    def clear_gradients(self) -> None:
        """Forget the gradients."""
        for name in self.params:
            owner = self.records[name].sharded_param if name in self.records else self.slots[name]
            owner.grad = None

    def reset(self) -> None:
        """Be as before a step: after a forward alone, or one that raised, the next gathers anew."""
        self.clear_gradients()
        reset_fsdp(self.module)

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Storage for a rank's part of a parameter: on the device, but for what lies in the host's memory."""
        device = HOST if name in self.hosted else device
        if name in self.records:
            return empty_padded(self.records[name], shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device)


def build_source(model: nn.Module | Callable[[], nn.Module]) -> tuple[nn.Module, Source]:
    """A module of one's own with parameters on meta and buffers as they were made, and where values come from."""
    if not isinstance(model, nn.Module):
        module, recipes = record(model)
        return module, Source(recipes=recipes)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    source = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.device.type != "meta"}
    return copy.deepcopy(model, memo), Source(tensors=source)


def apply(
    module: nn.Module,
    params: Mapping[str, ParamPlan],
    units: tuple[UnitPlan, ...],
    attributes: Mapping[str, Mapping[str, int]],
    fabric: Fabric,
    policy: Policy,
    held: AbstractSet[str] | None = None,
) -> LocalModel:
    """Turn a module of our own into this rank's: the only function that changes a module.

    Args:
        held: the first names of what lies in the module, where it is a stage of a pipeline.
    """
    _localise(module, params, fabric)
    for path, named in attributes.items():
        for name, value in named.items():
            setattr(module.get_submodule(path), name, value)
    for unit in units:
        for path in unit.modules:
            _wrap(module, path, policy)
    own = {
        name: plan
        for name, plan in params.items()
        if plan.first == name and not plan.buffer and (held is None or name in held)
    }
    stored = any(plan.storage for plan in own.values())
    if stored:
        _fully_shard(module, params, units, fabric, policy)
    found = LocalModel(module, own)
    if stored:
        found.records = {params[name].first: record for name, record in fsdp_records(module).items()}
        found.hosted = {
            name for name in found.records if policy.offload and is_offloaded(params[name].unit, units, policy)
        }
        for name, record in found.records.items():
            materialise_fsdp(record, HOST if name in found.hosted else fabric.device)
    _materialise(found, params, fabric, policy)
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            plan = params[f"{path}.{name}" if path else name] if buffer is not None else None
            if plan is not None and plan.persistent:
                found.buffers.setdefault(plan.first, []).append((child, name))
    return found


def is_offloaded(unit: str, units: tuple[UnitPlan, ...], policy: Policy) -> bool:
    """Whether a policy has a unit's stored parameters lie in the host's memory."""
    modules = next((each.modules for each in units if each.name == unit), ())
    return any(chosen(policy.offload, name) for name in (unit, *modules))


def _localise(module: nn.Module, params: Mapping[str, ParamPlan], fabric: Fabric) -> None:
    """Give every parameter its compute shape, on meta, and every buffer its part, on the device."""
    made: dict[str, nn.Parameter] = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in list(child._parameters.items()):
            if tensor is None:
                continue
            plan = params[prefix + name]
            if plan.first not in made:
                local = torch.empty(plan.layout.shape, dtype=tensor.dtype, device="meta")
                made[plan.first] = nn.Parameter(local, requires_grad=tensor.requires_grad)
            child._parameters[name] = made[plan.first]
        for name, tensor in list(child._buffers.items()):
            if tensor is not None and tensor.device.type != "meta":
                part = local_part(tensor, params[prefix + name].layout, fabric.coordinate, fabric.mesh)
                child._buffers[name] = part.to(fabric.device)


def local_part(
    tensor: Tensor, layout: Layout, coordinate: Mapping[str, int], mesh: Mesh, *, balanced: bool = False
) -> Tensor:
    """A rank's part of a whole tensor.

    Args:
        balanced: cp lies head and tail.
    """
    for dim, digits in enumerate(layout.dims):
        if dim_axes(digits):
            index = digits_index(digits, coordinate, mesh, balanced=balanced)
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _wrap(module: nn.Module, path: str, policy: Policy) -> None:
    child = module.get_submodule(path)
    if chosen(policy.remat, path):
        child.forward = Remat(child, child.forward)
    if chosen(policy.compile, path):
        child.compile()


def _fully_shard(
    module: nn.Module,
    params: Mapping[str, ParamPlan],
    units: tuple[UnitPlan, ...],
    fabric: Fabric,
    policy: Policy,
) -> None:
    """FSDP2 on every unit that stores anything, the root last; gradients are sums."""
    named = dict(module.named_parameters())
    plans = {id(parameter): params[name] for name, parameter in named.items()}
    ignored = {parameter for name, parameter in named.items() if not params[name].storage}
    # Casting what enters a unit would make a mesh with storage compute what one without does not.
    precision = MixedPrecisionPolicy(
        param_dtype=policy.param_dtype, reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False
    )
    axes = next(plan.storage for plan in params.values() if plan.storage)
    others = {plan.storage for plan in params.values() if plan.storage} - {axes}
    # Expert weights are stored over fewer axes than the dense ones beside them: each family has a mesh of its own.
    infos = {other: fsdp_mesh_info(storage_mesh(fabric, other)) for other in sorted(others)}

    def place(parameter: nn.Parameter) -> Any:
        plan = plans[id(parameter)]
        return placed_over(infos.get(plan.storage), Shard(plan.storage_dim))

    common: dict[str, Any] = {
        "mesh": storage_mesh(fabric, axes),
        "shard_placement_fn": place,
        "mp_policy": precision,
        "ignored_params": ignored,
    }
    gathered: list[list[Any]] = []
    for unit in units:
        if unit.modules and any(params[name].storage for name in unit.params):
            children = [module.get_submodule(path) for path in unit.modules]
            fully_shard(
                children[0] if len(children) == 1 else children,
                reshard_after_forward=chosen(policy.reshard_after_forward, unit.name),
                offload_policy=_offload(is_offloaded(unit.name, units, policy), fabric),
                **common,
            )
            gathered.append(children)
    fully_shard(module, offload_policy=_offload(is_offloaded("", units, policy), fabric), **common)
    if policy.prefetch is not None:
        prefetch(module, gathered, policy.prefetch)
    for child in module.modules():
        if isinstance(child, FSDPModule):
            # Both are needed for a plain sum: the second alone still divides, the first alone wants PREMUL_SUM.
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)
            if hasattr(child, "set_reduce_scatter_unused_params"):
                child.set_reduce_scatter_unused_params(True)  # pyright: ignore[reportAttributeAccessIssue]


def _offload(hosted: bool, fabric: Fabric) -> OffloadPolicy:
    """FSDP2's word for where stored parameters lie; only what an accelerator copies from is pinned."""
    return CPUOffloadPolicy(pin_memory=fabric.device.type != "cpu") if hosted else OffloadPolicy()


def _materialise(found: LocalModel, params: Mapping[str, ParamPlan], fabric: Fabric, policy: Policy) -> None:
    """Storage for every parameter; those outside FSDP2 become plain parameters on the device."""
    slots: dict[str, nn.Parameter] = {}
    for path, child in found.module.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in list(child._parameters.items()):
            if tensor is None:
                continue
            plan = params[prefix + name]
            stored = plan.first in found.records
            if not stored:
                if plan.first not in slots:
                    local = torch.empty(tensor.shape, dtype=tensor.dtype, device=fabric.device)
                    slots[plan.first] = nn.Parameter(local, requires_grad=tensor.requires_grad)
                child._parameters[name] = slots[plan.first]
            _read(child, name, plan, None if stored else policy.param_dtype)
    found.slots = slots


def _read(child: nn.Module, name: str, plan: ParamPlan, param_dtype: torch.dtype | None) -> None:
    """Have compute read a share of a pending parameter, and a cast of one that FSDP2 does not cast."""
    share = 1
    for axis, _ in plan.layout.pending:
        share *= plan.mesh_sizes[axis]
    dtype = param_dtype if plan.dtype.startswith(("float", "bfloat")) else None
    if share > 1 or dtype is not None:
        attach_read(Read(child, name, share, dtype))
