"""Triton kernels, one file per operation, registered as ``fasttransformer_triton::<op>``.

Importing this package defines the operators; nothing is compiled and no device is touched before
the first call. ``_register`` defines operators, ``_device`` holds functions that kernels share,
``_norm`` and ``_matmul`` the kernels that several operations share.
"""

from . import softmax as softmax
