"""The page: complete in one file, small, quiet, and drawn by a browser without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmkern.attribute.attribution import Attribution
from llmkern.errors import RecordingError, UsageError
from llmkern.explain import Explanation
from llmkern.explain.page_data import PageData, page_data
from llmkern.explain.statement import Statement, state
from llmkern.report.html import is_page, page, write_page
from tests.recorded import recorded

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


def of_int4() -> tuple[Statement, PageData]:
    explanation = Explanation(recorded("int4"))
    return state(explanation), page_data(explanation)


@pytest.fixture(scope="module")
def int8_page() -> str:
    explanation = Explanation(recorded("int8"))
    return page(state(explanation), page_data(explanation, recorded("bf16-operators")))


def simple_page(attribution: Attribution, doubts: tuple[str, ...] = ()) -> str:
    explanation = Explanation(attribution)
    return page(replace(state(explanation), doubts=doubts), page_data(explanation))


class Tags(HTMLParser):
    """Notes every opening tag with its attributes, and the text of headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(int8_page: str) -> None:
    for tag, attributes in Tags(int8_page).tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)


def test_the_page_may_not_ask_for_anything_either(int8_page: str) -> None:
    policies = [a["content"] for tag, a in Tags(int8_page).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
    ]


def test_the_first_screen_answers_why_and_what_then(int8_page: str) -> None:
    header = int8_page[int8_page.index("<header>") : int8_page.index("</header>")]
    for words in ("3.88 times the energy of qwen-7b bf16", "in gaps before outlier kernels", "while no kernel runs"):
        assert words in header
    assert "What would help most: layers of products and attention alone" in header
    first = int8_page[int8_page.index('id="why"') :]
    assert first.index("only convert numbers") < first.index("</section>")


def test_everything_has_its_place_and_its_name(int8_page: str) -> None:
    tags = Tags(int8_page).tags
    ids = [attributes["id"] for _, attributes in tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {"why", "energy-decode", "timeline", "roof-decode", "layers-decode", "uncertain", "method"} <= set(ids)
    assert sum(tag == "h1" for tag, _ in tags) == 1
    charts = [attributes for tag, attributes in tags if tag == "figure"]
    assert all(a["aria-label"] and a["tabindex"] == "0" for a in charts)
    assert {a["id"] for a in charts} == {a["data-chart"] for _, a in tags if a.get("data-chart")}


def test_the_waterfall_ends_at_the_measured_energy(int8_page: str) -> None:
    match = re.search(r'data-chart="chart-energy-decode">(.*?)</script>', int8_page, re.DOTALL)
    assert match is not None
    rows = json.loads(match[1])["data"]["values"]
    energy = recorded("int8").accounts["decode"].weight.energy_j
    assert energy is not None
    whole = rows[-1]
    assert whole["end"] == pytest.approx(energy.value)
    steps = rows[:-1]
    assert [r["start"] for r in steps[1:]] == pytest.approx([r["end"] for r in steps[:-1]])
    assert steps[-1]["end"] == pytest.approx(whole["end"])


def test_names_cannot_break_out_of_the_page() -> None:
    found = recorded("int4")
    rude = found.kernels.assign(name="k<script>alert(1)</script>", module="</script><img src=x>")
    text = simple_page(replace(found, kernels=rude), ("<b>",))
    plain = simple_page(found, ("<b>",))
    tags, expected = ([tag for tag, _ in Tags(t).tags] for t in (text, plain))
    assert "img" not in tags
    assert tags.count("script") == expected.count("script")
    assert "&lt;b&gt;" in text


def test_a_run_with_nothing_but_time_has_a_page(tmp_path: Path) -> None:
    from llmkern.attribute.attribution import attribute
    from tests.synthetic import synthetic_run

    run, _ = synthetic_run(tmp_path / "run", energy=False)
    text = simple_page(attribute(run))
    assert "A decoded token takes 30.0 ms" in text
    assert "nan" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL).lower().replace("nanosecond", "")


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="choose another file"):
        write_page(*of_int4(), tmp_path / "file" / "page.html")


def test_only_a_page_of_ours_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<!doctype html><title>My own</title>")
    with pytest.raises(UsageError, match="was not written by llmkern"):
        write_page(*of_int4(), file)
    assert "My own" in file.read_text()
    file.unlink()
    for _ in range(2):
        write_page(*of_int4(), file)
    assert is_page(file)


@needs_browser
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_a_browser_draws_it_without_errors_or_requests(int8_page: str, tmp_path: Path, size: str) -> None:
    file, net = tmp_path / "page.html", tmp_path / "net.json"
    file.write_text(int8_page)
    assert file.stat().st_size < 5 * 2**20
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-quic", "--disable-background-networking", "--disable-component-update"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}", "--virtual-time-budget=20000"),
            *("--enable-logging=stderr", f"--log-net-log={net}", "--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 'data-drawn="yes"' in done.stdout, done.stderr[-2000:]
    assert not re.findall(r"CONSOLE.*", done.stderr)
    # Every chart but the canvas of the timeline is an SVG with its description.
    assert done.stdout.count("<svg") >= 7
    assert 'aria-label="Waterfall of the energy' in done.stdout
    log = json.loads(net.read_text())
    kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [e["params"] for e in log["events"] if e["type"] == kind and "url" in e.get("params", {})]
    # Chromium asks its maker for this and that; what a page asks for has the page as its initiator.
    own = {a["url"] for a in asked if a.get("initiator", "not an origin") != "not an origin"}
    assert {url for url in own if not url.startswith(("file:", "data:", "blob:"))} == set()
