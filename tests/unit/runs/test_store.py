"""A run is a folder, and its state follows from what is in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint, locks
from mole.core.errors import BusyError, RunError
from mole.runs import queue
from mole.runs.run import Run


def config(**values: Any) -> RunConfig:
    return RunConfig.from_dict({"data": {"path": "some/data"}, "model": {"device": "cpu"}, **values})


def give_adapter(run: Run) -> None:
    checkpoint.write_folder(run.adapter_dir, lambda folder: (folder / "adapter_config.json").write_text("{}"), step=1)


# Names and creation


@pytest.mark.parametrize("name", ["a", "demo-1", "A.b_c", "_x", "9", "a" * 64, "connect", "com", "nulls.1"])
def test_good_names(name: str) -> None:
    assert runs.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "../x", "a/b", "a\\b", "/etc", "a b", "a\n", "x.", "-x", "~", "a" * 65),
        *("a\u2024b", "a\uff0fb", "a\0", "CON", "nul", "com1", "LPT9.txt", "aux.tar.gz", "com\u00b9", "名" * 65, "a😀"),
        # Twins of `demo`: with a letter of another alphabet, wide, bold, with marks and letters that are not seen.
        *("d\u0435mo", "dem\u03bf", "\uff44emo", "de\u200bmo", "demo\u200d", "\u202edemo", "demo\u200f", "demo\u3164"),
        *("demo\ufe0f", "de\u00admo", "\ufeffdemo", "demo\u00a0", "\U0001d41d\U0001d41e", "demo\u034f", "\u0301demo"),
        *("de\u0301\u0302\u0303\u0304\u0305mo", "demo\U000e0101", "\ud800"),
    ],
)
def test_names_that_could_leave_the_folder_or_break_a_system_are_refused(home: Path, name: str) -> None:
    for use in (runs.check_name, runs.get, lambda name: runs.create(config(name=name))):
        with pytest.raises(RunError, match="is not allowed"):
            use(name)
    assert not list(home.rglob("*.yaml"))


@pytest.mark.parametrize(
    "name", ["名前", "Übung-1", "обучение", "обучение-lora", "σειρά_2", "प्रशिक्षण", "훈련", "تدريب.٣", "ışık"]
)
def test_names_are_in_letters_of_any_language_and_have_one_spelling(home: Path, name: str) -> None:
    decomposed = unicodedata.normalize("NFD", name)
    run = runs.create(config(name=decomposed, group=decomposed))
    assert run.name == run.config.name == run.group == runs.get(decomposed).name == unicodedata.normalize("NFC", name)
    assert [each.name for each in runs.list_runs()] == [run.name] and run.state == "queued"
    with pytest.raises(RunError, match="already"):
        runs.create(config(name=name))
    assert runs.create(config(name=name), number=True).name == f"{run.name}-2"
    run.path.rename(home / "runs" / unicodedata.normalize("NFD", name))  # as on a system that decomposes letters
    assert runs.get(name).config.name == run.name


def test_names_that_differ_in_case_are_two_runs(home: Path) -> None:
    made = {name: runs.create(config(name=name, training={"seed": seed})) for seed, name in enumerate(("demo", "DEMO"))}
    assert {run.name for run in runs.list_runs()} == set(made)
    assert [runs.get(name).config.training.seed for name in made] == [0, 1]
    runs.delete(runs.get("DEMO"))
    assert [run.name for run in runs.list_runs()] == ["demo"]


def test_where_case_is_ignored_a_run_is_found_by_its_own_name_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file system (that of macOS) takes any spelling of a name for the file; here `stat` is made to."""
    runs.create(config(name="Demo"))

    def ignoring_case(look: Any) -> Any:
        def looked(path: Any, *more: Any, **named: Any) -> Any:
            spelled = path if isinstance(path, int) else re.sub("/demo", "/Demo", str(path), flags=re.IGNORECASE)
            return look(spelled, *more, **named)

        return looked

    for look in ("stat", "lstat", "access"):
        monkeypatch.setattr(os, look, ignoring_case(getattr(os, look)))
    assert (home / "runs" / "demo" / "run.yaml").is_file()
    assert runs.get("Demo").config.name == "Demo"
    with pytest.raises(RunError, match="There is no run called 'demo'"):
        runs.get("demo")
    with pytest.raises(RunError, match="There is a run called 'demo' already"):
        runs.create(config(name="demo"))
    assert [run.name for run in runs.list_runs()] == ["Demo"]


