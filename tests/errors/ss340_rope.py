"""Rotary angles by the length at hand, where the sequence is split."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="cp=2").compile()
