"""The ranks behind a mesh: this rank's place, its device, and a process group for each set of axes."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from attrs import define, field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardspec.diagnostics import refuse
from shardspec.mesh import AXES, Mesh, degree
from shardspec.torch_private import THREADS


@define(eq=False)
class Fabric:
    """A mesh with devices."""

    mesh: Mesh
    device: torch.device
    rank: int
    device_mesh: DeviceMesh
    """Over the axes larger than one, in mesh order; of one rank and no backend where there is none."""
    state_mesh: DeviceMesh
    """The same without pp: over which the parameters of this rank's stages lie."""
    groups: dict[tuple[str, ...], dist.ProcessGroup] = field(factory=dict)
    homes: dict[tuple[int, ...], dist.ProcessGroup] = field(factory=dict)
    """Places on pp -> this rank's group with those that differ from it on pp alone and have one of them."""
    storage: dict[tuple[str, ...], DeviceMesh] = field(factory=dict)

    @property
    def coordinate(self) -> dict[str, int]:
        """This rank's index on each axis."""
        return self.mesh.coordinate(self.rank)

    def zero(self) -> torch.Tensor:
        """A scalar of float64 on this rank's device."""
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def place(self, axes: Iterable[str]) -> int:
        """This rank's index among those that differ from it on `axes` alone, in mesh order of ranks."""
        index = 0
        for axis in axes:
            index = index * self.mesh[axis] + self.coordinate[axis]
        return index

    def group(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        """The group of the ranks that differ from this one on `axes` alone."""
        if axes not in self.groups:
            self.groups[axes] = self._make(axes)
        return self.groups[axes]

    def _make(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        if len(axes) == 1:
            return self.device_mesh.get_group(axes[0])
        if set(axes) == set(self.mesh.axes):
            assert dist.group.WORLD is not None, "a mesh of several ranks has a world"
            return dist.group.WORLD
        # Every rank makes every group of the family, in one order, as torch asks.
        found: dist.ProcessGroup | None = None
        for ranks in families(self.mesh, axes):
            group = dist.new_group(ranks)
            if isinstance(group, dist.ProcessGroup) and self.rank in ranks:
                found = group
        assert found is not None, "this rank is in one group of each family"
        return found

    def reserve_homes(self, wanted: Iterable[tuple[int, ...]]) -> None:
        """Make the groups of ranks that hold one parameter on several stages; every rank must call it."""
        for places in sorted(set(wanted)):
            for ranks in families(self.mesh, ("pp",)):
                group = dist.new_group([ranks[place] for place in places])
                if self.rank in ranks and self.coordinate["pp"] in places and isinstance(group, dist.ProcessGroup):
                    self.homes[places] = group

    def reserve(self, families_wanted: Iterable[tuple[str, ...]]) -> None:
        """Make the groups that a plan will need, at a moment when every rank does the same."""
        for axes in sorted(set(families_wanted)):
            self.group(axes)


def families(mesh: Mesh, axes: tuple[str, ...]) -> list[list[int]]:
    """The groups of ranks that differ on `axes` alone, each in rank order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(mesh.coordinates()):
        key = tuple(place[axis] for axis in AXES if axis not in axes)
        found.setdefault(key, []).append(rank)
    return list(found.values())


def accelerator() -> str:
    """The kind of device that this machine computes on."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return current.type if current is not None else "cpu"


def join_world() -> int:
    """Be in the world that a launcher started, if one did; its size, 1 for a process started alone."""
    if dist.is_initialized():
        return dist.get_world_size()
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world > 1:
        if accelerator() != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group()
    return world


def check_world(mesh: Mesh, world: int) -> None:
    """SS403 where the world has another size than the mesh."""
    if mesh.world == world:
        return
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    alone = "; this process was started alone" if world == 1 else ""
    refuse(
        "SS403",
        f"the mesh {mesh or 'of one rank'} holds {mesh.world} ranks, the world {world}",
        why=f"{sizes or 'no axis is larger than one'} = {mesh.world}{alone}",
        advice=(f"start it with torchrun --nproc-per-node {mesh.world}",) if world == 1 else (),
    )


def connect(mesh: Mesh) -> Fabric:
    """This rank's place on a mesh of the world's size; a mesh of one rank needs no process group."""
    kind = accelerator()
    if mesh.world == 1:
        device = torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")
        alone = DeviceMesh(kind, [0], mesh_dim_names=("dp",), _init_backend=False, _rank=0)
        return Fabric(mesh, device, 0, alone, alone)
    if dist.get_backend() in ("gloo", THREADS):
        kind = "cpu"
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    shape, rank = tuple(mesh.shape.values()), dist.get_rank()
    whole = init_device_mesh(kind, shape, mesh_dim_names=mesh.axes)
    inner = tuple(axis for axis in mesh.axes if axis != "pp")
    if inner == mesh.axes:
        state = whole
    elif inner:
        state = whole[inner]
    else:
        state = DeviceMesh(kind, [rank], mesh_dim_names=("dp",), _init_backend=False, _rank=rank)
    return Fabric(mesh, device, rank, whole, state)


def storage_mesh(fabric: Fabric, axes: tuple[str, ...]) -> DeviceMesh:
    """The mesh that FSDP2 stores over: `axes` as one dim, behind dp where dp is larger than one; made once."""
    if axes not in fabric.storage:
        fabric.storage[axes] = _storage_mesh(fabric, axes)
    return fabric.storage[axes]


def _storage_mesh(fabric: Fabric, axes: tuple[str, ...]) -> DeviceMesh:
    mesh = fabric.mesh
    replicas = ("dp",) if mesh["dp"] > 1 else ()
    if len(axes) == 1:
        return fabric.device_mesh[(*replicas, *axes)] if replicas else fabric.device_mesh[axes[0]]
    # Several storage axes: a mesh of its own with the same ranks in another arrangement. Flattening the one that
    # carries the state would make `full_tensor` of uneven shards wrong (torch 2.13).
    rest = [axis for axis in mesh.axes if axis not in (*replicas, *axes)]
    order = [*rest, *replicas, *axes]
    ranks = torch.arange(mesh.world).reshape(tuple(mesh.shape.values()))
    ranks = ranks.permute([mesh.axes.index(axis) for axis in order])
    ranks = ranks.reshape(degree(mesh, tuple(rest)), mesh["dp"], degree(mesh, axes))
    whole = DeviceMesh(fabric.device.type, ranks, mesh_dim_names=("rest", "replicas", "storage"))
    return whole[("replicas", "storage")] if replicas else whole["storage"]
