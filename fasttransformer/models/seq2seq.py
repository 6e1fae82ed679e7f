"""Encoder and decoder with an output layer: summarization, translation, question answering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import LMHead
from ..nn.lm_head import head_loss
from .config import TransformerConfig
from .decoder import Decoder
from .encoder import Encoder, EncoderOutput
from .generation import Generator
from .initialization import start_output_layer
from .outputs import TextOutput
from .packing import IGNORED, PackedBatch, from_lengths, pack_padded
from .pretrained import TextModel, Texts


class Seq2SeqModel(Generator, TextModel):
    r"""A Transformer from text to text.

    .. math:: L = -\frac{1}{N} \sum_n \log \text{softmax}(h_n W^\top)_{y_n}

    over the N real target tokens; h is the decoder's output for the target shifted right by one
    place, with ``<s>`` first. The loss comes from :func:`fasttransformer.linear_cross_entropy`,
    which never stores the logits.

    Args:
        src_encoder, tgt_decoder: the two stacks.
        tgt_vocab, embed, hidden: those of the stacks, or None; they are only checked.
        num_layers: layers of both stacks together, or of each; checked too.
        tie_embeddings, share_embeddings, label_smoothing: in place of the decoder's config.

    Called with (source, target): strings, lists of ids, or padded tensors of ids (B, L), in which a
    target row holds what is to be predicted, the end token included; returns a
    :class:`~fasttransformer.models.outputs.TextOutput`. transformers' Trainer calls it by
    ``input_ids``, ``attention_mask`` and ``labels`` (−100 is not predicted).

    Raises:
        ValueError: stacks that don't fit each other or the sizes given; an empty batch; a source
            and a target of different numbers of texts; an id outside the vocabulary.

    Source: Vaswani et al., 2017 (arXiv:1706.03762).

    >>> model = Seq2SeqModel(Encoder(260, 32, 64, 1, 4), Decoder(260, 32, 64, 1, 4), 260, 32, 64, 2)
    >>> outputs = model(["a source", "another"], ["a target", "other"])
    >>> outputs.loss.backward()
    >>> outputs.num_tokens, outputs.logits.shape
    (15, torch.Size([2, 9, 260]))
    """

    #: transformers' Trainer gives the number of a step's tokens to the call.
    accepts_loss_kwargs = True

    def __init__(
        self,
        src_encoder: Encoder,
        tgt_decoder: Decoder,
        tgt_vocab: int | None = None,
        embed: int | None = None,
        hidden: int | None = None,
        num_layers: int | None = None,
        *,
        tie_embeddings: bool | None = None,
        share_embeddings: bool | None = None,
        label_smoothing: float | None = None,
    ) -> None:
        super().__init__()
        source, target = src_encoder.config, tgt_decoder.config
        _check_stacks(source, tgt_decoder, tgt_vocab, embed, hidden, num_layers)
        options = {"tie_embeddings": tie_embeddings, "share_embeddings": share_embeddings,
                   "label_smoothing": label_smoothing}  # fmt: skip
        changes = {name: value for name, value in options.items() if value is not None}
        tgt_decoder.config = self.config = target.replace(**changes)
        if self.config.share_embeddings and source.vocab_size != target.vocab_size:
            raise ValueError(
                f"Seq2SeqModel: share_embeddings needs one vocabulary; the encoder has "
                f"{source.vocab_size}, the decoder {target.vocab_size}"
            )
        self.encoder, self.decoder = src_encoder, tgt_decoder
        self.lm_head = LMHead(target.embed_dim, target.vocab_size)
        start_output_layer(self.lm_head)
        self._tie()

    def configs(self) -> dict[str, TransformerConfig]:
        return {"encoder": self.encoder.config, "decoder": self.config}

    @classmethod
    def from_configs(cls, configs: dict[str, TransformerConfig]) -> Seq2SeqModel:
        decoder = Decoder.from_config(configs["decoder"])
        return cls(Encoder.from_config(configs["encoder"]), decoder)

    def tied(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        if self.config.share_embeddings:
            pairs.append((self.decoder.embedding, self.encoder.embedding))
        if self.config.tie_embeddings:
            pairs.append((self.decoder.embedding, self.lm_head))
        return pairs

    def forward(
        self,
        source: Texts = None,
        target: Texts = None,
        *,
        source_lengths: Tensor | Sequence[int] | None = None,
        target_lengths: Tensor | Sequence[int] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Texts = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TextOutput:
        """Loss and logits. ``num_items_in_batch`` divides the sum of the losses in place of the
        number of real target tokens. Without a target ``decoder_input_ids``, which
        :meth:`prepare_decoder_input_ids_from_labels` makes, are what the decoder reads; there is no
        loss then."""
        source = input_ids if source is None else source
        target = labels if target is None else target
        if source is None or (target is None and decoder_input_ids is None):
            raise ValueError(
                "Seq2SeqModel: source and target must be given, or input_ids with labels or "
                "decoder_input_ids. transformers' Trainer takes the labels away with "
                "label_smoothing_factor and compute_loss_func; a batch must have decoder_input_ids "
                "then, which DataCollatorForSeq2Seq(tokenizer, model) adds (or set label_smoothing "
                "in the model's config)"
            )
        memory = self.encode(source, lengths=source_lengths, attention_mask=attention_mask)
        if target is None:
            return self._unlabelled(decoder_input_ids, memory)
        if decoder_input_ids is not None:
            self._check_shifted(decoder_input_ids, target)
        batch, labels_ids = self._targets(target, target_lengths)
        if len(batch) != len(memory.batch):
            raise ValueError(
                f"Seq2SeqModel: source has {len(memory.batch)} texts, but target has {len(batch)}"
            )
        hidden = self.decoder(batch, memory).hidden
        return self._output(hidden, labels_ids, batch, num_items_in_batch)

    def encode(self, source: Texts, **padding: Any) -> EncoderOutput:
        """The encoder's output for a batch of sources."""
        return self.encoder(self.packed("source", source, self.encoder.config, **padding))

    def _targets(self, target: Texts, lengths: Any) -> tuple[PackedBatch, Tensor]:
        """What the decoder reads, and what it is to predict from it, (tokens,) each."""
        if isinstance(target, Tensor) and target.dim() == 2 and lengths is None:
            # Of -100 only what stands at the end is padding; one in between is read as a pad token.
            ignored = target == IGNORED
            ids = torch.where(ignored, self.config.pad_id, target).to(self.device)
            labels = pack_padded("target", ids, pad_id=self.config.pad_id)
            skipped = pack_padded("target", ignored.to(self.device).long(), lengths=labels.lengths)
            wanted = torch.where(skipped.ids != 0, IGNORED, labels.ids)
        else:
            labels = self.packed("target", target, self.config, lengths=lengths)
            wanted = labels.ids
        shifted = labels.ids.roll(1)
        starts = labels.cu_seqlens[:-1][labels.cu_seqlens.diff() > 0].long()
        shifted[starts] = self.config.bos_id
        return from_lengths(shifted, labels.lengths), wanted

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """``labels`` (B, L), in which −100 is padding, shifted right by one place with ``<s>``
        first: what transformers' DataCollatorForSeq2Seq puts next to them."""
        shifted = labels.roll(1, 1)
        shifted[:, :1] = self.config.bos_id
        return shifted.masked_fill(shifted == IGNORED, self.config.pad_id)

    def _check_shifted(self, ids: Tensor, labels: Any) -> None:
        """Raises unless the decoder is to read what it reads anyhow."""
        shifted = self.prepare_decoder_input_ids_from_labels(torch.as_tensor(labels))
        if ids.shape != shifted.shape or not torch.equal(ids, shifted.to(ids)):
            raise ValueError(
                "Seq2SeqModel: decoder_input_ids are not the labels shifted by one place; with "
                "labels the decoder reads nothing else"
            )

    def _unlabelled(self, ids: Any, memory: EncoderOutput) -> TextOutput:
        """The logits (B, L, vocabulary) for what the decoder reads (B, L)."""
        batch = self.packed("decoder_input_ids", ids, self.config)
        hidden = self.decoder(batch, memory).hidden
        width = ids.shape[-1] if isinstance(ids, Tensor) else batch.max_seqlen

        def logits(hidden: Tensor) -> Tensor:
            found = batch.padded(self.lm_head(hidden))
            return torch.nn.functional.pad(found, (0, 0, 0, width - found.shape[1]))

        return TextOutput(None, hidden, logits)

    def _output(
        self, hidden: Tensor, labels: Tensor, batch: PackedBatch, divisor: Any
    ) -> TextOutput:
        return language_model_output(self, hidden, labels, batch, divisor)


