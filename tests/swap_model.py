"""The model that the tests of swap and verify work on."""

from __future__ import annotations

import torch
from torch import nn

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
