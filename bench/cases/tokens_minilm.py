"""Measure sentence embeddings of ragged batches: without padding (exact), and on fewer tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.case import Case, Row, Settings, Watch
from bench.model_case import DTYPES
from bench.peers import release
from bench.stats import ratios
from bench.token_arms import chosen, points, take_turns, token_options
from effcompile.models import zoo
from effcompile.models.packages import package_descriptions

PADDED, EXACT = "padded", "exact"
POLICIES: Mapping[str, str] = {
    "spatten-0.9": "spatten{keep=0.9}",
    "spatten-0.7": "spatten{keep=0.7}",
    "spatten-0.5": "spatten{keep=0.5}",
    "spatten-0.3": "spatten{keep=0.3}",
}
"""What is swept, by the name of its arm."""


@dataclass(frozen=True)
class TokensMiniLM(Case):
    """Embed long descriptions in every arm, a batch a round, and look each one up by its synopsis."""

    name: ClassVar[str] = "tokens-minilm"
    title: ClassVar[str] = "Padding and token policies on MiniLM-L6"
    headline: ClassVar[bool] = False
    about: ClassVar[str] = (
        "Unmodified transformers BertModel with the masked mean-pool, trained weights; long descriptions of the machine's Debian "
        "packages in batches of 32 that are padded to 256 tokens, as many as the model was trained on. padded: ours without the "
        "pass unpad; exact: ours as it is. A round is one batch, which every arm encodes. accuracy: R@1, whether a package's "
        "one-line synopsis (encoded eagerly) is nearest to its own description; points: the difference to the exact arm in "
        "percent, with a 95 % interval of the paired differences. cosine: of an arm's embeddings to the exact ones."
    )
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    adds_arms: ClassVar[bool] = True
    model: str = "minilm-l6"
    batch: int = 32
    length: int = 256
    dtypes: tuple[str, ...] = ("float32",)
    policies: Mapping[str, str] = field(default_factory=lambda: POLICIES)

    def arms(self, device: str) -> tuple[str, ...]:
        """Return padded, exact and every policy; the first is the baseline."""
        return (PADDED, EXACT, *self.policies)

    def rows(self, settings: Settings) -> Sequence[Row]:
        """Return one row a dtype."""
        wanted = [dtype for dtype in self.dtypes if dtype in settings.dtypes or not settings.dtypes]
        sizes = {"batch": 8, "length": 64} if settings.quick else {"batch": self.batch, "length": self.length}
        return [Row(f"{sizes['batch']}x{sizes['length']}-{dtype}", {**sizes, "dtype": dtype}) for dtype in wanted]

    def measure(self, row: Row, settings: Settings, watch: Watch) -> Sequence[dict[str, Any]]:
        """Measure all arms on the same batches, in turn."""
        torch.set_num_threads(settings.threads)
        release()
        load = [os.getloadavg()[0]]
        batch, length = int(row.parameters["batch"]), int(row.parameters["length"])
        names = chosen(
            self.chosen_arms(settings), (PADDED, EXACT), list(self.policies)[1:2] if settings.quick else None
        )
        loaded = zoo.load(self.model, dtype=DTYPES[str(row.parameters["dtype"])])
        packages = package_descriptions()
        packages = packages[: 2 * batch if settings.quick else len(packages) // batch * batch]
        given = _tokens(loaded.tokenizer, [package.text for package in packages], length)

        def batches() -> Iterator[dict[str, Tensor]]:
            for begin in range(0, len(packages), batch):
                yield {name: value[begin : begin + batch] for name, value in given.items()}

        policies = {name: self.policies.get(name, "") for name in names}
        options = {name: token_options(policy) for name, policy in policies.items()}
        options[PADDED] = {"disable": ("unpad",)}
        turns = take_turns(loaded.model, options, batches, watch)
        with torch.no_grad():
            asked = loaded.model(**_tokens(loaded.tokenizer, [package.synopsis for package in packages], 64)).float()
        right = {name: (asked @ found.T).argmax(-1) == torch.arange(len(asked)) for name, found in turns.found.items()}
        cosine = {name: (found * turns.found[EXACT]).sum(-1) for name, found in turns.found.items()}
        arms = {
            name: {
                "seconds": turns.spreads[name].to_json(),
                "policy": policies[name],
                "texts_per_second": round(batch / turns.spreads[name].median, 3),
                "compile_seconds": turns.compile_seconds[name],
                "quality": {**points(right[name], right[EXACT]), "cosine": round(float(cosine[name].mean()), 4)},
            }
            for name in names
        }
        load.append(os.getloadavg()[0])
        real = given["attention_mask"].sum(-1)
        longest = torch.stack([part.max() for part in real.split(batch)]).double()
        return [
            {
                "id": row.id,
                "parameters": {**row.parameters, "texts": len(packages)},
                "notes": [
                    f"{100 * float(real.double().mean()) / length:.1f} % of the positions are real; a batch's longest text has "
                    f"{float(longest.mean()):.0f} tokens on average"
                ],
                "rounds": len(turns.spreads[EXACT].samples),
                "warmup": 1,
                "load": [round(value, 2) for value in load],
                "arms": arms,
                "ratios": ratios(turns.spreads, (PADDED, EXACT), ()),
            }
        ]


def _tokens(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Return ids and mask `[N, length]`, texts cut and padded to one length."""
    if tokenizer is None:  # a model with random weights takes anything
        ids = torch.tensor([[ord(c) % 100 for c in text[:length].ljust(length, "\0")] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}
    made = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}
