"""What a run's background jobs are doing and have found, newest first: its evaluations, or its atlases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def job_list(noun: str, **options: Any) -> gr.HTML:
    """The component for jobs of a kind, `evaluation` or `atlas`.

    Its value is a list of `RecordedJob.status()`, its event `select` carries `{"number"}` to cancel.
    """
    return view(Path(__file__).parent, "jobs", noun=noun, **options)