def test_a_new_run_can_be_read_back_and_reused(home: Path) -> None:
    run = runs.create(config(name="demo", adapter={"router": "topk", "top_k": 3}))
    assert run.path == home / "runs" / "demo"
    assert RunConfig.load(run.config_path) == config(name="demo", adapter={"router": "topk", "top_k": 3})
    assert [event["type"] for event in run.events()] == ["created"]
    assert run.state == "queued"
    assert runs.get("demo") == run


def test_names_are_made_of_router_and_model(home: Path) -> None:
    made = [runs.create(config(model={"name": name})).name for name in ("org/Some Model", "org/Some Model", "x/y.gguf")]
    assert made == ["dynmole-some-model-1", "dynmole-some-model-2", "dynmole-y-1"]


def test_a_name_is_given_once(home: Path) -> None:
    runs.create(config(name="demo"))
    with pytest.raises(RunError, match="'demo' already"):
        runs.create(config(name="demo"))
    assert runs.create(config(name="demo"), number=True).name == "demo-2"


def test_many_at_once_never_share_a_folder(home: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: runs.create(config()).name, range(24)))
    assert len(set(names)) == 24
    assert {path.name for path in (home / "runs").iterdir()} == set(names)


def test_a_group_is_kept_in_the_config_and_told_cheaply(home: Path) -> None:
    run = runs.create(config(name="a", group="sweep"))
    assert runs.get("a").config.group == "sweep"
    run.config_path.write_text("not looked at: [")
    assert runs.get("a").group == "sweep"
    assert runs.create(config(name="b")).group is None
    with pytest.raises(RunError, match="group name '../x' is not allowed"):
        runs.create(config(name="c", group="../x"))
    assert not (home / "runs" / "c").exists()


def test_local_paths_become_absolute_hub_ids_stay(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("")
    Path("base").mkdir()
    Path("smollm2-135m").mkdir()
    run = runs.create(config(data={"path": "rows.jsonl", "eval_path": "org/held-out"}, model={"name": "base"}))
    assert run.config.data.path == str(tmp_path / "rows.jsonl")
    assert run.config.data.eval_path == "org/held-out"
    assert run.config.model.name == str(tmp_path / "base")
    assert runs.create(config(model={"name": "smollm2-135m"})).config.model.name == "smollm2-135m"


def test_a_link_is_not_a_run(home: Path, tmp_path: Path) -> None:
    run = runs.create(config(name="demo"))
    run.path.rename(tmp_path / "outside")
    run.path.symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="There is no run"):
        runs.get("demo")
    assert runs.list_runs() == []


# State


@pytest.mark.parametrize(
    ("events", "adapter", "unheld", "held"),
    [
        (["created"], False, "queued", "queued"),
        (["created", "queued"], False, "queued", "queued"),
        (["created", "queued", "starting"], False, "interrupted", "running"),
        (["created", "queued", "starting", "started", "step"], False, "interrupted", "running"),
        (["created", "queued", "starting", "started", "checkpoint"], False, "interrupted", "running"),
        (["created", "queued", "starting", "step", "stopped"], False, "stopped", "running"),
        (["created", "queued", "starting", "failed"], False, "failed", "running"),
        (["created", "queued", "starting", "step", "stopped", "queued"], False, "queued", "queued"),
        (["created", "queued", "starting", "step"], True, "finished", "running"),
        (["created", "queued", "starting", "step", "finished"], True, "finished", "running"),
        (["created", "queued", "starting", "step", "finished"], False, "interrupted", "running"),
        ([], False, "interrupted", "running"),
        ([], True, "finished", "running"),
    ],
)
def test_the_state_follows_from_lock_adapter_and_last_event(
    home: Path, events: list[str], adapter: bool, unheld: str, held: str
) -> None:
    run = runs.create(config())
    run.events_path.unlink()
    for event in events:
        run.append_event(event, 0)
    if adapter:
        give_adapter(run)
    assert run.state == unheld
    with run.lock():
        assert run.state == held
    assert run.state == unheld
    assert run.status()["router"] == "dynmole"


