"""Triton kernels, one file per operation, registered as ``fasttransformer_triton::<op>``."""
