"""A state's tensors whose rows no DTensor placement describes: elementwise operators, and nothing that mixes rows."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardspec.placement import RankMajor
from shardspec.runtime.gather import gather
from shardspec.torch_private import OpOverload, local_of, make_spec, spec_of, view_as_dtensor

aten = torch.ops.aten

ALIKE = frozenset({
    aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default, aten.copy_.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.zero_.default, aten.fill_.Scalar,
})  # fmt: skip
"""Operators without torch's pointwise tag that read and write each element alone."""


class RankMajorTensor(DTensor):
    """A DTensor some of whose dims are placed `RankMajor`.

    Elementwise operators over tensors that lie alike, and over numbers, run on the local rows: an average of weights
    is one. Any other operator raises TypeError; `ss.full` and `full_tensor` give the rows in their own order.
    """

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        first = next((item for item in given if isinstance(item, RankMajorTensor)), None)
        if first is None or not is_elementwise(func) or not all(_goes_with(item, first) for item in given):
            _refuse(func)
        out = func(*map(_local, args), **{name: _local(item) for name, item in kwargs.items()})
        if func._schema.is_mutable:
            return args[0]
        same = out.dtype == first.dtype
        spec = spec_of(first)
        if not same:
            spec = make_spec(first.device_mesh, first.placements, tuple(first.shape), out.dtype)
        return view_as_dtensor(out, spec, RankMajorTensor)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole tensor, its rows in their own order; every rank of its mesh must call it."""
        del grad_placements
        return gather(self)

    def __create_write_items__(self, fqn: str, object: Any) -> NoReturn:
        _refuse("torch.distributed.checkpoint")

    def __create_chunk_list__(self) -> NoReturn:
        _refuse("torch.distributed.checkpoint")


def _refuse(operator: Any) -> NoReturn:
    raise TypeError(
        f"{operator} of a tensor that holds its rows in rank-major order (a direct sum, or a strided dim stored in "
        "slices): only elementwise operators over tensors that lie alike have a meaning; ss.full puts it together"
    )


def is_elementwise(func: Any) -> bool:
    """Whether an operator makes one tensor of which an element reads one element of each operand."""
    if not isinstance(func, OpOverload) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    results = func._schema.returns
    one = len(results) == 1 and str(results[0].type) == "Tensor"
    in_place = not func._schema.is_mutable or func.overloadpacket.__name__.endswith("_")
    return one and in_place and (torch.Tag.pointwise in func.tags or func in ALIKE)


def _goes_with(item: Any, first: RankMajorTensor) -> bool:
    if isinstance(item, RankMajorTensor):
        alike = item.placements == first.placements and item.shape == first.shape
        return alike and item.device_mesh == first.device_mesh
    if isinstance(item, DTensor):
        return item.ndim == 0 and all(placement.is_replicate() for placement in item.placements)
    if isinstance(item, (list, tuple)):
        return not any(isinstance(one, Tensor) for one in item)
    return not isinstance(item, Tensor) or item.ndim == 0


def _local(item: Any) -> Any:
    return local_of(item) if isinstance(item, Tensor) else item


def state_view(local: Tensor, spec: Any) -> DTensor:
    """A DTensor of the kind that its placements need, over the storage of a local tensor."""
    kind = RankMajorTensor if any(isinstance(one, RankMajor) for one in spec.placements) else DTensor
    return view_as_dtensor(local, spec, kind)
