"""Six experts over four ranks."""

import shardspec as ss
from tests.mixture import RULES, Config, Mixture, make_batch


def trigger():
    ss.compile(Mixture(Config(n_experts=6)), RULES, ss.Mesh(ep=4), make_batch())
