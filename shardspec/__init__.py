"""shardspec: one table of rules lays a PyTorch model over a mesh, proved right before it runs.

A public name is imported when it is first used, so that `shardspec explain` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardspec.compiler import compile
    from shardspec.diagnostics import Diagnostic, DonatedError, Location, ShardingError
    from shardspec.functional import cross_entropy, name
    from shardspec.mesh import Mesh
    from shardspec.operators import register_rule
    from shardspec.plan import Plan
    from shardspec.policy import Policy
    from shardspec.rules.table import Rules
    from shardspec.runtime.optim import Optimizer, adamw, sgd
    from shardspec.runtime.restore import restore
    from shardspec.runtime.save import save
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
    "register_rule",
    "restore",
    "save",
    "sgd",
    "shard",
    "train_step",
    "update",
]

_NAMES = {
    "shardspec.compiler": "compile",
    "shardspec.diagnostics": "Diagnostic DonatedError Location ShardingError",
    "shardspec.functional": "cross_entropy name",
    "shardspec.mesh": "Mesh",
    "shardspec.operators": "register_rule",
    "shardspec.plan": "Plan",
    "shardspec.policy": "Policy",
    "shardspec.rules.table": "Rules",
    "shardspec.runtime.optim": "Optimizer adamw sgd",
    "shardspec.runtime.restore": "restore",
    "shardspec.runtime.save": "save",
    "shardspec.runtime.sharded": "Sharded full shard",
    "shardspec.runtime.state": "NonFiniteError OptState TrainState",
    "shardspec.runtime.step": "eval_step train_step update",
    "shardspec.spec": "P",
}
"""Module -> the public names that it holds."""

_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "testing":  # a module of its own, that nothing else here needs
        return import_module("shardspec.testing")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
