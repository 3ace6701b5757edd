"""A size that is none."""

import shardspec as ss


def trigger():
    ss.Mesh(fsdp=0)
