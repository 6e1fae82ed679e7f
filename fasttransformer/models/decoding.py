"""The state of decoding: a cache of each row's keys and values, and one step for all rows.

A step computes one token per row. Keys and values of self-attention are appended to a cache in
which the two lie beside each other, so that one copy writes both; those of the source are computed
once. The beams of a source are queries of one attention over its keys, which are therefore stored
once per source. Rows that are done leave: the last rows move into their places, so that a step
costs what its live rows cost.

What limits a step is reading the weights, and for small models the calls: about ten a layer. So
they are made by :class:`_Calls`, which asks for the kernels once; shapes do not change from step to
step, and the public functions' checks of them would cost more than the kernels' own time.

The calls read weights instead of calling modules. A linear layer or norm that has more to it than
its weights (an adapter, a hook) is called all the same; where that is so of a larger part, a state
without a cache runs the decoder's own forward pass over all tokens at each step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Kernel, choose
from ..nn import FeedForward, RotaryEmbedding, TokenPositionEmbedding
from ..nn._plain import plain_part
from ..nn.linear import LINEAR_FORWARDS
from ..nn.norms import LAYER_NORM_FORWARDS
from ..ops import KVCache
from ..ops._activation import CODES, activated
from ..ops._front import autocast_dtype
from ..ops.attention_decode import attention_decode
from ..ops.embedding import embedding
from ..ops.linear_add import ACTIVATIONS, linear_add
from ..ops.linear_add_layer_norm import linear_add_layer_norm
from ..ops.rotary_embedding import rotary_embedding
from .decoder import Decoder
from .encoder import EncoderOutput, Stack
from .layers import CrossAttention, Layer, SelfAttention, alibi_slopes
from .packing import PackedBatch, from_lengths, pack

#: Positions that a cache starts with; it doubles when it is full.
FIRST_CAPACITY = 32
#: A linear layer's weight and bias, or a layer that has to be called.
Linear = tuple[Tensor, Tensor] | nn.Module
#: A block's last linear layer and the norm after it, by weights (those of the norm with its eps),
#: or both as modules.
End = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, float]] | tuple[nn.Module, nn.Module]


class _Calls:
    """Operations on (rows, features) of one dtype, their kernels chosen once; where there is none,
    or autocast is on, the public functions."""

    def __init__(self, weight: Tensor, head_dim: int, slopes: Tensor | None) -> None:
        self.scale = 1.0 / math.sqrt(head_dim)
        device_type, dtype = weight.device.type, weight.dtype
        public = torch.is_autocast_enabled(device_type)

        def kernel(op: str, *options: str, **sizes: int) -> Any:
            found: Kernel = choose(op, device_type, dtype, frozenset(options), tuple(sizes.items()))
            return None if public else found.forward

        self._linear = kernel("linear_add")
        self._norm = kernel("linear_add_layer_norm")
        slopes_option = () if slopes is None else ("alibi_slopes",)
        self._self = kernel("attention_decode", "is_causal", *slopes_option, head_dim=head_dim)
        self._cross = kernel("attention_decode", head_dim=head_dim)

    def linear(self, x: Tensor, layer: Linear, activation: str = "") -> Tensor:
        if not isinstance(layer, tuple):
            return activated(layer(x), activation) if activation else layer(x)
        if self._linear is None:
            return linear_add(x, *layer, activation=activation or None)
        return self._linear(x, *layer, None, CODES[activation])

    def linear_norm(
        self, x: Tensor, end: End, residual: Tensor, both: bool
    ) -> tuple[Tensor, Tensor]:
        """(normed, summed), or with both False the same for both."""
        linear, norm = end
        if not isinstance(linear, tuple) or not isinstance(norm, tuple):
            summed = residual + linear(x)  # type: ignore[operator]
            normed = norm(summed)  # type: ignore[operator]
        elif self._norm is None:
            weight, bias, eps = norm
            result: Any = linear_add_layer_norm(
                x, *linear, residual, weight, bias, eps, return_sum=both
            )
            normed, summed = result if both else (result, result)
        else:
            normed, summed, _, _ = self._norm(x, *linear, residual, *norm, both)
        return normed, summed if both else normed

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        slopes: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """(batch, heads, q_len, head_dim) over keys up to each sample's length."""
        kernel = self._self if is_causal else self._cross
        if kernel is None:
            cache = KVCache(keys[None], values[None], lengths[None])
            # Half of the public function's work is to append, which is done already.
            return attention_decode(query, cache, is_causal=is_causal, alibi_slopes=slopes)
        return kernel(
            query, keys, values, lengths, None, None, is_causal, -1, -1, 0.0, slopes, None,
            self.scale,
        )[0]  # fmt: skip


