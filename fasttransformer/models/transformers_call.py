"""What transformers' Trainer and Seq2SeqTrainer ask of a model beyond a call by name.

``generate`` by their options, and its tensor of ids; what the decoder reads where the labels are
taken away; checkpointed layers; and the options that can't be had, refused by their name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Options of a GenerationConfig that ours has, and those of them that speak of drawn texts alone.
_OPTIONS = ("num_beams", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
            "length_penalty")  # fmt: skip
_DRAWN = ("temperature", "top_k", "top_p")


class _OwnLoss(Tensor):
    """The loss of a language model whose call had no labels. Trainer's LabelSmoother takes the
    labels away, takes the first output for logits, and, of a class that is not transformers' own,
    compares each token with itself; so the loss refuses what it does first."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.log_softmax:
            raise ValueError(
                "LanguageModel: transformers' Trainer takes the labels away with "
                "label_smoothing_factor, and can't smooth the loss of this model, which shifts "
                "its labels itself; set label_smoothing in the model's config instead"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def own_loss(loss: Tensor) -> Tensor:
    """``loss`` as :class:`_OwnLoss`, with its graph."""
    return loss.as_subclass(_OwnLoss)


class Checkpointed:
    """Models whose layers keep their inputs alone, and compute the rest once more in the backward
    pass; TrainingArguments' ``gradient_checkpointing`` and ``activation_checkpointing``."""

    #: Every how many layers, and torch.utils.checkpoint's options; None keeps everything.
    _checkpointing: tuple[int, dict[str, Any]] | None = None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Every n-th layer is computed again in the backward pass, in training.

        Raises:
            ValueError: ``offload``, which these models don't have; a model without layers.
        """
        model: Any = self
        if offload:
            raise ValueError(f"{type(self).__name__}: activation checkpointing has no offload")
        stacks = [module for module in model.modules() if hasattr(module, "layers")]
        if not stacks:
            raise ValueError(f"{type(self).__name__}: it has no layers to checkpoint")
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for stack in stacks:
            stack._checkpointing = (every_n_layers, options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The same by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Everything is kept again."""
        model: Any = self
        for module in model.modules():
            if isinstance(module, Checkpointed):
                module._checkpointing = None

    activation_checkpointing_disable = gradient_checkpointing_disable


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
    """Generated ids as transformers returns them: after the start token, or a language model's
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
