"""Start one process a rank on this machine, through torch's launcher, when nobody else has."""

import logging
import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

T = TypeVar("T")

PRELOADED = ("torch", "shardspec.runtime.restore", "models.data", "models.report")
"""What takes ranks long to import."""


def under_launcher() -> bool:
    """Say whether this process is already a rank, of torchrun or a scheduler."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(rank_main: Callable[[T], None], options: T, world: int) -> int:
    """Run `rank_main(options)` on `world` ranks; return the exit status: 1 where one failed, or 0.

    Only the first failure is shown: the others merely lost their connection to it.
    """
    threads = max(1, torch.get_num_threads() // world)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # This process has threads by then (the rendezvous), which do not survive a fork: a rank could wait for a lock
        # for ever. So ranks are forked from a server that has done nothing but import what they need.
        start_method="forkserver",
    )
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    logging.disable(logging.ERROR)  # the launcher's own account of a failure, which `explain` replaces
    try:
        elastic_launch(config, start_rank)(rank_main, options, threads)
    except ChildFailedError as error:
        return explain(*error.get_first_failure())
    except SignalException as error:
        return 128 + error.sigval
    finally:
        logging.disable(logging.NOTSET)
    return 0


def start_rank(rank_main: Callable[[T], None], options: T, threads: int) -> None:
    """Set up a fresh process and run the rank's work in it."""
    logging.disable(logging.NOTSET)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    rank_main(options)


def explain(rank: int, failure: ProcessFailure) -> int:
    """Print why a rank failed and return the status to exit with.

    A `ShardingError` is a finding of every rank, told for its own sake; any other exception is a fault
    and comes with its rank and traceback.
    """
    if failure.exitcode < 0:
        print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
    elif isinstance(failure.message, dict):
        kind, _, text = failure.message["message"].partition(": ")
        trace = failure.message["extraInfo"]["py_callstack"]
        print(text if kind == "ShardingError" else f"rank {rank} failed:\n{trace}", file=sys.stderr)
    else:
        print(f"rank {rank} exited with status {failure.exitcode}", file=sys.stderr)
    return 1
