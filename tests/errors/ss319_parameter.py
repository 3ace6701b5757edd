"""A hook that clamps the gradient of one parameter."""

from tests.gallery.case import Case, llama


def clamp(model):
    model.output.weight.register_hook(lambda grad: grad.clamp(-1, 1))


def trigger():
    Case(model=llama(clamp)).compile()
