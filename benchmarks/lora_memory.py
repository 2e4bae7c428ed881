"""Measures what several proxies of a LoRA need on top of the loop: memory, and the time of a forward and backward pass.

    python -m benchmarks.lora_memory [--num_shards 3] [--rank 16] [--layers 8] [--averagings 3]

A transformer of Flux's kind with random weights in bfloat16, LoRA on all projections of its attention and feed-forward
layers. Prints JSON: the process's memory before the guard, with it, after each averaging, and the peak.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.utils.data import DataLoader

from sd_memguard import GuardConfig, MemorizationGuard

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]
NUM_SAMPLES = 300


def memory(name: str) -> int:
    """Return the process's memory in MiB: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) // 1024


def make_transformer(layers: int) -> FluxTransformer2DModel:
    """Return a transformer of Flux's blocks at a third of its width, in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    sizes = {"in_channels": 64, "num_attention_heads": 8, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    text = {"joint_attention_dim": 1024, "pooled_projection_dim": 768}
    model = FluxTransformer2DModel(**sizes, **text, num_layers=layers // 2, num_single_layers=layers)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def seconds_of_step(model: FluxTransformer2DModel) -> float:
    """Return the processor's seconds of a forward and backward pass, the best of three."""
    latents, text = torch.randn(1, 64, 64), torch.randn(1, 16, 1024)
    inputs = {
        "hidden_states": latents.bfloat16(),
        "encoder_hidden_states": text.bfloat16(),
        "pooled_projections": torch.randn(1, 768).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(16, 3),
    }
    durations = []
    for _ in range(3):
        start = time.process_time()
        model(**inputs).sample.float().square().mean().backward()
        durations.append(time.process_time() - start)
    model.zero_grad()
    return min(durations)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_shards", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--averagings", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make_transformer(arguments.layers)
    model.add_adapter(LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=TARGETS))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    figures = {
        **vars(arguments),
        "million_parameters": sum(p.numel() for p in model.parameters()) // 10**6,
        "million_trained": sum(p.numel() for p in trained) // 10**6,
        "seconds_without": seconds_of_step(model),
        "mib_without": memory("VmRSS"),
    }
    config = GuardConfig(num_shards=arguments.num_shards, steps_per_round=50, group_duplicates="off", seed=0)
    guard = MemorizationGuard(config, NUM_SAMPLES)
    dataset: Any = [{"value": torch.zeros(1)} for _ in range(NUM_SAMPLES)]
    guard.attach(model, optimizer, DataLoader(dataset, batch_size=1, shuffle=True), total_steps=900)
    figures["mib_with_proxies"], figures["mib_after_averaging"] = memory("VmRSS"), []
    attached: Any = guard.attachment
    proxies = attached.ensemble.proxies
    for _ in range(arguments.averagings):
        for shard_index in range(arguments.num_shards):
            proxies.activate(shard_index)
            for parameter in trained:
                parameter.data += 0.01 * torch.randn(parameter.shape)
        start = time.process_time()
        proxies.average([1.0] * arguments.num_shards)
        figures["seconds_of_averaging"] = time.process_time() - start
        figures["mib_after_averaging"].append(memory("VmRSS"))
    attached.driver.gate.remove()  # it would ask for the samples of these batches
    figures["seconds_with"] = seconds_of_step(model)
    figures["mib_peak"] = memory("VmHWM")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
