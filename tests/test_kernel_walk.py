"""docs/kernel_walk.md: each step runs in simt, and the page's table is what simt counts."""

from __future__ import annotations

import ctypes
import re

import pytest
import simt
import torch

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

WALK = simt.ROOT / "docs/walk"
STEPS = range(1, 6)
COUNTS = ("loads", "load sectors", "stores", "store sectors", "barriers", "shuffles")


@pytest.fixture(scope="module")
def walk():
    sources = (*sorted(WALK.glob("*.cu")), WALK / "run.cpp")
    library = ctypes.CDLL(str(simt.build("walk", sources)))

    def run(step: int, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
        out = torch.full_like(x, float("nan"))
        message = ctypes.create_string_buffer(512)
        counts = (ctypes.c_int64 * len(COUNTS))()
        library.ft_simt_count(1, counts)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
        library.ft_walk(step, *pointers, ctypes.c_int64(x.shape[0]), x.shape[1], message)
        library.ft_simt_count(0, counts)
        assert message.value == b""
        return out, dict(zip(COUNTS, counts))

    return run


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "shape", ((1, 1), (3, 5), (70, 33), (9, 128), (5, 1000), (4, 1024)), ids=str
)
def test_each_step_is_softmax(walk, step, shape):
    x = torch.randn(shape) * 4
    out, _ = walk(step, x)
    torch.testing.assert_close(out, torch.softmax(x.double(), -1).float(), rtol=3e-6, atol=1e-7)


def test_the_table_is_what_simt_counts(walk):
    text = (simt.ROOT / "docs/kernel_walk.md").read_text()
    rows = re.findall(r"^\| (\d) \|[^|]*\|" + r" ([\d,]+) \|" * len(COUNTS), text, re.M)
    assert [int(row[0]) for row in rows] == list(STEPS)
    for step, *numbers in rows:
        _, counts = walk(int(step), torch.randn(64, 1024))
        assert [int(n.replace(",", "")) for n in numbers] == list(counts.values()), step
