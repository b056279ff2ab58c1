"""Turn token states into one unit vector per text, inside the module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MeanPooledEncoder(nn.Module):
    """Wrap an encoder so that it returns sentence embeddings: masked mean, then L2 norm 1.

    The pooling is part of the module because a pass that drops tokens has to see who reads them.
    Paper: Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Embed texts.

        Args:
            input_ids: token ids `[B, S]`.
            attention_mask: 1 for real tokens and 0 for padding, `[B, S]`; a row of zeros gives the zero vector.
            token_type_ids: segment ids `[B, S]`, zeros when absent.

        Returns:
            Unit vectors `[B, C]`.
        """
        out: Any = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        states: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
        weight = attention_mask[:, :, None].to(states.dtype)
        mean = (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=torch.finfo(states.dtype).tiny)
        return F.normalize(mean, dim=-1)
