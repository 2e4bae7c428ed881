import json
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_memguard.assets import demo_data_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.metrics.statistics import Estimate
from sd_memguard.audit.report import Comparison, Evidence, Verdict, read_audit, write_audit
from sd_memguard.audit.reporting import thumbnails as report_images
from sd_memguard.audit.reporting.page import write_page
from sd_memguard.audit.reporting.sentences import percent, share_interval, tell
from sd_memguard.audit.reporting.thumbnails import Thumbnails, choose_pairs
from tests.audit.planted_audit import Planted, write_planted_audit


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Return a folder with an audit and its report.json; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("report") / "audit"
    return folder, write_planted_audit(folder)


@pytest.fixture
def own_copy(planted, tmp_path):
    return shutil.copytree(planted[0], tmp_path / "audit")


def page_of(folder, train_data_dir=None):
    return write_page(folder, train_data_dir or demo_data_path()).read_text(encoding="utf-8")


def changed(folder, **changes):
    """Replace parts of the report of an audit by name."""
    audit = read_audit(folder)
    write_audit(audit._replace(report=replace(audit.report, **changes)), folder)


def change_json(folder, where, value):
    """Put a value into report.json at a path of keys."""
    report = json.loads((folder / "report.json").read_text())
    *path, last = where
    target = report
    for key in path:
        target = target[key]
    target[last] = value
    (folder / "report.json").write_text(json.dumps(report))


def test_the_same_files_give_the_same_bytes(planted):
    folder, _ = planted
    first = write_page(folder, demo_data_path()).read_bytes()
    assert write_page(folder, demo_data_path()).read_bytes() == first
    assert len(first) < 1_000_000


def test_everything_is_inside_the_page(planted):
    page = page_of(planted[0])
    for outside in ("http://", "https://", "@import", "url(", "<link", 'src="//'):
        assert outside not in page
    assert "default-src 'none'" in page
    assert page.count("<script") == 2


def test_captions_and_names_cannot_become_markup(own_copy):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 <!-- & \" '"
    image = Image.new("RGB", (8, 8), "red")
    generated = [Planted(hostile, "duplicated", hostile, "0000.png", 1, image)]
    write_planted_audit(own_copy, [generated[0]._replace(model="plain")])
    page = page_of(own_copy)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    change_json(own_copy, ("models", 0, "name"), hostile)
    page = page_of(own_copy)
    block = page.split('id="audit-data">')[1].split("</script>")[0]
    assert json.loads(block)["models"] == [hostile]
    assert "<" not in block
    assert "\u2028" not in block
    assert "<!--" not in page


