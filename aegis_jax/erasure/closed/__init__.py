"""Closed forms: erasures that are one linear solve for the keys and values of the UNet's cross-attention.

Their input is the text embedding alone, in every layer and at every timestep, so what a prompt's tokens are to become
can be asked for directly, as least squares. Read uce.py first.
"""
