"""The public functions: argument checks, autocast, the choice of a backend, and autograd."""

from .add_layer_norm import add_layer_norm
from .add_rms_norm import add_rms_norm
from .attention import attention, scaled_dot_product_attention
from .attention_decode import KVCache, attention_decode
from .attention_varlen import attention_varlen
from .cross_entropy import cross_entropy
from .embedding import embedding
from .feed_forward import feed_forward
from .layer_norm import layer_norm
from .linear_add import linear_add
from .linear_add_layer_norm import linear_add_layer_norm
from .linear_add_rms_norm import linear_add_rms_norm
from .linear_cross_entropy import linear_cross_entropy
from .linear_softmax import linear_softmax
from .linear_topk import linear_topk
from .merge_attention import merge_attention
from .rms_norm import rms_norm
from .rotary_embedding import rotary_embedding
from .softmax import log_softmax, softmax

__all__ = [
    "KVCache",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "layer_norm",
    "linear_add",
    "linear_add_layer_norm",
    "linear_add_rms_norm",
    "linear_cross_entropy",
    "linear_softmax",
    "linear_topk",
    "log_softmax",
    "merge_attention",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
]
