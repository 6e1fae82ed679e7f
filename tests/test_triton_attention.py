"""The Triton kernels of attention, called as operators, in Triton's interpreter."""

import math

import pytest
import torch
from attention_cases import other_signs
from triton_calls import BF16, DEVICE, F16, F32, T, compared, rand

from contract import assert_fair
from fasttransformer import reference
from fasttransformer.kernels import attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on inf − inf


def run_attention(q, k, v, *others, **options):
    """Forward and every gradient against the reference; `options` are the reference's own."""
    results = []

    def draw():
        signs = other_signs([q, k, v]) if results else [q, k, v]
        *result, found = compared_attention(*signs, *others, **options)
        results.append(result)
        return found

    assert_fair(draw)
    return results[0]


def compared_attention(q, k, v, mask=None, bias=None, sinks=None, **options):
    B, H, S, D = q.shape
    shape = (B, H, S, k.shape[2])
    left, right = options.get("window") or (None, None)
    slopes, lengths, seed = (options.get(n) for n in ("alibi_slopes", "key_lengths", "seed"))
    arguments = (
        None if mask is None else mask.to(DEVICE).expand(shape),
        None if bias is None else bias.expand(shape),
        options.get("is_causal", False),
        options.get("causal_alignment") == "bottom_right",
        -1 if left is None else left,
        -1 if right is None else right,
        options.get("softcap") or 0.0,
        None if slopes is None else slopes.to(DEVICE).expand(B, H),
        None if sinks is None else sinks,
        None if lengths is None else lengths.to(DEVICE),
        D**-0.5 if options.get("scale") is None else options["scale"],
        options.get("dropout_p", 0.0),
        None if seed is None else seed.to(DEVICE),
    )
    out, lse = T.attention(q, k, v, *arguments)
    assert out.transpose(1, 2).is_contiguous() and lse.dtype == F32
    dead = lse == -math.inf
    grad_out = rand(*out.shape, dtype=q.dtype)
    grad_lse = torch.where(dead, 0, rand(*lse.shape))
    grads = list(
        T.attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *arguments, bias is not None, sinks is not None
        )
    )
    if bias is None:
        assert grads[3].shape == (0,)
        grads[3] = None
    else:
        assert grads[3].dtype == F32
        own = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        grads[3] = grads[3].sum_to_size(own).view(bias.shape).to(bias.dtype)
    if sinks is None:
        grads[4] = None

    def function(q, k, v, bias, sinks):
        out, lse = reference.attention(
            q, k, v, mask=mask, bias=bias, sinks=sinks, return_lse=True, **options
        )
        return out, torch.where(lse == -math.inf, 0, lse)

    found = compared(
        [out, torch.where(dead, 0, lse)], grads, function, [q, k, v, bias, sinks],
        [grad_out, grad_lse],
    )  # fmt: skip
    return out, lse, grads, found


#: The operator's arguments after the value, for no option and a head size of 16.
PLAIN = (None, None, False, False, -1, -1, 0.0, None, None, None, 0.25, 0.0, None)


def heads(B, H, S, D, dtype=F32):
    """(B, H, S, D) as a projection leaves it: heads last in memory."""
    return rand(B, S, H, D, dtype=dtype).transpose(1, 2)


