"""Mixtral with its experts over ranks, written by hand: what `ep` is measured against.

The ranks of ep are data ranks, and dense weights are stored over them with FSDP2. Each rank holds the weights of some
experts; tokens travel to them and back in uneven all-to-alls of torch's functional collectives, the way torchtitan and
its like do it: counts first, then rows sorted by expert.
"""

from typing import Any, Self

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from benchmarks.handwritten import IGNORED, Options, Trainer, local_part, whole
from models.experts import Experts
from models.mixtral import Mixtral


class ExchangedExperts(nn.Module):
    """A rank's part of the experts, with the exchange of tokens around them."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.ranks = group, dist.get_world_size(group)
        self.own, mine = len(experts.w1) // self.ranks, dist.get_rank(group)
        for name, weight in list(experts.named_parameters()):
            part = weight.detach()[mine * self.own : (mine + 1) * self.own].clone()
            setattr(experts, name, nn.Parameter(part))
        self.inner = experts

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Return [N, D]: every token's experts, weighted and summed, wherever they lie."""
        ids_M, choices = ids_Nk.flatten(), ids_Nk.shape[1]
        order_M = ids_M.argsort(stable=True)
        sent_E = torch.bincount(ids_M, minlength=self.own * self.ranks)
        got_E = torch.empty_like(sent_E)
        dist.all_to_all_single(got_E, sent_E, group=self.group)
        counts = torch.stack((sent_E, got_E)).view(2, self.ranks, self.own)
        out, into = counts.sum(-1).tolist()
        rows_MD = all_to_all_single_autograd(hidden_ND[order_M // choices], into, out, self.group)
        local_R = torch.arange(self.own).repeat(self.ranks).repeat_interleave(got_E)
        done_RD = self.inner(rows_MD, local_R[:, None], torch.ones_like(local_R[:, None], dtype=hidden_ND.dtype))
        back_MD = all_to_all_single_autograd(done_RD, out, into, self.group)
        weighted_MD = back_MD * weights_Nk.flatten()[order_M, None]
        return torch.zeros_like(hidden_ND).index_add(0, order_M // choices, weighted_MD)


@attrs.frozen(kw_only=True)
class ExpertsTrainer(Trainer):
    """A Mixtral on a mesh of one dim, whose ranks hold different rows and different experts."""

    @classmethod
    def make(cls, model: Mixtral, mesh: DeviceMesh, options: Options) -> Self:
        """Every rank gives the same whole weights. The model is changed in place."""
        group = mesh.get_group("ep")
        for block in model.layers:
            block.moe.experts = ExchangedExperts(block.moe.experts, group)
            block.moe.router.load.register_forward_hook(lambda _module, _args, load: global_mean(load, group))
        store_dense(model, mesh)
        parameters = dict(model.named_parameters())
        leaves = {name: local_part(parameter).detach() for name, parameter in parameters.items()}
        return cls(
            model=model,
            mesh=mesh,
            options=options,
            parameters=parameters,
            leaves=leaves,
            copies=dict.fromkeys(leaves, 1),
            owed=(),
            optimizer=torch.optim.AdamW(
                list(leaves.values()),
                lr=options.lr,
                betas=options.betas,
                weight_decay=options.weight_decay,
                fused=True,
            ),
        )

    def loss_sum(self, output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The summed cross-entropy of local rows, and as much of the routers' loss as their labels weigh."""
        logits, aux = output
        return super().loss_sum(logits, labels) + aux * (labels != IGNORED).sum()

    def full_parameters(self) -> dict[str, Tensor]:
        return {name.replace(".inner", ""): self._whole(name, tensor) for name, tensor in self.parameters.items()}

    def full_gradients(self) -> dict[str, Tensor]:
        return {name.replace(".inner", ""): self._whole(name, t.grad) for name, t in self.parameters.items()}

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        if ".experts." not in name:
            return whole(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.mesh.size())]
        dist.all_gather(parts, tensor.detach().contiguous(), group=self.mesh.get_group("ep"))
        return torch.cat(parts)


def global_mean(load: Tensor, group: dist.ProcessGroup) -> Any:
    """The mean over ranks of what each has the mean of over its own tokens."""
    return all_reduce(load, "sum", group) / dist.get_world_size(group)


def store_dense(model: Mixtral, mesh: DeviceMesh) -> None:
    """FSDP2 with a unit a block for what is no expert; a gradient is the plain sum over ranks."""
    ignored = {p for name, p in model.named_parameters() if ".experts." in name}
    for block in model.layers:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model.tok_embeddings, mesh=mesh)
    fully_shard([model.norm, model.output], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
