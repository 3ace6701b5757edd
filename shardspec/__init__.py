"""shardspec: one table of rules lays a PyTorch model over a mesh, proved right before it runs."""

from shardspec.compiler import compile
from shardspec.diagnostics import Diagnostic, DonatedError, Location, ShardingError
from shardspec.functional import cross_entropy, name
from shardspec.mesh import Mesh
from shardspec.plan import Plan
from shardspec.policy import Policy
from shardspec.rules.table import Rules
from shardspec.runtime.optim import Optimizer, adamw, sgd
from shardspec.runtime.sharded import Sharded, full, shard
from shardspec.runtime.state import NonFiniteError, OptState, TrainState
from shardspec.runtime.step import eval_step, train_step, update
from shardspec.spec import P

__all__ = [
    "Diagnostic",
    "DonatedError",
    "Location",
    "Mesh",
    "NonFiniteError",
    "OptState",
    "Optimizer",
    "P",
    "Plan",
    "Policy",
    "Rules",
    "Sharded",
    "ShardingError",
    "TrainState",
    "adamw",
    "compile",
    "cross_entropy",
    "eval_step",
    "full",
    "name",
    "sgd",
    "shard",
    "train_step",
    "update",
]
