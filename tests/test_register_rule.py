"""Rules of the user's own: the right ones accepted, the wrong ones refused with what is wrong and a fix that passes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from shardspec.layout import Layout
from shardspec.rules.factors import NotationError, parse_notation
from shardspec.rules.operator import RULES
from shardspec.testing.bruteforce import verify_operator
from tests import own_operators as own
from tests.own_operators import own_rules

OPS = torch.ops.own
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    with own_rules():
        yield


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def refused(*args, **kwargs) -> ss.Diagnostic:
    """What a registration is told first; nothing is registered."""
    before = dict(RULES)
    with pytest.raises(ss.ShardingError) as caught:
        ss.register_rule(*args, **kwargs)
    assert before == RULES, "a refused rule leaves nothing behind"
    first = caught.value.diagnostics[0]
    assert first.locations[0].file.endswith("test_register_rule.py")
    return first


# Right rules

X, W = noise(4, 4, 4), noise(4)


@pytest.mark.parametrize(
    ("op", "notation", "options"),
    [
        (own.scaled_gelu, "b s d, d -> b s d", {"samples": [(X, W)]}),
        (OPS.scaled_gelu, "... d, d -> ... d", {"samples": [(X, W), (noise(4, 4), W)], "linear": "w"}),
        (OPS.softmax.default, "b s !d -> b s !d", {"samples": [(X,), {"x": X, "dim": -1}]}),
        (OPS.total, "b s d -> b s", {"samples": [X], "linear": True}),
        (OPS.sum_of_squares, "b s d -> b s", {"samples": [X]}),
        (OPS.peak, "b s d -> b s", {"samples": [X], "reduction": "max"}),
        (OPS.turn, "b s d -> b d s", {"samples": [X], "linear": True}),
        (
            OPS.norm_heads,
            "b s (h !e) -> b s (h !e)",
            {"samples": [(noise(4, 4, 12), 4)], "sizes": {"n_heads": "h"}},
        ),
        (OPS.gate, "b !i, !i !o -> b !o, b", {"samples": [(noise(4, 4), noise(4, 4))]}),
        (OPS.average, "b d, b d -> b d", {"samples": [(noise(4, 4), noise(4, 4))], "linear": [("x", "y")]}),
        (OPS.merge, "b d, d -> b d", {"samples": [(noise(4, 4), W), (noise(4, 4), noise(4))]}),
        (torch.ops.aten.renorm.default, "b !d -> b !d", {"samples": [(noise(4, 4), 2, 0, 1.0)]}),
        (torch.ops.aten.cdist.default, "b m !d, b n !d -> b m n", {"samples": [(noise(4, 4, 3), noise(4, 4, 3))]}),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_a_right_rule_is_accepted(op, notation, options):
    assert ss.register_rule(op, notation, **options) is op


MESH = ss.Mesh(dp=2, tp=2)


def test_a_gradient_that_is_a_share_by_one_result_and_whole_by_another_is_refused():
    """`gate(x, w)` gives x @ w, which is split with w, and a sum over x alone, which is whole."""
    ss.register_rule(OPS.gate, "b !i, !i o -> b o, b", samples=[(noise(4, 4), noise(4, 4))])
    both = verify_operator(OPS.gate, [noise(4, 4), noise(4, 4)], ["B I", "I O@tp"], ss.Mesh(tp=2))
    assert both.refusal.startswith("SS307")
    one = verify_operator(lambda x, w: OPS.gate(x, w)[0], [noise(4, 4), noise(4, 4)], ["B I", "I O@tp"], ss.Mesh(tp=2))
    assert one.accepted, one.refusal
    assert one.correct, one.problem


@pytest.mark.parametrize(
    ("specs", "layout"),
    [
        (["B@dp S (H@tp e)"], "[2@dp, 4, 6@tp]"),
        (["B (2 S@tp) (H@dp e)"], "[4, 2.tp, 6@dp]"),
        (["B S ((H@(dp,tp)) e)".replace("((H@(dp,tp)) e)", "(H@(dp,tp) e)")], "[4, 4, 3@(dp,tp)]"),
    ],
)
def test_a_size_that_a_rank_passes_is_its_parts(specs, layout):
    """The layouts are written by hand: 12 features are 4 heads of 3."""
    ss.register_rule(OPS.norm_heads, "b s (h !e) -> b s (h !e)", samples=[(noise(4, 4, 12), 4)], sizes={"n_heads": "h"})
    verdict = verify_operator(lambda x: OPS.norm_heads(x, 4), [noise(4, 4, 12)], specs, MESH)
    assert verdict.accepted, verdict.refusal
    assert verdict.correct, verdict.problem
    assert ", ".join(map(str, verdict.outputs)) == layout


def test_a_cut_inside_a_whole_factor_is_refused_in_a_model():
    ss.register_rule(OPS.norm_heads, "b s (h !e) -> b s (h !e)", samples=[(noise(4, 4, 12), 4)], sizes={"n_heads": "h"})
    strided = [Layout(((4,), (4,), (6, "tp")))]
    verdict = verify_operator(lambda x: OPS.norm_heads(x, 4), [noise(4, 4, 12)], strided, ss.Mesh(tp=2))
    assert not verdict.accepted
    assert verdict.refusal.startswith("SS301: own::norm_heads reads")


def test_a_decorated_function_gives_the_notation_by_the_arguments():
    @ss.register_rule(OPS.softmax, samples=[(X, -1), (X, 1), (X, 0)])
    def softmax_rule(x: Tensor, dim: int) -> str:
        names = ["a", "b", "c"]
        names[dim] = "!" + names[dim]
        return f"{' '.join(names)} -> {' '.join(names)}"

    assert softmax_rule(X, 0) == "!a b c -> !a b c"
    good = verify_operator(lambda x: OPS.softmax(x, 1), [X], ["B@tp S D@dp"], MESH)
    assert (good.accepted, good.correct) == (True, True)
    bad = verify_operator(lambda x: OPS.softmax(x, 1), [X], ["B S@tp D"], MESH)
    assert bad.refusal.startswith("SS304")


def test_an_operator_with_no_notation_for_one_way_to_call_it_is_refused_there():
    """A rule that was tried along the last dim says nothing of another."""
    ss.register_rule(OPS.softmax, "b s !d -> b s !d", samples=[(X, -1)])
    verdict = verify_operator(lambda x: OPS.softmax(x, 1), [X], ["B S@tp D"], MESH)
    assert verdict.refusal.startswith("SS305: own::softmax is called in a way in which its rule was not tried")
    assert "dim=1; tried with dim=-1" in verdict.refusal


def test_any_value_of_an_argument_that_does_not_matter_is_typed():
    ss.register_rule(OPS.scaled_gelu, "b d, d -> b d", samples=[(noise(4, 4), W)], any_value="eps")
    verdict = verify_operator(lambda x, w: OPS.scaled_gelu(x, w, 3.0), [noise(4, 4), W], ["B D@tp", "D@tp"], MESH)
    assert (verdict.accepted, verdict.correct) == (True, True)


def test_a_rule_of_ones_own_may_be_given_again():
    ss.register_rule(OPS.total, "b s !d -> b s", samples=[X])
    ss.register_rule(OPS.total, "b s d -> b s", samples=[X], linear="x")
    verdict = verify_operator(OPS.total, [X], ["B@dp S D@tp"], MESH)
    assert verdict.outputs == (Layout((("dp", 2), (4,)), (("tp", "sum"),)),)


def test_shares_pass_only_where_the_rule_says_so():
    shares = Layout(((4,), (4,), (4,)), (("tp", "sum"),))
    ss.register_rule(OPS.turn, "b s d -> b d s", samples=[X])
    assert verify_operator(OPS.turn, [X], [shares], MESH).refusal.startswith("SS303: own::turn reads")
    ss.register_rule(OPS.turn, "b s d -> b d s", samples=[X], linear="x")
    assert verify_operator(OPS.turn, [X], [shares], MESH).outputs[0].pending == (("tp", "sum"),)


# Wrong rules


@pytest.mark.parametrize(
    ("op", "notation", "options", "words", "fix"),
    [
        (OPS.softmax, "b s d -> b s d", {"samples": [X]}, "d split over tp=2", '"b s !d -> b s !d"'),
        (
            OPS.sum_of_squares,
            "b s d -> b s",
            {"samples": [X], "linear": "x"},
            "x pending sum over tp=2",
            "linear=[]",
        ),
        (OPS.peak, "b s d -> b s", {"samples": [X]}, "d split over tp=2", 'reduction="max"'),
        (OPS.total, "b s d -> b s", {"samples": [X], "reduction": "avg"}, "d split over tp=2", 'reduction="sum"'),
        (OPS.turn, "b s d -> b s d", {"samples": [X]}, "s split over tp=2", '"b s d -> b d s"'),
        (
            OPS.norm_heads,
            "b s d -> b s d",
            {"samples": [(noise(4, 4, 12), 4)], "any_value": ["n_heads"]},
            "d split over tp=2",
            '"b s !d -> b s !d"',
        ),
        (
            OPS.norm_heads,
            "b s (h e) -> b s (h e)",
            {"samples": [(noise(4, 4, 16), 4)], "sizes": {"n_heads": "h"}},
            "e split over tp=2",
            '"b s (h !e) -> b s (h !e)"',
        ),
        (
            OPS.average,
            "b d, b d -> b d",
            {"samples": [(noise(4, 4), noise(4, 4))], "linear": ["x", "y"]},
            "x pending sum over tp=2",
            "linear=[]",
        ),
        (OPS.wrong_backward, "b d -> b d", {"samples": [noise(8, 4)]}, "b split over tp=2", '"!b d -> !b d"'),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_a_wrong_rule_is_refused_and_a_fix_that_passes_is_told(op, notation, options, words, fix):
    found = refused(op, notation, **options)
    assert found.code == "SS321"
    assert words in found.what
    assert found.fixes == (fix,)
    assert op not in RULES


def test_a_refusal_tells_layout_result_and_difference():
    found = refused(OPS.softmax, "b s d -> b s d", samples=[X])
    layouts, problem, reason = found.why.splitlines()
    assert layouts == "x [4, 4, 2@tp] -> [4, 4, 2@tp]"
    part, whole = X[..., :2].softmax(-1)[0, 0, 0].item(), X.softmax(-1)[0, 0, 0].item()
    assert problem == (
        f"result 0 is said to be [4, 4, 2@tp]: rank tp=0 holds {part:.6g} at [0, 0, 0], its part has {whole:.6g} there"
    )
    assert reason == "the notation lets d be split, but what the operator makes of a part differs"


def test_a_wrong_gradient_of_a_right_result_is_refused():
    found = refused(OPS.wrong_backward, "b d -> b d", samples=[noise(8, 4)])
    assert "the gradient of input 0" in found.why


# What cannot be tried


@pytest.mark.parametrize(
    ("op", "notation", "options", "words"),
    [
        (OPS.total, "b s d -> b s", {}, "it needs samples"),
        (OPS.total, "b s d -> b s", {"samples": [(X, 1)]}, "has 2 arguments"),
        (OPS.total, "b s d -> b s", {"samples": [{"y": X}]}, "sample 0 has y"),
        (OPS.total, "b s d -> b s", {"samples": [X.to("meta")]}, "on meta"),
        (OPS.total, "b s d -> b s", {"samples": [torch.ones(4, 4, 4)]}, "x is the same all along dim 0"),
        (OPS.total, "b s d -> b s", {"samples": [noise(4, 6, 4)]}, "no sample can split s: its sizes are 6"),
        (OPS.total, "b s d -> b s", {"samples": [X], "linear": "y"}, "no argument 'y'"),
        (OPS.softmax, "b s d -> b s", {"samples": [X], "linear": "dim"}, "'dim', which is no tensor"),
        (OPS.total, "b s d -> b s", {"samples": [X], "reduction": "prod"}, "reduction='prod'"),
        (OPS.total, "b s s -> b s", {"samples": [X]}, "a factor stands twice"),
        (OPS.total, "b s d, b s", {"samples": [X]}, "one '->'"),
        (OPS.total, "b ? d -> b", {"samples": [X]}, "column 2: '?'"),
        (OPS.total, "b s d -> b", {"samples": [X]}, "a tensor has 2 dims"),
        (OPS.total, "b s d -> b s, b", {"samples": [X]}, "it names 2 results"),
        (OPS.total, "b s -> b s", {"samples": [X]}, "a tensor has 3 dims"),
        (OPS.total, "b s d, d -> b s", {"samples": [X]}, "it names 2 tensors"),
        (OPS.merge, "b d -> b d", {"samples": [(noise(4, 4), W)]}, "bias is one more"),
        (OPS.turn, "b s d -> b s d", {"samples": [noise(4, 4, 8)]}, "a dim of 8 cannot be s=4"),
        (OPS.norm_heads, "b s (h e) -> b s (h e)", {"samples": [(noise(4, 4, 12), 4)]}, "nothing tells the sizes"),
        (OPS.no_backward, "b d -> b d", {"samples": [noise(4, 4)]}, "no backward that runs"),
        (OPS.total, "b s d -> b s", {"samples": [X], "gradients": False}, "gradients=False, and"),
        (OPS.no_fake, "b d -> b d", {"samples": [noise(4, 4)], "gradients": False}, "does not run on meta"),
        (OPS.writes, "b d -> ", {"samples": [noise(4, 4)]}, "own.writes.default writes to its arguments"),
        (torch.ops.aten.rand_like.default, "b d -> b d", {"samples": [noise(4, 4)]}, "draws random numbers"),
        (torch.ops.aten.softmax.int, "b d -> b d", {"samples": [(noise(4, 4), -1)]}, "has a rule already"),
        (torch.ops.aten.sin.default, "b d -> b d", {"samples": [noise(4, 4)]}, "has a rule already"),
        (torch.ops.aten.cumsum, "b d -> b d", {"samples": [noise(4, 4)]}, "has several overloads"),
        (torch.sum, "b d -> b", {"samples": [noise(4, 4)]}, "is no operator"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_a_rule_that_cannot_be_tried_is_refused_and_says_why(op, notation, options, words):
    found = refused(op, notation, **options)
    assert found.code == "SS322"
    assert words in f"{found.what}\n{found.why}"


def test_an_operator_without_a_backward_may_say_so():
    ss.register_rule(OPS.no_backward, "b d -> b d", samples=[noise(4, 4)], gradients=False, linear="x")


@pytest.mark.parametrize(
    "text", ["b s ! -> b", "b (s d -> b", "b s) -> b", "... ... -> b", "b !2 -> b", "a -> b -> c", "b (, d) -> b"]
)
def test_a_text_that_is_no_notation_does_not_parse(text):
    with pytest.raises(NotationError):
        parse_notation(text)


@pytest.mark.parametrize("text", ["b s !d, d -> b s", "... (h !e), 2 1 -> ...", " -> b"])
def test_a_notation_is_written_as_it_parses(text):
    again = parse_notation(str(parse_notation(text)))
    assert again == parse_notation(text)


# In a model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.gain = nn.Parameter(torch.ones(16))
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(OPS.scaled_gelu(self.up(x), self.gain))


TABLE = ss.Rules(
    params={r"up\.weight": "F@tp D", "gain": "F@tp", r"down\.weight": "D F@tp"},
    activations={"x|down": "B@(dp,fsdp) D"},
)


def test_an_operator_without_a_rule_is_named_with_what_to_do():
    with pytest.raises(ss.ShardingError) as caught:
        ss.compile(Model, TABLE, ss.Mesh(tp=2), {"x": torch.zeros(4, 8)})
    found = caught.value.diagnostics[0]
    assert found.code == "SS305"
    assert "own.scaled_gelu.default" in found.what
    assert found.advice[0].startswith("give it one: ss.register_rule(torch.ops.own.scaled_gelu.default")


def test_a_model_with_an_operator_of_ones_own_compiles():
    ss.register_rule(OPS.scaled_gelu, "... d, d -> ... d", samples=[(noise(4, 4), W)])
    plan = ss.compile(Model, TABLE, ss.Mesh(tp=2), {"x": torch.zeros(4, 8)})
    assert [(row.kind, row.where) for row in plan.collectives if row.phase == "forward"] == [("all_reduce", "down")]


class Heads(nn.Module):
    """A model that keeps a global head count."""

    def __init__(self, local: bool) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.local = local

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(OPS.norm_heads(up, up.shape[-1] // 4 if self.local else 4))


@pytest.mark.parametrize("local", [True, False])
def test_a_size_that_a_model_passes_must_be_its_parts(local):
    ss.register_rule(OPS.norm_heads, "b s (h !e) -> b s (h !e)", samples=[(noise(4, 4, 12), 4)], sizes={"n_heads": "h"})
    table = ss.Rules(
        params={r"up\.weight": "(H@tp hd) D", r"down\.weight": "D (H@tp hd)"},
        activations={"x|down": "B@(dp,fsdp) S D"},
        sizes={"hd": 4},
    )
    batch = {"x": torch.zeros(4, 4, 8)}
    if local:
        ss.compile(lambda: Heads(local), table, ss.Mesh(tp=2), batch)
        return
    with pytest.raises(ss.ShardingError) as caught:
        ss.compile(lambda: Heads(local), table, ss.Mesh(tp=2), batch)
    assert caught.value.diagnostics[0].code == "SS309"
    assert "n_heads=4" in str(caught.value)


@torch.library.custom_op("own::detach", mutates_args=())
def detach(x: Tensor) -> Tensor:
    """An operator with the name of one of torch's, that does not detach."""
    return x * 3


detach.register_fake(torch.empty_like)
detach.register_autograd(lambda ctx, grad: grad * 3, setup_context=lambda ctx, inputs, output: None)


def test_the_name_of_one_of_torchs_operators_is_no_claim_to_its_meaning():
    """Taken for `aten.detach`, no gradient would be owed for the gain that is whole beside a split value."""
    ss.register_rule(OPS.detach, "b d -> b d", samples=[noise(4, 4)], linear="x")
    verdict = verify_operator(lambda x, w: OPS.detach(x * w), [noise(4, 4), W], ["B@tp D", "D"], ss.Mesh(tp=2))
    assert (verdict.accepted, verdict.correct) == (True, True)
