"""The models that the tests of swap and verify work on."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fasttransformer as ft

D = 16


class Net(nn.Module):
    """One of each class that the table has, joined to something that runs."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(1)
        options = dict(dim_feedforward=32, dropout=dropout, batch_first=True)
        self.embed = nn.Embedding(20, D)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, 2, **options), 2, norm=nn.LayerNorm(D)
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, **options), 1)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True, dropout=dropout)
        self.rms = nn.RMSNorm(D)
        self.head = nn.Linear(D, 20)
        self.softmax = nn.Softmax(-1)

    def forward(self, ids, padding=None):
        x = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        y = self.decoder(x[:, :3], x, memory_key_padding_mask=padding)
        z, weights = self.attention(y, x, x, key_padding_mask=padding)
        return {"probabilities": self.softmax(self.head(self.rms(z))), "weights": weights}


def ids():
    return torch.arange(12).view(2, 6)


def encoder(**options):
    return nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True, **options)


class SelfAttention(nn.Module):
    """An attention module on one input, so that every model here takes one."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class SelfDecoder(nn.Module):
    """A decoder whose memory is its own input."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(D, 2, 32, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, x):
        return self.decoder(x, x)


MODELS = {
    "Linear": lambda: nn.Linear(D, D),
    "LayerNorm": lambda: nn.LayerNorm(D),
    "RMSNorm": lambda: nn.RMSNorm(D),
    "Softmax": lambda: nn.Softmax(-1),
    "MultiheadAttention": SelfAttention,
    "TransformerEncoderLayer": encoder,
    "TransformerEncoder": lambda: nn.TransformerEncoder(
        encoder(), 2, nn.LayerNorm(D), enable_nested_tensor=False
    ),
    "TransformerDecoder": SelfDecoder,
}


def twins(kind, **options):
    """The original in eval mode and its swapped copy."""
    torch.manual_seed(1)
    original = nn.Sequential(MODELS[kind](**options)).eval()
    swapped = copy.deepcopy(original)
    assert ft.swap(swapped).swapped
    return original, swapped


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def reasons_of(model):
    return {reason for counts in ft.nn.fallbacks(model).values() for reason in counts}
