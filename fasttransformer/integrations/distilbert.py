"""transformers' DistilBERT: rows of the swap table, on the parts that bert.py has.

Its layer is BERT's with the projection back inside the attention module and the residuals and norms
inside the block (Sanh et al., 2019, arXiv:1910.01108).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import patterns
from ..nn._fallback import record
from ..nn._plain import activation_name, kernels_take, parameter
from ..ops.add_layer_norm import add_layer_norm
from ..patterns import Pattern
from .bert import (
    LAYER_NORM,
    LINEAR,
    TENSORS,
    Attention,
    Swapped,
    attend,
    attention_reason,
    linear,
)


class SelfAttention(Attention):
    """Projections, ``ft.attention``, projection back; children q_lin, k_lin, v_lin, out_lin."""

    _ft_projections = ("q_lin", "k_lin", "v_lin", "out_lin")

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if kernels_take(None, hidden_states):
            reason = self._why_original_attention(hidden_states, attention_mask, kwargs)
        else:
            reason = TENSORS
        if reason is not None:
            record(self, reason)
            return super().forward(hidden_states, attention_mask, **kwargs)
        modules: Any = self._modules
        query, key, value = (linear(hidden_states, modules[name]) for name in _QKV)
        out = attend(self, query, key, value, attention_mask)
        return linear(out, modules["out_lin"]), None


_QKV = SelfAttention._ft_projections[:3]


class FeedForward(Swapped):
    """``dropout(lin2(activation(lin1(x))))``; transformers' ``forward`` cuts x into chunks."""

    def ff_chunk(self, input: Tensor) -> Tensor:
        activation = activation_name(self.activation)
        if not kernels_take(None, input):
            reason: str | None = TENSORS
        elif activation is None:
            reason = "its activation has no kernel"
        else:
            reason = self._why_original(("lin1", LINEAR), ("lin2", LINEAR))
        if reason is not None:
            record(self, reason)
            return super().ff_chunk(input)
        modules: Any = self._modules
        x = linear(input, modules["lin1"], activation)
        return modules["dropout"](linear(x, modules["lin2"]))


class Block(Swapped):
    """Attention and feed-forward, each followed by ``LayerNorm(x + residual)`` in one kernel."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        if kernels_take(None, hidden_states):
            reason = self._why_original(
                ("sa_layer_norm", LAYER_NORM), ("output_layer_norm", LAYER_NORM)
            )
        else:
            reason = TENSORS
        if reason is not None:
            record(self, reason)
            return super().forward(hidden_states, attention_mask, **kwargs)
        modules: Any = self._modules
        norm1, norm2 = modules["sa_layer_norm"], modules["output_layer_norm"]
        out, _ = modules["attention"](hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = _add_norm(out, hidden_states, norm1)
        return _add_norm(modules["ffn"](hidden_states), hidden_states, norm2)


def _add_norm(x: Tensor, residual: Tensor, norm: Any) -> Tensor:
    return add_layer_norm(
        x.to(residual.dtype),
        residual,
        norm.normalized_shape,
        parameter(norm, "weight"),
        parameter(norm, "bias"),
        norm.eps,
    )[0]


def _attention_accepts(module: Any) -> str | None:
    return attention_reason(module, module.n_heads, module.q_lin.out_features)


def _feed_forward_accepts(module: Any) -> str | None:
    if activation_name(module.activation) is None:
        return f"its activation, {module.activation!r}, has no kernel"
    return None


_LINEARS = dict.fromkeys((*_QKV, "out_lin"), "Linear")
_PATH = "transformers.models.distilbert.modeling_distilbert"
_ROWS = (
    (
        Pattern(
            f"{_PATH}.DistilBertSelfAttention",
            f"{__name__}.DistilBertSelfAttention",
            "attention",
            {**_LINEARS, "dropout": "Dropout"},
            _attention_accepts,
        ),
        SelfAttention,
    ),
    (
        Pattern(
            f"{_PATH}.FFN",
            f"{__name__}.FFN",
            "linear_add",
            {"lin1": "Linear", "lin2": "Linear", "dropout": "called", "activation": "activation"},
            _feed_forward_accepts,
        ),
        FeedForward,
    ),
    (
        Pattern(
            f"{_PATH}.TransformerBlock",
            f"{__name__}.TransformerBlock",
            "add_layer_norm",
            {
                "attention": "called",
                "sa_layer_norm": "LayerNorm",
                "ffn": "called",
                "output_layer_norm": "LayerNorm",
            },
        ),
        Block,
    ),
)

__getattr__ = patterns.targets(globals(), _ROWS)