class _LayerWeights:
    """What a step reads of a layer: look-ups of modules' attributes cost as much as a call."""

    def __init__(self, layer: Layer, next_norm: Any) -> None:
        def weights(module: Any) -> tuple[Tensor, Tensor]:
            bias: Any = None if module.bias is None else module.bias.contiguous()
            return module.weight.contiguous(), bias

        def of(module: Any) -> Linear:
            return weights(module) if plain_part(module, LINEAR_FORWARDS) else module

        def end(linear: Any, norm: Any) -> End:
            if not (plain_part(linear, LINEAR_FORWARDS) and plain_part(norm, LAYER_NORM_FORWARDS)):
                return linear, norm
            return weights(linear), (*weights(norm), norm.eps)

        cross = layer.cross_attn
        norms = [layer.norm1, layer.norm2, layer.norm3] if cross else [layer.norm1, layer.norm3]
        if layer.pre_norm:
            norms = [*norms[1:], next_norm]
        block = layer.feed_forward
        self.self_in, self.feed_forward_in = of(layer.self_attn.in_proj), of(block.linear1)
        self.cross_in = of(cross.q_proj) if cross else None
        outs = [layer.self_attn.out_proj, *([cross.out_proj] if cross else []), block.linear2]
        #: of self-attention, of cross-attention where there is one, of the feed-forward block
        self.ends = [end(out, norm) for out, norm in zip(outs, norms)]
        self.activation = block.activation
        #: for activations with a gate
        self.hidden = None if block.activation in ACTIVATIONS else block.hidden


def decoding_state(
    decoder: Stack,
    sources: int,
    beams: int = 1,
    memory: EncoderOutput | None = None,
    prompt: PackedBatch | None = None,
) -> State:
    """The state of these rows: with a cache, if the decoder's parts are those that this package
    built, else without one."""
    kind = DecodingState if _steps_by_weights(decoder) else UncachedState
    return kind(decoder, sources, beams, memory, prompt)


def _steps_by_weights(decoder: Any) -> bool:
    """Whether each part of the decoder that a step does not call is this package's, unhooked."""
    parts: list[tuple[Any, type[nn.Module]]] = [
        (decoder, Decoder), (decoder.embedding, TokenPositionEmbedding),
    ]  # fmt: skip
    for layer in decoder.layers:
        if not plain_part(layer, (Layer.forward,)):
            return False
        cross, rotary = layer.cross_attn, layer.self_attn.rotary
        parts += [(layer.self_attn, SelfAttention), (layer.feed_forward, FeedForward)]
        parts += [(cross, CrossAttention)] if cross is not None else []
        parts += [(rotary, RotaryEmbedding)] if rotary is not None else []
    return all(plain_part(part, (kind.forward,)) for part, kind in parts)


