"""Probabilities of an output layer: softmax((input @ weightᵀ + bias) / temperature).

The product writes a piece of float32 logits softmax.py's
kernel turns them into probabilities and rounds. Bound: the product; for few features, memory.
"""

from torch import Tensor

from ._output_layer import new_logits, pieces, write_logits
from ._register import operator
from .softmax import write_softmax


@operator()
def linear_softmax(
    input: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    rows, classes = input.shape[0], weight.shape[0]
    out = input.new_empty((rows, classes))
    if out.numel() == 0:
        return out
    logits = None
    for first, last in pieces(rows, classes):
        if logits is None or logits.shape[0] != last - first:
            logits = new_logits(input, last - first, classes)
        write_logits(input[first:last], weight, bias, logits)
        write_softmax(logits, out[first:last], 1.0 / temperature, None, False, False)
    return out
