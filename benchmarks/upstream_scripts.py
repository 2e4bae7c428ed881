"""Runs diffusers' training scripts plain and under the launcher on tiny pipelines, and prints a table of them.

    python -m benchmarks.upstream_scripts path/to/diffusers/examples [--only train_dreambooth.py] [--work DIR]

Each script is run four times for the same steps from the same seed: plain; under a neutral guard, whose final weights
have to be the plain ones byte for byte; under the full guard; and under the full guard from the checkpoint that this
run has left halfway, which has to end in the same weights. Needs the scripts' own requirements, no GPU, no network.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sd_memguard import assets

STEPS, HALF, NUM_IMAGES = 24, 12, 48
NUM_TIMESTEPS = 50
"""Few, so that the memory bank has seen enough of each for decisions after a few steps."""
GUARD = ["--num_shards", "2", "--steps_per_round", "4", "--skip_threshold", "0.95", "--augment_threshold", "1.2"]
NEUTRAL = ["--memguard", "off"]
UNET, LORA = "unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


class Case(NamedTuple):
    """A script: where it lies, its pipeline and data, flags besides the common ones, and the file it makes."""

    script: str
    pipeline: str
    data: str
    flags: list[str]
    result: str


CASES = [
    Case("text_to_image/train_text_to_image.py", "sd", "images", ["--use_ema"], UNET),
    Case("text_to_image/train_text_to_image_lora.py", "sd", "images", ["--snr_gamma", "5"], LORA),
    Case("text_to_image/train_text_to_image_sdxl.py", "sdxl", "images", [], UNET),
    Case("text_to_image/train_text_to_image_lora_sdxl.py", "sdxl", "images", ["--train_text_encoder"], LORA),
    Case("dreambooth/train_dreambooth.py", "sd", "prior", [], UNET),
    Case("dreambooth/train_dreambooth_lora.py", "sd", "prior", ["--gradient_accumulation_steps", "2"], LORA),
    Case("dreambooth/train_dreambooth_lora_sdxl.py", "sdxl", "instance", [], LORA),
]


def make_tiny_sdxl(folder: Path) -> None:
    """Write a pipeline of SDXL's parts and shapes, but small, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_hidden_layers": 2}
    text = CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=77, eos_token_id=49407)
    tokenizer = CLIPTokenizer.from_pretrained(assets.tiny_sd_path() / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        sample_size=64,
    )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
        ),
    ).save_pretrained(folder)


def make_sd(folder: Path) -> None:
    """Write the bundled pipeline with a short noise schedule."""
    shutil.copytree(assets.tiny_sd_path(), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "num_train_timesteps": NUM_TIMESTEPS}), encoding="utf-8")


