"""What a run trains with: accelerator, models, optimizer, EMA and proxies, as its plan says."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import Parameter
from torch.optim import Optimizer

from sd_memguard.config import TrainConfig
from sd_memguard.models.lora import add_adapter
from sd_memguard.models.pipeline import Models, load_models
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.store import DiskStore, ProxyStore, RamStore, SharedDiskStore
from sd_memguard.runs.folder import FOLDER, PROXIES_FOLDER
from sd_memguard.training.memory_estimate import fits_in_ram
from sd_memguard.training.optimizers import build_optimizer
from sd_memguard.training.plan import Plan
from sd_memguard.training.ranks import Ranks, check_joined, check_launch, process_handlers


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of a run; it joins the processes, where there are several.

    Raises:
        ConfigError: accelerate is configured to spread one model over processes, or does not join those launched.
    """
    check_launch()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
        kwargs_handlers=process_handlers(),
    )
    check_joined(accelerator)
    return accelerator


def prepare_models(plan: Plan, accelerator: Accelerator) -> Models:
    """Return the loaded parts with the UNet ready to train."""
    config = plan.config
    models = load_models(plan.pipeline, config)
    models.unet.train()
    if config.enable_xformers_memory_efficient_attention:
        models.unet.enable_xformers_memory_efficient_attention()
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    models.unet.to(accelerator.device)
    if config.compile:
        models.unet.compile()  # in place and at the first forward: names, parameters and references stay as they are
    return models


def forward_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the precision of what is not trained, and of the forward."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def make_optimizer(
    parameters: Mapping[str, Parameter], config: TrainConfig, device: torch.device, batch_size: int
) -> Optimizer:
    """Return AdamW (fused where torch has it: no weight-sized temporary), its 8-bit form, or the one asked for."""
    if config.optimizer is not None:
        return build_optimizer(parameters.values(), config, base_learning_rate(config, batch_size))
    settings: dict[str, Any] = {
        "lr": base_learning_rate(config, batch_size),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        import bitsandbytes

        optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(parameters.values(), **settings)
        return optimizer
    return torch.optim.AdamW(parameters.values(), fused=device.type in {"cpu", "cuda"}, **settings)


def base_learning_rate(config: TrainConfig, batch_size: int) -> float:
    """Return the learning rate that the schedule multiplies, for batches of this size over all processes."""
    return config.learning_rate * (config.gradient_accumulation_steps * batch_size if config.scale_lr else 1)


def make_ema(unet: UNet2DConditionModel, config: TrainConfig, device: torch.device) -> EMAModel | None:
    """Return the EMA of the UNet with upstream's decay (0.9999, warmed up by (1 + n) / (10 + n)), if asked for."""
    if not config.use_ema:
        return None
    ema = EMAModel(
        unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, foreach=config.foreach_ema
    )
    if config.offload_ema:
        ema.to(torch.device("cpu"))  # its shadows are made where the UNet is, and only the CPU's can be pinned
        if device.type == "cuda":
            ema.pin_memory()
    else:
        ema.to(device)
    return ema


def step_ema(ema: EMAModel, parameters: Iterable[Parameter], device: torch.device, *, offload: bool) -> None:
    """Take the parameters into the average, which is moved to the device and back where it is offloaded."""
    asynchronous = device.type == "cuda"
    if offload:
        ema.to(device, non_blocking=asynchronous)
    ema.step(parameters)
    if offload:
        ema.to(torch.device("cpu"), non_blocking=asynchronous)
        if asynchronous:
            torch.cuda.synchronize(device)  # checkpoints and averages read the shadows on the host


def make_proxies(
    plan: Plan, unet: UNet2DConditionModel, ema: EMAModel | None, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> FullProxies:
    """Return the proxies of a run with their optimizer: full weights, or adapters on a frozen UNet in ``dtype``.

    An adapter of another kind than LoRA is the only proxy, and needs no average.
    """
    config, num_shards = plan.config, plan.schedule.num_shards
    layers = {}
    if config.rank is not None:
        layers = add_adapter(unet, config.rank, plan.seed, dtype, config.adapter)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(parameters, config, device, plan.batch_size)
    store, exchange = make_store(plan, ranks), ranks.proxy_exchange
    if config.adapter != "lora":
        return FullProxies(parameters, optimizer, num_shards, store, ema, exchange)
    # The adapter's alpha equals its rank, so its factor is 1.
    return LoraProxies(parameters, optimizer, num_shards, store, layers, 1.0, exchange)


def make_store(plan: Plan, ranks: Ranks) -> ProxyStore:
    """Return where offloaded proxies wait: those of this process, or all where the processes train one at a time.

    A store on disk that the processes share is written by the main one.
    """
    folder = plan.output_dir / FOLDER / PROXIES_FOLDER
    offloaded = int(plan.sizes.offloaded * ranks.local_stores)
    with ranks.exchange.raise_on_any_rank():
        in_ram = fits_in_ram(offloaded, plan.config)
    if ranks.exchange.broadcast_object(in_ram, "store"):
        return RamStore()
    if ranks.by_batch:
        return SharedDiskStore(folder, ranks.exchange)
    return DiskStore(folder / f"process-{ranks.exchange.rank}" if ranks.by_shard else folder)
