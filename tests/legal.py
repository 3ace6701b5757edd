"""Which meshes are legal: by the facts of one plan, by `plan.legal_meshes`, and by the check of each."""

from collections.abc import Callable, Iterable

import attrs
import torch
from torch import Tensor, nn

import shardspec as ss
from models import gpt2, llama, vit
from models.gpt2.rules import WITHOUT_SP as GPT2_WITHOUT_SP
from models.llama.rules import WITHOUT_SP as LLAMA_WITHOUT_SP
from shardspec.compiler import Compiler
from shardspec.survey import survey


@attrs.frozen(eq=False)
class Family:
    """A table, its model on meta, and a batch whose rows have many divisors."""

    name: str
    model: Callable[[], nn.Module]
    rules: ss.Rules
    images: bool = False
    rows: int = 48
    length: int = 64

    @property
    def batch(self) -> dict[str, Tensor]:
        """The global batch on meta."""
        if self.images:
            labels = torch.empty(self.rows, dtype=torch.long, device="meta")
            return {"images": torch.empty(self.rows, 3, 32, 32, device="meta"), "labels": labels}
        return {name: torch.empty(self.rows, self.length, dtype=torch.long, device="meta") for name in TEXT}

    def __str__(self) -> str:
        return self.name


TEXT = ("tokens", "labels")
FAMILIES = (
    Family("Llama, SP", lambda: llama.build("debug"), llama.RULES),
    Family("Llama, no SP", lambda: llama.build("debug"), LLAMA_WITHOUT_SP),
    Family("GPT-2, SP", lambda: gpt2.build("debug"), gpt2.RULES),
    Family("GPT-2, no SP", lambda: gpt2.build("debug"), GPT2_WITHOUT_SP),
    Family("ViT", lambda: vit.build("debug"), vit.RULES, images=True),
)


@attrs.frozen(kw_only=True)
class Agreement:
    """How many meshes were asked for, how many are legal, and on which the answers differ."""

    family: Family
    meshes: int
    legal: int
    disagreements: tuple[str, ...]
    facts: tuple[str, ...]
    """What the plans say must divide what."""


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and the number of labels that count."""
    return ss.cross_entropy(output, batch["labels"])


def all_meshes(worlds: Iterable[int]) -> list[ss.Mesh]:
    """Every mesh over dp, fsdp and tp with one of these numbers of ranks."""
    return [
        ss.Mesh(dp=world // (fsdp * tp), fsdp=fsdp, tp=tp)
        for world in worlds
        for fsdp in range(1, world + 1)
        for tp in range(1, world + 1)
        if world % (fsdp * tp) == 0
    ]


def agreement(family: Family, worlds: Iterable[int]) -> Agreement:
    """Compare the three answers; the facts that decide for a set of axes are those of the first legal mesh."""
    worlds = list(worlds)
    meshes = all_meshes(worlds)
    compiler = Compiler(survey(family.model), family.rules)
    plans: dict[ss.Mesh, ss.Plan] = {}
    for mesh in meshes:
        try:
            plans[mesh] = compiler.plan(mesh, family.batch, loss_fn, fix=False)
        except ss.ShardingError:
            continue
    listed = {mesh for world in worlds for mesh in next(iter(plans.values())).legal_meshes(world) if mesh["pp"] == 1}
    first: dict[tuple[str, ...], ss.Plan] = {}
    for mesh, plan in plans.items():
        first.setdefault(mesh.axes, plan)
    wrong = [str(mesh) for mesh in meshes if (mesh in listed) != (mesh in plans)]
    wrong += [str(mesh) for mesh in meshes if _by_symbol(mesh, first) != (mesh in plans)]
    wrong += [str(mesh) for mesh in listed if mesh not in meshes]
    facts = dict.fromkeys(str(fact) for plan in first.values() for fact in plan.constraints)
    return Agreement(
        family=family,
        meshes=len(meshes),
        legal=len(plans),
        disagreements=tuple(dict.fromkeys(wrong)),
        facts=tuple(sorted(facts)),
    )


def _by_symbol(mesh: ss.Mesh, first: dict[tuple[str, ...], ss.Plan]) -> bool:
    """Whether the facts of a plan with the same axes hold; none is legal where no mesh with these axes is."""
    return mesh.axes in first and all(fact.holds(mesh) for fact in first[mesh.axes].constraints)
