import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_memguard.assets import demo_data_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.reporting import thumbnails as report_images
from sd_memguard.audit.reporting.page import write_report
from sd_memguard.audit.reporting.read import Audit, Background, Copies, Estimate, Model, read_audit
from sd_memguard.audit.reporting.sentences import percent, share_interval, verdict
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
    return write_report(folder, train_data_dir or demo_data_path()).read_text(encoding="utf-8")


def make_copies(count, copies, captions, low=None, high=None):
    value = copies / count
    share = Estimate(value, value if low is None else low, value if high is None else high, captions)
    return Copies(count, copies, share, captions, 0, None, None, None, None, {})


def make_audit(models, reference=0.012, train=0.03):
    """Return an audit of nothing but counts: {model: {kind: Copies}}."""
    background = {"reference": reference, "train": train}
    entries = tuple(Model(name, "model", "", None, 1, None, copies, {}, (), {}) for name, copies in models.items())
    summaries = {kind: Background(257, 0.5, 0.6, 0.9, share) for kind, share in background.items() if share is not None}
    return Audit("1", "", "", None, summaries, entries, {}, None, None)


def test_the_same_files_give_the_same_bytes(planted):
    folder, _ = planted
    first = write_report(folder, demo_data_path()).read_bytes()
    assert write_report(folder, demo_data_path()).read_bytes() == first
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
    report = json.loads((own_copy / "report.json").read_text())
    report["models"][0]["name"] = hostile
    (own_copy / "report.json").write_text(json.dumps(report))
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
    away = write_report(own_copy, None).read_text()
    assert "the folder of training images is not at hand" in away


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("report.json", None, "must hold an audit, it has no report.json; run `sd-memguard audit`"),
        ("report.json", b"{", "it is not JSON"),
        ("report.json", b"[]", "`the file` must be an object"),
        (
            "report.json",
            b'{"format": "sd-memguard-audit-9"}',
            "`format` must be sd-memguard-audit-1, got sd-memguard-aud",
        ),
        ("report.json", b'{"format": "sd-memguard-audit-1"}', "`threshold` is missing"),
        ("pairs.parquet", None, "pairs.parquet cannot be shown: it is missing"),
        ("pairs.parquet", b"nothing", "it is not a parquet file"),
        ("background.parquet", b"nothing", "background.parquet cannot be shown: it is not a parquet file"),
    ],
)
def test_what_cannot_be_shown_is_named_with_a_way_out(own_copy, file, change, message):
    (own_copy / file).unlink()
    if change is not None:
        (own_copy / file).write_bytes(change)
    with pytest.raises(AuditError) as caught:
        write_report(own_copy, demo_data_path())
    assert message in str(caught.value)
    assert "again into this folder" in str(caught.value) or "name another" in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("models", 0, "copies", "all", "count"), "many", "`models[0].copies.all.count` must be a whole number"),
        (("models", 0, "copies"), [], "`models[0].copies` must be an object"),
        (("models",), [], "`models` must name at least one model"),
        (("threshold", "similarity"), None, "`threshold.similarity` must be a number"),
        (("settings",), 3, "`settings` must be an object"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(own_copy, where, value, message):
    report = json.loads((own_copy / "report.json").read_text())
    *path, last = where
    target = report
    for key in path:
        target = target[key]
    target[last] = value
    (own_copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(AuditError) as caught:
        read_audit(own_copy)
    assert message in str(caught.value)


def test_unknown_measures_are_said_to_be_unknown_with_the_reason(own_copy):
    report = json.loads((own_copy / "report.json").read_text())
    report["models"][0] |= {"detection": None, "why_missing": {"detection": "no --reference_data_dir <here>"}}
    report["models"][0]["quality"]["kid_train"]["value"] = float("nan")
    report |= {"reference": None, "background": {"train": report["background"]["train"], "reference": None}}
    (own_copy / "report.json").write_text(json.dumps(report))
    page = page_of(own_copy)
    assert page.count("not measured: no --reference_data_dir &lt;here&gt;") == 2
    assert "not measured: no --clip_model" in page
    assert ">nan" not in page.lower()


def test_a_report_of_nothing_is_a_report(own_copy):
    report = json.loads((own_copy / "report.json").read_text())
    report |= {"background": {"train": None, "reference": None}, "models": [report["models"][0] | {"copies": {}}]}
    report["threshold"]["similarity"] = 1.0
    (own_copy / "report.json").write_text(json.dumps(report))
    for name in ("pairs.parquet", "background.parquet"):
        pq.write_table(pq.read_table(own_copy / name).slice(0, 0), own_copy / name)
    page = page_of(own_copy)
    assert "Nothing was generated, so nothing can be said about copies." in page
    assert "There are no pairs." in page


def test_rows_without_a_similarity_are_refused(own_copy):
    pairs = pq.read_table(own_copy / "pairs.parquet")
    index = pairs.column_names.index("similarity")
    pairs = pairs.set_column(index, "similarity", pa.nulls(len(pairs), pa.float32()))
    pq.write_table(pairs, own_copy / "pairs.parquet")
    with pytest.raises(AuditError, match="it has rows without similarity; run `sd-memguard audit` again"):
        read_audit(own_copy)


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


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (
            {"plain": {"duplicated": (64, 49, 16, 0.6, 0.9)}, "guarded": {"duplicated": (64, 0, 16)}},
            "plain copies in 77% of its generated images of duplicated prompts (49 of 64); "
            "guarded in none of 64 (at most 17% at 95% confidence).",
        ),
        (
            {"mine": {"unique": (200, 0, 200)}},
            "No copy was found among the 200 generated images of unique prompts of mine "
            "(at 95% confidence, at most 1% are copies).",
        ),
        (
            {"mine": {"duplicated": (64, 1, 64, 0.0, 0.05)}},
            "mine copies in 2% of its generated images of duplicated prompts (1 of 64; 95% interval 0% to 5%).",
        ),
        (
            {"a": {"duplicated": (10, 1, 10)}, "b": {"given": (20, 5, 20)}},
            "a copies in 10% of its generated images of duplicated prompts (1 of 10); b copies in 25% of its given "
            "images (5 of 20).",
        ),
        (
            {name: {"duplicated": (10, copies, 10)} for name, copies in zip("abcd", (3, 0, 10, 5), strict=True)},
            "4 models copy in between 0% (b) and 100% (c) of their generated images of duplicated prompts.",
        ),
        ({"a": {}}, "Nothing was generated, so nothing can be said about copies."),
    ],
)
def test_verdicts(models, sentence):
    audit = make_audit(
        {name: {kind: make_copies(*numbers) for kind, numbers in kinds.items()} for name, kinds in models.items()}
    )
    assert verdict(audit).sentence == sentence


