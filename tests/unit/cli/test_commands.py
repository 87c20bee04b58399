"""`mole …` answers as documented: exit codes, one clear line for bad input, JSON for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import pytest

from mole import __version__, runs
from mole.cli import parser
from mole.cli.commands.train import train_settings
from mole.config import SECTIONS, RunConfig, spec_of
from mole.core import checkpoint, locks
from mole.runs import queue

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("yes", "no", "maybe", "never", "often", "once")]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Mole = Callable[..., Answer]


@pytest.fixture
def mole(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mole:
    """`mole("train", "--data", "x")` in a folder of its own → exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*arguments: str) -> Answer:
        try:
            code = parser.main(arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def base(tiny_folder: Path) -> list[str]:
    """Flags of a training that would be fine."""
    return ["train", "--data", "rows.jsonl", "--model", str(tiny_folder)]


def config(**values: object) -> RunConfig:
    return RunConfig.from_dict({"data": {"path": "rows.jsonl"}, "model": {"device": "cpu"}, **values})


def refused(answer: Answer, *words: str) -> None:
    """Bad input: exit code 2, nothing on stdout, one line on stderr with these words, no traceback."""
    assert answer.code == 2, answer
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1 and answer.err.endswith(".\n")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err


# Help


def test_help_lists_every_command(mole: Mole) -> None:
    answer = mole("--help")
    assert answer.code == 0
    for command in ("studio", "train", "chat", "eval", "runs", "models", "data"):
        assert f"    {command} " in answer.out


@pytest.mark.parametrize(
    "command",
    ["studio", "train", "chat", "eval", "runs", "models", "data", "models list", "models pull", "data check"]
    + [f"runs {name}" for name in ("list", "show", "queue", "move", "stop", "resume", "delete", "export")]
    + ["presets"],
)
def test_every_command_has_help(mole: Mole, command: str) -> None:
    answer = mole(*command.split(), "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"usage: mole {command}")


def test_the_flags_of_train_follow_from_the_settings(mole: Mole) -> None:
    text = " ".join(mole("train", "--help").out.split())
    flags = 0
    for section in SECTIONS.values():
        for item in section.__dataclass_fields__.values():
            if "spec" in item.metadata and spec_of(item).flag:
                flags += 1
                assert f"{spec_of(item).flag} " in text
                assert spec_of(item).help in text
    assert flags >= 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "mole --help"),
        ("trian", "mole --help"),
        ("train --fast", "mole --help"),
        ("runs", "mole runs --help"),
        ("runs show", "mole runs show --help"),
        ("chat x --prompt y --max-new-tokens 0", "a whole number at least 1"),
        ("chat x --prompt y --temperature -1", "a number at least 0"),
        ("chat x --prompt y --top-p 1.5", "a number from 0 to 1"),
        ("chat x --prompt y --top-k 1.5", "a whole number at least 0"),
        ("chat x --prompt y --min-p 2", "a number from 0 to 1"),
        ("chat x --prompt y --repetition-penalty x", "a number from 0 to"),
        ("runs continue x", "--steps"),
        ("runs continue x --steps 0", "a whole number at least 1"),
        ("runs continue x --steps 4 --schedule again", "restart"),
        ("eval x", "--data"),
        ("studio --port http", "from 1 to 65535"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_hint(mole: Mole, arguments: str, words: str) -> None:
    refused(mole(*arguments.split()), words, "--help")


# Bad input to train: nothing is made


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--router", "magic"], ["adapter.router", "'magic'", "dynmole", "lora"]),
        (["--experts", "0"], ["adapter.num_experts", "at least 1"]),
        (["--experts", "2,0"], ["adapter.num_experts"]),
        (["--experts", "many"], ["adapter.num_experts", "'many'"]),
        (["--rank", "0"], ["adapter.r ", "at least 1"]),
        (["--lr", "nan"], ["training.learning_rate"]),
        (["--steps", "-1"], ["training.max_steps"]),
        (["--set", "adapter.top_p=1.5"], ["adapter.top_p", "1.5", "at most 1"]),
        (["--router", "topk", "--set", "adapter.top_p=0.5"], ["adapter.top_p", "'topk'", "top_k"]),
        (["--set", "training.speed=9"], ["training.speed is not a setting", "max_steps"]),
        (["--set", "nonsense"], ["SECTION.FIELD=VALUE"]),
        (["--preset", "magic"], ["no preset 'magic'", "mola", "gpu-24gb"]),
        (["--grid", "nonsense"], ["SECTION.FIELD=VALUE,VALUE", "training.seed=0,1,2"]),
        (["--grid", "training.seed=0,-1"], ["training.seed=-1 is not possible", "at least 0"]),
        (["--grid", "adapter.router=topk,lora", "--grid", "adapter.top_k=1,2"], ["adapter.router=lora", "'lora'"]),
        (["--grid", "training.seed=0,1", "--name", "x"], ["--name", "--group"]),
        (["--grid", "training.seed=0,1", "--group", "../x"], ["group name '../x'", "not allowed"]),
        (["--set", "model.device=tpu"], ["model.device", "'tpu'"]),
        (["--name", "../out"], ["'../out'", "not allowed"]),
        (["--name", "NUL"], ["'NUL'", "Windows"]),
        (["--data", "gone.jsonl"], ["gone.jsonl", "data.path"]),
        (["--data", "broken.jsonl"], ["broken.jsonl", "line 7"]),
        (["--set", "data.eval_path=gone.jsonl"], ["gone.jsonl", "data.eval_path"]),
        (["--set", "data.columns.prompt=question"], ["data.columns.prompt", "'question'", "prompt, completion"]),
        (["--model", "no/model/here"], ["no/model/here"]),
        (["--model", "gone.gguf"], ["gone.gguf"]),
        (["--config", "gone.yaml"], ["gone.yaml", "does not exist"]),
        (["--config", "broken.jsonl"], ["broken.jsonl"]),
    ],
)
def test_bad_input_is_named_before_a_run_is_made(
    mole: Mole, base: list[str], home: Path, flags: list[str], words: list[str]
) -> None:
    Path("broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 6 + '{"prompt": "a", \n')
    for detach in ([], ["--detach"]):
        refused(mole(*base, *flags, *detach), *words)
    assert not (home / "runs").exists()


def test_training_needs_data(mole: Mole) -> None:
    refused(mole("train"), "data.path", "--data")


def test_a_name_that_is_taken_is_refused(mole: Mole, base: list[str]) -> None:
    runs.create(config(name="demo"))
    refused(mole(*base, "--name", "demo"), "already a run 'demo'")


def settings_of(line: str) -> RunConfig:
    """What `mole train …` would train with."""
    return RunConfig.from_dict(train_settings(parser.build_parser().parse_args(["train", *line.split()])))


def test_flags_go_over_the_config_file_and_set_over_both(mole: Mole) -> None:
    Path("run.yaml").write_text(
        "name: mine\ndata: {path: a.jsonl}\nadapter: {router: topk, top_k: 3, r: 4}\ntraining: {max_steps: 5, seed: 1}"
    )
    made = settings_of("--config run.yaml --rank 16 --steps 7 --set training.max_steps=9 --set adapter.lora_dropout=0")
    assert (made.name, made.data.path, made.adapter.router) == ("mine", "a.jsonl", "topk")
    assert (made.adapter.r, made.training.max_steps, made.training.seed) == (16, 9, 1)
    assert made.adapter.to_flat()["top_k"] == 3
    assert made.adapter.lora_dropout == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "rows.jsonl", "--data", "{path: more.csv, weight: 2}"],
        ["--data", "[rows.jsonl, {path: more.csv, weight: 2}]"],
        ["--set", "data.path=[rows.jsonl, {path: more.csv, weight: 2}]"],
    ],
)
def test_several_files_are_given_as_a_list_or_by_repeating_the_flag(mole: Mole, flags: list[str]) -> None:
    options = parser.build_parser().parse_args(["train", *flags])
    data = RunConfig.from_dict(train_settings(options)).data
    assert data.path == ["rows.jsonl", {"path": "more.csv", "weight": 2}]
    refused(mole(*["train", *flags, "--set", "model.device=cpu"]), "There is no file more.csv")


