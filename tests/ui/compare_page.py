"""A page with nothing but the comparison of the runs in its address: `python compare_page.py PORT`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.ui import theme
from app.ui.panels import compare

import gradio as gr  # isort: skip


def asked(request: gr.Request) -> list[str]:
    return compare.existing_runs(dict(request.query_params).get("compare", ""))


if __name__ == "__main__":
    with gr.Blocks(analytics_enabled=False) as page:
        with gr.Column(elem_classes="card"):
            made = compare.build_comparison()
        page.load(asked, None, made.names)
    page.launch(server_port=int(sys.argv[1]), ssr_mode=False, quiet=True, theme=theme.theme(), head=theme.head())
