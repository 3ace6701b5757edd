"""`make test` gives one answer for one commit: hypothesis draws the same examples, with no limit on time, and this
process keeps to one thread, for ranks are forked from it and OpenMP's threads do not survive a fork."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; an import before this one would come too early

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
