"""Training steps of models/llama written by hand with torch's own APIs: what shardspec is measured against.

One trainer for each mesh of {dp, fsdp, tp}, in two forms. `styles` is the documented one: torch's
parallel styles, `loss_parallel`, clipping and AdamW on DTensors. `tuned` is what a careful engineer
makes of it: norms stay plain modules and their owed gradients go in one coalesced all-reduce (as in
Megatron-LM), cross-entropy, clipping and AdamW run on local tensors. Both use a block boundary
(`PrepareModuleInput`), so that a block's backward has two reductions over tp, not five.
"""

import contextlib
from collections import defaultdict
from typing import Any, Literal, Self

import attrs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models.llama import Llama

Form = Literal["styles", "tuned"]
Batch = dict[str, Tensor]
IGNORED = -100  # the label of a token that is not counted
BATCH_AXES = ("dp", "fsdp", "ep")


@attrs.frozen(kw_only=True)
class Options:
    """What one training step does, whatever the mesh; `sp` is sequence parallelism over tp."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    sp: bool = True
    form: Form = "tuned"


@attrs.frozen(kw_only=True)
class Trainer:
    """A model on a mesh with its optimizer.

    `leaves` are what the optimizer updates: the parameters themselves, or (form `tuned`) their local
    parts, which share storage. `copies` counts the ranks that hold the same part of each. `owed` names
    those whose gradients are summed over tp once a step.
    """

    model: Llama
    mesh: DeviceMesh | None
    options: Options
    parameters: dict[str, nn.Parameter]
    leaves: dict[str, Tensor]
    copies: dict[str, int]
    owed: tuple[str, ...]
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(cls, model: Llama, mesh: DeviceMesh | None, options: Options) -> Self:
        """Put a whole model on `mesh`, whose dims are among dp, fsdp, tp in that order; None is one rank.

        Every rank gives the same weights. The model is changed in place.
        """
        if has(mesh, "tp"):
            held = dict(model.named_modules())
            plan = {name: style for name, style in tp_plan(model, options).items() if name in held}
            parallelize_module(model, mesh["tp"], plan)
            if mesh.ndim > 1:
                mesh._flatten()  # so that DTensor's norm is one all-reduce, not one an axis
        if has(mesh, "fsdp"):
            shard_storage(model, mesh["dp", "fsdp"] if has(mesh, "dp") else mesh["fsdp"])
        parameters = leaves = dict(model.named_parameters())
        if mesh is not None and options.form == "tuned":
            leaves = {name: local_part(parameter).detach() for name, parameter in parameters.items()}
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in by_mesh(leaves.values())],
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=True,
        )
        tuned_sp = has(mesh, "tp") and options.sp and options.form == "tuned"
        owed = tuple(name for name in leaves if "norm" in name) if tuned_sp else ()
        world = 1 if mesh is None else mesh.size()
        return cls(
            model=model,
            mesh=mesh,
            options=options,
            parameters=parameters,
            leaves=leaves,
            copies={name: world // shard_count(parameter) for name, parameter in parameters.items()},
            owed=owed,
            optimizer=optimizer,
        )

    def local_batch(self, batch: Batch) -> Batch:
        """Return this rank's rows of a global batch {"tokens", "labels"}, each [B, S]."""
        index, count = 0, 1
        for axis in BATCH_AXES:
            if has(self.mesh, axis):
                index = index * self.mesh[axis].size() + self.mesh[axis].get_local_rank()
                count *= self.mesh[axis].size()
        return {name: tensor.chunk(count)[index] for name, tensor in batch.items()}

    def step(self, batch: Batch) -> Batch:
        """Train on local rows; return the 0-dim tensors loss (nats a token), weight, grad_norm."""
        metrics = self.backward(batch)
        return metrics | {"grad_norm": self.update()}

    def backward(self, batch: Batch) -> Batch:
        """Leave in `.grad` the gradients of sum / weight over the global batch, complete on every rank."""
        tp_styles = has(self.mesh, "tp") and self.options.form == "styles"
        with loss_parallel() if tp_styles else contextlib.nullcontext():
            total = self.loss_sum(self.model(batch["tokens"]), batch["labels"])
            total_weight = torch.stack((total.detach(), (batch["labels"] != IGNORED).sum().to(total.dtype)))
            if any(has(self.mesh, axis) for axis in BATCH_AXES):
                dist.all_reduce(total_weight, group=batch_group(self.mesh))
            loss_sum, weight = total_weight.unbind()
            weight.clamp_(min=1)
            (total / weight).backward()
        self.complete_gradients()
        return {"loss": loss_sum / weight, "weight": weight}

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy of local rows, a plain 0-dim tensor equal on the ranks of tp."""
        if has(self.mesh, "tp") and self.options.form == "tuned":
            return VocabParallelCrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), self.mesh.get_group("tp"))
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total.to_local() if isinstance(total, DTensor) else total

    @torch.no_grad()
    def complete_gradients(self) -> None:
        """Give each gradient its parameter's layout, and the leaves their gradients."""
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                # the embedding's whole gradient is cut, a norm's under SequenceParallel summed
                parameter.grad = grad.redistribute(placements=parameter.placements)
            if self.leaves[name] is not parameter:
                self.leaves[name].grad = local_part(parameter.grad)
        if self.owed:
            group = self.mesh.get_group("tp")
            with dist._coalescing_manager(group=group, async_ops=True) as work:
                for name in self.owed:
                    dist.all_reduce(self.leaves[name].grad, group=group)
            work.wait()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip, step, and drop the gradients; return the global norm before clipping, 0-dim."""
        groups = by_mesh(self.leaves.values())
        if self.mesh is not None and self.options.form == "tuned":
            norm = self.norm_of_leaves()
        else:
            norms = [get_total_norm([leaf.grad for leaf in group]) for group in groups]
            norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
            norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            clip_grads_with_norm_(group, self.options.clip, norm)
        self.optimizer.step()
        for tensor in (*self.leaves.values(), *self.parameters.values()):
            tensor.grad = None
        return norm

    def norm_of_leaves(self) -> Tensor:
        """Return the global gradient norm from local gradients, with one all-reduce over all ranks."""
        grads = defaultdict(list)
        for name, copies in self.copies.items():
            grads[copies].append(self.leaves[name].grad)
        squares = sum(get_total_norm(part) ** 2 / copies for copies, part in grads.items())
        dist.all_reduce(squares)
        return squares.sqrt()

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: whole(parameter) for name, parameter in self.parameters.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the gradients that `backward` left, whole."""
        return {name: whole(parameter.grad) for name, parameter in self.parameters.items()}


