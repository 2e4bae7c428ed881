import io
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sd_memguard.assets import BUNDLED, demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.audit import AuditError, generate
from sd_memguard.audit.arguments import parse_arguments
from sd_memguard.audit.collection import read_folder
from sd_memguard.audit.command import main, run_audit
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.features.extractors import make_extractor
from sd_memguard.audit.metrics.background import Gallery, candidates, choose_threshold
from sd_memguard.errors import UserError

DRAWING = ["--num_prompts", "6", "--num_images_per_prompt", "2", "--num_inference_steps", "3", "--num_probes", "12"]
SETS = ["--train_data_dir", BUNDLED, "--reference_data_dir", BUNDLED]


def audit(folder, *flags):
    """Run the audit; returns the report and the rows of the pairs."""
    run_audit(parse_arguments([*flags, "--output_dir", str(folder)]))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report, pq.read_table(folder / "pairs.parquet").to_pylist()


def disguise(image, number):
    """The image after a slight crop at one corner, a resize or strong JPEG compression, or all of them."""
    edge = image.width
    crop, resize, compress = number % 3 != 1, number % 3 != 2, number % 3 != 0
    if crop:
        image = image.crop((1, 1, edge, edge)).resize((edge, edge), Image.Resampling.BICUBIC)
    if resize:
        image = image.resize((2 * edge, 2 * edge), Image.Resampling.BICUBIC)
    if compress:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=60)
        image = Image.open(file).convert("RGB")
    return image


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with ten training images in disguise, hidden among forty that nobody trained on; and their files."""
    folder = tmp_path_factory.mktemp("planted")
    train = read_folder(demo_data_path(), "--train_data_dir")
    heldout = read_folder(demo_heldout_path(), "--reference_data_dir")
    copied = train.distinct[5:500:50]
    for number, row in enumerate(copied):
        disguise(train.image(row), number).save(folder / f"copy-{number}.png")
    for number in range(40):
        heldout.image(4 * number).save(folder / f"new-{number}.png")
    return folder, [train.files[row] for row in copied]


def test_planted_copies_are_found_and_nothing_else(planted, tmp_path):
    folder, files = planted
    report, pairs = audit(tmp_path, "--images", f"mine={folder}", *SETS)
    found = {row["file"].rpartition("/")[2]: row["nearest_file"] for row in pairs if row["is_copy"]}
    assert found == {f"copy-{number}.png": file for number, file in enumerate(files)}
    (model,) = report["models"]
    assert report["threshold"]["source"] == "background"
    assert model["copies"]["given"]["copies"] == 10
    assert model["copies"]["given"]["share"]["value"] == pytest.approx(0.2)
    assert model["copies"]["given"]["share"]["low"] < 0.2 < model["copies"]["given"]["share"]["high"]
    assert model["detection"] is model["membership"] is model["copies"]["given"]["extraction"] is None
    assert model["why_missing"]["detection"] == "images were given, no model"


def test_a_recompressed_copy_does_not_take_the_duplicated_image_out_of_the_audit(tmp_path):
    folder, train = tmp_path / "set", read_folder(demo_data_path(), "--train_data_dir")
    folder.mkdir()
    rows = train.distinct[:60]
    lines = [(f"{row}.png", train.captions[row]) for row in rows]
    for row in rows:
        train.image(row).save(folder / f"{row}.png")
    known, apart = candidates_of(folder, lines, tmp_path / "before")
    duplicated = known.unique[0]  # an image like no other, with a caption of its own
    assert duplicated not in apart
    name, caption = lines[duplicated]
    shutil.copyfile(folder / name, folder / "again.png")
    Image.open(folder / name).convert("RGB").save(folder / "recompressed.jpg", quality=60)
    lines += [("again.png", caption), ("recompressed.jpg", caption)]
    chosen, apart = candidates_of(folder, lines, tmp_path / "after")
    assert chosen.duplicated.count(duplicated) == 1
    assert len(lines) - 1 not in chosen.unique
    assert duplicated not in apart


def candidates_of(folder, lines, cache):
    """Return whose captions could be prompts in a folder of these files and captions, and the near-duplicates."""
    text = "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    train, device = read_folder(folder, "--train_data_dir"), torch.device("cpu")
    gallery = Gallery(train, make_extractor("bundled", None, device), Store(cache), device, 16)
    groups = gallery.groups()
    positions = torch.arange(len(train.distinct))
    threshold = choose_threshold(gallery.match_own(positions).similarity, None).similarity
    like = gallery.match_apart(positions, groups) >= threshold
    return candidates(train, groups, 0), {train.distinct[position] for position in positions[like].tolist()}


def test_a_run_tells_the_history_of_the_nearest_image_and_a_data_set_shows_it(planted, tmp_path):
    """Rows know the run's shard and skips; of a dataset, the images that rows name are put beside the report."""
    folder, _ = planted
    train = read_folder(demo_data_path(), "--train_data_dir")
    rows = train.distinct[:60]
    columns = {"image": [str(demo_data_path() / train.files[row]) for row in rows]}
    columns["text"] = [train.captions[row] for row in rows]
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_path(), model)
    (model / "memguard").mkdir()
    (model / "memguard" / "config.json").write_text("{}")
    (model / "memguard" / "rounds.jsonl").write_text("")
    counts = {name: range(60) for name in ("shard", "seen", "moves")}
    known = {"sample_id": range(60), "file": ["x"] * 60, **counts, "skip_ratio": [row / 60 for row in range(60)]}
    samples = pa.table({name: list(values)[:59] for name, values in known.items()})
    pq.write_table(samples, model / "memguard" / "samples.parquet")
    flags = ["--dataset_name", str(tmp_path / "set"), "--num_prompts", "2", "--num_inference_steps", "2"]
    report, pairs = audit(tmp_path / "out", "--model", str(model), "--images", f"mine={folder}", *flags)
    assert report["threshold"]["rule"].count("training images") == 1
    assert report["reference"] is report["models"][0]["quality"]["kid_reference"] is None
    for row in pairs:
        sample_id = row["nearest_sample_id"]
        assert row["nearest_caption"] == columns["text"][sample_id]
        is_known = row["model"] == "model" and sample_id < 59
        assert (row["shard"], row["moves"]) == ((sample_id, sample_id) if is_known else (None, None))
        with Image.open(tmp_path / "out" / "training" / row["nearest_file"]) as shown:
            assert shown.convert("RGB").tobytes() == train.image(rows[sample_id]).tobytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An audit of the bundled model, which was not trained on the demo's images."""
    folder = tmp_path_factory.mktemp("base")
    return folder, *audit(folder, "--model", f"base={BUNDLED}", *SETS, *DRAWING)


