"""Makes runs-0.1.0.zip: a small base model, its data, and runs that version 0.1.0 trained, stopped, lost and queued.

    git worktree add /tmp/mole-0.1.0 d1a1339            # the last commit before the changes after 0.1.0
    PYTHONPATH=/tmp/mole-0.1.0 python tests/assets/make_runs_0_1_0.py

Paths in the runs are relative, so they hold wherever the archive is unpacked, for a process that works there.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("runs-0.1.0.zip")
WORDS = ("apple", "pear", "fig", "plum")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "model": {"name": "base", "device": "cpu", "dtype": "float32"},
    "data": {"path": "rows.jsonl", "eval_fraction": 0.1},
    "training": {
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 1,
        "per_device_train_batch_size": 2,
        "warmup_steps": 1,
    },
}
RUNS = {
    "finished-dynmole": {"router": "dynmole", "num_experts": 2, "r": 2},
    "finished-lora": {"router": "lora", "num_experts": 1, "r": 2},
    "stopped-adamole": {"router": "adamole", "num_experts": 2, "r": 2},
    "killed-topk": {"router": "topk", "num_experts": 3, "r": 2, "top_k": 2},
    "queued-dense": {"router": "dense", "num_experts": 2, "r": 2},
}


def make_base(folder: Path) -> None:
    """A random llama of one layer, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, model_max_length=128, **special)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
            pad_token_id=0,
        )
    ).half().float().save_pretrained(folder)  # fmt: skip


def train(run: Any) -> None:
    """Train a run until its name says that it ended, in this process."""
    from mole.runfolder import Run
    from mole.worker import work

    append = Run.append_event

    def appended(run: Any, type: str, step: int, **values: Any) -> None:
        append(run, type, step, **values)
        if (type, step) == ("step", 3):
            if run.name.startswith("stopped"):
                run.request_stop()
            elif run.name.startswith("killed"):
                os._exit(0)

    Run.append_event = appended
    work(run)


def main() -> None:
    from mole import runs
    from mole.config import RunConfig

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["MOLE_HOME"] = folder
        for name, adapter in RUNS.items():  # what is not there is not made absolute
            runs.create(RunConfig.from_dict({"name": name, "adapter": adapter, **SETTINGS}))
        os.chdir(home)
        make_base(home / "base")
        pairs = [{"prompt": f"{a} {b}", "completion": b} for a in WORDS for b in WORDS]
        (home / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        for name in RUNS:
            runs.enqueue(runs.get(name))
            if not name.startswith("queued") and not (child := os.fork()):
                train(runs.get(name))
                os._exit(0)
            elif not name.startswith("queued"):
                os.waitpid(child, 0)
        print({run.name: run.state for run in runs.list_runs()})
        with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(home.rglob("*")):
                spared = path.match("runs/finished-*/checkpoints/*/*") or path.name == "train.log"  # to be small
                if path.is_file() and not spared:
                    archive.write(path, path.relative_to(home))
    print(TARGET, TARGET.stat().st_size)


if __name__ == "__main__":
    main()
