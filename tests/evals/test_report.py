"""The report as a browser's parser and a reader meet it."""

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from mezzotint.evals.report import MOST_POINTS, Stage, curve_svg, render
from mezzotint.pictures import png_bytes

VOID = {"meta", "img"}  # the elements of the page that have no end tag
PROMPTS = ["a red star", '<script>alert("x")</script> & \'quotes\' "of both kinds"', "", "a snowman ☃ — drawn"]
FACTS = {"machine": "2 cores <small>", "command": "mezzotint run --prompts 'a & b'"}


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed in order; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.texts.append(data.strip())

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        """The attributes of the elements of a tag, and of a class where `kind` is given."""
        return [attrs for name, attrs in self.elements if name == tag and kind in (None, attrs.get("class"))]


def picture(seed: int, size: int = 16) -> bytes:
    return png_bytes(torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def stage(name: str, seed: int, **scores: float) -> Stage:
    curve = [(10 * i, 1.0 + math.exp(-i / 20) + 0.1 * (-1) ** i) for i in range(100)]
    held_out = curve[::25]
    images = [picture(seed + i) for i in range(len(PROMPTS))]
    return Stage(name, f"Stage <{name}>", scores, curve, held_out, images, {"parameters": "4.1 M", "A & B": "<b>"})


@pytest.fixture
def stages() -> list[Stage]:
    return [
        stage("pretrain", 0, judge=0.932, calls=50, FD=1234.5),
        stage("distil", 10, judge=1.0, preference=math.nan, calls=4, seconds=0.0432, FD=12.34, KD=-0.0000421),
    ]


@pytest.fixture
def html(stages: list[Stage]) -> str:
    return render("A run & <its> report", stages, PROMPTS, FACTS)


def test_page_is_balanced_and_complete(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.texts.count("A run & <its> report") == 2  # the title and the heading
    for text in [*FACTS, *FACTS.values(), *filter(None, PROMPTS), "Stage <pretrain>", "distil", "no prompt", "4.1 M", "A & B", "<b>"]:
        assert text in page.texts, text


def test_page_needs_nothing_but_itself(html: str) -> None:
    assert not re.search(r"https?://|url\(|@import|<link|<script", html)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in Page(html).all("img"))
    policy = Page(html).all("meta")[1]
    assert str(policy["content"]).startswith("default-src 'none'")


def test_texts_cannot_leave_their_place(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &#x27;quotes&#x27;" in html
    assert not Page(html).all("script")
    assert not Page(html).all("b")


def test_scores_are_columns_in_the_order_first_seen(html: str) -> None:
    table = html[html.index('<table class="scores">') : html.index("</table>", html.index('<table class="scores">'))]
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)
    assert heads == ["Stage", "judge", "calls", "FD", "preference", "seconds", "KD"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table)
    assert cells[:6] == ["0.932", "50", "1234", "–", "–", "–"]
    assert cells[6:] == ["1.000", "4", "12.3", "nan", "0.043", "-4.2e-05"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9996, "1.000"), (99.96, "100.0"), (1e12, "1.0e+12"), (0.0, "0"), (-3.0, "-3"), (math.inf, "inf"), (-math.inf, "-inf")],
)
def test_odd_scores(value: float, text: str) -> None:
    html = render("", [Stage("a", "a", {"score": value}, [], [], [], {})], [], {})
    assert f">{text}</td>" in html


def test_images_are_inlined_unchanged_in_rows_of_stages(html: str, stages: list[Stage]) -> None:
    images = Page(html).all("img")
    expected = [of_stage.images[row] for row in range(len(PROMPTS)) for of_stage in stages]
    assert [base64.b64decode(str(image["src"]).partition(",")[2]) for image in images] == expected
    assert images[3]["alt"] == f"Stage <distil>: {PROMPTS[1]}"
    assert images[4]["alt"] == "Stage <pretrain>: no prompt"


@pytest.mark.parametrize(
    ("size", "shown", "kind"), [(16, "256", "pixels"), (96, "192", "pixels"), (200, "200", "pixels"), (512, "256", None)]
)
def test_pictures_are_enlarged_by_whole_factors_or_reduced(size: int, shown: str, kind: str | None) -> None:
    image = Page(render("", [Stage("a", "a", {}, [], [], [picture(0, size)], {})], ["p"], {})).all("img")[0]
    assert (image["width"], image["height"], image.get("class")) == (shown, shown, kind)


