"""Every operation in plain PyTorch: the textbook, the yardstick in float64, the torch backend."""

from fasttransformer.reference.add_layer_norm import add_layer_norm
from fasttransformer.reference.add_rms_norm import add_rms_norm
from fasttransformer.reference.attention import attention, scaled_dot_product_attention
from fasttransformer.reference.dropout import dropout_mask
from fasttransformer.reference.layer_norm import layer_norm
from fasttransformer.reference.linear_add import linear_add
from fasttransformer.reference.linear_add_layer_norm import linear_add_layer_norm
from fasttransformer.reference.linear_add_rms_norm import linear_add_rms_norm
from fasttransformer.reference.rms_norm import rms_norm
from fasttransformer.reference.softmax import log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "dropout_mask",
    "layer_norm",
    "linear_add",
    "linear_add_layer_norm",
    "linear_add_rms_norm",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]