def make_data(work: Path) -> None:
    """Write images with captions, and the same ones in halves as instance and class images."""
    source = assets.demo_data_path()
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_IMAGES]
    rows = [json.loads(line) for line in lines]
    for name in ("images", "instance", "class"):
        (work / name).mkdir(parents=True)
    for number, row in enumerate(rows):
        shutil.copy(source / row["file_name"], work / "images" / f"{number:03}.png")
        shutil.copy(source / row["file_name"], work / ("instance" if number % 2 else "class") / f"{number:03}.png")
    texts = [json.dumps({"file_name": f"{number:03}.png", "text": row["text"]}) for number, row in enumerate(rows)]
    (work / "images" / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")


def command_of(case: Case, work: Path, output: Path) -> list[str]:
    """Return the script's own flags."""
    data = {
        "images": ["--train_data_dir", "images", "--caption_column", "text", "--image_column", "image"],
        "instance": ["--instance_data_dir", "instance", "--instance_prompt", "an image of sks emoji"],
    }
    data["prior"] = [
        *data["instance"],
        *("--with_prior_preservation", "--class_data_dir", "class", "--class_prompt", "an image of an emoji"),
        *("--num_class_images", str(NUM_IMAGES // 2)),
    ]
    common = {
        "pretrained_model_name_or_path": work / case.pipeline,
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "checkpointing_steps": HALF,
        "learning_rate": 1e-3 if case.result == LORA else 1e-4,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 4,
        "seed": 0,
    }
    flags = [str(word) for name, value in common.items() for word in (f"--{name}", value)]
    if case.data == "images":
        flags += ["--cache_dir", "cache"]
    return [*flags, "--center_crop", *data[case.data], *case.flags]


def run(work: Path, name: str, command: list[str]) -> str:
    """Run a Python program and return what it printed; its output goes to a log as well."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=work,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    (work / f"{name}.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def last_loss(output: Path) -> float:
    """Return the mean training loss of the last six steps, from the script's own log."""
    for events in sorted(output.rglob("events.out.tfevents.*")):
        log = EventAccumulator(str(events)).Reload()
        for tag in ("train_loss", "loss"):
            if tag in log.Tags()["scalars"]:
                values = [event.value for event in log.Scalars(tag)][-6:]
                return sum(values) / len(values)
    return float("nan")


def outputs(output: Path) -> set[str]:
    """Return the names of what a script has left, but for what the guard adds."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    return {name for name in names if "memguard/" not in name and not name.startswith("logs/")}


def row_of(case: Case, examples: Path, work: Path) -> str:
    """Run a script in its four ways and return its row of the table."""
    script, stem = str(examples / case.script), Path(case.script).stem
    launcher = ["-m", "sd_memguard.run"]
    folders = {way: work / f"{stem}-{way}" for way in ("plain", "neutral", "guarded", "resumed")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    flags = {way: command_of(case, work, folder) for way, folder in folders.items()}
    run(work, f"{stem}-plain", [script, *flags["plain"]])
    run(work, f"{stem}-neutral", [*launcher, *NEUTRAL, script, *flags["neutral"]])
    text = run(work, f"{stem}-guarded", [*launcher, *GUARD, script, *flags["guarded"]])
    shutil.copytree(folders["guarded"] / f"checkpoint-{HALF}", folders["resumed"] / f"checkpoint-{HALF}")
    resume = [*flags["resumed"], "--resume_from_checkpoint", "latest"]
    run(work, f"{stem}-resumed", [*launcher, *GUARD, script, *resume])
    weights = {way: (folder / case.result).read_bytes() for way, folder in folders.items()}
    closing = next(line.split("memguard: ")[1] for line in text.splitlines() if "batches judged" in line)
    ledger = pq.read_table(folders["guarded"] / "memguard" / "samples.parquet").to_pydict()
    closing += (
        f"; skipped {sum(ledger['skipped'])}, to augment {sum(ledger['augmented'])} of {sum(ledger['seen'])} samples"
    )
    cells = [
        f"`{Path(case.script).name}` {' '.join(case.flags)}".strip(),
        f"{last_loss(folders['plain']):.4f}",
        f"{last_loss(folders['guarded']):.4f}",
        "same" if outputs(folders["plain"]) == outputs(folders["guarded"]) else "DIFFER",
        closing,
        "identical" if weights["neutral"] == weights["plain"] else "DIFFERS",
        "identical" if weights["resumed"] == weights["guarded"] else "DIFFERS",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="the folder `examples` of a checkout of diffusers")
    parser.add_argument("--only", help="name of one script")
    parser.add_argument("--work", type=Path, help="folder for data, outputs and logs; a temporary one by default")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp())).resolve()
    if not (work / "sdxl").exists():
        make_data(work)
        make_sd(work / "sd")
        make_tiny_sdxl(work / "sdxl")
    print("| script | loss plain | loss guarded | files | guarded run | neutral = plain | resumed = uninterrupted |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if arguments.only in (None, Path(case.script).name):
            print(row_of(case, arguments.examples.resolve(), work), flush=True)


if __name__ == "__main__":
    main()