def test_ragged_or_broken_images_are_refused(stages: list[Stage]) -> None:
    with pytest.raises(ValueError, match="stage 'distil' must have one image for each of 4 prompts, got 3"):
        render("", [stages[0], replace(stages[1], images=stages[1].images[:3])], PROMPTS, {})
    with pytest.raises(ValueError, match="image 1 of stage 'pretrain' is not a PNG file"):
        render("", [replace(stages[0], images=[picture(0), b"GIF89a"])], PROMPTS[:2], {})


def test_a_stage_that_draws_nothing_has_scores_and_a_curve(stages: list[Stage]) -> None:
    page = Page(render("", [stages[0], replace(stages[1], images=[])], PROMPTS, {}))
    assert len(page.all("img")) == len(PROMPTS)
    assert len(page.all("article")) == 2


def test_a_page_of_nothing_is_still_a_page() -> None:
    assert Page(render("empty", [], [], {})).texts == ["empty", "empty"]
    assert "Nothing was trained." in Page(render("", [Stage("a", "a", {}, [], [], [], {})], [], {})).texts


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    drawn = str(Page(svg).all("polyline", kind)[0]["points"])
    return [(float(x), float(y)) for x, y in (place.split(",") for place in drawn.split())]


def test_chart_draws_both_curves_and_says_so_in_words() -> None:
    curve = [(i, 2.0 - i / 100) for i in range(101)]
    svg = curve_svg(curve, [(0, 2.1), (100, 1.1)], 'a "title"')
    assert Page(svg).all("svg")[0]["aria-label"] == (
        'a "title": loss from 1.990 at step 0 to 1.010 at step 100; held-out loss from 2.100 at step 0 to 1.100 at step 100'
    )
    assert len(Page(svg).all("circle", "held")) == 2
    assert {"loss", "step", "0", "20", "100", "1.0", "1.5"} <= set(Page(svg).texts)
    raw = points(svg, "raw")
    assert raw == sorted(raw)
    assert raw[2:-2] == points(svg, "smooth")[2:-2]  # a running mean without lag leaves a straight line as it is
    assert points(svg, "held")[0][1] < raw[0][1]  # y points down: a higher loss is drawn higher


def test_smoothing_calms_and_a_spike_does_not_flatten_the_chart() -> None:
    curve = [(i, 1.0 + 0.1 * (-1) ** i) for i in range(200)]
    curve[50] = (50, 1e6)
    svg = curve_svg(curve, [], "noisy")
    raw, smooth = points(svg, "raw"), points(svg, "smooth")
    swing = max(y for _, y in raw[60:]) - min(y for _, y in raw[60:])
    assert max(y for _, y in smooth[60:]) - min(y for _, y in smooth[60:]) < 0.3 * swing
    assert swing > 50


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    svg = curve_svg([(i, 1 / (i + 1)) for i in range(100_001)], [], "long")
    raw = points(svg, "raw")
    assert MOST_POINTS // 2 < len(raw) <= MOST_POINTS
    assert raw[-1][0] == max(x for x, _ in raw)
    assert {"20k", "100k"} <= set(Page(svg).texts)


@pytest.mark.parametrize("loss", [0.5, 0.0, 1e-7, 1e9])
def test_one_point_or_a_flat_curve_is_drawn(loss: float) -> None:
    assert len(Page(curve_svg([(7, loss)], [], "one")).all("circle")) == 2  # raw and smoothed
    assert len(points(curve_svg([(0, loss), (1, loss)], [], "flat"), "raw")) == 2


def test_non_finite_losses_are_counted() -> None:
    svg = curve_svg([(0, 1.0), (1, math.nan), (2, 0.5)], [(2, math.inf)], "broken")
    assert "2 non-finite" in Page(svg).texts
    assert "2 non-finite losses" in str(Page(svg).all("svg")[0]["aria-label"])
    assert "nan" not in svg
    assert "1 non-finite" in Page(curve_svg([(0, math.nan)], [], "all broken")).texts


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must not both be empty"):
        curve_svg([], [], "nothing")
