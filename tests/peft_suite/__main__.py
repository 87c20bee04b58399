"""Download PEFT's tests and run them with MoLE in place of LoRA; options that are not listed go to pytest."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from peft_suite.source import fetch_tests, pinned_version

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peft-tests"
FILES = [
    "test_custom_models.py", "test_decoder_models.py", "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py", "test_seq_classifier.py", "test_token_classification_qa.py",
]  # fmt: skip
SHORT = ["--routers=dynmole,sparsegen", r"--only=Vanilla MLP [45] LoRA-|Conv1D 1 LoRA-", "-n0"]
"""In continuous integration: the first file, with linear layers, a module that is saved whole, and GPT-2's layers."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="peft_suite", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few cases of two routers, in seconds")
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE", help=", ".join(FILES))
    parser.add_argument("--workers", default="2", help="how many tests run at a time")
    args, options = parser.parse_known_args()
    files, chosen = (FILES[:1], SHORT) if args.short else (args.files, ["-n", args.workers])
    if files == FILES and not options:
        chosen.append("--whole")
    BUILD.mkdir(parents=True, exist_ok=True)
    tests = fetch_tests(pinned_version(ROOT / "constraints.txt"), BUILD)
    environment = {
        "HF_HUB_CACHE": str(BUILD / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MOLE_COMPILE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", tests])),
    }
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={tests}", "-p", "no:cacheprovider"),
        *("-p", "peft_suite.plugin", "--disable-warnings", "--tb=short", "--timeout=600", *chosen, *options),
        *(str(tests / "peft_tests" / name) for name in files),
    ]
    return subprocess.run(command, cwd=tests, env={**os.environ, **environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
