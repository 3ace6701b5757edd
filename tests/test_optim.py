import copy
import functools
import math
import re

import numpy as np
import pytest
import torch

from shardspec.runtime import optim

SHAPES = {"embed.weight": (7, 5), "layer.weight": (5, 5), "layer.norm": (5,), "empty": (0, 5)}
GROUPS = {r".*norm": {"weight_decay": 0.0}, r"embed\..*": {"lr": 3e-3}}
SCHEDULE = {1: 1e-2, 2: 2e-2, 3: 1e-2, 4: 5e-3, 5: 1e-3}
BUILDERS = {
    "adamw": (
        functools.partial(optim.adamw, weight_decay=0.1),
        functools.partial(torch.optim.AdamW, weight_decay=0.1),
    ),
    "sgd": (optim.sgd, torch.optim.SGD),
    "momentum": (
        functools.partial(optim.sgd, momentum=0.9, weight_decay=0.1, nesterov=True),
        functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
}


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def slots(state):
    return [value for key, value in state.items() if key != "step"]


def run(optimizer, params):
    state = optimizer.init(params)
    for step in range(1, 6):
        optimizer.apply_(params, draw(step), state, step)
    return params


@pytest.mark.parametrize(("build", "reference"), BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("pure", [False, True])
def test_five_steps_with_groups_and_a_schedule_agree_with_torch(build, reference, pure):
    expected = draw(0)
    groups = [
        {"params": [expected["layer.weight"], expected["empty"]], "lr": 0.0},
        {"params": [expected["layer.norm"]], "lr": 0.0, "weight_decay": 0.0},
        {"params": [expected["embed.weight"]], "lr": 3e-3},
    ]
    theirs = reference(groups, lr=0.0)
    ours, params = build(lr=SCHEDULE.__getitem__, groups=GROUPS), draw(0)
    state = ours.init(params)
    for step, lr in SCHEDULE.items():
        for name, grad in draw(step).items():
            expected[name].grad = grad
        theirs.param_groups[0]["lr"] = theirs.param_groups[1]["lr"] = lr
        theirs.step()
        if pure:
            params, state = ours.update(draw(step), state, params, step)
        else:
            ours.apply_(params, draw(step), state, step)
        assert ours.lr(step) == lr
    for name in SHAPES:
        torch.testing.assert_close(params[name], expected[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("build", "_"), BUILDERS.values(), ids=BUILDERS)
def test_update_leaves_its_arguments_as_they_were(build, _):
    optimizer, params, grads = build(lr=1e-2), draw(0), draw(1)
    params, state = optimizer.update(grads, optimizer.init(params), params, 1)
    kept = copy.deepcopy((params, grads, state))
    optimizer.update(grads, state, params, 2)
    for now, before in zip((params, grads, *slots(state)), (*kept[:2], *slots(kept[2])), strict=True):
        assert all(torch.equal(now[name], before[name]) for name in SHAPES)
    assert state["step"] == kept[2]["step"] == 1


@pytest.mark.parametrize(("build", "_"), BUILDERS.values(), ids=BUILDERS)
def test_gradients_are_divided_by_the_scale_in_full_precision(build, _):
    scale = torch.tensor(1 / 3, dtype=torch.float64)
    optimizer, params, expected = build(lr=1e-2), draw(0), draw(0)
    state, reference = optimizer.init(params), optimizer.init(expected)
    for step in (1, 2):
        optimizer.apply_(params, draw(step), state, step, scale=scale)
        optimizer.apply_(expected, {n: g / scale for n, g in draw(step).items()}, reference, step)
    assert all(torch.equal(params[name], expected[name]) for name in SHAPES)


def test_a_gradient_that_two_parameters_share_is_divided_once_for_each():
    for dtype in (torch.float64, torch.float32):
        params = {"a": torch.ones(4, dtype=dtype), "b": torch.ones(4, dtype=dtype)}
        grad = torch.full((4,), 8.0, dtype=dtype)
        optim.sgd(lr=1.0).apply_(params, {"a": grad, "b": grad}, {"step": torch.zeros(())}, 1, scale=torch.tensor(4.0))
        assert params["a"].tolist() == params["b"].tolist() == [-1.0] * 4


@pytest.mark.parametrize(("build", "_"), BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(build, _, dtype):
    optimizer, params, clean = build(lr=1e-2), draw(0, dtype), draw(0, dtype)
    state, clean_state = optimizer.init(params), optimizer.init(clean)
    bad = {name: torch.full(shape, float("inf"), dtype=dtype) for name, shape in SHAPES.items()}
    off, on = torch.zeros(()), torch.ones(())
    optimizer.apply_(params, bad, state, 1, scale=torch.tensor(2.0), found_inf=on)
    assert state["step"] == 0
    assert all(torch.equal(params[name], clean[name]) for name in SHAPES)
    optimizer.apply_(params, draw(1, dtype), state, 1, scale=torch.tensor(2.0), found_inf=off)
    optimizer.apply_(clean, draw(1, dtype), clean_state, 1, scale=torch.tensor(2.0))
    assert state["step"] == 1
    assert all(torch.equal(params[name], clean[name]) for name in SHAPES)


@pytest.mark.parametrize(("build", "_"), BUILDERS.values(), ids=BUILDERS)
def test_strides_of_parameters_and_gradients_do_not_matter(build, _):
    base = torch.arange(30.0).reshape(5, 6)
    optimizer, params, expected = build(lr=1e-2), {"w": base.clone().t()}, {"w": base.t().contiguous()}
    state, reference = optimizer.init(params), optimizer.init(expected)
    for step in (1, 2):
        grad = torch.arange(60.0).reshape(6, 10)[:, ::2] + step
        optimizer.apply_(params, {"w": grad}, state, step)
        optimizer.apply_(expected, {"w": grad.contiguous()}, reference, step)
    assert torch.equal(params["w"], expected["w"])


def test_a_parameter_without_gradient_stays_and_frozen_ones_have_no_moments():
    params = draw(0)
    trainable = {name: p for name, p in params.items() if name != "layer.norm"}
    optimizer = optim.adamw()
    state = optimizer.init(trainable)
    assert "layer.norm" not in state["exp_avg"]
    new, _ = optimizer.update({"layer.weight": draw(1)["layer.weight"]}, state, params, 1)
    assert new["layer.norm"] is params["layer.norm"]
    assert new["embed.weight"] is params["embed.weight"]
    assert not torch.equal(new["layer.weight"], params["layer.weight"])


def test_a_bf16_gradient_updates_a_float32_parameter():
    params, expected = {"w": torch.ones(9)}, {"w": torch.ones(9)}
    grad = torch.linspace(-1, 1, 9).bfloat16()
    optimizer = optim.adamw()
    optimizer.apply_(params, {"w": grad}, optimizer.init(params), 1)
    optimizer.apply_(expected, {"w": grad.float()}, optimizer.init(expected), 1)
    assert torch.equal(params["w"], expected["w"])


@pytest.mark.parametrize(("build", "_"), BUILDERS.values(), ids=BUILDERS)
def test_a_shard_is_updated_as_its_part_of_the_whole_to_one_rounding(build, _):
    """Not bitwise: the kernel's vector body and its scalar tail round differently."""
    optimizer = build(lr=1e-2)
    whole = run(optimizer, draw(0))
    shards = {name: p[2:5].clone() for name, p in draw(0).items()}
    state = optimizer.init(shards)
    for step in range(1, 6):
        optimizer.apply_(shards, {name: g[2:5] for name, g in draw(step).items()}, state, step)
    for name in SHAPES:
        torch.testing.assert_close(shards[name], whole[name][2:5], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("groups", "names", "message"),
    [
        ({"head": {}}, ["body"], "optimizer group 'head' matches no trainable parameter"),
        ({"a.*": {}, ".*b": {}}, ["ab"], "parameter 'ab' is in two optimizer groups: 'a.*' and '.*b'"),
    ],
)
def test_groups_that_do_not_fit_the_names_are_refused(groups, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.adamw(groups=groups).check(names)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (optim.adamw, {"lr": "1e-3"}, "lr='1e-3': a finite number of at least 0, or a function of the step"),
        (optim.adamw, {"lr": -1.0}, "lr=-1.0"),
        (optim.adamw, {"lr": math.nan}, "lr=nan"),
        (optim.adamw, {"eps": -1e-8}, "eps=-1e-08: a finite number of at least 0"),
        (optim.adamw, {"weight_decay": math.inf}, "weight_decay=inf"),
        (optim.adamw, {"betas": (0.9, 1.0)}, "betas=(0.9, 1.0): two numbers of at least 0 and below 1"),
        (optim.adamw, {"betas": (0.9,)}, "betas=(0.9,)"),
        (optim.adamw, {"betas": 0.9}, "betas=0.9"),
        (optim.adamw, {"groups": {"a": {"lr": -1.0}}}, "lr=-1.0"),
        (optim.sgd, {"lr": 0.1, "momentum": -0.9}, "momentum=-0.9"),
    ],
)
def test_numbers_that_would_spoil_the_parameters_are_refused(build, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def test_rates_of_numpy_and_of_torch_and_betas_from_json_are_taken():
    for lr in (0, np.float32(0.1), torch.tensor(0.1), lambda step: 0.1 / step):
        optim.adamw(lr=lr, betas=[0.0, 0.999])


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="optimizer group 'a': no option 'momentum'; there are lr, betas"):
        optim.adamw(groups={"a": {"momentum": 0.9}})
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        optim.sgd(lr=1.0, nesterov=True)
