"""An atlas as plain values, which are written as JSON; docs/atlas.md has the format."""

from __future__ import annotations

from typing import Any

from mole.analysis.atlas.activity import Activity, coactivation
from mole.analysis.atlas.contexts import Context, characteristic
from mole.analysis.atlas.corpus import Corpus
from mole.analysis.atlas.counts import Variable
from mole.analysis.atlas.information import mutual_information, rounded, specialisation
from mole.analysis.atlas.muting import experts_of_layers, measure_muting, sample_size
from mole.analysis.atlas.recorder import BatchRecorder, Projection
from mole.analysis.atlas.saturation import measure_saturation
from mole.analysis.atlas.segments import TokenRow, encode_rows, length_batches
from mole.analysis.atlas.shuffles import SHUFFLES
from mole.analysis.atlas.stored import FORMAT
from mole.analysis.atlas.survey import BATCH_TOKENS, Report, Survey, TokenCensus, no_report, survey, take_census
from mole.config import DataConfig
from mole.core.errors import MoleError
from mole.core.text import one_line
from mole.models.context import context_length
from mole.models.loading import Loaded
from mole.runs.targets import run_config_of

WORDS = 10
"""Characteristic tokens listed of an expert, at the most."""
SAMPLED_ROWS = 64
"""Rows on which saturation and muting are measured, at the most."""


def build_atlas(
    loaded: Loaded,
    corpus: Corpus,
    *,
    seed: int = 0,
    samples: bool = True,
    report: Report = no_report,
) -> dict[str, Any]:
    """The atlas of a target over a corpus, as plain values.

    Args:
        loaded: the target.
        corpus: the rows, and the columns to look at.
        seed: of the order of the rows, the samples and the shufflings.
        samples: whether to measure saturation and muting too, which read a sample of the rows many times.
        report: `report(what, done, total)`; what it raises ends the work.

    Raises:
        ModelError: the target has no routed adapter.
        DataError: fewer than 2 rows can be encoded.
    """
    BatchRecorder(loaded)  # refuses a target without a router before the corpus is read
    max_length = longest_row(loaded)
    census = take_census(corpus, loaded, max_length, seed, report)
    found = survey(corpus, loaded, census, max_length, seed, report)
    atlas = {
        "format": FORMAT,
        "target": loaded.name,
        "base": loaded.base,
        "router": loaded.router,
        "experts": found.experts,
        "data": corpus.source,
        "sha256": corpus.fingerprint,
        "rows": len(census.order),
        "rejected": corpus.rejected + census.rejected,
        "tokens": found.activity.tokens,
        "seed": seed,
        "shuffles": SHUFFLES,
        "notices": [],
        "variables": [variable_values(found, variable, census, loaded) for variable in found.variables],
        "projections": projection_values(found, loaded, corpus),
        "paths": path_values(found.activity, found.projections),
        "saturation": None,
        "muting": None,
    }
    if samples:
        add_samples(atlas, loaded, corpus, census, found, max_length, report)
    return atlas


def longest_row(loaded: Loaded) -> int:
    """Tokens of a row, at the most: as in the training of the run, and no more than the base model reads."""
    config = None if loaded.adapter_dir is None else run_config_of(loaded.adapter_dir)
    return min((DataConfig() if config is None else config.data).max_length, context_length(loaded.model.config))


def variable_values(found: Survey, variable: Variable, census: TokenCensus, loaded: Loaded) -> dict[str, Any]:
    """A variable: its values with their numbers of tokens, the specialisation of each projection, and a matrix."""
    counts = found.counts[variable.name]
    names = variable.values
    if variable.kind == "token":
        names = [*token_texts(found.classes, loaded), names[-1]]
    of_value = counts.table[:, 0].sum(-1)
    there = (of_value > 0).nonzero()[:, 0]
    values = {
        "name": variable.name,
        "kind": variable.kind,
        "values": [names[place] for place in there.tolist()],
        "tokens": rounded(of_value[there], 0),
        "specialisation": specialisation(counts.table, counts.shuffled).to_dict(),
    }
    if variable.kind != "token":  # of tokens there are too many: the projections list the characteristic ones
        shares = counts.table[there] / counts.table[there].sum(-1, keepdim=True).clamp(min=1e-12)
        values["matrix"] = rounded(shares.transpose(0, 1), 3)  # [projection][value][expert, none]
    return values


