"""Tokens and passwords: where they may be, and that they are nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import ROOT, free_port, serve, studio_command

from mole import runs
from mole.config import RunConfig
from mole.core import locks, processes, redaction
from mole.core.errors import DataError, MoleError
from mole.core.text import explain, one_line
from mole.models import loading
from mole.training import worker

from .conftest import PATIENCE, visiting

TOKEN = "hf_" + "Sw0rdfishSw0rdfishSw0rdfish1234567"
OTHER = "hf_" + "AnotherOnesTokenAnotherOnes1234567"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "aws-swordfish", "OPENAI_API_KEY": "sk-swordfish", "WANDB_API_KEY": "wandb-swordfish",
    "GITHUB_TOKEN": "ghp_swordfish", "DATABASE_URL": "postgres://me:swordfish@db/x", "MOLE_AUTH": "me:mole-swordfish",
    "SSH_AUTH_SOCK": "/run/swordfish", "KAGGLE_KEY": "kaggle-swordfish", "GRADIO_ANALYTICS_KEY": "gradio-swordfish",
}  # fmt: skip
NEEDED = {
    "HF_TOKEN": TOKEN, "HF_HOME": "/tmp/hf", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True", "NCCL_DEBUG": "WARN", "HTTPS_PROXY": "http://127.0.0.1:9",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt", "TRANSFORMERS_VERBOSITY": "error",
    "XDG_CACHE_HOME": "/tmp/x",
}  # fmt: skip


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with, as everybody of the same user can read it."""
    block = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", errors="replace")
    return dict(line.split("=", 1) for line in block.split("\0") if "=" in line)


def until(found: Callable[[], Any], seconds: float = 300) -> Any:
    """What is found within some time."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)
    return value


# ---------------------------------------------------------------------------------------------------------
# What children inherit


def test_a_child_gets_what_a_trainer_needs_and_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of ours, with everything of another program's in our own environment."""
    for name, value in {**SECRETS, **NEEDED}.items():
        monkeypatch.setenv(name, value)
    log = home / "log.txt"
    (home / "json.py").write_text("raise SystemExit('a file in the home stood in for a module')", encoding="utf-8")
    processes.detach("platform", log=log)
    seen = redaction.child_environment()
    assert not set(seen) & set(SECRETS) and "swordfish" not in json.dumps(
        {k: v for k, v in seen.items() if k != "HF_TOKEN"}
    )
    assert {name: seen.get(name) for name in NEEDED} == NEEDED
    assert {"PATH", "HOME"} & set(os.environ) <= set(seen)
    assert "stood in" not in until(lambda: log.read_text()), "Python looks for modules where it was installed"


def test_the_worker_s_environment_and_arguments_as_the_system_shows_them(
    home: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """A studio with secrets in its environment starts a run; the run trains, and knows none of them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"a {n}", "completion": f"b {n}"}) for n in range(20)))
    config = {
        "name": "mine", "model": {"name": str(tiny_folder), "device": "cpu"}, "data": {"path": str(rows)},
        "adapter": {"num_experts": 2, "r": 2}, "training": {"max_steps": 2, "per_device_train_batch_size": 2},
    }  # fmt: skip
    port = free_port()
    given = {key: value for key, value in SECRETS.items() if key != "MOLE_AUTH"}
    with serve(studio_command(port), port, home, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1", **given) as studio:
        visitor = visiting(studio)
        answer = visitor.call(visitor.named("start_run"), [config])
        assert answer.get("data", [{}])[0].get("name") == "mine", answer
        run = runs.get("mine")
        pid = until(lambda: run.held and locks.holder(run.lock_path).get("pid"))
        environment, arguments = environment_of(pid), " ".join(psutil.Process(pid).cmdline())
        until(lambda: runs.get("mine").state in ("finished", "failed"))
        assert runs.get("mine").state == "finished", run.log_path.read_text()
    assert not set(environment) & set(SECRETS)
    assert environment["HF_TOKEN"] == TOKEN, "a gated model needs it"
    assert TOKEN not in arguments and "swordfish" not in arguments
    written = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written and b"swordfish" not in written


# ---------------------------------------------------------------------------------------------------------
# What is written and shown


QUOTES = [
    f"401 Client Error for url https://me:{TOKEN}@huggingface.co/x",
    f"Invalid credentials in Authorization header: Bearer {TOKEN}",
    f"{{'authorization': 'Bearer {OTHER}', 'user-agent': 'x'}}",
    f"token={OTHER}&x=1",
    f"'{TOKEN}'",
]


@pytest.mark.parametrize("quote", QUOTES)
def test_an_error_that_quotes_a_token(home: Path, quote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's exception, on each way it can take: one line, the cause of a failure, the log with its traceback."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = runs.create(RunConfig.from_dict({"name": "mine"}))
    with worker.logging_to(run):
        try:
            raise RuntimeError(quote)
        except RuntimeError as error:
            worker.record_failure(run, error)
    texts = [
        one_line(RuntimeError(quote)), " ".join(explain(RuntimeError(quote))),
        " ".join(explain(DataError(quote))), run.events_path.read_text(), run.log_path.read_text(),
        json.dumps(run.details()), loading.reason(ValueError(quote)),
    ]  # fmt: skip
    for text in texts:
        assert TOKEN not in text and OTHER not in text and TOKEN[3:] not in text, text
    assert redaction.HIDDEN in texts[0]
    assert "Traceback" in run.log_path.read_text(), "the rest of the error is there"


def test_a_token_of_another_shape_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-old-token-of-another-shape")
    assert redaction.redacted("at an-old-token-of-another-shape!") == f"at {redaction.HIDDEN}!"
    for text in ("", "hf_hub_download failed", "hf_transfer", "Bearer", "the word hf_token is no token", "a" * 100_000):
        assert redaction.redacted(text) == text
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redaction.redacted("banana") == "banana"


def test_the_command_line_hides_it_too(home: Path) -> None:
    command = [sys.executable, "-m", "mole.cli", "models", "pull", f"me/{TOKEN}"]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and TOKEN not in done.stdout + done.stderr and redaction.HIDDEN in done.stderr


def test_what_the_page_is_told(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    import gradio as gr

    from app.services import endpoints
    from app.ui import wiring

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in wiring.toast_text(QUOTES[0])

    def fails() -> None:
        raise MoleError(QUOTES[1])

    with pytest.raises(gr.Error) as caught:
        endpoints.with_api_errors(fails)
    assert TOKEN not in caught.value.message
