"""The audit with whatever diffusers loads: what it generates, with LoRAs, within memory, and what it measures."""

import json
import logging

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from sd_memguard.assets import demo_data_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.generate import generate_images
from sd_memguard.audit.metrics.flow_signals import flow_losses, flow_text_signal
from sd_memguard.audit.metrics.signals import (
    DETECTION_SEEDS,
    DETECTION_STEPS,
    LOSS_TIMESTEPS,
    NotMeasurableError,
    denoising_losses,
    encode_images,
    text_signal,
)
from sd_memguard.audit.models import LORA_FILE, ModelFiles, load_pipeline, model_sha256
from sd_memguard.core.seeding import derive_seed, generator_for
from tests.audit import tiny_pipelines

CPU = torch.device("cpu")
CAPTIONS = ["red apple", "crescent moon", "a red tree"]
SCHEDULERS = {
    "sdxl": "DDIMScheduler",
    "sd3": "FlowMatchEulerDiscreteScheduler",
    "flux": "FlowMatchEulerDiscreteScheduler",
    "pixart": "DDIMScheduler",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: tiny_pipelines.save(kind, root / kind) for kind in tiny_pipelines.KINDS}


@pytest.fixture(params=tiny_pipelines.KINDS)
def kind(request):
    return request.param


def test_each_kind_generates_what_its_own_pipeline_does(folders, kind):
    loaded = load_pipeline(folders[kind], CPU)
    assert type(loaded.scheduler).__name__ == SCHEDULERS[kind]
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "size": 32}
    images = generate_images(loaded, CAPTIONS, [1, 2, 3], batch_size=2, **settings)
    assert images.shape == (3, 32, 32, 3)
    own = tiny_pipelines.load(kind, folders[kind])
    if SCHEDULERS[kind] == "DDIMScheduler":
        own.scheduler = diffusers.DDIMScheduler.from_config(own.scheduler.config, clip_sample=False)
    binning = {"use_resolution_binning": False} if kind == "pixart" else {}
    expected = own(
        CAPTIONS[1],
        height=32,
        width=32,
        **binning,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(2),
        output_type="np",
    ).images[0]
    assert (images[1] / 255 - torch.from_numpy(expected)).abs().max() < 0.01
    assert (images[0].int() - images[1].int()).abs().max() > 5


def test_the_hash_follows_every_part_that_generates(folders, kind, tmp_path):
    before = model_sha256(ModelFiles(folders[kind], None))
    pipeline = tiny_pipelines.load(kind, folders[kind])
    parts = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    for name in parts:
        changed = tiny_pipelines.load(kind, folders[kind])
        next(getattr(changed, name).parameters()).data.add_(0.1)
        changed.save_pretrained(tmp_path / name)
        assert model_sha256(ModelFiles(tmp_path / name, None)) != before, name


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_loras_of_each_kind_are_put_on_one_after_the_other(folders, kind, tmp_path):
    files = []
    for number in range(2):
        pipeline = tiny_pipelines.load(kind, folders[kind])
        part = "unet" if kind == "sdxl" else "transformer"
        torch.manual_seed(number)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        getattr(pipeline, part).add_adapter(config)
        layers = get_peft_model_state_dict(getattr(pipeline, part))
        pipeline.save_lora_weights(tmp_path / str(number), **{f"{part}_lora_layers": layers})
        files.append(tmp_path / str(number) / LORA_FILE)
    variants = [
        ModelFiles(folders[kind], None),
        ModelFiles(folders[kind], files[0]),
        ModelFiles(folders[kind], None, (files[1],)),
        ModelFiles(folders[kind], None, tuple(files)),
    ]
    weights = []
    for variant in variants:
        pipeline = load_pipeline(variant, CPU)
        denoiser = pipeline.unet if kind == "sdxl" else pipeline.transformer
        weights.append({name: tensor for name, tensor in denoiser.state_dict().items() if "to_q.weight" in name})
    plain, first, second, both = weights
    for name, tensor in plain.items():
        assert not torch.equal(first[name], tensor)
        torch.testing.assert_close(both[name] - tensor, (first[name] - tensor) + (second[name] - tensor))
    assert len({model_sha256(variant) for variant in variants}) == 4
    assert load_pipeline(ModelFiles(folders[kind], files[0]), CPU).components.keys() == pipeline.components.keys()


