"""simt refuses a launch that a card would refuse, and the launch code sees to it that none is."""

from __future__ import annotations

import ctypes

import pytest
import simt
import torch

if simt.missing():
    pytest.skip(f"simt can't be built: {simt.missing()}", allow_module_level=True)

UNKNOWN = (-1, 0, 0)  # nobody said what the compiler made of the kernel


@pytest.mark.parametrize(
    ("case", "compiled", "said"),
    (
        ("limit_not_raised", UNKNOWN, "shared array row of 256 bytes: 256 more than the kernel"),
        ("limit_not_raised", (256, 32, 64), "cudaErrorInvalidValue: 49152 bytes of dynamic shared "
         "memory and 256 static ones, of 49152"),
        ("limit_raised", UNKNOWN, ""),
        ("limit_raised", (256, 32, 64), ""),
        ("limit_raised_in_launch", (256, 32, 64), ""),
        ("limit_changed", (256, 32, 64), "race: the kernel's limit of dynamic shared memory goes "
         "from 50176 bytes to 51200"),
        ("limit_too_high", (256, 32, 64), "cudaErrorInvalidValue: a limit of 101121 bytes"),
        ("too_much_in_launch", (256, 32, 64), "fasttransformer: CUDA kernel with_static_array: "
         "needs 101376 bytes of dynamic shared memory, of 101120 on this device"),
        ("block_too_large", (256, 32, 64), "cudaErrorInvalidConfiguration: block of 128 threads"),
        ("block_too_large", (256, 520, 1024), "cudaErrorLaunchOutOfResources: block of 128 threads "
         "of 520 registers"),
        ("grid_too_large", (256, 32, 64), "cudaErrorInvalidConfiguration: grid of 2147483648"),
    ),
)  # fmt: skip
def test_simt_refuses_what_a_card_refuses(case, compiled, said, tmp_path):
    # A copy of the library for each case: limits that one raised must not hold for the next.
    plain = simt.build("bugs", (simt.ROOT / "tests/simt_bugs.cpp",))
    path = tmp_path / "libft_simt.so"
    path.write_bytes(plain.read_bytes())
    library = simt.opened(path)
    values, out = torch.arange(128.0), torch.zeros(128)
    message = ctypes.create_string_buffer(512)
    library.ft_simt_refused(
        case.encode(), ctypes.c_int64(compiled[0]), *compiled[1:],
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), message,
    )  # fmt: skip
    text = message.value.decode()
    assert said in text and bool(said) == bool(text), text
