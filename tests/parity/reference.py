"""The routing methods and their losses, written down once more: slow, plain, one token at a time.

These are the papers' formulas over Python floats (which are float64), with loops over tokens and experts and
nothing but `math`. They share no line with `mole.mixture`, so that an error in one shows
against the other. A token's routing is computed from its logits `z` alone; what a method's own small
network adds (AdaMoLE's threshold, LD-MoLE's λ) is computed here too, from that network's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Vector = Sequence[float]
Matrix = Sequence[Vector]
EPSILON = 1e-5
"""DynMoLE adds this to every probability before it takes the entropy."""
SHANNON_BAND = 1e-3
"""Next to q = 1 the formulas with ε run away (ε / 0), so Shannon's limit holds in this neighbourhood, not only at 1."""


class Token(NamedTuple):
    """One token's routing: what the adapted layer does with each expert, and how unsure the router was."""

    weights: list[float]
    probs: list[float]
    entropy: float


# ---------------------------------------------------------------------------------------------------------
# Pieces


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def linear(x: Vector, weight: Matrix, bias: Vector | None = None) -> list[float]:
    added = [0.0] * len(weight) if bias is None else bias
    return [dot(x, row) + b for row, b in zip(weight, added, strict=True)]


def softmax(z: Vector) -> list[float]:
    top = max(z)
    powers = [math.exp(value - top) for value in z]
    return [power / math.fsum(powers) for power in powers]


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t >= 0 else math.exp(t) / (1 + math.exp(t))


def log_sigmoid(t: float) -> float:
    return min(t, 0.0) - math.log1p(math.exp(-abs(t)))


def logsumexp(z: Vector) -> float:
    top = max(z)
    return top + math.log(math.fsum(math.exp(value - top) for value in z))


def descending(values: Vector) -> list[int]:
    """Indices from the largest value to the smallest; of equal values the lower index comes first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def renormalised(p: Vector, kept: set[int]) -> list[float]:
    total = math.fsum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def shannon(p: Vector) -> float:
    if len(p) == 1:
        return 0.0
    return -math.fsum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


def tsallis(p: Vector, q: float) -> float:
    if len(p) == 1:
        return 0.0
    if abs(q - 1) < SHANNON_BAND:
        return shannon(p)
    return (1 - math.fsum((v + EPSILON) ** q for v in p)) / (1 - len(p) ** (1 - q))


def renyi(p: Vector, q: float) -> float:
    if len(p) == 1:
        return 0.0
    if abs(q - 1) < SHANNON_BAND:
        return shannon(p)
    return math.log(math.fsum((v + EPSILON) ** q for v in p)) / (1 - q) / math.log(len(p))


# ---------------------------------------------------------------------------------------------------------
# One function a router: (x, parameters by name, settings by name) -> Token


def lora(x: Vector, weights: dict[str, Any]) -> Token:
    return Token([1.0], [1.0], 0.0)


def topk(x: Vector, weights: dict[str, Any], *, top_k: int, renormalize: bool | None) -> Token:
    p = softmax(linear(x, weights["gate.weight"]))
    kept = set(descending(p)[:top_k])
    if renormalize or (renormalize is None and top_k > 1):
        return Token(renormalised(p, kept), p, shannon(p))
    return Token([v if i in kept else 0.0 for i, v in enumerate(p)], p, shannon(p))


def topp(x: Vector, weights: dict[str, Any], *, top_p: float) -> Token:
    p = softmax(linear(x, weights["gate.weight"]))
    return Token(renormalised(p, nucleus(p, top_p)), p, shannon(p))


def nucleus(p: Vector, top_p: float) -> set[int]:
    """The smallest set of the most probable experts whose sum reaches `top_p`; at 1 that is all of them."""
    kept: set[int] = set()
    total = 0.0
    for i in descending(p):
        if total >= top_p and top_p < 1:
            break
        kept.add(i)
        total += p[i]
    return kept


def threshold(x: Vector, weights: dict[str, Any], *, threshold: float) -> Token:
    p = softmax(linear(x, weights["gate.weight"]))
    kept = {i for i, v in enumerate(p) if v >= threshold}
    return Token(renormalised(p, kept) if kept else [0.0] * len(p), p, shannon(p))


def dense(x: Vector, weights: dict[str, Any]) -> Token:
    p = softmax(linear(x, weights["gate.weight"]))
    return Token(list(p), p, shannon(p))


def adamole(x: Vector, weights: dict[str, Any], *, max_threshold: float | None) -> Token:
    p = softmax(linear(x, weights["gate.weight"]))
    largest = 1 / len(p) if max_threshold is None else max_threshold
    tau = largest * sigmoid(linear(x, weights["threshold.weight"], weights["threshold.bias"])[0])
    selected = [max(v - tau, 0.0) for v in p]
    total = math.fsum(selected)
    return Token([a / (total if total > 0 else 1.0) for a in selected], p, shannon(p))


def dynmole(
    x: Vector,
    weights: dict[str, Any],
    *,
    entropy_threshold: float,
    entropy_index: float,
    entropy_type: str,
    keep_top_k: int,
    top_p: float,
    inclusive_top_p: bool,
) -> Token:
    p = softmax(linear(x, weights["gate.weight"]))
    h = {"tsallis": tsallis, "renyi": renyi}[entropy_type](p, entropy_index)
    if entropy_threshold < 1 and h > entropy_threshold:
        return Token(list(p), p, h)
    order = descending(p)
    kept = set(order[:keep_top_k])
    if inclusive_top_p:
        kept |= nucleus(p, top_p)
    else:
        total = 0.0
        for i in order:
            total += p[i]
            if total <= top_p or top_p >= 1:
                kept.add(i)
    return Token([v if i in kept else 0.0 for i, v in enumerate(p)], p, h)


def sparsegen(x: Vector, weights: dict[str, Any], lambda_activation: str = "gelu") -> Token:
    z = linear(x, weights["gate.weight"])
    return Token(sparsegen_projection(z, sparsity(x, weights, lambda_activation)), softmax(z), shannon(softmax(z)))


def sparsity(x: Vector, weights: dict[str, Any], activation: str = "gelu") -> float:
    """LD-MoLE's λ(x) = logsigmoid(MLP(x)) + 1 − 0.01, always below 1."""
    hidden = [
        max(t, 0.0) if activation == "relu" else t * (1 + math.erf(t / math.sqrt(2))) / 2
        for t in linear(x, weights["lambda_in.weight"], weights["lambda_in.bias"])
    ]
    return log_sigmoid(linear(hidden, weights["lambda_out.weight"], weights["lambda_out.bias"])[0]) + 1 - 0.01


