"""What a training run is: parameters, buffers, optimizer state, step and randomness; frozen, and donated."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Self

from attrs import define, field, frozen
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardspec.diagnostics import DonatedError
from shardspec.runtime.optim import Optimizer
from shardspec.runtime.rank_major import state_view
from shardspec.torch_private import (
    disabled_torch_function,
    local_of,
    make_wrapper_subclass,
    replace_local,
)

Specs = Mapping[str, Any]
"""FQN -> what a DTensor view needs to know."""


class _Donated(Tensor):
    """What lies under a view whose state was donated: any use of it raises."""

    def __new__(cls, like: Tensor) -> Self:
        return make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise DonatedError(f"{func} reads a tensor of a state that a step has consumed; use the state that it returned")


@define(eq=False)
class Store:
    """Local tensors by name, and the DTensor views of them that were handed out."""

    locals: dict[str, Tensor]
    specs: Specs
    views: dict[str, Tensor] | None = None

    def view(self) -> dict[str, Tensor]:
        """FQN -> DTensor over the same storage; made when first asked for."""
        if self.views is None:
            self.views = {
                name: state_view(local, self.specs[name]) if name in self.specs else local
                for name, local in self.locals.items()
            }
        return self.views

    def poison(self) -> None:
        """Have every view that was handed out raise."""
        for view in (self.views or {}).values():
            if isinstance(view, DTensor):
                replace_local(view, _Donated(local_of(view)))
        self.views = None


@frozen(eq=False)
class OptState:
    """An optimizer's state; `optimizer` is static. `slots` is as the optimizer made it, over DTensors."""

    optimizer: Optimizer
    raw: Any = field(repr=False)
    """As the optimizer sees it: a nest of local tensors."""
    specs: Specs = field(repr=False, factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False, factory=dict)
    """The shape of this rank's part of each parameter."""
    stores: list[Store] = field(factory=list, repr=False)

    @property
    def slots(self) -> Any:
        """The state with a DTensor for each tensor that belongs to a parameter."""
        return self._wrap(self.raw)

    def __getitem__(self, key: str) -> Any:
        return self.slots[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def belongs(self, name: Any, value: Any) -> bool:
        """Whether a value by that name has an element for each one of a parameter, and so lies as it does."""
        return name in self.shapes and isinstance(value, Tensor) and tuple(value.shape) == self.shapes[name]

    def _wrap(self, tree: Any) -> Any:
        if isinstance(tree, (list, tuple)):
            items = [self._wrap(item) for item in tree]
            return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
        if not isinstance(tree, dict):
            return tree
        store = Store({name: value for name, value in tree.items() if self.belongs(name, value)}, self.specs)
        if store.locals:
            self.stores.append(store)
        return {key: self._wrap(value) for key, value in tree.items()} | store.view()

    def poison(self) -> None:
        """Have every view that was handed out raise."""
        for store in self.stores:
            store.poison()
        self.stores.clear()


class Here(dict[str, Tensor]):
    """What lies on this rank, by name; a name that lies on another is a KeyError that says so."""

    def __init__(self, found: Mapping[str, Tensor], elsewhere: Callable[[str], str]) -> None:
        super().__init__(found)
        self.elsewhere = elsewhere

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(self.elsewhere(name) or name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


@define(eq=False)
class _Held:
    """The part of a state that a step consumes."""

    params: Store
    buffers: Store
    opt: OptState | None
    donated: str = ""
    finite: "Finite | None" = None
    """Whether the step that made the state was finite, until somebody has asked."""


@frozen(eq=False, init=False)
class TrainState:
    """A run between two steps.

    `params` and `buffers`: dict of FQN -> DTensor over the mesh axes larger than one, in mesh order.
    `opt_state`: the optimizer's. `step`: how many updates were made. `rng`: the key of
    the next step's randomness.

    A step consumes the state that it is given: `params`, `buffers` and `opt_state` of it then raise
    `DonatedError`, as does any view taken from them. `step` and `rng` stay readable.
    """

    step: int
    rng: int
    home: Any = field(repr=False)
    """The `Sharded` that made it: static."""
    held: _Held = field(repr=False)

    def __init__(
        self,
        *,
        step: int,
        rng: int,
        home: Any,
        params: Store,
        buffers: Store,
        opt: OptState | None,
        finite: "Finite | None" = None,
    ) -> None:
        self.__attrs_init__(step, rng, home, _Held(params, buffers, opt, finite=finite))  # pyright: ignore[reportAttributeAccessIssue]

    def live(self) -> _Held:
        """What the state holds.

        Raises:
            DonatedError: where a step has consumed it.
        """
        if self.held.donated:
            raise DonatedError(
                f"the state of step {self.step} was consumed by {self.held.donated}; use the state that it "
                "returned, or pass donate=False"
            )
        return self.held

    @property
    def params(self) -> dict[str, Tensor]:
        """FQN -> DTensor; under pp of what lies on this rank's stages."""
        return Here(self.live().params.view(), self.home.elsewhere)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """FQN -> DTensor, for persistent buffers."""
        return dict(self.live().buffers.view())

    @property
    def opt_state(self) -> OptState | None:
        """The optimizer's state."""
        return self.live().opt

    def with_params(self, params: Mapping[str, Tensor]) -> "TrainState":
        """The state with other parameters, such as an average, and without an optimizer: to evaluate and to export.

        What is given may be this state's own; a later step that consumes this state leaves the new one as it is.

        Raises:
            ShardingError: SS407 for a missing or unknown name, or one that lies otherwise than the plan says.
        """
        held = self.live()
        own = {local.untyped_storage().data_ptr() for local in held.params.locals.values()}
        found = {
            name: local.clone() if local.untyped_storage().data_ptr() in own else local
            for name, local in self.home.locals_of(params).items()
        }
        return TrainState(
            step=self.step,
            rng=self.rng,
            home=self.home,
            params=Store(found, held.params.specs),
            buffers=Store(held.buffers.locals, held.buffers.specs),
            opt=None,
        )

    def check_finite(self) -> None:
        """Tell, once, that the step which made the state was not finite.

        Raises:
            NonFiniteError: then; the state holds what was there before that step.
        """
        finite, self.held.finite = self.held.finite, None
        if finite is not None:
            finite.check()

    def donate(self, to: str) -> None:
        """Consume the state."""
        held = self.live()
        held.params.poison()
        held.buffers.poison()
        if held.opt is not None:
            held.opt.poison()
        held.donated = to


def next_rng(rng: int) -> int:
    """The key of the step after one: a step's randomness follows from its state alone."""
    return int.from_bytes(hashlib.blake2b(str(rng).encode(), digest_size=7).digest(), "big")


def copy_tree(tree: Any) -> Any:
    """A nest of dicts with every tensor cloned."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: copy_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [copy_tree(value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


class NonFiniteError(FloatingPointError):
    """A step met a loss or a gradient that is not finite, and skipped its update."""


class Metric(Tensor):
    """A 0-dim metric that, when it is read on the host, tells whether its step was finite."""

    __torch_function__ = disabled_torch_function  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def wrap(value: Tensor, finite: "Finite") -> "Metric":
        """Make a metric of a 0-dim tensor."""
        metric = value.detach().as_subclass(Metric)
        metric.finite = finite  # pyright: ignore[reportAttributeAccessIssue]
        return metric

    def item(self) -> Any:
        self.finite.check()  # pyright: ignore[reportAttributeAccessIssue]
        return super().item()

    def __float__(self) -> float:
        return float(self.item())

    def tolist(self) -> Any:
        self.finite.check()  # pyright: ignore[reportAttributeAccessIssue]
        return super().tolist()

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return repr(self.as_subclass(Tensor))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)


@define(eq=False)
class Finite:
    """Whether a step was finite: known on the device at once, on the host when somebody asks."""

    step: int
    found_inf: Tensor
    told: bool = False

    def check(self) -> None:
        """Raise if the step was not finite.

        Raises:
            NonFiniteError: once the device's answer is here.
        """
        if not self.told and bool(self.found_inf):
            self.told = True
        if self.told:
            raise NonFiniteError(
                f"step {self.step}: the loss or the gradient norm is not finite; the update was skipped, and the state "
                "that the step returned holds the parameters from before it"
            )
