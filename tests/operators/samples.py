"""PyTorch's own `op_db` as operators on concrete inputs: each of its samples is a function of its tensors."""

import importlib.util
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from shardspec.nests import replace_tensors, tensor_leaves

MOST_ELEMENTS = 4096
"""Samples with a larger tensor are left out: they say nothing that a smaller one does not."""

UNDEFINED = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"})
"""Operators whose result has no defined value."""

OTHER_DTYPES = (torch.int64, torch.bool, torch.complex128, torch.float32)
"""Of which one sample each is drawn, beside those in float64."""


@frozen(eq=False)
class Sample:
    """One call of an operator, as a function of its tensors."""

    name: str
    """`op_db`'s name, with its variant: `nn.functional.pad.reflect`, `add in place`."""
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]

    def with_constants(self) -> "Sample":
        """The same, the gradient of the first tensor alone asked for: of some operands torch knows none."""
        return evolve(self, call=lambda first, *rest: self.call(first, *(tensor.detach() for tensor in rest)))

    def __str__(self) -> str:
        held = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in self.inputs)
        return f"{self.name}({held})"


def op_db() -> list[Any]:
    """The operators of torch's test kit, by name; its one import that torch does not bring is stood in for."""
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        # Its TestCase is a base class of torch's own, of which nothing here runs.
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False)
    found = importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
    return sorted(found, key=name_of)


def name_of(operator: Any) -> str:
    """An operator's name with its variant."""
    variant = operator.variant_test_name
    return f"{operator.name}.{variant}" if variant else operator.name


def samples(operator: Any, seed: int, most: int) -> list[Sample]:
    """At most `most` samples of an operator in float64, one in another dtype, and two of its in-place form.

    Those are drawn by `seed`, and so are the values in them.
    """
    name, rng = name_of(operator), Random(f"{name_of(operator)} {seed}")
    if operator.name in UNDEFINED:
        return []
    supported = operator.supported_dtypes("cpu")
    main = next((dtype for dtype in (torch.float64, torch.int64, torch.bool) if dtype in supported), None)
    if main is None:
        return []
    found = list(_of_dtype(operator, main, seed))
    chosen = [Sample(name, _function(operator.op, *one), one[0]) for one in _draw(rng, found, most)]
    others = [dtype for dtype in OTHER_DTYPES if dtype in supported and dtype != main]
    if others:
        dtype = rng.choice(others)
        drawn = _draw(rng, list(_of_dtype(operator, dtype, seed)), 1)
        chosen += [Sample(f"{name} of {str(dtype)[6:]}", _function(operator.op, *one), one[0]) for one in drawn]
    inplace = operator.get_inplace()
    if inplace is not None:
        drawn = _draw(rng, [one for one in found if not one[2] and any(tensor.ndim for tensor in one[0])], 2)
        chosen += [Sample(f"{name} in place", _function(_on_a_copy(inplace), *one), one[0]) for one in drawn]
    return chosen


Arguments = tuple[tuple[Tensor, ...], Any, bool]
"""A sample's distinct tensors, the nest of its arguments, and whether its operands broadcast its input."""


def _of_dtype(operator: Any, dtype: torch.dtype, seed: int) -> Iterator[Arguments]:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in operator.sample_inputs("cpu", dtype, requires_grad=False):
            nest = ((sample.input, *sample.args), sample.kwargs)
            tensors = tuple({id(tensor): tensor for tensor in tensor_leaves(nest)}.values())
            plain = all(tensor.layout is torch.strided and tensor.numel() <= MOST_ELEMENTS for tensor in tensors)
            if plain and not any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors):
                yield tensors, nest, sample.broadcasts_input


def _draw(rng: Random, found: list[Arguments], most: int) -> list[Arguments]:
    return found if len(found) <= most else rng.sample(found, most)


def _function(op: Callable[..., Any], tensors: tuple[Tensor, ...], nest: Any, broadcasts: bool) -> Callable[..., Any]:
    """The call as a function of its tensors, the other arguments fixed."""
    del broadcasts
    order = {id(tensor): index for index, tensor in enumerate(tensors)}

    def call(*given: Tensor) -> Any:
        args, kwargs = replace_tensors(nest, lambda tensor: given[order[id(tensor)]])
        return op(*args, **kwargs)

    return call


def _on_a_copy(inplace: Callable[..., Any]) -> Callable[..., Any]:
    return lambda first, *args, **kwargs: inplace(first.clone(), *args, **kwargs)
