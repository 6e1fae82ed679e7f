"""linear_cross_entropy: the unfused pair's values and gradients, memory, bad input."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from attention_cases import other_signs
from fronts import refuses, same_compiled

import fasttransformer as ft
from contract import backends_of, check, running_on
from fasttransformer import reference
from fasttransformer.ops import _output_layer

BACKENDS = backends_of("linear_cross_entropy")
CPU = [on for on in BACKENDS if on.startswith("cpu")]
TARGET = torch.tensor([0, -100, 2, 14, -100, 4, 3, -100])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(dtype=torch.float32, rows=8, features=10, classes=15):
    """input, linear_weight, linear_bias, whose logits are about 3 in size."""
    x = torch.randn(rows, features) * 3 / features**0.5
    return x.to(dtype), torch.randn(classes, features).to(dtype), torch.randn(classes).to(dtype)


def targets(rows, classes):
    """Classes, of which every third is left out."""
    target = torch.randint(classes, (rows,))
    target[::3] = -100
    return target


def held(inputs, target, on, **options):
    """The number contract for the loss and the gradients of input, weight and bias; over new draws
    where a single one breaks it, since the small tensors here leave much to luck."""
    check(
        lambda x, w, b: ft.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        lambda x, w, b: reference.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        inputs,
        on=on,
        redraw=lambda: other_signs(inputs),
    )


def leaves_of(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("on, pieces", [("torch", True), *((on, False) for on in BACKENDS)])
@pytest.mark.parametrize("weighted, smoothing", [(True, 0.2), (False, 0.0), (False, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_contract(monkeypatch, reduction, dtype, weighted, smoothing, on, pieces):
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 50)  # three rows
    options = {"label_smoothing": smoothing, "reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(15)
    held(problem(dtype), TARGET, on, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows, features, classes", [(1, 1, 1), (5, 129, 85), (70, 300, 500)])
@pytest.mark.parametrize("on", BACKENDS)
def test_sizes(on, rows, features, classes, reduction, dtype):
    """One of each, next to the tiles' sizes, and several tiles."""
    target = targets(rows, classes) if rows > 1 else torch.zeros(1, dtype=torch.int64)
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(classes)}
    held(problem(dtype, rows, features, classes), target, on, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, classes", [(150, 130_000), (2600, 50)])
@pytest.mark.parametrize("on", CPU[-1:])
def test_several_chunks_of_rows(on, rows, classes, dtype):
    for reduction in ("sum", "none"):
        held(problem(dtype, rows, 4, classes), targets(rows, classes), on, reduction=reduction)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("on", BACKENDS)
def test_b56_gradients_of_single_losses(monkeypatch, on, pieces):
    """linkedin/Liger-Kernel#968: each token's loss weighted, backward twice over one graph."""
    if pieces:
        monkeypatch.setattr(_output_layer, "PIECE", 50)
    dtype = torch.float64 if on == "torch" else torch.float32
    x, w, b = leaves = [t.to(dtype).requires_grad_() for t in problem()]
    weights = torch.rand(8, dtype=dtype)
    theirs = F.cross_entropy(F.linear(x, w, b), TARGET, reduction="none")
    want = torch.autograd.grad((theirs * weights).sum(), leaves)
    with running_on(on):
        ours = ft.linear_cross_entropy(x, w, TARGET, linear_bias=b, reduction="none")
        torch.testing.assert_close(ours, theirs)
        for _ in range(2):
            got = torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("on", BACKENDS)
def test_b56_upstream_factor(on):
    """linkedin/Liger-Kernel#968: gradients that were made with the loss are multiplied by what
    comes from above, and stay what they are for the next pass over the graph."""
    x, w, b = leaves = leaves_of(*problem())
    plain = torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), TARGET), leaves)
    with running_on(on):
        loss = ft.linear_cross_entropy(x, w, TARGET, linear_bias=b)
        for factor, keep in ((1.0, True), (-3.0, True), (1.0, True), (0.5, False)):
            got = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=keep)
            torch.testing.assert_close(got, tuple(factor * g for g in plain))
            for g in got:
                g.zero_()  # as an optimizer may
        (2 * ft.linear_cross_entropy(x, w, TARGET, linear_bias=b, reduction="sum")).backward()
    kept = (TARGET >= 0).sum()
    for leaf, g in zip(leaves, plain):
        torch.testing.assert_close(leaf.grad, 2 * kept * g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on", BACKENDS)
def test_float16_gradients_of_a_mean_do_not_vanish(on):
    """They are made when the loss scale is known, not rounded to float16 before."""
    x, w, b = problem(torch.float16, 64, 8, 20)
    target = torch.randint(20, (64,))

    def scaled(function):
        return lambda x, w, b: function(x / 64, w, target, linear_bias=b).float() * 2.0**12

    check(scaled(ft.linear_cross_entropy), scaled(reference.linear_cross_entropy), (x, w, b), on=on)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("on", BACKENDS)
def test_gradients_of_some(on, reduction, wanted):
    given = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(problem())]
    x, w, b = given
    leaves = [t for t in given if t.requires_grad]
    with running_on(on):
        loss = ft.linear_cross_entropy(x, w, TARGET, linear_bias=b, reduction=reduction)
        got = torch.autograd.grad(loss.sum(), leaves)
    want = F.cross_entropy(F.linear(x, w, b), TARGET, reduction=reduction)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), leaves))


