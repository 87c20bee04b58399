"""A map of an adapter's routing: tokens that are routed alike over all layers lie close to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TOKENS = 3
"""Fewer tokens span no plane."""


@dataclass(frozen=True)
class RoutingMap:
    """Two axes through the whole routing vectors of an adapter's tokens.

    A routing vector is √w of every expert of every projection: so the distance of two tokens is Hellinger's, in which
    a weight that rises from 0 to 0.1 counts more than one that rises from 0.8 to 0.9.

    Attributes:
        names: full names of the projections.
        mean: `(projections, E)`, the mean routing vector.
        axes: `(projections · E, 2)`, the first two principal axes, scaled to a variance of 1 along each.
    """

    names: list[str]
    mean: Tensor
    axes: Tensor

    @classmethod
    def fit(cls, names: list[str], weights: Tensor) -> RoutingMap | None:
        """The map of `weights (tokens, projections, E)`; None if they do not differ, or are too few.

        NaN, for a token that a projection did not see, counts as the mean. In float64 and with a fixed sign, so that
        the same weights give the same map.
        """
        if len(weights) < MIN_TOKENS:
            return None
        roots = weights.double().sqrt()
        mean = roots.nanmean(0).nan_to_num()
        centred = (roots - mean).nan_to_num().flatten(1)  # (T, P·E)
        # The eigenvectors of the T × T products are those of the covariance, which is far larger.
        values, vectors = torch.linalg.eigh(centred @ centred.T / len(centred))
        values, vectors = values[-2:].flip(0), vectors[:, -2:].flip(1)
        if values[0] < 1e-12:
            return None
        # Axis = Xᵀu / √(T λ), of length 1; divided by its standard deviation √λ. An axis without variance stays 0.
        scale = torch.where(values > 1e-9 * values[0], 1 / (values.clamp(min=1e-300) * len(centred) ** 0.5), 0.0)
        axes = centred.T @ vectors * scale
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # an eigenvector's sign is arbitrary
        return cls(names, mean, axes * torch.where(largest < 0, -1.0, 1.0))

    def place(self, names: list[str], weights: Tensor) -> Tensor | None:
        """Where tokens lie, `weights (tokens, projections, E)` → `(tokens, 2)`; None for other projections."""
        if names != self.names:
            return None
        return (weights.double().sqrt() - self.mean).nan_to_num().flatten(1) @ self.axes


def hue_and_distance(places: Tensor) -> Tensor:
    """Places on a map `(tokens, 2)` → `(tokens, 2)` in 0…1: the direction from the centre, and how far.

    The distance d is 1 − exp(−d²/2): of normally distributed tokens, the share that lies closer to the centre.
    """
    hue = torch.atan2(places[:, 1], places[:, 0]) / (2 * torch.pi) % 1
    return torch.stack([hue, 1 - (-places.square().sum(-1) / 2).exp()], -1)


def strongest_share(weights: Tensor) -> Tensor:
    """The share of its router's weight that the strongest expert has, `(tokens, projections, E)` → `(tokens,)`.

    The mean over the projections that saw the token and gave weight to an expert; 0 without any.
    """
    total = weights.sum(-1)
    used = total > 0  # false for NaN
    share = torch.where(used, weights.amax(-1) / torch.where(used, total, 1.0), 0.0)
    return share.sum(-1) / used.sum(-1).clamp(min=1)
