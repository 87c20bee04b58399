"""The map that gives tokens their hues: like routing gives like hues, and the same routing always the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole.mixture.routing_map import RoutingMap, hue_and_distance, strongest_share

KINDS, EACH, PROJECTIONS, EXPERTS = 4, 40, 12, 6
NAMES = [f"layers.{place}.q_proj" for place in range(PROJECTIONS)]


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Weights `(tokens, projections, E)` of tokens of four kinds, and the kinds. Each projection numbers its experts in
    its own order, so that nothing is left of a kind in a mean over the projections."""
    chance = torch.Generator().manual_seed(seed)
    kinds = torch.arange(KINDS).repeat(EACH)
    order = torch.stack(
        [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(p)) for p in range(PROJECTIONS)]
    )
    scores = torch.randn(KINDS * EACH, PROJECTIONS, EXPERTS, generator=chance)
    favourites = order[:, :KINDS].T[kinds]  # (tokens, projections)
    return (scores + 3 * torch.nn.functional.one_hot(favourites, EXPERTS)).softmax(-1), kinds


def apart(hues: Tensor) -> Tensor:
    """Every two hues' distance on the circle, 0…0.5."""
    difference = (hues[:, None] - hues[None]).abs()
    return torch.minimum(difference, 1 - difference)


def fitted(seed: int = 0) -> RoutingMap:
    routing_map = RoutingMap.fit(NAMES, planted(seed)[0])
    assert routing_map is not None
    return routing_map


def hues(routing_map: RoutingMap, weights: Tensor) -> Tensor:
    places = routing_map.place(NAMES, weights)
    assert places is not None
    return hue_and_distance(places)[:, 0]


def test_tokens_routed_alike_are_nearer_in_hue_than_tokens_routed_differently() -> None:
    """Tokens that the map was not fitted to, whatever their kind."""
    weights, kinds = planted(1)
    distance, alike = apart(hues(fitted(), weights)), kinds[:, None] == kinds[None]
    other = ~torch.eye(len(kinds), dtype=torch.bool)
    assert distance[alike & other].mean() < 0.4 * distance[~alike].mean()
    nearest = distance.masked_fill(~other, 1).argmin(1)
    assert (kinds[nearest] == kinds).double().mean() > 0.75


def test_the_same_weights_give_the_same_map_bit_for_bit_and_no_token_moves_with_others() -> None:
    weights, _ = planted(1)
    first, again = fitted(), fitted()
    assert torch.equal(first.axes, again.axes) and torch.equal(first.mean, again.mean)
    one_by_one = torch.cat([hues(first, token[None]) for token in weights])
    torch.testing.assert_close(hues(again, weights), one_by_one, rtol=0, atol=1e-9)


def test_the_reference_tokens_have_variance_1_along_both_axes_and_spread_over_all_hues() -> None:
    weights, _ = planted(0)
    places = fitted().place(NAMES, weights)
    assert places is not None
    torch.testing.assert_close(places.square().mean(0), torch.ones(2, dtype=torch.float64))
    assert len({int(hue * 4) for hue in hue_and_distance(places)[:, 0]}) == 4


def test_a_projection_that_did_not_see_a_token_pulls_it_nowhere() -> None:
    weights, _ = planted(1)
    weights[:, 3] = torch.nan
    places = fitted().place(NAMES, weights)
    assert places is not None and places.isfinite().all()


def test_no_map_without_differences_and_no_place_on_another_adapters() -> None:
    assert RoutingMap.fit(NAMES, torch.full((20, PROJECTIONS, EXPERTS), 1 / EXPERTS)) is None
    assert RoutingMap.fit(NAMES, planted(0)[0][:2]) is None
    assert fitted().place(NAMES[1:], planted(0)[0][:, 1:]) is None


def test_two_experts_of_one_projection_have_an_axis() -> None:
    weights = torch.tensor([[[share, 1 - share]] for share in (0.1, 0.4, 0.6, 0.9)])
    routing_map = RoutingMap.fit(["q"], weights)
    assert routing_map is not None
    places = routing_map.place(["q"], weights)
    assert places is not None and places.isfinite().all() and places[0, 0].sign() != places[3, 0].sign()


def test_the_weight_of_the_strongest_is_a_mean_of_shares_over_the_projections_that_saw_the_token() -> None:
    weights = torch.tensor([[[0.3, 0.1], [torch.nan, torch.nan], [0.5, 0.5], [0.0, 0.0]], [[0.0, 0.0]] * 4])
    torch.testing.assert_close(strongest_share(weights), torch.tensor([0.625, 0.0]))


def test_an_adapters_map_is_the_same_when_it_is_loaded_again(tiny_adapter: Path) -> None:
    from mole.chat.reference import fit_map, reference_ids
    from mole.runs.targets import load_target

    def loaded_map() -> Any:
        loaded = load_target(str(tiny_adapter))
        return fit_map(loaded, reference_ids(loaded))

    first, again = loaded_map(), loaded_map()
    assert first.names == again.names and torch.equal(first.axes, again.axes)
