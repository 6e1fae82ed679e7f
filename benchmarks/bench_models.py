"""Encoder-decoders and a language model: a training step and generation, beside the same in torch.

Training: ours on packed sequences with linear_cross_entropy beside ``nn.Transformer`` on the padded
batch with ``F.cross_entropy`` of stored logits: same sizes, dropout 0.1 in both, tied output layer,
forward and backward. The optimizer's step is the same for both and left out. flops count the real
tokens, so torch's rate shows what padding costs it.

Generation: greedy and beams beside ``generate`` of transformers' BART of the same sizes. bytes
count the decoder's and the output layer's weights once for each step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttransformer.benchmarks._shared import OURS, Candidate, Case, run_under_pytest

EMBED, HIDDEN, HEADS = 512, 2048, 8
LAYERS = 3  # of the encoder, and of the decoder: the tutorial's
#: (layers, vocabulary, sources, longest, every sequence as long): the second batch is half padding.
TRAINING = (
    (3, 8000, 16, 64, True),
    (3, 32000, 16, 128, False),
    (3, 32000, 16, 64, True),
    (6, 32000, 16, 64, True),
)
#: vocabulary, features, layers, heads of GPT-2's smallest; prompt and new tokens.
GPT2 = (50257, 768, 12, 12)
PROMPT, NEW = 64, 32
#: (vocabulary, sources, source tokens, new tokens, beams)
GENERATION = ((32000, 1, 64, 32, 1), (32000, 16, 64, 32, 1), (32000, 4, 64, 32, 4))


class Torchs(nn.Module):
    """The model as one writes it with torch."""

    def __init__(self, vocab: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, EMBED, 0)
        nn.init.normal_(self.embedding.weight, std=EMBED**-0.5)
        self.dropout = nn.Dropout(0.1)
        self.transformer = nn.Transformer(
            EMBED, HEADS, layers, layers, HIDDEN, 0.1, batch_first=True
        )
        place = torch.arange(1024)[:, None] * 10000.0 ** (-torch.arange(0, EMBED, 2) / EMBED)
        self.register_buffer("table", torch.stack([place.sin(), place.cos()], -1).flatten(1))

    def embed(self, ids: Tensor) -> Tensor:
        table: Any = self.table
        return self.dropout(self.embedding(ids) * EMBED**0.5 + table[: ids.shape[1]])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        shifted = target.roll(1, 1)
        shifted[:, 0] = 1
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(
            self.embed(source), self.embed(shifted), tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=source == 0, memory_key_padding_mask=source == 0,
        )  # fmt: skip
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)


def ours(vocab: int, layers: int = LAYERS) -> Any:
    from fasttransformer.models import Decoder, Encoder, Seq2SeqModel

    stack = (vocab, EMBED, HIDDEN, layers, HEADS)
    return Seq2SeqModel(
        Encoder(*stack), Decoder(*stack), share_embeddings=True, tie_embeddings=True
    )


def bart(vocab: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=vocab, d_model=EMBED, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def batch_of(vocab: int, count: int, longest: int, equal: bool) -> Tensor:
    """Random ids, padded with 0; lengths are spread evenly unless all are equal."""
    ids = torch.randint(4, vocab, (count, longest))
    if not equal:
        lengths = torch.linspace(1, longest, count).round()
        ids[torch.arange(longest) >= lengths[:, None]] = 0
    return ids


def layer_weights(decoder: bool) -> int:
    return (8 if decoder else 4) * EMBED * EMBED + 2 * EMBED * HIDDEN


def _training(
    layers: int, vocab: int, count: int, longest: int, equal: bool, dtype: torch.dtype
) -> Case:
    def make() -> Mapping[str, Candidate]:
        source, target = (batch_of(vocab, count, longest, equal) for _ in range(2))
        models = {OURS: ours(vocab, layers), "nn.Transformer": Torchs(vocab, layers)}

        def step(name: str) -> Candidate:
            model = models[name].train()

            def run() -> None:
                model.zero_grad()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    result = model(source, target)
                (result.loss if name == OURS else result).backward()

            return run

        return {name: step(name) for name in models}

    tokens = int((batch_of(vocab, count, longest, equal) != 0).sum())
    weights = layers * (layer_weights(False) + layer_weights(True)) + vocab * EMBED
    padding = "" if equal else " half padding"
    name = f"train {layers} + {layers} layers, {count}×{longest}{padding}, vocabulary {vocab}"
    return Case(
        "models", name, dtype, make, bytes=3 * 4 * weights, flops=6 * tokens * weights,
        compared=False,
    )  # fmt: skip


def _generation(vocab: int, count: int, length: int, new: int, beams: int, dtype) -> Case:
    def make() -> Mapping[str, Candidate]:
        source = batch_of(vocab, count, length, True)
        mine, theirs = ours(vocab).to(dtype).eval(), bart(vocab).to(dtype)
        with torch.no_grad():
            mine.decoder.embedding.weight[2] = 0.0  # no text ends before the last step
        options = {"max_new_tokens": new, "num_beams": beams}
        mask = torch.ones_like(source)
        return {
            OURS: lambda: mine.generate(source, **options),
            "transformers' BART": lambda: theirs.generate(
                input_ids=source, attention_mask=mask, min_new_tokens=new, do_sample=False,
                **options,
            ),
        }  # fmt: skip

    weights = LAYERS * (layer_weights(True) - 2 * EMBED * EMBED) + vocab * EMBED
    name = f"generate {count}×{new} tokens, {beams} beams, vocabulary {vocab}"
    return Case(
        "models", name, dtype, make, bytes=new * weights * dtype.itemsize,
        flops=2 * count * beams * new * weights, compared=False,
    )  # fmt: skip


def _language_model(dtype: torch.dtype) -> Case:
    vocab, features, layers, heads = GPT2

    def make() -> Mapping[str, Candidate]:
        from transformers import GPT2Config, GPT2LMHeadModel

        from fasttransformer.models import LanguageModel

        mine = LanguageModel(vocab, features, 4 * features, layers, heads).to(dtype).eval()
        theirs = GPT2LMHeadModel(GPT2Config()).to(dtype).eval()
        prompt = torch.randint(4, vocab, (1, PROMPT))
        options = {"max_new_tokens": NEW}
        with torch.no_grad():
            mine.decoder.embedding.weight[2] = 0.0  # the text does not end before the last step
        return {
            OURS: lambda: mine.generate(prompt, **options),
            "transformers' GPT-2": lambda: theirs.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=NEW,
                do_sample=False, pad_token_id=0, **options,
            ),
        }  # fmt: skip

    weights = layers * 12 * features**2 + vocab * features
    return Case(
        "models", f"GPT-2 generates {NEW} tokens after {PROMPT}", dtype, make,
        bytes=NEW * weights * dtype.itemsize, flops=2 * (PROMPT + NEW) * weights, compared=False,
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    found = []
    for dtype in dtypes:
        found += [_training(*size, dtype) for size in TRAINING[: 1 if quick else None]]
        if importlib.util.find_spec("transformers") is not None:
            found += [_generation(*size, dtype) for size in GENERATION[: 1 if quick else None]]
            found += [] if quick else [_language_model(dtype)]
    return found


test_models = run_under_pytest
