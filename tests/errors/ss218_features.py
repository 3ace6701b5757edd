"""ep on the features of an expert weight."""

import shardspec as ss
from tests.mixture import RULES, Config, Mixture, make_batch


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.moe\.experts\.down_proj": "E D@ep F@tp"})
    ss.compile(Mixture(Config()), rules, ss.Mesh(ep=2), make_batch())
