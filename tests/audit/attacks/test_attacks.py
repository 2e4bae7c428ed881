"""Attacks: each against its formula, its stated cost against what the UNet is given, and figures on a planted model."""

import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from sd_memguard.assets import demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.audit.arguments import AuditSettings, parse_arguments
from sd_memguard.audit.attacks.base import Attack, Generation, decode
from sd_memguard.audit.attacks.clid import Clid, shortened
from sd_memguard.audit.attacks.cyclic_denoising import CyclicDenoising
from sd_memguard.audit.attacks.embedding_search import EmbeddingSearch
from sd_memguard.audit.attacks.figures import attack_figures, margins
from sd_memguard.audit.attacks.registry import ATTACKS
from sd_memguard.audit.attacks.text_signal import TextSignal
from sd_memguard.audit.collection import read_folder
from sd_memguard.audit.command import run_audit
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.generate import generate_images, load_pipeline
from sd_memguard.audit.metrics.measures import Probes, Probing
from sd_memguard.audit.metrics.signals import LOSS_TIMESTEPS, denoising_losses, encode_images, text_signal
from sd_memguard.audit.models import LORA_FILE
from sd_memguard.core.seeding import generator_for
from sd_memguard.errors import UserError
from sd_memguard.settings import settings_of

CAPTIONS = ["grinning face", "red apple"]
GENERATION = Generation(4, 2.0, 7)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(tiny_sd_path(), torch.device("cpu"))


@pytest.fixture(scope="module")
def photos():
    return [Image.open(demo_data_path() / name).convert("RGB") for name in ("0003.png", "0007.png")]


class Short(EmbeddingSearch):
    num_steps = 3


class Few(CyclicDenoising):
    num_cycles = 2


@pytest.mark.parametrize("attack", [TextSignal(), Clid(), Short(), Few()], ids=lambda attack: attack.name)
def test_cost_is_what_the_unet_is_given(pipeline, photos, attack):
    rows = []

    def count(unet, args, kwargs):
        rows.append(len(args[0]) * (3 if kwargs["encoder_hidden_states"].requires_grad else 1))

    handle = pipeline.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        answer = attack.answer(pipeline, CAPTIONS, photos, GENERATION)
    finally:
        handle.remove()
    assert sum(rows) == len(CAPTIONS) * attack.evaluations(GENERATION)
    shape = (2,) if attack.num_answers is None else (2, attack.num_answers, 64, 64, 3)
    assert answer.shape == shape
    assert not any(parameter.grad is not None for parameter in pipeline.unet.parameters())


