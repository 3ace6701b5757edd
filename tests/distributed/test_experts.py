"""Experts over ep on real ranks, against the plain program in float64: loss, every gradient, parameters after steps."""

import pytest

from tests.distributed.parity import TOLERANCE, Case, Family, plain_loss, run_cases
from tests.mixture import PLAIN_RULES, RULES, Config, Mixture, Plain, make_batch


def family(name: str, rules=RULES, **options) -> Family:
    """A family of one model and one table."""
    return Family(
        name=name,
        make=lambda _: Mixture(Config(**options)),
        rules={True: rules},
        batch=make_batch,
        plain_loss=plain_loss,
    )


LOOPED = family("looped")
PLAIN = family("plain", PLAIN_RULES, kind=Plain)

CASES = [
    Case("", family=LOOPED),
    Case("ep=2", family=LOOPED),
    Case("tp=2", family=LOOPED),
    Case("ep=2", family=PLAIN, accumulate=2, remat=True),
    Case("ep=2", family=family("one-expert-a-token", bias=(9.0, 8.0, 0.0, 0.0))),
    Case("ep=2", family=family("last-rank-only", bias=(0.0, 0.0, 8.0, 9.0)), remat=True),
    Case("ep=2", family=family("ties", flat=True)),
    Case("ep=2,fsdp=2", family=LOOPED, remat=True),
    Case("ep=2,fsdp=2", family=PLAIN),
    Case("ep=2,fsdp=2", family=family("skewed", bias=(9.0, 8.0, 0.0, 0.0)), accumulate=2),
    Case("ep=2,tp=2", family=LOOPED, remat=True),
    Case("ep=2,tp=2", family=PLAIN),
    Case("ep=2,dp=2", family=LOOPED),
    Case("ep=4", family=LOOPED),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, float]]:
    return {str(case): found for case, found in run_cases(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_over_ep_train_as_the_plain_program_does(case: Case, outcomes: dict[str, dict[str, float]]):
    found = outcomes[str(case)]
    assert max(found.values()) <= TOLERANCE, found
