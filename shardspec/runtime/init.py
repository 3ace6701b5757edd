"""Recording of what a model's constructors do to its parameters, to be replayed on any mesh.

`record` builds a model with its parameters on meta and notes, for each, the operations that would have
made its value; `materialise` (from `recipe`) evaluates them for a rank's part.
"""

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from shardspec.runtime.recipe import (
    ELEMENTWISE,
    RANDOM,
    SOURCES,
    NotReplayable,
    Recipe,
    Step,
    materialise,
    strides,
)
from shardspec.torch_private import TorchDispatchMode, replace_trunc_normal, tree_leaves

__all__ = ["NotReplayable", "Recipe", "Step", "materialise", "record"]


def record(build: Callable[[], nn.Module], *, seed: int = 0) -> tuple[nn.Module, dict[str, Recipe]]:
    """Call `build`; return its module, parameters on meta and buffers real, and each parameter's recipe.

    Tied parameters have one recipe, under all their names. Torch's CPU generator is put back as it was;
    meanwhile it is seeded with `seed`, so that random buffers are the same on every rank.
    """
    with _LOCK, _seeded(seed), _Recorder() as recorder, _RealFace(recorder):
        module = build()
    for submodule in module.modules():
        for name, param in submodule.named_parameters(recurse=False, remove_duplicate=False):
            if not _on_meta(param):  # put into _parameters behind register_parameter's back
                submodule._parameters[name] = recorder.to_meta(param)  # pyright: ignore[reportPrivateUsage]
    return module, recorder.recipes(module)


Args = Sequence[Any]
Kwargs = dict[str, Any]
_View = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset

_LOCK = threading.RLock()  # a patched function of nn.init and torch's generator belong to the process


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


@attrs.frozen(eq=False)
class _Event:
    """A Step in the making: `view` is (size, stride, offset) of what was written, None for all.

    Random events are told apart by identity: what was copied shares its numbers.
    """

    op: str
    args: tuple[Any, ...] = ()
    view: _View | None = None


@attrs.define(eq=False)
class _Record:
    """What is known of the value in one storage. No events and no reason: uninitialised."""

    numel: int
    events: list[_Event] = attrs.field(factory=list)
    reason: str | None = None
    converted: bool = False

    @property
    def deterministic(self) -> bool:
        return self.reason is None and all(event.op not in RANDOM for event in self.events)

    @property
    def filled(self) -> float | None:
        """The one number that all elements are, if that is what they are."""
        if self.reason is None and len(self.events) == 1 and self.events[0].op == "fill":
            return self.events[0].args[0]
        return None

    def add(self, event: _Event) -> None:
        if event.view is None and event.op in SOURCES:
            self.events, self.reason = [], None
        self.events.append(event)


class _Unsupported(Exception):
    """An operation that has no step."""


def _event(op: str, args: Args, kwargs: Kwargs, view: _View | None = None) -> _Event:
    """Normalise an ATen call without its first operand to an event; raise _Unsupported."""
    if op == "zero":
        op, args = "fill", (0.0,)
    function, lead = (SOURCES[op], (None,) * 3) if op in SOURCES else (ELEMENTWISE.get(op), (None,))
    if function is None:
        raise _Unsupported
    kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
    try:
        bound = inspect.signature(function).bind(*lead, *args, **kwargs)
    except TypeError as error:
        raise _Unsupported from error
    bound.apply_defaults()
    return _Event(op, bound.args[len(lead) :], view)


# Factories: what they fill a tensor with, None for nothing.
_FACTORIES: dict[str, Callable[..., _Event | None]] = {
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"), lambda *_: None),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda *_: _Event("fill", (0.0,))),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda *_: _Event("fill", (1.0,))),
    **dict.fromkeys(("full", "full_like"), lambda _size, value: _Event("fill", (value,))),
    "new_full": lambda _self, _size, value: _Event("fill", (value,)),
    "scalar_tensor": lambda value: _Event("fill", (value,)),
    **dict.fromkeys(("rand", "rand_like"), lambda *_: _Event("uniform")),
    **dict.fromkeys(("randn", "randn_like"), lambda *_: _Event("normal")),
    "normal.float_float": lambda mean, std, _size: _Event("normal", (mean, std)),
}


