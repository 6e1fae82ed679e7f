#!/usr/bin/env bash
# An operator of torch's stable ABI that takes a string leaks it at every call.
#
# What one would guess: a std::string argument of an operator registered by STABLE_TORCH_LIBRARY and
# TORCH_BOX is converted, used and freed, like every other argument; the header's comment even says
# that the string it came in is deleted. An operator with a mode or an activation by name ("gelu") is
# an ordinary schema, and torch's own classic operators take strings without growing.
#
# What happens: the conversion makes the std::string on the heap, returns a copy and drops the
# pointer. Every call loses one std::string (48 bytes with malloc's own; more where the text is longer
# than what the object holds itself). An operator called by each layer of a model loses megabytes an
# hour, in no tool of torch's (it is not tensor memory). The same operator with an int loses nothing.
#
# Source: torch/csrc/stable/stableivalue_conversions.h, the specialization for std::string; found by
# counting malloc's bytes over calls of a linear layer that took its activation by name.
#
# Way out: an integer code in the schema, names in Python.
#
# Versions: torch 2.13.0 (CPU build), GCC 12, glibc 2.33 or later (mallinfo2). The fault is in the
# header: built against 2.14.1 the same source loses nothing, also when it runs under 2.13.0, and
# what was built against 2.13.0 goes on losing under 2.14.1 (tried by hand).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/operator.cpp" <<'CPP'
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

using torch::stable::Tensor;

static int64_t by_name(const Tensor&, std::string name) { return static_cast<int64_t>(name.size()); }
static int64_t by_code(const Tensor&, int64_t code) { return code; }

STABLE_TORCH_LIBRARY(demo, m) {
  m.def("by_name(Tensor x, str name) -> int");
  m.def("by_code(Tensor x, int code) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(demo, CPU, m) {
  m.impl("by_name", TORCH_BOX(&by_name));
  m.impl("by_code", TORCH_BOX(&by_code));
}
CPP
cat >"$folder/count.py" <<'PY'
import ctypes
import sys

import torch

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
torch.ops.load_library(sys.argv[1])
x, calls = torch.zeros(1), 100_000
found = {}
for name, operator, argument in (
    ("an int", torch.ops.demo.by_code.default, 4),
    ('"gelu"', torch.ops.demo.by_name.default, "gelu"),
    ("100 letters", torch.ops.demo.by_name.default, 100 * "x"),
):
    for _ in range(1000):
        operator(x, argument)
    before = mallinfo2().uordblks
    for _ in range(calls):
        operator(x, argument)
    found[name] = (mallinfo2().uordblks - before) / calls
    print(f"  {name}: {found[name]:.1f} bytes a call")
ok = found["an int"] < 1 and found['"gelu"'] > 30 and found["100 letters"] > 130
sys.exit(0 if ok else "the behaviour has changed")
PY
g++ --version | head -n 1
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
$python -m pip --disable-pip-version-check install -q torch==2.13.0 2>/dev/null
$python -c "import torch, platform; print('torch', torch.__version__, 'python', platform.python_version())" 2>/dev/null
torch=$($python -c "import torch; print(torch.__path__[0])" 2>/dev/null)
g++ -std=c++20 -O1 -shared -fPIC -DTORCH_TARGET_VERSION=0x020a000000000000 \
  -I "$torch/include" -I "$torch/include/torch/csrc/api/include" "$folder/operator.cpp" \
  -L "$torch/lib" -ltorch_cpu -Wl,-rpath,"$torch/lib" -o "$folder/operator.so"
$python "$folder/count.py" "$folder/operator.so" 2>/dev/null