def sparsegen_projection(z: Vector, lam: float) -> list[float]:
    """relu(z − τ) / (1 − λ), with the τ that makes it sum to 1, found by trying every support size.

    Only differences of logits matter, so they are taken from the largest first: large ones keep their digits.
    """
    z = [v - max(z) for v in z]
    ordered = sorted(z, reverse=True)
    support = max(k for k in range(1, len(z) + 1) if 1 - lam + k * ordered[k - 1] > math.fsum(ordered[:k]))
    tau = (math.fsum(ordered[:support]) - 1 + lam) / support
    return [max(v - tau, 0.0) / (1 - lam) for v in z]


ROUTERS: dict[str, Callable[..., Token]] = {
    "lora": lora,
    "topk": topk,
    "topp": topp,
    "threshold": threshold,
    "dense": dense,
    "adamole": adamole,
    "dynmole": dynmole,
    "sparsegen": sparsegen,
}


# ---------------------------------------------------------------------------------------------------------
# Losses: over layers (adapted projections), of tokens, of experts; a token that is padding counts nowhere


def balance_loss(probs: Sequence[Matrix], used: Sequence[Matrix], mask: Sequence[bool]) -> float:
    """E · Σ_i f_i · P_i of each projection, averaged over projections. 0 when every token is padding."""
    real = [n for n, keep in enumerate(mask) if keep]
    if not real:
        return 0.0
    total = 0.0
    for p, u in zip(probs, used, strict=True):
        experts = len(p[0])
        for i in range(experts):
            f_i = math.fsum(u[n][i] for n in real) / len(real)
            p_i = math.fsum(p[n][i] for n in real) / len(real)
            total += experts * f_i * p_i
    return total / len(probs)


def sparsity_loss(logits: Sequence[Matrix], sparsity: Sequence[Vector], k: int, mask: Sequence[bool]) -> float:
    """mean relu(1 − (Σ_{i≤k} u_i − k·u_{k+1}) − λ), u the sorted logits, over real tokens and projections."""
    values = []
    for projection, row in zip(logits, sparsity, strict=True):
        for z, lam, keep in zip(projection, row, mask, strict=True):
            if keep:
                u = sorted(z, reverse=True)
                values.append(max(0.0, 1 - math.fsum(top - u[k] for top in u[:k]) - lam) if len(u) > k else 0.0)
    return math.fsum(values) / len(values) if values else 0.0


def entropy_loss(entropy: Sequence[Vector], mask: Sequence[bool]) -> float:
    """Mean entropy over real tokens and projections."""
    values = [h for row in entropy for h, keep in zip(row, mask, strict=True) if keep]
    return math.fsum(values) / len(values) if values else 0.0


def z_loss(logits: Sequence[Matrix], mask: Sequence[bool]) -> float:
    """Mean over real tokens and projections of (logsumexp of the logits)²."""
    values = [logsumexp(z) ** 2 for layer in logits for z, keep in zip(layer, mask, strict=True) if keep]
    return math.fsum(values) / len(values) if values else 0.0


def cv_loss(weights: Sequence[Matrix], mask: Sequence[bool]) -> float:
    """Squared coefficient of variation, variance / mean², of the experts' summed weights; mean over projections."""
    real = [n for n, keep in enumerate(mask) if keep]
    if not real:
        return 0.0
    total = 0.0
    for layer in weights:
        sums = [math.fsum(layer[n][i] for n in real) for i in range(len(layer[0]))]
        mean = math.fsum(sums) / len(sums)
        variance = math.fsum((s - mean) ** 2 for s in sums) / len(sums)
        total += variance / mean**2 if mean else 0.0
    return total / len(weights)


# ---------------------------------------------------------------------------------------------------------
# The adapted layer


def adapted(
    base: Vector, x: Vector, weights: Vector, a: Sequence[Matrix], b: Sequence[Matrix], scale: float
) -> list[float]:
    """y = base(x) + s · Σ_i w_i · B_i A_i x for one token; `a[i]` (r, in) and `b[i]` (out, r) are expert i."""
    y = list(base)
    for w_i, a_i, b_i in zip(weights, a, b, strict=True):
        update = linear(linear(x, a_i), b_i)
        y = [value + scale * w_i * delta for value, delta in zip(y, update, strict=True)]
    return y
