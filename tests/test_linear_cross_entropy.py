"""linear_cross_entropy: the unfused pair's values and gradients, memory, bad input."""

import pytest
import torch
import torch.nn.functional as F
from fronts import refuses, runs_on_the_reference, same_compiled

import fasttransformer as ft
from contract import check
from fasttransformer import reference
from fasttransformer.ops import _output_layer

TARGET = torch.tensor([0, -100, 2, 14, -100, 4, 3, -100])


def problem(dtype=torch.float32):
    """input, linear_weight, linear_bias."""
    return torch.randn(8, 10).to(dtype), torch.randn(15, 10).to(dtype), torch.randn(15).to(dtype)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_contract(monkeypatch, reduction, dtype, pieces):
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 50)  # three rows
    options = {"label_smoothing": 0.2, "weight": torch.rand(15), "reduction": reduction}
    check(
        lambda x, w, b: ft.linear_cross_entropy(x, w, TARGET, linear_bias=b, **options),
        lambda x, w, b: reference.linear_cross_entropy(x, w, TARGET, linear_bias=b, **options),
        problem(dtype),
    )


@pytest.mark.parametrize("pieces", [False, True])
def test_b56_gradients_of_single_losses(monkeypatch, pieces):
    """linkedin/Liger-Kernel#968: each token's loss weighted, backward twice over one graph."""
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 50)
    leaves = [t.double().requires_grad_() for t in problem()]
    weights = torch.rand(8, dtype=torch.float64)
    x, w, b = leaves
    ours = ft.linear_cross_entropy(x, w, TARGET, linear_bias=b, reduction="none")
    theirs = F.cross_entropy(F.linear(x, w, b), TARGET, reduction="none")
    torch.testing.assert_close(ours, theirs)
    want = torch.autograd.grad((theirs * weights).sum(), leaves)
    for _ in range(2):
        got = torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_b57_true_loss_without_gradients():
    """linkedin/Liger-Kernel#507."""
    x, w, _ = problem()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            plain = ft.linear_cross_entropy(x, w, TARGET)
            smooth = ft.linear_cross_entropy(x, w, TARGET, label_smoothing=0.3)
        torch.testing.assert_close(plain, F.cross_entropy(x @ w.T, TARGET))
        assert plain != smooth


def test_b54_ignored_rows_count_nowhere():
    """pytorch/pytorch#73205."""
    x, w, b = problem()
    kept = TARGET >= 0
    x[~kept] = float("nan")  # not even these
    for reduction in ("mean", "sum"):
        options = {"linear_bias": b, "reduction": reduction, "label_smoothing": 0.1}
        torch.testing.assert_close(
            ft.linear_cross_entropy(x, w, TARGET, **options),
            ft.linear_cross_entropy(x[kept], w, TARGET[kept], **options),
        )


def test_b59_logits_are_never_stored(monkeypatch):
    """pytorch/pytorch#85786: what lives at a time is a piece of the rows, forward and backward.
    Past 2^31 logits it takes 13 s on two cores, with the gradients 40 s (below)."""
    monkeypatch.setattr(_output_layer, "PIECE", 1 << 16)
    rows, classes = 4096, 1000  # all logits: 16 MB
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    target = torch.randint(classes, (rows,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        loss = ft.linear_cross_entropy(x, w, target)
    assert sum(kept) < 40 * 1000  # inputs, never logits
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, target))
    got = torch.autograd.grad(loss, (x, w))
    want = torch.autograd.grad(F.cross_entropy(x @ w.T, target), (x, w))
    torch.testing.assert_close(got, want)