class UncachedState:
    """What :class:`DecodingState` is, by the decoder's own forward pass over all tokens so far: for
    decoders with parts that only a call of them does justice to."""

    def __init__(
        self,
        decoder: Stack,
        sources: int,
        beams: int = 1,
        memory: EncoderOutput | None = None,
        prompt: PackedBatch | None = None,
    ) -> None:
        self.decoder, self.sources, self.beams = decoder, sources, beams
        read = [[]] * sources if prompt is None else prompt.ids.split(prompt.lengths)
        self.rows = [list(map(int, row)) for row in read for _ in range(beams)]
        self.memory = None if memory is None else memory.hidden.split(memory.batch.lengths)

    def step(self, ids: Tensor) -> Tensor:
        """As of :class:`DecodingState`."""
        for row, token in zip(self.rows, ids.tolist()):
            row.append(token)
        batch, memory = pack(self.rows, ids.device), None
        if self.memory is not None:
            parts = [part for part in self.memory for _ in range(self.beams)]
            places = from_lengths(
                torch.zeros(sum(map(len, parts)), dtype=torch.long, device=ids.device),
                [len(part) for part in parts],
            )
            memory = EncoderOutput(torch.cat(parts), places)
        hidden = self.decoder(batch, memory).hidden
        return hidden[batch.cu_seqlens[1:].long() - 1]

    def reorder(self, parents: Tensor) -> None:
        """As of :class:`DecodingState`."""
        self.rows = [list(self.rows[parent]) for parent in parents.tolist()]

    def keep(self, sources: list[int]) -> list[int]:
        """As of :class:`DecodingState`."""
        beams = self.beams
        self.rows = [row for i in sources for row in self.rows[i * beams : (i + 1) * beams]]
        if self.memory is not None:
            self.memory = tuple(self.memory[i] for i in sources)
        self.sources = len(sources)
        return sources


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
        self.pre_norm, self.first_norm = config.pre_norm, decoder.first_norm()
        self.layers = [
            _LayerWeights(layer, norm)  # type: ignore[arg-type]
            for layer, norm in zip(decoder.layers, decoder.next_norms())
        ]
        table = decoder.embedding
        self.weight, self.position_weight = table.weight, table.position_weight
        self.scale, self.sinusoidal = table.scale, table.positions == "sinusoidal"
        self.placed = table.positions is not None
        device = self.weight.device
        self.slopes = alibi_slopes(self.heads, device) if config.positions == "alibi" else None
        self.calls = _Calls(self.weight, self.head_dim, self.slopes)
        self.rotary: RotaryEmbedding | None = None
        for layer in decoder.layers[:1]:
            self.rotary = layer.self_attn.rotary  # type: ignore[assignment, union-attr]
        rows = sources * beams
        #: tokens that each row has read, and the most of them
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.longest, self.equal = 0, True
        if prompt is not None:
            self.longest, self.equal = prompt.max_seqlen, len(set(prompt.lengths)) <= 1
            self.lengths = prompt.lengths_tensor().repeat_interleave(beams)
        # Keys and values side by side: one copy writes both.
        self._allocate(rows, max(FIRST_CAPACITY, 2 * self.longest))
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.memory_lengths: Tensor | None = None
        if memory is not None:
            self._read(memory)
        if prompt is not None and prompt.ids.numel():
            self._prefill(prompt)

    def _allocate(self, rows: int, capacity: int) -> None:
        shape = (len(self.layers), 2, rows, self.heads, capacity, self.head_dim)
        # Under autocast projections, and so keys and values, are of its dtype.
        dtype = self.weight.dtype
        if dtype != torch.float64:
            dtype = autocast_dtype(self.weight.device.type) or dtype
        self._use(self.weight.new_zeros(shape, dtype=dtype))

    def _use(self, stored: Tensor) -> None:
        self.stored = stored
        self.keys_values = [part.unbind(0) for part in stored.unbind(0)]

    def _read(self, memory: EncoderOutput) -> None:
        self.memory_lengths = memory.batch.lengths_tensor()
        layer: Any
        for layer in self.decoder.layers:
            keys, values = layer.cross_attn.keys_values(memory.hidden)
            keys, values = (
                memory.batch.padded(x).transpose(1, 2).contiguous() for x in (keys, values)
            )
            self.memory.append((keys, values))

    def _prefill(self, prompt: PackedBatch) -> None:
        """All prompts in one packed pass, whose keys and values go into each of a source's rows."""
        kept: list[tuple[Tensor, Tensor]] = []
        self.decoder.run(prompt, kept=kept)
        source = torch.repeat_interleave(
            torch.arange(self.sources, device=prompt.ids.device), prompt.lengths_tensor()
        )
        rows = source[:, None] * self.beams + torch.arange(self.beams, device=source.device)
        place = prompt.positions[:, None]
        for (keys, values), (key, value) in zip(self.keys_values, kept):
            keys[rows, :, place] = key[:, None]
            values[rows, :, place] = value[:, None]

    def step(self, ids: Tensor) -> Tensor:
        """(rows,) ids of the newest tokens to (rows, embed_dim), the decoder's output for them."""
        rows, calls, slopes = ids.shape[0], self.calls, self.slopes
        if slopes is not None:
            slopes = slopes.expand(rows, -1).contiguous()
        if self.longest == self.stored.shape[4]:
            self._grow()
        positions = self.lengths
        tables = None
        if self.rotary is not None:
            tables = self.rotary.tables(self.longest + 1, ids.device)
        x = embedding(
            ids, self.weight, positions=positions if self.placed else None,
            position_weight=self.position_weight, sinusoidal=self.sinusoidal, scale=self.scale,
        )  # fmt: skip
        self.lengths = lengths = positions + 1
        slots = self._slots(positions)
        normed = summed = x
        if self.first_norm is not None:
            normed = self.first_norm(x)
        shape = (rows, 3, self.heads, self.head_dim)
        for i, layer in enumerate(self.layers):
            projected = calls.linear(normed, layer.self_in).view(shape)
            if tables is not None:
                projected = self._turned(projected, tables, positions)
            query = projected.select(1, 0)
            self._append(i, slots, projected)
            keys, values = self.keys_values[i]
            context = calls.attend(query.unsqueeze(2), keys, values, lengths, slopes, True)
            normed, summed = self._end(context.reshape(rows, -1), layer.ends[0], summed)
            if layer.cross_in is not None:
                context = self._cross(calls.linear(normed, layer.cross_in), i)
                normed, summed = self._end(context, layer.ends[1], summed)
            if layer.hidden is None:
                hidden = calls.linear(normed, layer.feed_forward_in, layer.activation)
            else:
                hidden = layer.hidden(normed)
            normed, summed = self._end(hidden, layer.ends[-1], summed)
        self.longest += 1
        return normed

    def _slots(self, positions: Tensor) -> Any:
        """Where a step's keys and values go: for rows of one length a view, else indices."""
        if self.equal:
            return self.stored.select(4, self.longest).unbind(0)
        return torch.arange(len(positions), device=positions.device), positions.long()

    def _append(self, i: int, slots: Any, projected: Tensor) -> None:
        keys_values = projected[:, 1:]
        if self.equal:
            slots[i].copy_(keys_values.transpose(0, 1))
        else:
            self.stored[i][:, slots[0], :, slots[1]] = keys_values.to(self.stored.dtype)

    def _turned(
        self, projected: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor
    ) -> Tensor:
        """Query and key at their positions: rows are samples of one token."""
        query, key, value = (part.unsqueeze(2) for part in projected.unbind(1))
        query, key = rotary_embedding(query, key, *tables, position_ids=positions[:, None])
        return torch.stack([part.squeeze(2) for part in (query, key, value)], 1)

    def _cross(self, query: Tensor, i: int) -> Tensor:
        """Attention of a source's beams over its keys, (rows, embed_dim)."""
        assert self.memory_lengths is not None
        shape = (self.sources, self.beams, self.heads, self.head_dim)
        keys, values = self.memory[i]
        context = self.calls.attend(
            query.view(shape).transpose(1, 2), keys, values, self.memory_lengths, None, False
        )
        return context.transpose(1, 2).reshape(query.shape[0], -1)

    def _end(self, x: Tensor, end: End, summed: Tensor) -> tuple[Tensor, Tensor]:
        return self.calls.linear_norm(x, end, summed, self.pre_norm)

    def _grow(self) -> None:
        old = self.stored
        capacity = old.shape[4]
        self._allocate(old.shape[2], 2 * capacity)
        self.stored[:, :, :, :, :capacity] = old

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
        self.lengths = self.lengths[:rows]
        self._use(self.stored[:, :, :rows])
        if self.memory_lengths is not None:
            for part in (self.memory_lengths, *(x for pair in self.memory for x in pair)):
                if holes:
                    part[to] = part[of]
            self.memory_lengths = self.memory_lengths[:count]
            self.memory = [(keys[:count], values[:count]) for keys, values in self.memory]
        self.sources = count
        return order

    def _copy(self, to: Tensor, of: Tensor) -> None:
        if to.numel():
            filled = self.stored[:, :, :, :, : self.longest]
            filled[:, :, to] = filled[:, :, of]
            self.lengths[to] = self.lengths[of]


State = DecodingState | UncachedState
