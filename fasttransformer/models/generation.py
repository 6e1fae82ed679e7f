"""Text from a model: greedy, beam search, sampling; in batches, or as a stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn._plain import plain_part
from ..nn.lm_head import HEADS
from .beam_search import beam_search
from .decoding import State, decoding_state
from .modes import evaluating
from .packing import PackedBatch, from_lengths
from .pretrained import Texts
from .sampling import Draws, OutputLayer, SamplingOptions, check_finite, choose
from .transformers_call import as_tensor, resolved


class Generator:
    """What models that generate have: :meth:`generate` and :meth:`stream`."""

    _generation_config: Any = None

    @property
    def generation_config(self) -> Any:
        """transformers' GenerationConfig, which ``generate(input_ids=…)`` reads once there is one;
        transformers' Seq2SeqTrainer sets and reads it."""
        if self._generation_config is None:
            try:
                from transformers import GenerationConfig
            except ImportError as error:
                raise AttributeError("generation_config needs transformers") from error
            self._generation_config = GenerationConfig()
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._generation_config = config

    @torch.no_grad()
    def generate(
        self,
        sources: Texts = None,
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        return_scores: bool = False,
        stop_tokens: Iterable[int] = (),
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        generation_config: Any = None,
        labels: Any = None,
        synced_gpus: bool = False,
    ) -> Any:
        r"""Generates a text for each source; of a language model, what follows each prompt.

        Strings are continued with the tokenizer's tokens, ids with any id of the vocabulary. Each
        step computes one token per live text from cached keys and values. A text does not
        depend on which others are in its batch, nor, when drawn, do its random numbers.

        Args:
            sources: strings (``""`` too), lists of ids or a padded tensor of ids (B, L).
            max_new_tokens: the most tokens of a text.
            num_beams: beams of a search for the likeliest text; 1 = greedy.
            do_sample: draws each token, :math:`p \propto \exp(\text{logit} / \text{temperature})`.
            temperature: positive; below 1 likely tokens become likelier.
            top_k: draws from the k likeliest tokens.
            top_p: draws from the fewest tokens that hold this much of the probability.
            repetition_penalty: divides positive logits of tokens that the text (and a prompt) has,
                multiplies negative ones.
            length_penalty: beams are compared by :math:`\log p / \text{length}^\text{penalty}`.
            return_scores: also return each text's score: that quotient for beams, else
                :math:`\log p` of its tokens.
            stop_tokens: ids that end a text, besides ``</s>``; they are not part of it.
            seed, generator: of the draws; torch's own generator unless given.
            batch_size: sources that are decoded together.
            input_ids, attention_mask: a padded tensor of ids by transformers' names; the result is
                then as transformers has it.
            max_length: with ``input_ids``, in place of ``max_new_tokens``, with what the decoder
                starts with.
            generation_config: with ``input_ids``, a transformers' GenerationConfig, in place of all
                options above (the model's own ``generation_config``, if it was given one).
            labels, synced_gpus: what Seq2SeqTrainer gives as well; not read.

        Returns:
            A list of strings, or of lists of ids where the sources are ids; one string for one
            string. With ``return_scores`` (texts, scores). With ``input_ids`` a padded tensor of
            ids, after the start token (of a language model, the prompt).

        Raises:
            ValueError: an option out of range; beams with sampling; more tokens than a learned
                position table has; logits that are NaN or infinite.

        >>> from fasttransformer.models import Decoder, Encoder, Seq2SeqModel
        >>> model = Seq2SeqModel(Encoder(260, 32, 64, 1, 4), Decoder(260, 32, 64, 1, 4))
        >>> texts, scores = model.generate(["a", "", "b"], max_new_tokens=4, return_scores=True)
        >>> len(texts), all(score < 0.0 for score in scores)
        (3, True)
        """
        if sources is None and input_ids is not None:
            given = {
                "num_beams": num_beams, "do_sample": do_sample, "temperature": temperature,
                "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
                "length_penalty": length_penalty, "max_new_tokens": max_new_tokens,
                "max_length": max_length,
            }  # fmt: skip
            chosen = resolved(self, input_ids, generation_config, given)
            rows = self.generate(
                input_ids, **chosen, attention_mask=attention_mask, return_scores=return_scores,
                stop_tokens=stop_tokens, seed=seed, generator=generator, batch_size=batch_size,
            )  # fmt: skip
            rows, *more = rows if return_scores else (rows,)
            ids = as_tensor(self, input_ids, rows, chosen["max_new_tokens"])
            return (ids, *more) if return_scores else ids
        if max_length is not None or generation_config is not None:
            raise ValueError("generate: max_length and generation_config go with input_ids")
        options = SamplingOptions(do_sample, temperature, top_k, top_p, repetition_penalty)
        max_new_tokens = _check(sources, max_new_tokens, num_beams, do_sample, batch_size)
        one = isinstance(sources, str)
        if not one and len(sources) == 0:
            return ([], []) if return_scores else []
        with evaluating(self):  # type: ignore[arg-type]
            batch = self._prompts(sources, attention_mask)
            self._check_room(batch, max_new_tokens)
            stops = frozenset((self.config.eos_id, *stop_tokens))  # type: ignore[attr-defined]
            head = self._output_layer(sources)
            draws = Draws(len(batch), seed, generator) if do_sample else None
            found: list[Any] = [None] * len(batch)
            # Sources of one length side by side: less of each batch's keys is padding.
            order = sorted(range(len(batch)), key=lambda i: -batch.lengths[i])
            for first in range(0, len(order), batch_size):
                members = order[first : first + batch_size]
                part = _selected(batch, members)
                if num_beams > 1:
                    results = self._beams(
                        head, part, members, num_beams, max_new_tokens, stops, options,
                        length_penalty,
                    )  # fmt: skip
                else:
                    results = self._texts(
                        head, part, members, max_new_tokens, stops, options, draws
                    )
                for i, result in zip(members, results):
                    found[i] = result
        texts: Any = [tokens for tokens, _ in found]
        if _are_strings(sources):
            texts = self.tokenizer.decode(texts) if texts else []  # type: ignore[attr-defined]
        scores: Any = [score for _, score in found]
        if one:
            texts, scores = texts[0], scores[0]
        return (texts, scores) if return_scores else texts

    def stream(
        self,
        source: str,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: Iterable[int] = (),
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """:meth:`generate`'s text of one source, in pieces as they are made.

        Pieces are whole characters; joined, they are :meth:`generate`'s text.

        >>> from fasttransformer.models import LanguageModel
        >>> model = LanguageModel(260, 32, 64, 1, 4)
        >>> text = model.generate("once", max_new_tokens=5)
        >>> "".join(model.stream("once", max_new_tokens=5)) == text
        True
        """
        options = SamplingOptions(do_sample, temperature, top_k, top_p, repetition_penalty)
        if not isinstance(source, str):
            raise TypeError(f"stream: source must be a string, got {type(source).__name__}")
        _check(source, max_new_tokens, 1, do_sample, 1)
        with torch.no_grad(), evaluating(self):  # type: ignore[arg-type]
            batch = self._prompts(source, None)
        self._check_room(batch, max_new_tokens)
        stops = frozenset((self.config.eos_id, *stop_tokens))  # type: ignore[attr-defined]
        head = self._output_layer(source)
        draws = Draws(1, seed, generator) if do_sample else None
        steps = self._steps(head, batch, [0], max_new_tokens, stops, options, draws)
        return self.tokenizer.decode_stream(self._paused(steps))  # type: ignore[attr-defined]

    def _paused(self, steps: Iterator[Any]) -> Iterator[int]:
        """Tokens of a stream. Between them its reader may train the model, or need gradients."""
        while True:
            with torch.no_grad(), evaluating(self):  # type: ignore[arg-type]
                step = next(steps, None)
            if step is None:
                return
            for _, token, _ in step:
                if token is not None:
                    yield token

    # ---- running ------------------------------------------------------------------------------

    def _prompts(self, sources: Texts, attention_mask: Tensor | None) -> PackedBatch:
        """The sources as ids: an encoder's, or what a language model has read."""
        model: Any = self
        encoder = getattr(model, "encoder", None)
        if encoder is not None:
            return model.packed("sources", sources, encoder.config, attention_mask=attention_mask)
        batch = model.packed("sources", sources, model.config, bos=True, eos=False,
                             attention_mask=attention_mask)  # fmt: skip
        if 0 in batch.lengths:
            raise ValueError(
                f"generate: prompt {batch.lengths.index(0)} has no tokens; it must have one or more"
            )
        return batch

    def _check_room(self, batch: PackedBatch, max_new_tokens: int) -> None:
        model: Any = self
        if model.config.positions != "learned":
            return
        read = 1 if getattr(model, "encoder", None) is not None else batch.max_seqlen
        if read - 1 + max_new_tokens > model.config.max_length:
            raise ValueError(
                f"generate: {read} tokens and {max_new_tokens} new ones exceed the learned "
                f"positions, max_length {model.config.max_length}"
            )

    def _output_layer(self, sources: Texts) -> OutputLayer:
        """All ids for ids, the tokenizer's for strings."""
        model: Any = self
        head = model.lm_head
        strings = _are_strings(sources)
        size = model.tokenizer.vocab_size if strings else model.config.vocab_size
        if not plain_part(head, HEADS):
            return OutputLayer(size, None, None, head)
        weight, bias = head.weight, head.bias
        if strings:
            weight, bias = weight[:size], None if bias is None else bias[:size]
        return OutputLayer(weight.shape[0], weight, bias, head)

    def _start(
        self, head: OutputLayer, batch: PackedBatch, beams: int, options: SamplingOptions
    ) -> tuple[State, Tensor, Tensor | None]:
        """The state after all that is known but its newest token, (sources,); what was seen."""
        model: Any = self
        count, device = len(batch), batch.ids.device
        encoder = getattr(model, "encoder", None)
        if encoder is not None:
            state = decoding_state(model.decoder, count, beams, memory=encoder(batch))
            newest = torch.full((count,), model.config.bos_id, device=device)
            known = [[model.config.bos_id]] * count
        else:
            rows = batch.ids.split(batch.lengths)
            prompt = from_lengths(
                torch.cat([row[:-1] for row in rows]), [n - 1 for n in batch.lengths]
            )
            state = decoding_state(model.decoder, count, beams, prompt=prompt)
            newest = torch.stack([row[-1] for row in rows])
            known = [row.tolist() for row in rows] if options.penalized else []
        seen = None
        if options.penalized:
            shape = (count, head.size)
            seen = torch.zeros(shape, dtype=torch.bool, device=device)
            for row, tokens in zip(seen, known):
                row[tokens] = True
        return state, newest, seen

    def _beams(
        self,
        head: OutputLayer,
        batch: PackedBatch,
        members: list[int],
        beams: int,
        max_new_tokens: int,
        stops: frozenset[int],
        options: SamplingOptions,
        length_penalty: float,
    ) -> list[tuple[list[int], float]]:
        if max_new_tokens == 0:
            return [([], 0.0)] * len(batch)
        state, newest, seen = self._start(head, batch, beams, options)
        return beam_search(
            head, state, newest, max_new_tokens, stops, options, length_penalty, seen, members
        )

    def _texts(
        self,
        head: OutputLayer,
        batch: PackedBatch,
        members: list[int],
        max_new_tokens: int,
        stops: frozenset[int],
        options: SamplingOptions,
        draws: Draws | None,
    ) -> list[tuple[list[int], float]]:
        texts: list[list[int]] = [[] for _ in members]
        scores = [0.0] * len(members)
        for step in self._steps(head, batch, members, max_new_tokens, stops, options, draws):
            for source, token, probability in step:
                scores[source] += math.log(probability) if probability > 0.0 else -math.inf
                if token is not None:
                    texts[source].append(token)
        return list(zip(texts, scores))

    def _steps(
        self,
        head: OutputLayer,
        batch: PackedBatch,
        members: list[int],
        max_new_tokens: int,
        stops: frozenset[int],
        options: SamplingOptions,
        draws: Draws | None,
    ) -> Iterator[list[tuple[int, int | None, float]]]:
        """For each step (source, token or None at its end, probability) of all live sources."""
        if max_new_tokens == 0:
            return
        state, ids, seen = self._start(head, batch, 1, options)
        live = list(range(len(batch)))
        for length in range(1, max_new_tokens + 1):
            hidden = state.step(ids)
            uniform = None if draws is None else draws.next([members[source] for source in live])
            ids, probabilities = choose(head, hidden, options, seen, uniform)
            tokens, found = ids.tolist(), probabilities.tolist()
            check_finite("generate", found, [members[source] for source in live])
            yield [
                (source, None if token in stops else token, probability)
                for source, token, probability in zip(live, tokens, found)
            ]
            if length == max_new_tokens:
                return
            kept = [place for place, token in enumerate(tokens) if token not in stops]
            if not kept:
                return
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            if len(kept) < len(live):
                order = state.keep(kept)
                live = [live[place] for place in order]
                rows = torch.tensor(order, device=ids.device)
                ids = ids[rows]
                seen = None if seen is None else seen[rows]


def _are_strings(sources: Texts) -> bool:
    return isinstance(sources, str) or (
        not isinstance(sources, Tensor) and isinstance(sources[0], str)
    )


def _selected(batch: PackedBatch, members: Sequence[int]) -> PackedBatch:
    rows = batch.ids.split(batch.lengths)
    return from_lengths(torch.cat([rows[i] for i in members]), [batch.lengths[i] for i in members])


def _check(
    sources: Texts, max_new_tokens: int | None, num_beams: int, do_sample: bool, batch_size: int
) -> int:
    """max_new_tokens, which must be given."""
    if sources is None:
        raise ValueError("generate: sources must be given")
    if max_new_tokens is None:
        raise ValueError("generate: max_new_tokens must be given")
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("num_beams", num_beams, 1),
        ("batch_size", batch_size, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"generate: {name} is {value!r}; it must be an integer, {least} or more"
            )
    if num_beams > 1 and do_sample:
        raise ValueError("generate: do_sample draws one text; it excludes num_beams")
    return max_new_tokens
