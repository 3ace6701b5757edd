"""The page of a plan: pictures that are to the point, text that is escaped, nothing fetched and nothing run."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import combinations
from math import prod
from random import Random

import pytest
from attrs import evolve, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shardspec as ss
from shardspec.layout import Layout, Sum
from shardspec.mesh import AXES
from shardspec.picture import BOX_H, BOX_W, STRIP_H, captions, draw_cuts, draw_layout, draw_mesh, places
from shardspec.plan import Plan
from tests.strategies import laid_out
from tests.test_plan import LLAMA, PLANS, plan_of

SVG = "{http://www.w3.org/2000/svg}"
MONO = 7.3
"""The width of a letter of the page's 12 px monospace, rounded up; a line of it is 14 px high."""


@frozen
class Box:
    """Something that is drawn, in pixels."""

    left: float
    top: float
    right: float
    bottom: float
    kind: str = ""

    def meets(self, other: "Box", slack: float = 0.02) -> bool:
        return (
            self.left < other.right - slack
            and other.left < self.right - slack
            and self.top < other.bottom - slack
            and other.top < self.bottom - slack
        )

    def holds(self, other: "Box", slack: float = 0.02) -> bool:
        return (
            self.left <= other.left + slack
            and self.top <= other.top + slack
            and self.right >= other.right - slack
            and self.bottom >= other.bottom - slack
        )

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


def drawn(svg: str) -> tuple[Box, list[Box], list[Box]]:
    """The picture, its rectangles and its texts, where they come to lie."""
    root = ET.fromstring(svg)
    rects: list[Box] = []
    texts: list[Box] = []

    def walk(node: ET.Element, x: float, y: float) -> None:
        shift = node.get("transform", "translate(0 0)").removeprefix("translate(").removesuffix(")").split()
        x, y = x + float(shift[0]), y + float(shift[1])
        left, top = x + float(node.get("x", 0)), y + float(node.get("y", 0))
        if node.tag == f"{SVG}rect":
            size = float(node.attrib["width"]), float(node.attrib["height"])
            rects.append(Box(left, top, left + size[0], top + size[1], node.attrib["class"]))
        if node.tag == f"{SVG}text":
            width = len(node.text or "") * MONO
            left -= width / 2 if node.get("text-anchor") == "middle" else 0
            texts.append(Box(left, top - 7, left + width, top + 7, node.text or ""))
        for child in node:
            walk(child, x, y)

    walk(root, 0, 0)
    return Box(0, 0, float(root.attrib["width"]), float(root.attrib["height"])), rects, texts


meshes = st.fixed_dictionaries({axis: st.sampled_from((1, 1, 2, 3, 4, 5, 8, 2048)) for axis in AXES})


@settings(max_examples=30, deadline=None)
@given(meshes)
@example(dict.fromkeys(AXES, 1))
@example({**dict.fromkeys(AXES, 1), "fsdp": 2048, "tp": 8})
def test_no_label_of_a_mesh_lies_on_another_and_all_lie_in_their_boxes(sizes):
    page, rects, texts = drawn(draw_mesh(ss.Mesh(**sizes)))
    for box in (*rects, *texts):
        assert page.holds(box)
    for one, two in combinations(texts, 2):
        assert not one.meets(two)
    for one, two in combinations(rects, 2):
        assert not one.meets(two) or one.holds(two) or two.holds(one)
    for text in texts:
        inner = min((rect for rect in rects if rect.meets(text)), key=lambda rect: rect.area)
        assert inner.holds(text)


@settings(max_examples=30, deadline=None)
@given(meshes)
def test_a_mesh_shows_the_first_rank_filled_and_the_last_one(sizes):
    mesh = ss.Mesh(**sizes)
    _, rects, texts = drawn(draw_mesh(mesh))
    own = [rect for rect in rects if rect.kind == "own"]
    assert len(own) == 1
    assert [text.kind for text in texts if own[0].holds(text)] == ["0"]
    assert str(mesh.world - 1) in {text.kind for text in texts}


@pytest.mark.parametrize("sums", [0.0, 0.6])
@given(st.randoms(use_true_random=False))
def test_the_filled_part_of_a_picture_is_the_part_that_a_rank_holds(sums: float, rng: Random):
    """To scale, for an axis of up to four is drawn place for place; of direct sums too."""
    sizes, _, layout = laid_out(rng, most=64, sums=sums)
    mesh = ss.Mesh(**sizes)
    _, rects, _ = drawn(draw_layout(layout, mesh))
    shown = [rect for rect in rects if "gap" not in rect.kind]
    whole = BOX_W * (BOX_H if len(layout.dims) > 1 else STRIP_H)
    if len(shown) == len(rects):
        held = sum(rect.area for rect in rects if rect.kind == "own") / whole
        assert held == pytest.approx(1 / prod(sizes[axis] for axis in layout.sharded), rel=0.03)
    assert sum(rect.area for rect in rects) == pytest.approx(whole, rel=0.03)
    for one, two in combinations(rects[:60], 2):
        assert not one.meets(two)


