"""The models against torch's own Transformer, and what they promise about padding and losses."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttransformer as ft
from fasttransformer.models import (
    Decoder,
    Encoder,
    LanguageModel,
    Seq2SeqModel,
    SpanModel,
    TextClassifier,
    TextModel,
    Tokenizer,
    TransformerConfig,
    layers,
)

V, C, HIDDEN, HEADS = 60, 16, 40, 4


def seq2seq(pre_norm=False, layers=2, **options):
    options = {"dropout": 0.0, **options}
    return Seq2SeqModel(
        Encoder(V, C, HIDDEN, layers, HEADS, pre_norm, **options),
        Decoder(V, C, HIDDEN, layers, HEADS, pre_norm, **options),
    )


def ids_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, V, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, value=0):
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, value)


# ---- against torch ------------------------------------------------------------------------------


def torchs_layer(ours, decoder):
    """torch's layer with our layer's weights."""
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(C, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=ours.pre_norm)
    ff = ours.feed_forward
    state = {
        "self_attn.in_proj_weight": ours.self_attn.in_proj.weight,
        "self_attn.in_proj_bias": ours.self_attn.in_proj.bias,
        "self_attn.out_proj.weight": ours.self_attn.out_proj.weight,
        "self_attn.out_proj.bias": ours.self_attn.out_proj.bias,
        "linear1.weight": ff.linear1.weight, "linear1.bias": ff.linear1.bias,
        "linear2.weight": ff.linear2.weight, "linear2.bias": ff.linear2.bias,
    }  # fmt: skip
    norms = [ours.norm1, ours.norm2, ours.norm3] if decoder else [ours.norm1, ours.norm3]
    for i, norm in enumerate(norms, 1):
        state |= {f"norm{i}.weight": norm.weight, f"norm{i}.bias": norm.bias}
    if decoder:
        cross = ours.cross_attn
        state["multihead_attn.in_proj_weight"] = torch.cat(
            [cross.q_proj.weight, cross.kv_proj.weight]
        )
        state["multihead_attn.in_proj_bias"] = torch.cat([cross.q_proj.bias, cross.kv_proj.bias])
        state["multihead_attn.out_proj.weight"] = cross.out_proj.weight
        state["multihead_attn.out_proj.bias"] = cross.out_proj.bias
    layer.load_state_dict(state)
    return layer


class Torchs(nn.Module):
    """The same model from torch's modules, padded, with the logits stored."""

    def __init__(self, ours):
        super().__init__()
        self.config = ours.config
        self.embedding = [nn.Embedding(V, C, 0), nn.Embedding(V, C, 0)]
        for theirs, stack in zip(self.embedding, (ours.encoder, ours.decoder)):
            theirs.weight = nn.Parameter(stack.embedding.weight.detach().clone())
        self.embedding = nn.ModuleList(self.embedding)
        self.encoder = nn.ModuleList(torchs_layer(x, False) for x in ours.encoder.layers)
        self.decoder = nn.ModuleList(torchs_layer(x, True) for x in ours.decoder.layers)
        self.norms = nn.ModuleList(
            nn.LayerNorm(C) if self.config.pre_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, source, target):
        end = source == 0
        x = self.embed(0, source)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=end)
        memory = self.norms[0](x)
        shifted = target.roll(1, 1)
        shifted[:, 0] = 1
        x = self.embed(1, shifted)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=end)
        return self.norms[1](x) @ self.embedding[1].weight.T

    def embed(self, which, ids):
        position = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
        frequency = 10000.0 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
        angle = position * frequency
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(torch.get_default_dtype())
        return self.embedding[which](ids) * C**0.5 + table


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_loss_logits_and_gradients_are_those_of_torchs_modules(pre_norm):
    ours = seq2seq(pre_norm, activation="relu")
    theirs = Torchs(ours)
    sources, targets = ids_of(5, 1, 7), ids_of(3, 6, 2, seed=1)
    logits = theirs(padded(sources), padded(targets))
    labels = padded(targets, -100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    outputs = ours(sources, targets)
    torch.testing.assert_close(outputs.loss, loss, atol=1e-5, rtol=1e-5)
    real = labels != -100
    torch.testing.assert_close(outputs.logits[real], logits[real], atol=1e-4, rtol=1e-4)
    assert (outputs.logits[~real] == 0).all()
    loss.backward()
    outputs.loss.backward()
    pairs = [(ours.decoder.embedding.weight, theirs.embedding[1].weight),
             (ours.encoder.embedding.weight, theirs.embedding[0].weight)]  # fmt: skip
    for a, b in ((ours.encoder.layers, theirs.encoder), (ours.decoder.layers, theirs.decoder)):
        for x, y in zip(a, b):
            pairs.append((x.self_attn.in_proj.weight, y.self_attn.in_proj_weight))
            pairs.append((x.feed_forward.linear2.bias, y.linear2.bias))
            pairs.append((x.norm1.weight, y.norm1.weight))
    for x, y in pairs:
        torch.testing.assert_close(x.grad, y.grad, atol=2e-5, rtol=1e-4)
