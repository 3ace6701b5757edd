"""A mesh that the world does not fit."""

import shardspec as ss


def trigger():
    ss.Mesh(fsdp="auto", tp=4, world=6)
