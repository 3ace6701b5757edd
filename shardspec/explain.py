"""Turn refusals and conflicts into diagnostics: rule, model line, reason."""

from collections.abc import Iterator, Sequence

from shardspec.cotangent import Conflict
from shardspec.diagnostics import Diagnostic
from shardspec.infer import Inference, absolute, group_issues, model_location


def explain_issues(inference: Inference) -> Iterator[Diagnostic]:
    for group in group_issues(inference.issues):
        issue = group[0]
        refusal = issue.refusal
        rules = {stop.entry.location: None for stop in issue.trail if stop.entry is not None}
        yield Diagnostic(
            code=refusal.code,
            what=refusal.what,
            why=refusal.why,
            locations=(model_location(issue), *rules),
            advice=refusal.advice,
        )


def explain_conflicts(conflicts: Sequence[Conflict], inference: Inference) -> Iterator[Diagnostic]:
    del inference
    for conflict in conflicts:
        graph = conflict.typed.graph
        value = graph.values[conflict.value]
        owing = graph.nodes[conflict.owing[0]]
        yield Diagnostic(
            code="SS307",
            what=f"the gradient of {absolute(conflict.fqn, value.name) or 'a value'} is owed over {conflict.axis} by some of its uses only",
            why=f"{owing.op} leaves a pending sum, another use is complete",
            locations=(owing.location,),
        )
