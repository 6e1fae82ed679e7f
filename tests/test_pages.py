"""What stands in README.md and docs/ to be copied: Python runs as it is, after what the page takes
for granted, and every command line has options that exist."""

import re
from pathlib import Path

import command_lines
import pytest
import torch

import fasttransformer as ft
from fasttransformer.benchmarks._shared import Case
from fasttransformer.models.data import __main__ as data_files
from fasttransformer.models.data import write_records

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks():
    """(page, number of the line, language, text) of every block between fences."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            yield str(page.relative_to(ROOT)), line, match[1], match[2]


BLOCKS = list(blocks())
PYTHON = {(page, text): line for page, line, language, text in BLOCKS if language == "python"}
#: The list of functions is no program: each of its lines has inputs of its own.
PROGRAMS = {at: line for at, line in PYTHON.items() if "ft.attention_varlen" not in at[1]}
COMMANDS = [
    pytest.param(line, id=f"{page}:{number} {line[:60]}")
    for page, number, language, text in BLOCKS
    if not language
    for line in command_lines.lines_of(text)
]
MADE = [
    line
    for *_, text in BLOCKS
    for line in text.splitlines()
    if "-m fasttransformer.models.data" in line
]


# ---- Python -------------------------------------------------------------------------------------


def bert(monkeypatch):
    """A small BERT of random weights in the place of the one that would be downloaded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )

    def from_pretrained(name):
        assert name == "bert-base-uncased"
        return transformers.BertModel(config)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    return {}


#: Inputs of the README's list of functions, by shape; a name may be another tensor in each line.
SHAPES = {
    **dict.fromkeys("qkv", (1, 4, 5, 8)), **dict.fromkeys(("x", "residual"), (5, 768)),
    **dict.fromkeys(("weight", "bias", "norm_weight", "norm_bias"), (768,)),
    "heads": (1, 4, 5, 192),
}  # fmt: skip
PROJECTION = {"weight": (768, 768), "residual": (1, 5, 768)}
SHAPES_OF = {
    "attention": {"bias": (4, 5, 5)},
    "attention_varlen": dict.fromkeys("qkv", (5, 4, 8)),
    "linear_add": PROJECTION,
    "linear_add_layer_norm": PROJECTION,
    "linear_cross_entropy": {"weight": (100, 768)},
}


def test_functions_of_the_readme():
    (text,) = [text for page, text in PYTHON if "ft.attention_varlen" in text]
    bounds = torch.tensor([0, 2, 5])
    for line in text.splitlines():
        op = re.search(r"ft\.(\w+)", line)[1]
        shapes = {**SHAPES, **SHAPES_OF.get(op, {})}
        names = {name: torch.randn(shape) for name, shape in shapes.items()}
        names |= {"ft": ft, "mask": torch.ones(5, 768).bool(), "target": torch.arange(5),
                  "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}  # fmt: skip
        exec(compile(line, "README.md", "exec"), names)


def texts(monkeypatch):
    names = {"sources": ["a long text", "and another"], "targets": ["a text", "one more"]}
    return {**names, "texts": [*names["sources"], *names["targets"]]}


def layer(monkeypatch):
    return {"torchs_layer": torch.nn.TransformerEncoderLayer(512, 8, batch_first=True)}


def model(monkeypatch):
    made = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    return {"model": made, "inputs": {"input": torch.randn(3, 8)}}


def reviews(monkeypatch):
    """The page's 1000 steps are three here."""
    from fasttransformer.models import training

    records = [{"text": f"a {word} film", "label": word} for word in ("good", "bad")]
    write_records("reviews.jsonl", records * 10)
    options = training.TrainingOptions
    monkeypatch.setattr(
        training, "TrainingOptions", lambda task, steps: options(task, steps=min(steps, 3))
    )
    return {}


def benchmark(monkeypatch):
    return {"Case": Case, "run_under_pytest": None}


#: (page, a line of the block) → what the page takes for granted there.
GRANTED = {
    ("README.md", "AutoModel"): bert,
    ("README.md", "Tokenizer.train"): texts,
    ("docs/models.md", "Tokenizer.train"): texts,
    ("docs/modules.md", "torchs_layer"): layer,
    ("docs/swap.md", "report.verify"): model,
    ("docs/training.md", "read_records"): reviews,
    ("docs/tutorial_summarizer.md", "Decoder"): lambda monkeypatch: {},
    ("docs/benchmarks.md", "run_under_pytest"): benchmark,
}


def granted(page, text):
    found = [make for (where, line), make in GRANTED.items() if where == page and line in text]
    assert len(found) == 1, f"{page} has a block that no row of GRANTED is for:\n{text}"
    return found[0]


@pytest.mark.parametrize(
    ("page", "text"), PROGRAMS, ids=[f"{page}:{line}" for (page, _), line in PROGRAMS.items()]
)
def test_python_of_a_page_runs(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = granted(page, text)(monkeypatch)
    exec(compile(text, page, "exec"), names)


# ---- commands -----------------------------------------------------------------------------------


def test_the_pages_have_commands():
    assert len(COMMANDS) > 20 and len(PROGRAMS) == len(GRANTED)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_a_page_is_understood(line):
    command_lines.understood(line)


@pytest.mark.parametrize("line", MADE)
def test_maker_of_a_page_is_understood(line):
    *program, task, option, folder = line.split()
    assert program == ["python", "-m", "fasttransformer.models.data"]
    assert task in data_files.MAKERS and option == "--out" and folder
