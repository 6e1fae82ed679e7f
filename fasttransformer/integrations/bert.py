"""transformers' BERT family: rows of the swap table, and the forwards that its classes get.

A post-norm encoder layer is three projections, an attention core, and twice a linear layer with
residual and LayerNorm (Vaswani et al., 2017, arXiv:1706.03762; Devlin et al., 2018, 1810.04805).
transformers writes these five modules out again for each model of the family; here each forward
stands once, as a mixin over whichever class it is swapped for, and :data:`FAMILIES` lists the
classes. A forward that meets a case that it does not know (a cache, weights to be returned, another
attention implementation, a function of transformers' or a submodule that was replaced or hooked,
before the swap or after it) runs the original, and ``ft.nn.fallbacks`` says why.

The classes themselves (``bert.BertSelfOutput``) are made when they are first asked for, since their
bases live in transformers' modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear as torch_linear

from .. import patterns
from ..nn._blocks import DROPOUT_FORWARDS as DROPOUT
from ..nn._drop_in import DropIn
from ..nn._fallback import record
from ..nn._plain import activation_name, called_everywhere, kernels_take, parameter, part_reason
from ..nn.linear import LINEAR_FORWARDS as LINEAR
from ..nn.norms import LAYER_NORM_FORWARDS as LAYER_NORM
from ..ops.add_layer_norm import add_layer_norm
from ..ops.attention import attention
from ..ops.linear_add import linear_add
from ..ops.linear_add_layer_norm import linear_add_layer_norm
from ..patterns import Pattern, own_code

#: Keyword arguments of an attention module that do not change what a self-attention computes.
_IGNORED = frozenset(
    {"position_ids", "encoder_hidden_states", "output_hidden_states", "output_attentions",
     "use_cache", "return_dict", "cache"}
)  # fmt: skip
#: Their implementations are attention as everyone knows it; others (flash, flex, a user's own) take
#: other masks or do other maths.
_IMPLEMENTATIONS = frozenset({"eager", "sdpa"})


if TYPE_CHECKING:
    Base = Any
else:
    Base = DropIn


class Swapped(Base):
    """What every target here is: it notes the forward that its source has when it is made."""

    _source_forward: Callable[..., Any] | None = None

    def __init_subclass__(cls) -> None:
        source = cls.__dict__.get("_ft_swapped_from")
        if source is not None and own_code(source, source.forward):
            cls._source_forward = staticmethod(source.forward)

    def _why_original(self, *parts: tuple[str, tuple]) -> str | None:
        """Why the original forward must run: it was replaced on its class, or one of ``parts``
        (name, the forwards that are known for it) has more to it than its parameters."""
        if self._ft_swapped_from.forward is not self._source_forward:  # type: ignore[attr-defined]
            return f"the forward of {self._ft_swapped_from.__name__} is replaced"  # type: ignore
        everywhere = called_everywhere()
        if everywhere is not None:
            return everywhere
        modules: Any = self._modules  # type: ignore[attr-defined]
        for name, forwards in parts:
            found = part_reason(modules[name], forwards)
            if found is not None:
                return f"{name} {found}"
        return None


def linear(x: Tensor, layer: Module, activation: str | None = None) -> Tensor:
    weight, bias = parameter(layer, "weight"), parameter(layer, "bias")
    if activation is None and not x.is_cpu:
        return torch_linear(x, weight, bias)  # see linear_is_faster
    return linear_add(x, weight, bias, activation=activation)


def _own_hooks(module: Module) -> bool:
    """Whether a forward hook of the user's, who may read the attention weights, is on a module."""
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
            return True
    return False


def _wants_weights(module: Any, options: dict[str, Any]) -> bool:
    """Whether somebody reads the attention weights that the eager implementation returns.

    transformers collects them by a forward hook on the module, put there on the first request.
    """
    if options.get("output_attentions"):
        return True
    if not module._forward_hooks or module.config._attn_implementation != "eager":
        return False
    return bool(module.config.output_attentions) or _own_hooks(module)


