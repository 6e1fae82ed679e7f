"""Every operation in plain PyTorch: the textbook, the yardstick in float64, the torch backend."""

from fasttransformer.reference.add_layer_norm import add_layer_norm
from fasttransformer.reference.add_rms_norm import add_rms_norm
from fasttransformer.reference.attention import attention, scaled_dot_product_attention
from fasttransformer.reference.attention_decode import KVCache, attention_decode
from fasttransformer.reference.attention_varlen import attention_varlen
from fasttransformer.reference.cross_entropy import cross_entropy
from fasttransformer.reference.dropout import dropout_mask
from fasttransformer.reference.embedding import embedding
from fasttransformer.reference.feed_forward import feed_forward
from fasttransformer.reference.layer_norm import layer_norm
from fasttransformer.reference.linear_add import linear_add
from fasttransformer.reference.linear_add_layer_norm import linear_add_layer_norm
from fasttransformer.reference.linear_add_rms_norm import linear_add_rms_norm
from fasttransformer.reference.linear_cross_entropy import linear_cross_entropy
from fasttransformer.reference.linear_softmax import linear_softmax
from fasttransformer.reference.linear_topk import linear_topk
from fasttransformer.reference.merge_attention import merge_attention
from fasttransformer.reference.rms_norm import rms_norm
from fasttransformer.reference.rotary_embedding import rotary_embedding
from fasttransformer.reference.softmax import log_softmax, softmax

__all__ = [
    "KVCache",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "cross_entropy",
    "dropout_mask",
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
