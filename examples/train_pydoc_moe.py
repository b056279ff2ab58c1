"""Train the small mixture of experts of the zoo, `zoo:pydoc-moe`, anew: some minutes on one thread of a CPU.

    python examples/train_pydoc_moe.py --out models/pydoc_moe.safetensors

Seeded: the same torch, the same text and one thread give the same weights. The text is Python's own documentation, so another
version of Python gives others. Experts are kept busy by the loss of the Switch transformer (arXiv:2101.03961), gently: routing
stays as uneven as that of larger models.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from effcompile.models.mixtral import Mixtral
from effcompile.models.text import pydoc_text
from effcompile.models.trained_pydoc_moe import HELD_OUT, config, held_out

BATCH, LENGTH = 12, 256


class Balance:
    """Collect what the routers of one step chose; `loss` is 1 where all experts are equally busy."""

    def __init__(self, model: Mixtral) -> None:
        self.losses: list[Tensor] = []
        self.counts = torch.zeros(len(model.layers), model.config.experts)
        for number, layer in enumerate(model.layers):
            layer.moe.router.register_forward_hook(
                lambda router, args, out, n=number: self.see(n, router, args[0], out[1])
            )

    def see(self, layer: int, router: torch.nn.Module, x: Tensor, chosen: Tensor) -> None:
        """Take one layer's choice `[T, k]` of tokens x `[T, C]`."""
        shares = F.softmax(router.gate(x).float(), dim=-1).mean(0)
        busy = torch.bincount(chosen.flatten(), minlength=len(shares)).float()
        self.losses.append(len(shares) * (shares * busy / busy.sum()).sum())
        self.counts[layer] += busy

    def loss(self) -> Tensor:
        """Return the mean over the layers and forget the step."""
        total = torch.stack(self.losses).mean()
        self.losses.clear()
        return total


def by_expert(experts: torch.nn.Module, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Run only the experts that a token chose, one after the other: what the model does, for less work in training."""
    out = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down)):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[tokens], gate_up).chunk(2, dim=-1)
        answer = F.linear(F.silu(gate) * up, down) * weights[tokens, places, None]
        out = out.index_add(0, tokens, answer)
    return out


def batches(text: Tensor, seed: int) -> Tensor:
    """Return random windows `[BATCH, LENGTH + 1]` of the text."""
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH + 1)].long()


def bits(model: Mixtral) -> float:
    """Return bits for a byte of the text that was held out."""
    with torch.no_grad():
        tokens = held_out(24, LENGTH + 1)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item() / math.log(2)


def train(steps: int, rate: float = 4e-3) -> tuple[Mixtral, Balance]:
    """Return the trained model, and how busy its experts were."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Mixtral(config())
    for layer in model.layers:
        experts = layer.moe.experts
        experts.forward = by_expert.__get__(experts)
    balance = Balance(model)
    text = torch.frombuffer(bytearray(pydoc_text().encode()), dtype=torch.uint8)
    text = text[: int(len(text) * (1 - HELD_OUT))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    begun = time.monotonic()
    for step in range(steps):
        share = min(1.0, step / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        window = batches(text, step)
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        (loss + 0.01 * balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            taken = time.monotonic() - begun
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits a byte, {taken:.0f} s", flush=True)
    return model, balance


def main() -> None:
    """Train, tell what came of it, and write the weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("pydoc_moe.safetensors"))
    parser.add_argument("--steps", type=int, default=1400)
    given = parser.parse_args()
    model, balance = train(given.steps)
    balance.counts.zero_()
    print(f"held out: {bits(model):.3f} bits a byte; shares of the experts, layer by layer:")
    for row in balance.counts / balance.counts.sum(1, keepdim=True):
        print("  " + " ".join(f"{share:.3f}" for share in row.tolist()))
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, given.out)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
