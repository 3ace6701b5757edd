"""A checkpoint of another number of layers, of narrower ones."""

import os
import tempfile

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    narrow, wide = (ss.shard(llama(n_layers=n, ffn_dim=f), RULES, ss.Mesh()) for n, f in ((1, 64), (2, 96)))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ss.save(narrow.init(ss.sgd(lr=0.1)), "run")
        ss.restore(wide, "run")
