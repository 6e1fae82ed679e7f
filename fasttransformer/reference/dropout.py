r"""Dropout whose mask is a function of (seed, position), the same on every backend.

    bits  = philox4x32-10(key = seed, counter = position // 4)[position % 4]     (32 random bits)
    out   = input / (1 - p)   where bits >= floor(p * 2**32),   0 elsewhere

Position is the element's index in the contiguous tensor: ((b*H + h)*S + i)*T + j for attention,
row*features + column for the norms. A backward pass thus needs the seed alone, not the mask.

Philox is a block cipher run as a counter: ten rounds, each of which multiplies two of the
counter's four 32-bit words by a constant, and crosses high and low halves with the key.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
Dropout: Srivastava et al., JMLR 15 (2014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1
ROUNDS = 10


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b, both unsigned 32-bit numbers held in int64.

    b is split into halves of 16 bits so that no product leaves the range of int64.
    """
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & MASK32


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """philox4x32-10: four counter words and two key words (int64 in [0, 2**32)) to four words.

    >>> zero = torch.tensor(0)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, (zero,) * 2)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIER_0, c0)
        high1, low1 = _multiply(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def _random_words(seed: Tensor, block: Tensor) -> Tensor:
    """The four words of each block of positions: block.shape + (4,)."""
    seed = seed.reshape(()).to(torch.int64)
    zero = torch.zeros_like(block)
    counter = (block & MASK32, (block >> 32) & MASK32, zero, zero)
    return torch.stack(philox(counter, (seed & MASK32, (seed >> 32) & MASK32)), dim=-1)


def random_bits(seed: Tensor, positions: Tensor) -> Tensor:
    """32 random bits (int64 in [0, 2**32)) for each of the positions (int64, any shape)."""
    words = _random_words(seed, positions >> 2)
    return words.gather(-1, (positions & 3).unsqueeze(-1)).squeeze(-1)


def dropout_mask(seed: Tensor, where: Sequence[int] | Tensor, p: float) -> Tensor:
    """Bool mask, True = keep, for a whole shape, or for an int64 tensor of positions.

    >>> seed = torch.tensor([7])
    >>> mask = dropout_mask(seed, (2, 6), 0.5)
    >>> torch.equal(mask, dropout_mask(seed, torch.arange(12).view(2, 6), 0.5))
    True
    """
    threshold = int(p * 2**32)
    if isinstance(where, Tensor):
        return random_bits(seed, where) >= threshold
    shape = tuple(where)
    count = 1
    for size in shape:
        count *= size
    # Four neighbouring positions share one block, so one cipher call serves all four.
    blocks = torch.arange((count + 3) // 4, device=seed.device)
    return (_random_words(seed, blocks).reshape(-1)[:count] >= threshold).reshape(shape)


def dropout(input: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Zero each element with probability p, and scale the others by 1 / (1 - p).

    Without a seed, one is drawn from torch's generator.

    >>> x = torch.ones(8)
    >>> out = dropout(x, 0.5, torch.tensor([7]))
    >>> sorted(set(out.tolist()))
    [0.0, 2.0]
    >>> torch.equal(dropout(x, 0.0), x)
    True
    """
    if p == 0.0:
        return input
    keep = dropout_mask(new_seed(input) if seed is None else seed, input.shape, p)
    return torch.where(keep, input / (1.0 - p), 0.0)


def new_seed(like: Tensor) -> Tensor:
    """A fresh seed, int64 of one element, on the device of `like`."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=like.device)
