"""Type a program, forward and backward."""

from collections.abc import Mapping
from typing import Any

from shardspec.balanced import lies_balanced
from shardspec.cotangent import Backward, Cotangents
from shardspec.diagnostics import Diagnostic
from shardspec.explain import explain_conflicts, explain_issues
from shardspec.infer import Inference, TypedGraph
from shardspec.kin import Kin
from shardspec.layout import Layout
from shardspec.mesh import Mesh
from shardspec.policy import Policy, strategy_of
from shardspec.program import Program, Ref, tensors
from shardspec.rules import (
    attention,
    contraction,
    convolution,
    grouped,
    index,
    join,
    loss,
    pointwise,
    random,
    reduction,
    scatter,
    spatial,
    view,
)
from shardspec.rules.attention import in_halves, uneven_halves
from shardspec.rules.fit import layout_of
from shardspec.rules.parse import Entry
from shardspec.stages import Claims, TypedProgram
from shardspec.units import resolve_attributes

OPERATOR_FAMILIES = (
    attention,
    contraction,
    convolution,
    grouped,
    index,
    join,
    loss,
    pointwise,
    random,
    reduction,
    scatter,
    spatial,
    view,
)
"""Importing a family registers its rules."""


def typecheck(
    program: Program, claims: Claims, mesh: Mesh, *, has_loss: bool, hinted: bool = True, policy: Policy | None = None
) -> TypedProgram:
    """Type a program forward and backward; what is wrong is in `.diagnostics`.

    Args:
        policy: how attention reads a sequence that is split over cp.
        hinted: whether they are to come with edits worth trying.
    """
    policy = policy or Policy()
    balanced = lies_balanced(program, claims.points, mesh, policy)
    uneven: dict[Any, Diagnostic] = {}
    odd: list[Diagnostic] = []
    cache: dict[Any, Layout | None] = {}

    def declared(entry: Entry, name: str, shape: tuple[int, ...]) -> Layout | None:
        key = (entry, shape)
        if key not in cache:
            layout, _, problem = layout_of(entry, name, shape, claims.sizes.known, mesh, storage=False)
            if not problem and balanced and not in_halves(layout, mesh.shape):
                odd.append(odd_halves(entry, name, layout, mesh))
                layout = None
            if problem:
                uneven[key] = problem
            cache[key] = None if problem else layout
        return cache[key]

    def attributes(fqn: str, module: Any, axes: tuple[str, ...]) -> Mapping[str, int]:
        held = {f"{fqn}.{name}" if name else fqn: child for name, child in module.named_modules()}
        degrees = {axis: size for axis, size in mesh.shape.items() if axis in axes}
        found, _ = resolve_attributes(claims.table.rules, held, degrees)
        return found.get(fqn, {})

    inference = Inference(
        mesh.shape,
        claims.params,
        claims.points,
        declared,
        claims.kin,
        hinted,
        attributes,
        strategy=lambda path: strategy_of(policy, path),
        balanced=balanced,
    )
    forward = inference.program(program)
    cotangents = Cotangents(inference)
    seeds = [ref.index for ref in _seeds(program, has_loss) if forward.types[ref.index] is not None]
    backward = cotangents.program(forward, seeds)
    typed = TypedProgram(
        program, claims, mesh, forward, backward, inference, running_alike(claims.kin, forward, backward)
    )
    typed.diagnostics += [*uneven.values(), *odd[:1]]
    typed.diagnostics += explain_issues(inference, claims)
    if not inference.issues:
        typed.diagnostics += explain_conflicts(cotangents.conflicts, inference, claims)
    return typed


def odd_halves(entry: Entry, name: str, layout: Layout, mesh: Mesh) -> Diagnostic:
    """SS343 for a declared activation of which ranks cannot hold two chunks; the first tells of all."""
    refusal = uneven_halves(name, layout, mesh.shape)
    return Diagnostic(
        code=refusal.code,
        what=refusal.what,
        why=refusal.why,
        locations=(entry.location,),
        advice=refusal.advice,
    )


def running_alike(kin: Kin, forward: TypedGraph, backward: Backward) -> Kin:
    """The blocks that the table does not tell apart and that run alike, forward and backward, each time."""
    runs: dict[str, list[tuple[int, int]]] = {}
    for position, inner in forward.calls.items():
        fqn = forward.graph.nodes[position].func.fqn
        runs.setdefault(fqn, []).append((id(inner), id(backward.calls.get(position))))
    first: dict[object, str] = {}
    heads = {fqn: first.setdefault((head, *runs.get(fqn, ())), fqn) for fqn, head in kin.heads.items()}
    return Kin(heads)


def _seeds(program: Program, has_loss: bool) -> list[Ref]:
    """The values whose cotangents start complete: the loss's sum, or forward's outputs where no loss is known."""
    if has_loss and isinstance(program.result, (tuple, list)):
        return tensors(program.result[:1])
    return [Ref(index) for index in program.outputs]
