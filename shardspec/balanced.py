"""Whether a program's sequence lies head and tail over cp."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from shardspec.diagnostics import Diagnostic
from shardspec.infer import absolute, graphs
from shardspec.mesh import Mesh, degree
from shardspec.policy import Policy, strategy_of
from shardspec.program import Program
from shardspec.rules.attention import ATTENTION
from shardspec.rules.fit import dims_of
from shardspec.rules.match import as_pattern, fold
from shardspec.rules.operator import named_arguments
from shardspec.rules.parse import Entry
from shardspec.sequence import AXIS


def lies_balanced(program: Program, points: Mapping[str, Entry], mesh: Mesh, policy: Policy) -> bool:
    """Whether cp lies head and tail: as the policy says, or where that evens the work of causal attention out.

    Args:
        points: the rules of the batch entries, by name.
    """
    if mesh[AXIS] == 1 or policy.balance is False:
        return False
    lengths = list(sequence_lengths(program, points, mesh))
    if policy.balance:
        return bool(lengths)
    even = bool(lengths) and all(length % 2 == 0 for length in lengths)
    return even and any(strategy != "ulysses" for strategy in causal_strategies(program, policy))


def unmatched_strategies(policy: Policy, modules_of: Callable[[], Iterable[str]]) -> Iterator[Diagnostic]:
    """SS405 for a pattern of `attention` that matches no module."""
    named = [(pattern, strategy) for pattern, strategy in policy.attention if pattern != ".*"]
    modules = tuple(modules_of()) if named else ()
    for pattern, strategy in named:
        if not any(re.fullmatch(pattern, name) for name in modules):
            known = list(dict.fromkeys(map(fold, modules)))
            near = difflib.get_close_matches(pattern, list(map(as_pattern, known)), 1)
            yield Diagnostic(
                code="SS405",
                what=f'attention: r"{pattern}" matches no module',
                why=f'a pattern is matched whole against the FQN of a module, and "{strategy}" would not be used',
                advice=(f'did you mean r"{near[0]}"?',) if near else ("name modules that call attention",),
            )


def sequence_lengths(program: Program, points: Mapping[str, Entry], mesh: Mesh) -> Iterator[int]:
    """What cp, and the axes before it, leave of each dim of an entry that it splits."""
    for name, index in program.entries.items():
        shape, entry = program.values[index].shape, points.get(name)
        for dim, length in zip(dims_of(entry.spec, len(shape)), shape, strict=False) if entry else ():
            if AXIS in dim.all_axes:
                axes = dim.all_axes
                yield length // degree(mesh, axes[: axes.index(AXIS) + 1])


def causal_strategies(program: Program, policy: Policy) -> Iterator[str]:
    """The strategy of each causal attention of a model."""
    for fqn, graph in graphs(program, ""):
        for node in graph.nodes:
            if node.op == ATTENTION and named_arguments(node).get("is_causal"):
                yield strategy_of(policy, absolute(fqn, node.path))
