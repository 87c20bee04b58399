"""`mole studio`: serve the page."""

from __future__ import annotations

import argparse

from mole.cli import auth, serving


def studio_command(options: argparse.Namespace) -> None:
    """Serve the studio until interrupted."""
    credentials = auth.read_credentials(options.auth)
    auth.check_access(options.host, credentials is not None, options.share, options.allow_anyone)
    serving.check_port(options.host, options.port)
    serving.make_temporary_folder()  # before Gradio is imported
    from app.main import launch

    launch(host=options.host, port=options.port, auth=credentials, share=options.share)
