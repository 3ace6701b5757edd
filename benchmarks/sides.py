"""The sides of a comparison, built in the same ranks from the same weights: shardspec, and by hand."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import shardspec as ss
from benchmarks.handwritten import Batch, Form, Options, Trainer
from benchmarks.pipeline_by_hand import PipelineTrainer
from models.llama import RULES, WITHOUT_SP, LlamaConfig, build


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
    def by_hand(self) -> dict[Form, str]:
        """The hand-written forms to compare with, and what to call them."""
        if "pp" in self.sizes:
            return {"tuned": "PipelineStage"}
        return {"styles": "styles", "tuned": "tuned"} if self.sizes else {"tuned": "plain loop"}


CASES = (
    Case(name="one rank", sizes={}, budget=1.0),
    Case(name="tp=2", sizes={"tp": 2}, sp=False),
    Case(name="tp=2 SP", sizes={"tp": 2}),
    Case(name="fsdp=2", sizes={"fsdp": 2}),
    Case(name="fsdp=2,tp=2 SP", sizes={"fsdp": 2, "tp": 2}),
    Case(name="pp=2", sizes={"pp": 2}),
    Case(name="pp=2,tp=2 SP", sizes={"pp": 2, "tp": 2}),
)
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
        rules = RULES if self.case.sp else WITHOUT_SP
        policy = ss.Policy(schedule="1F1B", microbatches=MICROBATCHES) if "pp" in self.case.sizes else ss.Policy()
        mesh = ss.Mesh(**self.case.sizes)
        self.sharded = sharded = ss.shard(lambda: build(self.config), rules, mesh, self.batch, policy=policy)
        optimizer = ss.adamw(lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
        self.state = sharded.init(optimizer, seed=0)
        self.train = ss.train_step(sharded, loss_fn, clip=options.clip)
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
        model = build(self.config)
        model.load_state_dict(self.weights, strict=True)
        sizes = self.case.sizes
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)) if sizes else None
        options = Options(sp=self.case.sp, form=self.form)
        if "pp" in sizes:
            self.trainer = PipelineTrainer.make(model, mesh, options, MICROBATCHES)
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
