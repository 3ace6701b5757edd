"""A right table with one thing changed is refused, or computes what the plain program does. Nothing else."""

import functools

import pytest

from shardspec.runtime import attach
from tests.mutation import damaging, preserving
from tests.mutation.fixes import mended
from tests.mutation.outcome import DIFFERS, PARITY, REFUSED, RUN_FAILS, Mutant, Outcome, check, draw, outcomes, run
from tests.mutation.subjects import INPUTS, SUBJECTS, Subject, moves

COUNT, SEED = 60, 3
ACCEPTED = 0.98
"""Of the edits that are meant to keep the meaning, those that must pass."""


@functools.cache
def recorded() -> list[Outcome]:
    """What becomes of a recorded set of edits."""
    return outcomes(draw(COUNT, SEED))


def mutant(subject: str, mesh: str, **edit: object) -> Mutant:
    """An edit that was once a counterexample."""
    (base,) = [each for each in SUBJECTS if each.name == subject]
    return Mutant(
        subject=base,
        mesh=mesh,
        intent="damaging",
        mutator="by hand",
        text=repr(edit),
        rules=base.rules.override(**edit),
    )


def test_an_edited_table_is_refused_or_computes_what_the_plain_program_does():
    assert [str(outcome) for outcome in recorded() if outcome.third] == []
    verdicts = {outcome.verdict for outcome in recorded()}
    assert verdicts == {REFUSED, PARITY}, "a set of edits that all end alike tests nothing"


def test_edits_that_keep_the_meaning_are_accepted():
    meant = [outcome for outcome in recorded() if outcome.mutant.intent == "preserving"]
    refused = [str(outcome) for outcome in meant if outcome.verdict == REFUSED]
    assert len(refused) <= (1 - ACCEPTED) * len(meant), refused


def test_the_fixes_of_refused_edits_make_tables_that_pass_and_compute_the_same():
    fixed = [made for outcome in recorded() for _, made in mended(outcome)]
    assert len(fixed) >= 5
    refused = [check(each) for each in fixed]
    assert [str(each) for each in refused if each] == []
    assert [str(each) for each in run(fixed) if each.third] == []


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_layout_moved_with_all_its_partners_is_accepted_on_every_mesh(subject: Subject):
    for name, override in moves(subject).items():
        for mesh in ("tp=2", "fsdp=2,tp=2", "dp=2,fsdp=2"):
            made = Mutant(
                subject=subject,
                mesh=mesh,
                intent="preserving",
                mutator="move_a_layout_with_its_partners",
                text=name,
                rules=subject.rules.override(**override),
            )
            assert check(made) is None, str(made)


def test_a_batch_entry_is_not_pending():
    """Found by mutation: every rank reads all of it, and the sum at the next point counted it twice."""
    for subject, point in (("gpt2, no SP", "tokens"), ("llama, SP", "tokens|labels")):
        found = check(mutant(subject, "tp=2", activations={point: "B@(dp,fsdp) S@cp +tp"}))
        assert found is not None
        assert (found.verdict, found.detail) == (REFUSED, "SS306")
    inert = mutant("gpt2, no SP", "fsdp=2", activations={"tokens": "B@(dp,fsdp) S@cp +tp"})
    assert check(inert) is None


def test_no_fix_leaves_a_mistake_that_nobody_is_told_of():
    """Found by mutation: beside the fix of two mistakes, told once, stood one that mends the first alone."""
    pattern = r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?"
    found = check(mutant("llama, SP", "dp=2,tp=2", activations={pattern: "B@(dp,fsdp) S@cp D +tp"}))
    assert found is not None
    made = list(mended(found))
    assert made
    assert [check(each) for _, each in made] == [None] * len(made)


def test_the_kinds_of_edit_are_as_many_as_the_docs_say():
    assert len(damaging.DAMAGES) >= 10
    assert len(preserving.KEEPS) >= 10


def test_a_bug_of_the_runtime_is_a_third_outcome(monkeypatch: pytest.MonkeyPatch):
    """Planted: a bias that is to be read in shares is read whole, and counted twice."""
    share = attach._Share.forward
    monkeypatch.setattr(attach._Share, "forward", staticmethod(lambda ctx, tensor, count: share(ctx, tensor, 1)))
    (found,) = run([mutant("gpt2, no SP", "tp=2")])
    assert found.verdict == DIFFERS, found.detail


def test_a_mistake_that_only_the_run_finds_is_a_third_outcome():
    wrong = mutant("llama, SP", "tp=2", drop=[INPUTS])
    assert check(wrong) is not None
    assert [found.verdict for found in run([wrong])] == [RUN_FAILS]
