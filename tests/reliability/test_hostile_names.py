"""Bad names, targets and arguments: whatever somebody types is understood or refused in one line, at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hostile import answer, attack, for_the_page, junk, mole, mutated, nothing_written, real, refusal, text
from hypothesis import given
from hypothesis import strategies as st

from app.services import endpoints
from mole import runs
from mole.chat.generate import sampling
from mole.chat.settings import ChatSettings
from mole.config import ROUTERS, RunConfig, preset_path
from mole.core.errors import InputError, MoleError
from mole.core.names import check_name
from mole.mixture.steering import Steering, check_steering, describe_steering, override_params
from mole.models import catalog, sizes
from mole.models.sources import resolve
from mole.runs import grid

ROOT = Path(runs.__file__).parents[2]
NAMES = [
    "", ".", "..", "...", "/", "//", "\\", "a/b", "a\\b", "../a", "..\\a", "/etc/passwd", "~", "~root",
    "~nobody-here", "-a", "a ", " a", "a\n", "a\x00", "a\tb", "con", "CON.txt", "nul", "com1", "lpt9.yaml",
    "a.", "a..b", "\u202ea", "а", "ａ", "A" * 64, "A" * 65, "x" * 100_000, "a@1", "a@", "@", "a@@1", "a@-1",
    "a@1e9", "a@" + "9" * 5000, "base:", "base:..", "base:/dev/zero", "base:" + "x" * 5000,
    "file:///etc/passwd", "http://localhost/x", "hf://a/b", "a/b/c/d", "$HOME", "`id`", "%2e%2e", "\ud800",
    "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/mem", "/proc/self/fd/0", "/" + "a/" * 3000, "a" * 300,
    "null", "1", "１",
]  # fmt: skip
COMMANDS = ["chat", "eval", "show", "stop", "resume", "delete", "export", "pull", "train", "preflight"]
name = st.one_of(st.sampled_from(NAMES), text, st.text(st.characters(), max_size=40))


@pytest.fixture(scope="module", autouse=True)
def no_hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home of its own, an empty cache, and a hub that is switched off, as `HF_HUB_OFFLINE` does."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("nowhere")
    (folder / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(folder / "home"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@attack(200)
@given(name)
def test_a_name_is_allowed_only_if_it_is_one_plain_folder(no_hub: Path, given_name: str) -> None:
    given_name = str(real(given_name))
    for check in (check_name, preset_path, lambda value: check_name(value, "group", "group")):
        given = answer(lambda check=check: check(given_name))
        if not isinstance(given, InputError):
            allowed = given.stem if isinstance(given, Path) else given
            assert allowed == unicodedata.normalize("NFC", given_name) and allowed.isprintable()
            path = (runs.runs_dir() / allowed).resolve()
            assert path.parent == runs.runs_dir().resolve()
            assert path.name == allowed


@attack(150)
@given(name)
def test_no_target_hangs_or_is_taken_for_what_it_is_not(no_hub: Path, given_name: str) -> None:
    target = str(real(given_name))
    with nothing_written(no_hub):
        answer(lambda: runs.locate(target), MoleError)
        refusal(lambda: runs.get(target), MoleError)
        if not target.startswith("~") and target not in (".", "", "smollm2-135m"):
            refusal(lambda: resolve(target), MoleError)
        answer(lambda: catalog.about(target), MoleError)
        assert sizes.files_of(target) == []


@attack(80)
@given(name, st.sampled_from(COMMANDS))
def test_the_commands_refuse_a_strange_name_and_write_nothing(
    no_hub: Path, capsys: pytest.CaptureFixture[str], given_name: str, command: str
) -> None:
    target = str(real(given_name)).replace("-", "_") or "x"  # what begins with a dash is a flag
    (no_hub / "rows.jsonl").write_text('{"text": "a"}\n')
    if target == "base:":
        return  # the embedded model
    lines = {
        "chat": ["chat", target, "--prompt", "Hi"],
        "eval": ["eval", target, "--data", "rows.jsonl"],
        "delete": ["runs", "delete", target, "--yes"],
        "export": ["runs", "export", target, target],
        "pull": ["models", "pull", target],
        "train": ["train", "--data", "rows.jsonl", "--model", f"./{target}", "--detach"],
        "preflight": ["preflight", "--data", f"{target}/rows.json"],
    }
    with nothing_written(no_hub):
        assert mole(capsys, *lines.get(command, ["runs", command, target])) == 2


def test_a_folder_nobody_may_read_is_refused() -> None:
    """As root everything may be read, so another user asks, in a process of its own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "locked" / "model").mkdir(parents=True)
    (folder / "locked").chmod(0)
    code = (
        "import os, sys\n"
        "os.environ['MOLE_HOME'] = sys.argv[1] + '/home'\n"
        "from mole.config import schema\n"
        "from mole.data import examples\n"
        "from mole import runs\n"
        "from mole.models import catalog, sources\n"
        "from pathlib import Path\n"
        "from mole.core.errors import InputError\n"
        "import mole.models.sizes, mole.runs\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "where = sys.argv[1] + '/locked/model'\n"
        "asks = [lambda: runs.locate(where), lambda: sources.resolve(where), lambda: catalog.about(where),\n"
        "        lambda: examples.read_examples(where + '/x.json'), lambda: schema.read_yaml(Path(where))]\n"
        "for ask in asks:\n"
        "    try: ask()\n"
        "    except InputError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT)
    shutil.rmtree(folder)
    assert done.stdout.count("refused:") == 5, done.stdout + done.stderr


def test_pipes_and_devices_are_no_models(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("pipe.gguf", "zero.gguf", "loop"):
        refusal(lambda path=path: resolve(str(tmp_path / path)), MoleError)
        refusal(lambda path=path: runs.locate(str(tmp_path / path)), MoleError)


# What a reply is asked for

STEERING = {"settings": {"top_p": 0.5, "keep_top_k": 1}, "muted": [1], "pinned": [0, 2]}


@attack(120)
@given(st.one_of(mutated(STEERING), junk), st.sampled_from([*ROUTERS, "none"]))
def test_any_steering_is_followed_or_refused(values: Any, router: str) -> None:
    made = answer(lambda: Steering.from_dict(real(values)))
    if isinstance(made, Steering):
        for_the_page(sorted(made.muted))
        if not isinstance(answer(lambda: check_steering(made, router, 4)), InputError) and router in ROUTERS and made:
            assert override_params(ROUTERS[router](), made.settings)
            assert Steering.from_dict(made.to_dict()) == made
        words = answer(lambda: describe_steering(made, RunConfig().to_dict()["adapter"]))
        assert isinstance(words, str)


SETTINGS = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 1}


@attack(120)
@given(mutated(SETTINGS))
def test_any_chat_settings_draw_a_token_or_are_refused(values: Any) -> None:
    import torch

    if not isinstance(values, dict) or not set(values) <= set(SETTINGS):
        return
    made = answer(lambda: ChatSettings(**real(values)))
    if isinstance(made, ChatSettings):
        choose = sampling(made, torch.device("cpu"))
        scores = choose(torch.zeros(1, 0, dtype=torch.long), torch.tensor([[1.0, 9.0, -1e30, 1e30]]))
        assert scores.shape == (1, 4) and not scores.isnan().any()
        for_the_page([made.max_new_tokens, made.seed])


# The endpoints for programs


@attack(100)
@given(name, junk, junk)
def test_the_endpoints_answer_any_arguments_with_one_line(no_hub: Path, given_name: str, value: Any, more: Any) -> None:
    from gradio.exceptions import Error

    asks = [
        lambda: endpoints.api_show_run(real(given_name)), lambda: endpoints.api_show_run(real(value)),
        lambda: endpoints.api_read_events(real(given_name), real(value)), lambda: endpoints.api_stop_run(real(value)),
        lambda: endpoints.api_resume_run(real(value)), lambda: endpoints.api_start_run(real(value)),
        lambda: endpoints.api_start_run({"data": real(value), "model": real(more)}),
        lambda: endpoints.api_chat(real(given_name), "Hi", real(value), steering=real(more)),
    ]  # fmt: skip
    with nothing_written(no_hub):
        for ask in asks:
            with pytest.raises(Error):
                ask()


@attack(60)
@given(st.lists(st.tuples(name, text), max_size=3), name)
def test_a_grid_by_any_name_has_names_that_are_allowed(axes: list[tuple[str, str]], group: str) -> None:
    values = {"training.seed": ["0", "1"], **{str(real(key)): [str(real(entry))] for key, entry in axes}}
    made = answer(lambda: grid.expand({}, values, str(real(group))))
    for config in made if isinstance(made, list) else []:
        check_name(config.name or "")
