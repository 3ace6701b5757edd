"""The plain program: a model in float64 on one process, its loss and its gradients, by torch's autograd alone."""

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from shardspec import functional
from shardspec.arguments import as_model
from shardspec.diagnostics import refuse
from shardspec.layout import DimLayout, Layout, global_size, parts_of
from shardspec.mesh import Mesh
from shardspec.nests import tensor_leaves
from shardspec.plan import Plan
from shardspec.rules.table import Rules
from shardspec.survey import Model
from shardspec.twin import forward_arguments

LossFn = Callable[[Any, dict[str, Any]], tuple[Any, Any]]

WIDER = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


@frozen(eq=False, kw_only=True)
class Expected:
    """What a program computes from one batch, whole tensors by name."""

    loss: float
    weight: float
    grads: dict[str, Tensor]
    """Of the trained parameters, under their first names; zeros where the loss does not reach one."""
    buffers: dict[str, Tensor]
    """Persistent ones, after forward."""


_ONE_PROGRAM = threading.Lock()  # torch's default dtype and generator belong to the process


@contextmanager
def in_float64(seed: int) -> Generator[None]:
    """Have tensors made in float64 on the CPU, torch's generator seeded and gradients on; all put back after."""
    with _ONE_PROGRAM:
        yield from _in_float64(seed)


def _in_float64(seed: int) -> Generator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)


def wide(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, float64 or complex128 where it is of a floating dtype."""
    dtype = torch.float64 if tensor.is_floating_point() else WIDER.get(tensor.dtype, tensor.dtype)
    return tensor.detach().to("cpu", dtype)


def own_model(model: Model, seed: int, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A model of one's own in float64, each parameter moved a little by a tenth of its own size.

    Weights of one and biases of zero would hide what is scaled or counted twice.

    Raises:
        ShardingError: SS401 for what is no model, SS406 for one with tensors on meta.
    """
    given = as_model(model)
    own = copied(given) if isinstance(given, nn.Module) else given()
    hollow = [name for name, tensor in [*own.named_parameters(), *own.named_buffers()] if tensor.device.type == "meta"]
    if hollow:
        refuse(
            "SS406",
            f"{hollow[0]} has no value",
            why="the model is on meta, and a plain program computes with numbers",
            advice=("give the function that builds the model, on the CPU",),
        )
    own.zero_grad(set_to_none=True)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # what is replaced stays alive, and its id its own
    own._apply(lambda tensor: made.setdefault(id(tensor), (tensor, wide(tensor)))[1])
    with torch.no_grad():
        for index, parameter in enumerate(own.parameters()):
            if parameter.numel() and (parameter.is_floating_point() or parameter.is_complex()):
                generator = torch.Generator().manual_seed(seed * 65537 + index)
                size = float(parameter.abs().square().mean().sqrt()) or 1.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise, alpha=0.1 * size)
    return own


def run_plain(model: nn.Module, batch: Mapping[str, Any], plan: Plan, loss_fn: LossFn, count: int) -> Expected:
    """Run a module of one's own over `count` microbatches, and differentiate sum / weight.

    Raises:
        ValueError: where the loss is not finite or no gradient differs from zero, so that parity would say nothing.
    """
    total: Any = 0.0
    weight: Any = 0.0
    for part in microbatches(batch, plan, count):
        names = forward_arguments(model)
        output = model(**{name: item for name, item in part.items() if name in names})
        one, two = loss_fn(output, part)
        total, weight = total + one, weight + (two.detach() if isinstance(two, Tensor) else two)
    if isinstance(weight, Tensor):
        weight = weight + (weight == 0)  # as the runtime has it, where every label is masked
    loss = total / weight
    if not loss.requires_grad:
        raise ValueError("the loss depends on no parameter that is trained: parity would say nothing")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(trained.items(), found, strict=True)
    }
    check_tells(float(loss.detach()), grads)
    persistent = model.state_dict()
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if name in persistent}
    return Expected(loss=float(loss.detach()), weight=float(weight), grads=grads, buffers=buffers)


