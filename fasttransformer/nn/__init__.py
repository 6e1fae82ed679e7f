"""Drop-in modules: torch's constructors, calls and ``state_dict`` keys on our kernels.

Those that torch has are subclasses of torch's own, and their ``forward`` relies on nothing but what
torch's constructor sets; so ``module.__class__ = ft.nn.LayerNorm`` turns a module into ours and
back. What a kernel doesn't cover runs torch's own forward, and :func:`fallbacks` lists it.

>>> import torch, fasttransformer as ft
>>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
>>> x = torch.randn(2, 5, 16)
>>> before = layer(x)
>>> layer.__class__ = ft.nn.TransformerEncoderLayer
>>> torch.allclose(layer(x), before, atol=1e-5)
True
"""

from ._fallback import fallbacks
from .attention import MultiheadAttention
from .input import RotaryEmbedding, SinusoidalPositionalEncoding, TokenPositionEmbedding
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .linear import Embedding, FeedForward, Linear, OutputProjection, Softmax
from .lm_head import LMHead
from .norms import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .transformer import Transformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "Embedding",
    "FeedForward",
    "LMHead",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "OutputProjection",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "TokenPositionEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "fallbacks",
]
