"""Triton kernels, one file per operation, registered as ``fasttransformer_triton::<op>``.

Importing this package defines the operators; nothing is compiled and no device is touched before
the first call. ``_register`` defines operators, ``_device`` holds functions that kernels share,
``_norm``, ``_matmul`` and ``_output_layer`` the kernels that several operations share.
"""

# With the repository's root on sys.path, transformers finds this folder when it looks for PyPI's
# package "kernels", and imports it; under that name it stays empty.
if __name__ != "kernels":
    from . import activation as activation
    from . import add_layer_norm as add_layer_norm
    from . import add_rms_norm as add_rms_norm
    from . import attention as attention
    from . import attention_decode as attention_decode
    from . import attention_varlen as attention_varlen
    from . import cross_entropy as cross_entropy
    from . import embedding as embedding
    from . import layer_norm as layer_norm
    from . import linear_add as linear_add
    from . import linear_add_layer_norm as linear_add_layer_norm
    from . import linear_add_rms_norm as linear_add_rms_norm
    from . import linear_cross_entropy as linear_cross_entropy
    from . import linear_softmax as linear_softmax
    from . import linear_topk as linear_topk
    from . import rms_norm as rms_norm
    from . import rotary_embedding as rotary_embedding
    from . import softmax as softmax
