"""The report as a browser shows it: counts, filters, widths, and that nothing in a caption runs or leaves the page."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sd_memguard.assets import demo_data_path
from sd_memguard.audit.reporting.page import write_page
from tests.audit.planted_audit import planted_generated, write_planted_audit

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>\u2028<!--"
LONG = "nobreak" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generated = planted_generated(num_captions=8)
    generated[0] = generated[0]._replace(caption=HOSTILE)
    generated[1] = generated[1]._replace(caption=LONG)
    folder = tmp_path_factory.mktemp("page") / "audit"
    write_planted_audit(folder, generated)
    write_page(folder, demo_data_path())
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(folder, browser):
    """Return a function that opens the report, and holds it to making no noise: errors, dialogs, requests."""
    contexts, noise = [], []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
        address = (folder / "report.html").as_uri()
        page.on(
            "request",
            lambda request: request.url in (address,) or request.url.startswith("data:") or noise.append(request.url),
        )
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []


def slide(page, threshold):
    page.locator("#threshold").fill(f"{threshold:.3f}")


def expected_copies(folder, threshold):
    """Return the copies of each model and kind, counted from the file."""
    pairs = pq.read_table(folder / "pairs.parquet")
    copies = pc.greater_equal(pairs["similarity"], pa.scalar(threshold, pa.float32()))
    table = (
        pairs.append_column("copy", pc.cast(copies, pa.int64()))
        .group_by(["model", "kind"])
        .aggregate([("copy", "sum")])
    )
    return {(row["model"], row["kind"]): row["copy_sum"] for row in table.to_pylist()}


def shown_copies(page):
    models = ["plain", "guarded"]
    found = page.locator("[data-copies]").evaluate_all("all => all.map(e => [e.dataset.copies, e.textContent])")
    return {(models[int(key.split(".")[0])], key.split(".")[1]): int(text) for key, text in found}


def test_the_slider_recounts_copies(open_page, folder):
    page = open_page()
    stated = shown_copies(page)
    static = page.locator("[data-share]").all_text_contents()
    seen = set()
    for threshold in (0.65, 0.7, 0.8, 0.9, 0.999):
        slide(page, threshold)
        assert shown_copies(page) == expected_copies(folder, threshold)
        marked = page.locator(".pair.is-copy").count()
        assert marked == sum(expected_copies(folder, threshold).values())
        rows = pq.read_table(folder / "background.parquet")
        heldout = rows.filter(pc.equal(rows["kind"], "reference"))["similarity"].to_numpy()
        share = np.mean(heldout >= np.float32(threshold))
        text = page.locator("[data-background=reference]").text_content()
        assert abs(float(text.rstrip("%").split()[-1]) / 100 - share) < 0.006
        seen.add(page.locator(".plot .line").first.get_attribute("x1"))
    assert len(seen) == 5
    page.locator("#reset").click()
    assert shown_copies(page) == stated
    assert page.locator("[data-share]").all_text_contents() == static
    assert page.locator("#reset").is_disabled()


def test_the_slider_obeys_the_keyboard(open_page):
    page = open_page()
    before = float(page.locator("#threshold-value").text_content())
    page.locator("#threshold").focus()
    page.keyboard.press("ArrowLeft")
    assert float(page.locator("#threshold-value").text_content()) == pytest.approx(before - 0.001, abs=6e-4)
    assert page.locator("#reset").is_enabled()


def test_filters_leave_what_was_asked_for(open_page):
    page = open_page()
    page.locator("#filter-model").select_option("1")
    page.locator("#filter-kind").select_option("unique")
    shown = page.locator(".pair:visible")
    assert shown.evaluate_all("all => all.map(e => e.dataset.model + e.dataset.kind)") == ["1unique"] * 16
    assert page.locator("#filtered").text_content() == "16 of 16 pairs"
    page.locator("#filter-copies").check()
    assert (
        page.locator(".pair:visible").count() == page.locator(".pair.is-copy[data-model='1'][data-kind=unique]").count()
    )
    slide(page, 0.5)
    assert (
        page.locator(".pair:visible").count()
        == page.locator(".pair.is-copy[data-model='1'][data-kind=unique]").count()
        > 0
    )


def test_more_pairs_are_shown_on_request(open_page):
    page = open_page()
    assert page.locator(".pair:visible").count() == 24
    page.locator("#more").click()
    assert page.locator(".pair:visible").count() == 48
    page.locator("#more").click()
    assert page.locator(".pair:visible").count() == 64
    assert page.locator("#more").is_hidden()


def test_a_hostile_caption_is_only_text(open_page):
    page = open_page()
    page.wait_for_timeout(50)
    assert page.locator("h3", has_text="<script>alert(1)</script>").count() == 1
    assert page.locator("img:not([src^='data:'])").count() == 0


def test_images_are_decoded_under_the_content_policy(open_page):
    page = open_page()
    page.locator("#more").click()
    sizes = page.locator("img").evaluate_all("all => all.map(e => [e.complete, e.naturalWidth, e.alt.length > 0])")
    assert sizes
    assert all(complete and width and named for complete, width, named in sizes)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(open_page, width):
    page = open_page(viewport={"width": width, "height": 800})
    page.locator("#more").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_either_scheme(open_page, scheme):
    """The contrast of WCAG 2.1, level AA: 4.5 for text."""
    page = open_page(color_scheme=scheme)
    colours = page.evaluate(
        """() => Object.fromEntries(['page', 'sheet', 'ink', 'muted', 'copy'].map((name) => {
            const probe = document.createElement('i');
            document.body.append(probe);
            probe.style.color = `var(--${name})`;
            return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)];
        }))"""
    )

    def luminance(name):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colours[name]) / 255]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for text in ("ink", "muted", "copy"):
        for ground in ("page", "sheet"):
            darker, lighter = sorted((luminance(text), luminance(ground)))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


def test_without_javascript_the_numbers_are_there(open_page, folder):
    page = open_page(java_script_enabled=False)
    text = page.inner_text("body")
    pairs = pq.read_table(folder / "pairs.parquet", filters=[("model", "=", "plain"), ("kind", "=", "duplicated")])
    copies = pc.sum(pairs["is_copy"]).as_py()
    assert 0 < copies < 16
    assert f"{copies} of 16 are copies" in text
    assert "0 of 16 are copies" in text
    assert "plain returns its training images; guarded shows no replication above the background." in text
    assert "What you can do" in text
    for control in ("#threshold-bar", "#filters", "#more"):
        assert page.locator(control).is_hidden()
    assert page.locator(".pair:visible").count() == 64


def test_print_shows_every_pair_and_no_controls(open_page):
    page = open_page()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator(".pair:visible").count() == 64
    assert page.locator("#threshold-bar").is_hidden()
