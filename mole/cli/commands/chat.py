"""`mole chat` and `mole eval`: generate with a target, and evaluate it on a file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from mole import runs
from mole.chat.settings import ChatSettings
from mole.cli.console import check_writable, metric_text, save_text, write_json
from mole.config import ModelConfig
from mole.core.devices import physical_device, restrict_to
from mole.core.errors import InputError
from mole.core.text import print_error
from mole.core.thoughts import split_thought
from mole.runs.job import device_turn
from mole.runs.targets import device_of_target

if TYPE_CHECKING:
    from app.replay import ReplayRecorder
    from mole.models.loading import Loaded


def chat_command(options: argparse.Namespace) -> None:
    """Answer one prompt, or chat interactively without `--prompt`."""
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("--prompt is empty; pass some text.", field="prompt")
    if options.trace and options.prompt is None:
        raise InputError("--trace needs --prompt: it writes the routing of one reply.", field="trace")
    check_writable(options.trace, "--trace")
    check_writable(options.replay, "--replay")
    settings = ChatSettings(**{item.name: getattr(options, item.name) for item in dataclasses.fields(ChatSettings)})
    loaded = load_with_notice(options, chat_device(options))
    from mole.data.chat_templates import ChatTemplate
    from mole.mixture.aot_compile import prepare_kernels

    messages = [{"role": "system", "content": options.system}] if options.system else []
    if messages and not ChatTemplate(loaded.tokenizer).takes_system:
        print("Note: The chat template takes no system message; it begins the first question.", file=sys.stderr)
    replay = start_replay(options, loaded)
    if options.prompt is not None:
        messages.append({"role": "user", "content": options.prompt})
        print_reply(loaded, messages, settings, trace_file=options.trace, replay=replay)
        save_replay(options, replay)
        return
    print(f"Chat with {options.target}; Ctrl-D exits, Ctrl-C stops a reply.", file=sys.stderr)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question.strip():
            messages.append({"role": "user", "content": question})
            reply = print_reply(loaded, messages, settings, replay=replay)
            save_replay(options, replay)
            messages.append({"role": "assistant", "content": split_thought(reply)[1] or ""})
            prepare_kernels(loaded.model)


def start_replay(options: argparse.Namespace, loaded: Loaded) -> ReplayRecorder | None:
    """What records the conversation for `--replay`; None without it."""
    if not options.replay:
        return None
    # The page shows the studio's own view: besides `mole studio`, the one thing here that the studio is needed for.
    from app.replay import ReplayRecorder

    return ReplayRecorder(options.target, loaded, options.system or "")


def save_replay(options: argparse.Namespace, replay: ReplayRecorder | None) -> None:
    """Write the conversation so far."""
    if replay is not None:
        save_text(options.replay, replay.page())


def print_reply(
    loaded: Loaded,
    messages: list[dict[str, str]],
    settings: Any,
    *,
    trace_file: str | None = None,
    replay: ReplayRecorder | None = None,
) -> str:
    """Stream a reply to the terminal, write its routing to `trace_file` and add it to `replay`, and return it."""
    from mole.chat.generate import stream

    text, tokens = "", list[str]()
    if replay is not None:
        replay.begin(messages[-1]["content"])
    try:
        for step in stream(loaded, messages, settings, record=trace_file is not None or replay is not None):
            if replay is not None:
                replay.add(step)
            print(step.text[len(text) :], end="", flush=True)
            text = step.text
            tokens += [token for _, token in step.tokens]
    except KeyboardInterrupt:
        if trace_file:
            raise
    print(flush=True)
    if trace_file and step.trace is not None:
        write_json(trace_file, step.trace.to_dict(tokens, step.prompt_tokens))
    return text


def chat_device(options: argparse.Namespace) -> str:
    """Where to chat: `--device`, else the device of the target's run; beside a run that trains on that GPU, the CPU."""
    device = given_device(options)
    if options.device:
        return device
    user = runs.device_user(name) if (name := physical_device(device)).startswith("cuda") else ""
    if not user:
        return device
    print(
        f"Note: {user} is using {name}: replies are computed on the CPU. --device {device} shares it.", file=sys.stderr
    )
    return "cpu"


def given_device(options: argparse.Namespace) -> str:
    """`--device`, else the device of the target's run. Raises `ConfigError` for what is no device."""
    return ModelConfig(device=options.device).device if options.device else device_of_target(options.target)


def evaluate_command(options: argparse.Namespace) -> None:
    """Evaluate a target on a file once its device is free, and record the result with the run, if the target is one."""
    check_writable(options.json, "--json")
    from mole.data import read_examples

    rows = read_examples(options.data, limit=options.limit, field="--data")
    device = given_device(options)
    with device_turn(physical_device(device), lambda: False, print_error, run="an evaluation"):
        loaded = load_with_notice(options, device)
        from mole.evaluation import job as evaluation_job
        from mole.evaluation.evaluate import evaluate_file

        begun = time.monotonic()
        result = evaluate_file(loaded, options.data, limit=options.limit, progress=True)
    evaluation_job.record_evaluation(options.target, result, options.limit, rows.fingerprint, time.monotonic() - begun)
    print(f"{result['target']} on {result['data']}, {result['rows']} rows:")
    for key, value in result["metrics"].items():
        percent = key in ("accuracy", "exact_match") and value is not None
        print(f"  {key.replace('_', ' ')}: {f'{value:.1%}' if percent else metric_text(value)}")
    if options.json:
        write_json(options.json, result)


def load_with_notice(options: argparse.Namespace, device: str) -> Loaded:
    """Load the target on a device, with its base model from `--base` if given; its notice, if any, goes to stderr."""
    device = restrict_to(device)  # before anything that may start CUDA is imported
    from mole.runs.targets import load_target

    loaded = load_target(options.target, ModelConfig(device=device), options.base)
    if loaded.notice:
        print(f"Note: {loaded.notice}", file=sys.stderr)
    return loaded