def test_storage_is_shaded_and_what_a_rank_stores_of_it_filled():
    _, rects, _ = drawn(draw_cuts([("tp", "fsdp", 8), (16,)], ss.Mesh(fsdp=4, tp=2), storage=("fsdp",)))
    assert [rect.kind for rect in rects] == ["own", "read", "read", "read", "other", "other", "other", "other"]
    assert [rect.top for rect in rects] == sorted(rect.top for rect in rects)


def test_parts_of_a_direct_sum_are_each_cut_and_named():
    mesh = ss.Mesh(tp=2)
    cuts = [(Sum((("tp", 8), (2, "tp", 4))),), (16,)]
    _, rects, _ = drawn(draw_cuts(cuts, mesh))
    assert [rect.kind for rect in rects] == ["own", "other"] * 3
    assert [round((rect.bottom - rect.top) / BOX_H, 2) for rect in rects] == [0.25, 0.25, 0.12, 0.12, 0.12, 0.12]
    assert list(captions(cuts, mesh)) == ["dim 0: (8@tp + 4@tp + 4@tp)"]


def test_pieces_of_a_fused_dim_are_each_cut():
    _, rects, _ = drawn(draw_layout(Layout(((3, "tp", 4), (8,))), ss.Mesh(tp=2)))
    assert [rect.kind for rect in rects] == ["own", "other"] * 3


def test_a_large_axis_is_drawn_with_a_gap():
    assert places(4) == [0, 1, 2, 3]
    assert places(2048) == [0, 1, None, 2047]
    assert places(2048, 2) == [0, None, 2047]
    assert places(2, 2) == [0, 1]
    _, rects, _ = drawn(draw_layout(Layout((("fsdp", 2), (8,))), ss.Mesh(fsdp=2048)))
    assert [rect.kind for rect in rects] == ["own", "other", "other gap", "other"]


def test_a_caption_names_the_axes_of_each_dim():
    mesh = ss.Mesh(fsdp=2048, tp=8)
    assert list(captions([("tp", "fsdp", 8), (16,)], mesh)) == ["dim 0: tp 8 x fsdp 2048"]
    assert list(captions([(3, "tp", 4), ("fsdp",)], mesh)) == ["dim 0: 3 x tp 8", "dim 1: fsdp 2048"]


class Page(HTMLParser):
    """Tags that match, and what the page would fetch or run."""

    VOID = frozenset({"meta", "br", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [name for name, _ in attrs if name in {"src", "href"} or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize(("family", "config", "mesh", "options"), PLANS)
def test_a_page_is_well_formed_and_fetches_and_runs_nothing(family, config, mesh, options):
    plan = plan_of(family, config, mesh, **options)
    page = Page(plan.to_html())
    assert "script" not in page.tags
    assert not page.links
    assert Plan.from_json(plan.to_json()).to_html() == plan.to_html()


def test_a_page_says_what_the_text_says():
    plan = plan_of(*PLANS[1][:3], **PLANS[1][3])
    page, text = " ".join(Page(plan.to_html()).words), str(plan)
    for row in plan.collectives:
        assert row.where in page
        assert row.kind in page
    for word in ("31,", "layers.*", "attention.wq.weight", "(K@tp hd)@fsdp D"):
        assert (word in text) == (word in page)


def test_a_name_that_looks_like_markup_is_shown_as_it_is():
    plan = plan_of(*PLANS[1][:3])
    odd = '</code><script>alert("x")</script>&amp;'
    param = evolve(plan.params["norm.weight"], first=odd, spec=odd, rule=odd, dtype=odd)
    activation = evolve(plan.activations["output"], name=odd, rule=odd)
    collective = evolve(plan.collectives[0], where=odd, why=odd)
    page = Page(evolve(plan, params={odd: param}, activations={odd: activation}, collectives=(collective,)).to_html())
    assert "script" not in page.tags
    assert page.words.count(odd) >= 6


def test_a_page_of_many_layers_is_as_long_as_one_of_few():
    few, many = (plan_of(PLANS[0][0], evolve(LLAMA, n_layers=n), ss.Mesh(fsdp=2, tp=2)).to_html() for n in (2, 20))
    assert few.count("<tr") == many.count("<tr")
    assert few.count("<svg") == many.count("<svg")
