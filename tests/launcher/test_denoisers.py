"""Finding the denoiser that a script trains."""

import gc
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
from torch import nn

from sd_memguard.errors import LoopError
from sd_memguard.launcher.denoisers import (
    find_denoisers,
    find_trained_denoiser,
    is_denoiser,
    trained_parameters,
    watch_calls,
)
from sd_memguard.launcher.scripts import (
    ScriptError,
    check_flags,
    check_resume,
    check_source,
    output_folder,
    total_steps,
)
from tests.plugin.families import FAMILIES


def make_unet():
    gc.collect()  # those of other tests
    return FAMILIES["SD"].make()


def adamw(*modules):
    return torch.optim.AdamW([p for module in modules for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_found(name):
    model = FAMILIES[name].make()
    assert find_trained_denoiser(adamw(model)) is model


def test_transformers_of_diffusers_are_known():
    names = [n for n in dir(diffusers) if n.endswith(("Transformer2DModel", "Transformer3DModel"))]
    classes = [getattr(diffusers, name) for name in names]
    unknown = [cls.__name__ for cls in classes if not is_denoiser(cls.__new__(cls))]
    assert unknown == ["Transformer2DModel"]  # a block


def test_blocks_and_control_nets_are_none():
    unet = make_unet()
    control_net = diffusers.ControlNetModel.from_unet(unet)
    assert not is_denoiser(control_net)
    assert find_denoisers() == [unet]


def test_the_one_in_training_is_found_among_several():
    teacher, unet, ema = make_unet().requires_grad_(False), make_unet(), make_unet().requires_grad_(False)
    assert find_trained_denoiser(adamw(unet)) is unet
    del teacher, ema


def test_inside_ddp_compile_and_peft():
    unet = make_unet()
    wrapped = torch.compile(nn.DataParallel(unet), backend="eager")
    assert find_trained_denoiser(adamw(wrapped)) is unet
    lora = peft.get_peft_model(unet, peft.LoraConfig(r=2, target_modules=["to_k"]))
    assert find_trained_denoiser(adamw(lora)) is unet
    assert len(find_denoisers()) == 1


def test_adapter_that_replaced_the_forward_of_layers():
    """As sd-scripts, LyCORIS, OneTrainer and ai-toolkit do."""

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.down = nn.Linear(layer.in_features, 2, bias=False)
            self.up = nn.Linear(2, layer.out_features, bias=False)
            self.plain = layer.forward
            layer.forward = self.forward

        def forward(self, x):
            return self.plain(x) + self.up(self.down(x))

    unet = make_unet().requires_grad_(False)
    layers = [module for name, module in unet.named_modules() if name.endswith("to_k")]
    network = nn.ModuleList(Adapter(layer) for layer in layers)
    encoder = nn.Linear(2, 2)
    optimizer = adamw(network, encoder)
    assert find_trained_denoiser(optimizer) is unet
    assert len(trained_parameters(unet, optimizer)) == 2 * len(layers)


def test_control_net_is_refused_by_name():
    unet = make_unet().requires_grad_(False)
    control_net = diffusers.ControlNetModel.from_unet(unet).requires_grad_(True)
    with pytest.raises(LoopError, match="trains ControlNetModel, and UNet2DConditionModel stays as it is"):
        find_trained_denoiser(adamw(control_net), [control_net])
    with pytest.raises(LoopError, match="trains ControlNetModel, and UNet2DConditionModel stays as it is"):
        find_trained_denoiser(adamw(control_net))


def test_textual_inversion_is_refused_by_name():
    unet = make_unet().requires_grad_(False)
    encoder = nn.Sequential(nn.Embedding(3, 4))
    optimizer = torch.optim.AdamW(encoder[0].parameters())
    with pytest.raises(LoopError, match="trains Sequential, and UNet2DConditionModel stays"):
        find_trained_denoiser(optimizer, [encoder])
    del unet


def test_no_denoiser_at_all():
    model = nn.Linear(2, 2)
    with pytest.raises(LoopError, match="trains Linear, and there is no denoiser of a class"):
        find_trained_denoiser(adamw(model))
    assert find_trained_denoiser(adamw(model), classes=["Linear"]) is model


def test_two_denoisers_are_refused():
    models = [make_unet(), make_unet()]
    with pytest.raises(LoopError, match="2 denoisers"):
        find_trained_denoiser(adamw(*models))


def test_calls_are_heard_of_until_the_right_one():
    unet, other = make_unet(), make_unet()
    generator = torch.Generator().manual_seed(0)
    arguments = FAMILIES["SD"].arguments(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.2]), generator)
    heard, gated = [], []

    def on_call(module):
        heard.append(module)
        if module is unet:
            unet.register_forward_hook(lambda *_: gated.append(1))
        return module is unet

    with watch_calls(on_call):
        with torch.no_grad():
            unet(**arguments)
        for _ in range(2):
            other(**arguments)
            unet(**arguments)
    assert heard == [other, unet]
    assert len(gated) == 2  # from the very call on
    assert not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import jax\n", "Flax"),
        ("from accelerate import Accelerator\nloss = -1 * F.logsigmoid(inside).mean()", "preferences"),
        ("teacher_unet = UNet2DConditionModel()", "teacher"),
        ("attn = CustomDiffusionAttnProcessor", "mask"),
        ("disc_optimizer = 1", "discriminator"),
        ("    controlnet, optimizer = accelerator.prepare(\n        controlnet, optimizer)", "ControlNet"),
        ("x = accelerator.prepare(t2iadapter, optimizer)", "T2I-Adapter"),
        ("x = accelerator.prepare(text_encoder_1, text_encoder_2, optimizer)", "the text encoder alone"),
        ("from diffusers import UVit2DModel", "image tokens"),
        ("from transformers import DataCollatorForLanguageModeling", "language model"),
        ("        model = AutoencoderRAE(\n", "autoencoder"),
        ("from neural_compressor.utils import logger", "text encoder"),
        ("from diffusers import Cosmos2_5_PredictBasePipeline", "each frame"),
    ],
)
def test_sources_that_are_refused(source, reason):
    with pytest.raises(LoopError, match=reason):
        check_source(source, "train.py")


