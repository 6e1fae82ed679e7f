"""merge_attention: the parts give the whole, in any order and grouping; gradients; bad input."""

import pytest
import torch
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference


def parts_of(q, k, v, cuts, **options):
    pieces = zip(k.split(cuts, 2), v.split(cuts, 2))
    return zip(*[ft.attention(q, a, b, return_lse=True, **options) for a, b in pieces])


@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 0, 2, 2]], ids=str)
def test_parts_give_the_whole(cuts):
    q, k, v = (torch.randn(2, 3, n, 8).double().requires_grad_() for n in (5, 7, 7))
    outs, lses = parts_of(q, k, v, cuts)
    got = ft.merge_attention(outs, lses)
    want = ft.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got[0])
    torch.testing.assert_close(
        torch.autograd.grad((got[0] * weights).sum() + got[1].sum(), (q, k, v)),
        torch.autograd.grad((want[0] * weights).sum() + want[1].sum(), (q, k, v)),
    )


def test_order_and_grouping_do_not_matter():
    outs, lses = torch.randn(4, 2, 5, 8).double(), torch.randn(4, 2, 5).double() * 30
    whole = ft.merge_attention(outs, lses)
    torch.testing.assert_close(ft.merge_attention(outs.flip(0), lses.flip(0)), whole)
    halves = [ft.merge_attention(outs[i : i + 2], lses[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(ft.merge_attention(*zip(*halves)), whole)


SHAPES = [(3, 5), (2, 0, 4), (2, 7, 33), (4, 2, 3, 9, 64), (2, 1, 2, 1, 3, 8), (20, 6, 130)]


@pytest.mark.parametrize("on", backends_of("merge_attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(on, dtype, shape):
    def run(module):
        return lambda o, l: module.merge_attention(
            o, l.to(torch.promote_types(o.dtype, torch.float32))
        )

    outs, lses = torch.randn(shape).to(dtype), torch.randn(shape[:-1]) * 3
    if len(lses) > 2 and lses[0].numel() > 1:
        lses.view(len(lses), -1)[0, 0] = -float("inf")  # a part without a key
        lses.view(len(lses), -1)[:, 1] = -float("inf")  # a row without one
    check(run(ft), run(reference), [outs, lses], on=on,
          redraw=lambda: [torch.where(torch.rand(shape) < 0.5, outs, -outs), lses])  # fmt: skip


@pytest.mark.parametrize("on", backends_of("merge_attention"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("parts", [17, 33, 40, 70, 260])
def test_f12_more_parts_than_a_kernel_takes(on, dtype, parts):
    """They are merged in turns, between which nothing is rounded to 16 bits. The gradient of an lse
    feels that most where the parts are alike, as means of many values are."""

    def inputs():
        outs, lses = torch.randn(parts, 4, 24) * 0.1 + torch.randn(24), torch.randn(parts, 4)
        lses[:, 0] = lses[1::3, 1] = -float("inf")  # a row without a key, parts without one
        return outs.to(dtype), lses

    check(ft.merge_attention, reference_of(dtype), inputs(), on=on, redraw=inputs)
    check(
        lambda *given: ft.merge_attention(given[:parts], given[parts:]),
        lambda *given: reference_of(dtype)(torch.stack(given[:parts]), torch.stack(given[parts:])),
        [x for stacked in inputs() for x in stacked],
        on=on,
        redraw=lambda: [x for stacked in inputs() for x in stacked],
    )


def reference_of(dtype):
    def run(outs, lses):
        return reference.merge_attention(outs, lses.to(torch.promote_types(outs.dtype, lses.dtype)))

    return run


@pytest.mark.parametrize("on", backends_of("merge_attention"))
def test_strided_parts_and_other_values(on):
    inf, nan = float("inf"), float("nan")
    outs = torch.randn(2, 5, 3, 2, 8).transpose(2, 3)  # as attention gives them
    lses = torch.randn(2, 2, 5, 3).permute(0, 2, 1, 3).contiguous()
    lses[:, 0, 0, 0] = torch.tensor([nan, 1.0])
    lses[:, 1, 0, 0] = torch.tensor([-inf, 2.0])
    outs[0, 1, 0, 0] = nan  # of a part without a key: not felt
    with running_on(on):
        out, lse = ft.merge_attention(outs, lses)
    want, want_lse = reference.merge_attention(outs.nan_to_num(), lses)
    torch.testing.assert_close((out, lse), (want, want_lse), equal_nan=True)
    assert out[0, 0, 0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("parts", [2, 18])
def test_transforms(parts):
    outs, lses = torch.randn(parts, 3, 4, 5), torch.randn(parts, 3, 4)
    whole = ft.merge_attention(outs, lses)
    per_sample = torch.func.vmap(ft.merge_attention, in_dims=1)(outs, lses)
    torch.testing.assert_close(per_sample, whole)

    def loss(outs, lses):
        out, lse = ft.merge_attention(outs, lses)
        return out.square().sum() + lse.square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=1)(outs, lses)
    want = torch.func.grad(loss, argnums=(0, 1))(outs, lses)
    torch.testing.assert_close(tuple(g.transpose(0, 1) for g in got), want)


def test_operators_keep_torchs_rules():
    for outs in (torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 3, 5).transpose(2, 3)):
        lses = list(torch.randn(outs.shape[:-1]).contiguous())
        merge = torch.ops.fasttransformer.merge_attention.default
        torch.library.opcheck(merge, (list(outs), lses))
        out, lse = merge(list(outs), lses)
        torch.library.opcheck(
            torch.ops.fasttransformer.merge_attention_backward.default,
            (out, lse, list(outs), lses),
        )


def test_parts_without_keys():
    inf = float("inf")
    outs, lses = torch.randn(2, 3, 4), torch.tensor([[0.5, -inf, -inf], [-inf, 1.5, -inf]])
    out, lse = ft.merge_attention(outs, lses)
    torch.testing.assert_close(out, torch.stack([outs[0, 0], outs[1, 1], torch.zeros(4)]))
    assert lse.tolist() == [0.5, 1.5, -inf]
    outs.requires_grad_()
    (gradient,) = torch.autograd.grad(ft.merge_attention(outs, lses)[0].sum(), outs)
    assert not gradient[:, 2].any() and gradient.isfinite().all()


def test_compiles_and_backend():
    for parts in (18, 2):
        outs, lses = torch.randn(parts, 3, 4), torch.randn(parts, 3)
        same_compiled(ft.merge_attention, outs, lses)
    runs_on_the_reference("merge_attention", outs.double(), lses.double())


@pytest.mark.parametrize("change, error, text", [
    ({"outs": [], "lses": []}, ValueError, "there are 0 outs and 0 lses"),
    ({"lses": torch.ones(3, 3)}, ValueError, "there are 2 outs and 3 lses"),
    ({"outs": [torch.ones(3, 4), torch.ones(3, 4).half()]}, TypeError, "outs[1] has dtype"),
    ({"outs": [torch.ones(3, 4), torch.ones(3, 5)]}, ValueError, "outs[1] has shape (3, 5), but"),
    ({"outs": torch.ones(2, 3, 4).int()}, TypeError, "outs has dtype torch.int32"),
    ({"outs": [torch.ones(3, 4), None]}, TypeError, "outs[1] must be a tensor, got NoneType"),
    ({"lses": torch.ones(2, 4)}, ValueError, "lses[0] has shape (4,); outs[0]'s makes it (3,)"),
    ({"lses": torch.ones(2, 3).half()}, TypeError, "lses[0] has dtype torch.float16; with outs of"),
    ({"lses": torch.ones(2, 3, device="meta")}, ValueError, "lses[0] is on meta"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"outs": torch.randn(2, 3, 4), "lses": torch.randn(2, 3)}
    refuses("merge_attention", arguments, change, error, text)
