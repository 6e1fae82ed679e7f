#!/usr/bin/env bash
# What to run on a machine with an NVIDIA GPU: two runs of at most four minutes each. The first is
# about right results and ends with a short benchmark, the second is the benchmark with all peers.
#
#   benchmarks/gpu_run.sh OUT --run 1|2 [--prebuilt DIR_OR_WHEEL | --build] [--only STAGE]
#                         [--limit STAGE=SECONDS]... [--dry-run] [--rehearse]
#
# Run 1: environment check-cuda check-triton probes tests bench. Run 2: environment warm bench
# memory. --only runs one stage, which may be one that no run has: sanitize (small cases under
# compute-sanitizer) and compiled (torch.compile and FlexAttention as peers, which compile for
# minutes). Each stage has a time limit (--limit changes it), and one that fails or is cut stops none
# of the others and keeps what it has.
#
# --prebuilt takes the compiled libraries that benchmarks/gpu_prebuild.sh made elsewhere; --build
# compiles them here first (nvcc, ninja, minutes). --rehearse runs every stage without a GPU, on
# stand-ins, and lets a job of each stage hang; --dry-run names the stages and what they will take.
#
# OUT gets four files: results.tar.gz (all that was found; renewed while stages run), stages.tsv,
# summary.txt, bench.json. Nothing needs to be installed but a Python (PYTHON, default python3) with
# a CUDA torch, triton, pytest, pytest-xdist, hypothesis and rich; transformers adds the models.
set -u
cd "$(dirname "$0")/.."

usage() { sed -n '2,20s/^# \{0,1\}//p' "$0"; }
wrong() { echo "gpu_run: $1" >&2; usage >&2; exit 2; }
out= run= only= prebuilt= build= dry= rehearse=
declare -A given=()
while [ $# -gt 0 ]; do
  case $1 in
    --run) run=${2-}; shift ;;
    --only) only=${2-}; shift ;;
    --prebuilt) prebuilt=${2-}; [ -e "$prebuilt" ] || wrong "--prebuilt: no '$prebuilt' here"; shift ;;
    --limit) [[ ${2-} =~ ^([a-z-]+)=([0-9]+)$ ]] || wrong "--limit needs STAGE=SECONDS"
      given[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}; shift ;;
    --build) build=1 ;;
    --dry-run) dry=1 ;;
    --rehearse) rehearse=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) wrong "unknown option $1" ;;
    *) out=$1 ;;
  esac
  shift || break
done

stages_of_run_1="environment check-cuda check-triton probes tests bench"
stages_of_run_2="environment warm bench memory"
case $run$only in
  1*) stages=$stages_of_run_1 ;;
  2*) stages=$stages_of_run_2 ;;
  "") wrong "--run 1 or --run 2 (or --only STAGE) must be given" ;;
  *) [ -z "$run" ] || wrong "no run $run"; stages= ;;
esac
if [ -n "$only" ]; then
  case " $stages_of_run_1 $stages_of_run_2 build sanitize compiled " in
    *" $only "*) stages=$only ;;
    *) wrong "no stage $only" ;;
  esac
elif [ -n "$build" ]; then
  stages="build $stages"
fi
[ -n "$out" ] || wrong "a folder for the results must be given"
if [ -z "$dry" ]; then
  mkdir -p "$out" && [ -w "$out" ] || wrong "can't write to $out"
  out=$(cd "$out" && pwd)
fi

# ---- limits, in seconds: each run's add up to 235, so that 5 are left for the archive ------------

declare -A limit=(
  [environment]=25 [check-cuda]=40 [check-triton]=45 [probes]=30 [tests]=50 [bench]=45
  [build]=150 [sanitize]=240 [compiled]=240
)
[ "$run" != 2 ] || limit+=([environment]=20 [warm]=35 [bench]=165 [memory]=15)
[ -n "${limit[warm]-}" ] || limit+=([warm]=35 [memory]=15)
# A rehearsal has two cores where a GPU's machine has sixteen; something in each stage is cut.
[ -z "$rehearse" ] || limit=(
  [environment]=60 [check-cuda]=60 [check-triton]=60 [probes]=60 [tests]=45 [bench]=60
  [warm]=60 [memory]=60 [build]=150 [sanitize]=60 [compiled]=60
)
for name in "${!given[@]}"; do
  [ -n "${limit[$name]-}" ] || wrong "--limit: no stage $name"
  limit[$name]=${given[$name]}