@pytest.mark.parametrize("on", BACKENDS)
def test_b57_true_loss_without_gradients(on):
    """linkedin/Liger-Kernel#507."""
    x, w, _ = problem()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, running_on(on):
            plain = ft.linear_cross_entropy(x, w, TARGET)
            smooth = ft.linear_cross_entropy(x, w, TARGET, label_smoothing=0.3)
        torch.testing.assert_close(plain, F.cross_entropy(x @ w.T, TARGET))
        torch.testing.assert_close(smooth, F.cross_entropy(x @ w.T, TARGET, label_smoothing=0.3))
        assert plain != smooth


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("on", BACKENDS)
def test_b54_ignored_rows_count_nowhere(on, ignore_index, weighted):
    """pytorch/pytorch#73205."""
    x, w, b = problem()
    target = torch.where(TARGET < 0, ignore_index, TARGET)
    kept = target != ignore_index
    x[~kept] = float("nan")  # not even these
    if on == "torch":  # whose autograd multiplies them by 0
        with running_on(on):
            assert ft.linear_cross_entropy(x, w, target, ignore_index=ignore_index).isfinite()
        x[~kept] = 1.0
    options = {"label_smoothing": 0.1, "weight": torch.rand(15) if weighted else None}
    for reduction in ("mean", "sum", "none"):
        x, w, b = leaves = leaves_of(x, w, b)
        with running_on(on):
            loss = ft.linear_cross_entropy(
                x, w, target, linear_bias=b, reduction=reduction, ignore_index=ignore_index,
                **options,
            )  # fmt: skip
            got = torch.autograd.grad(loss.sum(), leaves)
        want = F.cross_entropy(
            F.linear(x[kept], w, b), target[kept], reduction=reduction, **options
        )
        torch.testing.assert_close(loss[kept] if reduction == "none" else loss, want)
        assert not got[0][~kept].any()
        d_input, *others = torch.autograd.grad(want.sum(), leaves)
        torch.testing.assert_close(got[0][kept], d_input[kept])
        torch.testing.assert_close(got[1:], tuple(others))


@pytest.mark.parametrize("on", BACKENDS)
def test_nothing_to_count(on):
    """Rows that are all left out, as in torch, and no rows."""
    x, w, b = leaves = leaves_of(*problem())
    with running_on(on):
        loss = ft.linear_cross_entropy(x, w, torch.full((8,), -100), linear_bias=b)
        assert loss.isnan()
        got = torch.autograd.grad(loss, leaves)
        empty = ft.linear_cross_entropy(
            x[:0], w, torch.empty(0, dtype=torch.int64), reduction="sum"
        )
        assert empty == 0
        got += torch.autograd.grad(empty, (x, w))
    assert not any(g.any() for g in got)


@pytest.mark.parametrize("on", BACKENDS)
def test_nan_stays_in_its_row_and_infinite_logits_are_torchs(on):
    x, w, b = problem()
    x[2], b[5] = float("nan"), -float("inf")
    target = torch.tensor([0, -100, 2, 5, 7, 4, 3, 1])
    w = w.requires_grad_(False)
    x.requires_grad_()
    with running_on(on):
        losses = ft.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
        (got,) = torch.autograd.grad(losses.sum(), x)
    want = F.cross_entropy(F.linear(x, w, b), target, reduction="none")
    torch.testing.assert_close(losses, want, equal_nan=True)
    assert losses[3] == float("inf") and losses[2].isnan()
    assert got.isnan().any(1).tolist() == [False, False, True] + [False] * 5


@pytest.mark.parametrize("on", BACKENDS)
def test_large_logits(on):
    """The loss keeps the digits of what is small beside the logits."""
    x, w, _ = problem(rows=8, features=10, classes=200)
    target = targets(8, 200)
    held((x * 30, w, torch.full((200,), 1000.0)), target, on, label_smoothing=0.1)


@pytest.mark.parametrize("on", BACKENDS)
def test_strides_and_ids(on):
    x, w, b = torch.randn(16, 24)[::2, 3:13], torch.randn(10, 15).T, torch.randn(30)[::2]
    for target in (TARGET.int(), TARGET.repeat_interleave(2)[::2], TARGET.to(torch.int16)):
        held((x, w, b), target, on)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        with running_on(on):
            loss = ft.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2])
            got = torch.autograd.grad(loss, leaves)
        assert [g.shape for g in got] == [t.shape for t in (x, w, b)]


@pytest.mark.parametrize("on", CPU[-1:])
def test_threads_change_nothing(on, two_threads):
    leaves = leaves_of(*problem(torch.float32, 300, 40, 700))
    target = targets(300, 700)

    def results():
        with running_on(on):
            x, w, b = leaves
            loss = ft.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1)
            return [loss, *torch.autograd.grad(loss, leaves)]

    two = results()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results(), two))


