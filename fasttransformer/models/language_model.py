"""A decoder alone: text that continues text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import LMHead
from .config import TransformerConfig
from .decoder import Decoder
from .generation import Generator
from .initialization import start_output_layer
from .outputs import TextOutput
from .packing import IGNORED, PackedBatch, pack_padded
from .pretrained import TextModel, Texts
from .seq2seq import language_model_output
from .transformers_call import own_loss


class LanguageModel(Generator, TextModel):
    r"""Decoder-only language model.

    .. math:: L = -\frac{1}{N} \sum_n \log p(x_n \mid x_{<n})

    over the N predicted tokens, the logits never stored.

    Args:
        vocab, embed, hidden, layers, heads, pre_norm, options: as of
            :class:`~fasttransformer.models.Encoder`; norms come first unless ``pre_norm=False``.

    Called with texts: strings, which get ``<s>`` and ``</s>``, lists of ids or a padded tensor of
    ids (B, L), which are taken as they are; each token is predicted from those before it. With
    ``target``, continuations of as many prompts, only the continuations are predicted; of a pair
    with more than ``max_length`` tokens the continuation loses its end, with a warning. The Trainer
    of transformers calls it by ``input_ids``, ``attention_mask``, ``labels``: the ids again, −100
    where nothing is to be predicted; they are shifted here. Returns a
    :class:`~fasttransformer.models.outputs.TextOutput`; its logits (B, L, vocab) at a place are
    those of the next token.

    Raises:
        ValueError: an option out of range; an empty batch; an id outside the vocabulary.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

    >>> model = LanguageModel(260, 32, 64, 2, 4)
    >>> outputs = model(["some text", "more"])
    >>> outputs.num_tokens  # characters and </s>
    15
    """

    #: Of transformers' Trainer: it counts the tokens that are predicted in all of a step's batches
    #: and gives their number to the call.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(
        self,
        vocab: int,
        embed: int,
        hidden: int,
        layers: int,
        heads: int,
        pre_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._build(
            Decoder(vocab, embed, hidden, layers, heads, pre_norm, cross_attention=False, **options)
        )

    def _build(self, decoder: Decoder) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.lm_head = LMHead(self.config.embed_dim, self.config.vocab_size)
        start_output_layer(self.lm_head)
        self._tie()

    def configs(self) -> dict[str, TransformerConfig]:
        return {"config": self.config}

    @classmethod
    def from_configs(cls, configs: dict[str, TransformerConfig]) -> LanguageModel:
        model = cls.__new__(cls)
        TextModel.__init__(model)
        model._build(Decoder.from_config(configs["config"], cross_attention=False))
        return model

    def tied(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        return [(self.decoder.embedding, self.lm_head)] if self.config.tie_embeddings else []

    def forward(
        self,
        source: Texts = None,
        target: Texts = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TextOutput:
        """Loss and logits. ``num_items_in_batch`` divides the sum of the losses in place of the
        number of predicted tokens."""
        source = input_ids if source is None else source
        if source is None:
            raise ValueError("LanguageModel: source must be given")
        if target is not None:
            batch, own = self._continued(source, target)
        else:
            batch = self.packed(
                "source", source, self.config, bos=True, lengths=lengths,
                attention_mask=attention_mask,
            )  # fmt: skip
            own = batch.ids if labels is None else self._labels(labels, source, batch, lengths,
                                                                attention_mask)  # fmt: skip
        wanted = own.roll(-1)
        ends = batch.cu_seqlens[1:][batch.cu_seqlens.diff() > 0].long()
        wanted[ends - 1] = IGNORED
        hidden = self.decoder(batch).hidden
        output = language_model_output(self, hidden, wanted, batch, num_items_in_batch)
        if input_ids is not None and labels is None and target is None:
            output._guard = own_loss
        return output

    def _continued(self, source: Texts, target: Texts) -> tuple[PackedBatch, Tensor]:
        """Prompts with their continuations, and the latter as labels. What is too long loses the
        continuation's end, but for its end token, as a single text does."""
        prompts = self.packed("source", source, self.config, bos=True, eos=False)
        continuations = self.packed("target", target, self.config, bos=False, eos=True)
        if len(prompts) != len(continuations):
            raise ValueError(
                f"LanguageModel: source has {len(prompts)} texts, but target has "
                f"{len(continuations)}"
            )
        longest, cut, lost = self.config.max_length, 0, 0
        pieces, labels = [], []
        for prompt, continuation in zip(
            prompts.ids.split(prompts.lengths), continuations.ids.split(continuations.lengths)
        ):
            room = max(longest - len(prompt), 0)
            if len(continuation) > room:
                cut, lost = cut + 1, lost + (room == 0)
                ended = room > 0 and bool(continuation[-1] == self.config.eos_id)
                end = continuation[-1:] if ended else continuation[:0]
                continuation = torch.cat([continuation[: room - ended], end])
            prompt = prompt[:longest]
            pieces.append(torch.cat([prompt, continuation]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORED), continuation]))
        if cut:
            none = f"; {lost} have no room for any of it, and none is predicted" if lost else ""
            warnings.warn(
                f"LanguageModel: {cut} of {len(pieces)} prompts with their continuations have more "
                f"than {longest} tokens; the continuations' ends are left out{none}",
                stacklevel=2,
            )
        return self.packed("source", pieces, self.config), torch.cat(labels)

    def _labels(
        self, labels: Tensor, source: Texts, batch: PackedBatch, lengths: Any, mask: Any
    ) -> Tensor:
        """Labels of the tokens that were packed."""
        if not isinstance(source, Tensor) or labels.shape != source.shape:
            raise ValueError(
                "LanguageModel: labels must be a tensor of input_ids' shape, got "
                f"{tuple(labels.shape)}"
            )
        if mask is None and lengths is None:
            lengths = batch.lengths
        return pack_padded(
            "labels", labels.to(self.device), lengths=lengths, attention_mask=mask
        ).ids
