"""Every operation on four threads, alone and in several Python threads at once, on each instruction
set: what the thread sanitizer watches (sanitize.py). Prints the sets and the number of calls."""

from __future__ import annotations

import concurrent.futures

import torch
from instruction_sets import SETS
from parallel_cases import CASES, results, same

from fasttransformer._contract import running_on

PYTHON_THREADS = 3


def main() -> None:
    torch.set_num_threads(4)
    for isa in SETS:
        with running_on(f"cpu:{isa}"):
            expected = {op: results(op) for op in CASES}
            with concurrent.futures.ThreadPoolExecutor(PYTHON_THREADS) as pool:
                for op in CASES:
                    calls = [pool.submit(results, op) for _ in range(PYTHON_THREADS)]
                    for call in calls:
                        assert same(call.result(), expected[op]), (isa, op)
        calls_made = len(CASES) * (1 + PYTHON_THREADS)
        print(f"{isa}: {len(CASES)} operations, {calls_made} calls", flush=True)


if __name__ == "__main__":
    main()