def test_a_model_that_was_not_trained_on_them_sits_at_the_background(base):
    folder, report, pairs = base
    (model,) = report["models"]
    background = report["background"]["reference"]
    assert model["copies"]["all"]["count"] == 2 * 6 * 2
    assert model["num_generated"] == len(pairs) == 3 * 6 * 2
    assert model["verdict"]["level"] == "none"
    assert {one["measure"] for one in model["verdict"]["evidence"]} == {"copies", "nearest", "attributes", "membership"}
    assert model["copies"]["all"]["copies"] == 0
    assert model["copies"]["all"]["captions_copied"] == 0
    assert model["copies"]["all"]["similarity_mean"]["value"] < background["p95"]
    for measure in ("detection", "membership"):
        assert model[measure]["auc"]["low"] <= 0.5 <= model[measure]["auc"]["high"]
    assert model["detection"]["num_train"] == 12
    assert {row["kind"] for row in pairs} == {"duplicated", "unique", "heldout"}
    assert all((folder / row["file"]).is_file() for row in pairs)


def test_rows_say_what_the_report_says(base):
    _, report, pairs = base
    threshold = report["threshold"]["distance"]
    for kind in ("duplicated", "unique", "heldout"):
        rows = [row for row in pairs if row["kind"] == kind]
        figures = report["models"][0]["copies"][kind]
        assert figures["count"] == len(rows)
        assert figures["similarity_mean"]["value"] == pytest.approx(
            np.mean([row["similarity"] for row in rows]), abs=1e-5
        )
        percentile = np.percentile([row["similarity"] for row in rows], 95)
        assert figures["similarity_p95"]["value"] == pytest.approx(percentile, abs=1e-5)
        assert figures["l2_copies"]["value"] == np.mean([row["l2_ratio"] < 0.5 for row in rows])
        assert figures["own_nearest"]["value"] == np.mean([row["is_own_nearest"] for row in rows])
        assert figures["mq_below"]["0.5"] == sum(row["mq_ratio"] < 0.5 for row in rows)
    for row in pairs:
        assert row["is_copy"] == (row["distance"] <= threshold)
        assert row["kind"] == "heldout" or row["own_similarity"] <= row["similarity"] + 1e-6
        assert row["mq_ratio"] <= row["l2_ratio"]
        assert row["skip_ratio"] is None


