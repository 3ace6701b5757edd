"""What must divide what, for a table to be legal on a mesh: facts that one walk records for all sizes of its axes."""

from collections.abc import Iterable

from attrs import frozen

from shardspec.diagnostics import Location
from shardspec.mesh import Mesh, degree


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
        return self.number % degree(mesh, self.axes) == 0

    def __str__(self) -> str:
        return f"{'*'.join(self.axes)} | {self.name or 'a dim'} = {self.number}"


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
