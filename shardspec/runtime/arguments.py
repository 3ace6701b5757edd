"""What a user passes to the runtime: checked for its kind before it is used."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from shardspec.arguments import shown
from shardspec.diagnostics import Diagnostic, calling_line, refuse
from shardspec.plan import UnitPlan
from shardspec.policy import Policy
from shardspec.rules.match import as_pattern, fold
from shardspec.runtime.optim import Optimizer


def check_policy(policy: Any) -> None:
    """SS405 for what is neither a policy nor None."""
    if policy is not None and not isinstance(policy, Policy):
        refuse(
            "SS405",
            f"the policy is a {type(policy).__name__}",
            locations=(calling_line(),),
            advice=("give ss.Policy(remat=True, accumulate=2), or leave it out",),
        )


def check_seed(seed: Any) -> None:
    """SS405 for what is no seed: text, a fraction, or a number that a generator does not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < MOST_SEEDS:
        refuse(
            "SS405",
            f"seed={seed!r}",
            why="a seed is a whole number from 0 up, below 2^63: weights and dropout are drawn from it on every rank",
            locations=(calling_line(),),
            advice=("give seed=0, or another whole number",),
        )


MOST_SEEDS = 1 << 63


def unmatched_policy(policy: Policy, units: tuple[UnitPlan, ...]) -> Iterator[Diagnostic]:
    """SS405 for a pattern of the policy that matches no unit."""
    names = [name for unit in units if unit.modules for name in (unit.name, *unit.modules)]
    known = list(dict.fromkeys(as_pattern(fold(name)) for name in names))
    for option in ("remat", "compile", "reshard_after_forward", "offload"):
        patterns = getattr(policy, option)
        for pattern in () if isinstance(patterns, bool) else patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                near = difflib.get_close_matches(pattern, known, 1)
                yield Diagnostic(
                    code="SS405",
                    what=f'{option}: r"{pattern}" matches no unit',
                    why=f"the units are {', '.join(dict.fromkeys(map(fold, names))) or 'none but the root'}\n"
                    "a pattern is matched whole against a unit's name, and what this one asks for would not happen",
                    locations=(calling_line(),),
                    advice=(f'did you mean r"{near[0]}"?',) if near else ("name a unit of the table",),
                )


def as_optimizer(optimizer: Any) -> Optimizer:
    """Any pair of `init` and `update` as an optimizer: one of ours, an object that has both, or a tuple."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    pair: Any = (getattr(optimizer, "init", None), getattr(optimizer, "update", None))
    if isinstance(optimizer, tuple) and len(optimizer) == 2:
        pair = optimizer
    if isinstance(optimizer, type) or not all(map(callable, pair)):
        refuse(
            "SS407",
            f"the optimizer is {shown(optimizer)}",
            why="an optimizer is a pair of pure functions, init(params) and update(grads, opt_state, params, step)",
            advice=("give ss.adamw(...), ss.sgd(...) or ss.Optimizer(init=..., update=...)",),
        )
    return Optimizer(*pair)
