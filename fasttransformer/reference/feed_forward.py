r"""Position-wise feed-forward block: out, activation, back in.

    relu, gelu, gelu_tanh, silu:   out = act(x @ W_in.T + b_in) @ W_out.T + b_out
    swiglu, geglu:                 gate, up = halves of (x @ W_in.T + b_in)
                                   out = (act(gate) * up) @ W_out.T + b_out       act = silu, gelu

with dropout of what enters the second product.

Shapes: input (..., C), weight_in (F, C), or (2F, C) with the gate's rows first for swiglu and
geglu, bias_in (F,) or (2F,), weight_out (C', F), bias_out (C',); out (..., C') in the input's
dtype. The hidden values are not rounded.

Sources: Vaswani et al., 2017 (arXiv:1706.03762), section 3.3; gates: Shazeer, "GLU Variants
Improve Transformer", 2020 (2002.05202).

>>> import torch
>>> one = torch.ones(1, 1)
>>> feed_forward(torch.tensor([[-1.0], [2.0]]), one, None, 3 * one, None, activation="relu")
tensor([[0.],
        [6.]])
"""

from torch import Tensor

from fasttransformer.reference.dropout import dropout
from fasttransformer.reference.linear_add import ACTIVATIONS, linear

GATES = {"swiglu": "silu", "geglu": "gelu"}


def feed_forward(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Two linear layers with an activation, gated or not, and dropout between them."""
    hidden = linear(input, weight_in, bias_in)
    if activation in GATES:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = ACTIVATIONS[GATES[activation]](gate) * up
    else:
        hidden = ACTIVATIONS[activation](hidden)
    hidden = dropout(hidden, dropout_p, seed)
    return linear(hidden, weight_out, bias_out).to(input.dtype)