def test_another_router_drops_the_settings_of_the_one_in_the_file(mole: Mole) -> None:
    Path("run.yaml").write_text("adapter: {router: topk, top_k: 3}\ndata: {path: a}\n")
    made = settings_of("--config run.yaml --router adamole --set adapter.max_threshold=null --name new")
    assert (made.name, made.adapter.router) == ("new", "adamole")


# Runs


def test_runs_list_and_show_speak_json(mole: Mole) -> None:
    assert json.loads(mole("runs", "list", "--json").out) == []
    run = runs.create(config(name="demo", training={"max_steps": 5}))
    run.append_event("step", 3, loss=2.0)
    rows = json.loads(mole("runs", "list", "--json").out)
    assert [list(row) for row in rows] == [["name", "state", "step", "total_steps", "router", "model", "created"]]
    assert rows[0]["state"] == "interrupted"
    shown = json.loads(mole("runs", "show", "demo", "--json").out)
    assert {"config", "metrics", "error", *rows[0]} <= shown.keys()
    assert shown["metrics"]["loss"] == 2.0


def test_runs_list_and_show_speak_to_people(mole: Mole) -> None:
    assert "No runs yet" in mole("runs", "list").out
    run = runs.create(config(name="demo", training={"max_steps": 5}))
    run.append_event("failed", 3, error="The disk is full.", advice="Free some space.")
    assert mole("runs", "list").out.splitlines()[1].split()[:4] == ["demo", "failed", "3/5", "dynmole"]
    out = mole("runs", "show", "demo").out
    assert "The disk is full. Free some space." in out
    assert "max_steps: 5" in out


