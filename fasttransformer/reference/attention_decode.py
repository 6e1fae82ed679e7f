r"""Attention of newly decoded tokens over a cache of the keys and values before them.

A model that generates text token by token would compute the keys and values of all earlier tokens
again at each step; the cache keeps them. One step, for each sample b of length L_b:

    rotate query and new_key to positions L_b, L_b + 1, ...      if rotary
    write new_key, new_value at those positions; L_b grows by their number, n
    out = attention(query, cache[:L_b]), where query i of S stands at position L_b - S + i

and with the causal rule sees no position after its own. Samples may differ in length; what lies
past a sample's length never affects the result.

Shapes: query (B,H,S,D), new_key (B,G,n,D), new_value (B,G,n,E), out (B,H,S,E), lse (B,H,S).

Sources: Shazeer, "Fast Transformer Decoding", 2019 (arXiv:1911.02150); Pope et al., 2022
(2211.05102).

>>> cache = KVCache.allocate(layers=1, batch=1, heads=1, capacity=8, head_dim=2)
>>> for step in range(3):
...     query, key = torch.zeros(2, 1, 1, 1, 2).unbind()
...     value = torch.full((1, 1, 1, 2), float(step))
...     out = attention_decode(query, cache, new_key=key, new_value=value)
>>> out.flatten(), cache.lengths  # the mean of 0, 1 and 2
(tensor([1., 1.]), tensor([[3]], dtype=torch.int32))
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttransformer.reference.attention import attend_at
from fasttransformer.reference.rotary_embedding import rotate


def check_fields(keys: Tensor, values: Tensor, lengths: Tensor, layers: str = "") -> None:
    """Raises unless the fields of a cache (with ``layers``), or of one of its layers, fit.

    It is written in place, so no copy can make another layout or dtype right.
    """
    fields = (("keys", keys), ("values", values), ("lengths", lengths))
    for name, field_ in fields:
        if not isinstance(field_, Tensor):
            raise TypeError(f"KVCache: {name} must be a tensor, got {type(field_).__name__}")
        if field_.device != keys.device:
            raise ValueError(f"KVCache: {name} is on {field_.device}, but keys on {keys.device}")
    rank = 5 if layers else 4
    for name, field_ in fields[:2]:
        if field_.dim() != rank:
            raise ValueError(
                f"KVCache: {name} has shape {tuple(field_.shape)}; it must be ({layers}batch, "
                "heads, capacity, head_dim)"
            )
        if field_.stride(-1) != 1 and field_.shape[-1] > 1:
            raise ValueError(
                f"KVCache: {name} has strides {field_.stride()}; the last one must be 1"
            )
    if not keys.is_floating_point():
        raise ValueError(f"KVCache: keys has dtype {keys.dtype}; it must be floating-point")
    if values.dtype != keys.dtype:
        raise ValueError(f"KVCache: values has dtype {values.dtype}, but keys has {keys.dtype}")
    if values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"KVCache: values has shape {tuple(values.shape)}, but keys has {tuple(keys.shape)}; "
            "only the last dimension may differ"
        )
    if lengths.dtype != torch.int32:
        raise ValueError(f"KVCache: lengths has dtype {lengths.dtype}; it must be int32")
    if lengths.shape != keys.shape[:-3]:
        raise ValueError(
            f"KVCache: lengths has shape {tuple(lengths.shape)}; keys makes it "
            f"{tuple(keys.shape[:-3])}, ({layers}batch)"
        )
    if lengths.stride(-1) != 1 and lengths.shape[-1] > 1:
        raise ValueError(f"KVCache: lengths has strides {lengths.stride()}; the last one must be 1")


def check_not_expanded(keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Raises where one number in memory stands for several of a layer that is written to."""
    for name, written in (("keys", keys), ("values", values), ("lengths", lengths)):
        if 0 in written.stride() and written.numel() and any(
            step == 0 and size > 1 for step, size in zip(written.stride(), written.shape)
        ):  # fmt: skip
            raise ValueError(f"KVCache: {name} is expanded, so nothing can be appended to it")


def check_apart(keys: Tensor, values: Tensor) -> None:
    if keys.data_ptr() == values.data_ptr() and keys.numel() and values.numel():
        raise ValueError("KVCache: keys and values share memory, so nothing can be appended")


def write_at(
    start: Tensor, keys: Tensor, values: Tensor, new_key: Tensor, new_value: Tensor
) -> None:
    """Write new_key (B,G,n,D) and new_value (B,G,n,E) from position start (B,) int64 on."""
    sample = torch.arange(new_key.shape[0], device=new_key.device)[:, None]
    position = start[:, None] + torch.arange(new_key.shape[2], device=new_key.device)
    # Indexed dimensions come first: (B, n, G, D).
    keys[sample, :, position] = new_key.transpose(1, 2).to(keys.dtype)
    values[sample, :, position] = new_value.transpose(1, 2).to(values.dtype)


