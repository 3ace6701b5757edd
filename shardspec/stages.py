"""What the stages hand on: a survey, claims, a typed program."""

from attrs import define, field, frozen

from shardspec.cotangent import Backward
from shardspec.diagnostics import Diagnostic
from shardspec.infer import Inference, TypedGraph
from shardspec.kin import Kin
from shardspec.mesh import Mesh
from shardspec.program import Program
from shardspec.rules.parse import Entry, ParamClaim, Sizes, Table


@frozen(eq=False)
class Claims:
    """The table's claims on a model: every parameter, and every activation that a rule names.

    Of repeated blocks that the table treats alike, those on the one that stands for the others.
    """

    table: Table
    kin: Kin
    params: dict[str, ParamClaim]
    points: dict[str, Entry]
    sizes: Sizes

    def of(self, name: str) -> ParamClaim:
        """The claim on any parameter or buffer of the model."""
        return self.params[self.kin.canonical(name)]


@define(eq=False)
class TypedProgram:
    """A program with its layouts, forward and backward."""

    program: Program
    claims: Claims
    mesh: Mesh
    forward: TypedGraph
    backward: Backward
    inference: Inference
    kin: Kin
    """Of the blocks that the claims do not tell apart, those that run alike too."""
    diagnostics: list[Diagnostic] = field(factory=list)