def test_b59_rows_times_classes_past_2_31(full_size):
    """pytorch/pytorch#85786: every row's loss, and all gradients, which are small."""
    columns, rows = 50257, 42740
    x = torch.randn(1, 2, dtype=torch.float64).expand(rows, 2)
    w, target = torch.randn(columns, 2, dtype=torch.float64), torch.arange(rows) * 7 % columns
    leaves = [t.float().requires_grad_() for t in (x, w)]
    losses = ft.linear_cross_entropy(*leaves, target, reduction="none")
    logp = torch.log_softmax(w @ x[0], 0)
    torch.testing.assert_close(losses.double(), -logp[target], rtol=1e-5, atol=0)
    got = torch.autograd.grad(losses.sum(), leaves)
    p = logp.exp()
    torch.testing.assert_close(got[0].double(), p @ w - w[target], rtol=1e-4, atol=1e-4)
    want = (rows * p - torch.bincount(target, minlength=columns))[:, None] * x[:1]
    torch.testing.assert_close(got[1].double(), want, rtol=1e-3, atol=1e-3)


def test_more_dimensions():
    x, w, target = torch.randn(6, 4), torch.randn(5, 3, 4), torch.randint(5, (6, 3))
    for bias in (None, torch.randn(5), torch.randn(5, 3)):
        logits = torch.einsum("nc,vdc->nvd", x, w)
        if bias is not None:
            logits = logits + (bias if bias.dim() == 2 else bias[:, None])
        torch.testing.assert_close(
            ft.linear_cross_entropy(x, w, target, linear_bias=bias),
            F.cross_entropy(logits, target),
        )
    one = ft.linear_cross_entropy(x[0], w[:, 0], target[0, 0])
    torch.testing.assert_close(one, F.cross_entropy(w[:, 0] @ x[0], target[0, 0]))


def test_probabilities_and_torchs_default_ignore_index():
    x, w, _ = problem()
    p = torch.rand(8, 15)
    got = ft.linear_cross_entropy(x, w, p)
    torch.testing.assert_close(got, F.cross_entropy(x @ w.T, p))
    got = ft.linear_cross_entropy(x, w, TARGET, ignore_index=None)
    torch.testing.assert_close(got, F.cross_entropy(x @ w.T, TARGET))


def test_autocast_multiplies_narrow_and_gives_float32():
    x, w, b = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ft.linear_cross_entropy(x, w, TARGET, linear_bias=b)
        theirs = F.linear_cross_entropy(x, w, TARGET, linear_bias=b)
    assert loss.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(loss, theirs, rtol=2e-2, atol=2e-2)


def test_compiles():
    same_compiled(lambda x, w: ft.linear_cross_entropy(x, w, TARGET), *problem()[:2])
    compiled = torch.compile(ft.linear_cross_entropy, fullgraph=True)
    with pytest.raises(ValueError, match="target holds 15"):
        compiled(*problem()[:2], torch.full((8,), 15))


def test_backend():
    runs_on_the_reference("linear_cross_entropy", *problem()[:2], TARGET)


@pytest.mark.parametrize("change, error, text", [
    ({"input": torch.ones(2, 3).long()}, TypeError, "input has dtype torch.int64"),
    ({"input": torch.ones(1, 2, 3)}, ValueError, "input has shape (1, 2, 3)"),
    ({"input": torch.ones(2, 4)}, ValueError, "does not fit linear_weight's in_features 3"),
    ({"linear_weight": torch.ones(5, 3).half()}, TypeError, "linear_weight has dtype"),
    ({"linear_weight": torch.ones(3)}, ValueError, "linear_weight has shape (3,)"),
    ({"linear_bias": torch.ones(4)}, ValueError, "linear_bias has shape (4,)"),
    ({"target": torch.tensor([0, 5])}, ValueError, "target holds 5; it must be in [0, 5)"),
    ({"target": torch.tensor([0, -1])}, ValueError, "target holds -1"),
    ({"target": torch.tensor([0])}, ValueError, "target has shape (1,)"),
    ({"weight": torch.ones(3)}, ValueError, "weight has shape (3,)"),
    ({"reduction": ""}, ValueError, "reduction is ''"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    arguments = {"input": torch.randn(2, 3), "linear_weight": torch.randn(5, 3),
                 "target": torch.tensor([0, 2])}  # fmt: skip
    refuses("linear_cross_entropy", arguments, change, error, text)