def tp_plan(model: Llama, options: Options) -> dict[str, ParallelStyle]:
    """Return torch's styles for tp, FQN by FQN; activations are [B, S, ...], sequence dim 1."""
    between = Shard(1) if options.sp else Replicate()
    styles = options.form == "styles"
    plan: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "output": ColwiseParallel(input_layouts=between, use_local_output=not styles),
    }
    for index in range(len(model.layers)):
        block = f"layers.{index}"
        plan[f"{block}.attention"] = PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)
        )
        plan[f"{block}.feed_forward"] = PrepareModuleInput(
            input_layouts=(between,), desired_input_layouts=(Replicate(),)
        )
        for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"):
            plan[f"{block}.{name}"] = ColwiseParallel()
        for name in ("attention.wo", "feed_forward.w2"):
            plan[f"{block}.{name}"] = RowwiseParallel(output_layouts=between)
    if options.sp and styles:
        plan |= {name: SequenceParallel() for name, _ in model.named_modules() if name.endswith("norm")}
    return plan


def shard_storage(model: Llama, mesh: DeviceMesh) -> None:
    """FSDP2 with a unit a block; a gradient is the plain sum over ranks. The last unit is not freed."""
    fully_shard(model.tok_embeddings, mesh=mesh)
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard([model.norm, model.output], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of logits [N, v], a rank's part of V, for labels [N] (Megatron-LM's form)."""

    @staticmethod
    def forward(ctx: Any, logits_Nv: Tensor, labels_N: Tensor, group: dist.ProcessGroup) -> Tensor:
        max_N = logits_Nv.amax(-1)
        dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
        shifted_Nv = logits_Nv - max_N[:, None]
        size_v = logits_Nv.shape[-1]
        local_N = labels_N - dist.get_rank(group) * size_v
        own_N = (local_N >= 0) & (local_N < size_v)
        local_N = local_N.clamp_(0, size_v - 1)
        picked_N = shifted_Nv.gather(1, local_N[:, None]).squeeze(1).masked_fill_(~own_N, 0)
        exp_Nv = shifted_Nv.exp_()
        sums_2N = torch.stack((exp_Nv.sum(-1), picked_N))
        dist.all_reduce(sums_2N, group=group)
        counted_N = labels_N != IGNORED
        ctx.save_for_backward(exp_Nv.div_(sums_2N[0, :, None]), local_N, own_N, counted_N)
        return ((sums_2N[0].log() - sums_2N[1]) * counted_N).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax_Nv, local_N, own_N, counted_N = ctx.saved_tensors
        softmax_Nv.scatter_add_(1, local_N[:, None], -own_N[:, None].to(softmax_Nv.dtype))
        return softmax_Nv.mul_((counted_N * grad)[:, None]), None, None


def has(mesh: DeviceMesh | None, axis: str) -> bool:
    return mesh is not None and axis in mesh.mesh_dim_names


def batch_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the ranks among which the batch is divided; dp beside tp would need a group of its own."""
    if not has(mesh, "tp"):
        return dist.group.WORLD
    assert not has(mesh, "dp"), "dp with tp is not written"
    return mesh.get_group("fsdp")


def by_mesh(tensors: Any) -> list[list[Tensor]]:
    """Group tensors by the mesh that they live on: fused kernels do not mix them."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return list(groups.values())


def shard_count(parameter: Tensor) -> int:
    """Return among how many ranks a parameter is divided."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    count = 1
    for dim, placement in enumerate(parameter.placements):
        count *= 1 if placement.is_replicate() else mesh.size(dim)  # a strided shard too
    return count


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a copy of the whole tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
