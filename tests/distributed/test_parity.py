"""Sharded training computes what the plain program computes, on every mesh of up to 8 ranks."""

import itertools
from collections.abc import Iterator

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.parity import TOLERANCE, Case, all_meshes, on_rank

VARIANTS = {"sp": (True, False), "tied": (False, True), "accumulate": (1, 2), "remat": (False, True)}


def covering_set() -> Iterator[Case]:
    """Two opposite variants for every mesh, so that each mesh meets each option both ways."""
    variants = list(itertools.product(*VARIANTS.values()))
    for index, mesh in enumerate(all_meshes()):
        one = index % (len(variants) // 2)
        for variant in (variants[one], variants[len(variants) - 1 - one]):
            yield Case(mesh, **dict(zip(VARIANTS, variant, strict=True)))


COVERING = list(covering_set())


def test_the_covering_set_has_every_mesh_with_every_option_and_every_pair_of_options():
    assert len({case.mesh for case in COVERING}) == 20
    for name, values in VARIANTS.items():
        assert {(case.mesh, getattr(case, name)) for case in COVERING} == set(
            itertools.product(all_meshes(), values)
        )
    for one, two in itertools.combinations(VARIANTS, 2):
        pairs = {(getattr(case, one), getattr(case, two)) for case in COVERING}
        assert pairs == set(itertools.product(VARIANTS[one], VARIANTS[two]))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_loss_gradients_norms_and_parameters_after_five_steps_are_the_plain_programs(world: int):
    cases = [case for case in COVERING if case.world == world]
    found = dict(zip(cases, run_ranks(world, on_rank, cases)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if max(wrong.values()) > TOLERANCE} == {}
