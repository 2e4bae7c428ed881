"""What a run needs of disk and memory, before a model is loaded."""

from types import SimpleNamespace

import pytest

from sd_memguard.errors import ConfigError
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.training import memory_estimate as footprint
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.memory_estimate import SpaceError
from sd_memguard.training.plan import make_plan
from sd_memguard.training.trainer import Trainer


@pytest.mark.parametrize("settings", [{}, {"proxy": "lora", "rank": 3}, {"use_ema": True}])
def test_sizes_from_the_header_are_those_of_the_loaded_model(configure, settings):
    plan = make_plan(configure(**settings))
    trainer = Trainer(plan, make_accelerator(plan.config))
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    assert plan.sizes.trained == 4 * trained
    assert plan.sizes.proxy == 4 * trained * (4 if "use_ema" in settings else 3)
    assert plan.sizes.offloaded == 2 * plan.sizes.proxy + 4 * trained * 2


def free_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


def test_a_disk_too_small_for_the_store_is_refused_before_a_model_is_loaded(run, configure, monkeypatch, tmp_path):
    sizes = make_plan(configure()).sizes
    free_disk(monkeypatch, sizes.result + sizes.offloaded - 1)
    monkeypatch.setattr("sd_memguard.training.build.load_models", None)
    with pytest.raises(SpaceError, match=r"proxy store .* MB, .*fewer `--num_shards`"):
        run(proxy_store="disk")
    (kept,) = (tmp_path / "run" / "memguard").iterdir()
    assert kept.name.startswith("checks-")  # the images need no second check
    make_plan(configure(proxy_store="ram"))


def test_two_checkpoints_must_fit_and_more_are_warned_of(configure, monkeypatch, caplog):
    sizes = make_plan(configure(checkpointing_steps=4)).sizes
    assert sizes.num_checkpoints == 6
    free_disk(monkeypatch, sizes.result + 2 * sizes.checkpoint)
    make_plan(configure(checkpointing_steps=4))
    assert "--checkpoints_total_limit" in caplog.text
    free_disk(monkeypatch, sizes.result + 2 * sizes.checkpoint - 1)
    with pytest.raises(SpaceError):
        make_plan(configure(checkpointing_steps=4))


def test_a_run_that_goes_on_has_one_of_its_two_checkpoints(run, configure, monkeypatch):
    run("before", max_train_steps=4, checkpointing_steps=4)
    longer = {"max_train_steps": 8, "checkpointing_steps": 4, "resume_from_checkpoint": "latest"}
    sizes = make_plan(configure("before", **longer)).sizes
    free_disk(monkeypatch, sizes.result + sizes.checkpoint)
    make_plan(configure("before", **longer))
    with pytest.raises(SpaceError):
        make_plan(configure("new", **longer))
    free_disk(monkeypatch, sizes.result + sizes.checkpoint - 1)
    with pytest.raises(SpaceError):
        make_plan(configure("before", **longer))


def test_memory_too_small_for_the_store_is_refused(configure, monkeypatch):
    monkeypatch.setattr(footprint, "available_memory", lambda: 1)
    with pytest.raises(ConfigError, match="proxy_store disk"):
        make_plan(configure(proxy_store="ram"))


def test_the_room_for_the_result_is_that_of_all_its_files(run, configure):
    settings = {"export_formats": ("single-file", "lora-kohya"), "max_train_steps": 3}
    folder = run(**settings).output_dir
    kept = [path for path in folder.rglob("*.safetensors") if "memguard" not in path.parts]
    written = sum(path.stat().st_size for path in kept)
    assert make_plan(configure("other", **settings)).sizes.result == pytest.approx(written, rel=0.1)


def test_checkpoints_are_counted_as_they_will_be(run):
    folder = run(max_train_steps=5, checkpointing_steps=2).output_dir
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_their_number_is_known_before(configure):
    numbers = [make_plan(configure(max_train_steps=n, checkpointing_steps=2)).sizes.num_checkpoints for n in (3, 4, 5)]
    assert numbers == [2, 2, 3]
    assert make_plan(configure(max_train_steps=5, checkpointing_steps=6)).sizes.num_checkpoints == 0
