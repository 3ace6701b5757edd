"""Which tensor objects of a trace share storage, so that a write through one is seen through all."""

from typing import Any

import torch
from attrs import define, field
from torch import Tensor

PARAMETER_WRITE = "it writes to a parameter of the model"
"""Never right: what a step does to parameters is the optimizer's, and a gathered one is thrown away after its use."""


@define(eq=False)
class Family:
    """Tensor objects over one storage. `whole` are names of the very same tensor; `parts` are views of it."""

    whole: set[int] = field(factory=set)
    parts: set[int] = field(factory=set)


@define(eq=False)
class Aliases:
    """The families of a trace, by the id of a tensor object; the tracer keeps every object alive."""

    families: dict[int, Family] = field(factory=dict)

    def family(self, tensor: Tensor) -> Family:
        """The family of a tensor, of itself alone where it is not known."""
        return self.families.setdefault(id(tensor), Family(whole={id(tensor)}))

    def rename(self, old: Tensor, new: Tensor) -> None:
        """`new` is another name of `old`: what stands behind a point, or what `contiguous` gave back."""
        family = self.family(old)
        (family.whole if id(old) in family.whole else family.parts).add(id(new))
        self.families[id(new)] = family

    def observe(self, func: Any, args: Any, out: Any) -> None:
        """Note the views that an operator made of its operands."""
        outs = out if isinstance(out, (list, tuple)) else (out,)
        storages: dict[int, Tensor] = {}
        for arg in args:
            if isinstance(arg, Tensor) and arg.device.type == "meta":
                storages.setdefault(storage_of(arg), arg)
        if not storages or func is None:
            return
        for made in outs:
            base = storages.get(storage_of(made)) if isinstance(made, Tensor) else None
            if base is None or base is made:
                continue
            family = self.family(base)
            same = made.shape == base.shape and made.stride() == base.stride()
            whole = same and id(base) in family.whole
            (family.whole if whole else family.parts).add(id(made))
            self.families[id(made)] = family


def written(tensor: Tensor, part: Tensor) -> Tensor:
    """The `func` of a node that stands for a tensor some of whose elements a write to another name has changed."""
    del part
    return tensor


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart; meta tensors have one too."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def writes(func: Any) -> bool:
    """Whether an operator writes to an operand."""
    return isinstance(schema := getattr(func, "_schema", None), torch.FunctionSchema) and schema.is_mutable
