"""A state as named pieces of whole tensors: what a rank holds, in global order, and DCP's plans over it."""

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@frozen(eq=False)
class Piece:
    """A rank's part of a tensor: element [i, j, ...] of `local` is element [index[0][i], index[1][j], ...] of the
    whole, which has `shape`."""

    shape: tuple[int, ...]
    local: Tensor
    index: tuple[Tensor, ...]

    @staticmethod
    def whole(tensor: Tensor) -> "Piece":
        """A tensor that every rank holds all of."""
        return Piece(tuple(tensor.shape), tensor, tuple(map(torch.arange, tensor.shape)))

    def boxes(self) -> dict[tuple[int, ...], Tensor]:
        """Offset in the whole -> a view of the local tensor; together they are all of it, and none overlaps another.

        A rank's rows are one run where they are split plainly, and several where a finer split lies outside
        (`(2 F@tp)`). Files hold boxes, so that they say nothing about a mesh. A tensor without elements is one box.
        """
        assert tuple(self.local.shape) == tuple(map(len, self.index)), "a piece has a position for each element"
        if not prod(self.shape):
            return {(0,) * len(self.shape): self.local}
        found: dict[tuple[int, ...], Tensor] = {}
        for box in product(*map(runs, self.index)):
            view = self.local
            for dim, (start, _, length) in enumerate(box):
                view = view.narrow(dim, start, length)
            found[tuple(offset for _, offset, _ in box)] = view
        return found


def runs(positions: Tensor) -> list[tuple[int, int, int]]:
    """The runs of consecutive numbers in a 1-d tensor: (where it starts, its first number, its length) of each."""
    if not len(positions):
        return []
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    stops = [*starts[1:], len(positions)]
    return [(start, int(positions[start]), stop - start) for start, stop in zip(starts, stops, strict=True)]


class PieceSaver(DefaultSavePlanner):
    """Has DCP write the boxes of this rank's pieces; a box that several ranks hold is written by one of them."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces
        self.boxes = {name: piece.boxes() for name, piece in pieces.items()}

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for name, boxes in self.boxes.items():
            size = torch.Size(self.pieces[name].shape)
            for offset, view in boxes.items():
                written = TensorWriteData(_chunk(offset, view), TensorProperties.create_from_tensor(view), size)
                items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=written))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        assert index.offset is not None, "every item was planned with its offset"
        return self.boxes[index.fqn][tuple(index.offset)]


class PieceLoader(DefaultLoadPlanner):
    """Has DCP fill this rank's pieces, from files of any mesh."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = {name: piece.boxes() for name, piece in pieces.items()}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "DCP reads the metadata first"
        items: list[ReadItem] = []
        for name, boxes in self.boxes.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), "a checkpoint holds tensors alone"
            chunks = [_chunk(offset, view) for offset, view in boxes.items()]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "every item was planned with its offset"
        return self.boxes[index.fqn][tuple(index.offset)]


def _chunk(offset: tuple[int, ...], view: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), view.size())


# Nests.


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a nest of dicts, lists and tuples, each with its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for position, value in enumerate(tree):
            yield from leaves(value, (*path, str(position)))
    else:
        yield path, tree


def with_leaves(tree: Any, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> Any:
    """The same nest with other leaves, by path."""
    if isinstance(tree, dict):
        return {key: with_leaves(value, values, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [with_leaves(value, values, (*path, str(position))) for position, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return values[path]


def entry(*path: str) -> str:
    """A path as one name, as a JSON pointer is written (RFC 6901): `optimizer/exp_avg/norm.weight`."""
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
