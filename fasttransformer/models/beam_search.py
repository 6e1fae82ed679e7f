"""Beam search: the likeliest texts, several kept for each source at every step.

Each step takes the 2k likeliest continuations of a source's k beams. Those that end are set aside
with their score, log p / length^penalty; the k best others go on. A source is done when it has k
ended texts and no beam can still beat the worst of them. Sources differ in when they are done;
nothing that one does affects another.

Sources: Sutskever, Vinyals and Le, 2014 (arXiv:1409.3215); the penalty's form is transformers'; the
stopping rule: Huang, Zhao and Ma, When to Finish?, 2017 (arXiv:1809.00069).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decoding import State
from .sampling import OutputLayer, SamplingOptions, check_finite, top_probabilities


@dataclass
class _Source:
    """One source's search."""

    index: int
    #: (token, parent) of each beam at each step, from which a text is read backwards
    steps: list[list[tuple[int, int]]] = field(default_factory=list)
    #: (score, tokens) that have ended, at most k
    ended: list[tuple[float, list[int]]] = field(default_factory=list)

    def text(self, beam: int) -> list[int]:
        tokens = []
        for step in reversed(self.steps):
            token, beam = step[beam]
            tokens.append(token)
        return tokens[::-1]

    def end(self, score: float, tokens: list[int], beams: int) -> None:
        self.ended.append((score, tokens))
        self.ended.sort(key=lambda entry: -entry[0])
        del self.ended[beams:]


def beam_search(
    head: OutputLayer,
    state: State,
    start: Tensor,
    max_new_tokens: int,
    stops: frozenset[int],
    options: SamplingOptions,
    length_penalty: float,
    seen: Tensor | None,
    numbers: list[int],
) -> list[tuple[list[int], float]]:
    """(tokens, score) of the best text of each source. ``start`` (sources,) is the newest token of
    each; ``seen`` (sources, vocabulary) or None; ``numbers`` name the sources in errors."""
    beams = state.beams
    live = [_Source(i) for i in range(state.sources)]
    everyone = list(live)
    ids = start.repeat_interleave(beams)
    if seen is not None:
        seen = seen.repeat_interleave(beams, 0)
    # All beams start equal: only the first may be continued at first.
    scores = torch.full((len(live), beams), -math.inf, device=start.device)
    scores[:, 0] = 0.0
    for length in range(1, max_new_tokens + 1):
        hidden = state.step(ids)
        values, indices = top_probabilities(head, hidden, 2 * beams, options, seen)
        width = values.shape[1]
        totals = (values.log() + scores.view(-1, 1)).reshape(len(live), -1)
        totals, places = totals.sort(dim=-1, descending=True, stable=True)
        totals, places = totals[:, : 2 * beams], places[:, : 2 * beams]
        tokens = indices.reshape(len(live), -1).gather(1, places).tolist()
        parents = torch.div(places, width, rounding_mode="floor").tolist()
        kept, next_ids, next_parents, next_scores = [], [], [], []
        rows = totals.tolist()
        # A NaN is the first of its row, as torch sorts.
        check_finite(
            "generate", [row[0] for row in rows], [numbers[source.index] for source in live]
        )
        for place, (source, row) in enumerate(zip(live, rows)):
            chosen = _advance(
                source, row, tokens[place], parents[place], beams, stops, length, length_penalty
            )
            if _done(source, chosen[0][2] if chosen else -math.inf, beams, length, length_penalty,
                     max_new_tokens):  # fmt: skip
                continue
            kept.append(place)
            source.steps.append([(token, parent) for token, parent, _ in chosen])
            next_ids.append([token for token, _, _ in chosen])
            next_parents.append([place * beams + parent for _, parent, _ in chosen])
            next_scores.append([score for _, _, score in chosen])
        if not kept or length == max_new_tokens:
            for source, row_scores in zip((live[place] for place in kept), next_scores):
                for beam, score in enumerate(row_scores):
                    if score == -math.inf:
                        continue
                    source.end(score / length**length_penalty, source.text(beam), beams)
            break
        device = start.device
        if len(kept) < len(live):
            order = state.keep(kept)
            at = {place: i for i, place in enumerate(kept)}
            new_place = {place: i for i, place in enumerate(order)}
            next_parents = [
                [new_place[place] * beams + parent % beams for parent in row]
                for place, row in zip(kept, next_parents)
            ]
            arranged = [at[place] for place in order]
            live = [live[place] for place in order]
            next_ids = [next_ids[i] for i in arranged]
            next_parents = [next_parents[i] for i in arranged]
            next_scores = [next_scores[i] for i in arranged]
            if seen is not None:
                seen = seen.view(-1, beams, seen.shape[1])[torch.tensor(order, device=device)]
                seen = seen.flatten(0, 1)
        parent_rows = torch.tensor(next_parents, device=device).flatten()
        ids = torch.tensor(next_ids, device=device).flatten()
        scores = torch.tensor(next_scores, device=device)
        state.reorder(parent_rows)
        if seen is not None:
            seen = seen[parent_rows].scatter(1, ids[:, None], True)
    return [
        (best[1], best[0])
        for best in (
            max(source.ended, key=lambda entry: entry[0], default=(-math.inf, []))
            for source in everyone
        )
    ]


def _advance(
    source: _Source,
    totals: list[float],
    tokens: list[int],
    parents: list[int],
    beams: int,
    stops: frozenset[int],
    length: int,
    penalty: float,
) -> list[tuple[int, int, float]]:
    """Sets ended candidates aside; the (token, parent, score) of those that go on, k of them."""
    chosen: list[tuple[int, int, float]] = []
    for rank, (total, token, parent) in enumerate(zip(totals, tokens, parents)):
        if token in stops:
            # An ending that is not among the k best would have had no beam of its own.
            if rank < beams and total > -math.inf:
                source.end(total / length**penalty, source.text(parent), beams)
        elif len(chosen) < beams:
            chosen.append((token, parent, total))
    while len(chosen) < beams:  # a vocabulary of few tokens: fill up with rows that are never best
        chosen.append((tokens[0], parents[0], -math.inf))
    return chosen


def _done(
    source: _Source, best: float, beams: int, length: int, penalty: float, longest: int
) -> bool:
    if best == -math.inf:
        return True
    if len(source.ended) < beams:
        return False
    # log p only falls; a positive penalty is kindest at the greatest length.
    reachable = best / (longest if penalty > 0.0 else length) ** penalty
    return source.ended[-1][0] >= reachable
