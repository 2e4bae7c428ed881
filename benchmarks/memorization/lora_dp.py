"""LoRA with differential privacy by Opacus (DP-SGD), judged as a variant of the benchmark.

    pip install opacus
    python -m benchmarks.memorization.lora_dp --work_dir runs/memorization

Batches are drawn by Poisson sampling, gradients clipped and noised per row of the dataset, so that the privacy loss is
that of a row: whoever duplicates an image 16 times asks for 16 times as much of it (arXiv 1607.00133, 1311.0776).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.denoising import Encoded, encode
from benchmarks.memorization.__main__ import RESULTS, Case, origin, write_result
from benchmarks.memorization.datasets import (
    DATASETS,
    CaptionedImage,
    Dataset,
    as_pixels,
    load_dataset,
    training_rows,
)
from benchmarks.memorization.judge import judge, prepare_exam
from benchmarks.memorization.variants import COMMON, LORA
from sd_memguard.assets import tiny_sd_path
from sd_memguard.audit.generate import load_pipeline
from sd_memguard.models.lora import add_adapter

VARIANT = "lora_dp"
EPSILON, MAX_GRAD_NORM = 10.0, 1.0
"""The privacy budget of a row, and the norm that its gradient is clipped to."""


def main() -> None:
    """Train, judge, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the model goes; may be removed afterwards")
    parser.add_argument("--dataset", choices=DATASETS, default="avatars", help="what is trained on, duplicates exact")
    parser.add_argument("--max_train_steps", type=int, default=900, help="optimizer steps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    options = parser.parse_args()
    case = Case(options.dataset, "exact", VARIANT, 0)
    file = case.file(options.results, options.max_train_steps)
    if file.exists():
        return
    options.results.mkdir(parents=True, exist_ok=True)
    dataset = load_dataset(options.dataset)
    folder = options.work_dir / file.stem
    settings = train(dataset, folder / "unet", options.max_train_steps)
    described = {"case": case._asdict(), "step": options.max_train_steps, "settings": settings, **origin()}
    described["command"] = (
        f"python -m benchmarks.memorization.lora_dp --dataset {options.dataset} "
        f"--max_train_steps {options.max_train_steps} --work_dir runs/memorization"
    )
    exam = prepare_exam(dataset)
    write_result(file, described | judge(exam, folder / "unet", folder / "generated.safetensors", VARIANT))


def train(dataset: Dataset, folder: Path, max_train_steps: int) -> dict[str, Any]:
    """Train an adapter, save the UNet with it merged, and return the settings and the privacy that was spent."""
    from opacus import PrivacyEngine  # an extra of this benchmark alone

    torch.manual_seed(0)
    pipeline = load_pipeline(tiny_sd_path())
    encoded, empty = _encode(training_rows(dataset, "exact"), pipeline)
    unet: UNet2DConditionModel = pipeline.unet
    add_adapter(unet, LORA["rank"], 0, torch.float32)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    rows = TensorDataset(encoded.latents, encoded.embeddings)
    batch_size, delta = COMMON["train_batch_size"], 1 / len(rows)
    engine = PrivacyEngine(accountant="prv")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=unet.train(),
        optimizer=torch.optim.AdamW(parameters, lr=LORA["learning_rate"]),
        data_loader=DataLoader(rows, batch_size=batch_size),
        target_epsilon=EPSILON,
        target_delta=delta,
        epochs=-(-max_train_steps * batch_size // len(rows)),
        max_grad_norm=MAX_GRAD_NORM,
    )
    step = 0
    while step < max_train_steps:
        for latents, embeddings in loader:
            if step == max_train_steps:
                break
            step += 1
            if not len(latents):
                continue
            optimizer.zero_grad()
            dropped = torch.rand(len(latents)) < COMMON["caption_dropout"]
            _loss(model, latents, torch.where(dropped[:, None, None], empty, embeddings), encoded).backward()
            optimizer.step()
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(folder)
    return LORA | {
        "max_grad_norm": MAX_GRAD_NORM,
        "noise_multiplier": optimizer.noise_multiplier,
        "epsilon": engine.get_epsilon(delta),
        "delta": delta,
    }


def _encode(rows: list[CaptionedImage], pipeline: Any) -> tuple[Encoded, Tensor]:
    """Return the rows as the UNet meets them, and the embedding of the empty caption, (1, tokens, width)."""
    pixels = torch.stack([torch.from_numpy(as_pixels(row).copy()) for row in rows])
    encoded = encode(pixels, [row.text for row in rows], pipeline)
    return encoded, encode(pixels[:1], [""], pipeline).embeddings


def _loss(model: Any, latents: Tensor, embeddings: Tensor, encoded: Encoded) -> Tensor:
    noise = torch.randn_like(latents)
    timesteps = torch.randint(encoded.schedule.config.num_train_timesteps, (len(latents),))
    noisy = encoded.schedule.add_noise(latents, noise, timesteps)
    return torch.nn.functional.mse_loss(model(noisy, timesteps, embeddings).sample, noise)


if __name__ == "__main__":
    main()
