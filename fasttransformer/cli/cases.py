"""What ``fasttransformer check`` runs: one table. Adding an operation adds a row, or a few.

A row calls an operation of ``ops``, which is the package (on some backend) and then the reference
(in float64, and in the case's own dtype as the yardstick), on normal random numbers of the given
shapes. Each input is differentiated. What isn't an input (masks, targets, lengths) is made in the
call from a seed of its own, on the inputs' device, so that every run sees the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One case: ``call(ops, *inputs)`` with ``inputs`` given as shapes, ``"2,3,40 3,40"``."""

    op: str
    name: str
    inputs: str
    call: Callable[..., Any]

    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(int(n) for n in shape.split(",")) for shape in self.inputs.split()]


def _mask(like: Tensor, *shape: int) -> Tensor:
    """Bool, about 70 % True; the first row of the last two dimensions has no True at all."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0, :] = False
    return mask.to(like.device)


def _angles(x: Tensor, positions: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Tables of float32, whatever the dtype of ``x``."""
    angle = torch.outer(torch.arange(positions), 10.0 ** -torch.arange(pairs)).to(x.device)
    return angle.cos(), angle.sin()


def _integers(like: Tensor, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(high, shape, generator=generator).to(like.device)


def _slopes(like: Tensor, heads: int) -> Tensor:
    return (0.5 ** torch.arange(1.0, heads + 1)).to(like.device)


def _decode(ops: Any, new: tuple[Tensor, ...], held: tuple[Tensor, ...], **options: Any) -> Any:
    """One step over a cache of 70 positions whose samples differ in length, and what is in the
    cache after it. ``new`` are a query, and keys and values to append, if there are any."""
    keys, values = (x.detach()[None].clone() for x in held)
    lengths = torch.tensor([[61, 17]], dtype=torch.int32, device=keys.device)
    cache = ops.KVCache(keys, values, lengths)
    query, *appended = new
    options.update(zip(("new_key", "new_value"), appended))
    out, lse = ops.attention_decode(query, cache, return_lse=True, **options)
    return out, lse, cache.keys, cache.values, cache.lengths.to(out.dtype)


def _topk(ops: Any, x: Tensor, weight: Tensor) -> Any:
    """The probabilities, and the logits that the indices point to."""
    values, indices = ops.linear_topk(x, weight, k=5)
    logits = x.detach().double() @ weight.detach().double().mT
    return values, logits.gather(1, indices).to(values.dtype)


# Sizes are chosen to be no multiple of any vector or tile, and to leave more than one tile where
# that takes no long time; three or four of anything are enough to tell a stride from another.
QKV = "2,4,37,24 2,2,70,24 2,2,70,24"  # grouped heads, S ≠ T
CACHED = "2,2,70,24 2,2,70,16"  # the keys and values of a cache, of grouped heads
WIDE_V = "1,2,19,40 1,2,33,40 1,2,33,17"  # value head size ≠ query head size

CHECKS: tuple[Check, ...] = (
    Check("softmax", "plain", "3,5,130", lambda ops, x: ops.softmax(x)),
    Check("softmax", "inner dimension", "3,7,33", lambda ops, x: ops.softmax(x, 1)),
    Check(
        "softmax",
        "scale, mask, causal",
        "2,9,70",
        lambda ops, x: ops.softmax(x, scale=-0.7, mask=_mask(x, 9, 70), is_causal=True),
    ),
    Check("softmax", "log", "3,5,130", lambda ops, x: ops.log_softmax(x, scale=2.0)),
    Check("softmax", "log, long row", "2,2500", lambda ops, x: ops.log_softmax(x)),
    Check(
        "layer_norm",
        "affine",
        "7,133 133 133",
        lambda ops, x, w, b: ops.layer_norm(x, (133,), w, b),
    ),
    Check(
        "layer_norm", "plain, two dimensions", "3,5,4,9", lambda ops, x: ops.layer_norm(x, (4, 9))
    ),
    Check("rms_norm", "affine", "7,133 133", lambda ops, x, w: ops.rms_norm(x, (133,), w, 1e-6)),
    Check("rms_norm", "plain, default eps", "3,64", lambda ops, x: ops.rms_norm(x, (64,))),
    Check(
        "add_layer_norm",
        "affine",
        "3,4,133 3,4,133 133 133",
        lambda ops, x, r, w, b: ops.add_layer_norm(x, r, (133,), w, b),
    ),
    Check(
        "add_layer_norm",
        "plain",
        "6,32 6,32",
        lambda ops, x, r: ops.add_layer_norm(x, r, (32,), eps=1e-3),
    ),
    Check(
        "add_rms_norm",
        "affine",
        "3,4,133 3,4,133 133",
        lambda ops, x, r, w: ops.add_rms_norm(x, r, (133,), w, 1e-6),
    ),
    Check(
        "linear_add",
        "bias, residual",
        "2,13,45 37,45 37 2,13,37",
        lambda ops, x, w, b, r: ops.linear_add(x, w, b, r),
    ),
    Check(
        "linear_add",
        "heads in place",
        "2,3,11,16 20,48 2,11,20",
        lambda ops, x, w, r: ops.linear_add(x, w, residual=r),
    ),
    Check(
        "linear_add",
        "gelu",
        "9,70 66,70 66",
        lambda ops, x, w, b: ops.linear_add(x, w, b, activation="gelu"),
    ),
    Check(
        "linear_add_layer_norm",
        "affine",
        "2,13,45 37,45 37 2,13,37 37 37",
        lambda ops, x, w, b, r, nw, nb: ops.linear_add_layer_norm(x, w, b, r, nw, nb),
    ),
    Check(
        "linear_add_rms_norm",
        "affine",
        "2,13,45 37,45 37 2,13,37 37",
        lambda ops, x, w, b, r, nw: ops.linear_add_rms_norm(x, w, b, r, nw, 1e-6),
    ),
    Check("attention", "grouped heads", QKV, lambda ops, q, k, v: ops.attention(q, k, v)),
    Check(
        "attention",
        "causal, value size",
        WIDE_V,
        lambda ops, q, k, v: ops.attention(q, k, v, is_causal=True, return_lse=True),
    ),
    Check(
        "attention",
        "causal, bottom right",
        QKV,
        lambda ops, q, k, v: ops.attention(
            q, k, v, is_causal=True, causal_alignment="bottom_right", scale=0.3
        ),
    ),
    Check(
        "attention",
        "mask with empty rows",
        QKV,
        lambda ops, q, k, v: ops.attention(q, k, v, mask=_mask(q, 2, 1, 37, 70)),
    ),
    Check(
        "attention",
        "bias and its gradient",
        f"{WIDE_V} 2,1,33",
        lambda ops, q, k, v, bias: ops.attention(q, k, v, bias=bias),
    ),
    Check(
        "attention",
        "window, softcap, ALiBi, sinks, lengths",
        f"{QKV} 4",
        lambda ops, q, k, v, sinks: ops.attention(
            q,
            k,
            v,
            window=(9, 3),
            softcap=5.0,
            alibi_slopes=_slopes(q, 4),
            sinks=sinks,
            key_lengths=torch.tensor([70, 31], device=q.device),
        ),
    ),
    Check(
        "attention",
        "torch's own signature",
        "2,3,20,16 2,3,20,16 2,3,20,16",
        lambda ops, q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
    Check(
        "attention_varlen",
        "causal",
        "31,4,16 31,2,16 31,2,16",
        lambda ops, q, k, v: ops.attention_varlen(
            q, k, v, *[torch.tensor([0, 13, 13, 31], device=q.device)] * 2, is_causal=True
        ),
    ),
    Check(
        "attention_decode",
        "one token",
        f"2,4,1,24 2,2,1,24 2,2,1,16 {CACHED}",
        lambda ops, q, k, v, *held: _decode(ops, (q, k, v), held),
    ),
    Check(
        "attention_decode",
        "several tokens, window, softcap, sinks",
        f"2,4,5,24 2,2,5,24 2,2,5,16 {CACHED} 4",
        lambda ops, q, k, v, *held: _decode(
            ops, (q, k, v), held[:2], window=(9, 0), softcap=5.0, sinks=held[2].detach()
        ),
    ),
    Check(
        "attention_decode",
        "rotary, mask, nothing new",
        f"2,4,3,24 {CACHED}",
        lambda ops, q, *held: _decode(
            ops, (q,), held, rotary=_angles(q, 70, 12), mask=_mask(q, 2, 1, 3, 70)
        ),
    ),
    Check(
        "merge_attention",
        "three parts",
        "3,2,5,24 3,2,5",
        lambda ops, outs, lses: ops.merge_attention(
            outs, lses.to(torch.promote_types(outs.dtype, torch.float32))
        ),
    ),
    Check(
        "feed_forward",
        "swiglu",
        "9,32 96,32 96 32,48 32",
        lambda ops, x, wi, bi, wo, bo: ops.feed_forward(x, wi, bi, wo, bo, activation="swiglu"),
    ),
    Check(
        "cross_entropy",
        "label smoothing",
        "12,50",
        lambda ops, x: ops.cross_entropy(x, _integers(x, 50, 12), label_smoothing=0.2),
    ),
    Check(
        "linear_cross_entropy",
        "mean",
        "12,32 50,32",
        lambda ops, x, w: ops.linear_cross_entropy(x, w, _integers(x, 50, 12)),
    ),
    Check(
        "linear_softmax",
        "temperature",
        "5,32 50,32 50",
        lambda ops, x, w, b: ops.linear_softmax(x, w, b, temperature=0.7),
    ),
    Check("linear_topk", "k = 5", "5,32 50,32", _topk),
    Check(
        "embedding",
        "sinusoidal",
        "50,32",
        lambda ops, w: ops.embedding(_integers(w, 50, 3, 7), w, sinusoidal=True),
    ),
    Check(
        "rotary_embedding",
        "half split",
        "2,4,9,16 2,2,9,16",
        lambda ops, q, k: ops.rotary_embedding(q, k, *_angles(q, 9, 8)),
    ),
)