@pytest.mark.parametrize("command", ["show", "stop", "resume", "delete --yes", "resume --detach"])
def test_a_run_that_is_not_there(mole: Mole, command: str) -> None:
    refused(mole("runs", *command.split(), "nope"), "'nope'", "mole runs list")
    refused(mole("runs", *command.split(), "../nope"), "'../nope'", "not allowed")


def test_a_run_in_the_wrong_state(mole: Mole) -> None:
    run = runs.create(config(name="demo"))
    run.append_event("stopped", 3)
    refused(mole("runs", "stop", "demo"), "demo is stopped")
    refused(mole("runs", "continue", "demo", "--steps", "2"), "demo is stopped", "mole runs resume demo")
    checkpoint.write_folder(run.adapter_dir, lambda folder: (folder / "x").write_text("x") and None, step=3)
    refused(mole("runs", "resume", "demo"), "demo has finished")


def test_delete_asks_and_without_a_terminal_wants_yes(mole: Mole, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.create(config(name="demo"))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    refused(mole("runs", "delete", "demo"), "--yes")
    with run.lock():
        refused(mole("runs", "delete", "demo", "--yes"), "stop it first")
    assert run.path.exists()
    assert mole("runs", "delete", "demo", "--yes") == (0, "Deleted demo.\n", "")
    assert not run.path.exists()


def test_export_says_what_it_wrote_and_overwrites_nothing(mole: Mole) -> None:
    run = runs.create(config(name="demo"))
    refused(mole("runs", "export", "demo", "out"), "no adapter yet")
    checkpoint.write_folder(run.adapter_dir, lambda folder: (folder / "x").write_text("x") and None, step=3)
    answer = mole("runs", "export", "demo", "out")
    assert answer.code == 0
    assert f"mole runs import {Path('out').absolute()}" in answer.out
    refused(mole("runs", "export", "demo", "out"), "exists already")


def test_a_full_disk_is_a_failure_not_a_traceback(mole: Mole, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(runs, "list_runs", full)
    assert mole("runs", "list") == (1, "", "mole: No space left on device: /somewhere.\n")


@pytest.mark.parametrize("arguments", ["--debug runs show nope", "runs --debug show nope", "runs show nope --debug"])
def test_debug_shows_the_traceback_wherever_it_stands(mole: Mole, arguments: str) -> None:
    answer = mole(*arguments.split())
    assert answer.code == 2
    assert "Traceback" in answer.err


# Data, chat, evaluation, studio


def test_data_check_tells_shape_rows_and_what_it_rejects(mole: Mole) -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write('{"prompt": "x", "completion": true, "id": 7}\n')
    answer = mole("data", "check", "rows.jsonl")
    assert answer.code == 0
    assert "Columns that are not used: id\n" in answer.out
    assert "6 rows of shape prompt/completion, 1 rejected" in answer.out
    assert "row 7: " in answer.out
    report = json.loads(mole("data", "check", "rows.jsonl", "--json").out)
    assert (report["rows"], report["shape"], report["rejected"]) == (6, "prompt/completion", 1)
    assert report["rejections"] == ["row 7: completion is true or false, not text"]
    assert (report["ignored_columns"], report["notices"], report["shown"]) == (["id"], [], [])


def test_data_check_shows_rows_as_training_sees_them(mole: Mole, tiny_folder: Path) -> None:
    Path("asked.jsonl").write_text('{"q": "2+2?", "a": "4"}\n{"q": "3+3?", "a": "6"}\n')
    check = ["data", "check", "asked.jsonl", "--columns", "{prompt: q, completion: a}", "--model", str(tiny_folder)]
    report = json.loads(mole(*check, "--show", "1", "--json").out)
    (row,) = report["shown"]
    assert "".join(row["tokens"]).endswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>")
    assert [token for token, learnt in zip(row["tokens"], row["learnt"], strict=True) if learnt] == ["4", "<|im_end|>"]
    assert mole(*check, "--show", "2").out.endswith("user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦6<|im_end|>⟧\n")
    refused(mole("data", "check", "asked.jsonl", "--columns", "{prompt: x}"), "x", "q, a")


def test_data_check_tells_several_files_apart(mole: Mole) -> None:
    Path("more.csv").write_text("q,a,id\nx,y,1\nx,,2\n")
    more = "{path: more.csv, weight: 2, columns: {prompt: q, completion: a}}"
    answer = mole("data", "check", "rows.jsonl", more)
    assert (answer.code, answer.err) == (0, "")
    assert "rows.jsonl: 6 rows of shape prompt/completion, 0 rejected\n" in answer.out
    assert "more.csv: 1 rows of shape prompt/completion, 1 rejected\nColumns that are not used: id\n" in answer.out
    assert answer.out.endswith("\nTogether: 7 rows, 8 per epoch, 1 rejected\n")
    report = json.loads(mole("data", "check", f"[rows.jsonl, {more}]", "--json").out)
    assert (report["rows"], report["rows_per_epoch"], report["rejections"]) == (
        7,
        8,
        ["more.csv row 2: completion is empty"],
    )
    assert [(file["data"], file["rows"], file["weight"]) for file in report["files"]] == [
        ("rows.jsonl", 6, 1), ("more.csv", 1, 2),
    ]  # fmt: skip
    refused(mole("data", "check", "rows.jsonl", "more.csv"), "more.csv: its columns (q, a, id) fit no known shape")
    refused(mole("data", "check", "rows.jsonl", "./rows.jsonl"), "rows.jsonl and ./rows.jsonl are given twice")


def test_data_check_counts_tokens_with_a_model(mole: Mole, tiny_folder: Path) -> None:
    report = json.loads(mole("data", "check", "rows.jsonl", "--model", str(tiny_folder), "--json").out)
    assert 0 < report["tokens"]["min"] <= report["tokens"]["median"] <= report["tokens"]["max"]
    assert report["tokens"]["total"] >= 6 * report["tokens"]["min"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"', "line 1"),
        ("", "bad.jsonl"),
        ('{"colour": "red"}', "colour"),
        ('{"prompt": true, "completion": 2}', "row 1"),
    ],
)
def test_data_check_refuses_what_cannot_be_used(mole: Mole, content: str, words: str) -> None:
    Path("bad.jsonl").write_text(content)
    refused(mole("data", "check", "bad.jsonl"), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "nope", "--prompt", "x"], "nope"),
        (["chat", "base:no/model/here", "--prompt", "x"], "no/model/here"),
        (["chat", "nope", "--prompt", " "], "--prompt is empty"),
        (["chat", "nope", "--trace", "t.json"], "--trace needs --prompt"),
        (["chat", "nope", "--prompt", "x", "--trace", "no/where/t.json"], "--trace no/where/t.json"),
        (["eval", "nope", "--data", "rows.jsonl"], "nope"),
        (["eval", "nope", "--data", "gone.jsonl"], "gone.jsonl"),
        (["eval", "nope", "--data", "rows.jsonl", "--json", "no/where.json"], "--json no/where.json"),
        (["studio", "--auth", "me"], "USER:PASS"),
        (["studio", "--auth", ":secret"], "USER:PASS"),
        (["models", "pull", "gone.gguf"], "gone.gguf"),
    ],
)
def test_other_bad_input_is_one_line_too(mole: Mole, arguments: list[str], words: str) -> None:
    refused(mole(*arguments), words)