def check_tells(loss: float, grads: Mapping[str, Tensor]) -> None:
    """ValueError for a program with which any other would agree."""
    if not torch.isfinite(torch.tensor(loss)) or not all(bool(grad.isfinite().all()) for grad in grads.values()):
        raise ValueError(f"the plain program's loss is {loss}, or a gradient is not finite: parity would say nothing")
    if not any(bool(grad.any()) for grad in grads.values()):
        raise ValueError("the plain program's gradients are all zero: parity would say nothing")


def microbatches(batch: Mapping[str, Any], plan: Plan, count: int) -> list[dict[str, Any]]:
    """Rows [iB/M, (i+1)B/M) of a global batch, for each i."""
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, item in batch.items():
        dim = plan.entries[name].batch_dim if isinstance(item, Tensor) else None
        chunks = [item] * count if dim is None or count == 1 else item.chunk(count, dim)
        for part, chunk in zip(parts, chunks, strict=True):
            part[name] = chunk
    return parts


@frozen(eq=False)
class Weighted:
    """The loss of a call without one: every floating output times fixed weights, summed; its weight is 1."""

    entries: tuple[str | None, ...]
    """For each tensor of the output, the batch entry that holds its weights."""

    def __call__(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, float]:
        leaves = zip(tensor_leaves(output), self.entries, strict=True)
        sums = [
            functional.name((leaf * batch[entry]).sum(), f"sum_{entry}") for leaf, entry in leaves if entry is not None
        ]
        return sum(sums[1:], sums[0]), 1.0


def weighted(
    rules: Rules, mesh: Mesh, plan: Plan, outputs: list[Tensor], seed: int
) -> tuple[Rules, dict[str, Tensor], Weighted]:
    """A loss over a model's outputs, the batch entries that hold its weights, and the table with their rules.

    An element's weight, in [0.5, 1.5), depends on its place alone; it lies as the element does.

    Raises:
        ValueError: where the outputs are not those of the plan, or none is of a floating dtype.
    """
    floating = [leaf.is_floating_point() for leaf in outputs]
    if len(outputs) != len(plan.output) or not any(floating):
        raise ValueError(f"forward returns {len(outputs)} tensors, {sum(floating)} of them floating: give a loss_fn")
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, Tensor] = {}
    specs: dict[str, str] = {}
    sizes: dict[str, int] = {}
    names: list[str | None] = []
    for index, (leaf, layout) in enumerate(zip(outputs, plan.output, strict=True)):
        if not leaf.is_floating_point():
            names.append(None)
            continue
        entry = f"weights_of_output_{index}"
        specs[entry], more = written(layout, mesh, f"{entry}_")
        sizes |= more
        entries[entry] = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) + 0.5
        names.append(entry)
    if len(entries) > 1:
        # One may be split where another is complete, so that each sum is completed before they meet.
        specs |= {rf"loss\.sum_{entry}": "" for entry in entries}
    return rules.override(activations=specs, sizes=sizes), entries, Weighted(tuple(names))


def written(layout: Layout, mesh: Mesh, prefix: str) -> tuple[str, dict[str, int]]:
    """The dims of a layout as a spec, its factors' names begun with `prefix`; and the factors' sizes."""
    sizes: dict[str, int] = {}
    dims: list[str] = []
    for digits in layout.dims:
        parts = [_factors(part, mesh, prefix, sizes) for part in parts_of(digits)]
        text = " + ".join(map(" ".join, parts))
        dims.append(text if len(parts) == 1 and len(parts[0]) == 1 else f"({text})")
    return " ".join(dims), sizes


def _factors(digits: DimLayout, mesh: Mesh, prefix: str, sizes: dict[str, int]) -> list[str]:
    """The factors of a dim, or of a part of a direct sum; their sizes are put with the others."""
    factors: list[str] = []
    axes: list[str] = []
    for digit in (*digits, *(() if digits and isinstance(digits[-1], int) else (1,))):
        if isinstance(digit, str):
            axes.append(digit)
            continue
        name = f"{prefix}{len(sizes)}"
        sizes[name] = global_size((*axes, digit), mesh.shape)
        factors.append(name + (f"@({','.join(axes)})" if axes else ""))
        axes = []
    return factors
