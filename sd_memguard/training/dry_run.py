"""``--dry_run``: what a run would do and need, printed; nothing is trained and nothing written."""

import time

import torch
from accelerate import Accelerator

from sd_memguard.data.duplicate_report import count_duplicates
from sd_memguard.files import gigabytes
from sd_memguard.models.lora import add_adapter
from sd_memguard.models.pipeline import read_config, replaced_parts
from sd_memguard.training.build import forward_dtype, make_optimizer, prepare_models
from sd_memguard.training.loss import DenoisingLoss, dream_exponent
from sd_memguard.training.optimizer_step import ClippedStep
from sd_memguard.training.plan import Plan
from sd_memguard.training.progress_log import epochs_per_round, rounds_text
from sd_memguard.training.ranks import batch_slices

TIMED_STEPS = 3


def describe_plan(plan: Plan, accelerator: Accelerator) -> str:
    """Return the plan as text: samples, rounds, epochs, memory, disk and, from a few timed steps, time."""
    config, schedule = plan.config, plan.schedule
    sizes = plan.sizes
    active = sizes.proxy + sizes.trained + (0 if config.rank is None else sizes.model)
    seconds = time_step(plan, accelerator)
    at_once = plan.num_processes // batch_slices(plan.num_processes, schedule.num_shards)
    largest = f" at {plan.targets.largest}" if len(plan.targets.sizes) > 1 else ""
    kinds = [schedule.kind(index) for index in range(schedule.num_rounds)]
    disk = sizes.result + sizes.best + sizes.num_checkpoints * sizes.checkpoint
    rows = {
        "samples": f"{len(plan.samples.sample_ids):,} usable of {plan.samples.num_rows:,}",
        "duplicates": duplicates(plan),
        "images": plan.affine_maps,
        "sizes": str(plan.targets),
        **({"class images": class_images(plan)} if plan.config.with_prior_preservation else {}),
        "captions": plan.caption_forms,
        **masks(plan),
        "processes": plan.division,
        "shards": f"{schedule.num_shards} (one proxy each)",
        "optimizer steps": f"{schedule.total_steps:,} over all proxies, {plan.effective_batch_size} images each",
        "rounds": f"{rounds_text(schedule)} "
        f"({kinds.count('average')} average, {kinds.count('redistribute')} redistribute)",
        "epochs": f"{epochs_per_round(plan):.1f} over a shard per round",
        "memory": f"{gigabytes(active)} for UNet weights, gradients and optimizer on {accelerator.device}, "
        "and activations",
        "frozen networks": f"{gigabytes(sizes.others)} for VAE and text encoders (as they lie on the disk), on the "
        f"device until their caches are filled{', the text encoders to the end' if config.varies_tags else ''}",
        "offloaded proxies": f"{gigabytes(sizes.offloaded)} in the proxy store",
        "disk": f"{gigabytes(disk)} at most: the model and {sizes.num_checkpoints} checkpoint(s)"
        + (", and the best model so far" if sizes.best else ""),
        "time": f"about {seconds * schedule.total_steps / at_once / 3600:.2f} h at {seconds:.2f} s per step "
        f"(forward, backward and update{largest}; without VAE, text encoder and extra steps)",
    }
    return "\n".join(f"{name + ':':18}{text}" for name, text in rows.items())


def class_images(plan: Plan) -> str:
    """Return where the class images come from, and what they cost."""
    missing = plan.missing_class_images
    generated = f", {missing} of them to be generated first" if missing else ""
    return f"as many as training images in every step, from {plan.config.class_data_dir}{generated}"


def duplicates(plan: Plan) -> str:
    """Return how many near-identical images there are, and what comes of them."""
    mode, samples = plan.config.guard.group_duplicates, plan.samples
    if samples.groups is None:
        return "not looked for"
    count = count_duplicates(samples.groups[samples.sample_ids])
    handling = {"shard": "each in one shard", "balance": "each in one shard and counted as one image"}[mode]
    return f"{count}, {handling}" if count.num_groups else str(count)


def masks(plan: Plan) -> dict[str, str]:
    """Return a row on the masks, where these count."""
    samples = plan.samples
    if samples.masked is None:
        return {}
    ids = samples.sample_ids
    return {"masks": f"of {int(samples.masked[ids].sum()):,} of {len(ids):,} images; the others count whole"}


def time_step(plan: Plan, accelerator: Accelerator) -> float:
    """Return the seconds of one step on random latents, the best of three, with what the run trains as it trains it.

    Where images have several sizes, it is a step of the largest one, which takes the most memory.
    """
    config, device = plan.config, accelerator.device
    models = prepare_models(plan, accelerator)
    unet = models.unet
    if config.rank is not None:
        add_adapter(unet, config.rank, plan.seed, forward_dtype(accelerator), config.adapter)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(parameters, config, device, plan.batch_size)
    step = ClippedStep(accelerator, optimizer, list(parameters.values()), config.max_grad_norm)
    loss = DenoisingLoss(models.noise_scheduler, dream_detail_preservation=dream_exponent(config))
    height, width = plan.targets.largest.height // vae_factor(plan), plan.targets.largest.width // vae_factor(plan)
    latents = torch.randn(config.train_batch_size, unet.config.in_channels, height, width, device=device)
    condition = models.kind.blank(unet, config.train_batch_size, 77, device)
    middle = models.noise_scheduler.config.num_train_timesteps // 2
    timesteps = torch.full((config.train_batch_size,), middle, device=device)
    durations = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.autocast():
                losses = loss(unet, latents, condition, timesteps, torch.randn_like(latents))
            losses.mean().backward()
        float(step.step(1.0).wait())
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return min(durations)


def vae_factor(plan: Plan) -> int:
    """Return by how much the VAE shrinks an image's side."""
    vae = replaced_parts(plan.config).get("vae", plan.pipeline / "vae")
    return 2 ** (len(read_config(vae)["block_out_channels"]) - 1)
