"""``generate`` as transformers' Seq2SeqTrainer calls it: its options, and its tensor of ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Options of a GenerationConfig that ours has, and those of them that speak of drawn texts alone.
_OPTIONS = ("num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
            "length_penalty")  # fmt: skip
_DRAWN = ("temperature", "top_k", "top_p")


def resolved(model: Any, input_ids: Tensor, config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a call as :meth:`~.generation.Generator.generate` takes them: what is given
    with another value than transformers' and our default, else what a GenerationConfig says, the
    call's or the model's own.

    Raises:
        ValueError: nothing says how many tokens may be new; ``max_length`` leaves none.
    """
    config = model._generation_config if config is None else config
    lengths = ("max_new_tokens", "max_length")
    found = {name: getattr(config, name, None) for name in (*_OPTIONS, *lengths)}
    if not found["do_sample"]:
        found.update(dict.fromkeys(_DRAWN))
    if any(given[name] is not None for name in lengths):
        found.update(dict.fromkeys(lengths))
    changed = {
        name: value for name, value in given.items()
        if value is not None and (name in lengths or value not in (False, 1))
    }  # fmt: skip
    options = {name: value for name, value in (found | changed).items() if value is not None}
    longest = options.pop("max_length", None)
    if "max_new_tokens" not in options:
        if longest is None:
            raise ValueError(
                "generate: max_new_tokens or max_length must be given (Seq2SeqTrainer's "
                "generation_max_length)"
            )
        options["max_new_tokens"] = _new_tokens(model, input_ids, longest)
    return options


def _new_tokens(model: Any, input_ids: Tensor, max_length: int) -> int:
    """How many tokens may be new where ``max_length`` counts what a decoder starts with, too."""
    known = 1 if hasattr(model, "encoder") else input_ids.shape[1]
    if max_length <= known:
        raise ValueError(
            f"generate: max_length is {max_length}; the decoder starts with {known} tokens, so it "
            f"must be {known + 1} or more"
        )
    return max_length - known


def as_tensor(model: Any, input_ids: Tensor, texts: list[list[int]], most: int) -> Tensor:
    """Generated ids as transformers returns them: behind the start token, or a language model's
    prompt; with the end token where there was one; padded on the right."""
    config = model.config
    ended = [text if len(text) == most else [*text, config.eos_id] for text in texts]
    width = max((len(text) for text in ended), default=0)
    rows = torch.full((len(ended), width), config.pad_id, dtype=torch.long)
    for row, text in zip(rows, ended):
        row[: len(text)] = torch.tensor(text, dtype=torch.long)
    if hasattr(model, "encoder"):
        first = torch.full((len(ended), 1), config.bos_id, dtype=torch.long)
    else:
        first = input_ids.cpu()
    return torch.cat([first, rows], 1).to(input_ids.device)