def test_models_list_has_the_embedded_one(mole: Mole) -> None:
    assert "smollm2-135m" in mole("models", "list").out
    assert "smollm2-135m" in [row["name"] for row in json.loads(mole("models", "list", "--json").out)]


def test_help_and_lists_do_not_wait_for_torch(home: Path) -> None:
    code = (
        "import sys; from mole.cli import main; main(['runs', 'list', '--json']); main(['models', 'list']);"
        "sys.exit(bool({'torch', 'transformers', 'gradio'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600, stdout=subprocess.DEVNULL).returncode == 0


def test_a_library_that_warns_while_it_is_imported_prints_nothing_around_a_command() -> None:
    """bitsandbytes warns of a missing kernel on a CPU with AVX512-BF16; here it takes every CPU for one."""
    code = """
import mole
from wrapt import register_post_import_hook
register_post_import_hook(lambda module: setattr(module, "has_avx512bf16", lambda: True), "bitsandbytes.functional")
import logging, peft, sys
assert "bitsandbytes.backends.cpu.ops" in sys.modules
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("which other machines warn of")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=6000)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["mole", "mole.cli"])
def test_the_command_can_be_run_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=6000)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mole {__version__}\n", "")


def test_a_reader_that_has_seen_enough_is_no_error(home: Path) -> None:
    for number in range(3):
        runs.create(config(name=f"run-{number}"))
    command = f"{sys.executable} -m mole.cli runs list | true; echo ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=6000)
    assert (answer.stdout, answer.stderr) == ("0\n", "")


def test_an_evaluation_waits_for_its_device_and_chat_goes_beside_a_training_on_the_gpu(
    mole: Mole, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(device: str) -> locks.Lock:
        path = runs.device_lock_path(device)
        path.parent.mkdir(exist_ok=True)
        lock = locks.acquire(path, run="training")
        assert lock is not None
        return lock

    device = held("cpu")
    Timer(1.0, device.release).start()
    waited = mole("eval", str(tiny_adapter), "--data", "rows.jsonl", "--limit", "1", "--device", "cpu")
    assert waited.code == 0 and waited.err.startswith("Waiting for cpu: run training"), waited
    monkeypatch.setattr("mole.cli.commands.chat.physical_device", lambda device: "cuda:0")
    chat = ["chat", str(tiny_adapter), "--prompt", "say yes", "--max-new-tokens", "2"]
    with held("cuda:0"):
        answer = mole(*chat)
    told = "Note: training is using cuda:0: replies are computed on the CPU. --device auto shares it.\n"
    assert (answer.code, answer.err) == (0, told)
    assert mole(*chat).err == mole(*chat, "--device", "cpu").err == ""
    refused(mole(*chat, "--device", "gpu"), "model.device is 'gpu'; it must be auto, cpu, mps, cuda or cuda:N")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_chat_eval_and_export_in_a_row(
    mole: Mole,
    base: list[str],
    home: Path,
    auto_dtype: Callable[[str], None],
    dtype: str,
    recwarn: pytest.WarningsRecorder,
) -> None:
    auto_dtype(dtype)
    flags = (
        "--experts 2 --rank 2 --steps 3 --batch-size 2 --name demo --set model.device=cpu --set data.eval_fraction=0.2"
    )
    answer = mole(*base, *flags.split())
    assert answer.code == 0, answer
    run = runs.get("demo")
    assert run.state == "finished"
    assert next(event for event in run.events() if event["type"] == "started")["dtype"] == dtype
    assert f"Adapter: {run.adapter_dir}" in answer.out
    assert "mole chat demo" in answer.out
    assert "Traceback" not in answer.err

    chat = ["chat", "demo", "--prompt", "say yes", "--max-new-tokens", "4"]
    plain, traced = mole(*chat), mole(*chat, "--trace", "trace.json")
    assert plain.code == traced.code == 0, plain
    assert plain.out == traced.out and plain.err == ""
    replayed = mole(*chat, "--replay", "replay.html")
    assert (replayed.code, replayed.out) == (0, plain.out)
    [value] = json.loads(Path("replay.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert (value["title"], value["turns"][0]["user"]) == ("demo", "say yes")
    assert value["routing"]["tokens"] == json.loads(Path("trace.json").read_text())["tokens"]
    refused(mole(*chat, "--replay", "no/where.html"), "--replay no/where.html cannot be written")
    assert mole(*chat, "--stop-string", plain.out[1:3]).out == plain.out[0] + "\n"
    refused(mole(*chat, "--enable-thinking"), "enable_thinking", "its chat template has no such choice")
    refused(mole(*chat, "--repetition-penalty", "0"), "repetition_penalty is 0", "greater than 0")
    trace = json.loads(Path("trace.json").read_text())
    assert (trace["router"], trace["experts"], trace["layers"]) == ("dynmole", 2, 2)
    tokens = len(trace["tokens"])
    assert 0 < trace["prompt_tokens"] <= tokens
    assert [len(trace[key]) for key in ("weights", "entropy", "active")] == [tokens] * 3

    answer = mole("eval", "demo", "--data", "rows.jsonl", "--limit", "3", "--json", "result.json")
    assert answer.code == 0, answer
    assert "exact match: " in answer.out
    result = json.loads(Path("result.json").read_text())
    assert (result["rows"], result["target"], result["data"]) == (3, "demo", "rows.jsonl")
    assert result["metrics"].keys() == {"exact_match", "perplexity"}

    answer = mole("runs", "continue", "demo", "--steps", "2", "--name", "longer")
    assert (answer.code, runs.get("longer").step) == (0, 5) and "Finished at step 5" in answer.out, answer

    assert not recwarn.list, "warnings of libraries are not shown around our commands"

    assert mole("runs", "export", "demo", "out").code == 0
    assert mole("chat", "out/adapter", "--prompt", "say yes", "--max-new-tokens", "4").out == plain.out
    taken = mole("runs", "import", "out", "--name", "back")
    assert taken == (0, "Imported the run back. Chat: mole chat back\n", "")
    assert mole("chat", "back", "--prompt", "say yes", "--max-new-tokens", "4").out == plain.out
    refused(mole("runs", "import", "out"), "There is a run called 'demo' already; choose another name")
    again = mole("train", "--config", str(run.config_path), "--steps", "1", "--detach")
    assert (again.code, again.out) == (0, "demo-2\n")
    runs.stop(runs.get("demo-2"))


# Presets, grids and the queue


def test_presets_are_listed_and_begun_with(mole: Mole, base: list[str]) -> None:
    listed = mole("presets")
    assert listed.code == 0
    for name in ("cpu", "gpu-24gb", "dynmole", "adamole", "mola", "loramoe", "ldmole", "lora"):
        assert f"\n{name} " in listed.out
    Path("over.yaml").write_text("training: {warmup_steps: 7}\nadapter: {r: 2}")
    options = parser.build_parser().parse_args([*base, "--preset", "mola", "--config", "over.yaml", "--rank", "4"])
    made = RunConfig.from_dict(train_settings(options))
    assert (made.adapter.num_experts, made.training.learning_rate) == ([2, 4, 6, 8], 3e-4)  # the preset's
    assert (made.training.warmup_steps, made.adapter.r) == (7, 4)  # the file over it, the flag over that
    other = parser.build_parser().parse_args([*base, "--preset", "mola", "--router", "dynmole"])
    assert RunConfig.from_dict(train_settings(other)).adapter.to_flat()["entropy_threshold"] == 0.9


def test_a_grid_is_queued_listed_moved_and_left(mole: Mole, base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "spawn", lambda run, **_: None)
    flags = ["--set", "model.device=cpu", "--grid", "adapter.router=topk,lora", "--grid", "training.seed=0,1"]
    answer = mole(*base, *flags, "--group", "try")
    expected = ["try-topk-s0", "try-topk-s1", "try-lora-s0", "try-lora-s1"]
    assert answer.out.splitlines() == ["Queued 4 runs in the group try:", *expected]
    assert {run.group for run in runs.list_runs()} == {"try"}
    assert [line.split()[:4] for line in mole("runs", "queue").out.splitlines()[1:]] == [
        [str(place), "cpu", name, "try"] for place, name in enumerate(expected, start=1)
    ]
    moved = mole("runs", "move", "try-lora-s1", "2").out.splitlines()
    assert [line.split()[2] for line in moved[1:]] == ["try-topk-s0", "try-lora-s1", "try-topk-s1", "try-lora-s0"]
    for name in expected:
        assert mole("runs", "stop", name).code == 0
    assert mole("runs", "queue").out == "The queue is empty.\n"
    refused(mole("runs", "move", "try-lora-s1", "1"), "try-lora-s1 is stopped")
    refused(mole("runs", "move", "try-lora-s1", "0"), "a whole number at least 1")


@pytest.mark.parametrize("targets", ["[q_prj]", ".*q_prj"])
def test_a_wrong_target_is_refused_with_the_names_that_exist(mole: Mole, base: list[str], targets: str) -> None:
    answer = mole(*base, "--set", "model.device=cpu", "--set", f"adapter.target_modules={targets}")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert "adapter.target_modules" in answer.err and "q_proj" in answer.err and "down_proj" in answer.err


def test_the_wrong_name_in_a_list_of_targets_is_named_and_the_others_are_adapted(mole: Mole, base: list[str]) -> None:
    flags = "--steps 1 --batch-size 2 --name partly --set model.device=cpu --set adapter.num_experts=2"
    answer = mole(*base, *flags.split(), "--set", "adapter.target_modules=[q_proj, nonsense]")
    (notice,) = [line for line in answer.err.splitlines() if "nonsense" in line]
    assert answer.code == 0 and notice.startswith("Note: adapter.target_modules: this model has no module nonsense; ")
    assert "q_proj" in notice and notice == f"Note: {runs.get('partly').details()['notices'][0]}"
