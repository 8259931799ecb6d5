"""Causal language models of the Hugging Face kind, as `save_pretrained` leaves them: random, and of a few weights."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

VOCAB = 300
LENGTH = 24
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    **SPECIAL,
}
FAMILIES: dict[str, Any] = {
    # Conv1D, fused queries, keys and values, learned positions, tied embeddings
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=4, **SPECIAL),
    # two queries share a key and a value; untied embeddings
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    # the same, with biases and tied embeddings
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    # heads wider than the residual stream's share of each
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=4),
    # Pythia: fused queries, keys and values, attention and MLP side by side
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
OUTPUT_PROJECTIONS = {
    "gpt2": "*.attn.c_proj",
    "llama": "*.o_proj",
    "qwen2": "*.o_proj",
    "qwen3": "*.o_proj",
    "gpt_neox": "*.attention.dense",
}
CORPUS = ["the cat sat on the mat", "a princess lost her crown", "foo() bar() x = 'ab'", "the dog ran", " cat sat"] * 4


def refuse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make whatever asks the network fail."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def save_model(folder: Path, family: str, seed: int = 0) -> nn.Module:
    """Write a model with weights large enough for every part to matter, and give it back."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(folder)
    return model


def save_byte_level(folder: Path, **options: Any) -> None:
    """As GPT-2's and Qwen's: any text, a space belongs to the word after it, nothing is put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options}).save_pretrained(folder)


def save_word_start(folder: Path, **options: Any) -> None:
    """As Llama's: a space before every text, a token before and one after it, characters that are unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **options}).save_pretrained(folder)


def save_whole_words(folder: Path, **options: Any) -> None:
    """A word a token, whatever is around it."""
    words = ["<unk>", "<pad>", *sorted({word for text in CORPUS for word in text.split() if word.isalpha()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", **options
    ).save_pretrained(folder)
