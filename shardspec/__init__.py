"""shardspec: one table of rules lays a PyTorch model over a mesh, proved right before it runs."""

from shardspec.compiler import compile
from shardspec.diagnostics import Diagnostic, DonatedError, Location, ShardingError
from shardspec.functional import cross_entropy, name
from shardspec.mesh import Mesh
from shardspec.plan import Plan
from shardspec.rules.table import Rules
from shardspec.spec import P

__all__ = [
    "Diagnostic",
    "DonatedError",
    "Location",
    "Mesh",
    "P",
    "Plan",
    "Rules",
    "ShardingError",
    "compile",
    "cross_entropy",
    "name",
]
