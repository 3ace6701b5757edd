"""A path by which there is no checkpoint."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    ss.restore(ss.shard(llama(), RULES, ss.Mesh()), "runs/no-such-run")
