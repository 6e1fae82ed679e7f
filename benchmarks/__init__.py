"""Benchmarks: one ``bench_<op>.py`` per operation, the machine's own ceilings, and MiniLM.

``fasttransformer bench`` runs them; ``pytest benchmarks/bench_<op>.py`` runs one file's cases under
pytest-benchmark. docs/benchmarks.md says how they measure and how to add a case.
"""
