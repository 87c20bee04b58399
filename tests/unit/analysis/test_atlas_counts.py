"""What an atlas counts, against the same computed slowly and plainly: in float64, one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mole.analysis.atlas.activity import Activity, coactivation
from mole.analysis.atlas.contexts import BEFORE, StrongestContexts, characteristic
from mole.analysis.atlas.corpus import OTHER, classes_of
from mole.analysis.atlas.counts import SHUFFLED_CELLS, ValueCounts, most_classes, row_sums
from mole.analysis.atlas.information import mutual_information, shares_of, specialisation
from mole.analysis.atlas.recorder import BatchRouting, Projection, project
from mole.analysis.atlas.saturation import saturation_of, spread, top_experts
from mole.analysis.atlas.segments import bucket_name, bucket_of, length_batches
from mole.analysis.atlas.shuffles import SHUFFLES, partners, shuffled_places

GENERATOR = torch.Generator().manual_seed(0)


def random_weights(tokens: int = 50, projections: int = 3, experts: int = 4) -> Tensor:
    """Weights of which some are 0, and with a token that uses no expert."""
    weights = torch.rand(tokens, projections, experts, generator=GENERATOR)
    weights = torch.where(weights > 0.4, weights, torch.zeros(()))
    weights[7] = 0
    return weights


def count(weights: Tensor, values: list[int], number: int) -> Tensor:
    """The table of `ValueCounts`, in several batches of different sizes."""
    counts = ValueCounts(number, *weights.shape[1:], shuffles=0)
    for part in (slice(0, 13), slice(13, 14), slice(14, None)):
        counts.add(shares_of(weights[part].double()), torch.tensor(values)[part])
    return counts.table


# ---------------------------------------------------------------------------------------------------------
# Mutual information


def slow_information(weights: Any, values: list[int]) -> tuple[float, float]:
    """The mutual information of one projection, in bits and as a share, token by token from its definition."""
    joint: dict[tuple[int, int], float] = {}
    for row, value in zip(weights, values, strict=True):
        total = math.fsum(row)
        shares = [weight / total for weight in row] + [0.0] if total else [0.0] * len(row) + [1.0]
        for expert, share in enumerate(shares):
            joint[value, expert] = joint.get((value, expert), 0.0) + share / len(values)
    of_value: dict[int, float] = {}
    of_expert: dict[int, float] = {}
    for (value, expert), p in joint.items():
        of_value[value], of_expert[expert] = of_value.get(value, 0) + p, of_expert.get(expert, 0) + p
    bits = math.fsum(p * math.log2(p / of_value[v] / of_expert[e]) for (v, e), p in joint.items() if p)
    most = min(-math.fsum(p * math.log2(p) for p in side.values() if p) for side in (of_value, of_expert))
    return bits, bits / most


def test_mutual_information_is_what_the_definition_gives_token_by_token() -> None:
    weights = random_weights()
    values = torch.randint(0, 5, (50,), generator=GENERATOR).tolist()
    bits, share = mutual_information(count(weights, values, 5).transpose(0, 1))
    for place in range(3):
        expected = slow_information(weights[:, place].double().tolist(), values)
        assert (float(bits[place]), float(share[place])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("values", "bits"), [(2, 1.0), (4, 2.0), (8, 3.0)])
def test_one_expert_for_each_value_is_all_the_information_there_is(values: int, bits: float) -> None:
    one_each = torch.eye(values, dtype=torch.float64)[None] * 10
    assert [float(part) for part in mutual_information(one_each)] == pytest.approx([bits, 1.0])


def test_experts_that_are_used_alike_for_all_values_tell_nothing_and_empty_counts_give_no_nan() -> None:
    for table in (torch.full((1, 3, 4), 2.0), torch.zeros(1, 3, 4)):
        assert [float(part) for part in mutual_information(table.double())] == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------
# Noise


def surveyed(weights: Tensor, values: Tensor, lengths: list[int], of_rows: bool) -> Any:
    """The specialisation of `weights` in a variable, with its shufflings, as an atlas computes it."""
    number = int(values.max()) + 1
    counts = ValueCounts(number, *weights.shape[1:])
    tokens, rows = shuffled_places(torch.tensor(lengths), torch.Generator().manual_seed(1))
    shares = shares_of(weights.double())
    if of_rows:
        row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        counts.add(row_sums(shares, row, len(lengths)), values, values[rows])
    else:
        counts.add(shares, values, values[tokens])
    return specialisation(counts.table, counts.shuffled)


@pytest.mark.parametrize("number", [4, 100], ids=["few values", "many values"])
def test_independent_values_look_like_chance_and_never_clear(number: int) -> None:
    weights = random_weights(3_000, 30)
    found = surveyed(weights, torch.randint(0, number, (3_000,), generator=GENERATOR), [20] * 150, False)
    assert not found.clear.any() and (found.bits > 0).all()  # the estimate is never 0: it is biased
    assert (found.chance / found.bits).mean() == pytest.approx(1, abs=0.1)
    assert found.excess.mean() < 0.25 * found.bits.mean()


def test_a_column_without_meaning_is_not_clear_although_rows_are_routed_each_in_its_way() -> None:
    """Each row has its favourite expert in all of its tokens: counted by tokens, any column would seem to matter."""
    lengths, favourite = [40] * 60, torch.randint(0, 4, (60, 30), generator=GENERATOR)
    weights = torch.nn.functional.one_hot(favourite, 4).float().repeat_interleave(40, 0)
    column = torch.randint(0, 3, (60,), generator=GENERATOR)
    found = surveyed(weights, column, lengths, True)
    assert not found.clear.any()
    # By the formula for independent draws, as many as there are tokens, most of these would be far beyond chance.
    by_formula = (3 - 1) * (4 - 1) / (2 * 2_400 * math.log(2))
    assert (found.bits > 5 * by_formula).float().mean() > 0.9
    assert found.chance.mean() == pytest.approx(float(found.bits.mean()), rel=0.25)


def test_what_is_planted_is_clear_and_stands_above_chance() -> None:
    lengths = [20] * 100
    skill = torch.arange(100) % 4
    weights = torch.nn.functional.one_hot(skill, 4).float().repeat_interleave(20, 0)[:, None]
    found = surveyed(weights, skill, lengths, True)
    assert found.clear.all() and float(found.bits) == pytest.approx(2) and float(found.share) == pytest.approx(1)
    assert float(found.chance) < 0.3


def test_shuffling_gives_each_row_the_values_of_another_in_their_order() -> None:
    lengths = torch.tensor([3, 5, 2, 7])
    rows = torch.arange(4).repeat_interleave(lengths)
    position = torch.cat([torch.arange(length) for length in lengths])
    tokens, other = shuffled_places(lengths, torch.Generator().manual_seed(0))
    assert tokens.shape == (SHUFFLES, 17) and other.shape == (SHUFFLES, 4)
    for shuffling, partner in zip(tokens, other, strict=True):
        assert sorted(partner.tolist()) == [0, 1, 2, 3] and (partner != torch.arange(4)).all()
        assert (rows[shuffling] == partner[rows]).all()
        step = (position[shuffling][1:] - position[shuffling][:-1]) % lengths[partner[rows[1:]]]
        assert (step[rows[1:] == rows[:-1]] == 1 % lengths[partner[rows[1:]]][rows[1:] == rows[:-1]]).all()
    assert partners(1, torch.Generator()).unique().tolist() == [0]


def test_both_ways_to_count_shufflings_give_the_same() -> None:
    weights, places = random_weights(), torch.randint(0, 3, (SHUFFLES, 50), generator=GENERATOR)
    few, many = ValueCounts(3, 3, 4), ValueCounts(100, 3, 4)
    for counts in (few, many):
        counts.add(shares_of(weights.double()), places[0], places)
    torch.testing.assert_close(few.shuffled, many.shuffled[:, :3], rtol=1e-5, atol=1e-5)
    assert many.shuffled[:, 3:].sum() == 0 and torch.equal(few.table, many.table[:3])


# ---------------------------------------------------------------------------------------------------------
# Together, paths, saturation


def slow_coactivation(weights: Any) -> list[list[float]]:
    """For each pair of experts, of the tokens that used the first the share that used the second too."""
    experts = range(len(weights[0]))
    used: Counter[Any] = Counter()
    for row in weights:
        active = [expert for expert in experts if row[expert] > 0]
        used.update(active)
        used.update(product(active, active))
    return [[used[i, j] / used[i] if used[i] else 0.0 for j in experts] for i in experts]


def test_coactivation_and_paths_equal_a_count_token_by_token() -> None:
    weights = random_weights()
    projections = [project(f"model.layers.{layer}.mlp.up_proj", 4) for layer in (0, 2, 3)]
    activity = Activity(projections, 4)
    for part in (weights[:20], weights[20:]):
        activity.add(BatchRouting(part, torch.ones(len(part), 3)), shares_of(part.double()))
    shared = coactivation(activity.together)
    best = [[max(range(4), key=lambda e: row[e]) if max(row) > 0 else 4 for row in token] for token in weights.tolist()]
    assert activity.steps == [(0, 1), (1, 2)] and activity.tokens == 50
    for place in range(3):
        torch.testing.assert_close(
            shared[place], torch.tensor(slow_coactivation(weights[:, place].tolist()), dtype=torch.float64)
        )
        assert float(activity.idle[place]) == sum(token[place] == 4 for token in best)
    for pair, (first, second) in enumerate(activity.steps):
        expected = Counter((token[first], token[second]) for token in best)
        assert {(i, j): n for i, row in enumerate(activity.paths[pair].tolist()) for j, n in enumerate(row) if n} == {
            key: float(number) for key, number in expected.items()
        }


@pytest.mark.parametrize("k", [1, 2, 3])
def test_saturation_equals_a_count_token_by_token(k: int) -> None:
    then, final = random_weights(), random_weights()

    def top(row: Any) -> set[int]:
        return {e for e in sorted(range(4), key=lambda e: -row[e])[:k] if row[e] > 0}

    found = saturation_of(top_experts(then, k), top_experts(final, k))
    for place in range(3):
        pairs = [(top(a), top(b)) for a, b in zip(then[:, place].tolist(), final[:, place].tolist(), strict=True)]
        shares = [len(a & b) / len(b) for a, b in pairs if b]
        assert float(found[place]) == pytest.approx(math.fsum(shares) / len(shares), abs=1e-6)
    assert saturation_of(top_experts(final, k), top_experts(final, k)).tolist() == pytest.approx([1.0] * 3)


def test_of_many_checkpoints_some_are_looked_at_the_first_and_the_last_among_them() -> None:
    steps: list[Any] = [(step, None) for step in range(100)]
    assert [step for step, _ in spread(steps, 4)] == [0, 33, 66, 99] and spread(steps[:3]) == steps[:3]


# ---------------------------------------------------------------------------------------------------------
# Words and contexts


def test_lift_says_how_much_more_often_an_expert_is_drawn_and_rare_tokens_are_left_out() -> None:
    # tokens A (40 times, all to expert 0), B (10 times, all to expert 0), C (50, to 1), D (4, to 0), others (96, to 1)
    table = torch.tensor([[40, 0, 0], [10, 0, 0], [0, 50, 0], [4, 0, 0], [0, 96, 0]], dtype=torch.float64)[:, None]
    places, counts, lifts = characteristic(table, listed=4, most=3)
    assert places[0, 0, :2].tolist() == [0, 1] and counts[0, 0].tolist() == [40, 10, 0]
    assert lifts[0, 0, 0] == pytest.approx(200 / 54) == lifts[0, 0, 1]
    assert places[0, 1, 0] == 2 and counts[0, 1].tolist() == [50, 0, 0] and lifts[0, 1, 0] == pytest.approx(200 / 146)


def test_contexts_are_the_largest_weights_one_of_a_row_with_the_text_around() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [[row * 100 + token for token in range(20 + row)] for row in range(12)]
    weights = [torch.rand(len(row), 2, 3, generator=generator) for row in rows]
    contexts = StrongestContexts(2, 3, prefix=2)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        contexts.add(torch.cat(weights[part]), rows[part], list(range(12))[part])
    for place, expert in product(range(2), range(3)):
        best = sorted((float(w[2:, place, expert].max()), row) for row, w in enumerate(weights))[::-1][:3]
        found = contexts.of(place, expert)
        assert [(one.weight, one.place) for one in found] == best
        for one in found:
            at = int(weights[one.place][2:, place, expert].argmax()) + 2
            assert one.token == rows[one.place][at]
            assert one.before == rows[one.place][max(at - BEFORE, 0) : at]
            assert one.after == rows[one.place][at + 1 : at + 5]


def test_an_expert_that_is_never_used_has_no_context() -> None:
    contexts = StrongestContexts(1, 2)
    contexts.add(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), [[5, 6]], [0])
    assert contexts.of(0, 1) == [] and [one.token for one in contexts.of(0, 0)] == [5]


# ---------------------------------------------------------------------------------------------------------
# Values, positions, batches


def test_rare_values_of_a_column_are_one_value() -> None:
    names, places = classes_of(["a", "b", "a", "c", "d", "a", "b"], 3)
    assert names == ["a", "b", OTHER] and places == [0, 1, 0, 2, 2, 0, 1]


def test_positions_double_and_batches_hold_so_many_tokens() -> None:
    assert [bucket_of(position) for position in (0, 1, 2, 3, 4, 7, 8)] == [0, 1, 2, 2, 3, 3, 4]
    assert [bucket_name(bucket) for bucket in (0, 1, 2, 3)] == ["0", "1", "2–3", "4–7"]
    assert list(length_batches([2, 2, 3, 9], 6)) == [slice(0, 2), slice(2, 3), slice(3, 4)]


def test_tables_have_fewer_values_where_there_are_more_experts() -> None:
    assert most_classes(SHUFFLED_CELLS, 256, 210 * 9) == 256
    large = most_classes(SHUFFLED_CELLS, 256, 224 * 65)
    assert 2 <= large < 256 and large * 224 * 65 * SHUFFLES <= SHUFFLED_CELLS


def test_a_projection_is_known_by_its_layer_and_its_name_inside_it() -> None:
    found = project("model.layers.12.self_attn.q_proj", 8)
    assert found == Projection("model.layers.12.self_attn.q_proj", 12, "self_attn.q_proj", 8)
    assert project("lm_head", 2).kind == "lm_head"
