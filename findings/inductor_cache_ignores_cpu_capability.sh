#!/usr/bin/env bash
# torch.compile's cache on disk serves code made for another ATEN_CPU_CAPABILITY: wrong numbers, silently.
#
# What one would guess: ATEN_CPU_CAPABILITY=avx2 makes a CPU with AVX-512 behave like one without, also
# under torch.compile (Inductor asks it for its vector width: a fresh cache proves that), so that a
# cached kernel of another width is a miss. The key of the FX graph cache has the versions, the inputs
# and the configuration in it, and the C++ code cache has the compiler's flags.
#
# What happens: the graph compiled under AVX-512 is found again under ATEN_CPU_CAPABILITY=avx2. No
# warning, no error, and the result is not a rounding away but wrong by more than 1. With a cache
# folder of its own the same call is right. Whoever compares instruction sets by that variable (a test
# suite, a benchmark, a build farm that shares a home directory between processors) measures garbage.
#
# Source: found by running a test suite under several capabilities on one machine. A related bug was
# fixed in May 2026 (pytorch pull request 184444 put the number of threads into the key).
#
# Way out: a TORCHINDUCTOR_CACHE_DIR for each value.
#
# Versions: torch 2.13.0, a CPU with AVX-512, GCC. On a CPU without AVX-512 there is nothing to see.
set -euo pipefail
grep -q avx512vl /proc/cpuinfo || { echo "no AVX-512 here: nothing to compare"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip --disable-pip-version-check install -q"
$pip torch==2.13.0 2>/dev/null
$pip numpy==2.4.6 setuptools==84.2.1 2>/dev/null
"$folder/venv/bin/python" -c "import torch, platform; print('torch', torch.__version__, 'python', platform.python_version())"
g++ --version | head -n 1

cat >"$folder/call.py" <<'PY'
import torch

def call(x):
    return torch.softmax(x * 1.5 + 0.25, -1).sum(-1) + x.exp().mean(-1)

torch.manual_seed(0)
x = torch.randn(64, 1000)
error = (torch.compile(call)(x) - call(x)).abs().max().item()
print(torch.backends.cpu.get_cpu_capability(), error)
PY
run() { # CACHE [VARIABLE=VALUE]
  env TORCHINDUCTOR_CACHE_DIR="$folder/$1" "${@:2}" "$folder/venv/bin/python" "$folder/call.py" 2>/dev/null
}
first=$(run shared)
shared=$(run shared ATEN_CPU_CAPABILITY=avx2)
fresh=$(run fresh ATEN_CPU_CAPABILITY=avx2)
echo "capability, largest difference of torch.compile's result from eager's:"
echo "  first                                 $first"
echo "  the same cache, capability avx2       $shared"
echo "  a cache of its own, capability avx2   $fresh"
python3 - "$first" "$shared" "$fresh" <<'PY'
import sys

(_, first), (_, shared), (_, fresh) = (text.split() for text in sys.argv[1:])
right = float(first) < 1e-5 and float(fresh) < 1e-5
sys.exit(0 if right and float(shared) > 0.1 else "the behaviour has changed")
PY
