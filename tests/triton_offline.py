"""Compiles the Triton kernels for GPUs that are not here, as the operators would launch them.

Run by test_triton.py in a process of its own, without TRITON_INTERPRET. Triton is given a driver
that only names a target, every launch becomes a compilation, and the operators' own Python
functions are called on CPU tensors: so what is compiled is exactly what a GPU would be given, with
the same specialization, tile sizes and warps. Prints one JSON line per compiled kernel. By hand:

    python tests/triton_offline.py sm_80|sm_89|sm_90|gfx942 all|few|<operation> [kernel…]
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class NamesOnly:
    """Enough of a driver for Triton to compile: a target and numbers for device and stream."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device=None):
        return 0


_run = JITFunction.run
_compiled: dict[str, tuple[str, object]] = {}
_case = ""


def _compile_only(self, *args, grid, warmup, **kwargs):
    if self.__name__ in sys.argv[3:] or len(sys.argv) <= 3:
        compiled = _run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.__module__.rsplit('.')[-1]}.{self.__name__}"
        _compiled[compiled.hash] = (f"{name} [{_case}]", compiled)
    return None


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes, as the CUDA tools read them from the compiled kernel."""
    tools = f"{triton.__path__[0]}/backends/nvidia"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [f"{tools}/bin/cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}


def report(target: str) -> None:
    for name, compiled in _compiled.values():
        row = {
            "target": target,
            "kernel": name,
            "warps": compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
        }
        if target.startswith("sm"):
            row |= resources(compiled.asm["cubin"])
            ptx = compiled.asm["ptx"]
            row["mma"] = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|ex2\.approx", ptx)))
            row["bytes"] = len(compiled.asm["cubin"])
        else:
            row["bytes"] = len(compiled.asm["hsaco"])
            asm = compiled.asm["amdgcn"]
            row["mma"] = sorted(set(re.findall(r"v_mfma", asm)))
            row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", asm).group(1))
            row["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", asm).group(1))
        print(json.dumps(row), flush=True)


def main() -> None:
    from triton_cases import CASES, FEW

    global _case
    JITFunction.run = _compile_only
    target, op = sys.argv[1:3]
    driver.set_active(NamesOnly(TARGETS[target]))
    for name, call in CASES.items():
        if op in ("all", name.split()[0]) or (op == "few" and name in FEW):
            _case = name
            call()
    report(target)


if __name__ == "__main__":
    main()
