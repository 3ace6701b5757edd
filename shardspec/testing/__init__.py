"""A kit for users' own tables: parity with the plain program, totality, goldens, strategies, brute force."""

from shardspec.testing.bruteforce import Verdict, verify_operator
from shardspec.testing.golden import golden
from shardspec.testing.parity import Difference, ParityError, assert_parity
from shardspec.testing.strategies import layouts, meshes, shapes
from shardspec.testing.threads import RanksLateError
from shardspec.testing.totality import NotTotalError, assert_total

__all__ = [
    "Difference",
    "NotTotalError",
    "ParityError",
    "RanksLateError",
    "Verdict",
    "assert_parity",
    "assert_total",
    "golden",
    "layouts",
    "meshes",
    "shapes",
    "verify_operator",
]
