"""The sides of a comparison, built in the same ranks from the same weights: shardspec, and by hand."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardspec as ss
from benchmarks.experts_by_hand import ExpertsTrainer
from benchmarks.handwritten import Batch, Form, Options, Trainer
from benchmarks.pipeline_by_hand import PipelineTrainer
from models import llama, mixtral
from models.llama import LlamaConfig
from models.mixtral import MixtralConfig


@attrs.frozen(kw_only=True)
class Case:
    """A plan to compare: a mesh in axis order (`{}` is one rank), and whether tp is sequence-parallel."""

    name: str
    sizes: dict[str, int]
    sp: bool = True
    budget: float = 0.95

    @property
    def world(self) -> int:
        return torch.Size(self.sizes.values()).numel()

    @property
    def mixture(self) -> bool:
        """Whether it trains a Mixtral, and not a Llama."""
        return "ep" in self.sizes

    def build(self, config: LlamaConfig) -> nn.Module:
        """The model that it trains: a Llama of this size, or a Mixtral with as many feed-forward parameters."""
        if not self.mixture:
            return llama.build(config)
        sizes = {name: getattr(config, name) for name in SHARED_SIZES}
        return mixtral.build(MixtralConfig(**sizes, n_experts=EXPERTS, ffn_dim=config.ffn_dim // EXPERTS))

    @property
    def rules(self) -> ss.Rules:
        """Its table."""
        family = mixtral if self.mixture else llama
        return family.RULES if self.sp else family.WITHOUT_SP

    @property
    def by_hand(self) -> dict[Form, str]:
        """The hand-written forms to compare with, and what to call them."""
        if "pp" in self.sizes:
            return {"tuned": "PipelineStage"}
        if self.mixture:
            return {"tuned": "all_to_all"}
        return {"styles": "styles", "tuned": "tuned"} if self.sizes else {"tuned": "plain loop"}


CASES = (
    Case(name="one rank", sizes={}, budget=1.0),
    Case(name="tp=2", sizes={"tp": 2}, sp=False),
    Case(name="tp=2 SP", sizes={"tp": 2}),
    Case(name="fsdp=2", sizes={"fsdp": 2}),
    Case(name="fsdp=2,tp=2 SP", sizes={"fsdp": 2, "tp": 2}),
    Case(name="pp=2", sizes={"pp": 2}),
    Case(name="pp=2,tp=2 SP", sizes={"pp": 2, "tp": 2}),
    Case(name="ep=2", sizes={"ep": 2}),
)
EXPERTS = 8
SHARED_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len")
MICROBATCHES = 4
"""Of a pipeline's step, by 1F1B."""


@attrs.define
class Sharded:
    """shardspec's side."""

    config: LlamaConfig
    case: Case
    batch: Batch
    sharded: ss.Sharded = attrs.field(init=False)
    state: ss.TrainState = attrs.field(init=False)
    train: Callable = attrs.field(init=False)
    part: Batch = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        options = Options()
        policy = ss.Policy(schedule="1F1B", microbatches=MICROBATCHES) if "pp" in self.case.sizes else ss.Policy()
        mesh = ss.Mesh(**self.case.sizes)
        self.sharded = sharded = ss.shard(
            lambda: self.case.build(self.config), self.case.rules, mesh, self.batch, policy=policy
        )
        optimizer = ss.adamw(lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
        self.state = sharded.init(optimizer, seed=0)
        self.train = ss.train_step(sharded, mixtral.loss_fn if self.case.mixture else loss_fn, clip=options.clip)
        self.part = sharded.local_batch(self.batch)

    def step(self) -> dict[str, Tensor]:
        self.state, metrics = self.train(self.state, self.part)
        return metrics

    def whole(self) -> dict[str, Tensor]:
        """Return a copy of the parameters, whole, on every rank."""
        return {name: tensor.clone() for name, tensor in self.sharded.state_dict(self.state).items()}


def loss_fn(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and the number of tokens counted."""
    return ss.cross_entropy(output, batch["labels"])


@attrs.define
class ByHand:
    """The hand-written side in one of its forms."""

    config: LlamaConfig
    case: Case
    batch: Batch
    form: Form
    weights: dict[str, Tensor]
    trainer: Trainer | PipelineTrainer = attrs.field(init=False)
    part: Batch = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        model = self.case.build(self.config)
        model.load_state_dict(self.weights, strict=True)
        sizes = self.case.sizes
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)) if sizes else None
        options = Options(sp=self.case.sp, form=self.form)
        if "pp" in sizes:
            self.trainer = PipelineTrainer.make(model, mesh, options, MICROBATCHES)
        elif self.case.mixture:
            self.trainer = ExpertsTrainer.make(model, mesh, options)
        else:
            self.trainer = Trainer.make(model, mesh, options)
        self.part = self.trainer.local_batch(self.batch)
        self.weights = {}

    def step(self) -> dict[str, Tensor]:
        return self.trainer.step(self.part)


def make_batch(config: LlamaConfig, rows: int) -> Batch:
    """Return a global batch [rows, max_seq_len] of random tokens."""
    tokens = torch.randint(
        config.vocab_size, (rows, config.max_seq_len + 1), generator=torch.Generator().manual_seed(0)
    )
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
