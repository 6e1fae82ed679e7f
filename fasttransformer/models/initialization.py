r"""How weights start: for all models here, in this one place.

**Linear layers of a stack** are Glorot and Bengio's uniform,
:math:`U(-a, a),\; a = \sqrt{6 / (n_\text{in} + n_\text{out})}`, with zero biases (Understanding the
Difficulty of Training Deep Feedforward Neural Networks, 2010, section 4.2), as torch's Transformer
and Vaswani et al.'s own code have them (2017, arXiv:1706.03762; tensor2tensor's
``uniform_unit_scaling``). The packed projections of query, key and value count as one matrix
(3C, C). Both orders of norms start so, the post-norm of Vaswani et al. and the pre-norm of Xiong et
al. (2020, arXiv:2002.04745, section 3), whose gradients do not grow with depth without more.
``nn.Linear``'s own start, :math:`U(\pm 1/\sqrt{n_\text{in}})`, is smaller by :math:`\sqrt 3` in a
square layer: a decoder learns what its targets have in common and leaves its source unread for
several times as long (docs/training.md has the numbers).

GPT-2 scales the layers that write to the residual stream by :math:`1 / \sqrt{2 \cdot
\text{layers}}` (Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section
2.3). These models don't. There the stream starts with embeddings of a standard deviation of 0.02,
which the blocks outweigh; here it starts with 1, and the scale would leave the blocks, and the
source with them, unheard at first: measured, 45 to over 60 steps in place of 20 to 25 in the test
of four pairs, and a language model behind by 0.1 to 0.35 in its loss at steps 40 and 80.

**Embeddings** are normal with variance 1 / C, and scaled by :math:`\sqrt C` when they are read
(Vaswani et al., section 3.4): a token starts as large as its sinusoidal position. As the output
layer's weight, tied or not, such a matrix makes logits of variance 1 from normed features.

**Heads of an encoder** are normal with a standard deviation of 0.02 and zero biases (Devlin et al.,
BERT, 2019, arXiv:1810.04805: its code's ``initializer_range``).
"""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def start_layers(layers: nn.ModuleList) -> None:
    """Glorot's weights and zero biases of a stack's linear layers."""
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            if name.endswith(("in_proj", "q_proj", "kv_proj")):
                rows = 3 * columns
            bound = math.sqrt(6.0 / (rows + columns))
            module.weight.uniform_(-bound, bound)
            module.bias.zero_()


def start_output_layer(head: nn.Linear) -> None:
    """Logits of variance 1, as a tied embedding makes them."""
    nn.init.normal_(head.weight, std=head.in_features**-0.5)


def start_encoder_head(head: nn.Linear) -> None:
    """Small weights, so that all classes start alike."""
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
