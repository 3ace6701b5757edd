"""An `experts=` that no module matches."""

import shardspec as ss
from tests.mixture import RULES, Config, Mixture, make_batch


def trigger():
    rules = RULES.override(experts=r"layers\.\d+\.moe\.expert")
    ss.compile(Mixture(Config()), rules, ss.Mesh(ep=2), make_batch())
