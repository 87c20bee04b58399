"""Which of PEFT's tests are refused by MoLE on purpose, and which do not apply to it, each with its reason."""

from __future__ import annotations

import re

from mole.core.errors import MoleError

REFUSED = {
    r"cannot be merged": "merging: how much each expert adds depends on the token",
    r"must be linear layers only": "targets that are not linear layers: embeddings, convolutions, attention modules",
    r"^adapter\.target_parameters is ": "experts beside parameters that are not in a linear layer",
    r"this model has no biases": "training the biases of a model that has none",
    r"adapter_names is not supported": "adapters mixed within a batch",
    r"add_weighted_adapter is not supported": "weighted sums of adapters",
    r"no gradient under reentrant checkpointing": "reentrant checkpointing, which would lose the auxiliary losses",
}
"""Pattern of the message of a `MoleError` → what was refused."""

NAMES = "names LoRA's own weights, lora_A and lora_B"
NOT_APPLICABLE = {
    r"::TestMultiRankAdapter::": NAMES,
    r"::TestRequiresGrad::test_requires_grad_(lora|modules_to_save|follows_inference_mode)": NAMES,
    r"::test_loading_adapter_preserves_custom_requires_grad": NAMES,
    r"::TestLayerRepr::": "the text of LoRA's own layers",
    r"::TestDynamicDispatch::": "LoRA's classes for layers of one's own",
    r"::TestDefaultTargetModules::": "LoRA's default targets by model type; MoLE's default is all-linear",
    r"::test_training(_gradient_checkpointing)?\[.*(Bert|Roberta)Model": (
        "with all-linear the pooler is adapted too, and these tests' loss does not depend on it"
    ),
    r"::test_only_params_are_updated\[sparsegen-Embedding": "a learning rate that hardly moves the λ network's bias",
    r"::test_only_params_are_updated\[(adamole|topp|threshold)-Vanilla MLP 4 ": (
        "inputs so large that one expert takes all, so that the router has no gradient"
    ),
    r"::test_add_adapter_rejects_duplicate_name_without_mutation\[.*True": "PEFT lists the methods of PeftMixedModel",
}
"""Pattern of a test's name → why it says nothing about MoLE."""
REASONS = {*REFUSED.values(), *NOT_APPLICABLE.values()}


def refusal(error: MoleError) -> str | None:
    """What was refused, if an error is a refusal on purpose."""
    return next((what for pattern, what in REFUSED.items() if re.search(pattern, str(error))), None)


def not_applicable(name: str) -> str | None:
    """Why a test says nothing about MoLE, by its name `…/test_file.py::Class::test[case]`."""
    return next((reason for pattern, reason in NOT_APPLICABLE.items() if re.search(pattern, name)), None)
