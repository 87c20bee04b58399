"""Tiny random models of many architectures: two layers of a width of 16, and 512 tokens.

model = build("jamba")                              # seeded, in eval mode
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

IMAGE_TOKEN = 500
BODY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS: dict[str, Any] = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = {**BODY, **WORDS, "max_position_embeddings": 256}
TEXT: dict[str, Any] = {**WIDE, "num_key_value_heads": 1, "head_dim": 8}
ONE_KV: dict[str, Any] = {**WIDE, "num_key_value_heads": 1}
GPT: dict[str, Any] = {**WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
STATES: dict[str, Any] = {**WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
SIGHT: dict[str, Any] = {**BODY, "image_size": 8, "patch_size": 4}
ENCODER: dict[str, Any] = {**BODY, **WORDS}


def causal(config: str, **values: Any) -> Callable[[], Any]:
    """A language model of transformers' config class `config` + `Config`."""
    return lambda: hf.AutoModelForCausalLM.from_config(getattr(hf, f"{config}Config")(**values))


def t5() -> Any:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=512, **sizes))


def whisper() -> Any:
    lengths = {"num_mel_bins": 8, "max_source_positions": 7, "max_target_positions": 20, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WORDS, **PAIR, **lengths))


def gemma3() -> Any:
    marks = {"image_token_index": IMAGE_TOKEN, "boi_token_index": 501, "eoi_token_index": 502, "mm_tokens_per_image": 4}
    text = {**TEXT, "sliding_window": 16}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=SIGHT, **marks))


