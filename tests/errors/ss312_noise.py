"""Noise that no key makes alike on every mesh."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import Noise


def trigger():
    Case(model=with_parts(feed_forward=Noise)).compile()
