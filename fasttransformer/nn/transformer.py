"""TransformerEncoder, TransformerDecoder and Transformer: torch's stacks over our layers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from ._drop_in import DropIn
from ._plain import kernels_take, run_torchs
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .norms import LayerNorm


class TransformerEncoder(DropIn, nn.TransformerEncoder):
    r"""Drop-in :class:`torch.nn.TransformerEncoder`: ``num_layers`` copies of a layer, then a norm.

    Evaluation gives what training gives. torch's goes through nested tensors when there is a
    padding mask, which zeroes the padded positions of the output; ours computes them like any
    other (``enable_nested_tensor`` is kept as an attribute and changes nothing). Masks reach our
    layers as they are; other layers get them as torch gives them, as float masks.

    Args:
        encoder_layer: the layer that is copied; as in torch all copies start equal.
        num_layers: how many.
        norm: a module for the end, or None.
        enable_nested_tensor, mask_check: accepted as in torch.

    Shapes and dtypes:
        those of :class:`TransformerEncoderLayer`; ``mask`` is its ``src_mask``.

    Raises:
        ValueError: as the layer does.

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.1.

    >>> import torch, fasttransformer as ft
    >>> layer = ft.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> encoder = ft.nn.TransformerEncoder(layer, 2).eval()
    >>> padding = torch.tensor([[False, False, True]])
    >>> encoder(torch.randn(1, 3, 16), src_key_padding_mask=padding).shape
    torch.Size([1, 3, 16])
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The stack's output; ``is_causal=None`` detects a causal ``mask``, as in torch."""
        if not kernels_take(nn.TransformerEncoder, src, mask, src_key_padding_mask):
            return run_torchs(self, super().forward, src, mask, src_key_padding_mask, is_causal)
        causal = _is_causal(mask, is_causal, src, self.layers)
        if not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            src_key_padding_mask = F._canonical_mask(
                src_key_padding_mask, "src_key_padding_mask", F._none_or_dtype(mask), "mask",
                src.dtype,
            )  # fmt: skip
            mask = F._canonical_mask(mask, "mask", None, "", src.dtype, check_other=False)
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(DropIn, nn.TransformerDecoder):
    r"""Drop-in :class:`torch.nn.TransformerDecoder`: ``num_layers`` copies of a layer, then a norm.

    Args:
        decoder_layer: the layer that is copied; as in torch all copies start equal.
        num_layers: how many.
        norm: a module for the end, or None.

    Shapes and dtypes:
        those of :class:`TransformerDecoderLayer`.

    Raises:
        ValueError: as the layer does.

    Source: Vaswani et al., 2017 (arXiv:1706.03762), section 3.1.

    >>> import torch, fasttransformer as ft
    >>> layer = ft.nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    >>> decoder = ft.nn.TransformerDecoder(layer, 2)
    >>> decoder(torch.randn(1, 3, 16), torch.randn(1, 7, 16)).shape
    torch.Size([1, 3, 16])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The stack's output; ``tgt_is_causal=None`` detects a causal ``tgt_mask``, as in torch."""
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        if not kernels_take(nn.TransformerDecoder, tgt, memory, *masks):
            return run_torchs(
                self, super().forward, tgt, memory, *masks, tgt_is_causal, memory_is_causal
            )
        causal = _is_causal(tgt_mask, tgt_is_causal, tgt, self.layers)
        output = tgt
        for layer in self.layers:
            output = layer(
                output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal, memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)


_SIGNATURE = inspect.signature(nn.Transformer.__init__)


class Transformer(DropIn, nn.Transformer):
    r"""Drop-in :class:`torch.nn.Transformer`: our encoder and decoder under torch's call.

    The same seed gives the same initial parameters as torch's. Arguments as in torch.

    Shapes and dtypes:
        src as of :class:`TransformerEncoderLayer`, tgt as of :class:`TransformerDecoderLayer`,
        output as tgt.

    Raises:
        ValueError: as the layers do.
        RuntimeError: batch or feature sizes of src and tgt that differ, as in torch.

    Source: Vaswani et al., 2017 (arXiv:1706.03762).

    >>> import torch, fasttransformer as ft
    >>> model = ft.nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
    >>> model(torch.randn(2, 7, 16), torch.randn(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    @functools.wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _SIGNATURE.bind(self, *args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        factory = {"device": a["device"], "dtype": a["dtype"]}
        shape = (a["d_model"], a["nhead"], a["dim_feedforward"], a["dropout"], a["activation"],
                 a["layer_norm_eps"], a["batch_first"], a["norm_first"], a["bias"])  # fmt: skip

        def norm() -> LayerNorm:
            return LayerNorm(a["d_model"], eps=a["layer_norm_eps"], bias=a["bias"], **factory)

        if a["custom_encoder"] is None:
            layer = TransformerEncoderLayer(*shape, **factory)
            a["custom_encoder"] = TransformerEncoder(layer, a["num_encoder_layers"], norm())
        if a["custom_decoder"] is None:
            layer = TransformerDecoderLayer(*shape, **factory)
            a["custom_decoder"] = TransformerDecoder(layer, a["num_decoder_layers"], norm())
        super().__init__(*given.args[1:], **given.kwargs)


def _is_causal(mask: Tensor | None, hint: bool | None, x: Tensor, layers: nn.ModuleList) -> bool:
    """torch's detection of a causal mask; not under compilation, where the mask alone speaks."""
    if mask is None or hint is not None:
        return bool(hint)
    if torch.compiler.is_compiling():
        return False
    return _detect_is_causal_mask(mask, None, _get_seq_len(x, layers[0].self_attn.batch_first))  # type: ignore[union-attr,arg-type]
