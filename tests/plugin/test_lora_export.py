"""The adapter that a loop of others saves: loaded again by the libraries, it is the model that was trained."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_base
from peft import LoraConfig

from sd_memguard.plugin.lora_export import whole_adapter
from sd_memguard.plugin.trainable import find_adapter, make_proxies, trained_parameters

RANK, ALPHA = 2, 6


def make_unet(pipeline):
    return UNet2DConditionModel.from_pretrained(pipeline / "unet").requires_grad_(False)


@pytest.mark.skipif(
    not hasattr(lora_base, "LORA_ADAPTER_METADATA_KEY"), reason="this version of diffusers does not save alpha"
)
@pytest.mark.parametrize("rank", [None, 3, 40])  # 40 is more than any layer has
def test_a_saved_adapter_loads_as_the_mean_of_the_proxies(pipeline, tmp_path, rank):
    unet = make_unet(pipeline)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v"]))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    parameters = trained_parameters(optimizer, [unet])
    adapter = find_adapter(parameters, [unet])
    proxies = make_proxies(parameters, optimizer, 2, adapter, None, None)
    random = torch.Generator().manual_seed(0)
    for shard_index in (1, 0):
        proxies.activate(shard_index)
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=0.1, generator=random)
    if rank is not None:
        proxies.average([1.0, 3.0])  # part of the change is in the second adapter then
        for shard_index in (1, 0):
            proxies.activate(shard_index)
            for parameter in parameters.values():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    changes = proxies.changes([1.0, 1.0])
    config = unet.peft_config["default"].to_dict()

    with whole_adapter(proxies, adapter, [1.0, 1.0], rank) as fit:
        unet.save_lora_adapter(tmp_path)
    assert unet.peft_config["default"].to_dict() == config

    loaded = make_unet(pipeline)
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    loaded.fuse_lora()
    missed = total = 0.0
    for layer, change in changes.items():
        before = unet.get_submodule(layer).base_layer.weight
        found = loaded.get_submodule(layer).base_layer.weight.double() - before.double()
        missed += float((found - change.up @ change.down).square().sum())
        total += float(change.up.matmul(change.down).square().sum())
    assert fit.rank == (rank or 2 * RANK)
    assert fit.relative_error == pytest.approx((missed / total) ** 0.5, abs=1e-6)
    assert (fit.relative_error < 1e-6) == (rank != 3)
