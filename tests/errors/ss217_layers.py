"""More stages than layers."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="pp=8").compile()
