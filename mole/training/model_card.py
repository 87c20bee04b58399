"""The README of a trained adapter."""

from __future__ import annotations

from mole.config import RunConfig


def model_card(config: RunConfig) -> str:
    """The README of an adapter: its settings and how to load it."""
    adapter = config.adapter
    return f"""---
base_model: {config.model.name}
library_name: peft
tags: [mole-studio, mixture-of-lora-experts, {adapter.router}]
---

A mixture of LoRA experts for `{config.model.name}`, trained with MoLE Studio.

Router {adapter.params.title}, {adapter.num_experts} experts of rank {adapter.r} per projection.
{adapter.params.summary}

```python
import mole  # first: it registers the adapter type MOLE_STUDIO, without which PEFT raises KeyError
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

The adapter was trained with the chat template in `chat_template.jinja`; use the same template for prompts.
"""