ATTENTION_CASES = {
    # (heads, key heads, queries, keys, D, E, dtype), options
    "plain": ((2, 2, 64, 96, 32, 32, F32), {}),
    "one query": ((2, 1, 1, 20, 16, 16, F32), {}),  # b19
    "bf16 grouped causal": ((4, 2, 70, 70, 40, 24, BF16), {"is_causal": True}),  # b22
    "f16 bottom right": (
        (2, 1, 40, 75, 16, 20, F16),
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "more queries than keys, bottom right": (
        (1, 1, 70, 40, 16, 16, F32),
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "negative scale": ((1, 1, 40, 40, 16, 16, F32), {"is_causal": True, "scale": -0.5}),  # b26
    "zero scale": ((1, 1, 33, 33, 16, 16, F32), {"is_causal": True, "scale": 0.0}),
    "window": ((1, 1, 70, 130, 16, 16, F32), {"window": (40, 5)}),
    "causal window": (
        (1, 1, 70, 130, 16, 16, BF16),
        {"window": (35, None), "is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "softcap": ((1, 1, 40, 70, 16, 16, F32), {"softcap": 1.5}),
    "alibi": (
        (2, 2, 40, 70, 16, 16, F32),
        {"alibi_slopes": torch.tensor([0.5, 0.06]), "is_causal": True},
    ),
    "key lengths": (
        (1, 1, 33, 70, 16, 16, F32),
        {"key_lengths": torch.tensor([35, 0], dtype=torch.int32)},
    ),
    "dropout": ((2, 1, 40, 37, 16, 16, F32), {"dropout_p": 0.3, "seed": torch.tensor([-5])}),
}


@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_attention(name):
    (H, G, S, K, D, E, dtype), options = ATTENTION_CASES[name]
    q, k, v = heads(2, H, S, D, dtype), heads(2, G, K, D, dtype), heads(2, G, K, E, dtype)
    run_attention(q, k, v, **options)


def test_attention_sinks_with_dead_rows():
    q, k, v = heads(2, 2, 33, 16), heads(2, 2, 40, 16), heads(2, 2, 40, 16)
    lengths = torch.tensor([40, 0], dtype=torch.int32)
    sinks = rand(2)
    out, lse, _ = run_attention(q, k, v, sinks=sinks, key_lengths=lengths)
    assert not out[1].any() and torch.equal(lse[1], sinks[:, None].expand(2, 33))


@pytest.mark.parametrize("shape", [(2, 2, 33, 65), (1, 2, 33, 65), (2, 1, 1, 65), (33, 1), (1,)])
def test_attention_bias_gradient_b16(shape):
    q, k, v = heads(2, 2, 33, 16, BF16), heads(2, 2, 65, 16, BF16), heads(2, 2, 65, 16, BF16)
    # A float32 bias of 16-bit inputs gets a gradient of 16-bit quality: it goes through the
    # rounded out (delta).
    run_attention(q, k, v, bias=rand(*shape, dtype=BF16))


def test_attention_bias_split_and_float32(monkeypatch):
    monkeypatch.setattr(attention, "BIAS_PROGRAMS", 5)
    q, k, v = heads(3, 2, 33, 16), heads(3, 2, 40, 16), heads(3, 2, 40, 16)
    wide = rand(2, 33, 48)
    wide[..., 40:] = math.nan  # b17: the cut-off columns are never read
    run_attention(q, k, v, bias=wide[..., :40])


def test_attention_masks_b01_b04():
    q, k, v = heads(1, 2, 40, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 16)
    mask = torch.rand(1, 2, 40, 70) > 0.5
    mask[:, :, 5] = False
    mask[:, 1, 33:] = False
    out, lse, grads = run_attention(q, k, v, mask=mask)
    assert not out[:, :, 5].any() and (lse[:, :, 5] == -math.inf).all()
    assert not grads[0][:, :, 5].any()
    hidden = k.clone()
    hidden[:, :, 7] = math.nan
    mask[..., 7] = False
    clean, felt = (T.attention(q, keys, v, mask.to(DEVICE), *PLAIN[1:])[0] for keys in (k, hidden))
    assert torch.equal(clean, felt)
    run_attention(q, k, v, mask=torch.rand(40, 1) > 0.5)
    run_attention(q, k, v, bias=torch.where(mask, 0.0, -math.inf).to(DEVICE))


def test_attention_keys_behind_lengths_are_never_read():
    q, k, v = heads(1, 1, 20, 16), heads(1, 1, 70, 16), heads(1, 1, 70, 16)
    k[:, :, 40:], v[:, :, 40:] = math.nan, math.inf
    lengths = torch.tensor([40], dtype=torch.int32)
    _, _, grads = run_attention(q, k, v, key_lengths=lengths)
    assert not grads[1][:, :, 40:].any() and not grads[2][:, :, 40:].any()


def test_attention_nan_query_stays_in_its_row():
    q, k, v = heads(1, 1, 40, 16), heads(1, 1, 40, 16), heads(1, 1, 40, 16)
    clean, _ = T.attention(q, k, v, *PLAIN)
    q = q.clone()
    q[:, :, 3] = math.nan
    out, lse = T.attention(q, k, v, *PLAIN)
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    assert torch.equal(out[:, :, 4:], clean[:, :, 4:])


@pytest.mark.parametrize("length", [65, 97])
def test_attention_tail_lanes_b09(length):
    q, k, v = (rand(1, 1, length, 16) * 0.1 for _ in range(3))
    bias = torch.full((1,), -120.0, device=DEVICE)
    _, lse, grads = run_attention(q, k, v, bias=bias)
    assert lse.max() < -88.7 and all(g.isfinite().all() for g in grads[:3])


def test_attention_strides_b12_b14():
    k = rand(1, 1, 33, 24).expand(1, 4, 33, 24)
    run_attention(rand(1, 4, 5, 24), k, k, mask=torch.rand(1, 1, 5, 33) > 0.3)
    fused = rand(2, 40, 3, 2, 16)
    run_attention(*(fused[:, :, i].transpose(1, 2) for i in range(3)), is_causal=True)


def test_attention_beyond_16_bits_b24(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRETED", attention.Tile(16, 8192, 4, 1))
    q, k, v = rand(1, 1, 4, 16), rand(1, 1, 65537, 16), rand(1, 1, 65537, 16)
    mask = torch.arange(65537, device=DEVICE) >= 65530
    out, _ = T.attention(q, k, v, mask.expand(1, 1, 4, 65537), *PLAIN[1:])
    want = reference.attention(q.cpu(), k[:, :, 65530:].cpu(), v[:, :, 65530:].cpu())
    torch.testing.assert_close(out.cpu(), want)


@pytest.mark.launches_nothing("no tensor has a row and a key")
def test_attention_empty():
    out, lse = T.attention(heads(2, 2, 3, 16), heads(2, 2, 0, 16), heads(2, 2, 0, 8), *PLAIN)
    assert out.shape == (2, 2, 3, 8) and not out.any() and (lse == -math.inf).all()
    q, k = heads(2, 2, 0, 16), heads(2, 2, 5, 16)
    out, lse = T.attention(q, k, k, *PLAIN)
    grads = T.attention_backward(out, None, q, k, k, out, lse, *PLAIN, False, False)
    assert out.shape == (2, 2, 0, 16) and not grads[1].any() and not grads[2].any()
