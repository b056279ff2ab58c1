"""Train the digit denoisers of the zoo and their judges anew: about half an hour on one thread of a CPU.

    python examples/train_digits_dit.py --model digits-dit-32

Seeded: the same torch and one thread give the same weights. The model learns the velocity of a rectified flow (arXiv:2209.03003),
at times that are shifted by the size as in Stable Diffusion 3 (arXiv:2403.03206); what is written is the moving average of its
weights. `--checkpoint FILE` keeps the state every minute, and goes on from there.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from effcompile.models.dit import DiT
from effcompile.models.trained_digits_dit import HELD_OUT, NONE, Judge, config, digits, weights

BATCH = 64
UNLABELED, UNIFORM = 0.1, 0.2
RATE = 2e-3
HORIZON = {"digits-dit-8": 3000, "digits-dit-32": 3100}
"""The rate falls along a cosine that is 0 after so many steps; where fewer are taken, the average of the weights does the rest."""


@dataclass(frozen=True)
class Phase:
    """Say how many steps to train, which share of them at each size, and what the average keeps of itself in a step."""

    steps: int
    shares: dict[int, float]
    average: float = 0.998


PHASES = {
    "digits-dit-8": (Phase(3000, {8: 1.0}),),
    # Most is learnt where a step is cheap; 32 x 32 then starts from what 16 x 16 knows.
    "digits-dit-32": (Phase(1600, {16: 1.0}), Phase(277, {32: 0.8, 16: 0.2}, average=0.98)),
}


def times(count: int, edge: int, draw: torch.Generator) -> Tensor:
    """Draw times `[count]` in (0, 1): logistic normal, with a share of uniform ones, shifted by the size."""
    u = torch.randn(count, generator=draw).sigmoid()
    even = torch.rand(count, generator=draw)
    u = torch.where(torch.rand(count, generator=draw) < UNIFORM, even, u)
    shift = max(1.0, edge / 16)
    return shift * u / (1 + (shift - 1) * u)


def denoising_loss(model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Return the mean squared error of the velocity for images `[B, 1, edge, edge]`."""
    noise = torch.randn(images.shape, generator=draw)
    time = times(len(images), images.shape[-1], draw)
    labels = torch.where(torch.rand(len(labels), generator=draw) < UNLABELED, NONE, labels)
    share = time[:, None, None, None]
    return F.mse_loss(model((1 - share) * images + share * noise, time, labels), noise - images)


def train_model(name: str, checkpoint: Path | None) -> DiT:
    """Return the averaged weights of a denoiser."""
    torch.manual_seed(0)
    edges = sorted({edge for phase in PHASES[name] for edge in phase.shares})
    data = {edge: digits(edge) for edge in edges}
    model, average = DiT(config(max(edges))), DiT(config(max(edges)))
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        held = torch.load(checkpoint, weights_only=True)
        first = held["step"]
        model.load_state_dict(held["model"])
        average.load_state_dict(held["average"])
        optimizer.load_state_dict(held["optimizer"])
    plan = [phase for phase in PHASES[name] for _ in range(phase.steps)]
    begun = kept = time.monotonic()
    losses: dict[int, float] = {}
    for step in range(first, len(plan)):
        # A step's own seed, so that a run which goes on draws what an unbroken one does.
        draw = torch.Generator().manual_seed(step)
        shares = plan[step].shares
        edge = list(shares)[int(torch.multinomial(torch.tensor(list(shares.values())), 1, generator=draw))]
        images, labels = data[edge]
        rows = torch.randint(len(images) - HELD_OUT, (BATCH,), generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / HORIZON[name]))
        loss = denoising_loss(model, images[rows], labels[rows], draw)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            share = min(plan[step].average, (1 + step) / (10 + step))
            for held_value, value in zip(average.parameters(), model.parameters()):
                held_value.lerp_(value, 1 - share)
        losses[edge] = 0.98 * losses.get(edge, loss.item()) + 0.02 * loss.item()
        if step % 50 == 0 or step == len(plan) - 1:
            told = ", ".join(f"{size} x {size}: {value:.3f}" for size, value in sorted(losses.items()))
            print(f"step {step} of {len(plan)}: {told}, {time.monotonic() - begun:.0f} s", flush=True)
        if checkpoint is not None and time.monotonic() - kept > 60:
            kept = time.monotonic()
            state = {"step": step + 1, "model": model.state_dict(), "average": average.state_dict()}
            fresh = checkpoint.with_suffix(".new")
            torch.save({**state, "optimizer": optimizer.state_dict()}, fresh)
            fresh.rename(checkpoint)
    return average


def train_judge(edge: int, steps: int = 1200) -> Judge:
    """Return a classifier of digits, and print how many of those that it did not see it names."""
    torch.manual_seed(1)
    model = Judge()
    images, labels = digits(edge)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(len(images) - HELD_OUT, (BATCH,), generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = (model(images[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]).float().mean()
    print(f"judge of {edge} x {edge}: {100 * right:.1f} % of the digits that were held out")
    return model


def main() -> None:
    """Train one model and write its weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*PHASES, "judge-8", "judge-32"], required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.model.startswith("judge"):
        model: nn.Module = train_judge(int(given.model.rpartition("-")[2]))
    else:
        model = train_model(given.model, given.checkpoint)
    out = given.out or weights(given.model)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
