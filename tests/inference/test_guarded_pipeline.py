"""Guards at inference: each against its formula computed apart, and the pipeline as it was afterwards."""

import diffusers
import pytest
import torch

from sd_memguard import guarded_pipeline
from sd_memguard.audit.generate import generate_images
from sd_memguard.errors import UserError
from sd_memguard.inference import AttentionRescaling, OppositeGuidance, PromptAdjustment, StaticTransition

SCALE, STEPS = 5.0, 4
PROMPTS = ["a tall tree", "two red chairs in a small house"]


@pytest.fixture(scope="module")
def sd(pipeline):
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(pipeline, use_safetensors=True, safety_checker=None)
    loaded.scheduler = diffusers.DDIMScheduler.from_config(loaded.scheduler.config, clip_sample=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def sdxl(sd, sdxl_pipeline):
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_pipeline, add_watermarker=False)
    loaded.scheduler = sd.scheduler
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return request.getfixturevalue(request.param)


def generate(pipeline, prompts=PROMPTS, scale=SCALE, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    asked = {"num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "latent", **settings}
    return pipeline(list(prompts), generator=generators, **asked).images


def watch(unet, calls):
    """Note every call of the UNet's `forward`: its arguments and its output."""
    original = unet.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        calls.append((args, kwargs, output[0].detach().clone()))
        return output

    return forward


def by_hand(pipe, scale_at, prompts=PROMPTS):
    """The denoising loop written out for DDIM, with a scale of guidance for each timestep."""
    calls = []
    pipe.unet.forward = watch(pipe.unet, calls)
    try:
        generate(pipe, prompts)
    finally:
        del pipe.unet.forward
    (sample, _), first, _ = calls[0]
    latents = sample.chunk(2)[0]
    pipe.scheduler.set_timesteps(STEPS)
    for timestep in pipe.scheduler.timesteps:
        with torch.no_grad():
            without, text = pipe.unet(torch.cat([latents] * 2), timestep, **first)[0].chunk(2)
        predicted = without + scale_at(float(timestep)) * (text - without)
        latents = pipe.scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def test_static_transition_is_no_guidance_before_and_the_usual_one_after(pipe):
    limit = 0.5 * pipe.scheduler.config.num_train_timesteps
    expected = by_hand(pipe, lambda timestep: 0.0 if timestep > limit else SCALE)
    found = generate(guarded_pipeline(pipe, StaticTransition(0.5)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, generate(pipe), atol=1e-3)


def test_opposite_guidance_is_negative_before(pipe):
    limit = 0.5 * pipe.scheduler.config.num_train_timesteps
    expected = by_hand(pipe, lambda timestep: -0.4 * SCALE if timestep > limit else SCALE)
    found = generate(guarded_pipeline(pipe, OppositeGuidance(0.5, -0.4)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_transition_at_pure_noise_changes_nothing(pipe):
    assert torch.equal(generate(guarded_pipeline(pipe, StaticTransition(1.0))), generate(pipe))


class SlowRescaling:
    """Ren's attention written out, softmax by hand, for a batch of unconditional and conditional rows."""

    def __init__(self, factor, counts):
        self.factor, self.counts = factor, counts

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        heads = attn.heads
        split = lambda states: states.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
        queries = split(attn.to_q(hidden_states))
        keys, values = split(attn.to_k(encoder_hidden_states)), split(attn.to_v(encoder_hidden_states))
        logits = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        for row, count in enumerate(self.counts, start=len(self.counts)):
            logits[row, :, :, 0] *= self.factor
            logits[row, :, :, count - 1 :] = -torch.inf
        weighted = (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](weighted))


@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_attention_rescaling_against_attention_written_out(pipe, factor):
    found = generate(guarded_pipeline(pipe, AttentionRescaling(factor)))
    counts = [len(pipe.tokenizer(prompt).input_ids) for prompt in PROMPTS]
    before = pipe.unet.attn_processors
    slow = {name: SlowRescaling(factor, counts) if "attn2" in name else processor for name, processor in before.items()}
    pipe.unet.set_attn_processor(slow)
    try:
        expected = generate(pipe)
    finally:
        pipe.unet.set_attn_processor(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, generate(pipe), atol=1e-4)


def test_attention_rescaling_of_several_images_for_each_prompt(sd):
    guarded = guarded_pipeline(sd, AttentionRescaling(1.7))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    found = guarded(
        PROMPTS, num_images_per_prompt=2, generator=generators, num_inference_steps=STEPS, output_type="latent"
    ).images
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    torch.testing.assert_close(found, generate(guarded, repeated, 7.5), rtol=1e-4, atol=1e-5)


def first_norms(pipe, calls, number):
    """The norm of text-conditional minus unconditional prediction at the call of that number, for each image."""
    without, text = calls[number][2].chunk(2)
    return (text - without).flatten(1).norm(dim=1)


def test_prompt_adjustment_lowers_the_signal_to_its_target_and_no_further(pipe):
    calls = []
    pipe.unet.forward = watch(pipe.unet, calls)
    try:
        plain = generate(pipe)
        before = first_norms(pipe, calls, 0)
        size = (calls[0][2][0].numel() / 16384) ** 0.5
        target = 0.7 * float(before.max())
        calls.clear()
        guard = PromptAdjustment(target / size, learning_rate=0.02, num_steps=200)
        adjusted = generate(guarded_pipeline(pipe, guard))
        after = first_norms(pipe, calls, -STEPS)
    finally:
        del pipe.unet.forward
    assert (after <= target * 1.001).all()
    assert after.max() > 0.5 * target  # it stops when it is there
    assert not torch.allclose(adjusted, plain, atol=1e-4)
    states = [kwargs["encoder_hidden_states"] for _, kwargs, _ in calls[-STEPS:]]
    assert all(torch.equal(states[0], one) for one in states)
    usual = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)[0]
    assert torch.equal(states[0].chunk(2)[1][:, 0], usual[:, 0])  # the begin token stays


def test_prompt_adjustment_above_the_signal_changes_nothing(pipe):
    assert torch.equal(generate(guarded_pipeline(pipe, PromptAdjustment(1e6))), generate(pipe))


def test_each_image_is_adjusted_apart(pipe):
    guard = PromptAdjustment(0.01, num_steps=3)
    together = generate(guarded_pipeline(pipe, guard))
    generator = torch.Generator().manual_seed(1)
    alone = guarded_pipeline(pipe, guard)(
        PROMPTS[1], generator=generator, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent"
    ).images
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)


def test_guards_together_in_either_order(pipe):
    guards = (StaticTransition(0.5), PromptAdjustment(0.01, num_steps=2), AttentionRescaling(1.5))
    found = generate(guarded_pipeline(pipe, *guards))
    torch.testing.assert_close(generate(guarded_pipeline(pipe, *guards[::-1])), found, rtol=1e-4, atol=1e-5)
    for left_out in range(3):
        others = [guard for number, guard in enumerate(guards) if number != left_out]
        assert not torch.allclose(generate(guarded_pipeline(pipe, *others)), found, atol=1e-5)


ALL = (OppositeGuidance(), PromptAdjustment(0.01, num_steps=1), AttentionRescaling())


def test_the_pipeline_is_as_before_also_after_a_failure(pipe):
    before = generate(pipe)
    hooks = lambda: [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in pipe.unet.modules()]  # noqa: E731
    unhooked = hooks()
    guarded = guarded_pipeline(pipe, *ALL)

    def fail(pipeline, step, timestep, tensors):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        generate(guarded, callback_on_step_end=fail)
    assert hooks() == unhooked
    assert torch.equal(generate(pipe), before)
    assert not any(parameter.grad is not None for parameter in pipe.unet.parameters())
    first = generate(guarded)
    assert torch.equal(generate(guarded), first)  # nothing is left of an earlier call


def test_used_as_the_pipeline(sd, tmp_path):
    guarded = guarded_pipeline(sd)
    assert guarded.guards == (PromptAdjustment(),)
    assert guarded.to("cpu") is guarded
    assert guarded.unet is sd.unet
    scheduler = sd.scheduler
    guarded.scheduler = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    assert isinstance(sd.scheduler, diffusers.EulerDiscreteScheduler)
    guarded.scheduler = scheduler
    guarded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model_index.json").read_text().count("StableDiffusionPipeline") == 1
    image = guarded(PROMPTS[0], num_inference_steps=1).images[0]
    assert image.size == (32, 32)


@pytest.mark.parametrize(
    ("guards", "settings", "message"),
    [
        ((StaticTransition(),), {"guidance_scale": 1.0}, "StaticTransition changes classifier-free guidance"),
        ((PromptAdjustment(),), {"guidance_scale": 1.0}, "PromptAdjustment changes classifier-free guidance"),
        ((AttentionRescaling(),), {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32)}, "give `prompt`"),
    ],
)
def test_calls_that_cannot_be_guarded_are_refused(sd, guards, settings, message):
    guarded = guarded_pipeline(sd, *guards)
    with pytest.raises(UserError, match=message):
        guarded(**{"prompt": PROMPTS[0], "num_inference_steps": 1, **settings})


def test_inference_mode_is_refused_where_gradients_are_needed(sd):
    with torch.inference_mode(), pytest.raises(UserError, match="needs gradients"):
        generate(guarded_pipeline(sd, PromptAdjustment(0.01)))


def test_the_audit_generates_with_a_guarded_pipeline_as_it_is_told(sd):
    guarded = guarded_pipeline(sd, AttentionRescaling(1.5))
    found = generate_images(guarded, PROMPTS, [0, 1], num_inference_steps=STEPS, guidance_scale=SCALE)
    expected = generate(guarded, output_type="pt").permute(0, 2, 3, 1) * 255
    assert (found.float() - expected).abs().max() <= 1
    assert not torch.equal(found, generate_images(sd, PROMPTS, [0, 1], num_inference_steps=STEPS, guidance_scale=SCALE))


def test_guards_and_pipelines_that_are_refused(sd):
    with pytest.raises(UserError, match="exclude each other"):
        guarded_pipeline(sd, StaticTransition(), OppositeGuidance())
    with pytest.raises(UserError, match="guarded already"):
        guarded_pipeline(guarded_pipeline(sd))
    with pytest.raises(UserError, match="got DDPMPipeline"):
        guarded_pipeline(diffusers.DDPMPipeline(diffusers.UNet2DModel.__new__(diffusers.UNet2DModel), sd.scheduler))
    with pytest.raises(UserError, match="instance of a class"):
        guarded_pipeline(sd, StaticTransition)
    for make, message in (
        (lambda: StaticTransition(2), "between 0 and 1"),
        (lambda: OppositeGuidance(strength=0.5), "at most 0"),
        (lambda: PromptAdjustment(num_steps=0), "above 0"),
        (lambda: AttentionRescaling(0.5), "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            make()
