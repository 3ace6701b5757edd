"""Attach a plan's points to the modules of the runtime's own copy of a model."""

import functools
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Self

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.overrides import TorchFunctionMode

from shardspec.functional import cross_entropy, name
from shardspec.layout import global_size
from shardspec.placement import digits_index
from shardspec.plan import ExpertsPlan, PointPlan, Substitution
from shardspec.runtime import context, rng
from shardspec.runtime.boundary import pass_point
from shardspec.runtime.buffers import Remat
from shardspec.runtime.fabric import Fabric
from shardspec.runtime.vocab import cross_entropy_sharded, embedding_sharded
from shardspec.twin import forward_arguments


@define(eq=False)
class Wiring:
    """What the hooks read: the points and local calls of the plan that runs now."""

    fabric: Fabric
    points: Mapping[str, PointPlan] = field(factory=dict)
    substitutions: Mapping[str, Mapping[tuple[str, int], Substitution]] = field(factory=dict)
    experts: Mapping[str, ExpertsPlan] = field(factory=dict)
    routed: dict[str, list[Tensor]] = field(factory=dict)
    """Experts module -> [E + 1] of each microbatch so far: how many of this rank's assignments asked for each expert,
    and how many were dropped."""
    rng: int = 0
    """The step's random key."""
    microbatch: int = 0
    indices: dict[Substitution, Tensor] = field(factory=dict)
    """Global indices of what random numbers are drawn for, made once for a layout."""
    active: Any = None
    """The `Local` of the module that runs now, if it has one: an outer module's leaves inner calls alone."""
    inside: set[str] = field(factory=set)
    """The modules that run under a `Local`."""

    def kept(self, entry: Substitution, shape: torch.Size, p: float, device: torch.device) -> Tensor:
        """Which elements dropout keeps: by the step's key, microbatch, call and global index, on every mesh alike."""
        key = rng.stream_key(self.rng, f"{entry.path}:{entry.function}:{entry.ordinal}", self.microbatch)
        index = self._global_index(entry, shape, device)
        return rng.uniform(key, index) >= p

    def _global_index(self, entry: Substitution, shape: torch.Size, device: torch.device) -> Tensor:
        found = self.indices.get(entry)
        if found is None or found.shape != shape or found.device != device:
            assert entry.layout is not None, "a random call knows its layout"
            mesh, place = self.fabric.mesh, self.fabric.coordinate
            found = torch.zeros((), dtype=torch.long)
            for digits in entry.layout.dims:
                rows = digits_index(digits, place, mesh, balanced=entry.balanced)
                found = found.unsqueeze(-1) * global_size(digits, mesh.shape) + rows
            self.indices[entry] = found = found.reshape(shape).to(device)
        return found

    def through(self, name: str, tensor: Any) -> Any:
        """Take a tensor through the point of that name, if it does anything."""
        point = self.points.get(name)
        if point is None or not isinstance(tensor, Tensor):
            return tensor
        return pass_point(tensor, point.forward, point.backward, self.fabric)


