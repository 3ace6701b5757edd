"""Experts modules typed whole: what passes computes what the plain program does, and what cannot is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from shardspec.testing import assert_parity
from tests.mixture import PLAIN_RULES, RULES, Config, Grouped, Masked, Mixture, Moe, Plain, loss_fn, make_batch

EP, EP_TP, EP_FSDP = ss.Mesh(ep=2), ss.Mesh(ep=2, tp=2), ss.Mesh(ep=2, fsdp=2)


def mixture(router: type[Moe] = Moe, **options) -> Mixture:
    """A model of one layer, with another way to route."""
    torch.manual_seed(0)
    model = Mixture(Config(n_layers=1, **options))
    for layer in model.layers:
        layer.moe.__class__ = router
    return model


def compiled(model: nn.Module, rules: ss.Rules, mesh: ss.Mesh) -> ss.Plan:
    return ss.compile(model, rules, mesh, make_batch(), loss_fn)


def refusal(model: nn.Module, rules: ss.Rules, mesh: ss.Mesh) -> str:
    with pytest.raises(ss.ShardingError) as caught:
        compiled(model, rules, mesh)
    return str(caught.value)


def scores(router: Moe, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The two best experts of each token, and their scores."""
    scores_NE = F.softmax(router.gate(x_ND), dim=-1)
    ids_Nk = torch.topk(scores_NE, 2, dim=-1).indices
    return ids_Nk, scores_NE.gather(1, ids_Nk)


class Named(Moe):
    """Calls its experts by names of arguments, in another order."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        ids_Nk, weights_Nk = scores(self, x_ND)
        return self.experts(weights_Nk=weights_Nk, hidden_ND=x_ND, ids_Nk=ids_Nk).view_as(x_BSD)


class Twice(Moe):
    """Calls its experts twice."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        ids_Nk, weights_Nk = scores(self, x_ND)
        both_ND = self.experts(x_ND, ids_Nk, weights_Nk) + self.experts(2 * x_ND, ids_Nk.flip(-1), weights_Nk)
        return both_ND.view_as(x_BSD)


class Unmoved(Moe):
    """Sends no gradient through the rows."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        return self.experts(x_ND.detach(), *scores(self, x_ND)).view_as(x_BSD)


class Within(Plain):
    """Weights what enters an expert, as Llama 4 does: not linear in the weight."""

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(hidden_ND)
        for index in range(self.w1.shape[0]):
            chosen_Nk = (ids_Nk == index).to(hidden_ND.dtype)
            made = F.gelu(F.linear(hidden_ND * (weights_Nk * chosen_Nk).sum(-1, keepdim=True), self.w1[index]))
            out_ND = out_ND + F.linear(made, self.w2[index]) * chosen_Nk.sum(-1, keepdim=True)
        return out_ND


class Biased(Plain):
    """With a bias in front of the split features and one behind."""

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__(n_experts, dim, ffn_dim)
        self.b1, self.b2 = nn.Parameter(torch.randn(n_experts, ffn_dim)), nn.Parameter(torch.randn(n_experts, dim))

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(hidden_ND)
        for index in range(self.w1.shape[0]):
            made = F.linear(F.gelu(F.linear(hidden_ND, self.w1[index], self.b1[index])), self.w2[index], self.b2[index])
            out_ND = out_ND + made * (weights_Nk * (ids_Nk == index)).sum(-1, keepdim=True)
        return out_ND


BIASED_RULES = PLAIN_RULES.override(
    params={
        r"layers\.\d+\.moe\.experts\.b1": "E@(ep,fsdp) F@tp",
        r"layers\.\d+\.moe\.experts\.b2": "E@(ep,fsdp) D +tp",
    }
)
ROWS_OVER_TP = RULES.override(
    drop=[r"layers\.\d+\.moe"],
    activations={
        r"embed|layers\.\d+\.moe": "B@(dp,fsdp,ep) S@tp D",
        r"head:in": "B@(dp,fsdp,ep) S D",
    },
)
"""Sequence parallelism, and the experts called with a rank's part of the rows."""


@pytest.mark.parametrize(
    ("model", "rules", "mesh"),
    [
        (mixture(Named), RULES, EP_TP),
        (mixture(Twice), RULES, EP_FSDP),
        (mixture(Unmoved), RULES, EP_TP),
        (mixture(kind=Masked), PLAIN_RULES, EP_FSDP),
        (mixture(kind=Within), PLAIN_RULES, EP_TP),
        (mixture(kind=Biased), BIASED_RULES, EP_TP),
        (mixture(), RULES.override(units=[r"layers\.\d+\.moe\.experts", r"layers\.\d+"]), EP_FSDP),
    ],
    ids=["named", "twice", "rows without gradient", "masks", "weights within", "biases", "a unit of their own"],
)
def test_experts_compute_what_the_plain_program_does(model: Mixture, rules: ss.Rules, mesh: ss.Mesh):
    assert_parity(model, rules, mesh, make_batch(), loss_fn)


def test_rows_of_a_grouped_product_go_to_their_experts():
    assert_parity(mixture(kind=Grouped, ffn_dim=16), RULES, EP_TP, make_batch(), loss_fn, tolerance=1e-5)