def test_weights_in_half_precision(folders):
    pipeline = load_pipeline(folders["sdxl"], CPU, torch.bfloat16)
    assert pipeline.unet.dtype == torch.bfloat16
    assert generate_images(pipeline, CAPTIONS[:1], [1], num_inference_steps=1).shape == (1, 32, 32, 3)
    image = Image.open(demo_data_path() / "0003.png").convert("RGB")
    assert denoising_losses(pipeline, [image], CAPTIONS[:1], 0).isfinite().all()
    assert text_signal(pipeline, CAPTIONS[:1], 0, num_inference_steps=4, guidance_scale=2.0).isfinite().all()


class SmallMemory:
    """A pipeline in front of a memory that holds so many images at a time."""

    def __init__(self, pipeline, room, error):
        self.pipeline, self.room, self.error, self.asked = pipeline, room, error, []

    def __call__(self, prompt, height=None, width=None, num_inference_steps=1, guidance_scale=1.0, **settings):
        self.asked.append(len(prompt))
        if len(prompt) > self.room:
            raise self.error
        return self.pipeline(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **settings,
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_what_does_not_fit_is_generated_in_halves_and_tried_once(folders, error, caplog):
    pipeline = load_pipeline(folders["sdxl"], CPU)
    captions, seeds = [f"{caption} {number}" for number in range(4) for caption in CAPTIONS], list(range(12))
    expected = generate_images(pipeline, captions, seeds, num_inference_steps=1)
    small = SmallMemory(pipeline, 2, error)
    with caplog.at_level(logging.WARNING):
        found = generate_images(small, captions, seeds, num_inference_steps=1, batch_size=6)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert small.asked == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert "out of memory with 6 images at a time: going on with 3" in caplog.text
    with pytest.raises(AuditError, match="one image of SmallMemory does not fit into memory"):
        generate_images(SmallMemory(pipeline, 0, error), captions, seeds, num_inference_steps=1)


def test_other_errors_come_through(folders):
    broken = SmallMemory(None, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate_images(broken, CAPTIONS, [1, 2, 3])


def test_a_pipeline_without_prompt_is_refused(folders, tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(AuditError, match="is a DDPMPipeline, which takes no prompt"):
        load_pipeline(tmp_path / "ddpm", CPU)
    index = folders["sdxl"] / "model_index.json"
    assert json.loads(index.read_text())["_class_name"] == "StableDiffusionXLPipeline"


@pytest.fixture
def photos():
    return [Image.open(demo_data_path() / name).convert("RGB") for name in ("0003.png", "0007.png")]


@torch.no_grad()
def test_losses_of_sdxl_one_by_one(folders, photos):
    pipeline = load_pipeline(folders["sdxl"], CPU)
    alphas, latents = pipeline.scheduler.alphas_cumprod, encode_images(pipeline, photos)
    expected = []
    for row, caption in enumerate(CAPTIONS[:2]):
        states, _, pooled, _ = pipeline.encode_prompt(caption, device=CPU, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
        errors = []
        for number, share in enumerate(LOSS_TIMESTEPS):
            t, noise = int(1000 * share), torch.randn(4, 8, 8, generator=generator_for(5, "membership", number))[None]
            noisy = alphas[t].sqrt() * latents[row : row + 1] + (1 - alphas[t]).sqrt() * noise
            predicted = pipeline.unet(noisy, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
            errors.append((predicted - noise).square().mean().item())
        expected.append(sum(errors) / len(errors))
    assert denoising_losses(pipeline, photos, CAPTIONS[:2], 5).tolist() == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_losses_of_sd3_one_by_one(folders, photos):
    pipeline = load_pipeline(folders["sd3"], CPU)
    latents = encode_images(pipeline, photos)
    expected = []
    for row, caption in enumerate(CAPTIONS[:2]):
        states, _, pooled, _ = pipeline.encode_prompt(caption, caption, caption, do_classifier_free_guidance=False)
        errors = []
        for number, share in enumerate(sorted(LOSS_TIMESTEPS, reverse=True)):
            sigma = 3 * share / (1 + 2 * share)  # the scheduler's shift of 3
            noise = torch.randn(4, 8, 8, generator=generator_for(5, "membership", number))[None]
            clean = latents[row : row + 1]
            velocity = pipeline.transformer(
                hidden_states=(1 - sigma) * clean + sigma * noise,
                timestep=torch.tensor([1000 * sigma]),
                encoder_hidden_states=states,
                pooled_projections=pooled,
            ).sample
            errors.append((velocity - (noise - clean)).square().mean().item())
        expected.append(sum(errors) / len(errors))
    assert flow_losses(pipeline, photos, CAPTIONS[:2], 5).tolist() == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_losses_of_flux_one_by_one(folders, photos):
    pipeline = load_pipeline(folders["flux"], CPU)
    pipeline.default_sample_size = 8  # instead of 1024 px
    latents = encode_images(pipeline, photos)
    found = flow_losses(pipeline, photos, CAPTIONS[:2], 5)
    expected = []
    for row, caption in enumerate(CAPTIONS[:2]):
        states, pooled, text_ids = pipeline.encode_prompt(caption, caption)
        errors = []
        for number in range(len(LOSS_TIMESTEPS)):
            sigma = float(pipeline.scheduler.sigmas[number])
            noise = torch.randn(4, 8, 8, generator=generator_for(5, "membership", number))[None]
            clean = latents[row : row + 1]

            def packed(images):  # pixels of 2 x 2, as the paper of Flux says
                return images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(1, 16, 16)

            velocity = pipeline.transformer(
                hidden_states=packed((1 - sigma) * clean + sigma * noise),
                timestep=torch.tensor([sigma]),
                guidance=torch.tensor([1.0]),
                encoder_hidden_states=states,
                pooled_projections=pooled,
                txt_ids=text_ids,
                img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, CPU, torch.float32),
            ).sample
            errors.append((velocity - packed(noise - clean)).square().mean().item())
        expected.append(sum(errors) / len(errors))
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    sigmas = [float(sigma) for sigma in pipeline.scheduler.sigmas[: len(LOSS_TIMESTEPS)]]
    assert sigmas == sorted(sigmas, reverse=True)
    assert 0 < sigmas[-1] < sigmas[0] < 1


@torch.no_grad()
def test_text_signal_of_sd3_by_its_own_steps(folders):
    pipeline = load_pipeline(folders["sd3"], CPU)
    norms = []
    for number in range(DETECTION_SEEDS):
        noise = derive_seed(3, "detection", number)
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(CAPTIONS[0], CAPTIONS[0], CAPTIONS[0])
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(noise))
        pipeline.scheduler.set_timesteps(6)
        for timestep in pipeline.scheduler.timesteps[:DETECTION_STEPS]:
            with_text, without = (
                pipeline.transformer(
                    hidden_states=latents, timestep=timestep[None], encoder_hidden_states=text, pooled_projections=pool
                ).sample
                for text, pool in ((states, pooled), (empty, empty_pooled))
            )
            norms.append((with_text - without).norm().item())
            velocity = without + 3.0 * (with_text - without)
            latents = pipeline.scheduler.step(velocity, timestep, latents).prev_sample
    found = flow_text_signal(pipeline, CAPTIONS, 3, num_inference_steps=6, guidance_scale=3.0)
    assert found[0].item() == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    assert len(found) == 3
    assert not pipeline.transformer._forward_hooks


@pytest.mark.parametrize(
    ("kind", "measure", "message"),
    [
        ("flux", "signal", "FluxPipeline does not make side by side"),
        ("pixart", "signal", "PixArtSigmaPipeline does not make side by side"),
        ("pixart", "loss", "this is a PixArtSigmaPipeline"),
    ],
)
def test_what_cannot_be_measured_is_said(folders, photos, kind, measure, message):
    pipeline = load_pipeline(folders[kind], CPU)
    measures = {
        "signal": lambda: flow_text_signal(pipeline, CAPTIONS, 0, num_inference_steps=2, guidance_scale=2.0),
        "loss": lambda: flow_losses(pipeline, photos, CAPTIONS[:2], 0),
    }
    with pytest.raises(NotMeasurableError, match=message):
        measures[measure]()
