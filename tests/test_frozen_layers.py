"""b97, InfiniTensor/InfiniTrain PR #134: a linear layer keeps only what the wanted gradients read.

The weight's gradient reads the input, and the input's reads the weight. Of a frozen layer, as in
LoRA and prompt tuning, the input is not kept, and may be changed in place afterwards.
"""

import itertools

import pytest
import torch

import fasttransformer as ft
from contract import RUNNABLE, running_on

CPU = next((on for on in reversed(RUNNABLE) if on.startswith("cpu:")), "")
ROWS, K, N, M = 7, 8, 6, 10
SHAPES = {"x": (ROWS, K), "w": (N, K), "b": (N,), "r": (ROWS, N), "nw": (N,), "nb": (N,),
          "wi": (M, K), "bi": (M,), "wo": (N, M), "bo": (N,), "h": (2, 2, 3, 4)}  # fmt: skip
#: name → (the call, its tensors, the products in it: (input, weight), None for an input inside)
CALLS = {
    "linear_add": (lambda x, w, b: ft.linear_add(x, w, b), "x w b", [("x", "w")]),
    "relu": (
        lambda x, w, b: ft.linear_add(x, w, b, activation="relu"),
        "x w b",
        [("x", "w")],
    ),
    "residual": (lambda x, w, b, r: ft.linear_add(x, w, b, r), "x w b r", [("x", "w")]),
    "dropout": (
        lambda x, w, b, r: ft.linear_add(x, w, b, r, dropout_p=0.2),
        "x w b r",
        [("x", "w")],
    ),
    "heads": (lambda h, w, b: ft.linear_add(h, w, b), "h w b", [("h", "w")]),
    "linear_add_layer_norm": (
        lambda x, w, b, r, nw, nb: ft.linear_add_layer_norm(x, w, b, r, nw, nb)[0],
        "x w b r nw nb",
        [("x", "w")],
    ),
    "linear_add_rms_norm": (
        lambda x, w, b, r, nw: ft.linear_add_rms_norm(x, w, b, r, nw, return_sum=False),
        "x w b r nw",
        [("x", "w")],
    ),
    "feed_forward": (
        lambda x, wi, bi, wo, bo: ft.feed_forward(x, wi, bi, wo, bo),
        "x wi bi wo bo",
        [("x", "wi"), (None, "wo")],
    ),
    "linear_softmax": (lambda x, w, b: ft.linear_softmax(x, w, b), "x w b", [("x", "w")]),
}


def kept(call):
    """The result of a call, and where the tensors that it keeps for the backward pass lie."""
    places = set()

    def pack(tensor):
        places.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), places


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def gradients(name, tensors, wanted):
    call, names, _ = CALLS[name]
    given = {n: tensors[n].clone().requires_grad_(n in wanted) for n in names.split()}
    torch.manual_seed(3)
    out, places = kept(lambda: call(**given))
    for n in given:
        if n not in wanted and place(given[n]) not in places:
            given[n].fill_(float("nan"))  # what is not kept may be overwritten
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    grads = torch.autograd.grad(out, [given[n] for n in wanted], upstream)
    return dict(zip(wanted, grads)), {n for n in given if place(given[n]) in places}


ON = [("simt", name) for name in ("residual", "heads", "linear_add_layer_norm", "feed_forward")]
ON += [("triton", name) for name in ("linear_add", "heads")]
ON += [(CPU, name) for name in CALLS]


@pytest.mark.parametrize(("backend", "name"), [pair for pair in ON if pair[0] in RUNNABLE])
def test_keeps_what_the_wanted_gradients_read(backend, name):
    with running_on(backend):
        keeps_what_is_read(name)


def keeps_what_is_read(name):
    tensors = {n: torch.randn(shape) for n, shape in SHAPES.items()}
    names, products = CALLS[name][1].split(), CALLS[name][2]
    everything, _ = gradients(name, tensors, names)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in (1, 2)
    )
    for wanted in subsets:
        found, held = gradients(name, tensors, wanted)
        for n in wanted:
            assert torch.equal(found[n], everything[n]), (wanted, n)
        for source, weight in products:
            if source is None:  # the weight of the second product: for all that is before it
                assert weight not in held or {"x", "wi", "bi"} & {*wanted}, wanted
                continue
            assert source not in held or weight in wanted, (wanted, "the input is kept")
            assert weight not in held or source in wanted, (wanted, "the weight is kept")


def test_frozen_layers_keep_no_activation():
    layers = [torch.nn.Linear(512, 512).requires_grad_(False) for _ in range(8)]
    model = torch.nn.Sequential(*layers)
    ft.swap(model)
    x = torch.randn(256, 512, requires_grad=True)
    weights = {place(layer.weight) for layer in layers}
    out, places = kept(lambda: model(x))
    assert places == weights
    (got,) = torch.autograd.grad(out.sum(), x)
    want = torch.ones(256, 512)
    for layer in reversed(layers):
        want = want @ layer.weight
    torch.testing.assert_close(got, want)


def test_the_input_of_a_frozen_layer_may_be_changed_in_place():
    layer = ft.nn.Linear(8, 6).requires_grad_(False)
    x = torch.randn(7, 8, requires_grad=True)
    hidden = x * 2
    out = layer(hidden)
    hidden.add_(1)
    (got,) = torch.autograd.grad(out.sum() + hidden.sum(), x)
    torch.testing.assert_close(got, 2 * layer.weight.sum(0).expand(7, 8) + 2)


@pytest.mark.parametrize(
    "module",
    [
        lambda: ft.nn.OutputProjection(8, 8, norm="layer"),
        lambda: ft.nn.OutputProjection(8, 8, norm="rms"),
        lambda: ft.nn.FeedForward(8, 16, "swiglu"),
        lambda: ft.nn.TransformerEncoderLayer(8, 2, 16, 0.0),
    ],
)
def test_frozen_modules_give_the_input_its_gradient(module):
    module = module()
    x, rest = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 2, 8)
    inputs = (x, rest) if isinstance(module, ft.nn.OutputProjection) else (x,)

    def gradient():
        out = module(*inputs)
        return torch.autograd.grad((out[0] if isinstance(out, tuple) else out).square().sum(), x)[0]

    want = gradient()
    module.requires_grad_(False)
    assert torch.equal(gradient(), want)


@pytest.mark.parametrize("name", ["residual", "feed_forward", "linear_add_layer_norm"])
def test_compiled_and_transformed_the_same(name):
    call, names, _ = CALLS[name]
    tensors = {n: torch.randn(SHAPES[n]) for n in names.split()}

    def loss(x):
        return call(**{**tensors, "x": x}).square().sum()

    x = tensors["x"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x
    )
    torch.testing.assert_close(compiled, want)
    torch.testing.assert_close(torch.func.grad(loss)(tensors["x"]), want)
    both = torch.vmap(torch.func.grad(loss))(torch.stack([tensors["x"]] * 2))
    torch.testing.assert_close(both, torch.stack([want] * 2))
