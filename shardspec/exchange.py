"""What the calls of experts modules come to on a rank: a plan for each, and the messages of its exchange."""

from collections.abc import Callable, Iterator, Mapping
from math import ceil, prod

import torch

from shardspec.diagnostics import Diagnostic
from shardspec.infer import TypedGraph, absolute
from shardspec.lower import calls, distinct_calls, in_order, run_again
from shardspec.mesh import AXES, Mesh, degree
from shardspec.names import fold
from shardspec.placement import digits_index
from shardspec.plan import Collective, ExpertsPlan
from shardspec.stages import TypedProgram


def lower_experts(typed: TypedProgram) -> dict[str, ExpertsPlan]:
    """FQN -> how an experts module runs; where it is called more than once, as in the call that a gradient passes."""
    found: dict[str, ExpertsPlan] = {}
    for fqn, graph, back in calls(typed.forward, typed.backward, ""):
        for position in graph.bodies:
            completed = back.completed.get(position) if back is not None else None
            name = absolute(fqn, graph.graph.nodes[position].func.fqn)
            plan = experts_plan(
                graph, position, name, completed, typed.claims.table.rules.capacity, typed.inference.balanced
            )
            if plan.name not in found or completed is not None:
                found[plan.name] = plan
    return found


def calls_that_differ(typed: TypedProgram) -> Iterator[Diagnostic]:
    """SS317 for an experts module that is called more than once, and would have to run otherwise each time."""
    first: dict[tuple[str, bool], ExpertsPlan] = {}
    for fqn, graph, back in distinct_calls(typed):
        for position in graph.bodies:
            node = graph.graph.nodes[position]
            name = absolute(fqn, node.func.fqn)
            completed = back.completed.get(position) if back is not None else None
            plan = experts_plan(
                graph, position, name, completed, typed.claims.table.rules.capacity, typed.inference.balanced
            )
            known = first.setdefault((name, completed is not None), plan)
            other = first.get((name, completed is None), known)
            if runs_alike(known) != runs_alike(plan) or runs_alike(other)[2:] != runs_alike(plan)[2:]:
                yield Diagnostic(
                    code="SS317",
                    what=f"{fold(name)} is called more than once, and would have to run otherwise each time",
                    why=f"once for choices {known.tokens}, and once for choices {plan.tokens}",
                    locations=(node.location,),
                    advice=("call it once with all rows, or each time with rows that are laid out alike",),
                )


def runs_alike(plan: ExpertsPlan) -> tuple[object, ...]:
    """What is equal for calls that one plan serves: what is completed backward, and what is done forward."""
    counted = plan.tokens if plan.capacity else None
    return plan.hidden_axes, plan.weights_axes, plan.exchanged, in_order(plan.tokens.sharded), plan.capacity, counted


def experts_plan(
    graph: TypedGraph,
    position: int,
    name: str,
    completed: tuple[frozenset[str] | None, ...] | None,
    capacity: float | None,
    balanced: bool,
) -> ExpertsPlan:
    """The plan of one call.

    Args:
        completed: what its backward completes, if there is one.
        capacity: how many assignments an expert takes, in units of as many as each gets where all get the same.
    """
    hidden, _, ids, *stacked = graph.consumed[position]
    axes = [in_order(over or ()) for over in completed or ((), ())]
    values, node = graph.graph.values, graph.graph.nodes[position]
    count, choices = values[node.args[3].index].shape[0], values[node.args[2].index].shape
    return ExpertsPlan(
        name=name,
        count=count,
        capacity=0 if capacity is None else max(1, ceil(capacity * prod(choices) / count)),
        tokens=ids.layout,
        balanced=balanced,
        features=hidden.layout.shape[1],
        exchanged="ep" in stacked[0].layout.sharded,
        hidden_axes=axes[0],
        weights_axes=axes[1],
    )


