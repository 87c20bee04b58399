"""LD-MoLE: sparsegen, a differentiable sparse projection whose sparsity a network computes for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.config.router_params import SparsegenParams
from mole.mixture.routers.base import Choice, Router, ScoreLinear
from mole.mixture.routers.selection import sort_experts


class SparsegenRouter(Router[SparsegenParams]):
    """`w = relu(z − τ) / (1 − λ(x))` with Σ w = 1 and a learnt sparsity λ(x) < 1 (LD-MoLE, arXiv 2509.25684).

    `z = x Wᵀ`, `λ(x) = logsigmoid(MLP(x)) + 1 − 0.01`, `τ = (Σ_S z − 1 + λ) / |S|` with S the experts that get a
    weight. The MLP is linear → GELU or ReLU → linear; its biases start at −2.5. In an adapted model the layers of one
    input width share it.

    Shape: logits `(…, E)` and the MLP's first output `(…, lambda_hidden)` → weights `(…, E)`, of which at least one is
    above 0.
    """

    linears = ("gate", "lambda_in", "lambda_out")
    input_linears = ("gate", "lambda_in")

    def __init__(self, in_features: int, num_experts: int, params: SparsegenParams) -> None:
        super().__init__(in_features, num_experts, params)
        self.lambda_in = ScoreLinear(in_features, params.lambda_hidden)
        self.lambda_out = ScoreLinear(params.lambda_hidden, 1)
        nn.init.constant_(self.lambda_in.bias, -2.5)
        nn.init.constant_(self.lambda_out.bias, -2.5)

    def sparsity(self, hidden: Tensor) -> Tensor:
        """λ(x), below 0.99, from the MLP's first output `(…, lambda_hidden)` → `(…, 1)`; larger means fewer experts."""
        activation = F.relu if self.params.lambda_activation == "relu" else F.gelu
        return F.logsigmoid(self.lambda_out(activation(hidden))) + 1 - 0.01

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        sparsity = self.sparsity(others[0])  # (…, 1)
        scale = 1 - sparsity
        # Only differences between logits count; taking off the largest keeps the digits of large logits.
        z = logits - logits.detach().amax(-1, keepdim=True)
        used = support(z.detach(), scale.detach())
        # A mean over the support, so the backward pass needs no sort.
        tau = ((z * used).sum(-1, keepdim=True) - scale) / used.sum(-1, keepdim=True)
        weights = (z - tau).relu() / scale
        return Choice(weights, logits.softmax(-1), sparsity=sparsity[..., 0])


def support(z: Tensor, scale: Tensor) -> Tensor:
    """Mask `(…, E)` of the experts that get a weight: the largest k with `scale + k · z_(k) > Σ_{top k} z`.

    Args:
        z: `(…, E)`, the logits up to a constant.
        scale: `1 − λ`, `(…, 1)`.
    """
    descending = sort_experts(z)[0]
    sums = descending.cumsum(-1)
    ranks = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    last = (scale + ranks * descending > sums).sum(-1, keepdim=True).clamp(min=1) - 1
    return z >= descending.gather(-1, last)
