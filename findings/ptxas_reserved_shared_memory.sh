#!/usr/bin/env bash
# Two tools of one wheel disagree about a kernel's shared memory, from Hopper on by 1,024 bytes.
#
# What one would guess: the SHARED figure of `cuobjdump --dump-resource-usage` is what the kernel
# declares, the same on every architecture, and the same that `ptxas -v` prints as "bytes smem".
#
# What happens: up to sm_89 it is. For sm_90, sm_100 and sm_120 cuobjdump shows 1,024 bytes more for
# each kernel that uses shared memory, also for one whose shared memory is dynamic alone (1,024 where
# nothing is declared), and none more for one that uses none. `ptxas -v` goes on to print the declared
# bytes. The compiler books the 1 KB that the system keeps for each block into the kernel's own static
# size. (The CUDA programming guide mentions the reservation for compute capability 9.0; that it
# appears in a kernel's figures it does not say.) Whoever budgets dynamic shared memory as "the
# device's limit − static bytes" from the object file gets another answer from the same source on sm_90
# than on sm_80, and a table of resources made with cuobjdump does not match ptxas's log.
#
# Versions: triton 3.9.0 (its wheel carries NVIDIA's ptxas 12.9.86 and cuobjdump).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q --no-deps triton==3.9.0
tools=$(echo "$folder"/venv/lib/python3*/site-packages/triton/backends/nvidia/bin)
"$tools/ptxas" --version | tail -n 2

write() { # KERNEL MODULE_LEVEL BODY
  cat >"$folder/$1.ptx" <<PTX
.version 8.0
.target sm_80
.address_size 64
$2
.visible .entry $1(.param .u64 out) {
  .reg .b32 %r<3>; .reg .b64 %d<3>;
  $3
  ld.param.u64 %d1, [out]; cvta.to.global.u64 %d2, %d1; st.global.u32 [%d2], %r1; ret;
}
PTX
}
use='mov.u32 %r1, %tid.x; mov.u32 %r2, bytes; st.shared.u32 [%r2], %r1; bar.sync 0; ld.shared.u32 %r1, [%r2];'
write uses_none "" "mov.u32 %r1, %tid.x;"
write declares_128 "" ".shared .align 16 .b8 bytes[128]; $use"
write dynamic_alone ".extern .shared .align 16 .b8 bytes[];" "$use"

differs=0
check() { # ARCH KERNEL DECLARED SYSTEM
  "$tools/ptxas" -v -arch "$1" "$folder/$2.ptx" -o "$folder/a.cubin" 2>"$folder/log"
  local log table
  log=$(sed -n 's/.* \([0-9]*\) bytes smem.*/\1/p' "$folder/log")
  table=$("$tools/cuobjdump" --dump-resource-usage "$folder/a.cubin" |
    sed -n 's/.*REG:.*SHARED:\([0-9]*\).*/\1/p')
  echo "$1 $2: ptxas -v ${log:-0}, cuobjdump $table"
  [ "${log:-0}" = "$3" ] && [ "$table" = $(($3 + $4)) ] || differs=1
}
for arch in sm_80 sm_86 sm_89 sm_90 sm_100 sm_120; do
  system=1024
  case $arch in sm_8*) system=0 ;; esac
  check "$arch" uses_none 0 0
  check "$arch" declares_128 128 "$system"
  check "$arch" dynamic_alone 0 "$system"
done
[ $differs = 0 ] || { echo "the behaviour has changed"; exit 1; }