def test_the_own_image_is_the_nearest_where_no_other_training_image_is_nearer(base):
    """Against distances of all training images, one after the other."""
    folder, _, pairs = base
    train, heldout = read_folder(demo_data_path(), "--t"), read_folder(demo_heldout_path(), "--r")
    pixels = {row: np.asarray(train.image(row), dtype=np.float64) for row in train.distinct}
    for row in [*pairs[:3], *pairs[-3:]]:
        own = heldout if row["kind"] == "heldout" else train
        image = np.asarray(Image.open(folder / row["file"]).convert("RGB"), dtype=np.float64)
        own_distance = np.linalg.norm(np.asarray(own.image(own.files.index(row["own_file"]))) - image)
        distances = [np.linalg.norm(one - image) for one in pixels.values()]
        assert row["is_own_nearest"] == (own_distance <= min(distances) + 1e-3)


def test_background_has_a_row_for_each_image(base):
    folder, report, _ = base
    rows = pq.read_table(folder / "background.parquet").to_pylist()
    for kind in ("train", "reference"):
        similarity = [row["similarity"] for row in rows if row["kind"] == kind]
        assert len(similarity) == report["background"][kind]["count"] == report[kind]["num_distinct"]
        assert report["background"][kind]["mean"] == pytest.approx(np.mean(similarity), abs=1e-5)
    assert all(row["file"] != row["nearest_file"] for row in rows if row["kind"] == "train")


@pytest.fixture
def copying(monkeypatch):
    """A model that replicates its training images of duplicated prompts, and generates noise for the others."""
    train = read_folder(demo_data_path(), "--train_data_dir")
    noise = torch.Generator().manual_seed(0)

    def generate_batch(pipeline, captions, seeds, *settings):
        generated = []
        for caption in captions:
            rows = [row for row, known in enumerate(train.captions) if known == caption]
            image = torch.from_numpy(np.asarray(train.image(rows[0] if rows else 0)).copy())
            generated.append(image if len(rows) > 1 else torch.randint(256, image.shape, generator=noise).byte())
        return torch.stack(generated)

    monkeypatch.setattr(generate, "_generate_batch", generate_batch)
    return train


def test_a_model_that_copies_is_caught(copying, tmp_path):
    report, pairs = audit(tmp_path, "--model", f"thief={BUNDLED}", *SETS, *DRAWING, "--num_probes", "0")
    copies = report["models"][0]["copies"]
    assert copies["duplicated"]["share"]["value"] == copies["duplicated"]["extraction"]["value"] == 1
    assert copies["duplicated"]["captions_copied"] == copies["duplicated"]["captions"] == 6
    assert copies["duplicated"]["l2_copies"]["value"] == 1
    assert copies["unique"]["copies"] == copies["unique"]["captions_copied"] == 0
    assert copies["duplicated"]["own_nearest"]["value"] == 1
    assert report["models"][0]["verdict"]["level"] == "copies"
    for row in (row for row in pairs if row["kind"] != "heldout"):
        own = copying.files.index(row["own_file"])
        assert row["kind"] == ("duplicated" if copying.captions.count(row["caption"]) > 1 else "unique")
        assert copying.captions[own] == row["caption"]
        if row["kind"] == "duplicated":
            assert row["nearest_file"] == row["own_file"]
            assert row["l2_ratio"] == 0
            assert row["own_similarity"] == pytest.approx(1, abs=1e-3)
    assert report["models"][0]["why_missing"]["membership"] == "--num_probes 0"


