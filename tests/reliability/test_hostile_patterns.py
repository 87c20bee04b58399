"""Patterns that Python's `re` would match for ages, in every file that brings patterns: each is answered in seconds.

Python holds the interpreter's lock while it matches, so that no time limit in the same process would end it: all is
tried in a process of its own, which is killed if it takes too long.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import check_line
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120
"""Seconds of the processor for everything; most of them go to importing the libraries."""
QUICK = 20
"""Seconds of the processor for one place: how busy the machine is makes no difference."""
ENDLESS = "((.+)+)+!"
"""Takes Python at least 2ⁿ steps to see that it does not match n characters."""
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "a mixture's modules": ({"peft_type": "MOLE_STUDIO", "r": 2, "target_modules": ENDLESS}, "linear"),
    "modules": ({**LORA, "target_modules": ENDLESS}, "target_modules"),
    "excluded modules": ({**LORA, "exclude_modules": ENDLESS}, ""),
    "ranks": ({**LORA, "rank_pattern": {ENDLESS: 2}}, ""),
    "scales": ({**LORA, "alpha_pattern": {"q_proj": 2, ENDLESS: 2, f"a|{ENDLESS}": 3}}, ""),
    "saved modules": ({**LORA, "modules_to_save": [ENDLESS]}, "modules_to_save"),
    "saved modules, in letters": ({**LORA, "modules_to_save": ENDLESS}, "modules_to_save"),
    "layers": ({**LORA, "layers_to_transform": [0], "layers_pattern": ENDLESS}, "layers_pattern"),
    "one of several layers": ({**LORA, "layers_to_transform": [0], "layers_pattern": ["h", ENDLESS]}, "layers_pattern"),
    "feed-forward modules": (
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ENDLESS}, "",
    ),
    "ranks of OSF": ({"peft_type": "OSF", "target_modules": ["q_proj"], "rank_pattern": {ENDLESS: 2}}, ""),
    "frequencies": (
        {"peft_type": "FOURIERFT", "n_frequency": 8, "target_modules": ["q_proj"], "n_frequency_pattern": {ENDLESS: 2}},
        "",
    ),
    "blocks": (
        {"peft_type": "C3A", "block_size": 8, "target_modules": ["q_proj"], "block_size_pattern": {ENDLESS: 8}}, "",
    ),
    "ranks of LoHa": ({"peft_type": "LOHA", "target_modules": ["q_proj"], "rank_pattern": {ENDLESS: 2}}, ""),
    "a table of many patterns": ({**LORA, "rank_pattern": {f"{'.*' * 20}{n}": 2 for n in range(9000)}}, "rank_pattern"),
    "a table of many names": ({**LORA, "rank_pattern": {f"layers.{n}": 2 for n in range(300_000)}}, "rank_pattern"),
    "a list of many names": ({**LORA, "target_modules": [f"a.{n}" for n in range(300_000)]}, "target_modules"),
    "a list of long names": (
        {**LORA, "target_modules": [f"{n}{'.a' * 400}" for n in range(9000)] + [f"b{n}" for n in range(900)]}, "",
    ),
    "a pattern of a large automaton": ({**LORA, "target_modules": "(.?){1000}"}, ""),
    "many repeated layers": ({**LORA, "layer_replication": [[0, 2]] * 100_000}, "layer_replication"),
    "endless repeated layers": ({**LORA, "layer_replication": [[0, 10**30]]}, "layer_replication"),
    "a name beside repeated layers": (
        {**LORA, "target_modules": ["embed_tokens", ENDLESS], "layer_replication": [[0, 2]]}, "target_modules",
    ),
    "a rank beyond the weights": ({**LORA, "rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
}  # fmt: skip
"""What an adapter's settings hold, and a word of the line that refuses it; empty where it may also load."""
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
MODELS: dict[str, dict[str, Any]] = {
    "unquantised modules": {**QUANTISED, "llm_int8_skip_modules": [ENDLESS]},
    "alternatives": {**QUANTISED, "llm_int8_skip_modules": ["(.|.)" * 30 + "!"]},
    "many names": {**QUANTISED, "llm_int8_skip_modules": [f"a{n}" for n in range(100_000)]},
    "a table": {"quant_method": "x", "modules": {"re:(.+)+!": {}}},
}
SCRIPT = """
import json, sys, time
from pathlib import Path
from mole.config import ModelConfig
from mole.core.errors import MoleError
from mole.models.loading import attach, load_base

base, adapters, models = (Path(path) for path in sys.argv[1:])

def answer(place, action):
    begun = time.process_time()
    try:
        action()
        line = ""
    except MoleError as error:
        line = str(error)
    print(json.dumps([place, line, time.process_time() - begun]), flush=True)

for folder in sorted(adapters.iterdir()):
    model = load_base(ModelConfig(name=str(base), device="cpu", dtype="float32"))
    answer(folder.name, lambda: attach(model, folder))
for folder in sorted(models.iterdir()):
    answer(folder.name, lambda: load_base(ModelConfig(name=str(folder), device="cpu", dtype="float32")))
"""


def finished(arguments: list[str], home: Path) -> tuple[int, str, str]:
    """Run Python in a process of its own, killed after `PATIENCE` → its exit code, stdout and stderr."""
    limited = ["prlimit", f"--cpu={PATIENCE}", sys.executable, *arguments]
    environment = {**os.environ, "MOLE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(limited, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, tuple[str, float]]:
    """The line that each place is refused with (empty: it loaded), and after how many seconds."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("hostile")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    for place, (values, _) in PLACES.items():
        shutil.copytree(folder / "adapter", folder / "adapters" / place)
        values = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(tiny_folder), **values}
        (folder / "adapters" / place / "adapter_config.json").write_text(json.dumps(values))
    for place, quantisation in MODELS.items():
        target = shutil.copytree(tiny_folder, folder / "models" / f"a base model's {place}")
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    arguments = ["-c", SCRIPT, str(tiny_folder), str(folder / "adapters"), str(folder / "models")]
    code, out, err = finished(arguments, folder / "home")
    found = {place: (line, seconds) for place, line, seconds in map(json.loads, out.splitlines())}
    assert code in (0, -9), err[-3000:]
    return found


@pytest.mark.parametrize("place", [*PLACES, *(f"a base model's {place}" for place in MODELS)])
def test_a_pattern_without_end_is_refused_or_means_nothing(place: str, answers: dict[str, tuple[str, float]]) -> None:
    assert place in answers, "it hung there, or before"
    line, seconds = answers[place]
    assert seconds < QUICK
    word = PLACES[place][1] if place in PLACES else "config.json"
    if line:
        check_line(line)
    assert word in line


@pytest.fixture
def hostile_yaml(tiny: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """A `run.yaml` whose pattern Python would match for ages."""
    values = {**tiny, "adapter": {**tiny["adapter"], "target_modules": ENDLESS}, "name": "endless"}
    (tmp_path / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    yield tmp_path / "run.yaml"


@pytest.mark.parametrize("command", ["train", "preflight"])
def test_a_run_yaml_with_such_a_pattern_is_refused_in_one_line(command: str, hostile_yaml: Path, home: Path) -> None:
    code, _, err = finished(["-m", "mole", command, "--config", str(hostile_yaml)], home)
    line = err.splitlines()[-1]
    assert "adapter.target_modules" in line and "q_proj" in line, err[-3000:]
    assert code in (1, 2) and "Traceback" not in err
