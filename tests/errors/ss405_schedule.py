"""A schedule that torch does not have."""

import shardspec as ss


def trigger():
    ss.Policy(schedule="1F1BInterleaved")
