"""`mole …`: the command line. Flags and help of the settings follow from the dataclasses in `mole.config`.

Exit code 0: good; 2: bad input, with one line naming the field or row; 1: failure. No torch until a command needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from mole import __version__
from mole.chat.settings import ChatSettings
from mole.cli.commands import atlas, chat, data, models, runs, studio, train
from mole.cli.console import prepare_streams
from mole.config import ROUTERS, SECTIONS, spec_of
from mole.core.errors import MoleError, MoleNotice
from mole.core.paths import check_home
from mole.core.redaction import redacted
from mole.core.text import full_stop, notices_in_one_line, print_error

TARGET_HELP = "Name of a run, RUN@STEP for one of its checkpoints, an adapter folder, or base:MODEL."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with a hint (exit code 2), and that has `--debug`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="Show tracebacks of errors.")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help).\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mole` with `arguments` (default: `sys.argv[1:]`) and return the exit code."""
    prepare_streams()
    options = build_parser().parse_args(arguments)
    debug = getattr(options, "debug", False)
    try:
        check_home()
        with only_our_warnings(debug):
            options.command(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of a pipe has closed it, as in `mole runs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print_error("mole: aborted.")
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_error(f"mole: {full_stop(error_line(error))}")
        return error.exit_code if isinstance(error, MoleError) else MoleError.exit_code


@contextmanager
def only_our_warnings(debug: bool) -> Iterator[None]:
    """Print notices of this package in one line, and no warnings of libraries unless `--debug` or Python's -W ask."""
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", MoleNotice)
        warnings.showwarning = notices_in_one_line(warnings.showwarning)
        yield


def error_line(error: Exception) -> str:
    """An error as one line for the terminal: the message of a `MoleError`, otherwise with its file or type."""
    text = redacted(" ".join(str(error).split()))
    if isinstance(error, MoleError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (use --debug for the traceback)"


# ---------------------------------------------------------------------------------------------------------
# The parser


def build_parser() -> Parser:
    """The parser of the whole command line; the parsed options hold the command's function as `command`."""
    root = Parser(
        prog="mole", description="Fine-tune with mixtures of LoRA experts, chat with the result, inspect its routing."
    )
    root.add_argument("--version", action="version", version=f"mole {__version__}")
    parts = root.add_subparsers(metavar="COMMAND", required=True)
    add_studio(parts)
    add_train(parts)
    add_preflight(parts)
    add_command(
        parts, "presets", train.list_presets_command, "List the presets: the papers' settings, and those you saved."
    )
    add_chat(parts)
    add_eval(parts)
    add_atlas(parts)
    add_runs(parts)
    add_models(parts)
    add_data(parts)
    return root


def add_command(parts: Any, name: str, function: Callable[[argparse.Namespace], None], help: str) -> Parser:
    """Add a command that calls `function` with the parsed options."""
    command: Parser = parts.add_parser(name, help=help, description=help)
    command.set_defaults(command=function)
    return command


def add_group(parts: Any, name: str, help: str) -> Any:
    """Add a group of commands, e.g. `mole runs`; returns its subparsers."""
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
        help="Require this user name and password. With USER alone, mole asks for the password at the terminal. "
        "$MOLE_AUTH=USER:PASS has the same effect.",
    )
    command.add_argument("--share", action="store_true", help="Also create a public link through Gradio's servers.")
    command.add_argument(
        "--allow-anyone",
        action="store_true",
        help="Serve others without --auth: anyone who reaches the studio may train, read your data files and fill your "
        "disk. Otherwise --share and a --host other than this machine require --auth.",
    )


def add_train(parts: Any) -> None:
    command = add_command(parts, "train", train.train_command, "Train an adapter; needs --data or --config.")
    add_settings(command)
    command.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE,VALUE",
        help="Queue one run for each value, e.g. training.seed=0,1,2; repeat the flag for all combinations.",
    )
    command.add_argument("--detach", action="store_true", help="Train in the background and print the run's name.")


def add_preflight(parts: Any) -> None:
    summary = "Estimate a run's time and memory, and whether it fits; takes the flags of mole train."
    command = add_command(parts, "preflight", train.preflight_command, summary)
    add_settings(command)
    command.add_argument("--measure", action="store_true", help="Also run real steps on the longest rows.")
    command.add_argument("--wait", action="store_true", help="With --measure: wait until the device is free.")
    command.add_argument("--json", metavar="FILE", help="Also write the numbers to a JSON file.")


def add_settings(command: Parser) -> None:
    """Add the flags for the settings of a run."""
    command.add_argument(
        "--preset", metavar="NAME", help="Preset to start from, e.g. mola or cpu; mole presets lists them."
    )
    command.add_argument(
        "--config",
        metavar="run.yaml",
        help="Settings to start from; override the preset's and are overridden by flags.",
    )
    for section, section_class in SECTIONS.items():
        for item in dataclasses.fields(section_class):
            spec = spec_of(item) if "spec" in item.metadata else None
            if spec is not None and spec.flag:
                default = "" if item.default in (dataclasses.MISSING, "") else f" (default {item.default})"
                choices = f" One of: {', '.join(ROUTERS)}." if item.name == "router" else ""
                repeated: dict[str, Any] = {"action": "append"} if item.name == "path" else {}
                command.add_argument(
                    spec.flag,
                    **repeated,
                    dest=f"{section}.{item.name}",
                    metavar=item.name.rpartition("_")[2].upper(),
                    help=f"{spec.help}{choices}{default}".replace("%", "%%"),
                )
    command.add_argument("--name", help="Name of the run (default: generated from router and model).")
    command.add_argument("--group", metavar="NAME", help="Group of runs to compare it with.")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="SECTION.FIELD=VALUE",
        help="Any setting of run.yaml, e.g. training.save_steps=50 or adapter.top_p=0.9; overrides the flags.",
    )


def add_chat(parts: Any) -> None:
    command = add_command(parts, "chat", chat.chat_command, "Chat with a trained adapter or a base model.")
    command.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    add_base(command)
    add_device(command)
    command.add_argument("--prompt", help="Reply to this prompt and exit; without it, the chat is interactive.")
    command.add_argument("--system", help="System prompt.")
    add_chat_settings(command)
    command.add_argument(
        "--trace", metavar="FILE.json", help="Write the routing of every token to a file; needs --prompt."
    )
    command.add_argument(
        "--replay", metavar="FILE.html", help="Write the conversation with its routing view to a page of its own."
    )


def add_base(command: Parser) -> None:
    """Add the flag for a base model that has moved."""
    command.add_argument("--base", metavar="MODEL", help="Where the adapter's base model is, if it has moved.")


def add_device(command: Parser) -> None:
    """Add the flag that says where a target is used."""
    command.add_argument(
        "--device", help="Where to compute: auto, cpu, mps, cuda or cuda:N; by default where it trained."
    )


def add_chat_settings(command: Parser) -> None:
    """Add a flag for each of the `ChatSettings`."""
    for item in dataclasses.fields(ChatSettings):
        spec, flag = spec_of(item), f"--{item.name.replace('_', '-')}"
        if isinstance(item.default, bool):
            command.add_argument(flag, action="store_true", help=spec.help)
        elif item.default is dataclasses.MISSING:  # a list
            flag = flag.removesuffix("s")
            command.add_argument(
                flag, action="append", default=[], dest=item.name, metavar="TEXT", help=f"{spec.help} Repeatable."
            )
        else:
            command.add_argument(
                flag,
                type=in_range(type(item.default), spec.ge or 0, math.inf if spec.le is None else spec.le),
                default=item.default,
                metavar="N" if isinstance(item.default, int) else "X",
                help=f"{spec.help} Default %(default)s.",
            )


def add_eval(parts: Any) -> None:
    command = add_command(parts, "eval", chat.evaluate_command, "Evaluate accuracy or exact match, and perplexity.")
    command.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    add_base(command)
    add_device(command)
    command.add_argument("--data", required=True, metavar="FILE", help="Evaluation rows: a data file or a hub id.")
    command.add_argument("--limit", type=in_range(int, 1), metavar="N", help="Use only the first N rows.")
    command.add_argument("--json", metavar="FILE", help="Also write the result to a JSON file.")


def add_atlas(parts: Any) -> None:
    summary = "Show what the experts do over a data file: which tokens, positions and columns each of them is for."
    command = add_command(parts, "atlas", atlas.atlas_command, summary)
    command.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    add_base(command)
    add_device(command)
    command.add_argument("--data", required=True, metavar="FILE", help="The rows: a data file or a hub id.")
    command.add_argument(
        "--by", default="", metavar="COLUMNS", help="Columns of the data to look at, such as skill,language."
    )
    command.add_argument("--limit", type=in_range(int, 1), metavar="N", help="Use only the first N rows.")
    command.add_argument("--seed", type=in_range(int, 0), default=0, metavar="N", help="Seed (default %(default)s).")
    command.add_argument(
        "--quick", action="store_true", help="Leave out saturation and muting, which read some rows many times."
    )
    command.add_argument("--versus", metavar="TARGET", help="Another target, side by side on the same rows.")
    command.add_argument("--json", metavar="FILE", help="Also write the atlas to a JSON file.")
    command.add_argument("--html", metavar="FILE", help="Also write it as one HTML file that opens without a server.")


def add_runs(parts: Any) -> None:
    parts = add_group(parts, "runs", "List, show, queue, stop, resume, continue, delete, export and import runs.")
    command = add_command(parts, "list", runs.list_runs_command, "List all runs.")
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command = add_run(parts, "show", runs.show_run_command, "Show a run's state, metrics and settings.")
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command = add_command(
        parts, "compare", runs.compare_runs_command, "Compare runs: results, and mean ± sd over seeds."
    )
    command.add_argument("runs", metavar="RUN", nargs="+", help="Two or more runs, or a group of runs.")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="Print the numbers as JSON.")
    form.add_argument("--markdown", action="store_true", help="Print Markdown tables.")
    add_command(parts, "queue", runs.queue_runs_command, "List the waiting runs, in the order in which they start.")
    command = add_run(
        parts, "move", runs.move_run_command, "Move a waiting run to another position in its device's queue."
    )
    command.add_argument("place", metavar="PLACE", type=in_range(int, 1), help="New position; 1 starts next.")
    add_run(parts, "stop", runs.stop_run_command, "Save a checkpoint and stop; a waiting run leaves the queue.")
    command = add_run(parts, "resume", runs.resume_run_command, "Continue a stopped, interrupted or failed run.")
    add_base(command)
    command.add_argument("--detach", action="store_true", help="Continue in the background and print the run's name.")
    add_continue(parts)
    command = add_run(parts, "delete", runs.delete_run_command, "Delete a run's folder.")
    command.add_argument("--yes", action="store_true", help="Do not ask for confirmation.")
    summary = "Copy a finished run, without its checkpoints, to a folder or .zip file."
    command = add_run(parts, "export", runs.export_run_command, summary)
    command.add_argument("dest", metavar="DEST", help="A new folder, or a new .zip file.")
    command = add_command(parts, "import", runs.import_run_command, "Take an exported run back, here or elsewhere.")
    command.add_argument("source", metavar="FOLDER", help="The folder or .zip file that `mole runs export` wrote.")
    command.add_argument("--name", help="The run's name here (default: its own).")


def add_continue(parts: Any) -> None:
    summary = "Train a finished run for longer, as a new run that begins where it ended."
    command = add_run(parts, "continue", runs.continue_run_command, summary)
    command.add_argument("--steps", type=in_range(int, 1), required=True, metavar="N", help="Further steps to train.")
    command.add_argument(
        "--schedule",
        choices=("restart", "extend"),
        default="restart",
        help="restart: warm-up and schedule of the learning rate begin again, over the further steps; extend: the "
        "learning rate goes on as if the run had been planned that long. Default %(default)s.",
    )
    add_base(command)
    command.add_argument("--name", help="Name of the new run (default: the finished run's name with a number).")
    command.add_argument("--detach", action="store_true", help="Train in the background and print the run's name.")


def add_run(parts: Any, name: str, function: Callable[[argparse.Namespace], None], help: str) -> Parser:
    """Add a command whose first argument is the name of a run."""
    command = add_command(parts, name, function, help)
    command.add_argument("run", metavar="RUN", help="Name of the run.")
    return command


def add_models(parts: Any) -> None:
    parts = add_group(parts, "models", "List or download base models.")
    command = add_command(parts, "list", models.list_models_command, "List the base models that need no download.")
    command.add_argument("--json", action="store_true", help="Print JSON.")
    command = add_command(
        parts, "pull", models.pull_model_command, "Download a base model, and convert it if it is a GGUF file."
    )
    command.add_argument("name", metavar="NAME", help="smollm2-135m, a hub id, or a .gguf file.")


def add_data(parts: Any) -> None:
    parts = add_group(parts, "data", "Check data files.")
    command = add_command(
        parts, "check", data.check_data_command, "Read data files as training does, and report rejected rows."
    )
    command.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="JSON, JSONL, CSV, Parquet or text file, or a hub id, or '{path: FILE, columns: {…}, …}' as in data.path.",
    )
    command.add_argument("--name", metavar="NAME", help="Configuration of a hub data set.")
    command.add_argument("--split", metavar="NAME", help="Split of a hub data set (default train).")
    command.add_argument("--model", help="Also count tokens with this base model's tokenizer and chat template.")
    command.add_argument("--columns", metavar="YAML", help="Column names where they differ, e.g. '{prompt: question}'.")
    command.add_argument(
        "--show",
        type=in_range(int, 0),
        default=0,
        metavar="N",
        help="Show the first N rows, and what of them is learnt.",
    )
    command.add_argument("--json", action="store_true", help="Print JSON.")


def in_range(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a whole number (`int`) or a number (`float`) from `low` to `high`, both included."""

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
