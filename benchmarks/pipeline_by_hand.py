"""A pipeline of models/llama written by hand with torch's `PipelineStage`: what pp is measured against."""

from typing import Any, Self

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.handwritten import IGNORED, Batch, Options, Trainer, by_mesh, has
from models.llama import Llama


class Stage(nn.Module):
    """As many layers of a Llama as the other stages have; the first embeds, the last gives logits."""

    def __init__(self, model: Llama, index: int, count: int) -> None:
        super().__init__()
        each = len(model.layers) // count
        self.seq = model.config.max_seq_len
        self.tok_embeddings = model.tok_embeddings if index == 0 else None
        self.layers = nn.ModuleList(model.layers[index * each : (index + 1) * each])
        self.norm, self.output = (model.norm, model.output) if index == count - 1 else (None, None)
        self.register_buffer("rope_cos", model.rope_cos, persistent=False)
        self.register_buffer("rope_sin", model.rope_sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S], or the activations before the stage's layers, to those behind them, or logits."""
        h_BSD = x if self.tok_embeddings is None else self.tok_embeddings(x)
        cos_S1d = self.rope_cos[: self.seq].unsqueeze(1).to(h_BSD.dtype)
        sin_S1d = self.rope_sin[: self.seq].unsqueeze(1).to(h_BSD.dtype)
        for layer in self.layers:
            h_BSD = layer(h_BSD, cos_S1d, sin_S1d)
        return h_BSD if self.output is None else self.output(self.norm(h_BSD))


@attrs.define(kw_only=True)
class PipelineTrainer:
    """One stage of a pipeline over the axis pp of a mesh, its layers over tp where the mesh has that."""

    trainer: Trainer
    schedule: Schedule1F1B
    first: bool
    last: bool
    offset: int
    """The index of the stage's first layer."""
    weight: Tensor
    """The labels that count in the batch at hand."""

    @classmethod
    def make(cls, model: Llama, mesh: DeviceMesh, options: Options, microbatches: int) -> Self:
        """Every rank gives the same whole weights, and keeps its stage's."""
        group = mesh.get_group("pp")
        index, count = dist.get_rank(group), dist.get_world_size(group)
        trainer = Trainer.make(Stage(model, index, count), mesh["tp"] if has(mesh, "tp") else None, options)
        stage = PipelineStage(trainer.model, index, count, torch.device("cpu"), group=group)

        def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
            return trainer.loss_sum(logits, labels) / made.weight

        schedule = Schedule1F1B(stage, microbatches, loss_fn=loss_fn, scale_grads=False)
        made = cls(
            trainer=trainer,
            schedule=schedule,
            first=index == 0,
            last=index == count - 1,
            offset=index * len(trainer.model.layers),
            weight=torch.ones(()),
        )
        return made

    def local_batch(self, batch: Batch) -> Batch:
        """Every rank of a pipeline reads the whole batch."""
        return batch

    def step(self, batch: Batch) -> Batch:
        """Train on the batch; return the 0-dim tensors loss (nats a token), weight, grad_norm, on every rank."""
        self.weight = (batch["labels"] != IGNORED).sum().clamp_(min=1)
        losses: list[Tensor] = []
        arguments: tuple[Any, ...] = (batch["tokens"],) if self.first else ()
        named = {"target": batch["labels"], "losses": losses} if self.last else {}
        self.schedule.step(*arguments, **named)
        self.trainer.complete_gradients()
        loss, norm = self.reduce(losses)
        self.update(norm)
        return {"loss": loss, "weight": self.weight, "grad_norm": norm}

    @torch.no_grad()
    def reduce(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient's norm, of all stages, by one all-reduce."""
        inner = self.trainer.mesh.size() if self.trainer.mesh is not None else 1
        parts = []
        for copies in set(self.trainer.copies.values()):
            names = [name for name, each in self.trainer.copies.items() if each == copies]
            parts.append(get_total_norm([self.trainer.leaves[name].grad for name in names]) ** 2 / copies)
        squares = torch.stack(parts).sum()
        loss = torch.stack(losses).sum() / inner if losses else squares.new_zeros(())
        both = torch.stack((squares, loss))
        dist.all_reduce(both)
        return both[1], both[0].sqrt()

    def full_parameters(self) -> dict[str, Tensor]:
        """Return this stage's parameters, whole, under the names of the whole model."""
        found = {}
        for name, tensor in self.trainer.full_parameters().items():
            kind, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            found[f"layers.{int(index) + self.offset}.{inner}" if kind == "layers" else name] = tensor
        return found

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Clip, step, and drop the gradients."""
        for group in by_mesh(self.trainer.leaves.values()):
            clip_grads_with_norm_(group, self.trainer.options.clip, norm)
        self.trainer.optimizer.step()
        for tensor in (*self.trainer.leaves.values(), *self.trainer.parameters.values()):
            tensor.grad = None
