"""The module around the experts, router and all, named in their place."""

import shardspec as ss
from tests.mixture import RULES, Config, Mixture, make_batch


def trigger():
    rules = RULES.override(experts=r"layers\.\d+\.moe", params={r"layers\.\d+\.moe\.gate\.weight": "E D@fsdp"})
    ss.compile(Mixture(Config()), rules, ss.Mesh(ep=2), make_batch())
