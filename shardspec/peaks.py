"""The most that is held over some time, whatever the sizes of the axes."""

from collections.abc import Iterable, Mapping

import torch
from attrs import define, field, frozen

from shardspec.amounts import NOTHING, Amount, Key, plus, total_of


def undominated(amounts: Iterable[Amount]) -> tuple[Amount, ...]:
    """Without those of which another has in total as much of every term; of equal ones the first stays."""
    amounts = tuple(amounts)
    if len(amounts) < 2:
        return amounts
    totals = [total_of(amount) for amount in amounts]
    terms = list(dict.fromkeys(term for total in totals for term in total))
    table = torch.tensor([[total.get(term, 0) for term in terms] for total in totals], dtype=torch.int64)
    as_large = (table[:, None] >= table[None]).all(-1)
    beaten = (as_large & ~(as_large.T & torch.ones_like(as_large).tril())).any(0)
    return tuple(amount for amount, out in zip(amounts, beaten.tolist(), strict=True) if not out)


@frozen(eq=False)
class Peaks:
    """The most that is held over some time: in total, and of each kind by itself, at whatever sizes of the axes."""

    total: tuple[Amount, ...] = ()
    kinds: Mapping[str, tuple[Amount, ...]] = field(factory=dict)

    @classmethod
    def of(cls, amounts: Iterable[Amount]) -> "Peaks":
        """Those of what is held at some moments."""
        noted = Noted()
        for amount in amounts:
            noted.note(amount)
        return noted.peaks()

    def above(self, base: Amount) -> "Peaks":
        """The same, with something held throughout."""
        noted = Noted()
        noted.note(base, self)
        return noted.peaks()


NONE = Peaks(total=(NOTHING,))
"""Nothing more."""


@define(eq=False)
class Noted:
    """Peaks as they are gathered."""

    total: list[Amount] = field(factory=list)
    kinds: dict[str, list[Amount]] = field(factory=dict)

    def note(self, base: Amount, beyond: Peaks = NONE) -> None:
        """Note what is held at `beyond` besides `base`."""
        self.total += [plus(base, amount) for amount in beyond.total]
        split: dict[str, dict[Key, int]] = {kind: {} for kind in beyond.kinds}
        for key, number in base.items():
            split.setdefault(key[0], {})[key] = number
        for kind, held in split.items():
            self.kinds.setdefault(kind, []).extend(plus(held, more) for more in beyond.kinds.get(kind, (NOTHING,)))

    def peaks(self) -> Peaks:
        """What was noted, without what something else exceeds at all sizes."""
        return Peaks(undominated(self.total), {kind: undominated(found) for kind, found in self.kinds.items()})
