"""A dtype by its name in a configuration file."""

import shardspec as ss


def trigger():
    ss.Policy(param_dtype="bf16")
