"""Convolutions and pooling, by brute force: accepted where a rank's part is the whole's, refused elsewhere."""

import pytest
import torch
import torch.nn.functional as F

import shardspec as ss
from shardspec.layout import AVG, MAX, Layout
from shardspec.testing.bruteforce import verify_operator

MESH = ss.Mesh(dp=2, tp=2)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


IMAGES, WEIGHT, BIAS = normal(4, 4, 6, 6), normal(8, 4, 2, 2), normal(8)

CONVOLUTIONS = {
    "patches": (lambda x, w, b: F.conv2d(x, w, b, stride=2), (IMAGES, WEIGHT, BIAS)),
    "padded": (lambda x, w, b: F.conv2d(x, w, b, padding="same", dilation=2), (IMAGES, WEIGHT, BIAS)),
    "one image": (F.conv2d, (IMAGES[0], WEIGHT, BIAS)),
    "a line": (F.conv1d, (IMAGES[..., 0], WEIGHT[..., 0], BIAS)),
    "a volume": (lambda x, w, b: F.conv3d(x[..., None], w[..., None], b), (IMAGES, WEIGHT, BIAS)),
    "transposed": (F.conv_transpose2d, (IMAGES, WEIGHT.transpose(0, 1).contiguous(), BIAS)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"),
    [("I", "O@tp", "O@tp"), ("I@tp", "O", "O +tp"), ("I", "O", "O"), ("I", "O@(dp,tp)", "O@(dp,tp)")],
)
def test_a_convolution_splits_over_batch_and_channels(name, inputs, outputs, bias):
    operator, tensors = CONVOLUTIONS[name]
    batch = "" if name == "one image" else "B" if "dp" in outputs else "B@dp"
    rest = {"a line": "X"}.get(name, "Y X")
    kernel = {"a line": "k"}.get(name, "k k")
    channels = f"{inputs} {outputs}" if name == "transposed" else f"{outputs} {inputs}"
    verdict = verify_operator(operator, tensors, (f"{batch} {inputs} {rest}", f"{channels} {kernel}", bias), MESH)
    assert verdict.accepted, verdict.refusal
    assert verdict.correct, verdict.problem


@pytest.mark.parametrize(
    ("layouts", "code"),
    [
        (("B I Y X@tp", "O I k k", "O"), "SS304"),
        (("B I Y X", "O I k@tp k", "O"), "SS304"),
        (("B I@tp Y X", "O I@tp k k", "O"), "SS303"),
        (("B I@tp Y X", "O I k k", "O"), "SS302"),
        (("B I Y X", "O I k k", "O +tp"), "SS303"),
        (("B I Y X +tp", "O I k k +tp", "O"), "SS303"),
        (("B@tp I Y X", "O@tp I k k", "O@tp"), "SS302"),
    ],
)
def test_a_convolution_of_what_is_no_part_of_the_whole_is_refused(layouts, code):
    verdict = verify_operator(F.conv2d, (IMAGES, WEIGHT, BIAS), layouts, MESH)
    assert not verdict.accepted
    assert verdict.refusal.startswith(code)


def test_a_grouped_convolution_splits_over_the_batch_alone():
    tensors = (IMAGES, WEIGHT[:, :2].contiguous(), BIAS)

    def grouped(x, weight, bias):
        return F.conv2d(x, weight, bias, groups=2)

    assert verify_operator(grouped, tensors, ("B@(dp,tp) I Y X", "O J k k", "O"), MESH).outputs == (
        Layout((("dp", "tp"), (8,), (5,), (5,))),
    )
    assert not verify_operator(grouped, tensors, ("B I@tp Y X", "O@tp J k k", "O@tp"), MESH).accepted


POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 2),
    "mean to a size": lambda x: F.adaptive_avg_pool2d(x, (1, 3)),
    "mean of a line": lambda x: F.avg_pool1d(x[..., 0], 3),
    "mean of a line to a size": lambda x: F.adaptive_avg_pool1d(x[..., 0], 2),
    "mean of a volume": lambda x: F.avg_pool3d(x, (1, 2, 2)),
    "maximum": lambda x: F.max_pool2d(x, 2),
    "maximum to a size": lambda x: F.adaptive_max_pool2d(x, 2),
    "maximum of a line": lambda x: F.max_pool1d(x[..., 0], 2),
    "maximum and where": lambda x: F.max_pool2d(x, 3, stride=1, return_indices=True),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_splits_over_batch_and_channels_and_needs_whole_windows(name):
    channels = "C" if name == "mean of a volume" else "C@tp"  # its window lies over them
    free = verify_operator(POOLS[name], (IMAGES,), (f"B@dp {channels} Y X",), MESH)
    assert free.accepted, free.refusal
    assert free.correct, free.problem
    assert not verify_operator(POOLS[name], (IMAGES,), ("B C Y@tp X",), MESH).accepted


@pytest.mark.parametrize("name", POOLS)
def test_a_mean_passes_a_pending_sum_and_a_maximum_passes_none(name):
    for kind in ("sum", AVG, MAX):
        layout = Layout(((4,), (4,), (6,), (6,)), (("tp", kind),))
        verdict = verify_operator(POOLS[name], (IMAGES,), (layout,), MESH)
        assert verdict.accepted == (name.startswith("mean") and kind != MAX), verdict.refusal
        assert verdict.correct, verdict.problem


def test_a_token_expanded_over_a_split_batch_owes_its_gradient():
    def join(token, x):
        return torch.cat((token.expand(x.shape[0], -1, -1), x), dim=1)

    verdict = verify_operator(join, (normal(1, 1, 6), normal(4, 3, 6)), ("1 1 D", "B@dp N D@tp"), MESH)
    assert not verdict.accepted
    for layouts in [("1 1 D", "B@dp N D"), ("1 1 D@tp", "B@dp N D@tp"), ("1 1 D", "B@(dp,tp) N D")]:
        verdict = verify_operator(join, (normal(1, 1, 6), normal(4, 3, 6)), layouts, MESH)
        assert verdict.accepted, verdict.refusal
        assert verdict.correct, verdict.problem
