"""A mesh of several ranks without a launcher."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    ss.shard(llama(), RULES, ss.Mesh(fsdp=2, tp=2))
