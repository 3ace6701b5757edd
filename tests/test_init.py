import copy
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.init import dirac_, orthogonal_, trunc_normal_

from shardspec.runtime.init import NotReplayable, materialise, record


def whole(recipe, param, name="w", seed=0, dtype=None):
    every = [slice(None)] * param.dim()
    return materialise(recipe, name, seed, param.shape, every, dtype or param.dtype, "cpu")


def values(build, seed=0):
    """All initial values of the module that build makes, by name."""
    module, recipes = record(build)
    params = dict(module.named_parameters(remove_duplicate=False))
    assert recipes.keys() == params.keys()
    return {name: whole(recipes[name], param, name, seed) for name, param in params.items()}


def parameter(make):
    """A builder of a module with the one parameter that make() gives, `w`."""

    def build():
        module = nn.Module()
        module.w = make()
        return module

    return build


def then(initialise, *shape, dtype=torch.float32):
    """A builder of a module whose parameter `w` of `shape` is registered, then initialised."""

    def build():
        module = nn.Module()
        module.w = nn.Parameter(torch.empty(shape, dtype=dtype))
        initialise(module.w)
        return module

    return build


def write_by_parts(w):
    with torch.no_grad():
        w[:2].normal_()
        w[2:] = 0.5
        w[:, 1::2].mul_(2.0)


ZOO = {
    "linear": lambda: nn.Linear(60, 40),
    "embedding": lambda: nn.Embedding(50, 40, padding_idx=3),
    "layer norm": lambda: nn.LayerNorm(40),
    "convolution": lambda: nn.Conv2d(8, 12, 5),
    "attention": lambda: nn.MultiheadAttention(40, 4),
    "attention, foreign keys": lambda: nn.MultiheadAttention(40, 4, kdim=24, vdim=20, add_bias_kv=True),
    "lstm": lambda: nn.LSTM(30, 20),
    "batch norm": lambda: nn.BatchNorm1d(40),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 2, 30), 2),
    "bf16": lambda: nn.Linear(60, 40).to(torch.bfloat16),
    "xavier": then(nn.init.xavier_normal_, 60, 40),
    "kaiming": then(nn.init.kaiming_normal_, 60, 40),
    "truncated": then(lambda w: trunc_normal_(w, 1.0, 0.5, a=0.0, b=1.5), 60, 40),
    "by data": then(lambda w: w.data.normal_(std=3.0), 60, 40),
    "drawn, then scaled": parameter(lambda: nn.Parameter(torch.randn(60, 40) * 0.02 + 1)),
    "scaled by a tensor": parameter(lambda: nn.Parameter(torch.tensor(0.5) * torch.rand(60, 40))),
    "by parts": then(write_by_parts, 50, 40),
}


