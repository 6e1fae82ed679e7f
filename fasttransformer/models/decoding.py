"""The state of decoding: a cache of each row's keys and values, and one step for all rows.

A step computes one token per row. Keys and values of self-attention are appended to a
:class:`fasttransformer.KVCache`; those of the source are computed once. The beams of a source are
queries of one attention over its keys, which are therefore stored once per source. Rows that are
done leave: the last rows move into their places, so that a step costs what its live rows cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import RotaryEmbedding
from ..ops import KVCache
from ..ops.attention import attention
from ..ops.attention_decode import attention_decode
from ..ops.embedding import embedding
from ..ops.layer_norm import layer_norm
from ..ops.linear_add import linear_add
from ..ops.linear_add_layer_norm import linear_add_layer_norm
from .encoder import EncoderOutput, Stack
from .layers import Layer, alibi_slopes
from .packing import PackedBatch

#: Positions that a cache starts with; it doubles when it is full.
FIRST_CAPACITY = 32


class _LayerWeights:
    """What a step reads of a layer: attributes of modules cost more than a look-up is worth when a
    layer's whole step takes 50 µs."""

    __slots__ = ("activation", "cross", "eps", "feed_forward", "hidden", "norms", "self_in",
                 "self_out")  # fmt: skip

    def __init__(self, layer: Layer, next_norm: Any) -> None:
        def linear(module: Any) -> tuple[Tensor, Tensor]:
            return module.weight, module.bias

        cross = layer.cross_attn
        norms = [layer.norm1, layer.norm2, layer.norm3] if cross else [layer.norm1, layer.norm3]
        if layer.pre_norm:
            norms = [*norms[1:], next_norm]
        self.norms = [linear(norm) for norm in norms]
        self.eps = layer.norm1.eps
        self.self_in = linear(layer.self_attn.in_proj)
        self.self_out = linear(layer.self_attn.out_proj)
        self.cross = (linear(cross.q_proj), linear(cross.out_proj)) if cross else None
        self.hidden = layer.feed_forward.hidden
        self.feed_forward = linear(layer.feed_forward.linear2)


