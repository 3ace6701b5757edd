"""A strategy that there is not."""

import shardspec as ss


def trigger():
    ss.Policy(attention="flash")
