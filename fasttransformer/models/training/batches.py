"""Batches of examples of like lengths, in an order that the number of the step alone decides.

So the position in the data is one number, and a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

#: Batches whose examples are sorted together: enough that lengths within a batch are alike, few
#: enough that an epoch's batches still differ from the last one's.
BUCKET = 32


class LengthBatches(Sampler[list[int]]):
    """Endless batches of indices; each epoch has every example once, its last batch may be short.

    Args:
        lengths: of the examples.
        batch_size: examples of a batch.
        seed: another order.
        start: number of the first batch that is wanted.

    >>> batches = iter(LengthBatches([3, 9, 4, 8], batch_size=2))
    >>> first_epoch = [sorted(next(batches)), sorted(next(batches))]
    >>> sorted(first_epoch)  # short ones together, long ones together
    [[0, 2], [1, 3]]
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int = 0, start: int = 0
    ) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.seed, self.start = seed, start
        self.per_epoch = -(-len(lengths) // batch_size)

    def epoch(self, number: int) -> list[list[int]]:
        """All batches of an epoch."""
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        width = BUCKET * self.batch_size
        batches = []
        for first in range(0, len(order), width):
            bucket = sorted(order[first : first + width], key=self.lengths.__getitem__)
            batches += [
                bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)
            ]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        number, first = divmod(self.start, self.per_epoch)
        while True:
            yield from self.epoch(number)[first:]
            number, first = number + 1, 0
