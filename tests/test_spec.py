"""The spec language: what parses, what it means, and where each mistake stands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.mesh import AXES
from shardspec.spec import Dim, Factor, P, Spec, SpecError, parse


def factor(name: str = "", *axes: str, size: int | None = None) -> Factor:
    return Factor(name, size, axes)


def dim(name: str, *axes: str) -> Dim:
    return Dim((factor(name, *axes),))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("", Spec(())),
        ("D", Spec((dim("D"),))),
        ("B S D", Spec((dim("B"), dim("S"), dim("D")))),
        ("V@tp D", Spec((dim("V", "tp"), dim("D")))),
        ("V@(tp,fsdp) D", Spec((dim("V", "tp", "fsdp"), dim("D")))),
        ("(H@tp hd)@fsdp", Spec((Dim((factor("H", "tp"), factor("hd")), ("fsdp",), grouped=True),))),
        ("D (H@tp hd)", Spec((dim("D"), Dim((factor("H", "tp"), factor("hd")), grouped=True)))),
        ("(2 F@tp) D", Spec((Dim((factor(size=2), factor("F", "tp")), grouped=True), dim("D")))),
        ("(F)", Spec((Dim((factor("F"),), grouped=True),))),
        ("B 1 S", Spec((dim("B"), Dim((factor(size=1),)), dim("S")))),
        ("D +tp", Spec((dim("D"),), ("tp",))),
        ("D +tp +cp", Spec((dim("D"),), ("tp", "cp"))),
        ("+tp", Spec((), ("tp",))),
        ("...", Spec((), (), 0)),
        ("B@dp ...", Spec((dim("B", "dp"),), (), 1)),
        ("B ... D@tp", Spec((dim("B"), dim("D", "tp")), (), 1)),
        ("... D +tp", Spec((dim("D"),), ("tp",), 0)),
        # Direct sums.
        ("(H + K)", Spec((Dim((factor("H"), factor("K")), (), True, (1, 1)),))),
        ("(H@tp hd + K@tp hd + 2 K@tp)@fsdp D",
         Spec((Dim((factor("H", "tp"), factor("hd"), factor("K", "tp"), factor("hd"), factor(size=2),
                    factor("K", "tp")), ("fsdp",), True, (2, 2, 2)), dim("D")))),
        ("(a@(dp,tp)+b@(dp,tp)) +cp", Spec((Dim((factor("a", "dp", "tp"), factor("b", "dp", "tp")), (), True, (1, 1)),),
                                           ("cp",))),
        # Spaces are free.
        ("  V @ ( tp , fsdp )  D ", Spec((dim("V", "tp", "fsdp"), dim("D")))),
        ("(H@tp hd)@fsdp(K V)", Spec((Dim((factor("H", "tp"), factor("hd")), ("fsdp",), True),
                                      Dim((factor("K"), factor("V")), (), True)))),
        ("D+tp", Spec((dim("D"),), ("tp",))),
        ("head_dim x2", Spec((dim("head_dim"), dim("x2")))),
        # A factor may have an axis' name.
        ("tp@tp", Spec((dim("tp", "tp"),))),
    ],
)  # fmt: skip
def test_a_spec_parses_to_its_dims(text, spec):
    assert parse(text) == spec


def test_the_axes_of_a_spec_are_told_in_reading_order():
    spec = parse("(H@tp hd)@(fsdp,cp) D@dp +ep")
    assert spec.axes == ("tp", "fsdp", "cp", "dp", "ep")
    assert spec.dims[0].all_axes == ("tp", "fsdp", "cp")


def test_the_axes_of_a_direct_sum_are_those_of_each_of_its_parts():
    spec = parse("D (H@(cp,tp) hd + K@(cp,tp) hd)@fsdp")
    assert spec.axes == ("cp", "tp", "fsdp")
    assert [[one.name for one in part] for part in spec.dims[1].parts] == [["H", "hd"], ["K", "hd"]]
    assert [[one.name for one in part] for part in spec.dims[0].parts] == [["D"]]


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,3}", fullmatch=True)
AXIS_LISTS = st.lists(st.sampled_from(AXES), max_size=3).map(tuple)
NAMED = st.builds(Factor, NAMES, st.none(), AXIS_LISTS)
NUMBERS = st.builds(Factor, st.just(""), st.integers(0, 999), st.just(()))
FACTORS = NAMED | NUMBERS


@st.composite
def sums(draw) -> Dim:
    """Parts that are split over the same axes, by one of the factors of each."""
    axes, parts = draw(AXIS_LISTS), []
    for _ in range(draw(st.integers(2, 4))):
        bare = [Factor(one.name, one.size) for one in draw(st.lists(FACTORS, max_size=2))]
        bare.insert(draw(st.integers(0, len(bare))), Factor(draw(NAMES), None, axes))
        parts.append(tuple(bare))
    return Dim(tuple(one for part in parts for one in part), draw(AXIS_LISTS), True, tuple(map(len, parts)))


DIMS = (
    st.builds(Dim, FACTORS.map(lambda one: (one,)))
    | st.builds(Dim, st.lists(FACTORS, min_size=1, max_size=3).map(tuple), AXIS_LISTS, st.just(True))
    | sums()
)


@st.composite
def specs(draw) -> Spec:
    dims = tuple(draw(st.lists(DIMS, max_size=4)))
    ellipsis = draw(st.none() | st.integers(0, len(dims)))
    return Spec(dims, draw(AXIS_LISTS), ellipsis)


@given(specs())
def test_what_a_spec_prints_parses_to_it(spec):
    """Law: parse(str(spec)) == spec."""
    assert parse(str(spec)) == spec


@given(specs())
def test_printing_is_stable(spec):
    """Law: str(parse(s)) == s for every s that was printed."""
    assert str(parse(str(spec))) == str(spec)


ALIKE = "the parts of a direct sum are split alike"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("V@", "'V@' ends where a mesh axis was expected"),
        ("V@(tp", "'V@(tp' ends where ')' was expected"),
        ("V@(tp,", "'V@(tp,' ends where a mesh axis was expected"),
        ("V@()", "'V@()': ')' at column 4 where a mesh axis was expected"),
        ("V@(tp fsdp) D", "'V@(tp fsdp) D': 'fsdp' at column 7 where ')' was expected"),
        ("V@(tp,,fsdp)", "'V@(tp,,fsdp)': ',' at column 7 where a mesh axis was expected"),
        ("V@2", "'V@2': '2' at column 3 where a mesh axis was expected"),
        ("V@tpp D", "'V@tpp D': unknown mesh axis 'tpp' at column 3; the axes are pp, dp, fsdp, ep, cp, tp"),
        ("V D@(tp, x)", "'V D@(tp, x)': unknown mesh axis 'x' at column 10; the axes are pp, dp, fsdp, ep, cp, tp"),
        ("D +x", "'D +x': unknown mesh axis 'x' at column 4; the axes are pp, dp, fsdp, ep, cp, tp"),
        ("D +", "'D +' ends where a mesh axis was expected"),
        ("D + 2", "'D + 2': '2' at column 5 where a mesh axis was expected"),
        ("D +tp E", "'D +tp E': 'E' at column 7 where '+axis' or the end was expected"),
        ("+tp ...", "'+tp ...': '...' at column 5 where '+axis' or the end was expected"),
        ("... D ...", "'... D ...': '...' at column 7 where at most one '...' was expected"),
        ("D )", "'D )': ')' at column 3 where a dim was expected"),
        ("@tp", "'@tp': '@' at column 1 where a dim was expected"),
        (", D", "', D': ',' at column 1 where a dim was expected"),
        ("()", "'()': ')' at column 2 where a factor's name was expected"),
        ("(", "'(' ends where a factor's name was expected"),
        ("(H", "'(H' ends where ')' was expected"),
        ("(H (a b))", "'(H (a b))': '(' at column 4 where ')' was expected"),
        ("(H ...)", "'(H ...)': '...' at column 4 where ')' was expected"),
        ("2@tp", "'2@tp': the plain number 2 at column 1 cannot be split; give the factor a name"),
        ("D (2@tp F)", "'D (2@tp F)': the plain number 2 at column 4 cannot be split; give the factor a name"),
        ("(H +)", "'(H +)': ')' at column 5 where a factor's name was expected"),
        ("(+ H)", "'(+ H)': '+' at column 2 where a factor's name was expected"),
        ("(H + +tp)", "'(H + +tp)': '+' at column 6 where a factor's name was expected"),
        ("(H +", "'(H +' ends where a factor's name was expected"),
        ("(H + K", "'(H + K' ends where ')' was expected"),
        ("(H@tp + (K))", "'(H@tp + (K))': '(' at column 9 where a factor's name was expected"),
        ("(H@tp hd + K hd)",
         f"'(H@tp hd + K hd)': {ALIKE}: 'H@tp hd' over tp, 'K hd' at column 12 over nothing"),
        ("(H + K@tp)",
         f"'(H + K@tp)': {ALIKE}: 'H' over nothing, 'K@tp' at column 6 over tp"),
        ("(H@(cp,tp) + K@(tp,cp))",
         f"'(H@(cp,tp) + K@(tp,cp))': {ALIKE}: 'H@(cp,tp)' over cp, tp, 'K@(tp,cp)' at column 14 over tp, cp"),
        ("V-D", "'V-D': cannot read '-' at column 2"),
        ("V   é!", "'V   é!': cannot read 'é' at column 5"),
        ("B .. D", "'B .. D': cannot read '.' at column 3"),
        ("D@tp@fsdp", "'D@tp@fsdp': '@' at column 5 where a dim was expected"),
        ("B [S]", "'B [S]': cannot read '[' at column 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_column(text, message):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == message


@given(st.text("VDB @(),+.2tp\t", max_size=12))
def test_any_text_parses_or_is_a_spec_error(text):
    """Law: parse never fails in another way, and what parses prints and parses again."""
    try:
        spec = parse(text)
    except SpecError:
        return
    assert parse(str(spec)) == spec


# P


def test_p_is_a_spec_without_names():
    spec = P("tp", None, ("dp", "fsdp")).spec()
    assert spec == Spec((dim("", "tp"), dim(""), dim("", "dp", "fsdp")), open_end=True)
    assert P().spec() == Spec((), open_end=True)


def test_ps_are_values():
    assert P("tp", None) == P("tp", None) != P(None, "tp")
    assert hash(P("tp")) == hash(P("tp"))
    assert repr(P("tp", None, ("dp", "fsdp"))) == "P('tp', None, ('dp', 'fsdp'))"


def test_p_knows_the_axes():
    with pytest.raises(SpecError, match=r"P\('tpp'\): unknown mesh axis 'tpp'; the axes are pp, dp"):
        P("tpp").spec()
    with pytest.raises(SpecError, match=r"P\(3\): 3 is no axis, tuple of axes, or None"):
        P(3).spec()