def llava() -> Any:
    text, sight = {**TEXT, "model_type": "llama"}, {**SIGHT, "model_type": "clip_vision_model"}
    marks = {"image_token_index": IMAGE_TOKEN, "image_seq_length": 4, "vision_feature_layer": -1}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=sight, **marks))


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    sight = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": 503}
    marks = {"vision_start_token_id": 501, "vision_end_token_id": 502, **tokens}
    text = {**TEXT, "rope_parameters": rope}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=sight, **marks))


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": causal("Llama", **TEXT),
    "mistral": causal("Mistral", **TEXT),
    "qwen2": causal("Qwen2", **TEXT),
    "qwen3": causal("Qwen3", **TEXT),
    "gemma2": causal("Gemma2", **TEXT),
    "gemma3_text": causal("Gemma3Text", **TEXT, sliding_window=8),
    "granite": causal("Granite", **TEXT),
    "cohere2": causal("Cohere2", **TEXT),
    "olmo2": causal("Olmo2", **TEXT),
    "glm4": causal("Glm4", **TEXT),
    "helium": causal("Helium", **TEXT),
    "smollm3": causal("SmolLM3", **TEXT),
    "exaone4": causal("Exaone4", **TEXT),
    "ernie4_5": causal("Ernie4_5", **TEXT),
    "nemotron": causal("Nemotron", **TEXT),
    "starcoder2": causal("Starcoder2", **TEXT),
    "stablelm": causal("StableLm", **TEXT),
    "persimmon": causal("Persimmon", **TEXT),
    "phi": causal("Phi", **TEXT),
    "phi3": causal("Phi3", **TEXT),
    "apertus": causal("Apertus", **TEXT),
    "gpt_neox": causal("GPTNeoX", **WIDE),
    "gptj": causal("GPTJ", **GPT, rotary_dim=4),
    "gpt2": causal("GPT2", **GPT),
    "gpt_bigcode": causal("GPTBigCode", **GPT),
    "bloom": causal("Bloom", **WORDS, hidden_size=16, n_layer=2, n_head=2),
    "falcon": causal("Falcon", **WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    "mpt": causal("Mpt", vocab_size=512, d_model=16, n_heads=2, n_layers=2, max_seq_len=256),
    "opt": causal("OPT", **{**WIDE, "ffn_dim": 24}, word_embed_proj_dim=8),
    "codegen": causal("CodeGen", **{**GPT, "n_head": 4}, rotary_dim=4),
    "modernbert_decoder": causal("ModernBertDecoder", **ENCODER),
}
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": causal("Mixtral", **TEXT, num_local_experts=4),
    "qwen2_moe": causal("Qwen2Moe", **ONE_KV, **MOE, num_experts=4, shared_expert_intermediate_size=8),
    "qwen3_moe": causal("Qwen3Moe", **TEXT, **MOE, num_experts=4),
    "olmoe": causal("Olmoe", **ONE_KV, num_experts=4, num_experts_per_tok=2),
    "phimoe": causal("Phimoe", **ONE_KV, num_local_experts=4),
    "granitemoe": causal("GraniteMoe", **ONE_KV, num_local_experts=4),
    "deepseek_v2": causal("DeepseekV2", **WIDE, **MOE, **LATENT, q_lora_rank=None),
    "deepseek_v3": causal("DeepseekV3", **WIDE, **MOE, **LATENT, q_lora_rank=8),
    "gpt_oss": causal("GptOss", **TEXT, num_local_experts=4, num_experts_per_tok=2),
}
RECURRENT: dict[str, Callable[[], Any]] = {
    "mamba": causal("Mamba", **STATES, time_step_rank=2),
    "falcon_mamba": causal("FalconMamba", **STATES, time_step_rank=2),
    "mamba2": causal("Mamba2", **STATES, num_heads=4, head_dim=8, n_groups=1, chunk_size=8),
    "rwkv": causal(
        "Rwkv", **{**WORDS, "hidden_size": 16, "num_hidden_layers": 8}, attention_hidden_size=16, intermediate_size=24,
        context_length=256,
    ),
    "recurrent_gemma": causal(
        "RecurrentGemma", **TEXT, lru_width=16, attention_window_size=16, block_types=["recurrent", "attention"]
    ),
    "jamba": causal(
        "Jamba", **ONE_KV, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2,
    ),
    "bamba": causal("Bamba", **ONE_KV, **MAMBA, attn_layer_indices=[1], mamba_expand=2),
    "falcon_h1": causal("FalconH1", **ONE_KV, **MAMBA, mamba_d_ssm=32),
    "granitemoehybrid": causal(
        "GraniteMoeHybrid", **ONE_KV, **MAMBA, num_local_experts=0, layer_types=["mamba", "attention"],
        shared_intermediate_size=24,
    ),
    "zamba2": causal(
        "Zamba2", **{**ONE_KV, "num_hidden_layers": 4, "num_key_value_heads": 2}, mamba_d_state=4, mamba_headdim=8,
        n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, adapter_rank=4, hybrid_layer_ids=[1, 3],
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    ),
    "lfm2": causal("Lfm2", **ONE_KV, layer_types=["conv", "full_attention"]),
    "qwen3_next": causal(
        "Qwen3Next", **TEXT, **MOE, num_experts=4, shared_expert_intermediate_size=8, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "minimax": causal(
        "MiniMax", **TEXT, num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=8
    ),
}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**WORDS, **PAIR, max_position_embeddings=256)),
    "whisper": whisper,
    "gemma3": gemma3,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "bert": lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
    "bert, tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**ENCODER)),
    "bert, sequences": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
    "bert, answers": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**ENCODER)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**ENCODER, embedding_size=8)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIGHT)),
}
ARCHITECTURES = {**DECODERS, **MIXTURES, **RECURRENT, **OTHERS}


def build(name: str) -> Any:
    """The model of an architecture, with the same random weights each time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[name]().eval()


def with_room(folder: Path, copy: Path, model: Any = None) -> Path:
    """A copy of a tiny model that takes 8192 tokens and never ends a reply: its end token's logit is always 0.

    `model` is written there instead, with the folder's tokenizer.
    """
    shutil.copytree(folder, copy)
    if model is not None:
        model.save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][config["eos_token_id"]] = 0
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