done

# ---- stages -------------------------------------------------------------------------------------

export python=${PYTHON:-python3} rehearse run out
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
cores=$(nproc)
export at_once=$((cores > 16 ? 12 : cores > 3 ? cores * 3 / 4 : 2)) # each holds a CUDA context
export selection=short
[ "$run" = 1 ] || selection=full
export module=fasttransformer.benchmarks

# jobs STAGE SECONDS EACH NAMES COMMAND: one process per name, see gpu_jobs.py.
jobs_of() {
  local hanging='case $0 in hang) echo "{\"started\": \"a hang\"}"; sleep 600 ;; esac; exec "$@"'
  # In a rehearsal the first job hangs, so that its limit is seen to work.
  [ -z "$rehearse" ] || set -- "$1" "$2" "$(($2 / 3))" "hang $4" "bash -c '$hanging' {name} $5"
  tr ' ' '\n' <<<"$4" | "$python" benchmarks/gpu_jobs.py --out "$work/$1" --seconds "$2" \
    --each "$3" --at-once "$at_once" --command "$5"
}
# names MODULE: what environment wrote, or asked again where that failed.
names_of() {
  [ -s "$work/$1.names" ] || "$python" -m "$module.$1" --list >"$work/$1.names"
  tr '\n' ' ' <"$work/$1.names"
}
# Stages of jobs end a few seconds before their limit by themselves.
within() { echo $(($1 > 20 ? $1 - 4 : $1 > 4 ? $1 - 2 : $1)); }

stage_environment() {
  # All at once: on a fresh machine each import of torch first waits for the disk.
  "$python" -m "$module.gpu_check" --list >"$work/gpu_check.names" 2>/dev/null &
  "$python" -m "$module.gpu_probes" --list >"$work/gpu_probes.names" 2>/dev/null &
  nvidia-smi || echo "no nvidia-smi"
  nvcc --version || echo "no nvcc"
  lscpu | head -n 20
  "$python" -m fasttransformer info
  local status=$?
  wait
  return $status
}
stage_build() {
  FASTTRANSFORMER_CUDA=1 FASTTRANSFORMER_CUDA_ARCHS=90a "$python" setup.py -q build_ext --inplace
}
stage_check() { # STAGE BACKEND STAND-IN SECONDS
  local backend=$2
  [ -z "$rehearse" ] || backend=$3
  jobs_of "$1" "$(within "$4")" "$(($4 * 3 / 4))" "$(names_of gpu_check)" \
    "$python -m $module.gpu_check {name} $backend"
}
stage_check-cuda() { stage_check check-cuda cuda cpu "$1"; }
# Triton's interpreter stands in for the compiler and the GPU in a rehearsal.
stage_check-triton() {
  [ -z "$rehearse" ] || export TRITON_INTERPRET=1
  stage_check check-triton triton triton "$1"
}
stage_probes() {
  local device=cuda
  [ -z "$rehearse" ] || device=cpu
  jobs_of probes "$(within "$1")" "$(($1 * 2 / 3))" "$(names_of gpu_probes)" \
    "$python -m $module.gpu_probes {name} --device $device"
}
stage_tests() {
  local from=(tests) processes=$((at_once > 8 ? 8 : at_once))
  # In a rehearsal some files stand in, whose tests then run in Triton's interpreter.
  [ -z "$rehearse" ] || from=(tests/test_rms_norm.py tests/test_layer_norm.py tests/test_softmax.py)
  "$python" -m pytest "${from[@]}" -m gpu -n "$processes" -p no:cacheprovider -q \
    --results "$work/tests.jsonl"
}
stage_bench() {
  local options=(--selection "$selection" --json "$work/bench.json" --seconds "$(within "$1")")
  [ -z "$rehearse" ] || options+=(--rehearse --each 8)
  "$python" -m "$module.gpu" "${options[@]}"
}
stage_warm() {
  local parts=13 options=
  [ -z "$rehearse" ] || { parts=2; options="--rehearse --only 256"; }
  local names=
  for ((i = 0; i < parts; ++i)); do names+="${i}of$parts "; done
  at_once=$parts jobs_of warm "$(within "$1")" "$1" "$names" \
    "$python -m $module.gpu --warm {name} $options"
}
stage_memory() {
  local device=(--device cuda)
  [ -z "$rehearse" ] || device=(--quick)
  "$python" -m "$module.memory" "${device[@]}" >"$work/memory.jsonl"
}
stage_sanitize() {
  for what in memcheck racecheck synccheck; do
    echo "== $what"
    compute-sanitizer --tool "$what" --error-exitcode 1 \
      "$python" -m fasttransformer check --backend cuda || failed_tool=1
  done
  return "${failed_tool-0}"
}
stage_compiled() {
  "$python" -m "$module.gpu" --compile --only attention --json "$work/compiled.json" \
    --seconds "$(within "$1")"
}
for name in $stages; do export -f "stage_$name"; done
export -f stage_check jobs_of names_of within

