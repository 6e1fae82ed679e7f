#!/usr/bin/env bash
# Builds the compiled libraries for a machine with a Hopper GPU on a machine without one, so that no
# time of the GPU goes into compiling, and checks that they will load there.
#
#   PYTHON=PYTHON_WITH_TORCH_2.11 benchmarks/gpu_prebuild.sh OUT [--load PYTHON]...
#
# OUT gets _cpu.abi3.so and _cuda.abi3.so; the checkout's own libraries stay as they are. PYTHON
# (default python3) needs torch, setuptools and ninja; torch may have CUDA or not. nvcc 12.4 or later
# is needed, and with GCC 12 or Clang 15 some three minutes of two cores the first time; objects are
# kept next to OUT for the next time. Then benchmarks/gpu_prebuilt.py checks what the libraries
# need of a system, and each --load PYTHON, an interpreter with a CUDA torch, loads them.
# FASTTRANSFORMER_CUDA_ARCHS (default 90a here) chooses other GPUs.
set -eu
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
out=
loaders=()
while [ $# -gt 0 ]; do
  case $1 in
    --load) loaders+=("${2:?--load needs a Python}"); shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu_prebuild: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(dirname "$out")/.$(basename "$out").work

env FASTTRANSFORMER_CUDA=1 FASTTRANSFORMER_CUDA_ARCHS="${FASTTRANSFORMER_CUDA_ARCHS:-90a}" \
  "$python" setup.py -q build_ext --build-lib "$work/lib" --build-temp "$work/objects"
for name in _cpu _cuda; do
  # Debug sections are for a debugger; without them the libraries are half as large.
  strip --strip-debug -o "$out/$name.abi3.so" "$work/lib/fasttransformer/$name.abi3.so"
done
"$python" benchmarks/gpu_prebuilt.py check "$out"
for loader in "${loaders[@]+"${loaders[@]}"}"; do
  "$loader" benchmarks/gpu_prebuilt.py load "$out"
done
