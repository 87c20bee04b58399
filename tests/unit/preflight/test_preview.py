"""What the model sees: the preview's tokens are those of training, and nothing that happens to a row is hidden."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mole.config import RunConfig
from mole.core.errors import DataError, ModelError
from mole.data import build_datasets, describe_columns, detect_columns, guess_mapping, mapping_for_shape
from mole.preflight.preview import MAX_REJECTIONS, MAX_ROWS, Preview, preview
from mole.preflight.preview import histogram as histogram_of

BLANKING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.text }}<|im_end|>\n{% endfor %}"


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(model: Path, data: Path, **settings: Any) -> RunConfig:
    return RunConfig.from_dict({"model": {"name": str(model)}, "data": {"path": str(data), **settings}})


def pairs(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Say {number}, 你好 🎉", "completion": str(number) * (1 + number % 5)} for number in range(count)
    ]


def all_rows(seen: Preview) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": [t.id for t in row.tokens], "labels": [t.id if t.learnt else -100 for t in row.tokens]}
        for row in seen.rows
    ]


def test_the_tokens_and_the_mask_are_those_of_training(tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    for rows in (pairs(30), [{"messages": talk}] * 30, [{"text": f"Some text {n}"} for n in range(30)]):
        config = config_of(tiny_folder, write(tmp_path, rows), max_length=24, eval_fraction=0.2)
        seen = preview(config, rows=30)
        trained = build_datasets(config.data, tiny_tokenizer, config.training.seed)
        assert all_rows(seen)[0]["input_ids"]
        assert [
            row for row, shown in zip(all_rows(seen), seen.rows, strict=True) if not shown.held_out
        ] == trained.train
        assert [row for row, shown in zip(all_rows(seen), seen.rows, strict=True) if shown.held_out] == trained.eval
        report = trained.report
        assert (seen.used, seen.held_out, seen.truncated) == (report.rows, report.eval_rows, report.truncated)
        assert (seen.tokens, seen.learnt_tokens, seen.shape) == (report.tokens, report.answer_tokens, report.shape)


def test_the_texts_put_together_are_the_text_of_the_row(tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    seen = preview(config_of(tiny_folder, write(tmp_path, pairs(5)), max_length=512))
    for row in seen.rows:
        assert "".join(token.text for token in row.tokens) == tiny_tokenizer.decode([t.id for t in row.tokens])
        assert "🎉" in "".join(token.text for token in row.tokens)
        assert {t.text for t in row.tokens if t.special} == {"<|im_start|>", "<|im_end|>"}


def test_a_character_cut_in_its_middle_is_shown_as_it_is(
    tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    data = write(tmp_path, [{"prompt": "a", "completion": "🎉" * 40}] * 2)
    for length in range(30, 34):
        row = preview(config_of(tiny_folder, data, max_length=length)).rows[0]
        assert "".join(token.text for token in row.tokens) == tiny_tokenizer.decode([t.id for t in row.tokens])


def test_what_is_cut_off_is_counted(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "yes"}, {"prompt": "long " * 50, "completion": "yes"}]
    rows.append({"prompt": "Hi", "completion": "no " * 90})
    data = write(tmp_path, rows)
    whole = preview(config_of(tiny_folder, data, max_length=2000, eval_fraction=0))
    cut = preview(config_of(tiny_folder, data, max_length=40, eval_fraction=0))
    lengths = [len(row.tokens) for row in whole.rows]
    assert [(row.dropped > 0, row.cut > 0) for row in cut.rows] == [(False, False), (True, False), (True, True)]
    assert [len(row.tokens) + row.dropped + row.cut for row in cut.rows] == lengths
    assert (whole.truncated, cut.truncated) == (0, 2)
    assert any("end of the answer" in notice for notice in cut.notices) and not whole.notices


def test_rejected_rows_are_named_in_their_order(tiny_folder: Path, tmp_path: Path) -> None:
    rows: list[Any] = pairs(200)
    for number in range(1, 160, 2):
        rows[number] = {"prompt": "Hi", "completion": None} if number % 4 == 1 else [number]
    seen = preview(config_of(tiny_folder, write(tmp_path, rows)))
    assert seen.rejected == 80 and len(seen.rejections) == MAX_REJECTIONS
    assert [item.row for item in seen.rejections] == [number + 1 for number in range(1, 160, 2)][:MAX_REJECTIONS]
    assert seen.rejections[0].reason == "completion is null" and "not an object" in seen.rejections[1].reason
    assert seen.used + seen.held_out == 120


def test_rows_of_the_held_out_file_are_counted_apart(tiny_folder: Path, tmp_path: Path) -> None:
    held = write(tmp_path, [*pairs(4), {"prompt": "Hi"}], "held.jsonl")
    seen = preview(config_of(tiny_folder, write(tmp_path, pairs(9)), eval_path=str(held)))
    assert (seen.used, seen.held_out, seen.rejected) == (9, 4, 1)
    assert seen.rejections[0].row == 5 and "held-out" in seen.rejections[0].reason


def test_the_lengths_add_up(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * number, "completion": "yes"} for number in range(1, 90)]
    seen = preview(config_of(tiny_folder, write(tmp_path, rows), max_length=200))
    lengths = seen.lengths
    assert sum(lengths.counts) == seen.used + seen.held_out == 89
    assert (len(lengths.counts) - 1) * lengths.width <= lengths.longest < len(lengths.counts) * lengths.width
    assert len(lengths.counts) <= 41


@pytest.mark.parametrize("longest", [1, 2, 39, 40, 41, 399, 512, 40_000, 131_072])
def test_a_histogram_has_few_bins_of_a_round_width(longest: int) -> None:
    made = histogram_of([1, longest], 10**6)
    assert sum(made.counts) == 2 and made.counts[-1] >= 1 and len(made.counts) <= 41
    assert int(str(made.width).rstrip("0") or 1) in (1, 2, 5)


def test_a_truncated_row_is_among_those_shown(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [*pairs(40), {"prompt": "long " * 200, "completion": "yes"}]
    seen = preview(config_of(tiny_folder, write(tmp_path, rows), max_length=100), rows=4)
    assert [row.number for row in seen.rows] == [1, 2, 3, 41] and seen.rows[-1].dropped


@pytest.mark.timed
@pytest.mark.parametrize("name", ["large.jsonl", "large.csv"])
def test_of_a_large_file_only_the_first_rows_are_read(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = '{"prompt": "Say it", "completion": "it"}\n' if name.endswith("jsonl") else '"Say\nit",it\n'
    with path.open("w", encoding="utf-8") as file:
        file.write("" if name.endswith("jsonl") else "prompt,completion\n")
        file.writelines(line * 10_000 for _ in range(300))
    assert path.stat().st_size > 30e6
    begun = time.process_time()
    seen = preview(config_of(tiny_folder, path))
    assert time.process_time() - begun < 20
    assert not seen.complete and seen.used + seen.held_out == MAX_ROWS
    assert preview(config_of(tiny_folder, write(tmp_path, pairs(MAX_ROWS)))).complete


def test_very_long_rows_are_not_all_tokenised(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mole.preflight.preview.MAX_CHARACTERS", 3000)
    rows = [{"prompt": "x" * 1000, "completion": "yes"}] * 9
    seen = preview(config_of(tiny_folder, write(tmp_path, [*rows[:1], {"prompt": "?"}, *rows, {"prompt": "?"}])))
    assert seen.used + seen.held_out == 2 and not seen.complete
    assert [item.row for item in seen.rejections] == [2], "rows behind those looked at are not counted"


def test_a_template_that_blanks_every_row_is_named(tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tmp_path / "blanking"
    model.mkdir()
    for file in tiny_folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = BLANKING
    tokenizer.save_pretrained(model)
    config = config_of(model, write(tmp_path, pairs(9)))
    for read in (lambda: preview(config), lambda: build_datasets(config.data, tokenizer, 0)):
        with pytest.raises(DataError, match="row 1: the chat template omits the question") as wrong:
            read()
        assert wrong.value.field == "data.path"


def test_a_column_that_never_changes_is_pointed_out(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "completion": f"{n}", "kind": "number"} for n in range(9)]
    config = config_of(tiny_folder, write(tmp_path, rows), columns={"completion": "kind"})
    assert any("same answer" in notice for notice in preview(config).notices)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"columns": {"prompt": "nope"}}, "data.columns.prompt"), ({"columns": {"text": "prompt"}}, None)],
)
def test_a_mapping_is_held_against_the_file(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, Any], field: str | None
) -> None:
    config = config_of(tiny_folder, write(tmp_path, pairs(3)), **settings)
    if field is None:
        assert preview(config).shape == "text"
        return
    with pytest.raises(DataError) as wrong:
        preview(config)
    assert wrong.value.field == field


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        preview(config_of(tmp_path / "nowhere" / "model", write(tmp_path, pairs(3))))


def test_one_endless_row_does_not_flatten_the_histogram() -> None:
    made = histogram_of([*range(1, 101), 90_000], 300)
    assert made.open and made.longest == 90_000 and sum(made.counts) == 101
    assert made.width <= 10 and made.counts[-1] == 1


def test_when_no_row_is_left_the_error_holds_all_of_them(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row, 9 rejected") as wrong:
        preview(config_of(tiny_folder, write(tmp_path, [{"prompt": "", "completion": "x"}] * 9)))
    assert [item.row for item in wrong.value.rejected] == list(range(1, 10))


# Columns


@pytest.mark.parametrize(
    ("names", "mapping"),
    [
        (["prompt", "completion"], {}),
        (["Question", "Response", "id"], {"prompt": "Question", "completion": "Response"}),
        (["conversations"], {"messages": "conversations"}),
        (["stem", "options", "answerKey"], {"question": "stem", "choices": "options"}),
        (["this", "that"], {}),
    ],
)
def test_columns_are_guessed_by_their_usual_names(names: list[str], mapping: dict[str, str]) -> None:
    assert guess_mapping(names) == mapping


def test_a_shape_chosen_by_hand_wins_over_the_names() -> None:
    names = ["prompt", "completion", "text"]
    mapping = mapping_for_shape(names, "text")
    assert detect_columns(names, {}, "f").shape == "prompt/completion"
    assert detect_columns(names, mapping, "f").shape == "text"


def test_what_is_still_to_be_mapped_is_said() -> None:
    found = detect_columns(["a", "b"], {"prompt": "a"}, "f", "prompt/completion")
    assert found.fields == {"prompt": "a", "completion": None}
    assert "choose a column for: completion" in describe_columns(found)
