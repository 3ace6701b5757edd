"""Parity on ranks that are threads, and a pipeline over them."""

import shardspec as ss
from shardspec.testing import assert_parity
from tests.mixture import RULES, Config, Mixture, loss_fn, make_batch


def trigger():
    assert_parity(Mixture(Config()), RULES, ss.Mesh(pp=2), make_batch(), loss_fn)
