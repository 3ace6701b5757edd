"""Blocks that add to a tensor of their caller's."""

import shardspec as ss
from tests.test_writes_outside import Model, check


def trigger():
    check(Model("kept"), ss.Mesh(tp=2))
