"""From the words of a command line to a compiler: table, model and batch."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import click
import torch
from attrs import field, frozen
from torch import nn

from shardspec.arguments import check_batch
from shardspec.cli.load import blame, load, load_model
from shardspec.cli.options import Asked
from shardspec.compiler import Compiler, uncollected
from shardspec.diagnostics import ShardingError
from shardspec.mesh import Mesh
from shardspec.plan import Plan
from shardspec.policy import Policy
from shardspec.rules.table import Rules
from shardspec.survey import Survey, survey


@frozen(eq=False)
class Target:
    """A model with a batch; tables and meshes come and go."""

    names: Survey
    inputs: Mapping[str, Any]
    loss: Callable[..., Any] | None
    policy: Policy = field(factory=Policy)

    def compiler(self, rules: Rules) -> Compiler:
        """A compiler for a table."""
        return Compiler(self.names, rules, self.policy)

    def plan(self, rules: Rules, mesh: Mesh) -> Plan:
        """The plan of a table on a mesh.

        Raises:
            ShardingError: with everything that the first stage to fail found.
        """
        return self.compiler(rules).plan(mesh, self.inputs, self.loss)


def load_rules(reference: str) -> Rules:
    """The table that `module:name` names.

    Raises:
        click.UsageError: for what is none.
    """
    rules = load(reference, "the table")
    if not isinstance(rules, Rules):
        raise click.UsageError(f"the table {reference} is a {type(rules).__name__}, not a Rules")
    return rules


def load_target(asked: Asked) -> Target:
    """Build the model on meta, and its batch.

    Raises:
        click.UsageError: for what is no model or batch, and where the user's own code raises.
    """
    module, build = load_model(asked.model)
    loss_fn = load(asked.loss, "--loss") if asked.loss else None
    if loss_fn is not None and not callable(loss_fn):
        raise click.UsageError(f"--loss {asked.loss} is a {type(loss_fn).__name__}, not a function")
    function, name = _inputs_of(module, asked.inputs)
    built = build if isinstance(build, nn.Module) else _call(build, f"--model {asked.model}")
    if not isinstance(built, nn.Module):
        raise click.UsageError(f"--model {asked.model} builds a {type(built).__name__}, not a torch.nn.Module")
    given = {"model": built, "batch": asked.batch, "seq": asked.seq}
    made = _call(partial(function, **_arguments(function, name, given)), name)
    try:
        check_batch(made)
    except ShardingError as error:
        raise click.UsageError(f"{name}: {error.diagnostics[0].what}; {error.diagnostics[0].why}") from None
    with uncollected():
        return Target(survey(built), made, loss_fn)


def _inputs_of(module: ModuleType, reference: str | None) -> tuple[Callable[..., Any], str]:
    """The function that makes the batch, and how a message calls it."""
    function = load(reference, "--inputs") if reference else getattr(module, "inputs", None)
    name = f"--inputs {reference}" if reference else f"{module.__name__}.inputs"
    if function is None:
        raise click.UsageError(
            f"{module.__name__} has no function inputs(batch, seq), which makes the batch: write one, or name another "
            "with --inputs module:function"
        )
    if not callable(function):
        raise click.UsageError(f"{name} is a {type(function).__name__}, not a function")
    return function, name


def _arguments(function: Callable[..., Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of model, batch and seq that a function takes, by name; each is then needed, and no other is given."""
    parameters = inspect.signature(function).parameters
    unknown = [each.name for each in parameters.values() if each.name not in given and each.default is each.empty]
    if unknown:
        raise click.UsageError(f"{name} takes {unknown[0]}; it is given those of {', '.join(given)} that it takes")
    lacking = [word for word in parameters if word in given and given[word] is None]
    needed = [word for word in lacking if parameters[word].default is inspect.Parameter.empty]
    if needed:
        raise click.UsageError(f"--{needed[0]} is missing: {name}({', '.join(parameters)}) takes it")
    useless = [word for word in ("batch", "seq") if given[word] is not None and word not in parameters]
    if useless:
        raise click.UsageError(f"--{useless[0]} is of no use: {name}({', '.join(parameters)}) does not take it")
    return {word: value for word, value in given.items() if word in parameters and word not in lacking}


def _call(function: Callable[[], Any], what: str) -> Any:
    """Call the user's code on meta; what it raises is told with the line of theirs."""
    try:
        with uncollected(), torch.device("meta"):
            return function()
    except ShardingError:
        raise
    except Exception as error:
        raise click.UsageError(f"{what} raises {blame(error)}") from None
