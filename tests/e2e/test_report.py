"""report.html in a real Chromium: what a person sees, in light and in dark, on a desk and on a phone."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page

from llmtrain.report.page import page as html_of
from tests.e2e.browser import opened
from tests.e2e.conftest import Demo
from tests.paper_run import HOSTILE, PaperRuns, write_runs

SECTIONS = ["figures", "curves", "samples", "preferences", "config", "data", "lineage", "machine"]
LEAST_CONTRAST = 4.5
"""Of text against what is behind it: WCAG 2.2, success criterion 1.4.3, level AA."""
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => rgb(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, channel) => sum + value * [0.2126, 0.7152, 0.0722][channel], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (rgb(colour)[3] === 255) return colour;
    }
  };
  const worst = {};
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script")) continue;
    const style = getComputedStyle(element);
    const pair = [luminance(element.closest("svg") ? style.fill : style.color), luminance(behind(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const name = `${element.tagName} ${element.getAttribute("class") ?? ""}`;
    worst[name] = Math.min(worst[name] ?? 99, ratio);
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PaperRuns:
    runs = write_runs(tmp_path_factory.mktemp("paper") / "outputs")
    for run in runs.all:
        (run / "report.html").write_text(html_of(run, runs.outputs))
    return runs


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_section_is_seen_and_nothing_but_the_file_is_asked_for(runs: PaperRuns, scheme: str):
    with opened(runs.dpo / "report.html", color_scheme=scheme) as page:
        assert [section.get_attribute("id") for section in page.locator("section").all()] == SECTIONS
        assert all(section.is_visible() for section in page.locator("section").all())
        assert page.locator("#curves svg polyline").count() >= 2
        assert page.locator("#preferences svg polygon").count() == 3
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 15
        assert {name: ratio for name, ratio in contrasts.items() if ratio < LEAST_CONTRAST} == {}
        assert page.complaints == []
        assert page.requested == [(runs.dpo / "report.html").as_uri()]


def test_what_data_says_runs_nothing(runs: PaperRuns):
    with opened(runs.dpo / "report.html") as page:
        assert page.title() == f"qwen3_tiny-dpo · {runs.dpo.name}"
        assert page.locator("img").count() == 0
        assert HOSTILE in page.locator("#samples .prompt").first.inner_text()


def test_the_button_changes_between_light_and_dark_and_the_choice_is_kept(runs: PaperRuns):
    with opened(runs.pretrain / "report.html", color_scheme="light") as page:
        light, button = background(page), page.locator("#theme")
        assert button.inner_text() == "Dark"
        button.click()
        dark = background(page)
        assert dark != light
        assert button.inner_text() == "Light"
        page.reload()
        assert background(page) == dark
        button.click()
        assert background(page) == light
    with opened(runs.pretrain / "report.html", color_scheme="dark") as page:
        assert background(page) == dark


@pytest.mark.parametrize("width", [390, 768, 1400])
def test_nothing_is_wider_than_the_window(runs: PaperRuns, width: int):
    for run in runs.all:
        with opened(run / "report.html", width=width) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == width
            boxes = page.locator(".card").all()
            assert [box for box in boxes if box.evaluate("box => box.scrollWidth > box.clientWidth")] == []


def test_the_pointer_reads_values_off_a_curve_and_a_name_opens_its_meaning(runs: PaperRuns):
    with opened(runs.pretrain / "report.html") as page:
        chart = page.locator("#curves figure").first
        box = chart.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 407.9 / 420, box["y"] + box["height"] / 2)  # the end of the axis
        assert re.fullmatch(
            r"(9,99\d|10,000) tokens: train 5\.\d+, validation 5\.2\d*", chart.locator(".readout").inner_text()
        )
        meaning = page.get_by_text("Peak learning rate, reached after the warm-up.")
        assert not meaning.is_visible()
        page.locator("summary", has_text=re.compile("^lr$")).click()
        assert meaning.is_visible()
        marked = page.locator("tr.differs", has=page.locator("summary", has_text=re.compile("^lr$")))
        assert "0.001 default 0.004" in marked.inner_text().replace("\n", " ").replace("\t", " ")


def test_the_parents_report_is_one_click_away(runs: PaperRuns):
    with opened(runs.dpo / "report.html") as page:
        page.locator("#lineage a").click()
        assert page.locator("h1").inner_text() == "qwen3_tiny-pretrain"
        assert page.complaints == []


def test_paper_is_white_and_has_no_buttons(runs: PaperRuns):
    with opened(runs.dpo / "report.html", color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert background(page) == "rgb(250, 250, 248)"
        assert not page.locator("#theme").is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_demos_reports_show_real_runs(demo: Demo, tmp_path: Path):
    for name, sections in (("qwen3_small-pretrain", 7), ("qwen3_small-dpo", 8)):
        (run,) = (path for path in (demo.outputs / name).iterdir() if path.is_dir())
        with opened(run / "report.html") as page:
            assert page.locator("section").count() == sections
            assert f"{name}@1.0.0" in page.locator("header").inner_text()
            assert page.locator("#samples .samples").count() == 4
            assert page.locator("tr.differs").count() <= 1, "the demo is the defaults; the precision is the machine's"
            assert page.complaints == []
            page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