def test_text_signal_with_two_steps_is_that_of_the_report(pipeline, photos, monkeypatch):
    attack = TextSignal()
    monkeypatch.setattr(TextSignal, "num_steps", 2)
    monkeypatch.setattr(TextSignal, "num_generations", 2)
    shown = []
    monkeypatch.setattr(
        "sd_memguard.audit.attacks.text_signal.initial_latents",
        lambda pipe, count, seed, purpose, number: (
            shown.append(number)
            or torch.randn(4, 16, 16, generator=generator_for(seed, "detection", number)).expand(count, 4, 16, 16)
        ),
    )
    found = attack.answer(pipeline, CAPTIONS, photos, GENERATION)
    expected = text_signal(pipeline, CAPTIONS, 7, num_inference_steps=4, guidance_scale=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert shown == [0, 1]


def embed(pipeline, caption):
    tokens = pipeline.tokenizer(caption, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids)[0]


@torch.no_grad()
def test_clid_term_by_term(pipeline, photos):
    captions = ["one two three four five six", "red apple"]
    reduced = [["one two three four", "one two", ""], ["red", "", ""]]
    assert [[shortened(caption, thirds) for thirds in (2, 1, 0)] for caption in captions] == reduced
    latents, alphas = encode_images(pipeline, photos), pipeline.scheduler.alphas_cumprod
    expected = []
    for row, caption in enumerate(captions):
        terms = []
        for level, share in enumerate(LOSS_TIMESTEPS):
            t = int(1000 * share)
            for number in range(Clid.num_noises):
                noise = torch.randn(4, 16, 16, generator=generator_for(7, "clid", level, number))[None]
                noisy = alphas[t].sqrt() * latents[row : row + 1] + (1 - alphas[t]).sqrt() * noise
                whole, *others = (
                    (pipeline.unet(noisy, t, encoder_hidden_states=embed(pipeline, text)).sample - noise)
                    .square()
                    .mean()
                    .item()
                    for text in (caption, *reduced[row])
                )
                terms.append(sum(others) / 3 - whole)
        expected.append(sum(terms) / len(terms))
    found = Clid().answer(pipeline, captions, photos, GENERATION)
    assert found.tolist() == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_the_search_lowers_the_loss_of_its_image(pipeline, photos):
    attack = Short()
    attack.num_steps = 12
    latents = encode_images(pipeline, photos)
    found = attack._search(pipeline, CAPTIONS, latents, 7)

    class Fixed:
        """The pipeline, with these embeddings for the prompts."""

        def __init__(self, states):
            self.states = states

        def __getattr__(self, name):
            return getattr(pipeline, name)

        def encode_prompt(self, captions, **options):
            return self.states, self.states

    before = denoising_losses(pipeline, photos, CAPTIONS, 1)
    after = denoising_losses(Fixed(found), photos, CAPTIONS, 1)
    assert (after < before).all()
    alone = attack._search(pipeline, CAPTIONS[1:], latents[1:], 7)
    torch.testing.assert_close(alone, found[1:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_cycles_by_the_pipelines_own_steps(pipeline, photos):
    found = Few().answer(pipeline, CAPTIONS[:1], photos[:1], GENERATION)
    alphas, scheduler = pipeline.scheduler.alphas_cumprod, pipeline.scheduler
    states = {text: embed(pipeline, text) for text in (CAPTIONS[0], "")}

    def steps(latents, timesteps):
        for t in timesteps.tolist():
            text, without = (
                pipeline.unet(latents, t, encoder_hidden_states=states[name]).sample for name in (CAPTIONS[0], "")
            )
            latents = scheduler.step(without + 2.0 * (text - without), t, latents).prev_sample
        return latents

    scheduler.set_timesteps(4)
    latents = torch.randn(4, 16, 16, generator=generator_for(7, "cyclic denoising start", 0))[None]
    latents = steps(latents, scheduler.timesteps)
    images = [decode(pipeline, latents)]
    for cycle in range(2):
        t = int(scheduler.timesteps[2])  # half of the noise: two of four steps are left
        noise = torch.randn(4, 16, 16, generator=generator_for(7, "cyclic denoising", cycle))[None]
        latents = steps(alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * noise, scheduler.timesteps[2:])
    images.append(decode(pipeline, latents))
    assert (torch.stack(images, 1).int() - found.int()).abs().max() <= 2
    assert (images[0].int() - images[1].int()).abs().max() > 10


def test_the_first_image_is_what_the_pipeline_generates(pipeline, photos, monkeypatch):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(
        "sd_memguard.audit.attacks.cyclic_denoising.initial_latents", lambda pipe, count, *rest: latents
    )
    found = Few().answer(pipeline, CAPTIONS[:1], photos[:1], GENERATION)[:, 0]
    expected = generate_images(pipeline, CAPTIONS[:1], [5], num_inference_steps=4, guidance_scale=2.0)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_margins_one_by_one():
    generator = torch.Generator().manual_seed(0)
    probed = torch.randint(256, (6, 12), generator=generator)
    probed[4] = probed[1]  # the same image again is no other one
    generated, own = torch.randint(256, (3, 12), generator=generator), torch.tensor([1, 2, 5])
    generated[0] = probed[1]
    rms = lambda one, other: ((one - other) / 255).square().mean().sqrt().item()  # noqa: E731
    for number, row in enumerate(own.tolist()):
        others = [rms(generated[number], probed[at]) for at in range(6) if not torch.equal(probed[at], probed[row])]
        expected = min(others) - rms(generated[number], probed[row])
        assert margins(generated, probed, own)[number].item() == pytest.approx(expected, abs=1e-5)
    assert margins(generated, probed, own)[0] > 0


class Planted(Attack):
    """Answers for training images with the image itself and for held-out ones with grey; counts how often it asks."""

    name, title, num_answers, num_attacked = "planted", "planted", 2, 5

    def __init__(self, known):
        self.known, self.asked = known, 0

    def evaluations(self, generation):
        return 1

    def answer(self, pipeline, captions, images, generation):
        self.asked += len(images)
        grey = torch.full((64, 64, 3), 128, dtype=torch.uint8)
        shown = [
            torch.frombuffer(bytearray(image.resize((64, 64)).tobytes()), dtype=torch.uint8).view(64, 64, 3)
            if caption in self.known
            else grey
            for image, caption in zip(images, captions, strict=True)
        ]
        return torch.stack([torch.stack([grey, image]) for image in shown])


def test_figures_of_an_attack_that_knows(tmp_path):
    train = read_folder(demo_data_path(), "--train_data_dir")
    reference = read_folder(demo_heldout_path(), "--reference_data_dir")
    rows = [row for row in train.distinct if train.captions[row] not in reference.captions]
    probes = Probes(train, rows[-20:], reference, reference.distinct[:12])
    attack = Planted({train.captions[row] for row in rows})
    probing = Probing(Store(tmp_path), lambda: None, "model", 7, 4, 2.0, 2)
    figures = attack_figures(attack, probes, probing)
    assert (figures.num_train, figures.num_reference) == (5, 5)
    assert figures.train.value == 1.0
    assert figures.reference.value <= 0.2  # grey is nearest to one of the images
    assert figures.train_before.value <= 0.2
    assert figures.auc.value == 1.0
    assert figures.tpr_at_1_fpr.value == 1.0
    assert attack.asked == 10
    assert attack_figures(attack, probes, probing) == figures
    assert attack.asked == 10  # kept


def test_attacks_have_names_of_their_own():
    assert {name: attack.name for name, attack in ATTACKS.items()} == {name: name for name in ATTACKS}
    flag = next(one for one in settings_of(AuditSettings) if one.name == "attacks")
    assert set(ATTACKS) == set(flag.words)


def copy_of(folder, source, count):
    """A folder with the first distinct images of another one, with their captions."""
    folder.mkdir()
    images = read_folder(source, "--train_data_dir")
    rows = images.distinct[:count]
    for row in rows:
        images.image(row).save(folder / f"{row}.png")
    lines = [json.dumps({"file_name": f"{row}.png", "text": images.captions[row]}) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.mark.slow
def test_attacks_in_an_audit_of_a_model_with_loras(pipeline, tmp_path):
    adapted = load_pipeline(tiny_sd_path(), torch.device("cpu"))
    adapted.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted.unet))
    adapted.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    flags = {
        "train_data_dir": [copy_of(tmp_path / "train", demo_data_path(), 12)],
        "reference_data_dir": [copy_of(tmp_path / "heldout", demo_heldout_path(), 8)],
        "model": ["base=bundled", "mine=bundled"],
        "lora": [f"mine={tmp_path / 'lora'}"],
        "attacks": ["text_signal", "cyclic_denoising"],
        "dtype": ["bfloat16"],
        "num_prompts": ["1"],
        "num_images_per_prompt": ["1"],
        "num_inference_steps": ["2"],
        "num_probes": ["3"],
        "output_dir": [str(tmp_path / "audit")],
    }
    run_audit(parse_arguments([text for flag, values in flags.items() for text in (f"--{flag}", *values)]))
    report = json.loads((tmp_path / "audit" / "report.json").read_text(encoding="utf-8"))
    base, mine = report["models"]
    assert base["sha256"] != mine["sha256"]
    assert mine["path"].endswith(LORA_FILE)
    for model in (base, mine):
        assert list(model["attacks"]) == ["text_signal", "cyclic_denoising"]
        assert model["attacks"]["text_signal"]["evaluations"] == 2 * 4 * 2
        assert model["attacks"]["text_signal"]["num_train"] == 3
        assert model["attacks"]["text_signal"]["train_before"] is None
        assert model["attacks"]["cyclic_denoising"]["train_before"]["n"] == 3
    assert base["attacks"]["text_signal"]["train"]["value"] != mine["attacks"]["text_signal"]["train"]["value"]
    page = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    assert "Wen&#39;s detection, 10 steps, 4 generations: AUC" in page
    assert "16 rows of the UNet" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "x.safetensors"], "`--lora` must go on a model"),
        (["--model", "bundled", "--lora", "other=x.safetensors"], "must name one of the models"),
        (["--model", "bundled", "--lora", "nowhere"], "must be a .safetensors file, or a folder with"),
        (["--model", "bundled", "--attacks", "clyd"], "must be one or more of text_signal, clid.*did you mean `clid`"),
        (["--model", "bundled", "--dtype", "int8"], "`--dtype` must be one of float32, bfloat16, float16"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(tmp_path, flags, message):
    common = ["--train_data_dir", "bundled", "--output_dir", str(tmp_path / "audit")]
    with pytest.raises(UserError, match=message):
        parse_arguments([*flags, *common])
