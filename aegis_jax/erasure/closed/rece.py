"""RECE: Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024, arXiv 2407.12383, sections 3.2 and 3.3).

After an edit by UCE, the embedding that brings the concept back is a closed form too: of a concept's row x the
adversary is the a that minimises

    sum over projections ||a W_now - x W_0||^2 + regular_scale ||a||^2 ,

and it is erased in turn, W_now being what the next edit starts from. Every edit multiplies all projections by one
matrix, W_now = F W_0 with F (d, d). So the sums over projections need their Gram matrix G = sum W_0 W_0' alone:

    a = x G F' (F G F' + regular_scale I)^-1 .
"""

import numpy as np


def adversary(x: np.ndarray, factor: np.ndarray, gram: np.ndarray, regular_scale: float) -> np.ndarray:
    """The rows a (n, d) of rows x (n, d) against projections F W_0. factor: F; gram: G (d, d)."""
    cross = gram @ factor.T
    system = factor @ cross + regular_scale * np.eye(len(factor))
    return np.linalg.solve(system, cross.T @ x.T).T  # the system is symmetric
