"""Serves the studio's page: `mole studio`, `python app/main.py`, or a Hugging Face Space."""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # before Gradio is imported: the command does what comes first, and tells errors in a line
    sys.argv[1:1] = ["studio", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
    runpy.run_module("mole.cli", run_name="__main__")

from app import settings
from app.guard import AccessRules, Guard, Login, hostname
from app.page import build_page
from app.services import gpu_replies, visitors
from app.services.chat_targets import DEFAULT_TARGET
from app.ui import theme
from mole import runs
from mole.cli.auth import is_loopback
from mole.core import limits
from mole.core.errors import StorageError
from mole.core.gpus import on_zerogpu
from mole.core.paths import HOME_GONE, home, is_home_gone, make_folder
from mole.runs.job import STARTING_SECONDS

from starlette.middleware import Middleware  # isort: skip  after `app`, which speeds up its import

HOME_SECONDS = 0.5
"""Between two looks at whether the home is still there."""


def launch(host: str = "127.0.0.1", port: int = 7860, auth: tuple[str, str] | None = None, share: bool = False) -> None:
    """Serve the studio until it is interrupted; on a Space it listens on all addresses."""
    on_space = bool(settings.space_id())
    host = "0.0.0.0" if on_space else host
    rules = AccessRules(local=is_loopback(host), names=settings.names(), anywhere=on_space)
    make_folder(home())
    if on_zerogpu():
        demo = settings.demo()
        gpu_replies.load_models([*([str(demo)] if demo else []), DEFAULT_TARGET])
    page = build_page()
    # Handlers can be called through the queue only, where requests are counted.
    page.queue(max_size=limits.LINE, default_concurrency_limit=4, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        auth=Login(*auth).check if auth else None,  # type: ignore[arg-type]  # Gradio awaits it, which the annotation does not say
        share=share,
        theme=theme.theme(),
        head=theme.head(),
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=["api", "settings"],
        max_file_size=limits.UPLOAD_BYTES,
        state_session_capacity=limits.SESSIONS,
        app_kwargs={"middleware": [Middleware(Guard, rules=rules)]},
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
        # Else Gradio asks for its own page, and exits if the answer takes longer than 3 s, as beside a training.
        _frontend=False,
    )
    if page.share_url:
        rules.names.add(hostname(page.share_url))
    with suppress(OSError):  # the terminal may be gone
        print(f"{settings.TITLE} is ready: http://{host}:{port}", flush=True)
    runs.wake_queued()
    later = threading.Timer(STARTING_SECONDS + 1, runs.wake_queued)  # those that were too fresh to judge
    later.daemon = True
    later.start()
    visitors.start_sweeping()
    threading.Thread(target=end_without_home, args=(page,), daemon=True).start()
    page.block_thread()
    if is_home_gone():
        page.close(verbose=False)
        raise StorageError(HOME_GONE.format(home=home()))


def end_without_home(page: Any) -> None:
    """Let the studio end when its home was moved, renamed or deleted: it would be created again at the old place."""
    while not is_home_gone():
        time.sleep(HOME_SECONDS)
    page.is_running = False
