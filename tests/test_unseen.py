"""Ways round the check: what a block's class or caller knows, tensors that leave it unseen, hooks, other forwards.

Each model has a right table as long as every layer is the first one over again; the last layer is not.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardspec as ss
from shardspec.testing import assert_parity

RULES = ss.Rules(
    params={r".*up\.weight": "F@(tp,fsdp) D", r".*up\.bias": "F@(tp,fsdp)", r".*down\.weight": "D@fsdp F@tp"},
    activations={"x": "B@(dp,fsdp) S D", r"layers\.\d+\.mlp(:in)?": "B@(dp,fsdp) S D"},
)
MESH = ss.Mesh(fsdp=2, tp=2)


class Mlp(nn.Module):
    """A feed-forward whose output is pending over tp until its point; `bent` is what must not be done to that."""

    bent = False

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.finish(self.down(torch.relu(self.up(x))))

    def finish(self, out):
        return torch.tanh(out) if self.bent else out


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, kind=Mlp):
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def last(self):
        return self.layers[2].mlp


def batch():
    return {"x": torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def codes(model, mesh=MESH):
    """What the table is refused with."""
    with pytest.raises(ss.ShardingError) as caught:
        ss.compile(model, RULES, mesh, batch())
    return {found.code for found in caught.value.diagnostics}


def test_the_model_as_it_is_has_a_right_table():
    assert_parity(Model(), RULES, MESH, batch())


def test_an_attribute_that_only_one_layer_has_of_its_own_makes_it_another_layer():
    model = Model()
    model.last.bent = True
    assert codes(model) == {"SS303"}


class Asks(Mlp):
    def finish(self, out):
        return torch.tanh(out) if getattr(self, "twisted", False) else out


def test_an_attribute_that_the_other_layers_do_not_have_at_all_makes_it_another_layer():
    model = Model(Asks)
    model.last.twisted = True
    assert codes(model) == {"SS303"}


class ReadsItsDict(Mlp):
    def finish(self, out):
        return torch.tanh(out) if "twisted" in vars(self) else out


def test_a_layer_that_reads_its_own_dict_stands_for_no_other():
    model = Model(ReadsItsDict)
    model.last.twisted = True
    assert codes(model) == {"SS303"}


def bent(self, x):
    return torch.tanh(self.down(torch.relu(self.up(x))))


def sound(self, x):
    return self.down(torch.tanh(self.up(x)))


def test_a_forward_of_one_layers_own_makes_it_another_layer():
    model = Model()
    model.last.forward = types.MethodType(bent, model.last)
    assert codes(model) == {"SS303"}


def test_a_forward_of_the_modules_own_runs_on_a_ranks_part():
    model = Model()
    for layer in model.layers:
        layer.mlp.forward = types.MethodType(sound, layer.mlp)
    assert_parity(model, RULES, MESH, batch())


class InNestedLists(Model):
    def __init__(self):
        super().__init__()
        self.groups = [[self.layers[0], self.layers[1]], {"last": (self.layers[2],)}]

    def forward(self, x):
        for layer in (*self.groups[0], *self.groups[1]["last"]):
            x = layer(x)
        return x


def test_modules_that_an_attribute_holds_in_nested_lists_are_the_models():
    assert_parity(InNestedLists(), RULES, MESH, batch())


class ThroughAClosure(Model):
    def __init__(self):
        super().__init__()
        self.head = lambda x: F.linear(x, self.last.down.weight.t())

    def forward(self, x):
        return self.head(super().forward(x))


def test_a_parameter_that_is_read_through_a_closure_is_refused():
    assert codes(ThroughAClosure()) == {"SS318"}


class SquaresItsInput(Mlp):
    def forward(self, x):
        self.size = x.pow(2).sum()
        return super().forward(x)


class AddsTheSizes(Model):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + layer.mlp.size.tanh()
        return x


def test_a_tensor_that_a_layer_leaves_in_an_attribute_is_refused():
    assert codes(AddsTheSizes(SquaresItsInput), ss.Mesh(fsdp=2)) == {"SS318"}


class FillsAList(Mlp):
    def forward(self, x, found):
        found.append(self.down(torch.relu(self.up(x))))
        return super().forward(x)


class PassesAList(Model):
    def __init__(self):
        super().__init__(FillsAList)
        for layer in self.layers:
            layer.forward = types.MethodType(lambda self, x, found: x + self.mlp(x, found), layer)

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x, found)
        return x + found[0].tanh()


def test_a_tensor_that_a_layer_leaves_in_its_callers_list_is_refused():
    assert codes(PassesAList(), ss.Mesh(tp=2)) == {"SS318"}


class SharesAList(Model):
    """What its layers put into a list is read from the same list in the model."""

    def __init__(self):
        super().__init__(FillsItsList)
        self.found = []
        for layer in self.layers:
            layer.mlp.found = self.found

    def forward(self, x):
        self.found.clear()
        x = super().forward(x)
        for kept in self.found:
            x = x + kept.tanh()
        return x


class FillsItsList(Mlp):
    def finish(self, out):
        self.found.append(out)
        return out


def test_a_list_that_modules_share_is_shared_where_it_is_checked():
    assert codes(SharesAList(), ss.Mesh(tp=2)) == {"SS318"}


class CountsInAList(Mlp):
    def finish(self, out):
        self.found.append(len(self.found))
        return torch.tanh(out) if len(self.found) == 3 else out


def test_layers_that_share_a_list_are_each_looked_at():
    model = Model(CountsInAList)
    found = []
    for layer in model.layers:
        layer.mlp.found = found
    assert codes(model) == {"SS303"}


def test_a_forward_hook_of_the_models_own_reads_what_stands_behind_the_point():
    model = Model()
    model.last.register_forward_hook(lambda module, args, out: torch.tanh(out))
    assert_parity(model, RULES, MESH, batch())


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_is_refused(register):
    model = Model()
    getattr(model.last, register)(lambda module, *grads: None)
    assert codes(model) == {"SS319"}


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameters_gradient_is_refused(register):
    model = Model()
    getattr(model.last.up.weight, register)(lambda _: None)
    assert codes(model) == {"SS319"}


class AsksForAutograd(Mlp):
    question = "requires_grad"

    def finish(self, out):
        return torch.tanh(out) if getattr(out, self.question) else out


@pytest.mark.parametrize("question", ["requires_grad", "grad_fn"])
def test_python_that_asks_an_activation_about_autograd_is_refused(question):
    model = Model(AsksForAutograd)
    for layer in model.layers:
        layer.mlp.question = question
    assert codes(model) == {"SS319"}


def test_what_a_regex_sees_behind_itself_is_tried_on_every_layer():
    others = {r"layers\.\d+\.(?<!\.2\.)mlp\.up\.bias": "F@(tp,fsdp)", r"layers\.\d+\.(?<=\.2\.)mlp\.up\.bias": "F@fsdp"}
    rules = RULES.override(drop=[r".*up\.bias"], params=others)
    with pytest.raises(ss.ShardingError) as caught:
        ss.compile(Model(), rules, MESH, batch())
    assert {found.code for found in caught.value.diagnostics} == {"SS302"}


class AddsUp(Model):
    def forward(self, x):
        return sum(layer.mlp.down(torch.relu(layer.mlp.up(x))) for layer in self.layers)


def test_a_sum_that_begins_with_the_number_zero_adds_nothing():
    rules = RULES.override(
        drop=[r"layers\.\d+\.mlp(:in)?"], activations={r"layers\.\d+\.mlp\.up:in": "B@(dp,fsdp) S D"}
    )
    assert_parity(AddsUp(), rules, MESH, batch())


class BendsOne(Model):
    """Its layers are not called: the model calls what is in them."""

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            out = layer.mlp.down(torch.relu(layer.mlp.up(x)))
            x = ss.name(torch.tanh(out) if index == 1 else out, "out" + "abc"[index])
        return x


def test_a_layer_whose_parts_the_model_calls_itself_is_checked():
    rules = RULES.override(
        drop=[r"layers\.\d+\.mlp(:in)?"],
        activations={r"out[abc]|layers\.\d+\.mlp\.up:in": "B@(dp,fsdp) S D"},
    )
    with pytest.raises(ss.ShardingError) as caught:
        ss.compile(BendsOne(), rules, MESH, batch())
    assert {found.code for found in caught.value.diagnostics} == {"SS303"}