def _unknown(options: dict[str, Any]) -> str | None:
    for name, value in options.items():
        if value is not None and name not in _IGNORED:
            return name
    return None


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, H·D) from projections of that shape; the heads are views, before and after."""
    size = module.attention_head_size
    batch, length, features = query.shape
    query = query.view(batch, length, -1, size).transpose(1, 2)
    key = key.view(batch, key.shape[1], -1, size).transpose(1, 2)
    value = value.view(batch, value.shape[1], -1, size).transpose(1, 2)
    dropout_p = module._modules["dropout"].p if module.training else 0.0
    scale = module.scaling
    if mask is None:
        # As transformers has it: eager takes causality from its mask alone.
        causal = module.is_causal and length > 1 and module.config._attn_implementation != "eager"
        out = attention(query, key, value, is_causal=causal, scale=scale, dropout_p=dropout_p)
    elif mask.dtype is torch.bool:
        out = attention(query, key, value, mask=mask, scale=scale, dropout_p=dropout_p)
    else:
        out = attention(query, key, value, bias=mask, scale=scale, dropout_p=dropout_p)
    return out.transpose(1, 2).reshape(batch, length, features)


class Attention(Swapped):
    """What attention modules ask before they compute; the children that project, and dropout.

    The attention function that the original would call is looked up at each call, as there: if it
    is not transformers' own, it runs.
    """

    _ft_projections: tuple[str, ...]
    _ft_functions: tuple[Any, ...]
    _ft_parts: tuple[tuple[str, tuple], ...]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        source = cls.__dict__.get("_ft_swapped_from")
        if source is not None:
            cls._ft_functions = attention_functions(source)
            cls._ft_parts = (
                *((name, LINEAR) for name in cls._ft_projections),
                ("dropout", DROPOUT),
            )

    def _why_original_attention(
        self: Any, hidden_states: Tensor, mask: Any, options: dict[str, Any]
    ) -> str | None:
        reason = self._why_original(*self._ft_parts)
        if reason is not None:
            return reason
        if hidden_states.dim() != 3:
            return f"hidden_states has {hidden_states.dim()} dimensions"
        unknown = _unknown(options) if options else None
        if unknown is not None:
            return f"the argument {unknown}"
        if mask is not None and not (
            isinstance(mask, Tensor)
            and mask.dim() == 4
            and (mask.dtype is torch.bool or mask.is_floating_point())
        ):
            return "a mask that is not a boolean or floating-point tensor of four dimensions"
        implementation = self.config._attn_implementation
        if implementation not in _IMPLEMENTATIONS:
            return f"its attention implementation is {implementation!r}"
        function = _attention_function(self._ft_swapped_from, implementation)
        for known in self._ft_functions:
            if function is known:
                return "the attention weights are read" if _wants_weights(self, options) else None
        return f"the attention function {implementation!r} is replaced"


def _attention_function(source: type, implementation: str) -> Any:
    names = vars(sys.modules[source.__module__])
    return names["ALL_ATTENTION_FUNCTIONS"].get(implementation, names["eager_attention_forward"])


def attention_functions(source: type) -> tuple[Any, ...]:
    """transformers' own functions for "eager" and "sdpa", as the module of ``source`` sees them;
    what was put in their place is not among them."""
    found = (_attention_function(source, name) for name in sorted(_IMPLEMENTATIONS))
    return tuple(function for function in found if own_code(source, function))


class SelfAttention(Attention):
    """Three projections and ``ft.attention``; children query, key, value, dropout."""

    _ft_projections = ("query", "key", "value")

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> Any:
        if cache is None and kernels_take(None, hidden_states):
            reason = self._why_original_attention(hidden_states, attention_mask, kwargs)
        else:
            reason = _CACHE if cache is not None else TENSORS
        if reason is not None:
            record(self, reason)
            return super().forward(hidden_states, attention_mask, cache, **kwargs)
        modules: Any = self._modules
        query = linear(hidden_states, modules["query"])
        key = linear(hidden_states, modules["key"])
        value = linear(hidden_states, modules["value"])
        return attend(self, query, key, value, attention_mask), None


_CACHE = "a cache of keys and values"
#: Why an input is none of our kernels'.
TENSORS = "its input is not a plain floating-point tensor, or it is being traced"


class CrossAttention(Attention):
    """As :class:`SelfAttention`, with keys and values from the encoder; never causal."""

    _ft_projections = ("query", "key", "value")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        reason: str | None = None
        if cache is not None:
            reason = _CACHE
        elif not kernels_take(None, hidden_states, encoder_hidden_states):
            reason = TENSORS
        elif encoder_hidden_states is None or encoder_hidden_states.dim() != 3 or self.is_causal:
            reason = "it is not attention to an encoder's states"
        else:
            reason = self._why_original_attention(hidden_states, attention_mask, kwargs)
        if reason is not None:
            record(self, reason)
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, cache, **kwargs
            )
        modules: Any = self._modules
        query = linear(hidden_states, modules["query"])
        key = linear(encoder_hidden_states, modules["key"])
        value = linear(encoder_hidden_states, modules["value"])
        return attend(self, query, key, value, attention_mask), None


class OutputNorm(Swapped):
    """``LayerNorm(dropout(dense(x)) + residual)``; children dense, LayerNorm, dropout."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if kernels_take(None, hidden_states, input_tensor):
            reason = self._why_original(
                ("dense", LINEAR), ("LayerNorm", LAYER_NORM), ("dropout", DROPOUT)
            )
        else:
            reason = TENSORS
        if reason is not None:
            record(self, reason)
            return super().forward(hidden_states, input_tensor)
        modules: Any = self._modules
        dense, norm, dropout = modules["dense"], modules["LayerNorm"], modules["dropout"]
        weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
        dropout_p = dropout.p if dropout.training else 0.0
        if dropout_p == 0.0 and hidden_states.dtype is input_tensor.dtype:
            return linear_add_layer_norm(
                hidden_states,
                parameter(dense, "weight"),
                parameter(dense, "bias"),
                input_tensor,
                weight,
                bias,
                norm.eps,
                return_sum=False,
            )
        # Under autocast the residual stream is float32 and the linear layer's output is not.
        out = linear(hidden_states, dense).to(input_tensor.dtype)
        return add_layer_norm(
            out, input_tensor, norm.normalized_shape, weight, bias, norm.eps, dropout_p=dropout_p
        )[0]