def test_b59_logits_are_never_stored(monkeypatch):
    """pytorch/pytorch#85786: what lives at a time is a piece of the rows, forward and backward.
    Past 2^31 logits it takes 13 s on two cores, with the gradients 40 s (below)."""
    monkeypatch.setattr(_output_layer, "PIECE", 1 << 16)
    rows, classes = 4096, 1000  # all logits: 16 MB
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    target = torch.randint(classes, (rows,))
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
        running_on("torch"),
    ):
        loss = ft.linear_cross_entropy(x, w, target)
    assert sum(kept) < 40 * 1000  # inputs, never logits
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, target))
    got = torch.autograd.grad(loss, (x, w))
    want = torch.autograd.grad(F.cross_entropy(x @ w.T, target), (x, w))
    torch.testing.assert_close(got, want)


PEAK = """
    import sys, torch, fasttransformer as ft
    rows, classes, features, reduction, dtype = 8192, 16384, 16, sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    x, w = (torch.randn(n, features, dtype=getattr(torch, dtype), requires_grad=True)
            for n in (rows, classes))
    target = torch.randint(classes, (rows,))

    def step(n):
        loss = ft.linear_cross_entropy(x[:n], w, target[:n], reduction=reduction, backend="cpu")
        return torch.autograd.grad(loss.sum(), (x, w))

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    step(4)  # what a first call brings with it
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts anew
    before = peak()
    step(rows)
    print((peak() - before) >> 10)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.skipif(not CPU or not sys.platform.startswith("linux"), reason="reads /proc")
def test_b59_resident_peak(reduction, dtype):
    """All logits would be 512 MiB. A chunk of them is 32; the gradients are 1 or 2."""
    command = [sys.executable, "-c", textwrap.dedent(PEAK), reduction, dtype]
    result = subprocess.run(command, capture_output=True, text=True)
    if "PermissionError" in result.stderr:
        pytest.skip("this system does not reset the peak")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 64, result.stdout


@pytest.mark.parametrize("on", ["torch", *CPU[-1:]])
def test_b59_rows_times_classes_past_2_31(full_size, on):
    """pytorch/pytorch#85786: every row's loss, and all gradients, which are small."""
    columns, rows = 50257, 42740
    x = torch.randn(1, 2, dtype=torch.float64).expand(rows, 2)
    w, target = torch.randn(columns, 2, dtype=torch.float64), torch.arange(rows) * 7 % columns
    leaves = [t.float().requires_grad_() for t in (x, w)]
    with running_on(on):
        losses = ft.linear_cross_entropy(*leaves, target, reduction="none")
        got = torch.autograd.grad(losses.sum(), leaves)
    logp = torch.log_softmax(w @ x[0], 0)
    torch.testing.assert_close(losses.double(), -logp[target], rtol=1e-5, atol=0)
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


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("on", BACKENDS)
def test_transforms(on, reduction):
    x, w, b = problem()

    def loss(function, x, w, b):
        return function(x, w, TARGET, linear_bias=b, reduction=reduction).square().sum()

    def both(transform):
        with running_on(on):
            got = transform(lambda *given: loss(ft.linear_cross_entropy, *given))
        want = transform(lambda *given: loss(reference.linear_cross_entropy, *given))
        # A square of losses makes their roundings larger; torch's own hang on its instruction set.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)

    both(lambda f: torch.func.grad(f, argnums=(0, 1, 2))(x, w, b))
    samples = torch.stack((x, 2 * x))
    both(lambda f: torch.func.vmap(f, in_dims=(0, None, None))(samples, w, b))
    both(lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None, None))(samples, w, b))


@pytest.mark.parametrize("on", CPU[-1:])
def test_operators(on):
    x, w, b = problem()
    weight = torch.rand(15)
    operators = torch.ops.fasttransformer
    for wanted in ((False, False, False), (True, True, True)):
        arguments = (x, w, b, TARGET, weight, -100, 0.1, True, *wanted)
        torch.library.opcheck(operators.linear_cross_entropy.default, arguments)
    statistics = operators.linear_cross_entropy(*arguments)[1]
    arguments = (torch.rand(8), x, w, b, TARGET, weight, statistics, -100, 0.1, True, False, True)
    torch.library.opcheck(operators.linear_cross_entropy_backward.default, arguments)


def test_backend():
    """What goes to the reference, with a reason."""
    x, w, _ = problem()
    for change, reason in (
        ({"input": x.double(), "linear_weight": w.double()}, "float64"),
        ({"target": torch.rand(8, 15)}, "probabilities"),
        ({"weight": torch.rand(15, requires_grad=True)}, "weight_grad"),
        ({"linear_weight": w[:, None], "target": TARGET[:, None]}, "more_dimensions"),
    ):
        given = {"input": x, "linear_weight": w, "target": TARGET} | change
        assert ft.explain("linear_cross_entropy", **given).backend == "torch"
        if CPU:
            with pytest.raises(RuntimeError, match=reason):
                ft.linear_cross_entropy(**given, backend="cpu")


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
