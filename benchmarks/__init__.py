"""Ratios against PyTorch and against the hardware's limit: `python -m benchmarks` lists the scripts."""
