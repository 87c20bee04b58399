"""What the studio needs before Gradio is imported: a folder for temporary files, and a port. No torch or gradio."""

from __future__ import annotations

import errno
import os
import socket

from mole.core.errors import InputError, writing
from mole.core.paths import home, make_folder

TEMPORARY_VARIABLE = "GRADIO_TEMP_DIR"


@writing()
def make_temporary_folder() -> None:
    """Give Gradio a folder of this user's own for uploads and downloads, unless `$GRADIO_TEMP_DIR` names one.

    Gradio's default is one folder for the whole machine, which belongs to the user who was first. The user's number is
    in the name because a group may share a home. Raises `StorageError`.
    """
    if os.environ.get(TEMPORARY_VARIABLE):
        return
    folder = home() / "tmp" / f"gradio-{os.getuid()}"
    make_folder(folder.parent)
    folder.mkdir(0o700, exist_ok=True)
    os.environ[TEMPORARY_VARIABLE] = str(folder)


def check_port(host: str, port: int) -> None:
    """Raise `InputError` (field `port` or `host`) unless the studio can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one in TIME_WAIT is free, as for the server
            tried.bind(address)
            tried.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"Port {port} of {host} is in use, maybe by another studio; choose one with --port."
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"Port {port} is not for this user; choose one from 1024 on with --port."
        else:
            text = (error.strerror or str(error)).lower()
            raise InputError(
                f"The studio cannot listen on {host}: {text}; choose an address of this machine with --host.",
                field="host",
            ) from None
        raise InputError(reason, field="port") from None
    except (UnicodeError, ValueError):
        raise InputError(f"--host {host!r} is not a host name or an address.", field="host") from None