def contents(folder):
    report = json.loads((folder / "report.json").read_text())
    report.pop("created")
    return report, (folder / "pairs.parquet").read_bytes(), (folder / "background.parquet").read_bytes()


def test_the_same_audit_twice_and_an_interrupted_one_are_the_same(base, monkeypatch):
    folder, *_ = base
    first = contents(folder)
    flags = [*SETS, *DRAWING, "--output_dir", str(folder)]
    monkeypatch.setattr(generate, "_generate_batch", lambda *_: pytest.fail("generated again"))
    main(["--model", f"base={BUNDLED}", *flags])
    assert contents(folder) == first
    monkeypatch.undo()
    # A kill after the first batch leaves its generated images, and nothing of what follows.
    for file in [*(folder / "cache" / "files").iterdir()][:5]:
        file.unlink()
    for file in [*(folder / "cache" / "rows").iterdir()][::2]:
        file.unlink()
    for name in ("report.json", "pairs.parquet", "background.parquet"):
        (folder / name).unlink()
    main(["--model", f"base={BUNDLED}", *flags])
    assert contents(folder) == first


def test_bad_input_is_refused_before_anything_is_done(tmp_path, capsys):
    output = tmp_path / "out"
    model = ["--model", BUNDLED]

    def refuse(message, *flags, sets=tuple(SETS)):
        with pytest.raises(AuditError, match=message):
            run_audit(parse_arguments([*sets, *flags, "--output_dir", str(output)]))

    refuse("there is nothing to audit")
    refuse("as one of `--train_data_dir` and `--dataset_name`", *model, sets=())
    refuse("as one of `--train_data_dir` and `--dataset_name`", *model, "--dataset_name", "x")
    refuse("must have a different name each, bundled is there twice", *model, *model)
    refuse("must have different names, both have a", "--model", f"a={BUNDLED}", "--images", f"a={tmp_path}")
    refuse("letters, digits and ._- in the name", "--model", f"a b={BUNDLED}")
    refuse("is no pipeline", "--model", f"a={tmp_path}")
    refuse("is not a folder", "--images", "nothing")
    refuse("needs `--extractor_weights FILE`", *model, "--extractor", "sscd")
    refuse("`--extractor_sha256` is 12, the weights have", *model, "--extractor_sha256", "12")
    refuse("tells no copies|needs", *model, "--extractor", "inception")
    refuse("holds nothing but training images", *model, "--reference_data_dir", str(demo_data_path()))
    refuse("must not lie in the images' folder", "--images", f"a={tmp_path}")
    assert not output.exists()
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    refuse("holds other files", *model)
    for flag, value in {"num_prompts": "0", "copy_threshold": "2", "resolution": "60", "guidance_scale": "x"}.items():
        with pytest.raises(UserError, match=f"`--{flag}` must be"):
            parse_arguments([*model, *SETS, "--output_dir", str(output), f"--{flag}", value])
    refuse("`--model_card` must be a .md file", *model, "--model_card", str(tmp_path / "nowhere" / "README.md"))
    with pytest.raises(UserError, match="`--output_dir` must be given"):
        parse_arguments([*model, *SETS])
    with pytest.raises(SystemExit):
        parse_arguments([*model, *SETS, "--num_promts", "3"])
    assert "did you mean `--num_prompts`?" in capsys.readouterr().err


def test_a_flag_with_many_values_may_be_given_several_times(tmp_path):
    flags = [*SETS, "--output_dir", str(tmp_path / "out")]
    one = parse_arguments(["--model", f"a={BUNDLED}", "--model", f"b={BUNDLED}", *flags])
    other = parse_arguments(["--model", f"a={BUNDLED}", f"b={BUNDLED}", *flags])
    assert list(one.models) == list(other.models) == ["a", "b"]
