"""Noise schedule, deterministic DDIM and sampling: arrays and functions."""
