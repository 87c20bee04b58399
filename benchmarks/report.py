"""Run all benchmarks and write what they say into RESULTS.md, between its marks; what is outside them stays.

python benchmarks/report.py                  # all, about twenty minutes on two cores
python benchmarks/report.py step_time        # one of them anew, the others as they were last
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "build" / "benchmarks"
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
ALL = ("step_time", "memory", "decoding", "instruction", "choices", "growth", "start_up")


def run(name: str) -> None:
    """Run one and keep its JSON."""
    print(f"{name} …", flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--json"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent).stdout
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(printed, encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """One benchmark in Markdown."""
    machine = found["machine"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, bfloat16 units: "
    where += "yes" if machine["bfloat16"] else "no"
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
    lines = [
        f"### {found['title']}", "", f"`{found['command']}`", "", f"{where}; {libraries}; {machine['date']}.", "",
        "| | median | quartiles | goal | | |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for item in found["figures"]:
        verdict = {None: "", True: "met", False: "**missed**"}[item["met"]]
        spread = f"{item['low']:.3g} … {item['high']:.3g}"
        goal = item["goal"].replace("<=", "≤").replace(">=", "≥")
        lines.append(f"| {item['name']} | {item['value']:.3g} | {spread} | {goal} | {verdict} | {item['about']} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is named, or all; write RESULTS.md."""
    for name in sys.argv[1:] or ALL:
        run(name)
    kept = [KEPT / f"{name}.json" for name in ALL]
    tables = [table(json.loads(path.read_text(encoding="utf-8"))) for path in kept if path.exists()]
    text = RESULTS.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    RESULTS.write_text("\n\n".join([f"{before}{BEGIN}", *tables, f"{END}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
