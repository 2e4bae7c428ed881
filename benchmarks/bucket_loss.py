"""Does the loss of a sample depend on the size at which it is trained? Images of one kind, each in several sizes.

The memory bank keeps one mean for each timestep, whatever the sizes of the images: where a size has another loss at the
same timestep, its samples are skipped more or less often than others.

    python -m benchmarks.bucket_loss

The bundled model, made for 64 px, on 128 held-out images of the demo: the mean squared error at a timestep of each
quarter of the schedule, relative to that of 64x64, with the standard error over images. Noise and timesteps depend on
the image alone. Sizes other than the square crop the image to their shape.
"""

import argparse
import math
import tempfile

import torch

from sd_memguard.config import make_train_config
from sd_memguard.core.seeding import draw_normal, draw_uniform
from sd_memguard.data.batches import BatchSource, Encoders
from sd_memguard.data.target_sizes import Size
from sd_memguard.data.transforms import Preprocess
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan

SIZES = [Size(64, 64), Size(80, 48), Size(48, 80), Size(48, 48), Size(96, 96)]
QUARTERS, SEED, BATCH, NUM_IMAGES = 4, 0, 16, 128


@torch.no_grad()
def losses_at(size: Size, source: BatchSource, unet: torch.nn.Module, loss: DenoisingLoss) -> torch.Tensor:
    """Return the loss of each image in each quarter of the schedule, (images, quarters)."""
    source.preprocess = [Preprocess(source.config, SEED, size)]
    rows = []
    for chunk in torch.from_numpy(source.samples.sample_ids[:NUM_IMAGES]).split(BATCH):
        latents, condition, _ = source.fixed(chunk.tolist())
        columns = []
        for quarter in range(QUARTERS):
            addresses = [(sample_id, quarter) for sample_id in chunk.tolist()]
            shares = (draw_uniform(SEED, "timestep", addresses) + quarter) / QUARTERS
            timesteps = (shares * loss.noise_scheduler.config.num_train_timesteps).long()
            noise = draw_normal(SEED, "noise", addresses, latents.shape[1:])
            columns.append(loss(unet, latents, condition, timesteps, noise))
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    bundled = dict.fromkeys(("pretrained", "train_data_dir", "validation_data_dir"), "bundled")
    with tempfile.TemporaryDirectory() as folder:
        config = make_train_config(**bundled, resolution=64, seed=SEED, output_dir=folder)
        plan = make_plan(config)
    assert plan.heldout is not None
    models = load_models(plan.pipeline, config)
    encoders = Encoders(models, torch.device("cpu"), torch.float32)
    source = BatchSource(plan.heldout, encoders, config, SEED, cache=False)
    unet, loss = models.unet.eval(), DenoisingLoss(models.noise_scheduler)
    base: torch.Tensor | None = None
    print(f"| size | {' | '.join(f'quarter {quarter + 1}' for quarter in range(QUARTERS))} |")
    print("|---|" + "---|" * QUARTERS)
    for size in SIZES:
        found = losses_at(size, source, unet, loss).double()
        base = found if base is None else base
        ratio = found.mean(0) / base.mean(0)
        # Of a quotient of means over the same images.
        error = ((found - ratio * base).std(0) / math.sqrt(len(found))) / base.mean(0)
        cells = [f"{value:.2f} ± {spread:.2f}" for value, spread in zip(ratio.tolist(), error.tolist(), strict=True)]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)
        if base is found:
            print(f"| (its loss) | {' | '.join(f'{value:.4f}' for value in base.mean(0).tolist())} |")


if __name__ == "__main__":
    main()
