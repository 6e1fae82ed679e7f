"""The decoder: causal self-attention, attention to the encoder's output, feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .config import TransformerConfig
from .encoder import EncoderOutput, Stack, _arguments, stack_config
from .pretrained import Texts


class Decoder(Stack):
    r"""Transformer decoder over text, computed on real tokens alone.

    .. math::
        x \leftarrow \text{norm}(x + \text{causal attention}(x)), \quad
        x \leftarrow \text{norm}(x + \text{attention}(x, \text{memory})), \quad
        x \leftarrow \text{norm}(x + \text{feed\_forward}(x))

    or, with ``pre_norm``, each norm at the block's entry and one at the end.

    Args:
        vocab, embed, hidden, layers, heads, pre_norm, options: as of
            :class:`~fasttransformer.models.Encoder`.
        cross_attention: False leaves the middle block out, for a language model.

    Called with strings, lists of ids or a padded tensor of ids (B, L), and an
    :class:`~fasttransformer.models.encoder.EncoderOutput` of as many texts; returns an
    EncoderOutput of its own, (tokens, embed) in the parameters' dtype.

    Raises:
        ValueError: an option out of range; an empty batch; an id outside the vocabulary; a memory
            of another number of texts.

    Source: Vaswani et al., 2017 (arXiv:1706.03762).

    >>> from fasttransformer.models import Encoder
    >>> memory = Encoder(260, 32, 64, 2, 4)(["source", "other source"])
    >>> Decoder(260, 32, 64, 2, 4)(["one", "two"], memory).hidden.shape  # <s> before each
    torch.Size([8, 32])
    """

    def __init__(
        self,
        vocab: int,
        embed: int,
        hidden: int,
        layers: int,
        heads: int,
        pre_norm: bool = False,
        *,
        cross_attention: bool = True,
        **options: Any,
    ) -> None:
        config = stack_config(vocab, embed, hidden, layers, heads, pre_norm, options)
        super().__init__(config, is_causal=True, cross=cross_attention)
        self.cross_attention = cross_attention

    @classmethod
    def from_config(cls, config: TransformerConfig, *, cross_attention: bool = True) -> Decoder:
        return cls(**_arguments(config), cross_attention=cross_attention)

    def configs(self) -> dict[str, TransformerConfig]:
        return {"cross" if self.cross_attention else "config": self.config}

    @classmethod
    def from_configs(cls, configs: dict[str, TransformerConfig]) -> Decoder:
        ((name, config),) = configs.items()
        return cls.from_config(config, cross_attention=name == "cross")

    def forward(
        self,
        target: Texts,
        memory: EncoderOutput | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Padding is what ``attention_mask`` (B, L), ``lengths`` (B,) or the pad id say."""
        batch = self.packed(
            "target", target, self.config, bos=True, eos=False, lengths=lengths,
            attention_mask=attention_mask,
        )  # fmt: skip
        if memory is None:
            if self.cross_attention:
                raise ValueError("Decoder: memory is missing; this decoder attends to it")
            return EncoderOutput(self.run(batch), batch)
        if len(memory.batch) != len(batch):
            raise ValueError(
                f"Decoder: target has {len(batch)} texts, but memory has {len(memory.batch)}"
            )
        return EncoderOutput(self.run(batch, memory.hidden, memory.batch), batch)
