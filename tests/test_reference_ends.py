"""The reference's two ends: embedding and rotary; cross entropy and the output layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_reference import close, gradients, rand
from torch.autograd import gradcheck

from fasttransformer import reference
from fasttransformer.reference.embedding import sinusoid

# ---------------------------------------------------------------------- cross entropy, output layer


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "kind", ["classes", "classes-ignore-1", "one-row", "dims", "probabilities"]
)
def test_cross_entropy_equals_torch(reduction, smoothing, weighted, kind):
    """pytorch/pytorch#73205."""
    x, target = rand(6, 5, grad=True), torch.tensor([0, -100, 2, 3, -100, 4])
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(5, dtype=torch.float64)
    if kind == "classes-ignore-1":
        target = torch.tensor([0, 1, 2, 1, 4, 4])
        options["ignore_index"] = 1
    elif kind == "one-row":
        x, target = rand(5, grad=True), torch.tensor(3)
    elif kind == "dims":
        x, target = rand(2, 5, 3, 4, grad=True), torch.randint(5, (2, 3, 4))
        target[0, 0, 0] = -100
    elif kind == "probabilities":
        target = torch.rand(6, 5, dtype=torch.float64)
    got, want = reference.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options)
    close(got, want)
    close(gradients(got, x)[0], gradients(want, x)[0])
    assert gradcheck(lambda x: reference.cross_entropy(x, target, **options), x, fast_mode=True)


