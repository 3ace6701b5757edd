"""A loss of the output alone."""

from tests.gallery.case import Case


def trigger():
    Case(loss=lambda output: output.sum()).compile()