@dataclass(repr=False)
class KVCache:
    """Keys and values of all layers in one contiguous block each.

    keys (layers, B, G, capacity, D), values (layers, B, G, capacity, E), lengths (layers, B) int32:
    how many positions of each sample are filled. Each layer keeps its own lengths, so layers may be
    called in any order, and none needs to know which is the last.

    Raises:
        TypeError: a field that is no tensor.
        ValueError: fields that don't fit, or of a dtype or layout that kernels can't read; named.

    >>> KVCache.allocate(layers=2, batch=1, heads=4, capacity=16, head_dim=8)
    KVCache(float32, layers=2, batch=1, heads=4, capacity=16, head_dim=8)
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    #: Each layer's least and greatest length, with the tensor and version that they were read from.
    _extremes: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)
    _read_from: tuple[Tensor, int] | None = field(default=None, init=False, repr=False)
    #: The fields that were found to fit: they may be replaced.
    _checked: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        check_fields(self.keys, self.values, self.lengths, "layers, ")
        self._checked = (self.keys, self.values, self.lengths)

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KVCache":
        """An empty cache; heads are the key/value heads, capacity the most tokens of a sample."""
        shape = (layers, batch, heads, capacity)
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, value_head_dim or head_dim, dtype=dtype, device=device),
            lengths=torch.zeros(layers, batch, dtype=torch.int32, device=device),
        )

    def __repr__(self) -> str:
        layers, batch, heads, capacity, head_dim = self.keys.shape
        dtype = str(self.keys.dtype).removeprefix("torch.")
        return (
            f"KVCache({dtype}, layers={layers}, batch={batch}, heads={heads}, "
            f"capacity={capacity}, head_dim={head_dim})"
        )

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def extremes(self, layer: int) -> tuple[int, int]:
        """The fewest and the most tokens that a sample holds. They are kept from one append to the
        next: to look at ``lengths`` would be to wait for a GPU."""
        if self.lengths.is_inference():  # has no version
            self._extremes.clear()
        elif self._read_from is None or self._read_from[0] is not self.lengths or (
            self._read_from[1] != self.lengths._version
        ):  # fmt: skip
            self._extremes.clear()
            self._read_from = (self.lengths, self.lengths._version)
        known = self._extremes.get(layer)
        if known is None:
            lengths = self.lengths[layer].tolist()
            known = (min(lengths), max(lengths)) if lengths else (0, 0)
            if known[0] < 0:
                raise ValueError(f"KVCache: lengths holds {known[0]}; it must be 0 or more")
            self._extremes[layer] = known
        return known

    @torch.no_grad()
    def append(self, layer: int, new_key: Tensor, new_value: Tensor) -> None:
        """Write new_key (B,G,n,D) and new_value (B,G,n,E) after what each sample holds."""
        lengths, count = self.lengths[layer], new_key.shape[2]
        shortest, longest = self.extremes(layer)
        if longest + count > self.capacity:
            raise ValueError(
                f"KVCache: {longest} tokens and {count} new ones exceed the capacity "
                f"{self.capacity}"
            )
        keys, values = self.keys[layer], self.values[layer]
        check_not_expanded(keys, values, lengths)
        check_apart(keys, values)
        if shortest == longest:
            keys[:, :, longest : longest + count].copy_(new_key)
            values[:, :, longest : longest + count].copy_(new_value)
        else:
            write_at(lengths.long(), keys, values, new_key, new_value)
        lengths += count
        if not self.lengths.is_inference():
            self._extremes[layer] = (shortest + count, longest + count)
            self._read_from = (self.lengths, self.lengths._version)

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """keys (B,G,capacity,D), values (B,G,capacity,E), lengths (B,) of one layer.

        A cache that stores its keys elsewhere (in pages) gathers them here.
        """
        return self.keys[layer], self.values[layer], self.lengths[layer]

    def checked_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`layer` of fields that are known to fit, also where they were replaced or a
        subclass gathers them."""
        if type(self).layer is not KVCache.layer:
            found = self.layer(layer)
            check_fields(*found)
            return found
        keys, values, lengths = self._checked or (None, None, None)
        if keys is not self.keys or values is not self.values or lengths is not self.lengths:
            self._check()
        return self.layer(layer)


def attention_decode(
    query: Tensor,
    cache: KVCache,
    *,
    layer: int = 0,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """One decoding step; out, or (out, lse). Appends to `cache` when new_key is given.

    rotary is (cos, sin), tables as of rotary_embedding, (positions, D/2 or D); it turns the query
    and new_key. mask and bias broadcast to (B, H, S, capacity).
    """
    tokens = query.shape[2]
    if rotary is not None:
        cos, sin = rotary
        start = cache.layer(layer)[2][:, None].long()
        if new_key is not None:
            count = new_key.shape[2]
            position_ids = start + torch.arange(count, device=query.device)
            new_key = rotate(new_key, cos, sin, rotary_interleaved, position_ids)
            start = start + count
        # The query's tokens are the last ones in the cache.
        position_ids = start - tokens + torch.arange(tokens, device=query.device)
        query = rotate(query, cos, sin, rotary_interleaved, position_ids)
    if new_key is not None and new_value is not None:
        cache.append(layer, new_key, new_value)
    keys, values, lengths = cache.layer(layer)
    out, lse = attend_at(
        query, keys, values, (lengths - tokens).view(-1, 1, 1, 1),
        mask=mask, bias=bias, is_causal=is_causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, key_lengths=lengths, scale=scale,
        return_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