def test_missing_and_broken_images_are_named_frames(own_copy):
    (own_copy / "generated/plain/00000.png").unlink()
    (own_copy / "generated/plain/00001.png").write_bytes(b"no image")
    page = page_of(own_copy)
    assert "the file is missing" in page
    assert "the file cannot be read as an image" in page
    assert "generated/plain/00000.png" in page
    away = write_page(own_copy, None).read_text()
    assert "the folder of training images is not at hand" in away


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("report.json", None, "must hold an audit, it has no report.json; run `sd-memguard audit`"),
        ("report.json", b"{", "Invalid JSON"),
        ("report.json", b"[]", "report.json cannot be used"),
        ("report.json", b'{"format": "sd-memguard-audit-9"}', "`format`: Input should be 'sd-memguard-audit-2'"),
        ("report.json", b'{"format": "sd-memguard-audit-2"}', "`version`: Field required"),
        ("pairs.parquet", None, "pairs.parquet cannot be used: it is missing"),
        ("pairs.parquet", b"nothing", "it is no table of an audit"),
        ("background.parquet", b"nothing", "background.parquet cannot be used: it is no table of an audit"),
    ],
)
def test_what_cannot_be_shown_is_named_with_a_way_out(own_copy, file, change, message):
    (own_copy / file).unlink()
    if change is not None:
        (own_copy / file).write_bytes(change)
    with pytest.raises(AuditError) as caught:
        write_page(own_copy, demo_data_path())
    assert message in str(caught.value)
    assert "again into this folder" in str(caught.value) or "name another" in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            ("models", 0, "copies", "all", "count"),
            "many",
            "`models.0.copies.all.count`: Input should be a valid integer",
        ),
        (("models", 0, "copies"), [], "`models.0.copies`: Input should be an object"),
        (("threshold", "similarity"), None, "`threshold.similarity`: Input should be a valid number"),
        (("settings",), 3, "`settings`: Input should be an object"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(own_copy, where, value, message):
    change_json(own_copy, where, value)
    with pytest.raises(AuditError) as caught:
        read_audit(own_copy)
    assert message in str(caught.value)


def test_what_is_written_is_read_again(planted):
    """Numbers are kept at six digits, everything else as it is."""
    folder, report = planted
    again = read_audit(folder).report
    assert asdict(again).keys() == asdict(report).keys()
    assert again.models[0].copies["all"].share.value == pytest.approx(report.models[0].copies["all"].share.value, 1e-5)
    assert again.models[0].verdict.level == report.models[0].verdict.level
    assert again.train == report.train


def test_unknown_measures_are_said_to_be_unknown_with_the_reason(own_copy):
    model = read_audit(own_copy).report.models[0]
    model = replace(model, detection=None, why_missing={"detection": "no --reference_data_dir <here>"})
    changed(own_copy, models=(model,))
    page = page_of(own_copy)
    assert page.count("not measured: no --reference_data_dir &lt;here&gt;") == 2
    assert "not measured: no --clip_model" in page
    assert ">nan" not in page.lower()


def test_a_report_of_nothing_is_a_report(own_copy):
    report = read_audit(own_copy).report
    model = replace(report.models[0], copies={}, verdict=Verdict("unknown", ()))
    background = replace(report.background, reference=None)
    changed(own_copy, reference=None, background=background, models=(model,), comparisons=())
    for name in ("pairs.parquet", "background.parquet"):
        pq.write_table(pq.read_table(own_copy / name).slice(0, 0), own_copy / name)
    page = page_of(own_copy)
    assert "Nothing was measured that tells replication." in page
    assert "There are no pairs." in page


def test_pairs_are_worst_first_and_capped_evenly_over_kinds(planted, monkeypatch):
    folder, _ = planted
    monkeypatch.setattr(report_images, "PAIRS_PER_MODEL", 6)
    audit = read_audit(folder)
    shown = choose_pairs(audit, Thumbnails(folder, demo_data_path()))
    assert shown.counts == ((6, 24), (6, 24))
    scores = [pair.row["similarity"] for pair in shown.pairs]
    assert scores == sorted(scores, reverse=True)
    rows = audit.pairs.to_pylist()
    for model in ("plain", "guarded"):
        for kind in ("duplicated", "unique"):
            best = sorted(row["similarity"] for row in rows if (row["model"], row["kind"]) == (model, kind))[-3:]
            own = [p.row["similarity"] for p in shown.pairs if (p.row["model"], p.row["kind"]) == (model, kind)]
            assert own == best[::-1]


def test_a_page_stays_below_eight_megabytes(tmp_path, monkeypatch):
    """Noise is what compresses worst."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (200, 200, 3), dtype=np.uint8)) for _ in range(20)]
    generated = [Planted("plain", "given", "", None, None, image) for image in noise]
    write_planted_audit(tmp_path / "audit", generated)
    monkeypatch.setattr(report_images, "IMAGE_BYTES", 300_000)
    page = page_of(tmp_path / "audit")
    assert 150_000 < len(page) < 350_000
    shown = int(re.search(r"plain (\d+) of 20", page)[1])
    assert page.count('<article class="pair') == shown < 20


def test_transparent_images_are_shown_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert report_images._on_white(image).getpixel((0, 0)) == (255, 255, 255)


def evidence(measure="nearest", kind="duplicated", value=0.5, background=0.05, p_value=0.0002, significant=True):
    around = [Estimate(one, max(one - 0.1, 0), one + 0.1, 32) for one in (value, background, value - background)]
    control = "images of held-out prompts"
    return Evidence(measure, kind, around[0], around[1], control, around[2], p_value, significant)


REPLICATES = Verdict("replicates", (evidence("copies", value=0, significant=False), evidence()))
NOTHING = Verdict("none", (evidence(value=0.08, p_value=0.3, significant=False),))
COPIES = Verdict("copies", (evidence("copies", value=0.4, background=0.01),))
TRAINED = Verdict("trained", (evidence("membership", None, 0.63, 0.5),))


def told(report, verdicts, comparisons=()):
    models = tuple(
        replace(report.models[0], name=name, verdict=verdict, why_missing={}) for name, verdict in verdicts.items()
    )
    return tell(replace(report, models=models, comparisons=comparisons))


@pytest.mark.parametrize(
    ("verdicts", "headline"),
    [
        ({"a": COPIES}, "a returns its training images."),
        ({"a": NOTHING}, "a shows no replication above the background."),
        (
            {"plain": REPLICATES, "guarded": NOTHING},
            "plain replicates its training images; guarded shows no replication above the background.",
        ),
        (
            {"a": TRAINED},
            "a shows no replication above the background, only traces of training.",
        ),
        ({"a": Verdict("unknown", ())}, "Of a nothing was measured that would tell replication."),
        (dict.fromkeys("abcd", NOTHING), "None of the 4 models shows replication above the background."),
        (
            {"a": NOTHING, "b": REPLICATES, "c": NOTHING, "d": COPIES},
            "2 of 4 models replicate their training images: b and d.",
        ),
    ],
)
def test_headlines(planted, verdicts, headline):
    assert told(planted[1], verdicts).headline == headline


def test_of_two_that_replicate_the_lesser_is_named_where_they_differ(planted):
    both = {"plain": REPLICATES, "guarded": REPLICATES}
    difference = Comparison(("plain", "guarded"), "nearest", "duplicated", Estimate(0.37, 0.24, 0.5, 27), 0.0002, True)
    assert told(planted[1], both, (difference,)).headline == (
        "plain replicates its training images; guarded replicates fewer of them."
    )
    alike = replace(difference, is_significant=False)
    assert told(planted[1], both, (alike,)).headline == (
        "plain replicates its training images; guarded replicates its training images."
    )
    assert any("plain is above guarded by 37 percentage points (24 to 50; p < 0.001)" in line
               for line in told(planted[1], both, (difference,)).found)  # fmt: skip


def test_figures_stand_beside_their_background_and_what_is_not_excluded_is_said(planted):
    found = told(planted[1], {"plain": REPLICATES, "guarded": NOTHING})
    assert found.found[0] == (
        "plain: 50% (40% to 60%) of its images of duplicated prompts are nearest to the prompt's own training image; "
        "the background, images of held-out prompts, is 5% (p < 0.001)."
    )
    assert any("guarded" in line and "no more than chance allows (p = 0.300)" in line for line in found.found)
    assert any(line.startswith("guarded: not excluded is that up to 13%") for line in found.sure)
    assert found.remedies != told(planted[1], {"guarded": NOTHING}).remedies
    assert len(found.means) == 2


def test_the_bound_where_none_or_all_are_copies_is_the_binomial_one():
    """With that share, all captions agree in just 5% of the audits."""
    _, high = share_interval(Estimate(0, 0, 0, 16), 16)
    assert (1 - high) ** 16 == pytest.approx(0.05)
    low, top = share_interval(Estimate(1, 1, 1, 16), 16)
    assert low**16 == pytest.approx(0.05)
    assert top == 1
    assert share_interval(Estimate(0, 0, 0.3, 16), 16) == (0, 0.3)
    assert share_interval(Estimate(0.5, 0.4, 0.6, 16), 16) == (0.4, 0.6)


def test_percentages_are_never_rounded_to_none_or_all():
    for count in (1, 7, 64, 5000):
        words = [percent(copies / count) for copies in range(count + 1)]
        assert words[0] == "0%"
        assert words[-1] == "100%"
        assert not {"0%", "100%", "0.0%", "100.0%"} & set(words[1:-1])
