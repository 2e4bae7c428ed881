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
from sd_memguard.inspection.command import main as inspect
from sd_memguard.launcher.arguments import parse_command
from sd_memguard.launcher.scripts import ScriptError
from sd_memguard.launcher.session import Session

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
    "own-loss": ["--own_loss"],
}


@pytest.mark.parametrize("flags", PATTERNS.values(), ids=PATTERNS)
def test_a_neutral_guard_leaves_the_script_its_bytes(plain, guarded, tmp_path, flags):
    plain(*flags)
    state = torch.get_rng_state()
    session = guarded(["--memguard", "off"], *flags)

    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    assert torch.equal(torch.get_rng_state(), state)
    driver = session.guard.attachment.driver
    assert driver.losses_seen == driver.batches_seen == driver.samples_judged // 4 >= STEPS


@pytest.mark.parametrize("flags", PATTERNS.values(), ids=PATTERNS)
def test_every_pattern_is_guarded_and_resumes_from_the_scripts_own_checkpoint(guarded, tmp_path, flags):
    session = guarded(GUARD, *flags, "--checkpointing_steps", "5", output="whole")

    driver = session.guard.attachment.driver
    assert driver.losses_seen == driver.batches_seen
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
    proxies = session.guard.attachment.ensemble.proxies
    missed, total = [], []
    for layer, parts in proxies.changes(session.guard.plan.sizes()).items():
        down, up = exported[f"{layer}.lora_A.weight"], exported[f"{layer}.lora_B.weight"]
        assert len(down) == 4  # rank 2, two shards
        change = (parts.up @ parts.down).float()
        missed.append((change - up @ down).norm())
        total.append(change.norm())
    assert 0 < torch.stack(missed).norm() < 0.05 * torch.stack(total).norm()


def test_one_shard_keeps_the_script_as_it_is(plain, guarded, tmp_path):
    plain()
    session = guarded(["--num_shards", "1", "--skip_threshold", "1e-9", "--group_duplicates", "off"])

    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    ledger = session.guard.ledger
    assert int(ledger.seen.sum()) == STEPS * 4
    assert set(ledger.seen.tolist()) == {3}  # three epochs


def test_objects_that_are_prepared_one_by_one_are_guarded_without_numbers(plain, guarded, tmp_path):
    plain("--one_by_one")
    guarded(["--skip_threshold", "1e-9"], "--one_by_one")
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")

    session = guarded(["--skip_threshold", "0.95"], "--one_by_one", output="skipping")
    assert not session.guard.has_ids
    assert session.guard.attachment.driver.losses_seen == STEPS
    assert weights(tmp_path / "skipping") != weights(tmp_path / "plain")


def test_latents_that_are_cached_by_step_leave_the_samples_unknown(guarded, tmp_path, caplog):
    script = tmp_path / "caching.py"
    script.write_text(SCRIPT.read_text() + "\n# latents_cache[step]\n")
    with caplog.at_level(logging.WARNING, logger="sd_memguard"):
        session = guarded(["--skip_threshold", "0.95"], "--cache_latents", script=script)

    assert not session.guard.has_ids
    assert session.guard.attachment.driver.samples_judged == STEPS * 4
    config = json.loads((tmp_path / "run" / "memguard" / "config.json").read_text())
    assert "pairs cached latents with batches by their position" in config["notices"][0]
    assert config["notices"][0] in caplog.text
    with pytest.raises(ScriptError, match=r"`--num_shards 2` cannot be had: the script pairs cached latents"):
        guarded(GUARD, "--cache_latents", script=script)


def test_a_script_without_accelerate_is_guarded_where_it_calls_its_denoiser(guarded, tmp_path):
    script = tmp_path / "bare.py"
    script.write_text(BARE)
    session = guarded(["--skip_threshold", "0.95", "--denoiser", "Net"], script=script)

    driver = session.guard.attachment.driver
    assert driver.samples_judged == 10 * 4
    assert driver.samples_skipped > 0
    summary = json.loads((tmp_path / "run" / "memguard" / "summary.json").read_text())
    assert (summary["global_step"], summary["samples_judged"]) == (10, 40)