def test_status_and_details_answer_the_contract(home: Path) -> None:
    run = runs.create(config(name="demo", training={"max_steps": 30}))
    assert run.status() == {
        "name": "demo",
        "state": "queued",
        "step": 0,
        "total_steps": 30,
        "router": "dynmole",
        "model": "smollm2-135m",
        "created": run.events()[0]["time"],
    }
    run.append_event("step", 10, loss=2.5)
    run.append_event("eval", 10, eval_loss=2.25)
    run.append_event("step", 20, loss=1.5)
    run.append_event("failed", 21, error="Out of memory.", advice="Use less.")
    details = run.details()
    assert (details["state"], details["step"], details["total_steps"]) == ("failed", 21, 30)
    assert details["metrics"] == {"loss": 1.5, "eval_loss": 2.25}
    assert (details["error"], details["advice"]) == ("Out of memory.", "Use less.")
    assert details["config"] == run.config.to_dict()
    run.append_event("step", 30, loss=1.0)
    give_adapter(run)
    run.append_event("finished", 30, metrics={"eval_loss": 1.25})
    assert run.details()["metrics"] == {"loss": 1.0, "eval_loss": 1.25}
    assert run.details()["error"] is None


def test_the_number_of_steps_is_known_once_training_started(home: Path) -> None:
    run = runs.create(config(training={"max_steps": 0}))
    assert run.status()["total_steps"] == 0
    run.append_event("started", 0, total_steps=123)
    assert run.status()["total_steps"] == 123


def test_a_run_without_events_is_told_from_its_config(home: Path) -> None:
    run = runs.create(config(name="demo", adapter={"router": "topp"}))
    run.events_path.unlink()
    assert runs.get("demo").status()["router"] == "topp"
    run.config_path.write_text("a: [")
    assert runs.get("demo").status()["router"] == "?"
    assert len(runs.list_runs()) == 1


@pytest.mark.timed
def test_a_thousand_runs_are_listed_in_under_a_second(home: Path) -> None:
    template = runs.create(config(name="run-0"))
    for step in range(40):
        template.append_event("step", step, loss=1.0, routing=[[0.125] * 16] * 16)
    for number in range(1, 1000):
        shutil.copytree(template.path, home / "runs" / f"run-{number}")
    times = []
    for _ in range(3):
        began = time.process_time()  # not the wall's: the machine may be busy with something else
        rows = [run.status() for run in runs.list_runs()]
        times.append(time.process_time() - began)
    assert len(rows) == 1000
    assert {row["step"] for row in rows} == {39}
    assert min(times) < 1.0


# Events


def test_only_complete_lines_are_read_and_the_offset_moves_with_them(home: Path) -> None:
    run = runs.create(config())
    events, offset = run.read_events(0)
    assert [event["type"] for event in events] == ["created"]
    with run.events_path.open("ab") as file:
        file.write(b'{"time": 1.0, "type": "step", "st')
        file.flush()
        assert run.read_events(offset) == ([], offset)
        assert run.last_event["type"] == "created"
        file.write(b'ep": 5}\n')
    events, offset = run.read_events(offset)
    assert [event["step"] for event in events] == [5]
    assert run.read_events(offset) == ([], offset)


def test_a_half_written_line_is_closed_off_by_the_next_event(home: Path) -> None:
    run = runs.create(config())
    with run.events_path.open("ab") as file:
        file.write(b'{"time": 1.0, "type": "step", "step": 7, "loss": 0.')
    run.append_event("step", 8)
    assert [event["step"] for event in run.events()] == [0, 8]
    assert run.step == 8


