"""attention_varlen on every backend: each sequence as attention alone gives it, options, empty
sequences, bad boundaries."""

import sys
from unittest import mock

import pytest
import torch
from attention_cases import DTYPES, other_signs, skip_if_unsupported, slow_interpreter
from fronts import refuses, runs_on_the_reference

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.backends import TABLE

BACKENDS = backends_of("attention_varlen")
KERNELS = [name for name in BACKENDS if name != "torch"]


def bounds(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def problem(lengths_q, lengths_k, dtype=torch.float64, heads=4, kv_heads=2):
    q = torch.randn(sum(lengths_q), heads, 8, dtype=dtype, requires_grad=True)
    k = torch.randn(sum(lengths_k), kv_heads, 8, dtype=dtype, requires_grad=True)
    v = torch.randn(sum(lengths_k), kv_heads, 6, dtype=dtype, requires_grad=True)
    return q, k, v


def one_by_one(q, k, v, lengths_q, lengths_k, **options):
    outs, lses, at_q, at_k = [], [], 0, 0
    for n, m in zip(lengths_q, lengths_k):
        one = [x[i : i + length].transpose(0, 1)[None]
               for x, i, length in ((q, at_q, n), (k, at_k, m), (v, at_k, m))]  # fmt: skip
        out, lse = ft.attention(*one, return_lse=True, backend="torch", **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].T)
        at_q, at_k = at_q + n, at_k + m
    return torch.cat(outs), torch.cat(lses)


def compare(on, tensors, lengths_q, lengths_k, bias=None, sinks=None, grads=True, **options):
    """out and lse, and the gradients of query, key, value, bias and sinks, against float64."""
    cu = [bounds(*lengths_q), bounds(*lengths_k)]

    seed = torch.tensor([1234567])

    def call(module, **more):
        def run(query, key, value, bias, sinks):
            return module.attention_varlen(
                query, key, value, *cu, bias=bias, sinks=sinks, return_lse=True, **options, **more
            )

        return run

    front = sys.modules["fasttransformer.ops.attention_varlen"]
    with skip_if_unsupported(), mock.patch.object(front, "new_seed", lambda device: seed):
        check(
            call(ft), call(reference, seed=seed), [*tensors, bias, sinks], grads=grads, on=on,
            redraw=lambda: [*other_signs(tensors), bias, sinks],
        )  # fmt: skip


def packed(lengths_q, lengths_k, dtype, heads=4, kv_heads=2, dim=16, value_dim=None):
    """Slices of one projection, so that rows are strided."""
    value_dim = value_dim or dim
    both = torch.randn(sum(lengths_k), kv_heads, dim + value_dim).to(dtype)
    return [torch.randn(sum(lengths_q), heads, dim).to(dtype), both[..., :dim], both[..., dim:]]


LENGTHS = ((33, 0, 1, 70, 16), (40, 5, 150, 70, 0))
SMALL = ((9, 0, 1, 34, 4), (12, 5, 40, 3, 0))  # for the interpreter


def lengths_for(on):
    return SMALL if on in slow_interpreter else LENGTHS


