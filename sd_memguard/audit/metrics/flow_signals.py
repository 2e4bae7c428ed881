"""The signals of ``signals.py`` for flow matching: the pipeline itself runs, and hooks on its transformer listen.

So each transformer is given what its pipeline gives it, packed latents, pooled embeddings and the like included.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from sd_memguard.audit.metrics.signals import (
    DETECTION_SEEDS,
    DETECTION_STEPS,
    LOSS_TIMESTEPS,
    NotMeasurableError,
    encode_images,
    model_edge,
)
from sd_memguard.core.seeding import derive_seed, draw_normal


class _Enough(Exception):  # noqa: N818 (it is no error)
    """Ends a pipeline's call when what was to be heard has been heard."""


@contextmanager
def _listening(*handles: Any) -> Iterator[None]:
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def flow_text_signal(
    pipeline: Any, captions: Sequence[str], seed: int, *, num_inference_steps: int, guidance_scale: float
) -> Tensor:
    """Return how strongly each caption steers the first steps; see ``signals.text_signal``.

    The norm is that of the difference of velocities: at the first step, which is pure noise, noise predictions of flow
    matching do not differ.

    Raises:
        NotMeasurableError: The transformer is not that of Stable Diffusion 3.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, SD3Transformer2DModel):
        raise NotMeasurableError(
            f"the text signal compares a prediction with the prompt and one without, which {type(pipeline).__name__} "
            "does not make side by side"
        )
    if guidance_scale <= 1:
        raise NotMeasurableError("the text signal needs `--guidance_scale` above 1 with this model")
    norms: list[Tensor] = []

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        without, conditioned = output[0].float().chunk(2)
        norms.append((conditioned - without).flatten(1).norm(dim=1).cpu())
        if len(norms) % DETECTION_STEPS == 0:
            raise _Enough

    for number in range(DETECTION_SEEDS):
        noise = derive_seed(seed, "detection", number)
        with _listening(transformer.register_forward_hook(listen)):
            pipeline(
                list(captions),
                generator=[torch.Generator("cpu").manual_seed(noise) for _ in captions],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            )
    return torch.stack(norms).mean(0)


@torch.no_grad()
def flow_losses(pipeline: Any, images: Sequence[PIL.Image.Image], captions: Sequence[str], seed: int) -> Tensor:
    """Return the training loss of each captioned image, averaged over fixed noise levels; see ``denoising_losses``.

    Flow matching: the latents are ``(1 - sigma) x + sigma n``, the target is ``n - x``. Distilled guidance is at 1.

    Raises:
        NotMeasurableError: The transformer is neither that of Stable Diffusion 3 nor that of Flux.1.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, (SD3Transformer2DModel, FluxTransformer2DModel)):
        raise NotMeasurableError(
            f"the loss is known for Stable Diffusion 1, 2, XL, 3 and Flux.1, and this is a {type(pipeline).__name__}"
        )
    latents = encode_images(pipeline, images)
    levels = [(number,) for number in range(len(LOSS_TIMESTEPS))]
    noises = draw_normal(seed, "membership", levels, latents.shape[1:]).to(latents)
    losses: list[Tensor] = []

    def pack(part: Tensor, like: Tensor) -> Tensor:
        return pipeline._pack_latents(part, *part.shape) if like.ndim == 3 else part

    def noise_images(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs["hidden_states"]
        sigma, noise = float(pipeline.scheduler.sigmas[len(losses)]), noises[len(losses)].expand_as(latents)
        return args, {**kwargs, "hidden_states": pack((1 - sigma) * latents + sigma * noise, given).to(given.dtype)}

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        target = pack(noises[len(losses)] - latents, output[0])
        losses.append((output[0].float() - target.float()).square().flatten(1).mean(1).cpu())
        if len(losses) == len(LOSS_TIMESTEPS):
            raise _Enough

    with _listening(
        transformer.register_forward_pre_hook(noise_images, with_kwargs=True), transformer.register_forward_hook(listen)
    ):
        edge = model_edge(pipeline)
        pipeline(
            list(captions),
            height=edge,
            width=edge,
            sigmas=sorted(LOSS_TIMESTEPS, reverse=True),
            guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
        )
    return torch.stack(losses).mean(0)
