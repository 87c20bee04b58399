"""The command line, `mole …`: `main` runs it, `build_parser` describes it. Flags and help follow from `mole.config`."""

from mole.cli.parser import build_parser, main

__all__ = ["build_parser", "main"]
