"""What must divide what, for a table to be legal on a mesh: facts that one walk records for all sizes of its axes."""

from collections.abc import Iterable, Mapping
from math import gcd, prod

from attrs import frozen

from shardspec.diagnostics import Location
from shardspec.mesh import Mesh


@frozen
class Constraint:
    """The product of the sizes of `axes` divides `number`, the size of the factor `name`."""

    axes: tuple[str, ...]
    number: int
    name: str
    where: str
    location: Location

    def holds(self, mesh: Mesh) -> bool:
        """Whether a mesh satisfies it."""
        return self.divides(mesh.shape)

    def divides(self, sizes: Mapping[str, int]) -> bool:
        """Whether sizes of axes satisfy it; an axis that is absent has size one."""
        return self.number % prod(sizes.get(axis, 1) for axis in self.axes) == 0

    def __str__(self) -> str:
        return f"{'*'.join(self.axes)} | {self.name or 'a dim'} = {self.number}"


def satisfying(mesh: Mesh, facts: Iterable[Constraint], most: int) -> tuple[dict[str, int], ...]:
    """The sizes of the mesh's axes larger than one that satisfy the facts; nothing where they are more than `most`, or
    where an axis has no fact."""
    facts = tuple(facts)
    bounds = {axis: gcd(*(fact.number for fact in facts if axis in fact.axes)) for axis in mesh.axes}
    found: list[dict[str, int]] = [{}]
    for axis, bound in bounds.items():
        sizes = [size for size in range(2, bound + 1) if bound % size == 0]
        found = [{**others, axis: size} for others in found for size in sizes]
        if not bound or len(found) > most:
            return ()
        known = [fact for fact in facts if set(fact.axes) <= found[0].keys()] if found else []
        found = [sizes for sizes in found if all(fact.divides(sizes) for fact in known)]
    return tuple(found)


def strongest(found: Iterable[Constraint]) -> tuple[Constraint, ...]:
    """One constraint for each set of axes and number; those that another implies are left out."""
    kept: dict[tuple[frozenset[str], int], Constraint] = {}
    for each in found:
        key = (frozenset(each.axes), each.number)
        if key not in kept or (each.name and not kept[key].name):
            kept[key] = each
    rest = list(kept.values())
    return tuple(one for one in rest if not any(_implies(two, one) for two in rest if two is not one))


def _implies(strong: Constraint, weak: Constraint) -> bool:
    """Whether what divides `strong.number` divides `weak.number`, axis sets alike or larger."""
    return set(weak.axes) <= set(strong.axes) and weak.number % strong.number == 0