def projection_values(found: Survey, loaded: Loaded, corpus: Corpus) -> list[dict[str, Any]]:
    """Each projection: use, co-activation, characteristic tokens and strongest contexts of its experts."""
    activity, tokens = found.activity, found.activity.tokens
    usual = found.listed.table.sum(0) / tokens  # (projections, E + 1)
    texts = token_texts(found.tokens, loaded)
    shared = coactivation(activity.together)
    listed = []
    for place, projection in enumerate(found.projections):
        words = vocabulary(found, place, texts)
        listed.append(
            projection._asdict()
            | {
                "usage": rounded(usual[place, : projection.experts]),
                "idle": rounded(float(activity.idle[place] / tokens)),
                "used": rounded(activity.active[place, : projection.experts] / tokens),
                "entropy": rounded(float(activity.entropy[place] / tokens)),
                "active": rounded(float(activity.number[place] / tokens)),
                "strongest": rounded(float(activity.strongest[place] / tokens)),
                "coactivation": rounded(shared[place, : projection.experts, : projection.experts], 3),
                "vocabulary": words[: projection.experts],
                "contexts": [
                    [context_values(context, corpus, loaded) for context in found.contexts.of(place, expert)]
                    for expert in range(projection.experts)
                ],
            }
        )
    return listed


def vocabulary(found: Survey, place: int, texts: list[str]) -> list[list[dict[str, Any]]]:
    """The characteristic tokens of each expert of a projection, with counts and lifts."""
    table = found.listed.table[:, place : place + 1]
    places, counts, lifts = (part[0].tolist() for part in characteristic(table, len(texts), WORDS))
    return [
        [
            {"token": texts[token], "count": round(count, 1), "lift": round(lift, 2)}
            for token, count, lift in zip(*of_expert, strict=True)
            if count > 0
        ]
        for of_expert in zip(places, counts, lifts, strict=True)
    ]


def context_values(context: Context, corpus: Corpus, loaded: Loaded) -> dict[str, Any]:
    """A place in the text: the number of its row in the file, the weight, and the text before, at and after."""
    decode = loaded.tokenizer.decode
    before, here = decode(context.before), decode([*context.before, context.token])
    return {
        "row": corpus.examples[context.place].row,
        "weight": round(context.weight, 3),
        "before": before,
        "token": here.removeprefix(before) if here.startswith(before) else decode([context.token]),
        "after": decode(context.after),
    }


def token_texts(ids: list[int], loaded: Loaded) -> list[str]:
    """The text of each token id."""
    return [loaded.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]


def path_values(activity: Activity, projections: list[Projection]) -> list[dict[str, Any]]:
    """The paths from each projection to the one of its kind in the next adapted layer: tokens [expert][expert].

    `share` is how much the strongest expert of one tells of that of the next, from 0 to 1.
    """
    _, shares = mutual_information(activity.paths)
    return [
        {
            "kind": projections[first].kind,
            "from": projections[first].layer,
            "to": projections[second].layer,
            "tokens": rounded(counts, 0),
            "share": rounded(float(share)),
        }
        for (first, second), counts, share in zip(activity.steps, activity.paths, shares, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------
# On a sample


def add_samples(
    atlas: dict[str, Any],
    loaded: Loaded,
    corpus: Corpus,
    census: TokenCensus,
    found: Survey,
    max_length: int,
    report: Report,
) -> None:
    """Add saturation and muting, measured on the first rows of the random order."""
    encoded = encode_rows(corpus.examples, census.order[:SAMPLED_ROWS], loaded.tokenizer, max_length)
    drawn = [row for row in encoded if isinstance(row, TokenRow)]
    rows, batches = in_batches(drawn)
    try:
        measured = measure_saturation(loaded, rows, batches, lambda done, total: report("Checkpoints", done, total))
    except MoleError as error:
        atlas["notices"].append(f"Saturation is left out: {one_line(error)}")
        measured = None
    if measured:
        by_k = {k: rounded(values) for k, values in measured["by_k"].items()}
        atlas["saturation"] = {"rows": len(rows), "steps": measured["steps"], "by_k": by_k}
    count = sample_size([len(row.ids) for row in drawn], len(experts_of_layers(found.projections)))
    rows, batches = in_batches(drawn[:count])
    loss, muted = measure_muting(
        loaded, found.projections, rows, batches, lambda done, total: report("Muting", done, total)
    )
    experts = [one._asdict() | {"increase": round(one.increase, 5), "error": round(one.error, 5)} for one in muted]
    atlas["muting"] = {"rows": len(rows), "loss": rounded(loss), "experts": experts}


def in_batches(rows: list[TokenRow]) -> tuple[list[TokenRow], list[slice]]:
    """Rows, the shortest first, and which of them fit into a batch together."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return ordered, list(length_batches([len(row.ids) for row in ordered], BATCH_TOKENS))