class _Recorder(TorchDispatchMode):
    """Keeps a _Record for each storage that a factory made or a random operation filled.

    Storage is what aliases share: `.data`, views and a parameter's real and meta forms need no care.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
        self.twins = WeakTensorKeyDictionary()
        self.thread = threading.get_ident()
        self.paused = False

    def __enter__(self) -> Self:
        hook: Any = self._on_register  # torch annotates it without its result
        self.hook = register_module_parameter_registration_hook(hook)
        self.trunc_normal = replace_trunc_normal(self._on_trunc_normal)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        replace_trunc_normal(self.trunc_normal)
        self.hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused:
            self._note(func, args, kwargs, out)
        return out

    @contextmanager
    def _pause(self) -> Generator[None]:
        paused, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = paused

    def _on_register(self, _module: nn.Module, _name: str, param: nn.Parameter) -> Tensor | None:
        if threading.get_ident() != self.thread or _on_meta(param) or nn.parameter.is_lazy(param):
            return None
        return self.to_meta(param)

    def _on_trunc_normal(
        self, tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
    ) -> Tensor:
        """Torch draws again what lies outside, a loop that ends when the numbers say so."""
        if threading.get_ident() != self.thread:
            return self.trunc_normal(tensor, mean, std, a, b, generator)
        with self._pause():
            if not _on_meta(tensor):
                self.trunc_normal(tensor, mean, std, a, b, generator)
            self._write(tensor, _Event("trunc_normal", (mean, std, a, b), _view(tensor)))
        return tensor

    def to_meta(self, tensor: Tensor) -> nn.Parameter:
        """Return the meta twin of a real parameter (or of a tensor that takes one's place)."""
        if tensor not in self.twins:
            with self._pause():
                meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                twin = nn.Parameter(meta, requires_grad=tensor.requires_grad)
                if isinstance(tensor, nn.Parameter):
                    twin.__class__ = type(tensor)
                vars(twin).update(vars(tensor))
                found = self._record_of_whole(tensor)
                found.converted = True
                self.records[twin.untyped_storage()] = found
                self.twins[tensor] = twin
        return self.twins[tensor]

    def _record_of_whole(self, tensor: Tensor) -> _Record:
        """Return the record of a real tensor's value: the data themselves, unless random or one number."""
        found = self.records.get(tensor.untyped_storage())
        if found is None or (found.deterministic and (found.events or not _is_all_of(tensor, found))):
            if found is None or found.filled is None:
                found = _Record(tensor.numel(), [_Event("constant", (tensor.detach().clone(),))])
        elif not _is_all_of(tensor, found):
            found = _Record(tensor.numel(), reason=found.reason or "it is a part of a larger random tensor")
        self.records[tensor.untyped_storage()] = found
        return found

    def _note(self, func: Any, args: Args, kwargs: Kwargs, out: Any) -> None:
        op, inputs = func.overloadpacket.__name__, _tensors((args, kwargs))
        written = _written(func, args, kwargs)
        factory = _FACTORIES.get(op) or _FACTORIES.get(str(func).removeprefix("aten."))
        if written:
            self._note_write(op, args, kwargs, written, inputs)
        elif factory is not None:
            event = factory(*args)
            self.records[out.untyped_storage()] = _Record(out.numel(), [event] if event else [])
        else:
            self._note_results(func, args, kwargs, _tensors(out), inputs)

    def _note_write(self, op: str, args: Args, kwargs: Kwargs, written: list[Tensor], inputs: list[Tensor]) -> None:
        target: Any = args[0] if args else None
        others = [t for t in inputs if t is not target]
        try:
            if op == "copy_":
                self._copy(target, args[1])
            elif op.endswith("_") and len(written) == 1 and written[0] is target:
                self._write(target, self._event(op[:-1], args, kwargs, _view(target)))
            else:
                raise _Unsupported
        except _Unsupported as error:
            for tensor in written:
                self._spoil(tensor, str(error) or f"it was written by aten.{op}", others)

    def _write(self, target: Tensor, event: _Event) -> None:
        """Note what an operation did to a tensor, all or a part of its storage."""
        if target.numel() == 0:
            return
        found = self.records.get(target.untyped_storage())
        if found is None:
            if not _on_meta(target) and event.op not in RANDOM:
                return  # real, and its data say it all
            numel = target.untyped_storage().nbytes() // target.element_size()
            found = _Record(numel, reason="its value before the recorded operations is not known")
            self.records[target.untyped_storage()] = found
        if target.numel() == found.numel:
            event = attrs.evolve(event, view=None)
        found.add(event)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        found = self.records.get(source.untyped_storage())
        if (value := self._single(source)) is not None:
            return self._write(target, _Event("fill", (value,), _view(target)))
        goal = self.records.get(target.untyped_storage())
        if goal is None or not _is_all_of(target, goal):
            raise _Unsupported
        if found is not None and _is_all_of(source, found) and source.shape == target.shape and found.events:
            goal.events, goal.reason = list(found.events), found.reason
            return goal.add(_Event("_to_copy", (target.dtype,)))
        if not self._has_data(source):
            raise _Unsupported(found.reason if found and found.reason else "")
        with self._pause():
            return goal.add(_Event("constant", (source.detach().expand(target.shape).clone(),)))

    def _event(self, op: str, args: Args, kwargs: Kwargs, view: _View | None = None) -> _Event:
        kwargs = {key: self._scalar(value) for key, value in kwargs.items()}
        return _event(op, [self._scalar(value) for value in args[1:]], kwargs, view)

    def _scalar(self, value: Any) -> Any:
        """Return an argument as a Python number; tensors of more than one value are not supported."""
        if not isinstance(value, Tensor):
            return value
        if (number := self._single(value)) is None:
            raise _Unsupported
        return number

    def _single(self, tensor: Tensor) -> float | None:
        """Return the number that all elements of a tensor are, where that is known."""
        found = self.records.get(tensor.untyped_storage())
        if found is not None and found.filled is not None:
            return found.filled
        if tensor.numel() == 1 and not _on_meta(tensor) and (found is None or found.deterministic):
            return tensor.item()
        return None

    def _note_results(self, func: Any, args: Args, kwargs: Kwargs, outs: list[Tensor], inputs: list[Tensor]) -> None:
        op, shared = func.overloadpacket.__name__, {t.untyped_storage() for t in inputs}
        fresh = [out for out in outs if out.untyped_storage() not in shared]
        for out in fresh:
            try:
                self.records[out.untyped_storage()] = self._derived(op, args, kwargs, out)
            except _Unsupported:
                if torch.Tag.nondeterministic_seeded in func.tags or not all(map(self._has_data, inputs)):
                    reason = f"it was computed by aten.{op} from random numbers or from other parameters"
                    self.records[out.untyped_storage()] = _Record(out.numel(), reason=reason)

    def _derived(self, op: str, args: Args, kwargs: Kwargs, out: Tensor) -> _Record:
        """Return the record of an elementwise result."""
        if op in ("add", "mul") and len(args) == 2 and isinstance(args[1], Tensor) and args[0].dim() == 0:
            args = args[::-1]
        if not args or not isinstance(source := args[0], Tensor):
            raise _Unsupported
        found = self.records.get(source.untyped_storage())
        if found is None or not found.events or not _is_all_of(source, found) or source.shape != out.shape:
            raise _Unsupported
        if not out.is_contiguous():
            raise _Unsupported
        return _Record(found.numel, [*found.events, self._event(op, args, kwargs)], found.reason)

    def _has_data(self, tensor: Tensor) -> bool:
        """Whether the tensor is real, and the same for every seed."""
        found = self.records.get(tensor.untyped_storage())
        return not _on_meta(tensor) and (found is None or found.deterministic)

    def _spoil(self, target: Tensor, reason: str, others: list[Tensor]) -> None:
        """Note a write that has no step: where all is real, the data themselves are the value."""
        found = self.records.get(target.untyped_storage())
        converted = found is not None and found.converted
        if all(map(self._has_data, [target, *others])) and not converted:
            self.records.pop(target.untyped_storage(), None)
        elif found is None:
            self.records[target.untyped_storage()] = _Record(target.numel(), reason=reason)
        else:
            found.reason = found.reason or reason

    def recipes(self, module: nn.Module) -> dict[str, Recipe]:
        """Return each parameter's recipe; a random step's stream is named by the first that has it."""
        streams: dict[_Event, tuple[str, int]] = {}
        found = {}
        for name, param in module.named_parameters(remove_duplicate=False):
            ordinals = itertools.count()
            try:
                events = self._events(param)
                for event in events:
                    if event.op in RANDOM and event not in streams:
                        streams[event] = (name, next(ordinals))
                found[name] = Recipe(steps=tuple(_step(event, param.shape, streams) for event in events))
            except _Unsupported as reason:
                found[name] = Recipe(reason=str(reason))
        return found

    def _events(self, param: Tensor) -> list[_Event]:
        """Return the events that make a parameter; raise _Unsupported with the reason why they do not."""
        if nn.parameter.is_lazy(param):
            raise _Unsupported("it is lazy: its shape is not known")
        found = self.records.get(param.untyped_storage())
        if found is None:
            raise _Unsupported("it was made before or outside the function that builds the model")
        if found.reason is not None:
            raise _Unsupported(found.reason)
        if not _is_all_of(param, found):
            raise _Unsupported("it is a part of a larger tensor, or its strides are not row-major")
        if not found.events and param.numel():
            raise _Unsupported("it is left uninitialised")
        return found.events


# Getters and setters are what a function mode is told of; bound anew each time, they are equal.
_TENSOR: Any = Tensor
_GET_IS_META = _TENSOR.is_meta.__get__
_SET_DATA = _TENSOR.data.__set__


class _RealFace(TorchFunctionMode):
    """Lets parameters on meta look real: constructors ask `is_meta`, and assign `.data`.

    nn.init's orthogonal_, sparse_ and dirac_ leave a meta tensor alone without a word.
    """

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _GET_IS_META:
            return False
        if func == _SET_DATA and _on_meta(args[0]) and not _on_meta(args[1]):
            args = (args[0], self.recorder.to_meta(args[1]).detach())
        return func(*args, **(kwargs or {}))


def _on_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"  # is_meta is overridden while a model is built


def _step(event: _Event, shape: torch.Size, streams: dict[_Event, tuple[str, int]]) -> Step:
    args = tuple(arg.reshape(shape) if isinstance(arg, Tensor) else arg for arg in event.args)
    region = None if event.view is None else _region(*event.view, shape)
    return Step(op=event.op, args=args, region=region, stream=streams.get(event))


def _region(size: tuple[int, ...], stride: tuple[int, ...], offset: int, shape: torch.Size) -> tuple[range, ...]:
    """Return the elements of a row-major tensor of `shape` that a view of its storage holds, dim by dim."""
    first = []
    for whole in strides(shape):
        first.append(offset // whole)
        offset %= whole
    region = [range(start, start + 1) for start in first]
    for length, jump in zip(size, stride, strict=True):
        if length == 1:
            continue
        dim = next((d for d, whole in enumerate(strides(shape)) if shape[d] > 1 and 0 < whole <= jump), None)
        if dim is None or jump % strides(shape)[dim] or len(region[dim]) > 1:
            raise _Unsupported("a part of it was written through a view that is no range of each dim")
        step = jump // strides(shape)[dim]
        region[dim] = range(first[dim], first[dim] + step * (length - 1) + 1, step)
        if region[dim][-1] >= shape[dim]:
            raise _Unsupported("a part of it was written through a view that is no range of each dim")
    return tuple(region)


def _view(tensor: Tensor) -> _View:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _is_all_of(tensor: Tensor, found: _Record) -> bool:
    return tensor.numel() == found.numel and tensor.storage_offset() == 0 and tensor.is_contiguous()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call changes, by its schema."""
    formals = func._schema.arguments
    given = {formal.name: value for formal, value in zip(formals, args, strict=False)} | kwargs
    written = {formal.name for formal in formals if formal.alias_info and formal.alias_info.is_write}
    return _tensors([value for name, value in given.items() if name in written])