def language_model_output(
    model: Any, hidden: Tensor, labels: Tensor, batch: PackedBatch, divisor: Any
) -> TextOutput:
    """The loss of (tokens, features) against (tokens,) labels, of which −100 are left out before
    anything is computed for them."""
    kept = labels != IGNORED
    count = int(kept.sum())
    rows, wanted = (hidden, labels) if count == labels.numel() else (hidden[kept], labels[kept])
    smoothing = model.config.label_smoothing if model.training else 0.0
    if divisor is None and count:
        loss = head_loss(model.lm_head, rows, wanted, label_smoothing=smoothing)
    else:
        total = head_loss(model.lm_head, rows, wanted, reduction="sum", label_smoothing=smoothing)
        loss = total / (max(count, 1) if divisor is None else divisor)
    return TextOutput(
        loss, hidden, lambda h: batch.padded(model.lm_head(h)), count,
        max(count, 1) if divisor is None else divisor,
    )  # fmt: skip


def _check_stacks(
    source: TransformerConfig,
    decoder: Decoder,
    vocab: int | None,
    embed: int | None,
    hidden: int | None,
    num_layers: int | None,
) -> None:
    target = decoder.config
    if not decoder.cross_attention:
        raise ValueError("Seq2SeqModel: tgt_decoder has no cross-attention")
    if source.embed_dim != target.embed_dim:
        raise ValueError(
            f"Seq2SeqModel: src_encoder has embed {source.embed_dim}, but tgt_decoder has "
            f"{target.embed_dim}"
        )
    for name, given, own in (
        ("tgt_vocab", vocab, target.vocab_size),
        ("embed", embed, target.embed_dim),
        ("hidden", hidden, target.hidden_dim),
    ):
        if given is not None and given != own:
            raise ValueError(f"Seq2SeqModel: {name} is {given}, but tgt_decoder has {own}")
    layers = (source.num_layers, target.num_layers)
    allowed = {sum(layers)} | ({layers[0]} if layers[0] == layers[1] else set())
    if num_layers is not None and num_layers not in allowed:
        raise ValueError(
            f"Seq2SeqModel: num_layers is {num_layers}, but src_encoder has {layers[0]} layers "
            f"and tgt_decoder {layers[1]}; it must be their sum"
        )
