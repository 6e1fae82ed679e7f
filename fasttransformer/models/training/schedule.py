"""The learning rate of a step: linear warm-up, then linear decay."""

from __future__ import annotations


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    r"""The rate of step ``step`` (the first is 0) of ``steps``.

    .. math:: \text{peak} \cdot \min\Big(\frac{\text{step} + 1}{\text{warmup} + 1},
        \frac{\text{steps} - \text{step}}{\text{steps} - \text{warmup}}\Big)

    No step has a rate of 0: neither the first, nor the last of them, which a schedule that counts
    from 0 to ``steps`` inclusive wastes. (The tutorial's ``num_training_steps=-1`` gives
    transformers' schedule 0 from the first step on.)

    >>> [round(learning_rate(step, 5, 1, 1.0), 2) for step in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = min(warmup, steps - 1)
    rising = (step + 1) / (warmup + 1)
    falling = (steps - step) / (steps - warmup)
    return peak * max(0.0, min(rising, falling, 1.0))
