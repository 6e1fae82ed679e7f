"""The public names: their signatures, and docstrings that say all that a user needs."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttransformer as ft

_ATTENTION = (
    "mask=None, bias=None, is_causal=False, causal_alignment='top_left', window=None, "
    "softcap=None, alibi_slopes=None, sinks=None, "
)
_SOFTMAX = "input, dim=-1, *, scale=None, mask=None, is_causal=False, dtype=None"
_LINEAR_NORM = "input, weight, bias=None, residual=None, norm_weight=None, "
SIGNATURES = {
    "attention": f"query, key, value, *, {_ATTENTION}key_lengths=None, scale=None, dropout_p=0.0, "
    "return_lse=False",
    "softmax": _SOFTMAX,
    "log_softmax": _SOFTMAX,
    "add_layer_norm": "input, residual, normalized_shape, weight=None, bias=None, eps=1e-05, *, "
    "dropout_p=0.0",
    "add_rms_norm": "input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0",
    "linear_add": "input, weight, bias=None, residual=None, *, activation=None, dropout_p=0.0",
    "linear_add_layer_norm": f"{_LINEAR_NORM}norm_bias=None, eps=1e-05, *, return_sum=True, "
    "dropout_p=0.0",
    "linear_add_rms_norm": f"{_LINEAR_NORM}eps=None, *, return_sum=True, dropout_p=0.0",
    "feed_forward": "input, weight_in, bias_in, weight_out, bias_out, *, activation='gelu', "
    "dropout_p=0.0",
    "linear_softmax": "input, weight, bias=None, *, temperature=1.0",
    "linear_topk": "input, weight, bias=None, *, k, temperature=1.0",
    "embedding": "input, weight, *, positions=None, position_weight=None, sinusoidal=False, "
    "scale=None, padding_idx=None",
    "rotary_embedding": "query, key, cos, sin, *, interleaved=False, position_ids=None",
    "merge_attention": "outs, lses",
    "linear_cross_entropy": "input, linear_weight, target, *, linear_bias=None, weight=None, "
    "reduction='mean', ignore_index=-100, label_smoothing=0.0, options=None",
    "attention_varlen": "query, key, value, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q=None, "
    f"max_seqlen_k=None, {_ATTENTION}scale=None, dropout_p=0.0, return_lse=False",
}
#: torch's own functions under the same name: all of their parameters, with their defaults.
TORCHS = {
    "scaled_dot_product_attention": (
        "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, "
        "enable_gqa=False"  # torch's is a builtin
    ),
    "layer_norm": F.layer_norm,
    "rms_norm": F.rms_norm,
    "cross_entropy": F.cross_entropy,
}
FUNCTIONS = [*SIGNATURES, *TORCHS, "attention_decode"]
LIKE_TORCHS = [
    "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer",
    "TransformerEncoder", "TransformerDecoder", "Transformer", "LayerNorm", "RMSNorm", "Softmax",
    "Embedding", "Linear",
]  # fmt: skip
MODULES = {
    "AddLayerNorm": "normalized_shape, eps=1e-05, elementwise_affine=True, bias=True, *, "
    "dropout=0.0",
    "AddRMSNorm": "normalized_shape, eps=None, elementwise_affine=True, *, dropout=0.0",
    "OutputProjection": "in_features, out_features, bias=True, *, norm=None, eps=1e-05, "
    "dropout=0.0",
    "FeedForward": "d_model, dim_feedforward, activation='gelu', *, bias=True, dropout=0.0",
    "LMHead": "in_features, out_features, bias=False",
    "RotaryEmbedding": "head_dim, base=10000.0, *, interleaved=False",
    "SinusoidalPositionalEncoding": "embedding_dim, *, dropout=0.0",
    "TokenPositionEmbedding": "num_embeddings, embedding_dim, *, positions='sinusoidal', "
    "max_length=1024, padding_idx=None, scale=None, dropout=0.0",
}
#: Where the formula is the name, or the operation nobody's idea.
NO_SOURCE = {"linear_add", "linear_add_layer_norm", "linear_add_rms_norm", "Linear", "Embedding"}
NO_FORMULA = {"TransformerEncoder", "TransformerDecoder", "Transformer"}


def parameters(function, *without):
    """name, kind and default, without annotations."""
    found = inspect.signature(function).parameters.values()
    return [
        str(p.replace(annotation=p.empty)) + f" {p.kind.name}"
        for p in found
        if p.name not in ("self", *without)
    ]


def declared(text):
    namespace = {}
    exec(f"def f({text}): pass", namespace)
    return parameters(namespace["f"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = getattr(ft, name)
    backend = inspect.signature(function).parameters["backend"]
    assert backend.kind is backend.KEYWORD_ONLY and backend.default is None
    given = parameters(function, "backend")
    if name in SIGNATURES:
        assert given == declared(SIGNATURES[name])
    elif name in TORCHS:
        theirs = TORCHS[name]
        assert given == (declared(theirs) if isinstance(theirs, str) else parameters(theirs))
    else:
        assert given[:2] == declared("query, cache")
        assert {
            "layer=0 KEYWORD_ONLY",
            "new_key=None KEYWORD_ONLY",
            "rotary=None KEYWORD_ONLY",
        } <= {*given}


@pytest.mark.parametrize("name", LIKE_TORCHS)
def test_modules_of_torchs(name):
    ours, theirs = getattr(ft.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "forward"):
        assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_ours(name):
    module = getattr(ft.nn, name)
    assert parameters(module.__init__, "device", "dtype") == declared(MODULES[name])
    hints = inspect.get_annotations(module.__init__)
    assert hints.keys() == inspect.signature(module.__init__).parameters.keys() - {"self"} | {
        "return"
    }


@pytest.mark.parametrize("name", [*FUNCTIONS, *LIKE_TORCHS, *MODULES])
def test_docstrings(name):
    """Formula, shapes, dtypes, errors, source, and an example (test_doctests.py runs it)."""
    public = getattr(ft, name, None) or getattr(ft.nn, name)
    text = inspect.getdoc(public)
    assert vars(public).get("__doc__") is not None if inspect.isclass(public) else text
    assert name in NO_FORMULA or "math:" in text
    assert "(..." in text or "(\\*" in text or "hape" in text or "(B" in text or "heads" in text
    assert "dtype" in text or "float" in text
    assert "Raises:" in text
    assert name in NO_SOURCE or "Source" in text
    assert ">>> " in text


@pytest.mark.parametrize("name", ["swap", "restore", "use_backend", "explain"])
def test_docstrings_of_what_is_no_operation(name):
    text = inspect.getdoc(getattr(ft, name))
    assert "Raises:" in text and ">>> " in text


def test_version_and_all():
    assert ft.__version__ and all(hasattr(ft, name) for name in ft.__all__)
    assert all(hasattr(ft.nn, name) for name in ft.nn.__all__)
    assert torch.nn.Module in ft.nn.LayerNorm.__mro__
