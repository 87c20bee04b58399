"""Who may reach the studio: where it listens, and the name and password it asks for. No torch, no gradio."""

from __future__ import annotations

import getpass
import ipaddress
import os
import sys

from mole.core.errors import InputError

AUTH_VARIABLE = "MOLE_AUTH"


def read_credentials(given: str | None) -> tuple[str, str] | None:
    """Name and password of `--auth`, or of `$MOLE_AUTH`, which nothing that is started later sees any more.

    `USER` alone asks for the password at the terminal. Raises `InputError`.
    """
    kept = os.environ.pop(AUTH_VARIABLE, None)
    if given is None and not kept:
        return None
    name = f"${AUTH_VARIABLE}" if given is None else "--auth"
    user, separator, password = (kept or "" if given is None else given).partition(":")
    if given is not None and user and not separator:
        password, separator = ask_password(user), ":"
    if not (user and separator and password):
        raise InputError(f"{name} must be USER:PASS, both not empty.", field="auth")
    hide_password(given)
    return user, password


def ask_password(user: str) -> str:
    """The password, typed unseen. Raises `InputError` where nobody can type."""
    if not sys.stdin.isatty():
        raise InputError(
            f"--auth {user} asks for a password, and there is no terminal; give USER:PASS in ${AUTH_VARIABLE}.",
            field="auth",
        )
    return getpass.getpass(f"Password of {user}: ")


def hide_password(given: str | None) -> None:
    """Take the password out of the list of processes, which everybody on the machine can read.

    The same process begins anew, without it in its arguments; it goes on in the environment, which only the same user
    can read, and only until it is read from there.
    """
    arguments = sys.orig_argv
    if given is None or ":" not in given:
        return
    places = [place for place, value in enumerate(arguments) if value in (given, f"--auth={given}")]
    if places:
        kept = [value for place, value in enumerate(arguments) if place not in places and value != "--auth"]
        os.execve(sys.executable, kept, {**os.environ, AUTH_VARIABLE: given})


def check_access(host: str, auth: bool, share: bool, allow_anyone: bool) -> None:
    """See that a studio others can reach asks who they are, or was meant to be open. Raises `InputError`."""
    if auth or allow_anyone or (is_loopback(host) and not share):
        return
    how = "--share" if share else f"--host {host}"
    raise InputError(
        f"{how} without --auth would let anybody who can reach this studio use this machine: give --auth USER "
        "(or $MOLE_AUTH), or --allow-anyone if that is what you want.",
        field="auth",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address, or a name of it."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