def experts_collectives(
    typed: TypedProgram, again: tuple[str, ...], dtype_of: Callable[[torch.dtype], torch.dtype]
) -> Iterator[Collective]:
    """The messages of each exchange, forward and backward; those inside `again` run once more in backward.

    What a rank sends of its own tokens is exact. What it sends back, of the rows that chose its experts, is as long
    where they are chosen evenly, and over all ranks together in any case.

    Args:
        dtype_of: the dtype that a value has in compute, by the one that it was recorded with.
    """
    twice = run_again(typed, again)
    for fqn, graph, back in calls(typed.forward, typed.backward, ""):
        for position in graph.bodies:
            node, values = graph.graph.nodes[position], graph.graph.values
            name = absolute(fqn, node.func.fqn)
            completed = back.completed.get(position) if back is not None else None
            plan = experts_plan(
                graph, position, name, completed, typed.claims.table.rules.capacity, typed.inference.balanced
            )
            hidden, weights = (dtype_of(values[node.args[at].index].dtype).itemsize for at in (0, 1))
            tokens, choices = plan.tokens.shape
            rows, shares = tokens * choices * plan.features * hidden, tokens * choices * weights
            again_there, again_back = f"{name}:exchange" in twice, f"{name}:return" in twice
            if plan.capacity:
                yield from _asked(plan, name, typed.mesh, twice=again_there)
            messages = _messages(plan, rows, shares, completed, again_there=again_there, again_back=again_back)
            for phase, what, size, expected in messages if plan.exchanged else ():
                yield Collective(
                    kind="all_to_all",
                    axes=("ep",),
                    where=name,
                    phase=phase,
                    count=1,
                    bytes=size,
                    why=what,
                    expected=expected,
                )
            yield from _completions(plan, name, tokens * plan.features * hidden, shares, alike=hidden == weights)


def _messages(
    plan: ExpertsPlan,
    rows: int,
    shares: int,
    completed: tuple[frozenset[str] | None, ...] | None,
    *,
    again_there: bool,
    again_back: bool,
) -> Iterator[tuple[str, str, int, bool]]:
    """Phase, what for, bytes and whether they are an expectation, of each message of one exchange.

    Args:
        rows: bytes of the rows that a rank sends of its own tokens; `shares`, of their weights.
        again_there: the way there is run again in backward; `again_back`, the way back.
    """
    some = plan.capacity > 0
    for phase in ("forward", "backward") if again_there else ("forward",):
        yield phase, "counts", plan.count * 8, False
        yield phase, "rows", rows, some
        yield phase, "weights", shares, some
    for phase in ("forward", "backward") if again_back else ("forward",):
        yield phase, "rows, back", rows, True
    if completed is None:
        return
    yield "backward", "gradients of rows", rows, some
    for over, what, size in zip(completed, ("rows", "weights"), (rows, shares), strict=True):
        if over is not None:
            yield "backward", f"gradients of {what}, back", size, True


def _asked(plan: ExpertsPlan, name: str, mesh: Mesh, *, twice: bool) -> Iterator[Collective]:
    """What tells each rank how many assignments come before its own, where an expert takes some only."""
    axes = in_order(plan.tokens.sharded)
    index = digits_index(plan.tokens.dims[0], dict.fromkeys(AXES, 0), mesh, balanced=plan.balanced)
    runs = 1 + int((index.diff() != 1).sum())
    size = degree(mesh, axes) * runs * plan.count * 8
    phases = ("forward", "backward") if twice else ("forward",)
    for phase in phases if axes else ():
        yield Collective(
            kind="all_gather", axes=axes, where=name, phase=phase, count=1, bytes=size, why="tokens before its own"
        )


def routing_size(experts: Mapping[str, ExpertsPlan]) -> int:
    """How many numbers a step sums over ranks to tell of experts: tokens by module and expert, and those dropped."""
    return len(experts) * (1 + max((plan.count for plan in experts.values()), default=0))


def _completions(plan: ExpertsPlan, name: str, rows: int, shares: int, *, alike: bool) -> Iterator[Collective]:
    """The sums of what the experts' forward owes the rows and weights that enter it; in one message where they can."""
    messages = [(plan.hidden_axes, rows), (plan.weights_axes, shares)]
    if alike and plan.hidden_axes == plan.weights_axes:
        messages = [(plan.hidden_axes, rows + shares)]
    for axes, size in messages:
        if axes:
            yield Collective(
                kind="all_reduce", axes=axes, where=name, phase="backward", count=1, bytes=size, why="experts' inputs"
            )
