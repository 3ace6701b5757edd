"""An axis by another library's name."""

import shardspec as ss


def trigger():
    ss.Mesh.parse("data=2,tp=2")
