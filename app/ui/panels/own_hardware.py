"""The run in the form as commands: on a Space, those for the visitor's own machine and for a job on the Hub."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app import settings
from app.ui.forms import RunForm, command_line
from mole.config import RunConfig
from mole.core.paths import local_path

FLAVOR = "l4x1"
"""The cheapest GPU of Hugging Face Jobs that computes in bfloat16."""
JOB_FOLDER = "mole-job"
"""On the visitor's machine: what goes to the job and what comes back."""
JOB_NAME = "my-run"
"""The run's name where the form has none: the job's last command needs one."""
HASH = re.compile(r"-[0-9a-f]{8,32}(?=\.)")
"""What `settings.keep_upload` adds to a file's name."""
NOTE = (
    "The first runs on your machine (git, Python 3.10 or later), the second as a job of your Hugging Face account, "
    "which costs a fraction of a dollar per hour (`pip install huggingface_hub`, `hf auth login`; other hardware: "
    "`hf jobs hardware`; a model that asks for access: `--secrets HF_TOKEN`). When the job is over, fetch its adapter "
    "with the `hf buckets sync` command it printed."
)


def build_commands(form: RunForm) -> list[Any]:
    """Create the accordion with the commands in the current layout block; returns the outputs of `command_texts`."""
    texts = command_texts(form.config([made.value for made in form.inputs]))

    def box(value: str, elem_id: str, **label: Any) -> gr.Textbox:
        options: dict[str, Any] = {
            "max_lines": 20,
            "interactive": False,
            "buttons": ["copy"],
            "elem_classes": "command",
        }
        return gr.Textbox(value=value, elem_id=elem_id, **options, **label)

    if not settings.space_id():
        with gr.Accordion("As a command", open=False, elem_classes="accordion-card"):
            return [box(texts[0], "command", show_label=False)]
    with gr.Accordion("Train this on your own hardware", open=False, elem_classes="accordion-card", elem_id="own"):
        local = box(texts[0], "command", label="On your machine")
        job = box(texts[1], "job-command", label="As a job on Hugging Face")
        note = gr.Markdown(texts[2], elem_classes="quiet", elem_id="own-note")
    return [local, job, note]


def command_texts(config: RunConfig) -> list[str]:
    """The commands that start the same run; on a Space the local one, the job's, and what to know about them."""
    space = settings.space_id()
    return [local_command(config, space), job_command(config, space), command_note(config)] if space else [
        command_line(config)
    ]  # fmt: skip


def local_command(config: RunConfig, space: str) -> str:
    """Install the Space's repository from a clone, and train there; an upload is expected in the clone's folder."""
    folder = space.rpartition("/")[2]
    steps = [f"git clone https://huggingface.co/spaces/{space}", f"cd {shlex.quote(folder)}", "pip install ."]
    return "\n".join([*steps, command_line(moved(config, "assets", "."))])


def job_command(config: RunConfig, space: str) -> str:
    """Train as a job that sees the Space's repository in /space, and the visitor's `JOB_FOLDER` in /job."""
    config = dataclasses.replace(moved(config, "/space/assets", "/job"), name=config.name or JOB_NAME)
    name = shlex.quote(str(config.name))
    zipped = shlex.quote(f"/tmp/{config.name}.zip")
    inside = f"{command_line(config)} &&\nmole runs export {name} {zipped} && cp {zipped} /job/"
    return " \\\n  ".join(
        [
            f"mkdir -p {JOB_FOLDER} && hf jobs uv run --flavor {FLAVOR} --timeout 2h",
            f"--with 'mole-studio @ git+https://huggingface.co/spaces/{space}'",
            f"-v hf://spaces/{space}:/space -v ./{JOB_FOLDER}:/job:rw",
            f"bash -c {shlex.quote(inside)}",
        ]
    )


def command_note(config: RunConfig) -> str:
    """What to know about the commands: what they need, and where the uploaded files go."""
    uploads: list[str] = []

    def note(path: str) -> str:
        if is_upload(path):
            uploads.append(plain_name(path))
        return path

    with_paths(config, note)
    if not uploads:
        return NOTE
    files = ", ".join(f"`{name}`" for name in dict.fromkeys(uploads))
    return f"{NOTE} **Your uploads are not in these commands:** copy {files} into the clone, or into `{JOB_FOLDER}`."


def moved(config: RunConfig, assets: str, uploads: str) -> RunConfig:
    """The config with the paths of the samples and of the uploads as they are elsewhere."""

    def elsewhere(path: str) -> str:
        if is_upload(path):
            return plain_name(path) if uploads == "." else f"{uploads}/{plain_name(path)}"
        data = settings.asset("data")
        found = local_path(path).absolute()
        if data is not None and found.is_relative_to(data):
            return f"{assets}/data/{found.relative_to(data)}"
        return path

    return with_paths(config, elsewhere)


def with_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """The config with every path of data changed."""

    def entry(source: Any) -> Any:
        return {**source, "path": change(source["path"])} if isinstance(source, dict) else change(source)

    data = config.data
    path = [entry(source) for source in data.path] if isinstance(data.path, list) else data.path and change(data.path)
    held_out = data.eval_path and change(data.eval_path)
    return dataclasses.replace(config, data=dataclasses.replace(data, path=path, eval_path=held_out))


def is_upload(path: str) -> bool:
    """Whether a path is that of a kept upload."""
    return bool(path) and local_path(path).parent == settings.uploads_folder()


def plain_name(path: str) -> str:
    """The name of a kept upload as it was uploaded."""
    return HASH.sub("", Path(path).name, count=1)