def test_an_offset_behind_the_end_starts_over(home: Path) -> None:
    run = runs.create(config())
    events, _ = run.read_events(10**9)
    assert [event["type"] for event in events] == ["created"]


@pytest.mark.parametrize(
    "line", ["", "null", "[]", "{}", "garbage", '{"type": "step"}', '{"type": 1, "time": 1, "step": 1}', "[" * 100_000]
)
def test_lines_that_are_no_events_are_passed_over(home: Path, line: str) -> None:
    run = runs.create(config())
    with run.events_path.open("ab") as file:
        file.write(line.encode() + b"\n\xff\xfe\n")
    assert [event["type"] for event in run.events()] == ["created"]
    assert run.last_event["type"] == "created"


def test_numbers_that_are_not_finite_become_null(home: Path) -> None:
    run = runs.create(config())
    run.append_event("step", 1, loss=float("nan"), routing={"load": [[float("inf"), 0.5]]})
    event = json.loads(run.events_path.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert event["loss"] is None
    assert event["routing"] == {"load": [[None, 0.5]]}


def test_appending_from_many_threads_keeps_every_line_whole(home: Path) -> None:
    run = runs.create(config())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: run.append_event("step", step, text="x" * 5000), range(200)))
    assert sorted(event["step"] for event in run.events()[1:]) == list(range(200))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40_000), max_size=12), tail=st.binary(max_size=50))
def test_backwards_is_the_reverse_of_forwards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], tail: bytes
) -> None:
    run = Run("x", tmp_path_factory.mktemp("run"))
    for step, length in enumerate(lengths):
        run.append_event("step", step, text="x" * length)
    with run.events_path.open("ab") as file:
        file.write(tail.replace(b"\n", b""))
    assert list(run.events_backwards()) == run.events()[::-1]
    assert [event["step"] for event in run.events()] == list(range(len(lengths)))


# Locks


def test_a_held_run_says_who_holds_it(home: Path) -> None:
    run = runs.create(config(name="demo"))
    with run.lock(), pytest.raises(BusyError, match=rf"demo is held by process {os.getpid()}"):
        run.lock(patience=0)
    with run.lock(patience=0):
        pass


def test_looking_at_a_lock_makes_no_file(tmp_path: Path) -> None:
    assert not locks.is_held(tmp_path / "x.lock")
    assert list(tmp_path.iterdir()) == []


def test_an_old_note_in_a_free_lock_fools_nobody(home: Path) -> None:
    """The process number in it may by now be another program's, even ours."""
    run = runs.create(config())
    run.append_event("step", 3)
    run.lock_path.write_text(json.dumps({"pid": os.getpid(), "since": time.time()}))
    assert run.state == "interrupted"


def test_a_lock_on_a_deleted_file_is_not_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locks.acquire(path, patience=0) as first:
        assert first is not None
        path.unlink()
        second = locks.acquire(path, patience=0)
        assert second is not None
        assert locks.is_held(path)
        second.release()
        assert not locks.is_held(path)


# Deleting and exporting


def test_a_deleted_run_leaves_nothing(home: Path) -> None:
    run = runs.create(config(name="demo"))
    give_adapter(run)
    runs.delete(run)
    assert list((home / "runs").iterdir()) == []
    with pytest.raises(RunError, match="There is no run"):
        runs.get("demo")


def test_a_run_in_use_is_not_deleted(home: Path) -> None:
    run = runs.create(config(name="demo"))
    run.append_event("started", 0)
    with run.lock(), pytest.raises(RunError, match="demo is running; stop it first"):
        runs.delete(run)
    assert run.config_path.exists()


# The queue


