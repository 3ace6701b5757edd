"""Positions that a model counts by the length at hand."""

import torch

import shardspec as ss
from models import gpt2
from tests.gallery.case import make_batch


def trigger():
    with torch.device("meta"):
        model = gpt2.build(gpt2.PRESETS["debug"])
    ss.compile(model, gpt2.RULES, ss.Mesh(cp=2, tp=2), make_batch())
