"""Train the digit denoisers of the zoo and their judges anew: minutes on a CPU, under 45 for the largest on two cores.

    python examples/train_digits_dit.py --model digits-dit-32 --threads 2

Seeded: the same torch and threads give the same weights. The model learns the velocity of a rectified flow (arXiv:2209.03003), at
times that are shifted by the size as in Stable Diffusion 3 (arXiv:2403.03206); what is written is the moving average of its
weights. `--checkpoint FILE` keeps the state every minute, and goes on from there.

The larger one takes Muon (arXiv:2502.16982) for the matrices of its blocks: after 300 steps of 64 at 16 x 16 the loss of digits
that were held out was 0.245, and 0.276 and 0.267 by AdamW at rates of 0.002 and 0.004; batches of 32 reach 0.235 with as many
digits. `torch.optim.Muon` multiplies in bfloat16, which takes longer than the gradients do on a CPU without it. Its last steps
learn guidance: 1,877 steps by AdamW without it and 3,500 by Muon drew digits alike in distance, with broken strokes.
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

JUDGE_BATCH = 64
UNLABELED, UNIFORM = 0.1, 0.2


@dataclass(frozen=True)
class Phase:
    """Say how many steps to train, which share of them at each size, on how many digits, and what the average keeps in a step.

    A phase with `guidance` begins from the average, its teacher: what is learnt is the velocity of the data and `guidance` times
    what the teacher says of a class over what it says of none (arXiv:2210.03142). Its rate falls from `begins` times the recipe's.
    """

    steps: int
    shares: dict[int, float]
    batch: int = 64
    average: float = 0.998
    guidance: float = 0.0
    begins: float = 0.5


class Muon(torch.optim.Optimizer):
    """Step along the orthogonal factor of the momentum of each matrix `[rows, columns]`, in float32, with decay 0.01."""

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; no closure is called."""
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * 0.01)
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                matrix.add_(orthogonal(matrix.grad.lerp(momentum, 0.95)), alpha=-scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix `[rows, columns]` with all its singular values near 1: five steps of a Newton-Schulz quintic."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@dataclass(frozen=True)
class Recipe:
    """Say how to train one model: the rate is AdamW's; `muon` is that of the matrices in blocks, which AdamW has too where None.

    Before guidance the rate falls along a cosine over all steps or, where `fall` is less than 1, along a line over that share.
    """

    phases: tuple[Phase, ...]
    rate: float = 2e-3
    muon: float | None = None
    fall: float = 1.0

    @property
    def plan(self) -> list[Phase]:
        """Return the phase of each step."""
        return [phase for phase in self.phases for _ in range(phase.steps)]

    def share_of_rate(self, step: int) -> float:
        """Return what a step has of the rate."""
        plan = self.plan
        first = sum(not phase.guidance for phase in plan)
        if step >= first:
            return plan[step].begins * (len(plan) - step) / (len(plan) - first)
        rising = min(1.0, step / 100)
        if self.fall == 1.0:
            return rising * 0.5 * (1 + math.cos(math.pi * step / first))
        return rising * min(1.0, (first - step) / (self.fall * first))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return what takes the steps."""
        inner = [x for name, x in model.named_parameters() if name.startswith("blocks.") and x.ndim == 2]
        chosen = inner if self.muon is not None else []
        rest = [x for x in model.parameters() if all(x is not other for other in chosen)]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if self.muon is not None:
            found.append(Muon(chosen, self.muon))
        return found


RECIPES = {
    "digits-dit-8": Recipe((Phase(3000, {8: 1.0}),)),
    # Most is learnt where a step is cheap; 32 x 32 then starts from what 16 x 16 knows.
    "digits-dit-32": Recipe(
        (
            Phase(1500, {16: 1.0}),
            Phase(2000, {32: 0.9, 16: 0.1}, batch=32, average=0.995),
            Phase(300, {32: 0.8, 16: 0.2}, batch=32, average=0.98, guidance=0.35),
        ),
        muon=0.02,
        fall=0.4,
    ),
}


def times(count: int, edge: int, draw: torch.Generator) -> Tensor:
    """Draw times `[count]` in (0, 1): logistic normal, with a share of uniform ones, shifted by the size."""
    u = torch.randn(count, generator=draw).sigmoid()
    even = torch.rand(count, generator=draw)
    u = torch.where(torch.rand(count, generator=draw) < UNIFORM, even, u)
    shift = max(1.0, edge / 16)
    return shift * u / (1 + (shift - 1) * u)


def denoising_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    draw: torch.Generator,
    teacher: nn.Module | None = None,
    guidance: float = 0.0,
) -> Tensor:
    """Return the mean squared error of the velocity for images `[B, 1, edge, edge]`, and of the teacher's guidance in it."""
    noise = torch.randn(images.shape, generator=draw)
    time = times(len(images), images.shape[-1], draw)
    labels = torch.where(torch.rand(len(labels), generator=draw) < UNLABELED, NONE, labels)
    share = time[:, None, None, None]
    noisy, aim = (1 - share) * images + share * noise, noise - images
    if teacher is not None:
        with torch.no_grad():
            aim = aim + guidance * (teacher(noisy, time, labels) - teacher(noisy, time, torch.full_like(labels, NONE)))
    return F.mse_loss(model(noisy, time, labels), aim)


def train_model(name: str, checkpoint: Path | None) -> DiT:
    """Return the averaged weights of a denoiser."""
    torch.manual_seed(0)
    recipe = RECIPES[name]
    edges = sorted({edge for phase in recipe.phases for edge in phase.shares})
    data = {edge: digits(edge) for edge in edges}
    model, average, teacher = (DiT(config(max(edges))) for _ in range(3))
    average.load_state_dict(model.state_dict())
    optimizers = recipe.optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first = 0
    if checkpoint is not None and checkpoint.exists():
        held = torch.load(checkpoint, weights_only=True)
        first = held["step"]
        model.load_state_dict(held["model"])
        average.load_state_dict(held["average"])
        teacher.load_state_dict(held["teacher"])
        for optimizer, state in zip(optimizers, held["optimizers"]):
            optimizer.load_state_dict(state)
    plan = recipe.plan
    begun = kept = time.monotonic()
    losses: dict[int, float] = {}
    for step in range(first, len(plan)):
        # A step's own seed, so that a run which goes on draws what an unbroken one does.
        draw, phase = torch.Generator().manual_seed(step), plan[step]
        edge = list(phase.shares)[int(torch.multinomial(torch.tensor(list(phase.shares.values())), 1, generator=draw))]
        images, labels = data[edge]
        if phase.guidance and not plan[step - 1].guidance:
            for copy in (model, teacher):
                copy.load_state_dict(average.state_dict())
        rows = torch.randint(len(images) - HELD_OUT, (phase.batch,), generator=draw)
        guided = (teacher, phase.guidance) if phase.guidance else ()
        loss = denoising_loss(model, images[rows], labels[rows], draw, *guided)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = recipe.share_of_rate(step)
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * left
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            share = min(phase.average, (1 + step) / (10 + step))
            for held_value, value in zip(average.parameters(), model.parameters()):
                held_value.lerp_(value, 1 - share)
        losses[edge] = 0.98 * losses.get(edge, loss.item()) + 0.02 * loss.item()
        if step % 50 == 0 or step == len(plan) - 1:
            told = ", ".join(f"{size} x {size}: {value:.3f}" for size, value in sorted(losses.items()))
            print(f"step {step} of {len(plan)}: {told}, {time.monotonic() - begun:.0f} s", flush=True)
        if checkpoint is not None and time.monotonic() - kept > 60:
            kept = time.monotonic()
            state = {"step": step + 1, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            models = {"model": model, "average": average, "teacher": teacher}
            fresh = checkpoint.with_suffix(".new")
            torch.save({**state, **{tag: one.state_dict() for tag, one in models.items()}}, fresh)
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
        rows = torch.randint(len(images) - HELD_OUT, (JUDGE_BATCH,), generator=draw)
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
    parser.add_argument("--model", choices=[*RECIPES, "judge-8", "judge-32"], required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.model.startswith("judge"):
        model: nn.Module = train_judge(int(given.model.rpartition("-")[2]))
    else:
        model = train_model(given.model, given.checkpoint)
    out = given.out or weights(given.model)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
