"""Train one step of a small model with softcapped attention through a pass and a kernel from outside effcompile.

python examples/own_pass/run.py              the pass alone, given as an option
python -m pip install -e examples/own_pass   then the same command finds both, without being told
"""

import math
import time
from importlib.metadata import entry_points

import torch
from eff_example.unit_scale import RemoveUnitScale
from torch import Tensor, nn

import effcompile as eff

LENGTH, WIDTH, HEADS, CAP = 128, 64, 4, 30.0


class Layer(nn.Module):
    """Attend causally with softcapped scores, and scale what is added to the residual stream, here by one."""

    keep: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.residual_multiplier = 1.0
        self.register_buffer("keep", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to the same shape."""
        batch = x.shape[0]
        q, k, v = (
            part.view(batch, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(WIDTH, dim=2)
        )
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(WIDTH // HEADS))
        scores = torch.tanh(scores / CAP) * CAP
        scores = scores.masked_fill(~self.keep, float("-inf"))
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, LENGTH, WIDTH)
        return x + self.out(y) * self.residual_multiplier


def gradients(model: nn.Module, call: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradient of every parameter for one step."""
    model.zero_grad()
    call(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    """Compile with the pass and the kernel and compare gradients with eager."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(2)))
    x = torch.randn(2, LENGTH, WIDTH)

    installed = any(point.value == "eff_example" for point in entry_points(group="effcompile.folders"))
    # Installed, it is found like the built-in ones; else it is given by hand. A kernel is always found, never given.
    options = {} if installed else {"passes": [RemoveUnitScale()]}
    fast = torch.compile(model, backend="eff", options={**options, "strict": True})

    begun = time.perf_counter()
    found = gradients(model, fast, x)
    first = time.perf_counter() - begun
    expected = gradients(model, model, x)
    difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))

    print(f"eff_example is {'installed' if installed else 'not installed: the pass is given as an option'}")
    for graph in eff.report()["graphs"]:
        for site in graph["sites"]:
            print(f"{site['id']}: softcap {site['softcap']}, mask {site['mask']}, kernel {site['kernel']}")
        print(*(f"  {note}" for note in graph["notes"]), sep="\n")
    print(f"largest difference of a gradient from eager: {difference:.1e}; first step {first:.1f} s")
    assert len(found) == len(expected)
    assert difference < 1e-4


if __name__ == "__main__":
    main()
