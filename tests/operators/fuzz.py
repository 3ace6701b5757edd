"""Directed fuzz: the operator cases on random shapes, meshes and layouts, until enough trials were accepted."""

from collections.abc import Sequence
from random import Random

from attrs import define, field

from tests.operators.cases import CASES, Case
from tests.operators.trials import a_trial, verdict_of


@define(eq=False)
class Fuzz:
    """Counts of a run."""

    trials: int = 0
    accepted: dict[str, int] = field(factory=dict)
    """Case -> trials that the rules accepted."""
    wrong: list[str] = field(factory=list)

    @property
    def total(self) -> int:
        """Trials that the rules accepted."""
        return sum(self.accepted.values())

    def add(self, other: "Fuzz") -> None:
        """Another run's counts as well."""
        self.trials += other.trials
        self.wrong += other.wrong
        for name, count in other.accepted.items():
            self.accepted[name] = self.accepted.get(name, 0) + count


def fuzz(accepted: int, start: int = 0, cases: Sequence[Case] = CASES) -> Fuzz:
    """Try every case in turn, from seed `start` on, until so many trials were accepted."""
    found, seed = Fuzz(), start
    while found.total < accepted:
        for case in cases:
            trial = a_trial(Random(f"{case.name} {seed}"), case)
            verdict = verdict_of(case, trial)
            found.trials += 1
            found.accepted[case.name] = found.accepted.get(case.name, 0) + verdict.accepted
            if verdict.problem:
                found.wrong.append(f"{case.name}, seed {seed}: {verdict.problem}")
        seed += 1
    return found
