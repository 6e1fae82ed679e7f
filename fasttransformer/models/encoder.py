"""The encoder: embedding with positions, layers, and a final norm if norms come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import LayerNorm, TokenPositionEmbedding
from .config import TransformerConfig
from .initialization import start_layers
from .layers import Layer
from .packing import PackedBatch
from .pretrained import TextModel, Texts


def stack_config(
    vocab: int, embed: int, hidden: int, layers: int, heads: int, pre_norm: bool, options: Any
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab, embed_dim=embed, hidden_dim=hidden, num_layers=layers, num_heads=heads,
        pre_norm=pre_norm, **options,
    )  # fmt: skip


class Stack(TextModel):
    """What encoder and decoder share: the token embedding, the layers, the final norm."""

    def __init__(self, config: TransformerConfig, *, is_causal: bool, cross: bool) -> None:
        super().__init__()
        self.config = config
        added = config.positions if config.positions in ("sinusoidal", "learned") else None
        self.embedding = TokenPositionEmbedding(
            config.vocab_size,
            config.embed_dim,
            positions=added,
            max_length=config.max_length,
            padding_idx=config.pad_id,
            dropout=config.dropout,
        )
        self.layers = nn.ModuleList(
            Layer(config, is_causal=is_causal, cross=cross) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(config.embed_dim, config.norm_eps) if config.pre_norm else None
        start_layers(self.layers)

    def configs(self) -> dict[str, TransformerConfig]:
        return {"config": self.config}

    def run(
        self,
        batch: PackedBatch,
        memory: Tensor | None = None,
        source: PackedBatch | None = None,
        kept: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """(tokens, embed_dim) of a packed batch, which with a memory has a packed source; ``kept``
        gets each layer's keys and values of self-attention."""
        normed = summed = self.embedding(batch.ids, batch.positions)
        norms = self.next_norms()
        first = self.first_norm()
        if first is not None:
            normed = first(summed)
        every, options = self._checkpointing or (0, {})
        if not (every and self.training and torch.is_grad_enabled() and kept is None):
            every = 0
        for i, (layer, next_norm) in enumerate(zip(self.layers, norms)):
            inputs = (normed, summed, batch, next_norm, memory, source, kept)
            if every and i % every == 0:
                normed, summed = checkpoint(layer, *inputs, **options)
            else:
                normed, summed = layer(*inputs)
        return normed

    def first_norm(self) -> Any:
        """The norm at the entry of the first block, None where norms come last."""
        return None if self.norm is None else [*(x.norm1 for x in self.layers), self.norm][0]

    def next_norms(self) -> list[Any]:
        """For each layer the norm at the entry of what follows it, None where norms come last."""
        if self.norm is None:
            return [None] * len(self.layers)
        return [*(layer.norm1 for layer in self.layers[1:]), self.norm]


@dataclass
class EncoderOutput:
    """The encoded texts.

    Attributes:
        hidden: (tokens, embed_dim), packed.
        batch: where each text's tokens are.
    """

    hidden: Tensor
    batch: PackedBatch

    def padded(self) -> Tensor:
        """(batch, length, embed_dim), 0 past each text's end."""
        return self.batch.padded(self.hidden)

    @property
    def lengths(self) -> list[int]:
        return self.batch.lengths


class Encoder(Stack):
    r"""Transformer encoder over text, computed on real tokens alone.

    .. math:: x \leftarrow \text{norm}(x + \text{attention}(x)), \qquad
        x \leftarrow \text{norm}(x + \text{feed\_forward}(x))

    or, with ``pre_norm``, each norm at the block's entry and one at the end.

    Args:
        vocab: number of token ids.
        embed: features of a token.
        hidden: features inside the feed-forward block.
        layers, heads: their numbers; heads divide ``embed``.
        pre_norm: norms come first.
        options: the other fields of :class:`TransformerConfig`.

    Called with strings, lists of ids or a padded tensor of ids (B, L); returns an
    :class:`EncoderOutput` with ``hidden`` (tokens, embed) in the parameters' dtype.

    Raises:
        ValueError: an option out of range; an empty batch; an id outside the vocabulary.

    Source: Vaswani et al., 2017 (arXiv:1706.03762).

    >>> encoder = Encoder(260, 32, 64, 2, 4).eval()
    >>> encoder(["one", "", "twenty"]).padded().shape  # each text ends with </s>
    torch.Size([3, 7, 32])
    """

    def __init__(
        self,
        vocab: int,
        embed: int,
        hidden: int,
        layers: int,
        heads: int,
        pre_norm: bool = False,
        **options: Any,
    ) -> None:
        config = stack_config(vocab, embed, hidden, layers, heads, pre_norm, options)
        super().__init__(config, is_causal=False, cross=False)

    @classmethod
    def from_config(cls, config: TransformerConfig) -> Encoder:
        return cls(**_arguments(config))

    @classmethod
    def from_configs(cls, configs: dict[str, TransformerConfig]) -> Encoder:
        return cls.from_config(configs["config"])

    def forward(
        self,
        source: Texts,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Padding is what ``attention_mask`` (B, L), ``lengths`` (B,) or the pad id say."""
        batch = self.packed(
            "source", source, self.config, lengths=lengths, attention_mask=attention_mask
        )
        return EncoderOutput(self.run(batch), batch)


def _arguments(config: TransformerConfig) -> dict[str, Any]:
    """A config as the constructors' arguments."""
    options = config.to_dict()
    names = {"vocab_size": "vocab", "embed_dim": "embed", "hidden_dim": "hidden",
             "num_layers": "layers", "num_heads": "heads"}  # fmt: skip
    return {names.get(name, name): value for name, value in options.items()}
