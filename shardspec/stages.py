"""What the stages hand on: a survey, claims, a typed program."""

from collections.abc import Callable

import torch
from attrs import define, field, frozen
from torch import nn

from shardspec.cotangent import Backward
from shardspec.diagnostics import Diagnostic
from shardspec.infer import Inference, TypedGraph
from shardspec.mesh import Mesh
from shardspec.program import Program
from shardspec.rules.parse import Entry, ParamClaim, Sizes, Table

Model = nn.Module | Callable[[], nn.Module]


@frozen(eq=False)
class Parameter:
    """What the survey knows of a parameter or buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    requires_grad: bool
    first: str
    """The first name of the tensor: its own, unless it is tied."""
    persistent: bool = True


@frozen(eq=False)
class Survey:
    """The names of a model."""

    model: nn.Module
    parameters: dict[str, Parameter]
    modules: tuple[str, ...]
    arguments: tuple[str, ...]


@frozen(eq=False)
class Claims:
    """The table's claims on a model: every parameter, and every activation that a rule names."""

    table: Table
    params: dict[str, ParamClaim]
    points: dict[str, Entry]
    sizes: Sizes


@define(eq=False)
class TypedProgram:
    """A program with its layouts, forward and backward."""

    program: Program
    claims: Claims
    mesh: Mesh
    forward: TypedGraph
    backward: Backward
    inference: Inference
    diagnostics: list[Diagnostic] = field(factory=list)
