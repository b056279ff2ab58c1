"""A mixture of experts as GShard writes it: two choices a token, a capacity, and one-hot einsums (arXiv:2006.16668)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GShard(nn.Module):
    """Run [1, S, M] tokens through experts that take C = top_k S / E of them each; what comes later is dropped."""

    def __init__(self, hidden: int, inner: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))

    def route(self, x: Tensor) -> Tensor:
        """Return the combine weights [S, E, C]."""
        gates = self.gate(x).float().softmax(-1)
        first = gates.argmax(1)
        mask1 = F.one_hot(first, self.experts)
        mask2 = F.one_hot(gates.masked_fill(mask1.bool(), -1.0).argmax(1), self.experts)
        places1 = torch.cumsum(mask1, 0) - 1
        places2 = torch.cumsum(mask2, 0) - 1 + mask1.sum(0, keepdim=True)
        weight1, weight2 = (gates * mask1).sum(1), (gates * mask2).sum(1)
        total = weight1 + weight2
        capacity = 2 * x.shape[0] // self.experts
        terms = []
        for mask, places, weight in ((mask1, places1, weight1 / total), (mask2, places2, weight2 / total)):
            kept = mask * torch.lt(places, capacity)
            place = F.one_hot((places * kept).sum(1), capacity).float()
            terms.append(torch.einsum("se,sc->sec", weight[:, None] * kept.float(), place))
        return terms[0] + terms[1]

    def forward(self, x: Tensor) -> Tensor:
        """Route, send, run the experts, and bring back."""
        rows = x.reshape(-1, x.shape[-1])
        combine = self.route(rows)
        y = torch.einsum("sec,sm->ecm", combine.bool().type_as(rows), rows)
        y = torch.einsum("ech,ehm->ecm", F.relu(torch.einsum("ecm,emh->ech", y, self.up)), self.down)
        return torch.einsum("sec,ecm->sm", combine.type_as(rows), y).view(*x.shape)
