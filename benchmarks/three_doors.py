r"""Trains on the demo's data by the three ways in, and prints what settings each has resolved and the held-out loss.

    python -m benchmarks.three_doors path/to/diffusers/examples [--work DIR] [--max_train_steps 200]

The drop-in `train.py`, the launcher with diffusers' unmodified `train_text_to_image.py`, and a loop with
`MemorizationGuard.prepare` train the bundled model on the same images from the same seed, with the guard's default
settings. Random numbers differ between the three, so the losses agree to the noise of a short run and not to the byte.
The loss is the mean squared error of the noise on held-out images, at the same timesteps and with the same noise.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from benchmarks.denoising import denoising_losses, encode
from sd_memguard.assets import demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.config import GUARD_SETTINGS

BATCH_SIZE, LEARNING_RATE, SEED = 8, 3e-4, 0
UNET = "unet"


def script_flags(output: Path, steps: int) -> list[str]:
    """Return flags that the drop-in and diffusers' script share."""
    flags = {
        "pretrained_model_name_or_path": tiny_sd_path(),
        "train_data_dir": demo_data_path(),
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_warmup_steps": 0,
        "seed": SEED,
        "checkpointing_steps": 10**6,
    }
    return [*(str(word) for name, value in flags.items() for word in (f"--{name}", value)), "--random_flip"]


def train_in_a_loop(output: Path, steps: int) -> None:
    """Train by `guard.prepare` in a loop like that of diffusers' script, and write the UNet and the settings."""
    import torch.nn.functional as F  # noqa: N812 (torch's own convention)
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from sd_memguard import GuardConfig, MemorizationGuard, find_duplicates

    class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __init__(self, tokenizer: Any) -> None:
            rows = read_rows(demo_data_path())
            self.files = [demo_data_path() / row["file_name"] for row in rows]
            texts = [row["text"] for row in rows]
            self.input_ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            flip = transforms.RandomHorizontalFlip()
            steps = [transforms.Resize(64), transforms.CenterCrop(64), flip, transforms.ToTensor()]
            self.transform = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            image = Image.open(self.files[index]).convert("RGB")
            return {"pixel_values": self.transform(image), "input_ids": self.input_ids[index]}

    torch.manual_seed(SEED)
    accelerator = Accelerator()
    parts = StableDiffusionPipeline.from_pretrained(tiny_sd_path(), torch_dtype=torch.float32)
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(parts.scheduler.config)
    unet = parts.unet.train()
    dataset = Images(parts.tokenizer)
    loader: Any = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    rates = get_scheduler("constant", optimizer)
    groups = find_duplicates(Image.open(file) for file in dataset.files)
    guard = MemorizationGuard(GuardConfig(seed=SEED), num_samples=len(dataset), groups=groups)
    unet, optimizer, loader, rates = guard.prepare(accelerator, unet, optimizer, loader, rates, total_steps=steps)
    taken = 0
    while taken < steps:
        for batch in loader:
            with torch.no_grad():
                latents = parts.vae.encode(batch["pixel_values"]).latent_dist.sample() * parts.vae.config.scaling_factor
                text = parts.text_encoder(batch["input_ids"])[0]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(schedule.config.num_train_timesteps, (len(latents),))
            predicted = unet(schedule.add_noise(latents, noise, timesteps), timesteps, text).sample
            accelerator.backward(F.mse_loss(predicted.float(), noise.float()))
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            taken += 1
            if taken == steps:
                break
    with guard.averaged(unet):
        unet.save_pretrained(output / UNET)
    resolved = {name: getattr(guard.config, name) for name in GUARD_SETTINGS}
    resolved |= {"num_shards": guard.num_shards, "sample_rule": guard.sample_rule, "seed": guard.seed}
    assert guard.attachment is not None
    resolved["steps_per_round"] = guard.attachment.ensemble.schedule.steps_per_round
    (output / "memguard").mkdir(exist_ok=True)
    (output / "memguard" / "config.json").write_text(json.dumps(resolved), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return file name and caption of each image of an imagefolder."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def heldout_losses(unets: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Return each model's loss of each image that was not trained on."""
    rows = read_rows(demo_heldout_path())
    files = [demo_heldout_path() / row["file_name"] for row in rows]
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()) for file in files])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_path(), torch_dtype=torch.float32)
    encoded = encode(pixels, [row["text"] for row in rows], pipeline)
    found = {
        name: UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32) for name, folder in unets.items()
    }
    return {name: denoising_losses(unet, encoded) for name, unet in {"before": pipeline.unet, **found}.items()}


def main() -> None:
    """Train, or print the table of what was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="the folder `examples` of a checkout of diffusers")
    parser.add_argument("--work", type=Path, help="folder for the runs; a temporary one by default")
    parser.add_argument("--max_train_steps", type=int, default=200)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)  # the third way, in a process of its own
    arguments = parser.parse_args()
    steps = arguments.max_train_steps
    if arguments.loop is not None:
        train_in_a_loop(arguments.loop, steps)
        return
    work = (arguments.work or Path(tempfile.mkdtemp())).resolve()
    script = arguments.examples.resolve() / "text_to_image" / "train_text_to_image.py"
    outputs = {name: work / name for name in ("drop-in", "launcher", "prepare")}
    words = {
        "drop-in": ["-m", "sd_memguard.train", *script_flags(outputs["drop-in"], steps)],
        "launcher": ["-m", "sd_memguard.run", str(script), *script_flags(outputs["launcher"], steps)],
        "prepare": ["-m", "benchmarks.three_doors", str(arguments.examples), f"--max_train_steps={steps}"],
    }
    words["prepare"] += ["--loop", str(outputs["prepare"])]
    for name, output in outputs.items():
        if not (output / UNET).exists():
            output.mkdir(parents=True, exist_ok=True)
            with (work / f"{name}.log").open("w", encoding="utf-8") as log:
                subprocess.run([sys.executable, *words[name]], check=True, stdout=log, stderr=subprocess.STDOUT)
    files = {name: output / "memguard" / "config.json" for name, output in outputs.items()}
    settings = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    print("| setting | drop-in | launcher | `guard.prepare` | |")
    print("|---|---|---|---|---|")
    for setting in GUARD_SETTINGS:
        values = [settings[name].get(setting) for name in outputs]
        print(
            f"| `{setting}` | {' | '.join(map(str, values))} | {'' if len(set(map(str, values))) == 1 else 'DIFFERS'} |"
        )
    losses = heldout_losses({name: output / UNET for name, output in outputs.items()})
    print(f"| held-out loss (before training {float(losses['before'].mean()):.4f}) | ", end="")
    print(" | ".join(f"{float(losses[name].mean()):.4f}" for name in outputs), end=" | |\n")
    base = losses["drop-in"]
    for name in ("launcher", "prepare"):
        difference = losses[name] - base
        error = float(difference.std() / len(difference) ** 0.5)
        print(f"{name} - drop-in: {float(difference.mean()):+.5f}, standard error over images {error:.5f}")


if __name__ == "__main__":
    main()