BARE = """
import argparse, torch
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.parse_known_args()
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def forward(self, x, timesteps):
        return self.layer(x)
torch.manual_seed(0)
net = Net()
trained = torch.nn.Embedding(2, 2) if "textual" in __file__ else net
optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
for _ in range(10):
    x = torch.randn(4, 4)
    net(x, torch.randint(20, (4,))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_script_that_trains_another_module_is_refused_at_its_first_call(guarded, tmp_path):
    script = tmp_path / "textual.py"
    script.write_text(BARE)
    with pytest.raises(LoopError, match="Net stays as it is"):
        guarded(["--denoiser", "Net"], script=script)


def test_a_longer_run_goes_on_and_a_shorter_one_is_refused(guarded, tmp_path):
    guarded(GUARD, "--checkpointing_steps", "12", output="first")
    checkpoint = str(tmp_path / "first" / "checkpoint-12")
    session = guarded(GUARD, "--resume_from_checkpoint", checkpoint, "--max_train_steps", "21")
    assert session.guard.attachment.ensemble.progress.global_step == 21
    with pytest.raises(LoopError, match=r"12 there, 11 here"):
        guarded(GUARD, "--resume_from_checkpoint", checkpoint, "--max_train_steps", "11")


def test_the_folder_of_the_guard_is_written(guarded, tmp_path):
    guarded(GUARD)

    folder = tmp_path / "run" / "memguard"
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_shards"], config["seed"], config["max_train_steps"]) == (2, 0, STEPS)
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 3
    samples = pq.read_table(folder / "samples.parquet").to_pydict()
    assert sum(samples["seen"]) == STEPS * 4
    assert samples["sample_id"] == list(range(16))


def test_inspect_tells_of_a_run_of_the_launcher_what_is_so(guarded, tmp_path, capsys):
    guarded(GUARD, "--lora")
    capsys.readouterr()

    assert not inspect([str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "How it ended" in shown
    assert f"{STEPS} steps over all shards" in shown  # the script has no flag of its batch size
    assert not [wrong for wrong in ("interrupted", "all UNet weights", "under way", "None") if wrong in shown]


def test_what_was_done_is_said_where_the_script_disables_logging(guarded, caplog):
    caplog.set_level("INFO")
    logging.disable(logging.WARNING)
    try:
        guarded(GUARD)
        assert logging.root.manager.disable == logging.WARNING
    finally:
        logging.disable(logging.NOTSET)
    assert f"{STEPS} steps, {STEPS} batches judged" in caplog.text


def test_samples_that_wait_for_a_copy_are_not_counted_as_skipped(guarded, tmp_path, caplog):
    caplog.set_level("INFO")
    script = tmp_path / "images.py"
    source = SCRIPT.read_text()
    for old, new in TRANSFORMED.items():
        assert old in source
        source = source.replace(old, new, 1)
    script.write_text(source)
    guard = [*GUARD, "--skip_threshold", "1e-9", "--augment_threshold", "1e9"]
    driver = guarded(guard, script=script).guard.attachment.driver

    summary = json.loads((tmp_path / "run" / "memguard" / "summary.json").read_text())
    judged = STEPS - driver.copies_seen
    assert summary["samples_judged"] == judged * 4 < STEPS * 4
    assert summary["samples_skipped"] == 0 < summary["samples_to_augment"] < summary["samples_judged"]
    assert f"{STEPS} steps, {judged} batches judged, 0 of {judged * 4} samples skipped (0%), " in caplog.text
    assert f"{summary['samples_to_augment']} to augment, {driver.copies_seen} batches of copies, " in caplog.text
    assert f"{summary['empty_steps']} steps not taken since no sample of theirs was kept" in caplog.text


TRANSFORMED = {
    "class Latents": "from torchvision import transforms\n\n\nclass Latents",
    "    def __len__": "        self.transform = transforms.Compose([transforms.ToTensor()])\n\n    def __len__",
    '        return {"latents": self.latents[index],': (
        "        image = transforms.functional.to_pil_image(self.latents[index, :3])\n"
        "        pixels = self.transform(image)\n"
        '        return {"latents": torch.cat([pixels, pixels[:1]]),'
    ),
}
"""What gives the script's dataset images with a transform of its own, which can be augmented."""


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
    before = Accelerator.prepare, Accelerator.wait_for_everyone, torch.nn.functional.mse_loss
    guarded(GUARD)
    assert (Accelerator.prepare, Accelerator.wait_for_everyone, torch.nn.functional.mse_loss) == before


def test_flags_under_which_it_cannot_work_are_refused_before_a_model_is_loaded(guarded, monkeypatch):
    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", None)
    with pytest.raises(LoopError, match="`--loss_type huber` cannot be used under the guard"):
        guarded(GUARD, "--loss_type", "huber")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('nothing')", "so that nothing was guarded"),
        ("import jax", "it trains with Flax"),
        ("from torch.nn.functional import logsigmoid", "preferences between pairs"),
    ],
)
def test_other_scripts_are_refused(guarded, tmp_path, source, message):
    script = tmp_path / "other.py"
    script.write_text(source)
    with pytest.raises((ScriptError, LoopError), match=message):
        guarded(GUARD, script=script)


def test_a_module_beside_a_frozen_denoiser_is_refused_before_the_first_step(guarded, tmp_path):
    script = tmp_path / "other.py"
    source = SCRIPT.read_text().replace(
        "    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)\n",
        "    unet.requires_grad_(False)\n"
        "    unet, frozen = torch.nn.Linear(2, 2), unet\n"
        "    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)\n",
    )
    script.write_text(source)
    with pytest.raises(LoopError, match="trains Linear, and UNet2DConditionModel stays as it is"):
        guarded(GUARD, script=script)


def test_more_shards_than_samples_are_refused(guarded):
    with pytest.raises(ScriptError, match="between 1 and the number of samples"):
        guarded(["--num_shards", "17"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "2", "2 processes were launched, and the proxies of 2 shards"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "configured for DeepSpeed"),
    ],
)
def test_several_processes_are_refused(guarded, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ScriptError, match=message):
        guarded(GUARD)


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
