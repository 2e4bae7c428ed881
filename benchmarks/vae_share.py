"""What the VAE adds to a training step of SD 1.5 where latents are not kept, in operations: counted, nothing is run.

python -m benchmarks.vae_share
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory_sd15 import make_networks

SIDE, FACTOR = 512, 8


def main() -> None:
    """Count on tensors without content."""
    with torch.device("meta"):
        unet, vae = make_networks(320, real=True)
        side = SIDE // FACTOR
        latents, captions, timesteps = torch.empty(1, 4, side, side), torch.empty(1, 77, 768), torch.empty(1)
        with FlopCounterMode(display=False) as step:
            unet(latents, timesteps, captions).sample.sum().backward()
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            vae.encode(torch.empty(1, 3, SIDE, SIDE))
    counts = [counter.get_total_flops() / 1e12 for counter in (step, encoding)]
    print(f"an image of {SIDE} px: UNet forward and backward {counts[0]:.2f} TFLOP, VAE encoder {counts[1]:.2f} TFLOP")
    print(f"so a step with the VAE takes {1 + counts[1] / counts[0]:.2f} times the operations")


if __name__ == "__main__":
    main()
