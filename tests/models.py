"""Tiny random models of real architectures, saved as Hugging Face checkpoints. No network, no tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    # Tied embeddings and a vocabulary that TP 2 does not divide.
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "vocab_size": 321}),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 16, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            # SGLang's CPU rotary embedding for MLA wants YaRN, which DeepSeek-V2-Lite has.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
    ),
}


def config_of(name: str, **overrides: Any) -> Any:
    import transformers

    cls, extra = CONFIGS[name]
    return getattr(transformers, cls)(**{**COMMON, **extra, **overrides})


def make_model(name: str, *, seed: int, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> torch.nn.Module:
    """A randomly initialised `AutoModelForCausalLM`; the same seed gives the same weights on every rank."""
    from transformers import AutoModelForCausalLM

    config = config_of(name, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():  # norms and biases, too, must differ from their constant defaults
            torch.nn.init.normal_(parameter, std=0.05)
        if model.config.tie_word_embeddings:
            model.tie_weights()
    return model


def save_model(name: str, directory: Path, *, seed: int, **overrides: Any) -> Path:
    """Save `make_model(name, seed=seed)` as a checkpoint that SGLang loads from disk."""
    make_model(name, seed=seed, **overrides).save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of the size of `COMMON`'s vocabulary, of the kind that Qwen2 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=COMMON["vocab_size"], special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and stops here one two three"] * 9, trainer
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(directory)