class Intermediate(Swapped):
    """``activation(dense(x))``; children dense, intermediate_act_fn."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        activation = activation_name(self.intermediate_act_fn)
        if not kernels_take(None, hidden_states):
            reason: str | None = TENSORS
        elif activation is None:
            reason = "its activation has no kernel"
        else:
            reason = self._why_original(("dense", LINEAR))
        if reason is not None:
            record(self, reason)
            return super().forward(hidden_states)
        return linear(hidden_states, self._modules["dense"], activation)


class Layer(Swapped):
    """Attention and feed-forward; transformers' cuts the input into chunks, mostly one.

    Finding that out costs it as much time as a small kernel (it inspects a signature).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (
            self.chunk_size_feed_forward
            or (self.is_decoder and encoder_hidden_states is not None)
            or "feed_forward_chunk" in self.__dict__
            or self._why_original() is not None
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                cache,
                **kwargs,
            )
        modules: Any = self._modules
        out, _ = modules["attention"](hidden_states, attention_mask, cache=cache, **kwargs)
        return modules["output"](modules["intermediate"](out), out)


# ---- which classes ------------------------------------------------------------------------------


def attention_reason(module: Any, heads: int, features: int) -> str | None:
    """What holds for every attention module of transformers' that has a config."""
    implementation = module.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"its attention implementation is {implementation!r}"
    source = type(module)
    if _attention_function(source, implementation) not in attention_functions(source):
        return f"the attention function that it calls, {implementation!r}, is replaced"
    if _own_hooks(module) and implementation == "eager":
        return "a forward hook on it may read the attention weights"
    if heads * module.attention_head_size != features:
        return "its heads do not make up its projections"
    return None


def _attention_accepts(module: Any) -> str | None:
    return attention_reason(module, module.num_attention_heads, module.query.out_features)


def _output_accepts(module: Any) -> str | None:
    if tuple(module.LayerNorm.normalized_shape) != (module.dense.out_features,):
        return "its LayerNorm does not span the output of its linear layer"
    return None


def _intermediate_accepts(module: Any) -> str | None:
    if activation_name(module.intermediate_act_fn) is None:
        return f"its activation, {module.intermediate_act_fn}, has no kernel"
    return None


def _layer_accepts(module: Any) -> str | None:
    if "feed_forward_chunk" in module.__dict__:
        return "its feed_forward_chunk is replaced on this instance"
    return None


