"""The command line, `mole …`: flags and help made from the settings' dataclasses, one function a command."""

from mole.cli.parser import build_parser, main

__all__ = ["build_parser", "main"]
