"""Imported once by the fork server (`forks.SERVER`): all that a training needs, so that its processes begin at once."""

# ruff: noqa: F401

import gc

import accelerate.data_loader
import datasets
import numpy.ctypeslib
import pandas
import peft.utils.transformers_weight_conversion
import safetensors.torch
import torch._dynamo
import torch.profiler
import transformers.integrations.accelerate
import transformers.integrations.peft
import transformers.models.llama.modeling_llama
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import mole.evaluation.evaluate
import mole.training.trainer
import mole.training.worker

get_checkpoint_conversion_mapping("llama")  # it compiles a thousand patterns and remembers them
gc.collect()
gc.freeze()  # what is imported is not looked through, and so not copied, by every child
