"""cross_entropy: torch's values and gradients, ids out of range, pieces of rows, bad input."""

import pytest
import torch
import torch.nn.functional as F
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.ops import _output_layer

BACKENDS = backends_of("cross_entropy")
TARGET = torch.tensor([0, -100, 2, 3, -100, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("on", BACKENDS)
def test_contract(on, reduction, weighted, label_smoothing, dtype):
    options = {
        "label_smoothing": label_smoothing,
        "weight": torch.rand(5) if weighted else None,
        "reduction": reduction,
    }
    check(
        lambda x: ft.cross_entropy(x, TARGET, **options),
        lambda x: reference.cross_entropy(x, TARGET, **options),
        [torch.randn(6, 5).to(dtype)],
        on=on,
    )


@pytest.mark.parametrize("shape", [(7, 4, 3, 2), (7, 4, 5), (4,)], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_more_and_fewer_dimensions(on, shape):
    target = torch.randint(4, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    for reduction in ("mean", "none"):
        check(
            lambda x: ft.cross_entropy(x, target, reduction=reduction),  # noqa: B023
            lambda x: reference.cross_entropy(x, target, reduction=reduction),  # noqa: B023
            [torch.randn(shape)],
            on=on,
            redraw=lambda: [torch.randn(shape)],
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("on", BACKENDS)
def test_b54_ignored_rows_count_nowhere(monkeypatch, on, reduction, ignore_index, weighted, pieces):
    """pytorch/pytorch#73205: equals the same call on the kept rows."""
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 11)  # two rows of five
    dtype = torch.float64 if on == "torch" else torch.float32
    x = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    target = torch.where(TARGET < 0, ignore_index, TARGET)
    kept = target != ignore_index
    options = {
        "weight": torch.rand(5, dtype=dtype) if weighted else None,
        "label_smoothing": 0.2,
        "reduction": reduction,
    }
    with running_on(on):
        loss = ft.cross_entropy(x, target, ignore_index=ignore_index, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    want = F.cross_entropy(x[kept], target[kept], **options)
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, want)
    (wanted,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[~kept].any()
    if reduction == "none":
        assert not loss[~kept].any()


@pytest.mark.parametrize("on", BACKENDS)
def test_b57_true_loss_without_gradients(on):
    """linkedin/Liger-Kernel#507."""
    x, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, running_on(on):
            plain = ft.cross_entropy(x, target)
            smooth = ft.cross_entropy(x, target, label_smoothing=0.3)
        torch.testing.assert_close(plain, F.cross_entropy(x, target))
        torch.testing.assert_close(smooth, F.cross_entropy(x, target, label_smoothing=0.3))
        assert plain != smooth


def test_b59_pieces_of_a_tensor_past_two_to_the_31():
    """pytorch/pytorch#85786: rows × classes past 2^31. The softmax over all of them takes 12 s on
    two cores (below), so one column of each piece is looked at, and the last rows' losses."""
    columns, rows = 50257, 42740
    x = torch.randn(1, columns).bfloat16().expand(rows, columns)
    assert x.numel() > 2**31
    target = torch.arange(rows) % columns
    seen = []

    def losses(logits, ids):
        seen.append(logits.shape[0])
        return logits[:, 0].float() + ids

    got = _output_layer.by_rows(losses, columns, x, target)
    assert max(seen) * columns <= _output_layer.PIECE and sum(seen) == rows
    torch.testing.assert_close(got, x[:, 0].float() + target)
    tail = ft.cross_entropy(x[-3:], target[-3:], reduction="none")
    logp = torch.log_softmax(x[0].float(), 0)
    torch.testing.assert_close(tail.float(), -logp[target[-3:]], rtol=1e-2, atol=0)


@pytest.mark.parametrize("on", [on for on in BACKENDS if on.startswith("cpu")][-1:])
def test_b59_every_row_past_two_to_the_31(on):
    """pytorch/pytorch#85786: the kernel's losses of all rows (1 s on two cores)."""
    columns, rows = 50257, 42740
    x = torch.randn(1, columns).bfloat16()
    target = torch.arange(rows) * 7 % columns
    with running_on(on):
        total = ft.cross_entropy(x.expand(rows, columns), target, reduction="none")
    logp = torch.log_softmax(x[0].double(), 0)
    torch.testing.assert_close(total.double(), -logp[target], rtol=2**-8, atol=0)


def test_b59_the_whole_of_it(full_size):
    """pytorch/pytorch#85786: every row's loss; the gradient of the row that all are views of."""
    columns, rows = 50257, 42740
    row = torch.randn(1, columns).bfloat16().requires_grad_()
    target = torch.arange(rows) * 7 % columns
    losses = ft.cross_entropy(row.expand(rows, columns), target, reduction="none")
    logp = torch.log_softmax(row.detach().double()[0], 0)
    torch.testing.assert_close(losses.double(), -logp[target], rtol=2**-8, atol=0)
    (got,) = torch.autograd.grad(losses.sum(dtype=torch.float32), row)
    want = rows * logp.exp() - torch.bincount(target, minlength=columns)
    torch.testing.assert_close(got.double()[0], want, rtol=0.05, atol=0.05)  # a sum in 16 bits


@pytest.mark.parametrize("kind", ["classes", "probabilities", "dims"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_rows_equal_the_whole(monkeypatch, kind, reduction, dtype):
    shape = (7, 5, 3) if kind == "dims" else (7, 5)
    target = torch.randint(5, (7, 3) if kind == "dims" else (7,))
    if kind == "probabilities":
        target = torch.rand(7, 5)
    options = {"weight": torch.rand(5), "label_smoothing": 0.1, "reduction": reduction}
    x = torch.randn(shape).to(dtype).requires_grad_()
    whole = ft.cross_entropy(x, target, **options)
    monkeypatch.setattr(_output_layer, "PIECE", 11)
    pieces = ft.cross_entropy(x, target, **options)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in (pieces, whole)))


CPU = [on for on in BACKENDS if on.startswith("cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 17, 33, 2049, 4097, 5000])
@pytest.mark.parametrize("on", CPU)
def test_columns_around_a_vector_and_a_block(on, columns, dtype):
    target = torch.arange(3) * 7919 % columns
    for options in ({}, {"label_smoothing": 0.3, "weight": torch.rand(columns) + 0.5}):
        check(
            lambda x: ft.cross_entropy(x, target, reduction="sum", **options),  # noqa: B023
            lambda x: reference.cross_entropy(x, target, reduction="sum", **options),  # noqa: B023
            [3 * torch.randn(3, columns).to(dtype)],
            on=on,
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on", CPU[-1:])
def test_long_rows(on, dtype, smoothing):
    """262,144 classes; the largest logit in the first, a middle and the last block."""
    x = torch.randn(3, 262144)
    x[0, 5], x[1, 131072], x[2, -1] = 20.0, 20.0, 20.0
    target = torch.tensor([5, 0, 262143])
    check(
        lambda x: ft.cross_entropy(x, target, label_smoothing=smoothing, reduction="none"),
        lambda x: reference.cross_entropy(x, target, label_smoothing=smoothing, reduction="none"),
        [x.to(dtype)],
        on=on,
    )


@pytest.mark.parametrize("on", BACKENDS)
def test_strided_rows_int32_ids_empty_and_all_ignored(on):
    wide = torch.randn(6, 50, requires_grad=True)
    target = torch.tensor([0, 3, -100, 19, 7, 1])
    with running_on(on):
        loss = ft.cross_entropy(wide[:, 5:25], target.int())
        (gradient,) = torch.autograd.grad(loss, wide)
        want = ft.cross_entropy(wide[:, 5:25].contiguous(), target)
        (wanted,) = torch.autograd.grad(want, wide)
        every_other = ft.cross_entropy(wide[::2, :20], target[::2])
        none = torch.full((6,), -100)
        nothing = ft.cross_entropy(wide, none, reduction="sum")
        (zero,) = torch.autograd.grad(nothing, wide)
        assert ft.cross_entropy(wide, none).isnan()
        empty = torch.zeros(0, 5, requires_grad=True)
        assert ft.cross_entropy(empty, none[:0], reduction="none").shape == (0,)
        assert ft.cross_entropy(empty, none[:0], reduction="sum") == 0
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(every_other, F.cross_entropy(wide[::2, :20], target[::2]))
    assert nothing == 0 and not zero.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on", BACKENDS)
def test_nan_and_infinities_stay_in_their_row(on, dtype):
    x = torch.randn(6, 40)
    x[0, 3], x[1, 2], x[3] = float("nan"), float("inf"), -float("inf")
    x[4, 7] = -float("inf")  # an ordinary row: a class that can't be
    x[5, 39] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a NaN of all bits
    target = torch.tensor([1, 2, 0, 5, 1, 0])
    leaf = x.to(dtype).requires_grad_()
    with running_on(on):
        losses = ft.cross_entropy(leaf, target, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.isnan().tolist() == [True, True, False, True, False, True]
    assert gradient.isnan().any(1).tolist() == [True, True, False, True, False, True]
    want = F.cross_entropy(leaf.float(), target, reduction="none")[[2, 4]]
    torch.testing.assert_close(losses[[2, 4]].float(), want, rtol=1e-2, atol=0)
    assert gradient[4, 7] == 0


@pytest.mark.parametrize("on, compiled", [("torch", True), *((on, False) for on in BACKENDS)])
@pytest.mark.parametrize("bad", [-1, 5])
def test_class_out_of_range(bad, on, compiled):
    function = torch.compile(ft.cross_entropy, fullgraph=True) if compiled else ft.cross_entropy
    x = torch.randn(3, 5)
    with running_on(on):
        function(x, torch.tensor([0, 4, -100]))
    message = f"target holds {bad}; it must be in"
    with running_on(on, launched=False), pytest.raises(ValueError, match=message):
        function(x, torch.tensor([0, bad, 1]))


def test_compiles_and_transforms():
    target = torch.tensor([1, 4, 0])
    same_compiled(lambda x: ft.cross_entropy(x, target, label_smoothing=0.1), torch.randn(3, 5))
    x, targets = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    got = torch.vmap(torch.func.grad(ft.cross_entropy))(x, targets)
    each = [torch.func.grad(ft.cross_entropy)(*args) for args in zip(x, targets)]
    torch.testing.assert_close(got, torch.stack(each))


def test_autocast_is_float32():
    x, target = torch.randn(3, 5).bfloat16(), torch.tensor([1, 4, 0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = ft.cross_entropy(x, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), target))


def test_old_names_of_reduction_and_other_ids():
    x, target = torch.randn(3, 5), torch.tensor([1, 4, 0])
    for ids in (torch.int64, torch.int32, torch.uint8):
        loss = ft.cross_entropy(x, target.to(ids), size_average=False)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction="sum"))


def test_backend():
    runs_on_the_reference("cross_entropy", torch.randn(3, 5).double(), torch.tensor([1, 4, 0]))


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 3).long()}, TypeError, "input has dtype torch.int64"),
    ({"input": torch.tensor(1.0)}, ValueError, "input has no dimensions"),
    ({"target": [0, 1]}, TypeError, "target must be a tensor, got list"),
    ({"target": torch.ones(2).bool()}, TypeError, "target has dtype torch.bool"),
    ({"target": torch.ones(3).long()}, ValueError, "target has shape (3,)"),
    ({"target": torch.ones(2)}, ValueError, "target holds probabilities and has shape (2,)"),
    ({"target": torch.ones(2, 3), "ignore_index": 1}, ValueError, "ignore_index is 1, but target"),
    ({"target": torch.tensor([0, 3])}, ValueError, "target holds 3; it must be in [0, 3)"),
    ({"target": torch.tensor([0, 1], device="meta")}, ValueError, "target is on meta"),
    ({"weight": torch.ones(2)}, ValueError, "weight has shape (2,)"),
    ({"weight": torch.ones(3).int()}, TypeError, "weight has dtype torch.int32"),
    ({"reduction": "max"}, ValueError, "reduction is 'max'"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; it must be in [0, 1]"),
    ({"label_smoothing": float("nan")}, ValueError, "label_smoothing is nan"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.randn(2, 3), "target": torch.tensor([0, 2])}
    refuses("cross_entropy", arguments, change, error, text)