@pytest.mark.parametrize("trained", [("experts", "head"), ("gate", "embed")])
def test_ranks_whose_experts_got_no_rows_take_part_where_only_some_parameters_are_trained(trained: tuple[str, ...]):
    model = mixture(bias=(9.0, 8.0, 0.0, 0.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    assert_parity(model, RULES, EP_FSDP, make_batch(), loss_fn)


def test_rows_that_are_gathered_for_their_experts_may_lie_in_parts_between():
    rules = ROWS_OVER_TP.override(activations={r"layers\.\d+\.moe:in": "B@(dp,fsdp,ep) S D"})
    assert_parity(mixture(), rules, EP_TP, make_batch(), loss_fn)


def test_rows_may_be_split_over_tp_where_no_expert_is():
    whole = {"gate_up_proj": "E@(ep,fsdp) F D", "down_proj": "E@(ep,fsdp) D Fh"}
    rules = ROWS_OVER_TP.override(params={rf"layers\.\d+\.moe\.experts\.{name}": whole[name] for name in whole})
    assert_parity(mixture(), rules, EP_TP, make_batch(), loss_fn)


def test_rows_and_features_over_one_axis_are_refused_with_the_rule_that_gathers():
    told = refusal(mixture(), ROWS_OVER_TP, EP_TP)
    assert "SS332" in told
    assert 'add to activations: r"layers\\.\\d+\\.moe:in": "B@(dp,fsdp,ep) S D"   (checked)' in told


def test_a_bias_behind_split_features_is_refused_within_an_expert():
    rules = BIASED_RULES.override(params={r"layers\.\d+\.moe\.experts\.b2": "E@(ep,fsdp) D"})
    told = refusal(mixture(kind=Biased), rules, EP_TP)
    assert "SS303" in told
    assert '"E@(ep,fsdp) D +tp" (was "E@(ep,fsdp) D")   (checked)' in told


def test_what_experts_leave_pending_must_be_summed():
    told = refusal(mixture(), RULES.override(drop=[r"layers\.\d+\.moe"]), EP_TP)
    assert "SS303" in told
    assert "still to be summed over tp" in told


def test_an_output_that_tp_splits_is_refused():
    rules = RULES.override(params={r"layers\.\d+\.moe\.experts\.down_proj": "E@(ep,fsdp) D@tp F"})
    assert "SS3" in refusal(mixture(), rules, EP_TP)


class Unequal(Moe):
    """Calls its experts with two choices, and with one."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        ids_Nk, weights_Nk = scores(self, x_ND)
        first_ND = self.experts(x_ND, ids_Nk[:, :1], weights_Nk[:, :1])
        return (first_ND + self.experts(x_ND, ids_Nk, weights_Nk)).view_as(x_BSD)


def test_calls_of_different_numbers_of_choices_have_no_one_capacity():
    compiled(mixture(Unequal), RULES, EP)
    assert "SS317" in refusal(mixture(Unequal), RULES.override(capacity=2.0), EP)


@pytest.mark.parametrize("capacity", [0, -1.0, "1"])
def test_a_capacity_is_a_number_above_zero(capacity: object):
    assert "SS211" in refusal(mixture(), RULES.override(capacity=capacity), EP)


def test_blocks_whose_experts_differ_in_a_number_are_typed_apart():
    class Scaled(Plain):
        def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
            super().__init__(n_experts, dim, ffn_dim)
            self.scale = 1.0

        def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
            made_ND = super().forward(hidden_ND, ids_Nk, weights_Nk)
            return made_ND if self.scale == 1.0 else F.relu(made_ND)  # of a sum over tp that is not made yet

    model = Mixture(Config(kind=Scaled))
    compiled(model, PLAIN_RULES, EP_TP)
    model.layers[1].moe.experts.scale = 2.0
    assert "relu reads" in refusal(model, PLAIN_RULES, EP_TP)


class Counting(Plain):
    """Divides by how many experts there are."""

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        return super().forward(hidden_ND, ids_Nk, weights_Nk) / self.w1.shape[0]


class Numbered(Plain):
    """Scales what an expert makes by its number."""

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(hidden_ND)
        for index in range(self.w1.shape[0]):
            share_N1 = (weights_Nk * (ids_Nk == index)).sum(-1, keepdim=True) * (1 + index)
            out_ND = out_ND + F.linear(F.gelu(F.linear(hidden_ND, self.w1[index])), self.w2[index]) * share_N1
        return out_ND


class OfAllRows(Plain):
    """Takes the mean of all rows off each."""

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        return super().forward(hidden_ND - hidden_ND.mean(0), ids_Nk, weights_Nk)


class OfAllChoices(Plain):
    """Divides by how many choices a token has."""

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        return super().forward(hidden_ND, ids_Nk, weights_Nk) / ids_Nk.shape[1]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Counting, "div computes with 2 and 4"),
        (Numbered, "mul computes with 2 and 4"),
        (OfAllRows, "mean computes with 3 and 6"),
        (OfAllChoices, "div computes with 1 and 2"),
    ],
)
def test_an_expert_whose_number_rows_or_companions_matter_is_refused(kind: type[nn.Module], why: str):
    told = refusal(mixture(kind=kind), PLAIN_RULES, EP)
    assert "SS332" in told
    assert why in told


def test_a_plan_with_experts_is_read_back_from_a_file():
    plan = compiled(mixture(), RULES.override(capacity=1.5), EP_TP)
    again = ss.Plan.from_json(plan.to_json())
    assert again.experts == plan.experts
    assert again.experts["layers.0.moe.experts"].capacity == 96  # 1.5 * 16 * 8 * 2 / 4
    assert "expected" in str(plan)


def test_an_expert_that_is_not_there_is_told_when_it_is_chosen():
    class Off(Moe):
        def forward(self, x_BSD: Tensor) -> Tensor:
            x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
            ids_Nk, weights_Nk = scores(self, x_ND)
            return self.experts(x_ND, ids_Nk + 1, weights_Nk).view_as(x_BSD)

    sharded = ss.shard(lambda: mixture(Off), RULES, ss.Mesh(), make_batch())
    with pytest.raises(ValueError, match=r"expert 4 .* is outside \[0, 4\)"):
        ss.train_step(sharded, loss_fn)(sharded.init(ss.sgd(lr=0.1)), make_batch())
