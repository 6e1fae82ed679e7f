"""What is made in one mode and used in another, and calls whose numbers nobody can look at."""

import pytest
import torch

import fasttransformer as ft
from fasttransformer.backends import TABLE
from fasttransformer.models import LanguageModel, layers

# ---- kept tables --------------------------------------------------------------------------------


def _rotate(rotary, train):
    query, key = torch.randn(2, 1, 2, 5, 8).unbind()
    return rotary(query.requires_grad_(train), key)[0]


def test_b92_rotary_tables_made_in_inference_mode():
    """Dao-AILab/flash-attention PR #299: tables of an evaluation end the training after it."""
    rotary = ft.nn.RotaryEmbedding(8)
    with torch.inference_mode():
        _rotate(rotary, False)
    _rotate(rotary, True).sum().backward()


def test_b92_slopes_made_in_inference_mode():
    layers._kept_slopes.clear()
    with torch.inference_mode():
        layers.alibi_slopes(4, torch.device("cpu"))
    assert not layers.alibi_slopes(4, torch.device("cpu")).is_inference()


@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned", "sinusoidal"])
def test_b92_models_train_after_an_evaluation(positions):
    layers._kept_slopes.clear()
    model = LanguageModel(20, 16, 16, 1, 2, positions=positions)
    ids = torch.arange(6).view(1, 6) + 4
    with torch.inference_mode():
        model(input_ids=ids, labels=ids)
    for trained in (model, LanguageModel(20, 16, 16, 1, 2, positions=positions)):
        trained(input_ids=ids, labels=ids).loss.backward()


def test_tables_first_made_within_a_transform_are_not_kept():
    rotary, x = ft.nn.RotaryEmbedding(8), torch.randn(1, 2, 5, 8)

    def loss(x):
        return rotary(x, x)[0].square().sum()

    want = torch.func.grad(loss)(x)
    assert rotary._cached is None
    out = rotary(x, x)[0]
    torch.testing.assert_close(out, ft.nn.RotaryEmbedding(8)(x, x)[0])
    torch.testing.assert_close(torch.func.grad(loss)(x), want)


# ---- positions ----------------------------------------------------------------------------------


class Rotates(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rotary = ft.nn.RotaryEmbedding(8)

    def forward(self, query, key, position_ids):
        return self.rotary(query, key, position_ids)


@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
@pytest.mark.parametrize("how", ["fullgraph", "dynamic", "export", "export, strict", "vmap"])
def test_b90_positions_are_not_looked_at_in_a_graph(how, shape):
    """pytorch/pytorch#173915: the largest position was read, which no graph can do."""
    module, (query, key) = Rotates(), torch.randn(2, 2, 2, 5, 8).unbind()
    first, later = torch.randint(9, shape), torch.randint(900, shape)
    if how == "vmap":
        first, later = (torch.stack([ids, ids + 1]) for ids in (first, later))
        run = torch.vmap(module, (None, None, 0))
    elif how.startswith("export"):
        run = torch.export.export(module, (query, key, first), strict="strict" in how).module()
    else:
        run = torch.compile(module, fullgraph=True, dynamic=how == "dynamic", backend="aot_eager")
    for ids in (first, later):
        out = run(query, key, ids)
        if how == "vmap":
            want = tuple(map(torch.stack, zip(*(Rotates()(query, key, i) for i in ids))))
        else:
            want = Rotates()(query, key, ids)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6)


# ---- meta tensors -------------------------------------------------------------------------------


def _meta(*shape):
    return torch.empty(shape, device="meta")


META = {
    "softmax": lambda: ft.softmax(_meta(2, 3)),
    "layer_norm": lambda: ft.layer_norm(_meta(2, 3), 3, _meta(3)),
    "rms_norm": lambda: ft.rms_norm(_meta(2, 3), 3),
    "add_layer_norm": lambda: ft.add_layer_norm(_meta(2, 3), _meta(2, 3), 3)[0],
    "add_rms_norm": lambda: ft.add_rms_norm(_meta(2, 3), _meta(2, 3), 3, dropout_p=0.5)[0],
    "linear_add": lambda: ft.linear_add(_meta(2, 4), _meta(3, 4), activation="gelu"),
    "linear_add_layer_norm": lambda: ft.linear_add_layer_norm(
        _meta(2, 4), _meta(3, 4), None, _meta(2, 3)
    )[0],
    "linear_add_rms_norm": lambda: ft.linear_add_rms_norm(
        _meta(2, 4), _meta(3, 4), None, _meta(2, 3)
    )[0],
    "feed_forward": lambda: ft.feed_forward(_meta(2, 4), _meta(6, 4), None, _meta(3, 6), None),
    "attention": lambda: ft.attention(*(_meta(1, 1, 2, 3),) * 3)[0, 0],
    "scaled_dot_product_attention": lambda: ft.scaled_dot_product_attention(*(_meta(2, 3),) * 3),
    "merge_attention": lambda: ft.merge_attention(_meta(4, 2, 3), _meta(4, 2))[0],
    "cross_entropy": lambda: ft.cross_entropy(
        _meta(2, 3), torch.zeros(2, dtype=torch.int64, device="meta"), reduction="none"
    )[:, None].expand(2, 3),
    "linear_cross_entropy": lambda: ft.linear_cross_entropy(
        _meta(2, 3), _meta(4, 3), torch.zeros(2, dtype=torch.int64, device="meta"), reduction="none"
    )[:, None].expand(2, 3),
    "linear_softmax": lambda: ft.linear_softmax(_meta(2, 4), _meta(3, 4)),
    "linear_topk": lambda: ft.linear_topk(_meta(2, 4), _meta(9, 4), k=3)[0],
    "embedding": lambda: ft.embedding(
        torch.zeros(2, dtype=torch.int64, device="meta"), _meta(9, 3), sinusoidal=True
    ),
    "rotary_embedding": lambda: ft.rotary_embedding(
        _meta(1, 1, 2, 4), _meta(1, 1, 2, 4), _meta(2, 2), _meta(2, 2)
    )[0][0, 0, :, :3],
}
#: Their lengths are numbers in tensors, which meta tensors don't have.
READS_LENGTHS = {"attention_varlen", "attention_decode"}


