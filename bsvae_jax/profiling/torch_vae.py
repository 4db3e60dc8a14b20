"""The paper's network and recipe in PyTorch, and how fast it trains: the peer that `bsvae bench --against torch` runs.

    python -m bsvae_jax.profiling.torch_vae '{"image_shape": [28, 28, 1], "widths": [32, 64, 128], "latent_size": 32, ...}'

Written from the description in the paper. A process measures one of its settings and prints a line of JSON: contiguous or
channels-last memory, and on CUDA fused AdamW and `torch.compile`, without or with CUDA graphs; in float32, with TF32 or
without, or under autocast to bfloat16. The data lie on the device. PyTorch is imported when a process runs this, and otherwise
passed to the functions: the package does not need it.
"""

import json
import math
import sys
import time
from itertools import pairwise
from typing import Any

SETTINGS_ON_CPU = (("contiguous", None), ("channels_last", None))
"""Memory layout and mode of `torch.compile`; None: not compiled."""
SETTINGS_ON_CUDA = (
    ("channels_last", "reduce-overhead"),
    ("channels_last", "default"),
    ("channels_last", None),
    ("contiguous", "default"),
)
"""The same, likely winners first; reduce-overhead: CUDA graphs."""


def torch_network(torch, image_shape, widths, latent):
    """Encoder and decoder in torch.nn, with the numbering of the published ones."""
    nn: Any = torch.nn

    def block(before, after, stride):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1 = nn.Sequential(
                    nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU()
                )
                self.conv2 = nn.Sequential(nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after))
                shortcut = (nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))
                self.identity = nn.Sequential(*shortcut) if (stride, before) != (1, after) else nn.Identity()

            def forward(self, x):
                return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.identity(x))

        return Block()

    height, width, channels = image_shape
    sizes, stages = [(height, width)], []
    for before, after in pairwise((channels, *widths)):
        stages.append(nn.Sequential(block(before, after, 2), block(after, after, 1)))
        sizes.append(tuple((size - 1) // 2 + 1 for size in sizes[-1]))
    features = (widths[-1], *sizes[-1])
    flat, two = math.prod(features), 2 * latent
    head = [nn.Flatten(), nn.Linear(flat, two), nn.BatchNorm1d(two), nn.LeakyReLU(), nn.Linear(two, two)]
    start = [nn.Linear(latent, flat), nn.BatchNorm1d(flat), nn.LeakyReLU(), nn.Unflatten(1, features)]
    ends = [nn.Sequential(*start, block(widths[-1], widths[-1], 1))]
    for (before, after), (small, large) in zip(pairwise((*widths[::-1], widths[0])), pairwise(sizes[::-1]), strict=True):
        odd = [big - (2 * little - 1) for little, big in zip(small, large, strict=True)]
        layers = [nn.ConvTranspose2d(before, after, 3, 2, 1, odd), nn.BatchNorm2d(after), nn.LeakyReLU()]
        if large == sizes[0]:
            layers.append(nn.ConvTranspose2d(after, channels, 3, 1, 1))
        ends.append(nn.Sequential(*layers))
    return nn.ModuleDict({"encoder": nn.Sequential(*stages, nn.Sequential(*head)), "decoder": nn.Sequential(*ends)}).eval()


def rate_and_distortion(torch, network, x, latent_size):
    """Rate (KL to N(0, I)) and BS-VAE's distortion, D/2 (log(2 pi v*(x)) + 1), in nats of each image [B, C, H, W]."""
    mean, log_variance = network["encoder"](x).chunk(2, dim=1)
    mean, log_variance = mean.float(), log_variance.float()
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    decoded = network["decoder"](z).float()
    pixels = x[0].numel()
    variance = (x - decoded).square().flatten(1).mean(dim=1) + 1.0 / (12 * 255**2)
    distortion = 0.5 * pixels * (torch.log(2 * math.pi * variance) + 1)
    rate = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(dim=1)
    return rate, distortion


def objective(torch, network, x, latent_size, beta):
    """BS-VAE: distortion + beta * rate, averaged over the batch."""
    rate, distortion = rate_and_distortion(torch, network, x, latent_size)
    return (distortion + beta * rate).mean()


def images_per_second(torch, setup):
    """Speed of each repeat, after a warm-up."""
    layout, mode = setup["layout"], setup["mode"]
    height, width, channels = setup["image_shape"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, bfloat16 = setup["batch_size"], setup["precision"] == "bfloat16"
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    network = torch_network(torch, (height, width, channels), setup["widths"], setup["latent_size"]).train().to(device)
    network = network.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5, fused=device == "cuda")
    averaged = [parameter.detach().clone() for parameter in network.parameters()]
    images = torch.randint(0, 256, (setup["images"], channels, height, width), dtype=torch.uint8, device=device)

    def loss(stored):
        x = (stored.float() / 255).to(memory_format=memory_format)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return objective(torch, network, x, setup["latent_size"], setup["beta"])

    loss = loss if mode is None else torch.compile(loss, mode=mode)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss(images[torch.randint(0, len(images), (batch,), device=device)]).backward()
        optimizer.step()
        if setup["ema"]:
            torch._foreach_lerp_(averaged, [parameter.detach() for parameter in network.parameters()], 0.001)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3 if device == "cpu" else 10):
        step()
    wait()
    speeds = []
    for _ in range(setup["repeats"]):
        begun, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - begun < setup["seconds"]:
            for _ in range(1 if device == "cpu" else 50):
                step()
                steps += 1
            wait()
        speeds.append(batch * steps / (time.perf_counter() - begun))
    return speeds


def main(setup):
    """Measure one setting, and print what was found as a line of JSON."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setup["tf32"]
    torch.backends.cudnn.benchmark = True
    found = {"images_per_second": images_per_second(torch, setup)}
    if torch.cuda.is_available():
        found["peak_memory"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
