"""What came in with models, checkpoints and data does not run."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from sd_memguard.flags import parse_train_args
from sd_memguard.runs.checkpoint import MANIFEST, _fingerprint, list_checkpoints

SHORT = {"max_train_steps": 6, "checkpointing_steps": 3}


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "it-ran"


@pytest.fixture
def payload(mark) -> bytes:
    content = pickle.dumps(Payload(mark))
    pickle.loads(content)
    mark.rmdir()  # the payload works
    return content


def refused(action, *args, **settings) -> None:
    """Call something that must fail, in whatever way a broken file makes it fail."""
    with pytest.raises(Exception):  # noqa: B017, PT011
        action(*args, **settings)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_no_file_of_a_pipeline_runs(run, pipeline, payload, mark, tmp_path):
    for number, name in enumerate(files_of(pipeline)):
        folder = Path(shutil.copytree(pipeline, tmp_path / f"pipeline-{number}"))
        (folder / name).write_bytes(payload)
        if name in {"tokenizer/special_tokens_map.json", "scheduler/scheduler_config.json"}:
            continue  # may be read late or not at all
        refused(run, f"run-{number}", pretrained_model_name_or_path=str(folder), max_train_steps=3)
    assert not mark.exists()


def test_pickles_beside_the_weights_are_not_touched(run, pipeline, payload, mark, tmp_path):
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / part / f"{name}.bin").write_bytes(payload)
        (folder / part / "pytorch_model.bin").write_bytes(payload)
        (folder / part / f"{part}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    run(pretrained_model_name_or_path=str(folder), max_train_steps=3)
    assert not mark.exists()


def test_no_file_of_a_checkpoint_runs(run, payload, mark, tmp_path):
    folder = run("whole", **SHORT).output_dir
    (folder / "memguard/summary.json").unlink(missing_ok=True)
    checkpoint = list_checkpoints(folder)[-1]
    for number, name in enumerate(file for file in files_of(checkpoint) if file != MANIFEST):
        run_folder = tmp_path / f"copy-{number}"
        copy = Path(shutil.copytree(checkpoint, run_folder / checkpoint.name))
        (copy / name).write_bytes(payload)
        # As one who plants it would: the manifest names the new content.
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest[name] = _fingerprint(copy / name)
        (copy / MANIFEST).write_text(json.dumps(manifest))
        if name.startswith("memguard/"):
            refused(run, run_folder, **SHORT, resume_from_checkpoint="latest")
        else:  # the aggregate is for the user, not read again
            run(run_folder, **SHORT, resume_from_checkpoint="latest")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "secret-03.png", "secret-03.txt"]
)
def test_no_file_of_a_data_set_runs(run, images, payload, mark, tmp_path, name):
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    if name.startswith("metadata"):
        (folder / "metadata.jsonl").unlink()
    (folder / name).write_bytes(payload)
    if name == "secret-03.txt":
        run(train_data_dir=str(folder), max_train_steps=3)  # a text beside an image that the metadata name
    else:
        refused(run, train_data_dir=str(folder), max_train_steps=3)
    assert not mark.exists()


def test_a_loading_script_of_a_data_set_does_not_run(run, mark, tmp_path):
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    refused(run, train_data_dir=None, dataset_name=str(folder), max_train_steps=3)
    assert not mark.exists()


def test_no_configuration_file_runs(payload, mark, tmp_path):
    texts = {
        "pickle.json": payload,
        "pickle.yaml": payload,
        "tag.yaml": f"train_data_dir: !!python/object/apply:os.mkdir ['{mark}']\n".encode(),
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit):
            parse_train_args(["--config", str(tmp_path / name)])
    assert not mark.exists()


def test_the_hub_token_stays_out_of_every_file(run, caplog, capsys, monkeypatch):
    token = "hf_" + "s3cr3t" * 5
    monkeypatch.setattr("sd_memguard.training.trainer.push_to_hub", lambda *_: None)
    result = run(hub_token=token, push_to_hub=True, **SHORT)
    written = b"".join(path.read_bytes() for path in result.output_dir.rglob("*") if path.is_file())
    shown = "".join([caplog.text, *capsys.readouterr()])
    assert token.encode() not in written
    assert token not in shown
