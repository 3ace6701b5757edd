"""What a user passes: checked for its kind before it is used."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardspec.diagnostics import refuse
from shardspec.mesh import Mesh
from shardspec.rules.table import Rules
from shardspec.survey import Model


def kind_of(item: Any) -> str:
    """The name of a thing's class."""
    return type(item).__name__


def shown(item: Any) -> str:
    """What was given, in words: its value where that is short, else the name of its class."""
    text = repr(item)
    return text if len(text) <= MOST_SHOWN and "\n" not in text else f"a {kind_of(item)}"


MOST_SHOWN = 48
"""Characters of a value in a message."""


def check_arguments(rules: Any, mesh: Any, inputs: Any) -> None:
    """SS101 and SS401 for arguments that are no mesh, table or batch."""
    if not isinstance(mesh, Mesh):
        refuse(
            "SS101",
            f"the mesh is {shown(mesh)}",
            advice=('give ss.Mesh(fsdp=2, tp=2), or ss.Mesh.parse("fsdp=2,tp=2")',),
        )
    if not isinstance(rules, Rules):
        refuse("SS401", f"the table is a {kind_of(rules)}", advice=("give ss.Rules(params=..., activations=...)",))
    if inputs is not None:
        check_batch(inputs)


def as_model(model: Any) -> Model:
    """A module, or a function that builds one, and says so where it does not."""
    wanted = "a model is a module, or a function that builds one"
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        refuse("SS401", f"the model is a {kind_of(model)}", why=wanted)

    def build() -> nn.Module:
        built = model()
        if not isinstance(built, nn.Module):
            refuse("SS401", f"the model's function returns a {kind_of(built)}", why=wanted)
        return built

    return build


def check_batch(batch: Any) -> None:
    """SS401 for a batch that maps no names to its entries."""
    if not isinstance(batch, Mapping):
        refuse("SS401", f"the batch is a {kind_of(batch)}", why="a batch maps names to its entries")
