"""One table over one model: what `ss.compile` is called with."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import shardspec as ss
from models.llama import PRESETS, build
from models.llama.rules import RULES

ROWS, SEQ = 8, 128


def make_batch(rows: int = ROWS, length: int = SEQ, *, positions: bool = False) -> dict[str, Tensor]:
    """A global batch; only its shapes are read."""
    batch = {name: torch.zeros(rows, length, dtype=torch.long) for name in ("tokens", "labels")}
    return batch | ({"positions": torch.arange(length)} if positions else {})


def token_loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss that the table of the family is made for."""
    return ss.cross_entropy(output, batch["labels"])


def llama(change: Callable[[nn.Module], None] | None = None, **sizes: Any) -> Callable[[], nn.Module]:
    """A function that builds the debug Llama with other sizes, and then changes it."""

    def make() -> nn.Module:
        model = build(attrs.evolve(PRESETS["debug"], **sizes))
        if change is not None:
            change(model)
        return model

    return make


def with_parts(**classes: type[nn.Module]) -> Callable[[], nn.Module]:
    """The debug Llama whose modules of a name (`attention`, `feed_forward`, `block`, `model`) run another forward.

    Where the class has `extend`, it adds parameters.
    """

    def change(model: nn.Module) -> None:
        homes = {"model": [model], "block": list(model.layers)}
        for name, kind in classes.items():
            for module in homes.get(name) or [getattr(block, name) for block in model.layers]:
                module.__class__ = kind
                if hasattr(kind, "extend"):
                    module.extend()

    return llama(change)


PLAIN = llama()


@attrs.frozen(kw_only=True)
class Case:
    """The arguments of one check."""

    rules: ss.Rules = RULES
    mesh: str = "fsdp=2,tp=2"
    model: Callable[[], nn.Module] = PLAIN
    inputs: dict[str, Any] = attrs.field(factory=make_batch)
    loss: Callable[..., Any] | None = token_loss
    policy: ss.Policy | None = None

    def compile(self) -> ss.Plan:
        """Check it."""
        return ss.compile(self.model, self.rules, ss.Mesh.parse(self.mesh), self.inputs, self.loss, self.policy)
