"""A file that is gone."""

import os
import tempfile

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    sharded = ss.shard(llama(), RULES, ss.Mesh())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ss.save(sharded.init(ss.sgd(lr=0.1)), "run")
        os.remove("run/__0_0.distcp")
        ss.restore(sharded, "run")
