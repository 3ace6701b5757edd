"""The fault gallery: every wrong table and model is refused before step 1 and told why; no right one is refused."""

import functools
import re

import pytest

import shardspec as ss
from tests.gallery.case import RULES, Case
from tests.gallery.right import VARIANTS, Variant
from tests.gallery.wrong import FAULTS, Fault

MOST = {
    # sizes= contradicts two rules, each in its own way
    "factors_that_do_not_make_up_a_dim": 2,
    # the one pattern that was dropped stood for two points in a block
    "a_column_parallel_input_without_a_point_beside_a_residual": 2,
}
"""How many messages a fault takes, where it is more than one."""

VALUE = re.compile(r"<value \d+>|operand \d|Ref\(")


@functools.cache
def refusal(fault: Fault) -> ss.ShardingError:
    """What the check says of a fault."""
    with pytest.raises(ss.ShardingError) as caught:
        fault.make().compile()
    return caught.value


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_wrong_table_or_model_is_refused_and_told_why(fault: Fault):
    codes = {diagnostic.code for diagnostic in refusal(fault).diagnostics}
    text = str(refusal(fault))
    assert codes <= set(fault.codes), text
    assert fault.says in text
    assert not VALUE.search(text), "a message calls a tensor by its number"


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_refusal_gives_a_reason_a_place_and_one_message_a_cause(fault: Fault):
    found = refusal(fault).diagnostics
    assert len(found) <= MOST.get(str(fault), 1), str(refusal(fault))
    for diagnostic in found:
        assert diagnostic.why
        assert diagnostic.locations or diagnostic.code == "SS401", str(diagnostic)
        assert all(place.file and not place.file.startswith("/") for place in diagnostic.locations), str(diagnostic)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_right_table_is_not_refused(variant: Variant):
    variant.make().compile()


def test_the_gallery_is_as_large_as_it_says():
    assert len(FAULTS) >= 40
    assert len(VARIANTS) >= 20
    for listed in (FAULTS, VARIANTS):
        assert len({str(each) for each in listed}) == len(listed)


def test_a_fix_is_a_table_that_passes():
    """The fix that the README shows, applied: the text of a checked fix is what to write."""
    fault = next(fault for fault in FAULTS if str(fault) == "the_sum_after_wo_is_forgotten")
    wrong = fault.make()
    for fix in refusal(fault).diagnostics[0].fixes:
        pattern, spec = re.fullmatch(r'add to activations: r"(.*)": "(.*)"', fix).groups()
        Case(rules=wrong.rules.override(activations={pattern: spec}), mesh=wrong.mesh).compile()


def test_the_tables_of_the_gallery_are_not_shared_by_accident():
    assert Case().rules is RULES