def test_every_operation_has_a_call_on_meta_tensors():
    assert {*META} | READS_LENGTHS == {*TABLE, "scaled_dot_product_attention"}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("op", META)
def test_b93_meta_tensors(op, autocast):
    """huggingface/transformers PR #44984: autocast knows no device called meta."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = META[op]()
    assert out.shape == (2, 3) and out.is_meta


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_b93_swapped_layers_on_meta_tensors(norm_first):
    with torch.device("meta"):
        layers = torch.nn.ModuleList([
            torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first),
            torch.nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first),
            torch.nn.MultiheadAttention(8, 2, batch_first=True),
            torch.nn.Softmax(-1),
        ])  # fmt: skip
        x = torch.empty(2, 3, 8)
    ft.swap(layers)
    encoder, decoder, attention, softmax = layers
    outs = [encoder(x), decoder(x, x), attention(x, x, x)[0], softmax(x)]
    assert all(out.shape == x.shape and out.is_meta for out in outs)


# ---- numbers that change ------------------------------------------------------------------------

X, W = torch.randn(3, 4), torch.randn(5, 4)
FLOATS = {
    "softmax": lambda f, x: ft.softmax(x, scale=f),
    "layer_norm": lambda f, x: ft.layer_norm(x, 4, eps=f),
    "rms_norm": lambda f, x: ft.rms_norm(x, 4, eps=f),
    "linear_add_layer_norm": lambda f, x: ft.linear_add_layer_norm(
        x, W, None, None, eps=f, return_sum=False
    ),
    "linear_softmax": lambda f, x: ft.linear_softmax(x, W, temperature=f),
    "linear_topk": lambda f, x: ft.linear_topk(x, W, k=2, temperature=f)[0],
    "attention, softcap": lambda f, x: ft.attention(*(x[None, None],) * 3, softcap=f),
    "attention, scale": lambda f, x: ft.attention(*(x[None, None],) * 3, scale=f),
    "cross_entropy": lambda f, x: ft.cross_entropy(x, torch.arange(3), label_smoothing=f),
    "linear_cross_entropy": lambda f, x: ft.linear_cross_entropy(
        x, W, torch.arange(3), label_smoothing=f
    ),
    "embedding": lambda f, x: ft.embedding(torch.arange(3), x, scale=f),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("name", FLOATS)
def test_f13_floats_that_change_between_calls(name, dynamic, grad):
    torch._dynamo.reset()
    x = X.clone().requires_grad_(grad)
    call = FLOATS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for factor in (0.5, 0.25, 0.125):
        out, want = compiled(factor, x), call(factor, x)
        torch.testing.assert_close(out, want)
        if grad:
            grads = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, want))
            torch.testing.assert_close(*grads)


# ---- one tensor in two places -------------------------------------------------------------------

_CU = torch.tensor([0, 2, 3])
TWICE = {
    "attention": lambda x: ft.attention(*(x[None, None],) * 3),
    "attention, query another": lambda x: ft.attention(
        2 * x[None, None], *(x[None, None],) * 2
    ),
    "attention, one variable": lambda x: _attends_itself(x[None, None]),
    "linear_add": lambda x: ft.linear_add(x, x.new_ones(4, 4), residual=x),
    "linear_add_layer_norm": lambda x: ft.linear_add_layer_norm(x, x.new_ones(4, 4), None, x),
    "add_layer_norm": lambda x: ft.add_layer_norm(x, x, 4),
    "add_rms_norm": lambda x: ft.add_rms_norm(x, x, 4),
    "layer_norm, weight as bias": lambda x: ft.layer_norm(x, 4, x[0], x[0]),
    "layer_norm, one vector": lambda x: _norms_with_itself(x, x.sum(0)),
    "rotary_embedding": lambda x: _turns_itself(x[None, None]),
    "merge_attention": lambda x: ft.merge_attention([x, x], [x[:, 0], x[:, 0]]),
    "attention_varlen": lambda x: _attends_itself_packed(x[:, None], _CU),
}  # fmt: skip


def _attends_itself(x):
    return ft.attention(x, x, x)


def _norms_with_itself(x, vector):
    return ft.layer_norm(x, 4, vector, vector)


def _turns_itself(x):
    return ft.rotary_embedding(x, x, torch.ones(3, 2) * 0.5, torch.ones(3, 2))


def _attends_itself_packed(x, cu):
    return ft.attention_varlen(x, x, x, cu, cu, max_seqlen_q=2, max_seqlen_k=2)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", ""])
@pytest.mark.parametrize("name", TWICE)
def test_b89_one_tensor_in_two_places(name, grad):
    """pytorch/pytorch#181146: torch.compile can't hand one tensor twice to an autograd.Function."""
    call = TWICE[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    def outputs(function):
        x = X.clone().requires_grad_(grad)
        outs = function(x)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if not grad:
            return outs
        return *outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), x)

    torch.testing.assert_close(outputs(compiled), outputs(call))
