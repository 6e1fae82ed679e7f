"""Device functions that several kernels share: dropout's mask, tanh, matrix products."""

import os

import triton
import triton.language as tl

# The interpreter holds bfloat16 as the bits of a uint16, and its tl.dot multiplies those integers.
# Products of two 16-bit floats are exact in float32, so widening first gives what a GPU gives.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc with a float32 sum; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def keep_mask(seed, position, threshold):
    """True where dropout keeps the element: philox4x32-10 of (seed, position), as the reference.

    Four neighbouring positions share one block of the cipher; every lane computes its own block
    and takes one word, which keeps the tile's layout free.
    """
    block = position >> 2
    zero = (position * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32), zero, zero
    )
    word = (position & 3).to(tl.int32)
    bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return bits.to(tl.int64) >= threshold


@triton.jit
def keep_rows(seed, first, threshold, COUNT: tl.constexpr):
    """:func:`keep_mask` of COUNT positions from each of ``first`` on, which are multiples of four.

    Each block of the cipher is computed once, a quarter of the work and of the registers: a tile of
    a product has none left for four words an element. The words then change hands to lie as the
    tile does.
    """
    block = (first >> 2)[:, None] + tl.arange(0, COUNT // 4)[None, :]
    zero = (block * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32), zero, zero
    )
    least = zero + tl.cast(threshold, tl.uint32)
    even = tl.join((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.join((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [first.shape[0], COUNT]) != 0


@triton.jit
def tanh(x):
    """tanh to float32's precision near 0 too, where 1 − 2/(exp(2x) + 1) cancels (Cephes, tanhf)."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = x + x * z * p
    a = tl.minimum(tl.abs(x), 15.0)  # 1 to float32's precision from 9 on
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    large = tl.where(x < 0, -large, large)
    return tl.where(x != x, x, tl.where(tl.abs(x) < 0.625, small, large))


def threshold_of(dropout_p: float) -> int:
    """Bits below it drop the element."""
    return int(dropout_p * 2**32)


def keep_of(dropout_p: float) -> tuple[int, float]:
    """(threshold, what the kept are multiplied by)."""
    return threshold_of(dropout_p), 1.0 / (1.0 - dropout_p)
