"""Persistent buffers beside a forward: what runs again does not write twice, and a step may change them at its end."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardspec.diagnostics import refuse
from shardspec.plan import ParamPlan

BufferUpdate = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""`update(buffers) -> changed`: FQN -> tensor, of a state's persistent buffers; pure."""


class Holder(Protocol):
    """What knows the plans of parameters and buffers."""

    params: dict[str, ParamPlan]


def changed_buffers(home: Holder, buffers: Mapping[str, Tensor], update: BufferUpdate | None) -> dict[str, Tensor]:
    """The buffers after a step's own update of them, which may read those that every rank holds whole.

    Args:
        buffers: as forward left them, of this rank's stages.

    Raises:
        ShardingError: SS407 for what the update must not return, or where it writes to what it was given.
    """
    if update is None:
        return dict(buffers)
    given = {name: buffer for name, buffer in buffers.items() if not home.params[name].layout.sharded}
    versions = {name: buffer._version for name, buffer in given.items()}
    with torch.no_grad():
        found: Any = update(dict(given))
    if not isinstance(found, Mapping):
        _refuse(f"it returned a {type(found).__name__}", "it returns a dict: the name of a buffer, and its new value")
    for name, buffer in given.items():
        if buffer._version != versions[name]:
            _refuse(f"it writes to {name} in place", "the step's old state may still hold that tensor")
    for name, new in found.items():
        if name not in given:
            why = "it is split, and an update reads and writes what every rank holds whole" if name in buffers else ""
            _refuse(f"it returned {name!r}", why or f"this rank's persistent buffers are {', '.join(given) or 'none'}")
        old = given[name]
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
            kind = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
            _refuse(f"it returned {kind} for {name}", f"the buffer is {tuple(old.shape)} {old.dtype}")
    return {**buffers, **{name: new.detach() for name, new in found.items()}}


def _refuse(what: str, why: str) -> None:
    refuse(
        "SS407",
        f"train_step(buffers=...): {what}",
        why=why,
        advice=("return the buffers that change, as new tensors, under the names that the update was given",),
    )


@define(eq=False)
class Remat:
    """A forward that runs again in backward; what is attached later goes inside, so that it runs again too.

    Persistent buffers are then what they were when it ran first, and what it writes to them is dropped.
    """

    module: nn.Module
    forward: Callable[..., Any]
    written: dict[bool, set[str]] = field(factory=dict)
    """Training mode -> the persistent buffers that the forward writes, once it has run."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = dict(persistent_buffers(self.module))
        if not held:
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        known = self.written.get(self.module.training)
        before = {
            name: owner._buffers[leaf].clone()  # pyright: ignore[reportOptionalMemberAccess]
            for name, (owner, leaf) in held.items()
            if known is None or name in known
        }
        at_first = {name: (owner._buffers[leaf], _version(owner, leaf)) for name, (owner, leaf) in held.items()}

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), swapped({held[name]: buffer for name, buffer in before.items()})

        made = checkpoint(self.forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        written = self.written.setdefault(self.module.training, set())
        for name, (owner, leaf) in held.items():
            buffer, version = at_first[name]
            if owner._buffers[leaf] is not buffer or _version(owner, leaf) != version:
                written.add(name)
        return made


def _version(owner: nn.Module, leaf: str) -> int:
    buffer = owner._buffers[leaf]
    return -1 if buffer is None else buffer._version


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Every persistent buffer: its name, and the module and leaf where it is put."""
    for path, child in module.named_modules():
        for leaf, buffer in child._buffers.items():
            if buffer is not None and leaf not in child._non_persistent_buffers_set:
                yield f"{path}.{leaf}" if path else leaf, (child, leaf)


@contextmanager
def swapped(buffers: Mapping[tuple[nn.Module, str], Tensor]) -> Generator[None]:
    """Have modules hold copies of these buffers."""
    kept = {place: place[0]._buffers[place[1]] for place in buffers}
    for (owner, leaf), buffer in buffers.items():
        owner._buffers[leaf] = buffer.clone()
    try:
        yield
    finally:
        for (owner, leaf), buffer in kept.items():
            owner._buffers[leaf] = buffer
