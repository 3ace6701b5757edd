"""An autograd function of the user's own is refused on a mesh, however it is written: its backward is not seen."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardspec as ss


def doubled(x: Tensor) -> Tensor:
    return x * 2.0


class Direct(torch.autograd.Function):
    """Its operator stands in forward itself."""

    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.0


class Through(Direct):
    """Its operator stands in a function that forward calls."""

    @staticmethod
    def forward(ctx, x):
        return doubled(x)


SOURCE = """
class Typed(Direct):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0
"""


def typed_at_a_prompt() -> type[torch.autograd.Function]:
    """A function whose source is no file, as at a prompt or in a notebook."""
    scope: dict = {"Direct": Direct}
    exec(SOURCE, scope)
    return scope["Typed"]


class Model(nn.Module):
    """A replicated layer, a function, and two layers split over tp."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a = nn.Linear(4, 4, bias=False)
        self.up = nn.Linear(4, 8, bias=False)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.down(self.up(self.function(self.a(x))))


RULES = ss.Rules(
    params={r"a\.weight": "E D", r"up\.weight": "F@tp D", r"down\.weight": "D F@tp"},
    activations={"x": "B@(dp,fsdp) D", "up:in|down": "B@(dp,fsdp) D"},
)

FUNCTIONS = {
    "direct": Direct.apply,
    "through a function": Through.apply,
    "typed at a prompt": typed_at_a_prompt().apply,
    "torch's checkpoint": lambda x: checkpoint(doubled, x, use_reentrant=True),
}


def compile_on(mesh: ss.Mesh, function) -> ss.Plan:
    return ss.compile(Model(function), RULES, mesh, {"x": torch.zeros(8, 4)})


@pytest.mark.parametrize("mesh", [ss.Mesh(dp=2), ss.Mesh(tp=2)], ids=str)  # under tp its operand is replicated
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_with_a_backward_of_its_own_is_refused_on_a_mesh(name, mesh):
    with pytest.raises(ss.ShardingError, match="SS315"):
        compile_on(mesh, FUNCTIONS[name])


def test_it_runs_on_one_rank():
    assert compile_on(ss.Mesh(), Direct.apply).collectives == ()
