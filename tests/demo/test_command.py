import json

import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_memguard.audit.report import read_audit
from sd_memguard.demo import command as demo
from sd_memguard.errors import UserError


def test_two_equal_models_come_out_equal_twice_in_one_folder(quick, tmp_path, capsys):
    folder = tmp_path / "runs" / "demo"
    for _ in range(2):
        demo.main(["--output_dir", str(folder), "--num_images_per_prompt", "2"])
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*demo.MODELS, "audit", "compare.png", "results.json", demo.MARKER]
    )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["models"]["plain"] == results["models"]["guarded"]
    assert results["verdict"]["plain"] == results["verdict"]["guarded"]
    rows = pq.read_table(folder / "audit" / "pairs.parquet").to_pylist()
    halves = [[row | {"model": "", "file": ""} for row in rows if row["model"] == model] for model in demo.MODELS]
    assert halves[0] == halves[1]
    assert len(halves[0]) == 3 * 3 * 2
    for kind in demo.KINDS:
        own = [row["is_own_nearest"] for row in halves[0] if row["kind"] == kind]
        assert results["models"]["plain"][kind]["own_nearest"] == pytest.approx(sum(own) / 6)
    assert not any(one.is_significant for one in read_audit(folder / "audit").report.comparisons)
    with Image.open(folder / "compare.png") as image:
        assert image.width == 1280
    printed = capsys.readouterr().out
    assert printed.count("Replacing the earlier demonstration") == 1
    assert str(folder / "compare.png") in printed
    page = folder / "audit" / "report.html"
    assert str(page) in printed
    assert "<html" in page.read_text(encoding="utf-8")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="`--output_dir` must be new, empty or an earlier demonstration"):
        demo.main(["--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="is a file"):
        demo.main(["--output_dir", str(tmp_path / "plain" / "thesis.txt")])
    assert (tmp_path / "plain" / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demonstration_is_cleared_of_its_own_files_only(tmp_path, capsys):
    demo.prepare_folder(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model_index.json").write_text("{}")
    (tmp_path / "compare.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    demo.prepare_folder(tmp_path)
    assert "Replacing" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", demo.MARKER]


def test_a_linked_model_folder_is_unlinked_not_emptied(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "demo"
    kept.mkdir()
    (kept / "model_index.json").write_text("{}")
    demo.prepare_folder(folder)
    (folder / "plain").symlink_to(kept, target_is_directory=True)
    demo.prepare_folder(folder)
    assert not (folder / "plain").exists()
    assert (kept / "model_index.json").exists()


def test_flags_out_of_range_are_refused(capsys):
    for flags in (["--num_images_per_prompt", "0"], ["--max_train_steps", "many"]):
        with pytest.raises(UserError, match=flags[0]):
            demo.parse_arguments(flags)
    with pytest.raises(SystemExit) as end:
        demo.parse_arguments(["--steps", "3"])
    assert end.value.code == 2
    assert "--steps" in capsys.readouterr().err
