#!/usr/bin/env bash
# Triton 3.6's interpreter can't run a loop whose bound is an argument once NumPy is 2.4.
#
# What one would guess: TRITON_INTERPRET=1, the documented way to run a kernel without a GPU, works with
# whatever NumPy pip brings; triton requires none, and torch 2.11 (which pins triton 3.6.0) sets no upper
# limit to its own.
#
# What happens: `for i in range(0, n)` with an `n` given at the call raises InterpreterError, caused by
# "only 0-dimensional arrays can be converted to Python scalars". The interpreter keeps a scalar as an
# array of shape (1,) and calls int() on it, which NumPy deprecated in 1.25 and refuses from 2.4 on.
# Kernels without such a loop go on working, so a first try does not show it. Triton 3.9.0 squeezes the
# array first and runs. Whoever has torch 2.11 stays below NumPy 2.4 for the interpreter; a GPU is not
# concerned.
#
# Versions: triton 3.6.0 and 3.9.0, NumPy 2.3.5 and 2.4.6, Python 3.11. torch isn't needed for this.
# Source: triton/runtime/interpreter.py (tensor.__index__) of both versions.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/count.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import numpy
import triton
import triton.language as tl


@triton.jit
def count(n):
    for _ in range(0, n):
        tl.static_assert(True)


try:
    count[(1,)](3)
    result = "runs"
except Exception as error:
    result = f"{type(error).__name__}, caused by {error.__cause__!r}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {result}")
PY
results=
for pair in 3.6.0:2.3.5 3.6.0:2.4.6 3.9.0:2.4.6; do
  "$python" -m venv "$folder/venv"
  "$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
    "triton==${pair%:*}" "numpy==${pair#*:}" 2>/dev/null
  line=$("$folder/venv/bin/python" "$folder/count.py")
  echo "$line"
  case $line in *": runs") results+="runs " ;; *"0-dimensional arrays"*) results+="raises " ;; *) results+="? " ;; esac
  rm -rf "$folder/venv"
done
[ "$results" = "runs raises runs " ] || { echo "the behaviour has changed"; exit 1; }
