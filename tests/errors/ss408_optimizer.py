"""A run of AdamW that is to go on with SGD."""

import os
import tempfile

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    sharded = ss.shard(llama(), RULES, ss.Mesh())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ss.save(sharded.init(ss.adamw(lr=1e-3)), "run")
        ss.restore(sharded, "run", optimizer=ss.sgd(lr=0.1))