def test_who_may_start_and_who_may_resume(home: Path) -> None:
    run = runs.create(config(name="demo"))
    runs.enqueue(run)
    with pytest.raises(BusyError, match="is being started already"):
        runs.enqueue(run)
    run.append_event("stopped", 4)
    with pytest.raises(RunError, match="demo is stopped; continue it with: mole runs resume demo"):
        runs.enqueue(run)
    runs.enqueue(run, resume=True)
    assert run.last_event["step"] == 4
    assert run.last_event["resume"] is True
    run.append_event("step", 5)
    give_adapter(run)
    with pytest.raises(RunError, match="has finished"):
        runs.enqueue(run, resume=True)
    with run.lock(), pytest.raises(BusyError, match="held by process"):
        runs.enqueue(run, resume=True)


def test_stopping_a_run_that_only_waits_takes_it_out_of_the_line(home: Path) -> None:
    run = runs.create(config(name="demo"))
    runs.enqueue(run)
    assert runs.waiting_runs("cpu") == [run]
    runs.stop(run)
    assert run.state == "stopped"
    assert runs.waiting_runs("cpu") == []
    with pytest.raises(RunError, match="demo is stopped; only a queued or running one"):
        runs.stop(run)


def test_a_run_that_does_not_stop_is_named_with_what_ends_it(home: Path) -> None:
    """Its process may hang where no request reaches it."""
    run = runs.create(config(name="demo"))
    runs.enqueue(run)
    with run.lock():
        run.append_event("starting", 0)
        runs.stop(run)
        runs.stop(run)  # so soon, it is only impatience
        asked = time.time() - 300
        os.utime(run.stop_path, (asked, asked))
        with pytest.raises(
            BusyError, match=rf"asked to stop 5 min ago.* kill -9 {os.getpid()}; .* mole runs resume demo"
        ):
            runs.stop(run)
        assert run.stop_requested()


def test_an_old_request_to_stop_does_not_stop_the_next_start(home: Path) -> None:
    run = runs.create(config())
    runs.enqueue(run)
    runs.stop(run)
    assert run.stop_requested()
    runs.enqueue(run, resume=True)
    assert not run.stop_requested()


def test_the_device_goes_to_the_first_in_line(home: Path) -> None:
    first, second, gone = (runs.create(config(name=name)) for name in ("b-first", "a-second", "gone"))
    runs.enqueue(gone)  # its process died: it must not block the others
    runs.enqueue(first)
    runs.enqueue(second)
    assert runs.waiting_runs("cpu") == [gone, first, second]
    with first.lock(), second.lock():
        assert runs.acquire_device("cpu", second) is None
        held = runs.acquire_device("cpu", first)
        assert held is not None
        with held:
            first.append_event("starting", 0)
            assert runs.acquire_device("cpu", second) is None
            other = runs.acquire_device("cuda:0", second)
            assert other is not None
            other.release()
        held = runs.acquire_device("cpu", second)
        assert held is not None
        held.release()


def names(line: list[Run]) -> list[str]:
    return [run.name for run in line]


def queued(*given: str, device: str = "cpu") -> list[Run]:
    """Runs in line, in this order, without processes."""
    made = [runs.create(config(name=name, model={"device": device})) for name in given]
    for run in made:
        runs.enqueue(run)
    return made


def test_the_queue_takes_the_order_it_is_given(home: Path) -> None:
    queued("a", "b", "c", "d")
    assert names(runs.reorder(["d", "b", "a"])) == ["d", "b", "c", "a"], "c was not named and keeps its place"
    assert names(runs.reorder(["a"])) == ["d", "b", "c", "a"]
    queued("e")
    assert names(runs.waiting_runs()) == ["d", "b", "c", "a", "e"], "who comes later stands behind"
    with pytest.raises(RunError, match="no run called 'z'"):
        runs.reorder(["e", "z"])


@pytest.mark.parametrize(("place", "line"), [(1, "cab"), (2, "acb"), (3, "abc"), (99, "abc"), (-4, "cab")])
def test_a_run_is_moved_to_a_place(home: Path, place: int, line: str) -> None:
    queued("a", "b", "c")
    queued("other", device="cuda:0")
    assert names(runs.move(runs.get("c"), place)) == list(line)
    assert names(runs.waiting_runs("cuda:0")) == ["other"]