GRID = {
    "plain": lambda S, T: {},
    "causal": lambda S, T: {"is_causal": True},
    "bottom right": lambda S, T: {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": lambda S, T: {"window": (9, 4), "causal_alignment": "bottom_right"},
    "softcap, scale": lambda S, T: {"softcap": 3.0, "scale": 0.3},
    "alibi per sequence": lambda S, T: {"alibi_slopes": torch.rand(5, 4)},
    "mask": lambda S, T: {"mask": torch.rand(5, 1, S, T) < 0.7},
    "mask of keys": lambda S, T: {"mask": torch.rand(T) < 0.5},
    "dropout": lambda S, T: {"dropout_p": 0.3},
    "longer maximum": lambda S, T: {
        "max_seqlen_q": S + 30,
        "max_seqlen_k": T + 50,
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("options", GRID)
def test_options(on, options):
    dtypes = [torch.float32, torch.bfloat16] if on in ("simt", "cpu:avx512") else [torch.float32]
    for dtype in dtypes:
        lengths = lengths_for(on)
        chosen = GRID[options](*map(max, lengths))
        compare(on, packed(*lengths, dtype), *lengths, **chosen)


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_head_sizes(on, dtype):
    lengths = (20, 7), (35, 64)
    sizes = ((64, None), (24, 40), (5, 3), (128, 128))
    for dim, value_dim in sizes[1:2] if on in slow_interpreter else sizes:
        compare(on, packed(*lengths, dtype, dim=dim, value_dim=value_dim), *lengths)
        compare(on, packed(*lengths, dtype, dim=dim, value_dim=value_dim), *lengths,
                is_causal=True, causal_alignment="bottom_right")  # fmt: skip


@pytest.mark.parametrize("on", KERNELS)
@pytest.mark.parametrize("whole", [(0, 0, 1, 1), (1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0)], ids=str)
def test_gradient_of_a_bias_and_of_sinks(on, whole):
    """`whole`: dimensions (sequence, head, query, key) over which the bias does not broadcast."""
    if on in slow_interpreter and whole != (1, 1, 1, 1):
        pytest.skip("slow in the interpreter")
    lengths = lengths_for(on)
    full = (5, 4, *map(max, lengths))
    bias = torch.randn([n if w else 1 for n, w in zip(full, whole)])
    compare(on, packed(*lengths, torch.float32), *lengths, bias=bias)
    compare(on, packed(*lengths, torch.float32), *lengths, sinks=torch.randn(4))


@pytest.mark.parametrize("on", KERNELS)
def test_rows_whose_lse_says_little(on):
    """The maximum and sum of such rows are found again in the backward, by their own sequence."""
    lengths = lengths_for(on)
    bias = torch.full((5, 1, *map(max, lengths)), -3e4)
    bias[1:3] = 0
    compare(on, packed(*lengths, torch.float32), *lengths, bias=bias)


@pytest.mark.parametrize("on", KERNELS)
def test_other_sequences_are_never_read(on):
    tensors = packed((6, 9), (6, 9), torch.float32)
    with running_on(on):
        want = ft.attention_varlen(*tensors, bounds(6, 9), bounds(6, 9))
        for x in tensors:
            x[6:] = float("nan")
        got = ft.attention_varlen(*tensors, bounds(6, 9), bounds(6, 9))
    torch.testing.assert_close(got[:6], want[:6], rtol=0, atol=0)
    assert got[6:].isnan().all()


@pytest.mark.parametrize("on", [name for name in KERNELS if name in ("simt", "cuda")])
def test_many_keys_are_split(on):
    lengths = (1, 2), (700, 90)
    compare(on, packed(*lengths, torch.bfloat16), *lengths, grads=False)
    compare(on, packed(*lengths, torch.float32), *lengths, grads=False, sinks=torch.randn(4))


def test_operators_keep_torchs_rules():
    q, k, v = packed((5, 3), (4, 6), torch.float32)
    cu = bounds(5, 3), bounds(4, 6)
    arguments = (q, k.contiguous(), v.contiguous(), *cu, 5, 6, None, None, True, False, -1, -1, 0.0,
                 None, None, 0.25, 0.0, None)  # fmt: skip
    operator = torch.ops.fasttransformer.attention_varlen.default
    torch.library.opcheck(operator, arguments)
    out, lse = operator(*arguments)
    backward = torch.ops.fasttransformer.attention_varlen_backward.default
    torch.library.opcheck(
        backward, (out, None, *arguments[:3], out, lse, *arguments[3:], False, False)
    )


@pytest.mark.parametrize("on", [name for name in KERNELS if name != "triton"])
@pytest.mark.parametrize("bad", [[1, 3, 8], [0, 9, 8], [0, 6, 8], [0, 5, 7]], ids=str)
def test_the_kernels_look_at_boundaries_that_the_front_can_not_see(on, bad):
    q, k, v = packed((5, 3), (4, 4), torch.float32)
    right, bad = bounds(4, 4), torch.tensor(bad, dtype=torch.int32)
    with running_on(on) as backend:
        kernel = TABLE["attention_varlen"][backend].forward
        for cu in ((bad, right), (right, bad)):
            with pytest.raises(
                (ValueError, RuntimeError), match="does not rise from 0 to the number of"
            ):
                kernel(q, k, v, *cu, 5, 5, None, None, False, False, -1, -1, 0.0, None, None, 1.0,
                       0.0, None)  # fmt: skip


def test_compiles_with_given_lengths():
    q, k, v = packed((5, 3), (4, 6), torch.float32)
    cu_q, cu_k = bounds(5, 3), bounds(4, 6)

    def run(q, k, v):
        return ft.attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=5, max_seqlen_k=6)

    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


OPTIONS = [
    {},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"window": (2, 1), "softcap": 5.0, "scale": 0.4},
    {"alibi_slopes": torch.rand(4, dtype=torch.float64), "sinks": torch.randn(4).double()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize(
    "lengths", [((5, 1, 7), (3, 4, 9)), ((4, 0, 3), (2, 5, 0)), ((6,), (6,))], ids=str
)
def test_equals_attention_of_each_sequence(lengths, options):
    q, k, v = problem(*lengths)
    cu = [bounds(*n) for n in lengths]
    got = ft.attention_varlen(q, k, v, *cu, return_lse=True, **options)
    want = one_by_one(q, k, v, *lengths, **options)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got[0])
    torch.testing.assert_close(
        torch.autograd.grad((got[0] * weights).sum(), (q, k, v)),
        torch.autograd.grad((want[0] * weights).sum(), (q, k, v)),
    )


def test_b21_empty_sequences():
    """Dao-AILab/flash-attention#1537: lengths 0 with a longest query of 1; no queries; no keys."""
    q, k, v = problem((0, 1, 0, 1), (0, 3, 0, 5), torch.float32, heads=9, kv_heads=3)
    cu_q, cu_k = bounds(0, 1, 0, 1), bounds(0, 3, 0, 5)
    out = ft.attention_varlen(q, k, v, cu_q, cu_k, is_causal=True)
    assert out.shape == (2, 9, 6)
    torch.testing.assert_close(out[0, 3], v[0, 1])  # the first query sees the first key only
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))

    empty = ft.attention_varlen(q[:0], k, v, bounds(0, 0), bounds(3, 5))
    assert empty.shape == (0, 9, 6)
    assert not any(g.any() for g in torch.autograd.grad(empty.sum(), (q, k, v), allow_unused=True)
                   if g is not None)  # fmt: skip

    out, lse = ft.attention_varlen(q, k[:0], v[:0], bounds(2), bounds(0), return_lse=True)
    assert not out.any() and (lse == -float("inf")).all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert not gradient.any()


