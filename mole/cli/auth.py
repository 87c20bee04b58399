"""Access to the studio: its user name and password, and the check that it is not open to others. No torch or gradio."""

from __future__ import annotations

import getpass
import ipaddress
import os
import sys

from mole.core.errors import InputError

AUTH_VARIABLE = "MOLE_AUTH"


def read_credentials(given: str | None) -> tuple[str, str] | None:
    """User name and password from `--auth`, or from `$MOLE_AUTH`; None when neither is given.

    Removes `$MOLE_AUTH` from the environment, so that child processes do not inherit it. `--auth USER` asks for the
    password at the terminal. Raises `InputError` when name or password is empty.
    """
    kept = os.environ.pop(AUTH_VARIABLE, None)
    if given is None and not kept:
        return None
    name = f"${AUTH_VARIABLE}" if given is None else "--auth"
    user, separator, password = (kept or "" if given is None else given).partition(":")
    if given is not None and user and not separator:
        password, separator = ask_password(user), ":"
    if not (user and separator and password):
        raise InputError(f"{name} must be USER:PASS, neither of them empty.", field="auth")
    hide_password(given)
    return user, password


def ask_password(user: str) -> str:
    """Ask for the password at the terminal, without echo. Raises `InputError` when there is no terminal."""
    if not sys.stdin.isatty():
        raise InputError(
            f"--auth {user} asks for a password, but there is no terminal; set ${AUTH_VARIABLE}=USER:PASS instead.",
            field="auth",
        )
    return getpass.getpass(f"Password of {user}: ")


def hide_password(given: str | None) -> None:
    """Remove the password from the process's arguments, which all users of the machine can list.

    Restarts the process (exec) without `--auth`, passing the password in `$MOLE_AUTH`: only the same user can read the
    environment, and `read_credentials` removes it there. Returns when there is no password in the arguments.
    """
    arguments = sys.orig_argv
    if given is None or ":" not in given:
        return
    places = [place for place, value in enumerate(arguments) if value in (given, f"--auth={given}")]
    if places:
        kept = [value for place, value in enumerate(arguments) if place not in places and value != "--auth"]
        os.execve(sys.executable, kept, {**os.environ, AUTH_VARIABLE: given})


def check_access(host: str, auth: bool, share: bool, allow_anyone: bool) -> None:
    """Raise `InputError` for a studio that others can reach without a password, unless `allow_anyone` permits it."""
    if auth or allow_anyone or (is_loopback(host) and not share):
        return
    how = "--share" if share else f"--host {host}"
    raise InputError(
        f"{how} without --auth would let anyone who can reach the studio use this machine. Set a password with "
        "--auth USER (or $MOLE_AUTH), or pass --allow-anyone to permit it.",
        field="auth",
    )


def is_loopback(host: str) -> bool:
    """Whether an address or host name is reachable from this machine only."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