def test_plain_source_is_not():
    check_source("from diffusers import UNet2DConditionModel\nloss = F.mse_loss(a, b)", "train.py")
    check_source("x = accelerator.prepare(unet, text_encoder, optimizer, train_dataloader)", "train.py")
    check_source("    vae = AutoencoderKL()\nmodel = AutoencoderKL.from_pretrained(name)", "train.py")


def test_flags_that_are_refused():
    check_flags(SimpleNamespace(loss_type="l2", use_lpl=False))
    with pytest.raises(LoopError, match="`--loss_type huber` cannot"):
        check_flags(SimpleNamespace(loss_type="huber"))
    with pytest.raises(LoopError, match="`--use_lpl` cannot"):
        check_flags(SimpleNamespace(use_lpl=True))


@pytest.mark.parametrize(
    ("output_dir", "folder"), [("runs/a", "runs/a"), ("runs/a.pth", "runs"), ("runs/v1.5", "runs/v1.5")]
)
def test_a_file_of_weights_is_no_folder(output_dir, folder):
    assert output_folder(SimpleNamespace(output_dir=output_dir)) == Path(folder)
    assert output_folder(None) is None


def test_a_script_that_drops_batches_cannot_resume_several_shards():
    source, resumed = (
        "if epoch == first_epoch and step < resume_step:",
        SimpleNamespace(resume_from_checkpoint="latest"),
    )
    with pytest.raises(ScriptError, match="cannot be had with 2 shards"):
        check_resume(source, resumed, 2)
    check_resume(source, resumed, 1)
    check_resume(source, SimpleNamespace(resume_from_checkpoint=None), 2)
    check_resume("accelerator.skip_first_batches(loader, resume_step)", resumed, 2)


@pytest.mark.parametrize("flag", ["num_train_epochs", "num_epochs"])
def test_the_length_of_a_run_in_epochs(flag):
    loader = range(7)
    assert total_steps(SimpleNamespace(**{flag: 3}, gradient_accumulation_steps=2), loader) == 12
    assert total_steps(SimpleNamespace(**{flag: 3}, max_train_steps=5), loader) == 5
    assert total_steps(SimpleNamespace(), loader) is None


FIXTURE = Path(__file__).parents[1] / "fixtures" / "diffusers_scripts.json"


def test_survey_of_diffusers_scripts():
    """Each script is listed once, here and in the docs; denoisers of guarded ones are known; sources, where at hand."""
    page = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text()
    table = re.findall(r"^\| `(\S+\.py)` \|", page.partition("## Script by script")[2], re.MULTILINE)
    rows = json.loads(FIXTURE.read_text())["scripts"]
    listed = [row["script"] for row in rows]
    assert table == listed == sorted(set(listed))
    for row in rows:
        names = row["denoiser"].split()
        if row["verdict"] == "guarded":
            assert names
            assert all(is_denoiser(type(name, (), {})()) for name in names)
    if examples := os.environ.get("DIFFUSERS_EXAMPLES"):
        assert {path.relative_to(examples).as_posix() for path in Path(examples).rglob("train_*.py")} <= set(listed)
        for row in rows:
            with pytest.raises(LoopError) if row["stage"] == "source" else nullcontext():
                check_source((Path(examples) / row["script"]).read_text(), row["script"])