def bounds(expected):
    """How far the mean and the deviation of another draw may lie from those of a value."""
    n, deviation = expected.numel(), expected.double().std(unbiased=False).item()
    return 6 * deviation / math.sqrt(n), 6 * deviation / math.sqrt(n)


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_values_are_distributed_as_torchs_own(build):
    torch.manual_seed(0)
    reference = build()
    ours = values(build)
    for name, param in reference.named_parameters(remove_duplicate=False):
        assert ours[name].dtype == param.dtype
        assert ours[name].shape == param.shape
        expected, mine = param.detach().double(), ours[name].double()
        of_mean, of_deviation = bounds(expected)
        assert abs(mine.mean() - expected.mean()) <= of_mean, name
        assert abs(mine.std(unbiased=False) - expected.std(unbiased=False)) <= of_deviation, name
        if expected.std(unbiased=False) == 0:
            assert torch.equal(mine, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_of_a_parameter_has_the_bits_of_the_whole(data):
    build = ZOO[data.draw(st.sampled_from(sorted(ZOO)))]
    module, recipes = record(build)
    params = dict(module.named_parameters())
    name = data.draw(st.sampled_from(sorted(params)))
    param, recipe = params[name], recipes[name]
    rows = [data.draw(st.lists(st.integers(0, size - 1), max_size=7)) for size in param.shape]
    index = [torch.tensor(i, dtype=torch.int64) for i in rows]
    part = materialise(recipe, name, 0, param.shape, index, param.dtype, "cpu")
    assert torch.equal(part, whole(recipe, param, name)[torch.meshgrid(*index, indexing="ij")])


@st.composite
def basic_indices(draw, shape):
    """Tuples of integers and slices, as for w[...]."""
    dims = shape[: draw(st.integers(0, len(shape)))]
    return tuple(draw(st.one_of(st.integers(-size, size - 1), st.slices(size))) for size in dims)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_writes_through_views_reach_what_they_reach_in_torch(data):
    shape = data.draw(st.sampled_from([(5,), (4, 6), (3, 1, 4), (2, 3, 4)]))
    writes = data.draw(st.lists(basic_indices(shape), max_size=3))
    # torch slices with positive steps only
    writes = [w for w in writes if all(isinstance(i, int) or (i.step or 1) > 0 for i in w)]

    def initialise(w):
        w.data.zero_()
        for value, where in enumerate(writes, 1):
            w.data[where].add_(value)

    expected = nn.Parameter(torch.empty(shape))
    initialise(expected)
    assert torch.equal(values(then(initialise, *shape))["w"], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_large_parameter_is_the_same_in_shards_of_rows_and_of_columns(dtype):
    module, recipes = record(lambda: nn.Linear(1000, 333, bias=False))
    shape = module.weight.shape
    full = whole(recipes["weight"], module.weight, "weight", dtype=dtype)

    def draw(*index):
        return materialise(recipes["weight"], "weight", 0, shape, index, dtype, "cpu")

    every = slice(None)
    assert torch.equal(torch.cat([draw(slice(k * 112, (k + 1) * 112), every) for k in range(3)]), full)
    assert torch.equal(torch.cat([draw(every, slice(k * 250, (k + 1) * 250)) for k in range(4)], 1), full)
    assert torch.equal(draw(slice(1, None, 2), torch.tensor([999, 0])), full[1::2][:, [999, 0]])
    assert draw(slice(333, None), every).shape == (0, 1000)


def test_seeds_and_names_change_values_and_nothing_else_does():
    torch.manual_seed(1)
    first = values(lambda: nn.Linear(4, 4))
    torch.manual_seed(2)
    again, other = values(lambda: nn.Linear(4, 4)), values(lambda: nn.Linear(4, 4), seed=1)
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])
    stack = values(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert not torch.equal(stack["0.weight"], stack["1.weight"])


def test_the_generator_is_left_alone_and_leaves_buffers_alone():
    def build():
        module = nn.BatchNorm1d(3)
        module.register_buffer("noise", torch.randn(3))
        module.register_buffer("table", torch.arange(3.0).cos())
        return module

    torch.manual_seed(5)
    state = torch.get_rng_state()
    module, _ = record(build)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, _ = record(build)
    assert all(param.is_meta for param in module.parameters())
    assert torch.equal(module.table, torch.arange(3.0).cos())
    assert torch.equal(module.running_var, torch.ones(3))
    assert torch.equal(module.noise, again.noise)


def test_the_generator_and_torch_are_put_back_after_an_error():
    state, truncate = torch.get_rng_state(), nn.init._no_grad_trunc_normal_

    def build():
        torch.randn(3)
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        record(build)
    assert torch.equal(torch.get_rng_state(), state)
    assert nn.init._no_grad_trunc_normal_ is truncate
    assert not nn.Linear(2, 2).weight.is_meta


def test_truncated_normals_stay_within_their_bounds_far_from_the_mean_too():
    for mean, low, high in ((0.0, -2.0, 2.0), (0.0, 8.0, 9.0), (0.0, -9.0, -8.0)):
        drawn = values(then(lambda w, m=mean, a=low, b=high: trunc_normal_(w, m, 1.0, a, b), 200, 50))["w"]
        assert low <= drawn.min() < drawn.max() <= high
        assert abs(drawn.mean()) < 8.2
        assert drawn.unique().numel() > 9000


def test_truncation_by_erfinv_is_replayed():
    def initialise(w):  # as timm wrote it, and torch before 2.13
        with torch.no_grad():
            w.uniform_(-0.95, 0.95).erfinv_().mul_(0.02 * math.sqrt(2.0)).add_(1.0).clamp_(min=0.96, max=1.04)

    drawn = values(then(initialise, 100, 100))["w"]
    assert 0.96 <= drawn.min() < 0.962
    assert abs(drawn.mean() - 1) < 1e-3


def test_constants_are_torchs_own_bit_for_bit():
    makers = (
        lambda: torch.ones(3) / 3 * 2,
        lambda: torch.arange(1, 4.0).log(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.full((2, 3), 0.1),
        lambda: torch.eye(3)[1:],
        lambda: torch.ones(()) * 5,
        lambda: torch.zeros(4).expand(2, 4).clone(),
    )
    for make in makers:
        assert torch.equal(values(parameter(lambda make=make: nn.Parameter(make())))["w"], make())


def test_given_data_are_kept():
    table = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(values(then(lambda w: w.data.copy_(table), 3, 4))["w"], table)
    assert torch.equal(values(then(lambda w: setattr(w, "data", table), 3, 4))["w"], table)
    state = nn.Linear(4, 3).state_dict()

    def build():
        module = nn.Linear(4, 3)
        module.load_state_dict(state)
        return module

    assert torch.equal(values(build)["weight"], state["weight"])


def test_a_dirac_kernel_and_a_padding_row_are_what_torch_makes():
    assert torch.equal(values(then(dirac_, 4, 3, 3))["w"], dirac_(torch.empty(4, 3, 3)))
    padded = values(ZOO["embedding"])["weight"]
    assert padded[3].count_nonzero() == 0
    assert (padded == 0).any(1).sum() == 1


def test_the_parameter_in_the_constructors_hand_is_followed():
    def build():
        module = nn.Module()
        held = nn.Parameter(torch.empty(4, 3))
        module.w = held
        nn.init.constant_(held, 2.0)
        module.tied = held
        return module

    module, recipes = record(build)
    assert module.w is module.tied
    assert torch.equal(whole(recipes["tied"], module.tied), torch.full((4, 3), 2.0))


def test_tied_and_copied_parameters_have_equal_values():
    def build():
        module = nn.Module()
        module.embed, module.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        module.head.weight = module.embed.weight
        module.twin = copy.deepcopy(module.embed)
        module.other = nn.Embedding(6, 4)
        module.target = nn.Embedding(6, 4)
        module.target.load_state_dict(module.other.state_dict())
        return module

    found = values(build)
    assert torch.equal(found["embed.weight"], found["head.weight"])
    assert torch.equal(found["embed.weight"], found["twin.weight"])
    assert torch.equal(found["other.weight"], found["target.weight"])
    assert not torch.equal(found["embed.weight"], found["other.weight"])


def test_attributes_and_containers_survive():
    def build():
        module = nn.Module()
        module.w = nn.Parameter(torch.empty(3), requires_grad=False)
        module.w.tag = "mine"
        module.several = nn.ParameterList([nn.Parameter(torch.rand(2)), nn.Parameter(torch.zeros(2))])
        module.named = nn.ParameterDict({"a": nn.Parameter(torch.rand(2))})
        module._parameters["raw"] = nn.Parameter(torch.rand(2))
        marked = nn.Parameter(torch.rand(2))
        marked.tag = "too"
        module.marked = marked
        return module

    module, recipes = record(build)
    assert all(type(param) is nn.Parameter and param.is_meta for param in module.parameters())
    assert not module.w.requires_grad
    assert (module.w.tag, module.marked.tag) == ("mine", "too")
    assert {name for name, recipe in recipes.items() if recipe.reason} == {"w"}


def expand_write(w):
    w.data.view(-1)[3:9].fill_(1.0)


REFUSED = {
    "uninitialised": (then(lambda w: None, 4, 4), "it is left uninitialised"),
    "orthogonal": (then(orthogonal_, 4, 4), "it was computed by aten.linalg_qr from random numbers"),
    "sparse": (then(lambda w: nn.init.sparse_(w, 0.5), 4, 4), "it was written by aten.index_put_"),
    "orthogonal before registration": (
        parameter(lambda: nn.Parameter(orthogonal_(torch.empty(4, 4)))),
        "it was computed by aten.linalg_qr from random numbers",
    ),
    "exp of random": (parameter(lambda: nn.Parameter(torch.rand(3).exp())), "it was computed by aten.exp"),
    "bernoulli": (then(lambda w: w.data.bernoulli_(0.5), 4), "it was written by aten.bernoulli_"),
    "part of a random tensor": (
        parameter(lambda: nn.Parameter(torch.randn(6, 4)[:3])),
        "it is a part of a larger random tensor",
    ),
    "no range": (then(lambda w: (w.data.zero_(), expand_write(w)), 4, 4), "through a view that is no range"),
    "partly written": (then(lambda w: w.data[1:].zero_(), 4, 4), "some of its elements are never written"),
    "from a parameter": (
        then(lambda w: w.data.copy_(w.data.zero_().cumsum(0)), 4, 4),
        "it was computed by aten.cumsum",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_replayed_is_refused_with_its_reason(build, reason):
    module, recipes = record(build)
    with pytest.raises(NotReplayable) as refused:
        whole(recipes["w"], module.w, "layers.0.w")
    assert refused.value.name == "layers.0.w"
    assert reason in refused.value.reason
    assert r"give one with init={r'layers\.0\.w': fn}" in str(refused.value)


def test_what_is_overwritten_no_longer_matters():
    assert (values(then(lambda w: (orthogonal_(w), nn.init.ones_(w)), 4, 4))["w"] == 1).all()


def test_modules_built_by_other_threads_meanwhile_are_real():
    built = []

    def build():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return nn.Linear(2, 2)

    module, _ = record(build)
    assert module.weight.is_meta
    assert not built[0].weight.is_meta
