"""An axis that no rule uses."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="ep=2,tp=2").compile()
