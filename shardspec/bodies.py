"""The forward of an experts module as one rank runs it: a few rows, its own experts, one choice for each row."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shardspec.nests import tensor_leaves
from shardspec.program import Graph, Value
from shardspec.rules.experts import FIRST_PARAMETER, refuse
from shardspec.rules.match import as_pattern, fold
from shardspec.rules.operator import Refusal
from shardspec.torch_private import no_torch_dispatch, no_torch_function
from shardspec.tracing import OF_AN_OPERATOR, PROTOCOL, HostRead, Tracer, raised_here, recording, user_frame
from shardspec.twin import Twin

ROWS = 3
"""How many rows a body is recorded with: two of the first expert and one of the last, the others having none."""


class BodyTracer(Tracer):
    """Records what runs in an experts module; no rule stands within it, and nothing in it is repeated."""

    def point(self, names: tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        del names
        return tensor

    def block(self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self.plain(module, fqn, forward, args, kwargs)


def record_body(
    module: nn.Module,
    originals: set[int],
    fqn: str,
    hidden: Value,
    weights: Value,
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, int],
    times: int = 1,
    choices: int = 1,
) -> Graph:
    """The graph of one call: its inputs are the rows [R, D] and their weights [R, 1], its output is [R, D].

    The ids are whole numbers that the walk knows, so that a loop over the experts that were hit runs as it would.

    Args:
        module: the model's own, which is only read.
        originals: ids of the model's tensors and modules.
        hidden: what enters the module on the whole, and the weights beside it.
        shapes: name of a parameter -> its shape on a rank.
        attributes: what the module's attributes are there.
        times: how often the rows are repeated.
        choices: of each row, one or two.

    Raises:
        Refusal: SS332 where it does not run so, or its result is no [R, D] of the rows' dtype.
    """

    def run(attributes: Mapping[str, int]) -> Graph:
        return _record(module, originals, fqn, hidden, weights, shapes, attributes, times, choices)

    try:
        return run(attributes)
    except Refusal:
        raise
    except Exception as error:
        if raised_here(error) and not isinstance(error, (HostRead, *OF_AN_OPERATOR)):
            raise
        raise _failed(error, module, fqn, shapes, run) from error


def _failed(
    error: Exception,
    module: nn.Module,
    fqn: str,
    shapes: Mapping[str, tuple[int, ...]],
    run: Callable[[Mapping[str, int]], Graph],
) -> Refusal:
    """What a forward that does not run on a rank's part of its parameters comes to; where a number that the module
    keeps is that of all experts and it runs with that of a rank's, that it should be told."""
    held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    lines = "".join(f"\nat {place.file}:{place.line}   {place.text}" for place in user_frame(error))
    everyone, own = (
        next(iter(parameter.shape for parameter in module.parameters()))[0],
        min(s[0] for s in shapes.values()),
    )
    advice: list[str] = []
    for name, value in vars(module).items():
        if type(value) is int and value == everyone != own and _runs(run, {name: own}):
            advice.append(f'attributes={{r"{as_pattern(fold(fqn))}": {{"{name}": "E@ep"}}}}')
    return refuse(
        f"the experts module {fqn} does not run on a rank's experts: {message}",
        f"a rank's module holds {held}, and is called with its own experts' numbers, from 0{lines}",
        operands=range(FIRST_PARAMETER, FIRST_PARAMETER + len(shapes)),
        advice=advice[:1],
    )


def _runs(run: Callable[[Mapping[str, int]], Graph], attributes: Mapping[str, int]) -> bool:
    """Whether a fix that is worth telling holds: it is tried with the user's own forward, which may raise anything."""
    try:
        run(attributes)
    except Exception:
        return False
    return True


def _record(
    module: nn.Module,
    originals: set[int],
    fqn: str,
    hidden: Value,
    weights: Value,
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, int],
    times: int = 1,
    choices: int = 1,
) -> Graph:
    graph = Graph()
    tracer = BodyTracer(graph, module, originals)

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        def make() -> torch.Tensor:
            return nn.Parameter(torch.empty(shapes[name], dtype=tensor.dtype, device="meta"), tensor.requires_grad)

        return tracer.hold(name, make)

    own = Twin(module, place, tracer.attach, at_once=True).root
    for name, value in attributes.items():
        setattr(own, name, value)
    with no_torch_function(), no_torch_dispatch():
        rows = torch.empty((times * ROWS, hidden.shape[1]), dtype=hidden.dtype, device="meta")
        shares = torch.empty((times * ROWS, choices), dtype=weights.dtype, device="meta")
        last = min(shape[0] for shape in shapes.values()) - 1 if shapes else 0
        ids = torch.tensor([[0, last], [last, 0], [0, last]] * times)[:, :choices]
    for tensor, of in ((rows, hidden), (shares, weights)):
        value = Value(tuple(tensor.shape), tensor.dtype, "", "formal", of.requires_grad)
        graph.inputs.append(tracer.enter(tensor, value))
    with recording(tracer):
        out = own(rows, ids, shares)
        made = tensor_leaves(out)
        if not (isinstance(out, torch.Tensor) and out.shape == rows.shape and out.dtype == rows.dtype):
            told = ", ".join(f"{list(item.shape)} {str(item.dtype).removeprefix('torch.')}" for item in made)
            raise refuse(
                f"the experts module {fqn} gives {told or 'no tensor'} for rows [{len(rows)}, {hidden.shape[1]}] "
                f"{str(hidden.dtype).removeprefix('torch.')}",
                PROTOCOL,
            )
        graph.outputs = [tracer.value_of(out)]
    return graph