# ---- running them -------------------------------------------------------------------------------

if [ -n "$dry" ]; then
  sum=0
  for name in $stages; do
    echo "== $name (at most ${limit[$name]} s)"
    sum=$((sum + limit[$name]))
    [ "$name" != bench ] || "$python" -m "$module.gpu" --estimate --selection "$selection" \
      ${rehearse:+--rehearse}
  done
  echo "== $sum s at most"
  exit 0
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/gpu_run.XXXXXX")
export work
failed=0 running=

archive() { # whole or not at all; a file that grows meanwhile is no error
  cp -f "$out/stages.tsv" "$work/" 2>/dev/null
  tar -C "$work" -czf "$out/.results.new" . 2>/dev/null
  [ -s "$out/.results.new" ] && mv -f "$out/.results.new" "$out/results.tar.gz"
  [ ! -s "$work/bench.json" ] || cp -f "$work/bench.json" "$out/bench.json"
}
finish() {
  "$python" benchmarks/gpu_summary.py "$work" >"$out/summary.txt" 2>&1
  cp -f "$out/summary.txt" "$work/"
  archive
  rm -rf "$work"
}
interrupted() {
  trap - TERM INT
  [ -z "$running" ] || kill -TERM "$running" 2>/dev/null
  finish
  exit 143
}
trap interrupted TERM INT

stage() {
  local name=$1 most=$2 start=$SECONDS saved=$SECONDS rc
  echo "== $name (at most $most s)"
  timeout --kill-after=3 "$most" bash -c "stage_$name $most" >"$work/$name.log" 2>&1 &
  running=$!
  while kill -0 "$running" 2>/dev/null; do
    sleep 0.2
    if [ $((SECONDS - saved)) -ge 15 ]; then
      archive
      saved=$SECONDS
    fi
  done
  wait "$running"
  rc=$?
  running=
  if [ "$(wc -c <"$work/$name.log")" -gt 2000000 ]; then # the end of a long log says most
    tail -c 2000000 "$work/$name.log" >"$work/long" && mv "$work/long" "$work/$name.log"
  fi
  tail -n 6 "$work/$name.log" | cut -c 1-200
  printf '%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - start))" >>"$out/stages.tsv"
  archive
  [ $rc = 0 ] || { failed=1; echo "== $name: exit status $rc after $((SECONDS - start)) s"; }
}

: >"$out/stages.tsv"
if [ -n "$prebuilt" ]; then
  # A rehearsal leaves the checkout's libraries alone; a GPU's machine may have no readelf.
  use=$([ -n "$rehearse" ] && echo check || echo install)
  "$python" benchmarks/gpu_prebuilt.py "$use" "$prebuilt" 2>&1 | tee "$work/prebuilt.log"
elif [ -z "$build" ] && [ ! -e fasttransformer/_cuda.abi3.so ]; then
  echo "gpu_run: there is no CUDA library in fasttransformer/ (--prebuilt or --build brings it)"
fi
for name in $stages; do stage "$name" "${limit[$name]}"; done
finish
cat "$out/summary.txt"
exit $failed
