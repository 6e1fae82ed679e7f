#!/usr/bin/env bash
# Triton's interpreter turns float32 into bfloat16 by cutting bits off; the compiled kernel rounds.
#
# What one would guess: TRITON_INTERPRET=1 is for getting a kernel's numbers right without a GPU, so
# `x.to(tl.bfloat16)`, and a store into a bfloat16 tensor, round to the nearest, as torch and the
# compiled kernel do; a bfloat16 kernel that fails its tolerance in the interpreter is wrong.
#
# What happens: the same source compiled for sm_80 and sm_90 has `cvt.rn` (round to nearest even) in its
# PTX, while the interpreter drops the lower 16 bits. About half of all random numbers come out one step
# too near to zero: the largest error is a whole step of the format and not half of one, and its mean is
# not 0. (float16 is rounded to the nearest in both.) A kernel that passes bfloat16 numbers on, a softmax
# or an attention with bfloat16 weights, shows two or three times its error, and all of it with one sign,
# so that sums over rows drift. `tl.dot` and fp8 conversions go through the same function.
#
# Versions: triton 3.9.0, torch 2.13.0 (CPU), numpy 2.3.5.
# Source: triton/runtime/interpreter.py, _convert_float, called without a rounding mode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip --disable-pip-version-check install -q torch==2.13.0 numpy==2.3.5 2>/dev/null
"$python" -m pip --disable-pip-version-check install -q --no-deps triton==3.9.0 2>/dev/null
cat >"$folder/kernel.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def convert(to, source, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(to + at, tl.load(source + at).to(to.dtype.element_ty))
PY
cat >"$folder/interpreted.py" <<'PY'
import numpy, torch, triton
from kernel import convert

print("triton", triton.__version__, "torch", torch.__version__, "numpy", numpy.__version__)
torch.manual_seed(0)
x = torch.randn(4096)
wrong = {}
for dtype in (torch.bfloat16, torch.float16):
    out = torch.empty(4096, dtype=dtype)
    convert[(1,)](out, x, 4096)
    cut = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    wrong[dtype] = (out != x.to(dtype)).float().mean().item()
    error = ((out.double() - x.double()) * x.sign()).mean().item()
    print(f"{dtype}: {wrong[dtype]:.1%} differ from torch's rounding; mean error away from 0 {error:.1e}")
    if dtype == torch.bfloat16:
        assert torch.equal(out.float(), cut), "the interpreter does not cut any more"
assert 0.4 < wrong[torch.bfloat16] < 0.6 and wrong[torch.float16] == 0
PY
cat >"$folder/compiled.py" <<'PY'
import triton
from kernel import convert
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for arch in (80, 90):
    source = ASTSource(convert, {"to": "*bf16", "source": "*fp32", "COUNT": "constexpr"}, {"COUNT": 4096})
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    lines = sorted({line.split()[0] for line in ptx.splitlines() if "cvt.r" in line and "bf16" in line})
    print(f"sm_{arch}:", *lines)
    assert lines and all(line.startswith("cvt.rn.") for line in lines), lines
PY
cd "$folder"
if ! TRITON_INTERPRET=1 "$python" interpreted.py || ! "$python" compiled.py; then
  echo "the behaviour has changed"
  exit 1
fi
