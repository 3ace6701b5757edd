"""Rows that every rank of ep has: the batch is not split over it."""

import shardspec as ss
from tests.mixture import RULES, Config, Mixture, make_batch


def trigger():
    rules = RULES.override(
        params={
            r"embed\.weight": "V D",
            r"layers\.\d+\.norm\.weight": "D",
            r"layers\.\d+\.moe\.gate\.weight": "E D",
            r"head\.weight": "V D",
        },
        activations={
            r"tokens|labels": "B@(dp,fsdp) S@ep",
            r"layers\.\d+\.moe": "B@(dp,fsdp) S D",
            r"layers\.\d+\.norm": "B@(dp,fsdp) S D",
        },
    )
    ss.compile(Mixture(Config()), rules, ss.Mesh(ep=2), make_batch())