def test_the_verdict_is_put_into_scale():
    plain = {"duplicated": make_copies(64, 49, 16, 0.6, 0.9), "unique": make_copies(64, 1, 16, 0.0, 0.05)}
    guarded = {"duplicated": make_copies(64, 0, 16), "unique": make_copies(64, 1, 16, 0.0, 0.05)}
    scale = verdict(make_audit({"plain": plain, "guarded": guarded})).scale
    assert scale[0].startswith("For scale: of 257 images that were not trained on, 1% are as similar to a training")
    assert (
        scale[1] == "plain copies in 2% of its generated images of unique prompts (1 of 64); guarded in 2% (1 of 64)."
    )
    assert scale[-1].startswith("No copy found does not mean that there is none")
    assert not any("overlap" in line for line in scale)
    none = verdict(make_audit({"plain": plain}, reference=None, train=None)).scale
    assert none[0] == "No background was measured to set this against."


def test_what_the_intervals_do_not_carry_is_said():
    few = {"duplicated": make_copies(64, 3, 16, 0.0, 0.1)}
    scale = verdict(make_audit({"a": few, "b": {"duplicated": make_copies(64, 0, 16)}})).scale
    assert "The copies of a are not clearly more than near-duplicates make in that background." in scale
    assert any(line.startswith("The intervals of a and b overlap") for line in scale)


def test_the_bound_where_none_or_all_are_copies_is_the_binomial_one():
    """With that share, all captions agree in just 5% of the audits."""
    _, high = share_interval(0, Estimate(0, 0, 0, 16), 16)
    assert (1 - high) ** 16 == pytest.approx(0.05)
    low, top = share_interval(1, None, 16)
    assert low**16 == pytest.approx(0.05)
    assert top == 1
    assert share_interval(0, Estimate(0, 0, 0.3, 16), 16) == (0, 0.3)
    assert share_interval(0.5, Estimate(0.5, 0.4, 0.6, 16), 16) == (0.4, 0.6)


def test_percentages_are_never_rounded_to_none_or_all():
    for count in (1, 7, 64, 5000):
        words = [percent(copies / count) for copies in range(count + 1)]
        assert words[0] == "0%"
        assert words[-1] == "100%"
        assert not {"0%", "100%", "0.0%", "100.0%"} & set(words[1:-1])