_LAYER_CHILDREN = dict.fromkeys(("attention", "crossattention", "intermediate", "output"), "called")
_ATTENTION_CHILDREN = {"query": "Linear", "key": "Linear", "value": "Linear", "dropout": "Dropout"}
_OUTPUT_CHILDREN = {"dense": "Linear", "LayerNorm": "LayerNorm", "dropout": "Dropout"}
_INTERMEDIATE_CHILDREN = {"dense": "Linear", "intermediate_act_fn": "activation"}

#: end of the class's name → (mixin, operation, bypassed children, accepts)
PARTS: dict[str, tuple[type, str, dict[str, str], patterns.Reason]] = {
    "Layer": (Layer, "linear_add_layer_norm", _LAYER_CHILDREN, _layer_accepts),
    "SelfAttention": (SelfAttention, "attention", _ATTENTION_CHILDREN, _attention_accepts),
    "CrossAttention": (CrossAttention, "attention", _ATTENTION_CHILDREN, _attention_accepts),
    "SelfOutput": (OutputNorm, "linear_add_layer_norm", _OUTPUT_CHILDREN, _output_accepts),
    "Intermediate": (Intermediate, "linear_add", _INTERMEDIATE_CHILDREN, _intermediate_accepts),
    "Output": (OutputNorm, "linear_add_layer_norm", _OUTPUT_CHILDREN, _output_accepts),
}

_ATTENTION = ("SelfAttention", "CrossAttention")
_FEED_FORWARD = ("Intermediate", "Output")
_ALL = ("Layer", *_ATTENTION, "SelfOutput", *_FEED_FORWARD)

#: file under transformers.models → (prefix of its classes, the parts that are BERT's own forwards).
#: tests/test_swap_bert.py compares the source of each with BERT's.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert.modeling_bert": ("Bert", _ALL),
    "roberta.modeling_roberta": ("Roberta", _ALL),
    "xlm_roberta.modeling_xlm_roberta": ("XLMRoberta", _ALL),
    "camembert.modeling_camembert": ("Camembert", _ALL),
    "electra.modeling_electra": ("Electra", _ALL),
    "ernie.modeling_ernie": ("Ernie", _ALL),
    "roc_bert.modeling_roc_bert": ("RoCBert", _ALL),
    "data2vec.modeling_data2vec_text": ("Data2VecText", _ALL),
    "bert_generation.modeling_bert_generation": ("BertGeneration", _ALL),
    # Pre-norm: their outputs add no LayerNorm, so only what they share with BERT.
    "xlm_roberta_xl.modeling_xlm_roberta_xl": ("XLMRobertaXL", (*_ATTENTION, "Intermediate")),
    "xmod.modeling_xmod": ("Xmod", (*_ATTENTION, "Intermediate")),
    "roberta_prelayernorm.modeling_roberta_prelayernorm": (
        "RobertaPreLayerNorm",
        ("Layer", *_ATTENTION),
    ),
    "megatron_bert.modeling_megatron_bert": ("MegatronBert", ("Intermediate",)),
    # Their attention is of another kind.
    "mpnet.modeling_mpnet": ("MPNet", _FEED_FORWARD),
    "rembert.modeling_rembert": ("RemBert", ("SelfOutput", *_FEED_FORWARD)),
    "layoutlm.modeling_layoutlm": ("LayoutLM", ("SelfOutput", *_FEED_FORWARD)),
    "longformer.modeling_longformer": ("Longformer", ("SelfOutput", *_FEED_FORWARD)),
    "big_bird.modeling_big_bird": ("BigBird", ("SelfOutput", *_FEED_FORWARD)),
    "roformer.modeling_roformer": ("RoFormer", ("SelfOutput", *_FEED_FORWARD)),
    "luke.modeling_luke": ("Luke", ("SelfOutput", *_FEED_FORWARD)),
    "tapas.modeling_tapas": ("Tapas", ("SelfOutput", *_FEED_FORWARD)),
}


def _rows() -> Iterator[tuple[Pattern, type]]:
    for file, (prefix, parts) in FAMILIES.items():
        for part in parts:
            mixin, op, children, accepts = PARTS[part]
            source = f"transformers.models.{file}.{prefix}{part}"
            yield Pattern(source, f"{__name__}.{prefix}{part}", op, children, accepts), mixin


__getattr__ = patterns.targets(globals(), _rows())
