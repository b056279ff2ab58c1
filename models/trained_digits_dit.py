"""Give two small diffusion transformers with trained weights, which denoise handwritten digits.

`digits-dit-8` has 16 tokens and samples in seconds. `digits-dit-32` has 256, and was trained at 16 x 16 pixels (64 tokens) too, so
that a schedule with a low stage finds a size that it knows; guidance by class is part of what it learnt (as in FLUX.1-dev), so that
one call is enough. `examples/train_digits_dit.py` trained both, in minutes on a CPU, on the 5,000 digits of
`digits.handwritten_digits`; their weights lie beside this file in float16, with those of `Judge`, a small classifier whose features
distances between sets of images are taken in.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.models.digits import handwritten_digits
from effcompile.models.dit import DiT, DiTConfig
from effcompile.models.entry import Inputs, ZooEntry, random_normal

HELD_OUT = 1000
"""How many of the digits training did not see: the last ones."""
NONE = 10
"""The label that stands for no class."""


def weights(name: str) -> Path:
    """Return where the weights of `digits-dit-8`, `digits-dit-32` or `judge` lie."""
    return Path(__file__).with_name(f"{name.replace('-', '_')}.safetensors")


def config(edge: int) -> DiTConfig:
    """Return the sizes of the model for images of 8 or 32 pixels."""
    if edge == 8:
        return DiTConfig(latent=8, channels=1, width=96, layers=4, heads=4, classes=NONE, frequencies=64)
    return DiTConfig(latent=32, others=(16,), channels=1, width=96, layers=4, heads=4, classes=NONE, frequencies=64)


def digits(edge: int) -> tuple[Tensor, Tensor]:
    """Return all digits as (images `[5000, 1, edge, edge]` in [-1, 1], labels `[5000]`); the edge divides 32."""
    images, labels = handwritten_digits()
    wide = F.pad(images[:, None].float() / 255, (2, 2, 2, 2))
    return F.avg_pool2d(wide, 32 // edge) * 2 - 1, labels


class Judge(nn.Module):
    """Classify digits of 8 to 32 pixels; what it classifies by are features `[B, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(32 * 16, 32)
        self.fc2 = nn.Linear(32, NONE)

    def features(self, images: Tensor) -> Tensor:
        """Return features `[B, 32]` of images `[B, 1, edge, edge]`."""
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(images))))))
        return self.fc1(F.adaptive_avg_pool2d(x, 4).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, 10]`."""
        return self.fc2(F.relu(self.features(images)))


def judge(edge: int) -> Judge:
    """Return the judge of images of 8 or 32 pixels, in float32."""
    found = Judge()
    _load(found, weights(f"judge-{edge}"), torch.float32)
    return found.eval()


def build(edge: int, dtype: torch.dtype, meta: bool) -> nn.Module:
    """Build the model with its trained weights; on the meta device with none."""
    if meta:
        with torch.device("meta"):
            return DiT(config(edge)).to(dtype)
    model = DiT(config(edge))
    _load(model, weights(f"digits-dit-{edge}"), dtype)
    return model.to(dtype)


def _load(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    model.load_state_dict({name: value.to(dtype) for name, value in load_file(path).items()}, assign=True)


def _inputs(edge: int, batch: int, seq: int) -> Inputs:
    time = (torch.arange(batch) + 1) / (batch + 1)
    return (random_normal(batch, 1, edge, edge), time, torch.arange(batch) % NONE), {}


def _entry(edge: int, summary: str) -> ZooEntry:
    return ZooEntry(
        name=f"digits-dit-{edge}",
        summary=summary,
        source="examples/train_digits_dit.py",
        license="Apache-2.0",
        build=partial(build, edge),
        inputs=partial(_inputs, edge),
        default_seq=config(edge).tokens,
        fixed_seq=config(edge).tokens,
        trained=True,
    )


ENTRIES = (
    _entry(8, "DiT over handwritten digits of 8 x 8 pixels, 16 tokens, trained"),
    _entry(32, "DiT over handwritten digits of 32 x 32 and 16 x 16 pixels, 256 tokens, trained"),
)
