#!/usr/bin/env bash
# One run on a machine with an NVIDIA GPU: builds the CUDA part, tests every CUDA and Triton kernel
# on the card and in simt beside it, times all of them beside their peers, and leaves logs and JSON
# in a folder. Ten minutes at most: each stage has its own time limit, and one that fails stops none
# of the others.
#
#   benchmarks/gpu_run.sh OUT [--only STAGE] [--sanitize] [--dry-run]
#
# Stages: environment build check tests bench; only when named: sanitize (small cases under
# compute-sanitizer), compiled (torch.compile and FlexAttention as peers, which compile for minutes).
# Needs nvcc (CUDA 12.4 or later), a C++ compiler, and a Python (PYTHON, default python3) with a CUDA
# torch, triton, ninja, pytest, rich, matplotlib.
set -u
cd "$(dirname "$0")/.."

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
out= only= sanitize= dry=
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2:?--only needs a stage}; shift ;;
    --sanitize) sanitize=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu_run: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
case $only in
  "" | environment | build | check | tests | bench | sanitize | compiled) ;;
  *) echo "gpu_run: no stage $only" >&2; usage >&2; exit 2 ;;
esac
[ -n "$out" ] || { usage >&2; exit 2; }
mkdir -p "$out" && [ -w "$out" ] || { echo "gpu_run: can't write to $out" >&2; exit 2; }
out=$(cd "$out" && pwd)

python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
workers=$(nproc)
[ "$workers" -gt 8 ] && workers=8 # each holds a CUDA context of half a gigabyte
failed=0

# stage NAME SECONDS COMMAND…: runs it with a limit, its output in OUT/NAME.log and OUT/stages.tsv.
stage() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  [ -z "$only" ] || [ "$only" = "$name" ] || return 0
  echo "== $name (at most $limit s): $*"
  [ -z "$dry" ] || return 0
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  tail -n 12 "$out/$name.log"
  printf '%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - start))" >>"$out/stages.tsv"
  [ $rc = 0 ] || { failed=1; echo "== $name: exit status $rc after $((SECONDS - start)) s"; }
}

[ -n "$dry" ] || : >"$out/stages.tsv"
arch=$("$python" -c 'import torch; c = torch.cuda.get_device_capability(); print(f"{c[0]}{c[1]}" + ("a" if c == (9, 0) else ""))' 2>/dev/null || echo "80;90a")

stage environment 20 bash -c "nvidia-smi; nvcc --version; lscpu; $python -m fasttransformer info"
stage build 150 env FASTTRANSFORMER_CUDA=1 FASTTRANSFORMER_CUDA_ARCHS="$arch" \
  "$python" setup.py -q build_ext --inplace
stage check 40 "$python" -m fasttransformer check --backend cuda --json "$out/check.json"
stage tests 180 "$python" -m pytest tests -q -n "$workers" --dist loadfile -p no:cacheprovider \
  -k "cuda or triton or simt" --maxfail=200 --junitxml="$out/tests.xml"
stage bench 215 "$python" -m fasttransformer.benchmarks.gpu --json "$out/bench.json" \
  --report "$out/report" --seconds 170
if [ "$only" = compiled ]; then
  stage compiled 500 "$python" -m fasttransformer.benchmarks.gpu --compile \
    --json "$out/compiled.json" --seconds 480
fi
if [ -n "$sanitize" ] || [ "$only" = sanitize ]; then
  for what in memcheck racecheck synccheck; do
    stage sanitize 120 compute-sanitizer --tool "$what" --error-exitcode 1 \
      "$python" -m fasttransformer check --backend cuda
  done
fi
[ -n "$dry" ] || { echo "== stages"; cat "$out/stages.tsv"; }
exit $failed
