"""Train the demo adapter with the settings in run.yaml, store it in float16, and record what it can do.

    python assets/demo/make_demo.py

Run it from the repository's root; it takes about ten minutes on two quiet CPU cores and can be interrupted: started
again, it goes on from the last checkpoint. Writes `adapter/` and `results.json` beside this file.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint
from mole.core.errors import RunError
from mole.evaluation import evaluate_file
from mole.models.adapter_files import WEIGHTS
from mole.runs.targets import load_target
from mole.training import worker

HERE = Path(__file__).resolve().parent
BASE_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIBRARIES = ("torch", "transformers", "peft")
HELD_OUT = "assets/data/skills_heldout.jsonl"


def main() -> None:
    """Train (or go on), convert, evaluate."""
    config = RunConfig.load(HERE / "run.yaml")
    run = trained(config)
    started = next(event for event in run.events() if event["type"] == "started")
    data = next(event for event in run.events() if event["type"] == "data")
    meta = {"config": config.to_dict(), "data": data["fingerprint"]}
    checkpoint.write_folder(HERE / "adapter", lambda folder: halved(run.adapter_dir, folder), step=run.step, meta=meta)
    results = {
        "demo": evaluate_file(load_target(str(HERE)), HELD_OUT, progress=True),
        "base": evaluate_file(load_target(f"base:{config.model.name}"), HELD_OUT, progress=True),
    }
    record = {
        "made_with": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "steps": run.step,
        "trainable_parameters": started["trainable_parameters"],
        "data": HELD_OUT,
        "rows": results["demo"]["rows"],
        **{name: result["metrics"] for name, result in results.items()},
    }
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def trained(config: RunConfig) -> runs.Run:
    """The finished run `demo`: made now, or gone on with."""
    try:
        run = runs.get(str(config.name))
    except RunError:
        run = runs.create(config)
    if run.state != "finished":
        resume = run.state != "queued"
        runs.enqueue(run, resume=resume)
        worker.perform(run, resume=resume, progress=True)
    return run


def halved(source: Path, target: Path) -> None:
    """Copy an adapter with its weights in float16, its base named as on the hub."""
    weights = {name: tensor.half() for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    settings: dict[str, Any] = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = BASE_ON_THE_HUB
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for name in ("chat_template.jinja", "README.md"):
        (target / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
    for path in target.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
