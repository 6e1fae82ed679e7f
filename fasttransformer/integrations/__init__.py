"""Other libraries' models on this package's kernels; each file is imported only when it is used."""
