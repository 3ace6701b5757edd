"""A folder with other things in it in the place of a checkpoint."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    ss.save(ss.shard(llama(), RULES, ss.Mesh()).init(ss.sgd(lr=0.1)), "docs")
