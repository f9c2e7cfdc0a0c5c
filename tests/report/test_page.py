"""report.html: a whole document that asks for nothing, runs nothing, and shows what users wrote as text."""

import base64
import copy
import html.parser
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from aegis_jax.report import charts, page
from aegis_jax.report.plan import plan
from tests.report.conftest import ATTACKS

EVIL = "<script>alert(1)</script> $x^2$ \"'&"
VOID = {"meta", "img", "input", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Tags with attributes, what is open, and the text; an end without its start fails."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def what(evaluation):
    found, _ = plan([], "world", "star", attacks=ATTACKS, baselines="uce", seeds="1", images=2, cases=4, out=evaluation)
    return found


@pytest.fixture(scope="module")
def source(evaluation):
    return (evaluation / "report.html").read_text()


def test_it_is_whole_and_has_every_part(source, report):
    found = Page(source)
    assert found.open == []
    parts = ("Summary", "Robustness against retention", "Attacks", "What is kept", "Near concepts", "Pictures")
    for title in (*parts, "Distances of predictions", "Cost", "Commands"):
        assert title in found.text
    assert (
        "kept (same attribute and others)" in found.text and "UnlearnCanvas" in found.text and "CARE" not in found.text
    )
    for row in report["rows"]:
        for attack in row["attacks"].values():
            assert attack["command"] in found.text
    strips = [image["alt"] for image in found.all("img")]
    assert len(strips) == 2 * (1 + 2) + 1  # original and the attack with its control, twice; erased, once
    assert "pictures: uce, erased" in strips[1]
    assert "one seed (1)" in found.text and "factor of two or three" in found.text


def test_it_asks_for_nothing_and_runs_nothing(source):
    found = Page(source)
    (policy,) = [meta["content"] for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:80]  # the world's are small
    addresses = re.findall(r"(?:url\(|@import|https?:)[^)\s\"]*", source)
    assert all(a.startswith("url(#") or a.startswith("http://www.w3.org/") for a in addresses), addresses


def test_what_users_wrote_is_text(report, what):
    evil = copy.deepcopy(report) | {"concept": EVIL, "neutral": EVIL, "command": EVIL, "base": EVIL}
    evil["left_out"] = {"p4d-k": EVIL}
    for row in evil["rows"]:
        row |= {"name": EVIL, "method": EVIL}
        row["pictures"]["prompts"] = [EVIL] * 4
        for attack in row["attacks"].values():
            attack["command"] = attack["pictures"]["prompts"][0] = attack["control"]["word"] = EVIL
    written = page.html(evil, what)
    assert "<script" not in written and "alert(1)" in written
    found = Page(written)
    assert found.open == [] and found.text.count(EVIL) > 20 and f"p4d-k was left out: {EVIL}" in found.text
    assert report["left_out"] == {} and "left out" not in page.html(report, what)
    assert all("script" not in "".join(attributes) for _, attributes in found.tags)  # no attribute's name was made


def test_pictures_are_blurred_but_the_worlds(report, what, source):
    assert "blur(" not in source
    copied = copy.deepcopy(report) | {"base": "/models/copy-of-the-world"}
    assert "blur(" not in page.html(copied, what) and "pixelated" in page.html(copied, what)
    other = {name: value for name, value in copied.items() if name != "world"}
    assert "blur(" in page.html(other, what) and 'id="show"' in page.html(other, what)
    assert "blur(" not in page.html(other | {"show": True}, what)


def test_large_pictures_are_made_smaller_for_the_page():
    strip = np.zeros((512, 3 * 512, 3), np.uint8)
    strip[:, 512:1024] = [250, 20, 20]
    for size, kind, shown in ((32, "png", (96, 32)), (512, "jpeg", (3 * page.SHOWN, page.SHOWN))):
        out = io.BytesIO()
        Image.fromarray(strip[:size, :: 512 // size]).save(out, "PNG")
        begin, data = page._small(out.getvalue(), 3).split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert begin == f"data:image/{kind};base64" and picture.size == shown
        middle = np.asarray(picture, int)[:, shown[0] // 3 + 2 : 2 * shown[0] // 3 - 2]
        assert np.abs(middle - [250, 20, 20]).max() < 12  # pictures stay where they were


def test_charts_have_the_pages_colours_and_what_they_are_given():
    metrics = [
        {"step": k, "L_e": 0.1 / k, "L_adv": None if k == 3 else 0.2 + k, "drift_norm": k, "omega": 0.1}
        for k in range(1, 9)
    ]
    svg = charts.curves("_odd $name", metrics)
    found = Page(svg)
    assert found.open == [] and "L_adv" in found.text and "norm of the drift" in found.text
    assert "var(--s0)" in svg and "var(--ink)" in svg and "#0102" not in svg
    assert "omega" not in found.text  # it never changes
    assert charts.curves("one step", metrics[:1]) == "" == charts.curves("none", [])


def point(name):
    return {
        "name": name,
        "kept": {"share": 0.5, "interval": [0.4, 0.6]},
        "worst": {"share": 0.3, "interval": [0.2, 0.4]},
    }


def test_each_point_of_a_chart_looks_like_no_other():
    looks = [charts._look(k) for k in range(64)]
    assert len(set(looks)) == 64 and looks[:8] == list(zip(charts.MARKERS, charts.SERIES, strict=True))


def test_a_chart_grows_with_its_rows_and_shortens_long_names():
    long = "van-gogh-aegis-plus-near-lr1e-5-steps1000-seed3"
    heights = []
    for count in (2, 20):
        svg = charts.pareto([point(f"{long}-{k}") for k in range(count)], "kept")
        heights.append(float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1]))
        assert long not in svg and f"steps1000-seed3-{count - 1}" in svg and "van-gogh-aegis-plus-…" in svg
    assert heights[1] - heights[0] == pytest.approx(18 * 0.22 * 72, abs=1)


def test_charts_on_one_page_share_no_ids():
    metrics = [{"step": k, "L_e": 0.1 / k, "drift_norm": k} for k in range(1, 9)]
    svgs = [charts.pareto([point("a"), point('<b id="x">')], "kept"), *(charts.curves(name, metrics) for name in "ab")]
    ids = [attributes["id"] for svg in svgs for _, attributes in Page(svg).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for svg in svgs:
        mine = {attributes["id"] for _, attributes in Page(svg).tags if "id" in attributes}
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used and used <= mine
    assert '<b id="x">' in Page(svgs[0]).text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_chromium_draws_it_light_and_dark(evaluation, tmp_path, dark):
    picture = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}",
        "--window-size=500,2400", f"--blink-settings=preferredColorScheme={int(not dark)}", f"--screenshot={picture}",
        (evaluation / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert (np.median(pixels) < 60) == dark and (np.median(pixels) > 200) != dark
    assert pixels[:, :3].std() == pixels[:, -3:].std() == 0  # nothing is wider than the window
    assert pixels[:, 40:].std() > 10