def test_cross_entropy_edges():
    x, target = rand(3, 4), torch.tensor([-100, -100, -100])
    assert reference.cross_entropy(x, target).isnan()  # as torch: no rows to take the mean of
    assert reference.cross_entropy(x, target, reduction="sum") == 0
    assert reference.cross_entropy(x.bfloat16(), target, reduction="sum").dtype == torch.bfloat16
    with torch.inference_mode():  # linkedin/Liger-Kernel#507
        plain = reference.cross_entropy(x, torch.zeros(3, dtype=torch.int64))
        smooth = reference.cross_entropy(x, torch.zeros(3, dtype=torch.int64), label_smoothing=0.3)
    assert plain > 0 and plain != smooth
    close(
        reference.cross_entropy(x, torch.zeros(3, dtype=torch.int64), size_average=False),
        reference.cross_entropy(x, torch.zeros(3, dtype=torch.int32), reduction="sum"),
    )
    for bad in (-1, 4):
        with pytest.raises((IndexError, RuntimeError)):
            reference.cross_entropy(x, torch.tensor([0, bad, 1]))
    with pytest.raises(ValueError, match="reduction"):
        reference.cross_entropy(x, target, reduction="median")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "dims, bias_shape", [((), None), ((), (5,)), ((3,), None), ((3,), (5,)), ((3,), (5, 3))]
)
def test_linear_cross_entropy_equals_torch(reduction, dims, bias_shape):
    """linkedin/Liger-Kernel#968: an upstream gradient that isn't one."""
    x, weight = rand(8, 6, grad=True), rand(5, *dims, 6, grad=True)
    bias = None if bias_shape is None else rand(*bias_shape, grad=True)
    target = torch.randint(5, (8, *dims))
    target[::3] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(5).double()}
    got = reference.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)
    logits = torch.einsum("nc,v...c->nv...", x, weight)
    if bias is not None:
        logits = logits + (bias if bias.ndim > 1 else bias.view(-1, *[1] * len(dims)))
    want = F.cross_entropy(logits, target, **options)
    close(got, want)
    if hasattr(F, "linear_cross_entropy") and (bias is None or bias.ndim == 1 + len(dims)):
        close(got, F.linear_cross_entropy(x, weight, target, linear_bias=bias, **options))
    inputs = [t for t in (x, weight, bias) if t is not None]
    for a, b in zip(gradients(got, *inputs), gradients(want, *inputs), strict=True):
        close(a, b)
    assert gradcheck(
        lambda *a: reference.linear_cross_entropy(
            *a[:2], target, linear_bias=a[2] if len(a) > 2 else None, **options
        ),
        inputs, fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_linear_softmax_and_topk(temperature):
    x, weight, bias = rand(2, 3, 6, grad=True), rand(9, 6, grad=True), rand(9, grad=True)
    want = torch.softmax(F.linear(x, weight, bias) / temperature, -1)
    got = reference.linear_softmax(x, weight, bias, temperature=temperature)
    close(got, want)
    values, indices = reference.linear_topk(x, weight, bias, k=4, temperature=temperature)
    want_values, want_indices = want.topk(4)
    close(values, want_values)
    assert torch.equal(indices, want_indices)
    for op in (reference.linear_softmax, lambda *a, **o: reference.linear_topk(*a, k=2, **o)[0]):
        assert gradcheck(
            lambda *a, op=op: op(*a, temperature=temperature), (x, weight, bias), fast_mode=True
        )
    assert reference.linear_topk(x, weight, k=0)[0].shape == (2, 3, 0)
    with pytest.raises(ValueError, match="k is 10"):
        reference.linear_topk(x, weight, k=10)


# ---------------------------------------------------------------------------- embedding and rotary


def test_embedding_sums_its_parts():
    weight, table = rand(7, 6, grad=True), rand(9, 6, grad=True)
    ids = torch.tensor([[1, 6, 1], [0, 2, 5]])
    positions = torch.tensor([[0, 1, 2], [3, 8, 0]])
    close(reference.embedding(ids, weight), F.embedding(ids, weight))
    close(reference.embedding(ids.int(), weight, scale=3.0), 3 * F.embedding(ids, weight))
    default = reference.embedding(ids, weight, position_weight=table)
    close(default, F.embedding(ids, weight) + table[:3])

    def run(weight, table):
        return reference.embedding(
            ids, weight, positions=positions, position_weight=table, sinusoidal=True, scale=2.0
        )

    want = 2 * F.embedding(ids, weight) + table[positions] + sinusoid(positions, 6)
    close(run(weight, table), want)
    assert gradcheck(run, (weight, table), fast_mode=True)
    assert reference.embedding(ids[:0], weight, sinusoidal=True).shape == (0, 3, 6)


@pytest.mark.parametrize("features", [1, 6, 7])
def test_sinusoid_equals_the_papers_formula(features):
    for position in (0, 1, 5, 100_000):
        row = sinusoid(torch.tensor(position), features)
        for c in range(features):
            angle = position / 10000 ** ((c - c % 2) / features)
            want = math.cos(angle) if c % 2 else math.sin(angle)
            assert abs(float(row[c]) - want) < 1e-9


@pytest.mark.parametrize("padding_idx", [0, 3, -1, -10])
def test_embedding_padding_row_gets_no_gradient(padding_idx):
    """pytorch/pytorch#26302."""
    weight, ids = rand(10, 5, grad=True), torch.randint(10, (4, 3, 7))
    got = reference.embedding(ids, weight, padding_idx=padding_idx)
    want = F.embedding(ids, weight, padding_idx=padding_idx)
    close(got, want)
    close(gradients(got, weight)[0], gradients(want, weight)[0])


@pytest.mark.parametrize("bad", [[1, -1], [3]])
def test_embedding_refuses_ids_outside_the_table(bad):
    """pytorch/pytorch#183608."""
    with pytest.raises(IndexError):
        reference.embedding(torch.tensor(bad), rand(3, 4))
    with pytest.raises(IndexError):
        reference.embedding(torch.tensor([0]), rand(3, 4), positions=torch.tensor(bad[-1:]),
                            position_weight=rand(3, 4))  # fmt: skip


def rotary_tables(positions, pairs):
    angle = positions[..., None] * 100.0 ** -(torch.arange(pairs).double() / pairs)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("how", ["table", "batch", "ids", "one-ids", "table-of-batch", "expanded"])
def test_rotary_embedding_equals_complex_numbers(interleaved, how):
    """linkedin/Liger-Kernel PR #477."""
    query, key = rand(2, 4, 5, 8, grad=True), rand(2, 2, 5, 8, grad=True)
    before = query.detach().clone(), key.detach().clone()
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    if how in ("table", "one-ids", "expanded"):
        positions = positions[:1].expand(2, 5)
    options = {"interleaved": interleaved}
    if how in ("table", "expanded"):
        tables = rotary_tables(torch.arange(9), 4)
        if how == "expanded":
            tables = [t[:5].expand(2, 5, 4) for t in tables]
    elif how == "batch":
        tables = rotary_tables(positions, 4)
    else:
        tables = rotary_tables(torch.arange(9), 4)
        options["position_ids"] = positions[0] if how == "one-ids" else positions
        if how == "table-of-batch":
            tables = [t[None] for t in tables]
    cos, sin = rotary_tables(positions, 4)
    turned = torch.complex(cos, sin)[:, None]

    def want(x):
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
        z = torch.complex(a, b) * turned
        return (
            torch.stack([z.real, z.imag], -1).flatten(-2)
            if interleaved
            else torch.cat([z.real, z.imag], -1)
        )

    got = reference.rotary_embedding(query, key, *tables, **options)
    for x, out in zip((query, key), got, strict=True):
        close(out, want(x))
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])
    back = reference.rotary_embedding(*got, tables[0], -tables[1], **options)
    close(back[0], query)
    assert gradcheck(
        lambda q, k: reference.rotary_embedding(q, k, *tables, **options), (query, key),
        fast_mode=True,
    )  # fmt: skip


def test_rotary_embedding_takes_transformers_tables():
    query, key = rand(2, 4, 5, 8), rand(2, 2, 5, 8)
    cos, sin = rotary_tables(torch.arange(5).expand(2, 5), 4)
    half = reference.rotary_embedding(query, key, cos, sin)
    full = reference.rotary_embedding(query, key, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])
    for bad, interleaved in (
        (cos.repeat(1, 1, 2), True),
        (cos[..., :3], False),
        (cos[:, :3], False),
    ):
        with pytest.raises(ValueError, match="rotary_embedding"):
            reference.rotary_embedding(query, key, bad, bad, interleaved=interleaved)
