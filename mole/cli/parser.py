"""`mole …`: the command line. Flags and help of the settings follow from the dataclasses in `mole.config`.

Exit code 0: good; 2: bad input, with one line naming the field or row; 1: failure. No torch until a command needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mole import __version__
from mole.cli.commands import chat, data, models, runs, studio, train
from mole.config import ROUTERS, SECTIONS, spec_of
from mole.core.errors import MoleError
from mole.core.redaction import redacted

TARGET_HELP = "a run's name, RUN@STEP for a checkpoint of it, an adapter folder, or base:MODEL"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with a hint, exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="Show tracebacks of errors.")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mole` with these arguments (those of the process by default) and return the exit code."""
    options = build_parser().parse_args(arguments)
    debug = getattr(options, "debug", False)
    try:
        options.command(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `mole runs list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("mole: aborted.", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"mole: {error_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, MoleError) else MoleError.exit_code


def error_line(error: Exception) -> str:
    """An error for the terminal: ours as they are, the system's with their file, others with their type."""
    text = redacted(" ".join(str(error).split()))
    if isinstance(error, MoleError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (--debug shows where)"


# ---------------------------------------------------------------------------------------------------------
# The parser


def build_parser() -> Parser:
    """The parser of the whole command line; each command's function is in `command`."""
    root = Parser(prog="mole", description="Train mixtures of LoRA experts, chat with them, see their routing.")
    root.add_argument("--version", action="version", version=f"mole {__version__}")
    parts = root.add_subparsers(metavar="COMMAND", required=True)
    add_studio(parts)
    add_train(parts)
    add_preflight(parts)
    add_command(
        parts, "presets", train.list_presets_command, "List the set-ups to begin with: the papers', and your own."
    )
    add_chat(parts)
    add_eval(parts)
    add_runs(parts)
    add_models(parts)
    add_data(parts)
    return root


def add_command(parts: Any, name: str, function: Callable[[argparse.Namespace], None], help: str) -> Parser:
    """Add a command."""
    command: Parser = parts.add_parser(name, help=help, description=help)
    command.set_defaults(command=function)
    return command


def add_group(parts: Any, name: str, help: str) -> Any:
    """Add a group of commands."""
    return parts.add_parser(name, help=help, description=help).add_subparsers(metavar="COMMAND", required=True)


def add_studio(parts: Any) -> None:
    command = add_command(parts, "studio", studio.studio_command, "Serve the studio in the browser.")
    command.add_argument(
        "--host", default="127.0.0.1", help="Address to listen on (default %(default)s: this machine)."
    )
    command.add_argument("--port", type=in_range(int, 1, 65535), default=7860, help="Port (default %(default)s).")
    command.add_argument(
        "--auth",
        metavar="USER:PASS",
        help="Ask for this name and password. USER alone asks you for the password now; $MOLE_AUTH=USER:PASS does the "
        "same as the flag.",
    )
    command.add_argument("--share", action="store_true", help="Also make a public link through Gradio's servers.")
    command.add_argument(
        "--allow-anyone",
        action="store_true",
        help="Serve others without --auth: whoever reaches the studio may train, read your data files and fill your "
        "disk. Without it, --host of another address and --share need --auth.",
    )


def add_train(parts: Any) -> None:
    command = add_command(parts, "train", train.train_command, "Train an adapter: --data, or --config, is needed.")
    add_settings(command)
    command.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE,VALUE",
        help="Queue a run for every value, e.g. training.seed=0,1,2; given again, for every combination.",
    )
    command.add_argument("--detach", action="store_true", help="Train in the background; prints the run's name.")


def add_preflight(parts: Any) -> None:
    summary = "Tell what a run would take, and whether it fits, before it starts; takes the flags of mole train."
    command = add_command(parts, "preflight", train.preflight_command, summary)
    add_settings(command)
    command.add_argument("--measure", action="store_true", help="Also take real steps on the longest rows.")
    command.add_argument("--wait", action="store_true", help="With --measure: wait while a run has the device.")
    command.add_argument("--json", metavar="FILE", help="Write the numbers to a file too.")


def add_settings(command: Parser) -> None:
    """Add the flags that say what a run is."""
    command.add_argument(
        "--preset", metavar="NAME", help="A set-up to begin with, e.g. mola or cpu; mole presets lists them."
    )
    command.add_argument(
        "--config", metavar="run.yaml", help="Settings to begin with (over the preset); the flags go over them."
    )
    for section, section_class in SECTIONS.items():
        for item in dataclasses.fields(section_class):
            spec = spec_of(item) if "spec" in item.metadata else None
            if spec is not None and spec.flag:
                default = "" if item.default in (dataclasses.MISSING, "") else f" (default {item.default})"
                choices = f" One of: {', '.join(ROUTERS)}." if item.name == "router" else ""
                command.add_argument(
                    spec.flag,
                    dest=f"{section}.{item.name}",
                    metavar=item.name.rpartition("_")[2].upper(),
                    help=f"{spec.help}{choices}{default}".replace("%", "%%"),
                )
    command.add_argument("--name", help="Name of the run (default: made of router and model).")
    command.add_argument("--group", metavar="NAME", help="Group of runs it belongs to, to be compared.")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="SECTION.FIELD=VALUE",
        help="Any other setting of run.yaml, e.g. training.save_steps=50 or adapter.top_p=0.9; goes over the flags.",
    )


def add_chat(parts: Any) -> None:
    command = add_command(parts, "chat", chat.chat_command, "Chat with a trained adapter or a base model.")
    command.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    command.add_argument("--prompt", help="Answer this and end; without it the chat is interactive.")
    command.add_argument("--system", help="System prompt.")
    command.add_argument(
        "--max-new-tokens",
        type=in_range(int, 1),
        default=256,
        metavar="N",
        help="Longest reply (default %(default)s).",
    )
    command.add_argument(
        "--temperature",
        type=in_range(float, 0),
        default=0.0,
        metavar="T",
        help="0 is greedy (default %(default)s).",
    )
    command.add_argument(
        "--top-p",
        type=in_range(float, 0, 1),
        default=1.0,
        metavar="P",
        help="Nucleus sampling (default %(default)s).",
    )
    command.add_argument("--seed", type=in_range(int, 0), default=0, metavar="N", help="Seed of the sampling.")
    command.add_argument("--trace", metavar="FILE.json", help="Write the routing of every token (with --prompt).")


def add_eval(parts: Any) -> None:
    command = add_command(parts, "eval", chat.evaluate_command, "Measure accuracy or exact match, and perplexity.")
    command.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    command.add_argument("--data", required=True, metavar="FILE", help="Rows to evaluate on: a file or a hub id.")
    command.add_argument("--limit", type=in_range(int, 1), metavar="N", help="Only the first N rows.")
    command.add_argument("--json", metavar="FILE", help="Write the result to a file too.")


def add_runs(parts: Any) -> None:
    parts = add_group(parts, "runs", "List, show, queue, stop, resume, delete and export runs.")
    command = add_command(parts, "list", runs.list_runs_command, "List all runs.")
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command = add_run(parts, "show", runs.show_run_command, "Show a run's state, metrics and settings.")
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command = add_command(parts, "compare", runs.compare_runs_command, "Compare runs: results, mean ± sd over seeds.")
    command.add_argument("runs", metavar="RUN", nargs="+", help="Two or more runs, or a group of them.")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="Print the numbers as JSON.")
    form.add_argument("--markdown", action="store_true", help="Print Markdown, for a paper.")
    add_command(
        parts, "queue", runs.queue_runs_command, "List the runs that wait for their device, the next one first."
    )
    command = add_run(
        parts, "move", runs.move_run_command, "Give a waiting run another place in the line for its device."
    )
    command.add_argument("place", metavar="PLACE", type=in_range(int, 1), help="1 is the next to run.")
    add_run(parts, "stop", runs.stop_run_command, "Save a checkpoint and stop; a queued run leaves the line.")
    command = add_run(parts, "resume", runs.resume_run_command, "Continue a stopped, interrupted or failed run.")
    command.add_argument("--detach", action="store_true", help="In the background.")
    command = add_run(parts, "delete", runs.delete_run_command, "Delete a run's folder.")
    command.add_argument("--yes", action="store_true", help="Do not ask.")
    command = add_run(parts, "export", runs.export_run_command, "Copy the adapter, run.yaml and events somewhere.")
    command.add_argument("dest", metavar="DEST", help="A new folder, or a new .zip file.")


def add_run(parts: Any, name: str, function: Callable[[argparse.Namespace], None], help: str) -> Parser:
    """Add a command whose first argument is a run."""
    command = add_command(parts, name, function, help)
    command.add_argument("run", metavar="RUN", help="The run's name.")
    return command


def add_models(parts: Any) -> None:
    parts = add_group(parts, "models", "List base models, or fetch one.")
    command = add_command(parts, "list", models.list_models_command, "List the base models that are here.")
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command = add_command(parts, "pull", models.pull_model_command, "Fetch a base model and make it ready.")
    command.add_argument("name", metavar="NAME", help="smollm2-135m, a hub id, or a .gguf file.")


def add_data(parts: Any) -> None:
    parts = add_group(parts, "data", "Check data.")
    command = add_command(
        parts, "check", data.check_data_command, "Read a data file as training would, and tell what is wrong."
    )
    command.add_argument("file", metavar="FILE", help="JSON, JSONL, CSV or Parquet file, or a hub id.")
    command.add_argument("--model", help="Also count tokens with this base model's tokenizer and template.")
    command.add_argument("--json", action="store_true", help="Print JSON.")


def in_range(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a whole number (`int`) or number (`float`) in a range."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if low <= value <= high:
            return value
        word = "a whole number" if kind is int else "a number"
        limit = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {word} {limit}")

    return parse