class DecodingState:
    """Rows of a decoder, each with its cache: ``beams`` rows for each source.

    Args:
        decoder: the stack.
        sources: number of sources.
        beams: rows of each.
        memory: the encoder's output for the sources; None for a language model.
        prompt: what each source's rows have read already; None = nothing.
    """

    def __init__(
        self,
        decoder: Stack,
        sources: int,
        beams: int = 1,
        memory: EncoderOutput | None = None,
        prompt: PackedBatch | None = None,
    ) -> None:
        config = decoder.config
        self.decoder, self.beams, self.sources = decoder, beams, sources
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.pre_norm = config.pre_norm
        self.first_norm = decoder.first_norm()
        self.layers = [
            _LayerWeights(layer, norm)  # type: ignore[arg-type]
            for layer, norm in zip(decoder.layers, decoder.next_norms())
        ]
        table = decoder.embedding
        self.weight, self.position_weight = table.weight, table.position_weight
        self.scale, self.sinusoidal = table.scale, table.positions == "sinusoidal"
        self.placed = table.positions is not None
        device, dtype = self.weight.device, self.weight.dtype
        self.slopes = alibi_slopes(self.heads, device) if config.positions == "alibi" else None
        self.rotary: RotaryEmbedding | None = None
        for layer in decoder.layers[:1]:
            self.rotary = layer.self_attn.rotary  # type: ignore[assignment, union-attr]
        self.longest = 0 if prompt is None else prompt.max_seqlen
        self.cache = KVCache.allocate(
            len(self.layers), sources * beams, self.heads,
            max(FIRST_CAPACITY, 2 * self.longest), self.head_dim, dtype=dtype, device=device,
        )  # fmt: skip
        self.memory_keys: list[tuple[Tensor, Tensor]] = []
        self.memory_lengths: Tensor | None = None
        if memory is not None:
            self._read(memory)
        if prompt is not None and prompt.ids.numel():
            self._prefill(prompt)

    def _read(self, memory: EncoderOutput) -> None:
        self.memory_lengths = memory.batch.lengths_tensor()
        layer: Any
        for layer in self.decoder.layers:
            parts = layer.cross_attn.keys_values(memory.hidden)
            self.memory_keys.append(
                tuple(memory.batch.padded(x).transpose(1, 2).contiguous() for x in parts)  # type: ignore[arg-type]
            )

    def _prefill(self, prompt: PackedBatch) -> None:
        """All prompts in one packed pass, whose keys and values go into each of a source's rows."""
        kept: list[tuple[Tensor, Tensor]] = []
        self.decoder.run(prompt, kept=kept)
        source = torch.repeat_interleave(
            torch.arange(self.sources, device=prompt.ids.device), prompt.lengths_tensor()
        )
        rows = source[:, None] * self.beams + torch.arange(self.beams, device=source.device)
        place = prompt.positions[:, None]
        for layer, (key, value) in enumerate(kept):
            self.cache.keys[layer][rows, :, place] = key[:, None]
            self.cache.values[layer][rows, :, place] = value[:, None]
        self.cache.lengths[:] = prompt.lengths_tensor().repeat_interleave(self.beams)

    def step(self, ids: Tensor) -> Tensor:
        """(rows,) ids of the newest tokens to (rows, embed_dim), the decoder's output for them."""
        rows, heads, head_dim = ids.shape[0], self.heads, self.head_dim
        cache = self.cache
        if self.longest == cache.capacity:
            cache = self._grow()
        tables = None if self.rotary is None else self.rotary.tables(cache.capacity, ids.device)
        x = embedding(
            ids, self.weight,
            positions=cache.lengths[0] if self.placed else None,
            position_weight=self.position_weight, sinusoidal=self.sinusoidal, scale=self.scale,
        )  # fmt: skip
        normed = summed = x
        if self.pre_norm:
            norm: Any = self.first_norm
            normed = layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        for i, layer in enumerate(self.layers):
            query, key, value = (
                linear_add(normed, *layer.self_in).view(rows, 3, heads, 1, head_dim).unbind(1)
            )
            context = attention_decode(
                query, cache, layer=i, new_key=key, new_value=value, rotary=tables,
                alibi_slopes=self.slopes,
            )  # fmt: skip
            normed, summed = self._end(context.reshape(rows, -1), layer, layer.self_out, summed, 0)
            if layer.cross is not None:
                to_query, out = layer.cross
                query = linear_add(normed, *to_query)
                keys, values = self.memory_keys[i]
                context = attention(
                    query.view(self.sources, self.beams, heads, head_dim).transpose(1, 2),
                    keys, values, key_lengths=self.memory_lengths,
                )  # fmt: skip
                context = context.transpose(1, 2).reshape(rows, -1)
                normed, summed = self._end(context, layer, out, summed, 1)
            normed, summed = self._end(layer.hidden(normed), layer, layer.feed_forward, summed, -1)
        self.longest += 1
        return normed

    def _end(
        self, x: Tensor, layer: _LayerWeights, linear: tuple[Tensor, Tensor], summed: Tensor, i: int
    ) -> tuple[Tensor, Tensor]:
        weight, bias = layer.norms[i]
        if self.pre_norm:
            return linear_add_layer_norm(x, *linear, summed, weight, bias, layer.eps)
        normed = linear_add_layer_norm(
            x, *linear, summed, weight, bias, layer.eps, return_sum=False
        )
        return normed, normed

    def _grow(self) -> KVCache:
        old = self.cache
        layers, rows, heads, capacity, head_dim = old.keys.shape
        self.cache = KVCache.allocate(
            layers, rows, heads, 2 * capacity, head_dim, dtype=old.keys.dtype,
            device=old.keys.device,
        )  # fmt: skip
        self.cache.keys[:, :, :, :capacity] = old.keys
        self.cache.values[:, :, :, :capacity] = old.values
        self.cache.lengths[:] = old.lengths
        return self.cache

    def reorder(self, parents: Tensor) -> None:
        """Row i goes on with the cache of row ``parents[i]``; only rows that change are copied."""
        changed = (parents != torch.arange(len(parents), device=parents.device)).nonzero()[:, 0]
        self._copy(changed, parents[changed])

    def keep(self, sources: list[int]) -> list[int]:
        """Drops the other sources' rows; returns which source stands in each place afterwards."""
        count = len(sources)
        order = list(range(count))
        moved = [source for source in sources if source >= count]
        staying = set(sources)
        holes = [place for place in range(count) if place not in staying]
        for hole, source in zip(holes, moved):
            order[hole] = source
        device = self.weight.device
        to, of = torch.tensor(holes, device=device), torch.tensor(moved, device=device)
        if holes:
            beam = torch.arange(self.beams, device=device)
            self._copy((to[:, None] * self.beams + beam).flatten(),
                       (of[:, None] * self.beams + beam).flatten())  # fmt: skip
        rows = count * self.beams
        cache = self.cache
        self.cache = KVCache(cache.keys[:, :rows], cache.values[:, :rows], cache.lengths[:, :rows])
        if self.memory_lengths is not None:
            for part in (self.memory_lengths, *(x for pair in self.memory_keys for x in pair)):
                if holes:
                    part[to] = part[of]
            self.memory_lengths = self.memory_lengths[:count]
            self.memory_keys = [(k[:count], v[:count]) for k, v in self.memory_keys]
        self.sources = count
        return order

    def _copy(self, to: Tensor, of: Tensor) -> None:
        if not to.numel():
            return
        for part in (self.cache.keys, self.cache.values):
            filled = part[:, :, :, : self.longest]
            filled[:, to] = filled[:, of]
        self.cache.lengths[:, to] = self.cache.lengths[:, of]
