"""Scripts of others under the guard: every loss pattern, neutral to the byte, resumed, and what is refused."""

import json
import logging
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from sd_memguard.errors import ConfigError, LoopError
from sd_memguard.launcher.arguments import parse_command
from sd_memguard.launcher.losses import LossMatcher
from sd_memguard.launcher.scripts import ScriptError
from sd_memguard.launcher.session import Session
from tests.plugin.toy import make_guard, make_loader, make_network

SCRIPT = Path(__file__).parent / "script.py"
GUARD = ["--num_shards", "2", "--steps_per_round", "2", "--skip_threshold", "0.95"]
STEPS = 12


@pytest.fixture
def guarded(pipeline, tmp_path, monkeypatch):
    """Return a function that runs the script under the guard and returns its session."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def run(guard, *flags, output="run", script=SCRIPT):
        where = ["--pretrained_model_name_or_path", str(pipeline), "--output_dir", str(tmp_path / output)]
        session = Session(parse_command([*guard, str(script), *where, "--max_train_steps", str(STEPS), *flags]))
        session.run()
        return session

    return run


@pytest.fixture
def plain(pipeline, tmp_path, monkeypatch):
    """Return a function that runs the script as it is."""

    def run(*flags, output="plain"):
        where = ["--pretrained_model_name_or_path", str(pipeline), "--output_dir", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *where, "--max_train_steps", str(STEPS), *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


PATTERNS = {
    "mean": [],
    "min-snr": ["--snr_gamma", "5"],
    "prior-first": ["--prior", "first"],
    "prior-last-accumulated": ["--prior", "last", "--gradient_accumulation_steps", "3"],
    "prior-min-snr": ["--prior", "first", "--snr_gamma", "5"],
    "ema": ["--use_ema", "--gradient_accumulation_steps", "3"],
}


@pytest.mark.parametrize("flags", PATTERNS.values(), ids=PATTERNS)
def test_a_neutral_guard_leaves_the_script_its_bytes(plain, guarded, tmp_path, flags):
    plain(*flags)
    state = torch.get_rng_state()
    session = guarded(["--memguard", "off"], *flags)

    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    assert torch.equal(torch.get_rng_state(), state)
    assert session.matcher.num_matched == session.matcher.num_forwards == session.guard.attachment.driver.batches_seen


@pytest.mark.parametrize("flags", PATTERNS.values(), ids=PATTERNS)
def test_every_pattern_is_guarded_and_resumes_from_the_scripts_own_checkpoint(guarded, tmp_path, flags):
    session = guarded(GUARD, *flags, "--checkpointing_steps", "5", output="whole")

    driver = session.guard.attachment.driver
    assert session.matcher.num_matched == session.matcher.num_forwards == driver.batches_seen
    assert driver.ensemble.progress.global_step == STEPS
    assert [row["kind"] for row in driver.ensemble.rounds] == ["redistribute", "average", "average"]
    assert int(session.guard.ledger.actions["skipped"].sum()) > 0
    if flags[:1] == ["--use_ema"]:
        return  # the small script keeps no EMA in its checkpoints
    guarded(GUARD, *flags, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-5"))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_what_is_exported_is_the_mean_of_the_proxies(guarded, tmp_path):
    session = guarded(GUARD)

    proxies, plan = session.guard.attachment.ensemble.proxies, session.guard.plan
    exported = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, mean in proxies.aggregate(plan.sizes()).items():
        torch.testing.assert_close(exported[name], mean, rtol=0, atol=0)


def test_a_lora_is_exported_as_the_whole_change(guarded, tmp_path):
    session = guarded(GUARD, "--lora")

    exported = load_file(tmp_path / "run" / "lora.safetensors")
    proxies, adapter = session.guard.attachment.ensemble.proxies, session.guard.attachment.adapter
    missed, total = [], []
    for layer, merged in proxies.merged(session.guard.plan.sizes()).items():
        down, up = exported[f"{layer}.lora_A.weight"], exported[f"{layer}.lora_B.weight"]
        assert len(down) == 4  # rank 2, two shards
        change = merged - adapter.original[layer]
        missed.append((change - up @ down).norm())
        total.append(change.norm())
    assert 0 < torch.stack(missed).norm() < 0.05 * torch.stack(total).norm()


def test_a_weighted_loss_of_single_elements_comes_out_as_that_of_the_clean_samples():
    guard = make_guard(num_shards=1, skip_threshold=1.0)
    network = make_network()
    loader = guard.attach(network, torch.optim.SGD(network.parameters(), lr=0.1), make_loader())
    guard.rules[0].bank.update(torch.arange(8), torch.ones(8) * 5)
    batch = next(iter(loader))
    timesteps = torch.tensor([1, 2, 3, 4])
    output, target = torch.randn(4, 2, 3, 3, requires_grad=True), torch.zeros(4, 2, 3, 3)
    scale = torch.tensor([0.1, 3.0, 3.0, 0.1]).view(4, 1, 1, 1)  # the first and the last are known too well
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    matcher = LossMatcher(guard, torch.nn.functional.mse_loss)
    prediction = output * scale
    matcher._remember(None, (None, timesteps), {}, (prediction,))

    loss = matcher.mse_loss(prediction, target, reduction="none")
    loss = (loss.mean(dim=(1, 2, 3)) * weights).mean()

    losses = prediction.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, (2.0 * losses[1] + 3.0 * losses[2]) / 2)
    assert batch["sample_id"].tolist() == guard.attachment.driver.window.sample_ids


def test_the_folder_of_the_guard_is_written(guarded, tmp_path):
    guarded(GUARD)

    folder = tmp_path / "run" / "memguard"
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_shards"], config["seed"], config["max_train_steps"]) == (2, 0, STEPS)
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 3
    samples = pq.read_table(folder / "samples.parquet").to_pydict()
    assert sum(samples["seen"]) == STEPS * 4
    assert samples["sample_id"] == list(range(16))


def test_uploads_leave_the_folder_of_the_guard_out(guarded, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **settings: uploads.append(settings))
    script = tmp_path / "uploading.py"
    call = "    upload_folder(folder_path='x', ignore_patterns=['step_*'])\n"
    source = SCRIPT.read_text().replace("import os\n", "import os\nfrom huggingface_hub import upload_folder\n", 1)
    script.write_text(
        source.replace("    accelerator.wait_for_everyone()\n", "    accelerator.wait_for_everyone()\n" + call)
    )

    guarded(GUARD, "--checkpointing_steps", "5", script=script)

    names = [path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    sent = list(filter_repo_objects(names, ignore_patterns=uploads[0]["ignore_patterns"]))
    assert "unet/config.json" in sent
    assert "checkpoint-5/unet/config.json" in sent
    assert "memguard/samples.parquet" in names
    assert not any("memguard" in name for name in sent)


def test_libraries_are_as_before_afterwards(guarded):
    before = Accelerator.prepare, torch.nn.functional.mse_loss
    guarded(GUARD)
    assert (Accelerator.prepare, torch.nn.functional.mse_loss) == before


def test_losses_that_cannot_be_seen_stop_the_run_at_its_first_step(guarded):
    with pytest.raises(LoopError, match="has not seen the losses"):
        guarded(GUARD, "--own_loss")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_latents"], "`--cache_latents` cannot be used under the guard: the script pairs cached latents"),
        (["--prediction_type", "sample"], "`--prediction_type sample` cannot be used under the guard"),
    ],
)
def test_flags_under_which_it_cannot_work_are_refused_before_a_model_is_loaded(guarded, monkeypatch, flags, message):
    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", None)
    with pytest.raises(ScriptError, match=message):
        guarded(GUARD, *flags)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "from diffusers import FluxTransformer2DModel",
            "trains FluxTransformer2DModel, whose losses do not come from",
        ),
        ("UNet2DConditionModel; Accelerator", "does not use torch's mse_loss"),
        ("print('nothing')", "does not use a Stable Diffusion"),
        ("UNet2DConditionModel = Accelerator = mse_loss = 0", "so that nothing was guarded"),
    ],
)
def test_other_scripts_are_refused(guarded, tmp_path, source, message):
    script = tmp_path / "other.py"
    script.write_text(source)
    with pytest.raises(ScriptError, match=message):
        guarded(GUARD, script=script)


def test_more_shards_than_samples_are_refused(guarded):
    with pytest.raises(ScriptError, match="between 1 and the number of samples"):
        guarded(["--num_shards", "17"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "2", "2 processes were launched"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "configured for DEEPSPEED"),
    ],
)
def test_several_processes_are_refused(guarded, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ScriptError, match=message):
        guarded(GUARD)


def test_a_script_that_is_not_among_the_tested_ones_is_named(guarded, caplog):
    with caplog.at_level(logging.WARNING, logger="sd_memguard"):
        guarded(["--memguard", "off"])
    assert "script.py is not among the tested scripts" in caplog.text


def test_everything_after_the_script_is_its_own():
    command = parse_command(["--num_shards", "3", "--preset", "paper", str(SCRIPT), "--num_shards", "9", "other.py"])

    assert command.guard.num_shards == 3
    assert command.guard.bank_mode == "paper"
    assert command.arguments == ["--num_shards", "9", "other.py"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_shards", "2"], "no script is named"),
        (["nowhere.py"], "nowhere.py does not exist"),
        (["--num_shards", "0", str(SCRIPT)], "`--num_shards` must be"),
    ],
)
def test_command_lines_that_cannot_be_run(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_command(argv)


def test_a_flag_of_the_script_before_it_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_command(["--num_shard", "2", str(SCRIPT)])
    assert "unknown argument `--num_shard` before the script" in capsys.readouterr().err


def test_rows_are_found_by_memory():
    output = torch.randn(6, 2, 3, 3)
    matcher = LossMatcher(guard=None, plain_mse_loss=torch.nn.functional.mse_loss)
    matcher._remember(None, (None, torch.arange(6)), {}, (output,))
    first, second = torch.chunk(output, 2)

    assert matcher._first_row(output.float()) == matcher._first_row(first) == 0
    assert matcher._first_row(second.float()) == 3
    assert matcher._first_row(output.clone()) is None
    assert torch.equal(matcher.mse_loss(output.clone(), output), torch.tensor(0.0))
