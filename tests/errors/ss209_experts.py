"""Experts over ep, and nothing says that they are."""

import shardspec as ss
from tests.mixture import PLAIN_RULES, Config, Mixture, Plain, make_batch


def trigger():
    rules = ss.Rules(
        params={
            **{rule.pattern: rule.value for rule in PLAIN_RULES.params},
            r"layers\.\d+\.moe\.experts\.w1": "E F D",
            r"layers\.\d+\.moe\.experts\.w2": "E@ep D@fsdp F@tp",
        },
        activations={rule.pattern: rule.value for rule in PLAIN_RULES.activations},
    )
    ss.compile(Mixture(Config(kind=Plain)), rules, ss.Mesh(ep=2), make_batch())