def test_runs_queued_in_the_same_instant_can_be_told_apart(home: Path) -> None:
    for run in queued("a", "b", "c"):
        run.append_event("queued", 0, device="cpu", position=5.0)
    assert names(runs.reorder(["c", "a", "b"])) == ["c", "a", "b"]


def test_a_run_that_has_begun_or_ended_is_not_put_back_in_line(home: Path) -> None:
    first, second, third, fourth = queued("a", "b", "c", "d")
    with first.lock(), runs.acquire_device("cpu", first) or pytest.fail("the device is free"):
        before = len(first.events())
        assert names(runs.reorder(["d", "c", "b", "a"])) == ["a", "d", "c", "b"], "a has the device already"
        assert len(first.events()) == before
        first.append_event("starting", 0)
        runs.stop(third)
        runs.reorder(["c", "b", "a", "d"])
        assert (first.state, third.state) == ("running", "stopped")
        for gone in (first, third):
            with pytest.raises(RunError, match="only one that waits"):
                runs.move(gone, 1)
        assert runs.ahead_of(fourth) == ["a", "b"] and runs.ahead_of(second) == ["a"]
        assert runs.device_user("cpu") == "a" and runs.device_user("cuda:0") == ""


def test_a_moved_run_without_a_process_is_woken_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event is new, but nobody has just started it."""
    queued("a", "b")
    runs.reorder(["b", "a"])
    monkeypatch.setattr(queue, "spawn", lambda run, **_: None)
    assert names(runs.wake_queued()) == ["a", "b"]


def test_the_queue_has_an_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued("a", "b")
    monkeypatch.setattr(queue, "QUEUE_LIMIT", 2)
    run = runs.create(config(name="c"))
    with pytest.raises(BusyError, match="2 runs wait already and 1 more would exceed the queue's limit of 2"):
        runs.enqueue(run)


def test_two_who_reorder_at_once_lose_no_run(home: Path) -> None:
    letters = [run.name for run in queued(*"abcdef")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda turn: runs.reorder(letters[turn:] + letters[:turn]), range(12)))
    assert sorted(names(runs.waiting_runs())) == letters
    positions = [run.last_event["position"] for run in runs.waiting_runs()]
    assert len(set(positions)) == 6


def wait_until(happened: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_waiting_processes_keep_to_the_new_order(home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """Three real processes wait for a device that is taken; the last in line is moved to the front, then it is free."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say yes", "completion": "yes"}\n' * 8)
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(parents=True)
    taken = locks.acquire(path, run="holder")
    assert taken is not None
    made = []
    for name in ("one", "two", "three"):
        made.append(
            runs.create(
                config(
                    name=name,
                    data={"path": str(tmp_path / "rows.jsonl")},
                    model={"name": str(tiny_folder), "device": "cpu"},
                    adapter={"num_experts": 2, "r": 2},
                    training={"max_steps": 1, "per_device_train_batch_size": 2},
                )
            )
        )
        runs.start(made[-1])
    one, two, three = made
    try:
        wait_until(lambda: all(run.held for run in made))
        assert names(runs.move(three, 1)) == ["three", "one", "two"]
        runs.stop(two)
        wait_until(lambda: not two.held)
        assert two.state == "stopped"
        taken.release()
        wait_until(lambda: three.state == "finished" and one.state != "queued")
        begun = {run.name: next(e["time"] for e in run.events() if e["type"] == "starting") for run in (one, three)}
        assert begun["three"] < begun["one"]
    finally:
        for run in made:
            if run.state in ("queued", "running"):
                runs.stop(run)
        wait_until(lambda: not any(run.held for run in made))


def test_the_life_of_runs_needs_no_torch() -> None:
    code = "import sys, mole.cli, mole.training.worker; sys.exit(bool({'torch', 'gradio'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
