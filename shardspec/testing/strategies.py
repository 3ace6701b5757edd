"""Hypothesis strategies over plans: legal meshes, layouts of a tensor, shapes of a batch."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from shardspec.layout import Digit, Layout, canonical, global_size
from shardspec.mesh import BATCH_AXES, Mesh, degree
from shardspec.plan import Plan

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

try:
    from hypothesis import strategies as st
except ImportError:  # what a strategy is asked for says so
    st = None


def _strategies() -> Any:
    if st is None:
        raise ImportError(
            "the strategies of shardspec.testing need hypothesis, which is not installed: "
            "pip install 'shardspec[testing]' (or hypothesis itself)"
        )
    return st


def meshes(plan: Plan, most: int = 8) -> "SearchStrategy[Mesh]":
    """Meshes on which the plan's table is legal for its model and its global batch; shrinks to the mesh of one rank.

    The candidates are checked when the first one is drawn, once; a test over them wants `settings(deadline=None)`.
    Those with pp are drawn for a plan with a loss alone: `assert_parity` cannot make one for several microbatches.

    Args:
        plan: what `ss.compile` gave, on any mesh.
        most: the largest number of ranks.

    Raises:
        ValueError: when drawn from, for a plan that was read from a file.
        ImportError: where hypothesis is not installed.
    """
    hypothesis = _strategies()

    def legal() -> Any:
        found = [mesh for world in range(1, most + 1) for mesh in plan.legal_meshes(world)]
        return hypothesis.sampled_from([mesh for mesh in found if mesh["pp"] == 1 or plan.loss is not None])

    return hypothesis.deferred(legal)


def layouts(
    shape: Sequence[int], mesh: Mesh, *, pending: Sequence[str] = ("sum",), strided: bool = True
) -> "SearchStrategy[Layout]":
    """Layouts of a tensor of a global shape on a mesh; shrinks to the replicated one.

    Each axis larger than one splits a dim that it divides, or is pending, or neither.

    Args:
        pending: kinds of reduction that may be due: "sum", "avg", "max", "min".
        strided: let axes stand inside a dim and not only in front of it, as the tp of `(3 H@tp hd)` does.

    Raises:
        ImportError: where hypothesis is not installed.
    """

    def drawn(draw: Callable[[Any], Any]) -> Layout:
        dims: list[list[Digit]] = [[] for _ in shape]
        due: list[tuple[str, str]] = []
        # Reductions of different kinds do not commute, but for sums and means.
        kinds = [[kind for kind in pending if kind in ("sum", "avg")], *([k] for k in pending if k in ("max", "min"))]
        alike = draw(st_.sampled_from([group for group in kinds if group] or [[]]))
        for axis in draw(st_.permutations(mesh.axes)):
            free = [at for at, length in enumerate(shape) if length and _rest(dims[at], length, mesh) % mesh[axis] == 0]
            choice = draw(st_.sampled_from([None, *free, *alike]))
            if isinstance(choice, str):
                due.append((axis, choice))
            elif choice is not None:
                dims[choice].append(axis)
        for digits, length in zip(dims, shape, strict=True):
            rest = _rest(digits, length, mesh)
            for at in range(len(digits) if strided else 0):
                part = draw(st_.sampled_from(_divisors(rest)))
                digits.insert(2 * at, part)
                rest //= part
            digits.append(rest)
        return Layout(tuple(map(canonical, dims)), tuple(sorted(due)))

    st_ = _strategies()
    return st_.composite(drawn)()


def _rest(digits: Sequence[Digit], length: int, mesh: Mesh) -> int:
    return length // global_size(tuple(digits), mesh.shape)


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0] or [1]
    return [*low, *(number // n for n in reversed(low) if n * n < number)]


def shapes(plan: Plan, mesh: Mesh | None = None, most: int = 4) -> "SearchStrategy[dict[str, tuple[int, ...]]]":
    """Entry -> global shape, for batches whose rows the mesh divides; shrinks to the fewest rows.

    The rows of all entries that have a batch dim are the same multiple of the number of data ranks; other dims are
    as in the plan. With `accumulate=M` give M times the multiples: `shapes(plan).map(...)`.

    Args:
        mesh: another mesh than the plan's.
        most: the largest multiple.

    Raises:
        ImportError: where hypothesis is not installed.
    """
    unit = degree(plan.mesh if mesh is None else mesh, BATCH_AXES)

    def shaped(multiple: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, entry in plan.entries.items():
            shape = list(entry.layout.global_shape(plan.mesh.shape))
            if entry.batch_dim is not None:
                shape[entry.batch_dim] = multiple * unit
            found[name] = tuple(shape)
        return found

    return _strategies().integers(1, most).map(shaped)
