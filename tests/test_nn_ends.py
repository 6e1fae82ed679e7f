"""The modules at a model's two ends: embeddings with positions, rotary positions, output layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttransformer as ft
from fasttransformer.ops._activation import dropout


def table(length, features):
    p = torch.arange(length, dtype=torch.float64)[:, None]
    angle = p / 10000.0 ** (torch.arange(0, features, 2, dtype=torch.float64) / features)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", None])
def test_token_position_embedding(positions, dtype):
    module = ft.nn.TokenPositionEmbedding(
        20, 6, positions=positions, max_length=9, padding_idx=0, dtype=dtype
    )
    ids = torch.tensor([[3, 0, 19], [1, 1, 2]])
    place = torch.tensor([[0, 1, 2], [4, 8, 0]])
    added = {"sinusoidal": table(9, 6), None: torch.zeros(9, 6)}.get(positions)
    if added is None:
        added = module.position_weight.double()
    for given, at in ((None, torch.arange(3)), (place, place)):
        wanted = module.weight.double()[ids] * math.sqrt(6) + added[at]
        torch.testing.assert_close(module(ids, given), wanted.to(dtype))
    module(ids, place).sum().backward()
    assert (module.weight.grad[0] == 0).all() and (module.weight[0] == 0).all()
    assert set(module.state_dict()) == {"weight"} | (
        {"position_weight"} if positions == "learned" else set()
    )


def test_token_position_embedding_drops_in_training_alone():
    module = ft.nn.TokenPositionEmbedding(20, 400, dropout=0.5, scale=1.0)
    ids = torch.arange(5)
    assert 0.3 < (module(ids) == 0).float().mean() < 0.7
    assert (module.eval()(ids) == 0).sum() < 10
    for wrong in ({"positions": "none"}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ft.nn.TokenPositionEmbedding(20, 4, **wrong)
    with pytest.raises(ValueError, match="holds 20"):
        module(torch.tensor([20]))  # b62
    learned = ft.nn.TokenPositionEmbedding(20, 4, positions="learned", max_length=3)
    with pytest.raises(ValueError, match="3 positions"):
        learned(torch.zeros(4, dtype=torch.long))


def test_sinusoidal_positional_encoding():
    module = ft.nn.SinusoidalPositionalEncoding(8)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(module(x), x + table(7, 8).float())
    place = torch.tensor([3, 0, 6, 6, 1, 2, 5])
    torch.testing.assert_close(module(x, place), x + table(7, 8)[place].float())
    assert module(x.bfloat16()).dtype == torch.bfloat16 and not list(module.parameters())
    with pytest.raises(ValueError, match=r"\(\*, length, 8\)"):
        module(torch.randn(7, 9))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_embedding(interleaved):
    module = ft.nn.RotaryEmbedding(8, interleaved=interleaved)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    place = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 40]])
    q, k = module(query, key, place)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    for x, y in ((query, q), (key, k)):
        for i, (a, b) in enumerate(pairs):
            angle = place[:, None].double() * 10000.0 ** (-2 * i / 8)
            turned = torch.complex(x[..., a], x[..., b]).to(torch.complex128) * torch.polar(
                torch.ones_like(angle), angle
            )
            torch.testing.assert_close(y[..., a], turned.real.float(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(y[..., b], turned.imag.float(), atol=1e-5, rtol=1e-5)
    first = module(query, key)
    torch.testing.assert_close(first[0][0], q[0])
    assert not module.state_dict()
    with torch.device("meta"):
        model = nn.Sequential(ft.nn.RotaryEmbedding(8))
    again = model.to_empty(device="cpu")[0](query, key, place)  # nothing was left unfilled
    torch.testing.assert_close(again[0], module(query, key, place)[0]) if not interleaved else None
    with pytest.raises(ValueError, match="head_dim is 7"):
        ft.nn.RotaryEmbedding(7)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_lm_head(bias):
    head = ft.nn.LMHead(8, 50, bias)
    x, target = torch.randn(6, 8), torch.tensor([1, 49, -100, 0, 7, 7])
    logits = F.linear(x, head.weight, head.bias)
    torch.testing.assert_close(head(x), logits)
    for reduction in ("mean", "sum", "none"):  # b54, b56
        wanted = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1)
        loss = head.loss(x, target, reduction=reduction, label_smoothing=0.1)
        torch.testing.assert_close(loss, wanted)
        grads = torch.autograd.grad(loss.sum(), head.parameters())
        for ours, theirs in zip(
            grads, torch.autograd.grad(wanted.sum(), head.parameters(), retain_graph=True)
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    values, indices = head.topk(x, 3, temperature=2.0)
    wanted = (logits / 2.0).softmax(-1).topk(3)
    torch.testing.assert_close(values, wanted.values)
    assert torch.equal(indices, wanted.indices)


def test_lm_head_is_tied_by_assignment():
    """b66."""
    embedding, head = nn.Embedding(50, 8), ft.nn.LMHead(8, 50)
    head.weight = embedding.weight
    head.loss(embedding(torch.tensor([3])), torch.tensor([4])).backward()
    assert head.weight.grad is embedding.weight.grad
    assert head.weight.grad[3].abs().sum() > 0 and head.weight.grad[20].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_of_the_cpu(p, dtype):
    x = torch.full((999, 1001), 3.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    y = dropout(x, p)
    kept = y != 0
    count = x.numel()
    assert (
        abs(kept.sum().item() - count * (1 - p))
        < 5 * math.sqrt(count * p * (1 - p)) + count / 2**17
    )
    assert y[kept].unique().numel() == 1
    assert abs(y.double().mean().item() / 3 - 1) < (0.01 if p < 0.9 else 0.2)
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    columns = kept.double().mean(0)  # no pattern of four
    assert all(abs(columns[i::4].mean() - (1 - p)) < 0.01 for i in range(4))
    torch.manual_seed(4)
    assert torch.equal(dropout(x, p), y) and not torch.equal(dropout(x, p), y)
    assert dropout(torch.ones(0, 3), p).shape == (0, 3)
