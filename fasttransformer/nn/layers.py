"""TransformerEncoderLayer and TransformerDecoderLayer: residuals, norms and activations fused.

What one layer runs, post-norm: packed projection, attention, output projection + residual + norm,
linear + activation, linear + residual + norm: five kernels. Pre-norm: one norm at the entry; every
later norm is fused with the residual sum before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._blocks import DECODER, ENCODER, dropout_p, hidden, why_not_fused
from ._drop_in import DropIn
from ._fallback import record
from ._plain import kernels_take, run_torchs
from ._project import project_add, project_add_norm, project_norm
from .attention import MultiheadAttention, heads_output
from .linear import Linear
from .norms import LayerNorm

_OURS = {nn.MultiheadAttention: MultiheadAttention, nn.Linear: Linear, nn.LayerNorm: LayerNorm}


def _adopt(layer: nn.Module) -> None:
    """Makes what torch's constructor built ours; parameters stay the objects that they are."""
    for child in layer.children():
        ours = _OURS.get(type(child))
        if ours is not None:
            child.__class__ = ours


class TransformerEncoderLayer(DropIn, nn.TransformerEncoderLayer):
    r"""Drop-in :class:`torch.nn.TransformerEncoderLayer`: same constructor, call, ``state_dict``.

    .. math::
        \text{post-norm:}\quad x &\leftarrow \text{norm}_1(x + \text{SA}(x)), \quad
            x \leftarrow \text{norm}_2(x + W_2\,\phi(W_1 x + b_1) + b_2) \\
        \text{norm\_first:}\quad x &\leftarrow x + \text{SA}(\text{norm}_1(x)), \quad
            x \leftarrow x + W_2\,\phi(W_1 \text{norm}_2(x) + b_1) + b_2

    Training and evaluation, with and without gradients, run the same code, so they agree; torch has
    a second path for evaluation, which casts float masks to bool, returns NaN for padded samples
    and changes the output's dtype under autocast. Any activation works; relu, gelu (exact and tanh)
    and silu are applied inside the product.

    A layer that torch built becomes this one by ``layer.__class__``; its submodules may stay
    torch's. A submodule with hooks, or of a class that neither torch's constructor nor this package
    builds there, is called as torch would call it, and nothing is fused;
    :func:`fasttransformer.nn.fallbacks` says so.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
        norm_first, bias: as in torch.

    Shapes:
        src (B, S, E) with ``batch_first``, else (S, B, E), or (S, E); ``src_mask`` (S, S) or
        (B·nhead, S, S); ``src_key_padding_mask`` (B, S) or (S,); bool True = left out, float =
        added. Output as src.

    Raises:
        ValueError: d_model that nhead doesn't divide; inputs or masks whose shapes don't fit, with
            the shapes.

    Source: Vaswani et al., 2017 (arXiv:1706.03762); pre-norm: Xiong et al., 2020 (2002.04745).

    >>> import torch, fasttransformer as ft
    >>> layer = ft.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> layer(torch.randn(2, 5, 16), is_causal=True, src_mask=torch.ones(5, 5).triu(1).bool()).shape
    torch.Size([2, 5, 16])
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like ``src``."""
        if not kernels_take(nn.TransformerEncoderLayer, src, src_mask, src_key_padding_mask):
            return run_torchs(self, super().forward, src, src_mask, src_key_padding_mask, is_causal)
        reason = why_not_fused(self, ENCODER) or _overridden(self, TransformerEncoderLayer)
        if reason is not None:
            record(self, reason)
            return self._one_by_one(src, src_mask, src_key_padding_mask, is_causal)
        m: dict[str, Any] = self._modules
        attn, norm1, norm2 = m["self_attn"], m["norm1"], m["norm2"]
        linear2, out_proj = m["linear2"], attn.out_proj
        p1, p2 = dropout_p(m["dropout1"]), dropout_p(m["dropout2"])
        x = norm1(src) if self.norm_first else src
        context, _ = heads_output(attn, x, x, x, src_key_padding_mask, src_mask, is_causal)
        if self.norm_first:
            y, x = project_add_norm(context, out_proj.weight, out_proj.bias, src, norm2, p1)
            return project_add(hidden(y, self), linear2.weight, linear2.bias, x, p2)
        x = project_norm(context, out_proj.weight, out_proj.bias, src, norm1, p1)
        return project_norm(hidden(x, self), linear2.weight, linear2.bias, x, norm2, p2)

    def _one_by_one(self, x, mask, padding, is_causal) -> Tensor:
        """torch's training path: every submodule is called, so hooks fire and replacements run."""
        mask, padding = _for_module(self.self_attn, x, mask, padding)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(DropIn, nn.TransformerDecoderLayer):
    r"""Drop-in :class:`torch.nn.TransformerDecoderLayer`: same constructor, call, ``state_dict``.

    .. math::
        x \leftarrow \text{norm}_1(x + \text{SA}(x)), \quad
        x \leftarrow \text{norm}_2(x + \text{CA}(x, \text{memory})), \quad
        x \leftarrow \text{norm}_3(x + \text{FF}(x))

    or, with ``norm_first``, each norm on the block's input. Self-attention is causal only through
    ``tgt_mask`` and its hint ``tgt_is_causal``; attention to the memory never is, unless
    ``memory_mask`` says so. What is fused, and what isn't, is as in
    :class:`TransformerEncoderLayer`; keys and values of the memory take one product.

    Shapes:
        tgt (B, T, E), memory (B, S, E) with ``batch_first``, else lengths before B, or without B;
        ``tgt_mask`` (T, T) or (B·nhead, T, T); ``memory_mask`` (T, S) or (B·nhead, T, S); padding
        masks (B, T), (B, S). Bool True = left out, float = added. Output as tgt.

    Raises:
        ValueError: as :class:`TransformerEncoderLayer`.

    Source: Vaswani et al., 2017 (arXiv:1706.03762); pre-norm: Xiong et al., 2020 (2002.04745).

    >>> import torch, fasttransformer as ft
    >>> layer = ft.nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    >>> layer(torch.randn(2, 3, 16), torch.randn(2, 7, 16)).shape
    torch.Size([2, 3, 16])
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's decoder layer looks for an activation among the plain attributes only, and so
        # puts relu in front of one that is a module, in every copy.
        nn.Module.__setstate__(self, state)
        if not hasattr(self, "activation"):
            self.activation = F.relu

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like ``tgt``."""
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        if not kernels_take(nn.TransformerDecoderLayer, tgt, memory, *masks):
            return run_torchs(
                self, super().forward, tgt, memory, *masks, tgt_is_causal, memory_is_causal
            )
        reason = why_not_fused(self, DECODER) or _overridden(self, TransformerDecoderLayer)
        if reason is not None:
            record(self, reason)
            return self._one_by_one(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        m: dict[str, Any] = self._modules
        self_attn, cross_attn = m["self_attn"], m["multihead_attn"]
        norm1, norm2, norm3, linear2 = m["norm1"], m["norm2"], m["norm3"], m["linear2"]
        p1, p2 = dropout_p(m["dropout1"]), dropout_p(m["dropout2"])
        p3 = dropout_p(m["dropout3"])
        pre = self.norm_first

        def project(context: Tensor, out: nn.Linear, residual: Tensor, norm: nn.Module, p: float):
            found = project_add_norm(
                context, out.weight, out.bias, residual, norm, p, return_sum=pre
            )
            return found if pre else (found, found)

        # `normed` is what the next block reads, `x` the residual that runs past it.
        normed = norm1(tgt) if pre else tgt
        context, _ = heads_output(
            self_attn, normed, normed, normed, tgt_key_padding_mask, tgt_mask, tgt_is_causal
        )
        normed, x = project(context, self_attn.out_proj, tgt, norm2 if pre else norm1, p1)
        context, _ = heads_output(
            cross_attn, normed, memory, memory, memory_key_padding_mask, memory_mask,
            memory_is_causal,
        )  # fmt: skip
        normed, x = project(context, cross_attn.out_proj, x, norm3 if pre else norm2, p2)
        h = hidden(normed, self)
        if pre:
            return project_add(h, linear2.weight, linear2.bias, x, p3)
        return project_norm(h, linear2.weight, linear2.bias, normed, norm3, p3)

    def _one_by_one(
        self, x, memory, mask, memory_mask, padding, memory_padding, is_causal, memory_is_causal
    ) -> Tensor:
        """torch's own order of calls."""
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal)
            x = x + self._mha_block(
                self.norm2(x), memory, memory_mask, memory_padding, memory_is_causal
            )
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal))
        x = self.norm2(
            x + self._mha_block(x, memory, memory_mask, memory_padding, memory_is_causal)
        )
        return self.norm3(x + self._ff_block(x))


_BLOCKS = ("_sa_block", "_mha_block", "_ff_block")


def _overridden(layer: nn.Module, ours: type) -> str | None:
    """A subclass, or a patch of the instance, that replaces one of torch's block methods."""
    kind = type(layer)
    attributes = layer.__dict__
    for name in _BLOCKS:
        if name in attributes or (
            kind is not ours and getattr(kind, name, None) is not getattr(ours, name, None)
        ):
            return f"{name} is overridden: submodules are called one by one"
    return None


def _for_module(
    attn: nn.Module, x: Tensor, mask: Tensor | None, padding: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Masks as torch's layer hands them to an attention module that isn't ours: always float."""
    if isinstance(attn, MultiheadAttention):
        return mask, padding
    padding = F._canonical_mask(
        padding, "src_key_padding_mask", F._none_or_dtype(mask), "src_mask", x.dtype
    )
    return F._canonical_mask(mask, "src_mask", None, "", x.dtype, check_other=False), padding