def test_mask_and_bias_read_each_sequences_corner():
    lengths = (3, 2), (4, 1)
    q, k, v = problem(*lengths)
    cu = [bounds(*n) for n in lengths]
    mask, bias = torch.rand(2, 1, 3, 4) < 0.6, torch.randn(4, 1, 4).double().requires_grad_()
    got = ft.attention_varlen(q, k, v, *cu, mask=mask, bias=bias)
    for b, (rows, keys) in enumerate(((slice(0, 3), slice(0, 4)), (slice(3, 5), slice(4, 5)))):
        n, m = lengths[0][b], lengths[1][b]
        alone = ft.attention(
            *[x[i].transpose(0, 1)[None] for x, i in ((q, rows), (k, keys), (v, keys))],
            mask=mask[b, :, :n, :m], bias=bias[:, :, :m],
        )  # fmt: skip
        torch.testing.assert_close(got[rows], alone[0].transpose(0, 1))
    assert torch.autograd.grad(got.sum(), bias)[0].shape == bias.shape


def test_autocast_dtypes_and_backend():
    q, k, v = (x.detach() for x in problem((3, 2), (3, 2), torch.float32))
    cu = bounds(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ft.attention_varlen(q, k, v, cu, cu).dtype == torch.bfloat16
    _, lse = ft.attention_varlen(*(x.half() for x in (q, k, v)), cu, cu, return_lse=True)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(
        ft.attention_varlen(q, k, v, cu.long(), cu.long(), max_seqlen_q=9, max_seqlen_k=5),
        ft.attention_varlen(q, k, v, cu, cu),
    )
    runs_on_the_reference("attention_varlen", *(x.double() for x in (q, k, v)), cu, cu)


CU = bounds(3, 2)


@pytest.mark.parametrize("change, error, text", [
    ({"query": torch.ones(5, 4, 8).int()}, TypeError, "query has dtype torch.int32"),
    ({"query": torch.ones(1, 5, 4, 8)}, ValueError, "query has shape (1, 5, 4, 8); it must have 3"),
    ({"query": torch.ones(5, 3, 8)}, ValueError, "key has 2 heads, which does not divide"),
    ({"key": torch.ones(5, 2, 7)}, ValueError, "key has head_dim 7, but query has 8"),
    ({"value": torch.ones(4, 2, 6)}, ValueError, "tokens and heads must be equal"),
    ({"key": torch.ones(5, 2, 8).half()}, TypeError, "key has dtype torch.float16"),
    ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens_q has dtype torch.float32"),
    ({"cu_seqlens_q": torch.tensor(5)}, ValueError, "cu_seqlens_q has shape ()"),
    ({"cu_seqlens_q": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens_q falls from 6 to 5"),
    ({"cu_seqlens_q": torch.tensor([1, 3, 5])}, ValueError, "goes from 1 to 5"),
    ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, ValueError, "key's number of tokens, 5"),
    ({"cu_seqlens_k": torch.tensor([0, 5])}, ValueError, "cu_seqlens_q has 3 entries, but"),
    ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2, but the longest sequence has 3"),
    ({"mask": torch.ones(2, 4, 4, 3).bool()}, ValueError, "mask of shape (2, 4, 4, 3)"),
    ({"mask": torch.ones(3, 3)}, TypeError, "mask has dtype torch.float32"),
    ({"bias": torch.ones(4)}, ValueError, "bias of shape (4,)"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes has shape (3,)"),
    ({"sinks": torch.ones(2)}, ValueError, "sinks has shape (2,)"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ({"window": (-1, 2)}, ValueError, "window is (-1, 2)"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; it must be in [0, 1)"),
    ({"causal_alignment": "left"}, ValueError, "causal_alignment is 'left'"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    q, k, v = (x.detach() for x in problem((3, 2), (3, 2), torch.float32))
    arguments = {"query": q, "key": k, "value": v, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    refuses("attention_varlen", arguments, change, error, text)
