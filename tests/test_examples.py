"""The examples run as they are printed."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torch_launcher

from sd_memguard.audit.arguments import AuditSettings
from sd_memguard.flags import parse_train_args, settings_parser
from sd_memguard.launcher.arguments import parse_command

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop_skips_samples(capsys):
    example = EXAMPLES / "plug_into_your_loop.py"
    guard = runpy.run_path(str(example))["train"](steps=25, num_images=32)

    assert int(guard.ledger.seen.sum()) == 25 * 16
    assert 0 < int(guard.ledger.actions["skipped"].sum()) < 25 * 16
    assert int(guard.ledger.actions["augmented"].sum()) == 0
    assert [row["kind"] for row in guard.attachment.ensemble.rounds] == ["redistribute", "average"]
    assert "step   20: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_accelerate_loop_resumes_and_gains_ten_lines_at_most(tmp_path, monkeypatch, capsys):
    example = EXAMPLES / "accelerate_loop.py"
    main = runpy.run_path(str(example))["main"]
    sizes = ["--max_train_steps", "8", "--max_train_samples", "32", "--checkpointing_steps", "5"]

    def run(name: str, *flags: str) -> bytes:
        monkeypatch.setattr(sys, "argv", ["loop", "--output_dir", str(tmp_path / name), *sizes, *flags])
        main()
        return (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    whole = run("whole")
    assert run("resumed", "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-5")) == whole
    assert "samples were skipped" in capsys.readouterr().out
    assert 5 <= example.read_text(encoding="utf-8").count("# +") <= 10


def test_the_launcher_script_gives_flags_that_parse(tmp_path):
    text = (EXAMPLES / "sdxl_lora_with_run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    words = re.search(r"-m sd_memguard\.run (.*)$", text, re.MULTILINE)[1].split()
    script = tmp_path / "train_text_to_image_lora_sdxl.py"
    script.touch()

    command = parse_command([str(script) if word.endswith('.py"') else word for word in words])

    assert command.guard.num_shards == 4
    assert "--gradient_checkpointing" in command.arguments


TRAINING = r"sd-memguard train|(?:accelerate launch|torchrun|srun torchrun) .* sd_memguard/train\.py"


def arguments_of(script: str, program: str) -> list[str]:
    """The arguments of the program that a script calls, each of its variables replaced by a word."""
    text = (EXAMPLES / script).read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(rf"^(?:{program}) (.*)$", text, re.MULTILINE)
    return [re.sub(r"\$(\w+)", r"\1", word) for word in shlex.split(command[1]) if word != "$@"]


@pytest.mark.parametrize(
    ("script", "memguard"),
    [
        ("finetune_bundled.sh", "on"),
        ("finetune_sd15.sh", "on"),
        ("two_gpus.sh", "on"),
        ("slurm.sh", "on"),
        ("lora_style.sh", "on"),
        ("laion10k/guarded.sh", "on"),
        ("laion10k/plain.sh", "off"),
    ],
)
def test_scripts_give_flags_that_parse(script, memguard):
    config = parse_train_args(arguments_of(script, TRAINING))

    assert config.memguard == memguard
    assert config.center_crop


@pytest.mark.parametrize(("script", "processes"), [("two_gpus.sh", 2), ("slurm.sh", 2 * 4)])
def test_scripts_for_several_processes_divide_the_shards(script, processes):
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    torchrun = re.sub(r"\$\w+", "4", re.search(r"torchrun (.*) sd_memguard/train", text.replace("\\\n", " "))[1])
    launcher = torch_launcher()
    if "--signals_to_handle" in torchrun and "--signals-to-handle" not in launcher.format_help():
        pytest.skip("this torchrun forwards no further signals")
    launched = launcher.parse_args([*shlex.split(torchrun), "script"])
    started = int(launched.nproc_per_node) * (1 if launched.standalone else 2)
    assert started == processes
    assert parse_train_args(arguments_of(script, TRAINING)).guard.num_shards % processes == 0
    if script == "slurm.sh":
        assert (
            int(re.search(r"--nodes=(\d+)", text)[1]) * int(re.search(r"--gpus-per-node=(\d+)", text)[1]) == processes
        )
        assert "SIGUSR1" in launched.signals_to_handle
        warning, patience = re.search(r"--signal=USR1@(\d+)", text), re.search(r"SHUTDOWN_TIMEOUT=(\d+)", text)
        assert int(patience[1]) < int(warning[1])


def test_laion10k_takes_the_authors_settings_and_the_arms_the_same_budget():
    guarded, plain = (parse_train_args(arguments_of(f"laion10k/{arm}.sh", TRAINING)) for arm in ("guarded", "plain"))
    guard = guarded.guard
    assert guard.num_shards * 50 * guard.steps_per_round == guarded.max_train_steps == plain.max_train_steps
    assert guarded.train_batch_size == plain.train_batch_size == 8
    assert guarded.learning_rate == plain.learning_rate == 2.5e-6
    assert guarded.lr_warmup_steps == guard.num_shards * plain.lr_warmup_steps
    assert (guard.bank_mode, guard.skip_threshold, guard.augment_threshold) == ("paper", 0.8, 1.2)


def test_laion10k_audit_gives_flags_that_parse():
    flags = settings_parser(AuditSettings).parse_args(arguments_of("laion10k/audit.sh", "sd-memguard audit"))
    assert flags.model == ["plain=plain", "guarded=guarded"]
    assert (flags.extractor, flags.extractor_weights) == ("sscd-paper", "weights/sscd_disc_large.torchscript.pt")


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_well_formed_and_ask_for_what_they_need(script, tmp_path):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    if "${1:?" in script.read_text(encoding="utf-8"):
        done = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0
        assert "give the folder of" in done.stderr
