"""The mesh of devices, as sizes of the six logical axes; no device is touched here."""

import difflib
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Literal

from attrs import field, frozen

from shardspec.diagnostics import refuse

AXES: tuple[str, ...] = ("pp", "dp", "fsdp", "ep", "cp", "tp")
"""Every axis, outermost first: neighbours along `tp` are neighbours in rank."""

BATCH_AXES: tuple[str, ...] = ("dp", "fsdp", "ep")
"""The axes whose ranks read different rows of the batch."""

MESH_RULES = "the axes are " + ", ".join(AXES)


FOREIGN = {
    "data": "dp",
    "ddp": "dp",
    "zero": "fsdp",
    "expert": "ep",
    "context": "cp",
    "sequence": "cp",
    "model": "tp",
    "tensor": "tp",
    "pipe": "pp",
    "stage": "pp",
}
"""What other libraries call the axes."""


def meant(word: str) -> tuple[str, ...]:
    """The axis that a word was meant for, as advice."""
    near = [FOREIGN[word]] if word in FOREIGN else difflib.get_close_matches(word.lower(), AXES, n=1)
    return (f"did you mean {near[0]}?",) if near else ()


def _check_size(axis: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        refuse("SS101", f"mesh axis {axis} has size {size!r}", why="a size is a whole number of at least 1")
    return size


def _fill(asked: dict[str, int | str], world: int | None) -> dict[str, int]:
    """Give the axis that says "auto" what the world leaves."""
    auto = [axis for axis, size in asked.items() if size == "auto"]
    sizes = {axis: _check_size(axis, size) for axis, size in asked.items() if size != "auto"}
    known = 1
    for size in sizes.values():
        known *= size
    if not auto:
        if world is not None and world != known:
            refuse("SS102", f"the mesh holds {known} ranks, the world {world}", why=_product(sizes, known))
        return sizes
    if len(auto) > 1:
        refuse("SS101", f"two axes are 'auto': {', '.join(auto)}", why="one axis can take what the others leave")
    if world is None:
        told = os.environ.get("WORLD_SIZE")
        if told is None:
            refuse(
                "SS101",
                f"mesh axis {auto[0]} is 'auto' and nothing tells the world size",
                why="neither world= nor the variable WORLD_SIZE is set",
                advice=("give world=, or start under torchrun",),
            )
        if not told.isdecimal() or int(told) < 1:
            refuse("SS101", f"mesh axis {auto[0]} is 'auto' and WORLD_SIZE is {told!r}", why="it counts the ranks")
        world = int(told)
    if world % known:
        refuse(
            "SS102",
            f"the mesh's sizes do not divide a world of {world} ranks",
            why=f"{_product(sizes, known)}; {world} / {known} is not whole, so {auto[0]} has no size",
        )
    return {**sizes, auto[0]: world // known}


def _product(sizes: Mapping[str, int], product: int) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) + f" = {product}"


@frozen(init=False, repr=False)
class Mesh:
    """The sizes of the mesh's axes; an absent axis has size 1.

    One axis may be `"auto"`: it takes what `world` (or the variable WORLD_SIZE) leaves.

    Raises:
        ShardingError: SS101 for a size that is none, SS102 for sizes that do not make up the world.
    """

    sizes: tuple[int, ...] = field()

    def __init__(
        self,
        *,
        pp: int | Literal["auto"] = 1,
        dp: int | Literal["auto"] = 1,
        fsdp: int | Literal["auto"] = 1,
        ep: int | Literal["auto"] = 1,
        cp: int | Literal["auto"] = 1,
        tp: int | Literal["auto"] = 1,
        world: int | None = None,
    ) -> None:
        asked: dict[str, int | str] = {"pp": pp, "dp": dp, "fsdp": fsdp, "ep": ep, "cp": cp, "tp": tp}
        filled = _fill(asked, world)
        self.__attrs_init__(sizes=tuple(filled[axis] for axis in AXES))  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def parse(cls, text: str, world: int | None = None) -> "Mesh":
        """Read `"fsdp=2,tp=2"`; the empty string is the mesh of one rank.

        Raises:
            ShardingError: SS101 for an unknown axis or a size that is no number.
        """
        asked: dict[str, int | str] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or not equals:
                refuse("SS101", f"mesh {text!r}: {part!r} is not axis=size", why=MESH_RULES, advice=meant(axis))
            if axis in asked:
                refuse("SS101", f"mesh {text!r}: {axis} is given twice")
            if size != "auto" and not size.isdecimal():
                refuse("SS101", f"mesh {text!r}: {size!r} is not a size", why="a whole number, or auto")
            asked[axis] = size if size == "auto" else int(size)
        return cls(**asked, world=world)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, axis: str) -> int:
        return self.sizes[AXES.index(axis)]

    @property
    def world(self) -> int:
        """The number of ranks."""
        world = 1
        for size in self.sizes:
            world *= size
        return world

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes larger than one, outermost first."""
        return tuple(axis for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)

    @property
    def shape(self) -> dict[str, int]:
        """Axis -> size, for the axes larger than one."""
        return {axis: self[axis] for axis in self.axes}

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` lies: axis -> index, for all six axes."""
        place: dict[str, int] = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, place[axis] = divmod(rank, size)
        return place

    def coordinates(self) -> Iterator[dict[str, int]]:
        """The coordinates of every rank, in rank order."""
        for index in itertools.product(*(range(size) for size in self.sizes)):
            yield dict(zip(AXES, index, strict=True))

    def replace(self, **sizes: int) -> "Mesh":
        """The same mesh with other sizes for the axes named."""
        return Mesh(**{**dict(zip(AXES, self.sizes, strict=True)), **sizes})  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.shape.items())

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{axis}={size}' for axis, size in self.shape.items())})"


def degree(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """The product of the sizes of `axes`."""
    product = 1
    for axis in axes:
        product *= mesh[axis]
    return product