class Boundary(ParallelStyle):
    """A module's declared points, as a style for `parallelize_module`."""

    def __init__(self, fqn: str, wiring: Wiring, *, inputs: bool, outputs: bool) -> None:
        self.fqn, self.wiring = fqn, wiring
        self.inputs, self.outputs = inputs, outputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        del device_mesh
        if self.inputs:
            names = forward_arguments(module)
            module.register_forward_pre_hook(functools.partial(self._enter, names), with_kwargs=True)
        if self.outputs:
            # In front of the model's own hooks, which read what stands behind the point, as the check has it.
            module.register_forward_hook(self._leave, prepend=True)
        return module

    def _enter(self, names: list[str], _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        changed, first = list(args), True
        for index, arg in enumerate(args):
            if isinstance(arg, Tensor):
                label = names[index] if index < len(names) else str(index)
                changed[index] = self._input(label, arg, first)
                first = False
        named = dict(kwargs)
        for key, arg in kwargs.items():
            if isinstance(arg, Tensor):
                named[key] = self._input(key, arg, first)
                first = False
        return tuple(changed), named

    def _input(self, label: str, tensor: Tensor, first: bool) -> Tensor:
        by_name = f"{self.fqn}:in.{label}"
        key = f"{self.fqn}:in" if first and by_name not in self.wiring.points else by_name
        return self.wiring.through(key, tensor)

    def _leave(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return self.wiring.through(self.fqn, out)
        if isinstance(out, (tuple, list)):
            items, first = list(out), True
            for index, item in enumerate(items):
                if isinstance(item, Tensor):
                    items[index] = self.wiring.through(self.fqn if first else f"{self.fqn}:out.{index}", item)
                    first = False
            return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
        if isinstance(out, Mapping):
            first = True
            for key, item in list(out.items()):
                if isinstance(item, Tensor):
                    out[key] = self.wiring.through(self.fqn if first else f"{self.fqn}:out.{key}", item)  # pyright: ignore[reportIndexIssue]
                    first = False
        return out


class Local(TorchFunctionMode):
    """While one module (or the loss) runs, calls whose local form is another one are replaced by it."""

    def __init__(self, wiring: Wiring, path: str) -> None:
        super().__init__()
        self.wiring, self.path = wiring, path
        self.table = wiring.substitutions.get(path, {})
        self.counts = dict.fromkeys(LOCAL_CALLS, 0)
        self.outer: Local | None = None

    def __enter__(self) -> Self:
        self.outer, self.wiring.active = self.wiring.active, self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.wiring.active = self.outer
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.wiring.active is not self:
            return func(*args, **kwargs)
        if func is name:
            return self.wiring.through(f"{self.path}.{args[1]}" if self.path else args[1], args[0])
        found = FUNCTIONS.get(func)
        if found is None:
            return func(*args, **kwargs)
        label, local = found
        entry = self.table.get((label, self.counts[label]))
        self.counts[label] += 1
        return func(*args, **kwargs) if entry is None or entry.inert else local(entry, self.wiring, *args, **kwargs)


def _embedding(
    entry: Substitution,
    wiring: Wiring,
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    first = wiring.fabric.place(entry.axes) * weight.shape[0]
    return embedding_sharded(weight, ids, first, entry.size, padding_idx)


def _cross_entropy(
    entry: Substitution, wiring: Wiring, logits: Tensor, labels: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    first = wiring.fabric.place(entry.axes) * logits.shape[-1]
    group = wiring.fabric.group(entry.axes)
    return cross_entropy_sharded(logits, labels, first, entry.size, group, ignore_index)


def _dropout(
    entry: Substitution, wiring: Wiring, tensor: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    del training
    scaled = wiring.kept(entry, tensor.shape, p, tensor.device).to(tensor.dtype) / (1 - p) if p < 1 else 0.0
    return tensor.mul_(scaled) if inplace else tensor * scaled


def _attention(
    entry: Substitution,
    wiring: Wiring,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention over cp; or with keyed dropout: no fused kernel draws numbers by a global index, so the weights are
    made whole.

    The definition in the documentation of torch.nn.functional.scaled_dot_product_attention.
    """
    if entry.strategy:
        given = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return context.attention(entry, wiring.fabric, query, key, value, *given)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask
    weights = scores.softmax(-1)
    return _dropout(entry, wiring, weights, dropout_p) @ value


FUNCTIONS: dict[Any, tuple[str, Callable[..., Any]]] = {
    F.embedding: ("embedding", _embedding),
    cross_entropy: ("cross_entropy", _cross_entropy),
    F.dropout: ("dropout", _dropout),
    torch.dropout: ("dropout", _dropout),
    F.scaled_dot_product_attention: ("scaled_dot_product_attention", _attention),
}
"""A function that a model calls -> its name in a plan, and its local form."""

LOCAL_CALLS = tuple(dict.fromkeys(label for label, _ in FUNCTIONS.values()))


def split_points(
    points: Mapping[str, PointPlan], modules: set[str]
) -> Iterator[tuple[str, list[str], list[str], bool]]:
    """For each module with points: its FQN, its input points, its output points, and whether it has named ones."""
    found: dict[str, tuple[list[str], list[str], list[str]]] = {}
    for full in points:
        head, _, tail = full.partition(":")
        if tail.startswith("in"):
            found.setdefault(head, ([], [], []))[0].append(full)
        elif head in modules:
            found.setdefault(head, ([], [], []))[1].append(full)
        else:
            found.setdefault(head.rpartition(".")[0], ([], [], []))[2].append(full)
    for fqn, (inputs, outputs, named) in found.items():
        yield fqn, inputs, outputs, bool(named)


def attach(
    model: nn.Module,
    wiring: Wiring,
    points: Mapping[str, PointPlan],
    substitutions: tuple[Substitution, ...],
    done: set[tuple[str, str]],
    foreign: AbstractSet[str] = frozenset(),
) -> None:
    """Hook every point of a plan, and run the modules with local calls under `Local`; `done` is not done again.

    Args:
        foreign: the modules that do not run here, whose points another stage passes.
    """
    modules = {fqn for fqn, _ in model.named_modules()}
    points = {name: point for name, point in points.items() if name.partition(":")[0] not in foreign}
    styles: dict[str, ParallelStyle] = {}
    local = {entry.path for entry in substitutions if entry.path != "loss"}
    for fqn, inputs, outputs, named in split_points(points, modules):
        new_inputs = bool(inputs) and (fqn, "in") not in done
        new_outputs = bool(outputs) and (fqn, "out") not in done
        if new_inputs or new_outputs:
            styles[fqn] = Boundary(fqn, wiring, inputs=new_inputs, outputs=new_outputs)
        done.update((fqn, side) for side, new in (("in", new_inputs), ("out", new_outputs)) if new)
        if named:
            local.add(fqn)
    wiring.inside |= local
    for fqn in sorted(modules):
        within = any(not path or fqn == path or fqn.startswith(f"{path}.") for path in local)
        if within and (fqn, "local") not in done:
            wrap_forward(model.get_submodule(fqn), functools.partial(_under_local, wiring, fqn))
            done.add((fqn, "local"))
    if styles:
        parallelize_module(model, wiring.fabric.device_mesh, styles)


def wrap_forward(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper(forward, ...)` run in the place of a module's forward, inside its rematerialisation."""
    owner: Any = module.forward if isinstance(module.forward, Remat) else module
    owner.forward = functools.partial(wrapper, owner.forward)


def _under_local(wiring: Wiring, fqn: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module with its local calls; one that has none, apart from those of the modules around it."""
    if fqn in wiring.inside:
        with Local(wiring, fqn):
            return forward(*args, **kwargs)
    outer, wiring.active = wiring.active, None
    try:
        return forward(*args, **kwargs)
    finally:
        wiring.active = outer


@define(eq=False)
class Read:
    """A parameter whose value in compute is not what is stored: a share of it, or a cast of it."""

    module: nn.Module
    name: str
    share: int
    dtype: torch.dtype | None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a module's forward with the value that compute reads in the parameter's place."""
        stored = self.module._parameters[self.name]
        assert isinstance(stored, nn.Parameter), "a parameter is read once at a time"
        value: Tensor = stored
        if self.share > 1:
            value = _Share.apply(value, self.share)  # pyright: ignore[reportAssignmentType]
        if self.dtype is not None:
            value = value.to(self.dtype)
        self.module._parameters[self.name] = value  # pyright: ignore[reportArgumentType]
        try:
            return forward(*args, **kwargs)
        finally:
            self.module._parameters[self.name] = stored


class _Share(torch.autograd.Function):
    """1/n of a stored value on each of n ranks: their sum is the value, and its gradient is each share's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: int) -> Tensor:
        del ctx
        return tensor / share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return grad, None


def attach_read(read: Read) -> None:
    """Have a module read a parameter through `read`."""
    wrap_forward(read.module, read)
