"""Captions, and CLIP and T5 text encoders small enough to train with the denoiser."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tools.zoo.emoji_data import EmojiSet

MAX_TOKENS = 24
MAX_TOKENS_T5 = 16
START, END = "<|startoftext|>", "<|endoftext|>"


class CaptionSampler:
    """Draws captions: the name, sometimes with keywords or the art style, sometimes an empty text.

    The empty caption trains the unconditional branch of classifier-free guidance (Ho and Salimans
    2022, arXiv 2207.12598).
    """

    def __init__(self, data: EmojiSet, drop: float = 0.1, style: float = 0.3, keywords: float = 0.15) -> None:
        self.data = data
        self.drop, self.style, self.keywords = drop, style, keywords

    def __call__(self, pictures: np.ndarray, rng: np.random.Generator) -> list[str]:
        return [self._caption(i, rng) for i in pictures]

    def _caption(self, picture: int, rng: np.random.Generator) -> str:
        drop, style, keywords = rng.random(3)
        if drop < self.drop:
            return ""
        emoji = self.data.emoji[picture]
        words = [self.data.names[emoji]]
        tags = self.data.tags[emoji]
        if keywords < self.keywords and tags:
            words += list(rng.choice(tags, size=min(2, len(tags)), replace=False))
        if style < self.style:
            words.append(self.data.styles[picture])
        return ", ".join(words)


def train_tokenizer(data: EmojiSet, merges: int = 1500) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's form, learnt on names, keywords and styles; it spells any text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(data), trainer)
    learnt = _merges(tokenizer)
    symbols = [*alphabet, *(c + "</w>" for c in alphabet)]
    merged = [left + right for left, right in learnt]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*symbols, *merged, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=learnt, model_max_length=MAX_TOKENS)


def train_t5_tokenizer(data: EmojiSet, size: int = 1200) -> T5Tokenizer:
    """A Unigram model of T5's form, learnt on the names, keywords and styles; it spells ASCII."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    printable = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", initial_alphabet=printable, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(data), trainer)
    pieces: Any = json.loads(tokenizer.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=0, model_max_length=MAX_TOKENS_T5)


def _corpus(data: EmojiSet) -> list[str]:
    return [*data.names, *(" ".join(tags) for tags in data.tags), *sorted(set(data.styles))]


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges: Any = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


def tokenize(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    """Tokens int64 `[n, length]`, padded or cut to this length as in diffusers' pipelines."""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    # The call leaves its options in the tokenizer, which would be saved with them.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokens


def build_text_encoder(tokenizer: CLIPTokenizer, hidden: int = 128, layers: int = 2) -> CLIPTextModel:
    """A CLIPTextModel of 0.7 M parameters; the denoiser attends to its last hidden states."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=hidden,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5_encoder(tokenizer: T5Tokenizer, hidden: int = 128, layers: int = 2) -> T5EncoderModel:
    """A T5 encoder of 0.5 M parameters; FLUX attends to its last hidden states as tokens."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=hidden,
            d_kv=hidden // 4,
            d_ff=2 * hidden,
            num_layers=layers,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
