"""What a search for prompts moves, and how it becomes tokens: rows on the simplex, or embeddings near words.

Both take the gradient at the embeddings of whole tokens and carry it straight through to what they move. A space is
plain numbers, so that it can be a static argument of `jax.jit`.
Shapes: R prompts, k learnt tokens, V tokens of the vocabulary, d token width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from aegis_jax.attacks import simplex
from aegis_jax.models.model import full_precision

UPDATES = ("adam", "sign")


@dataclasses.dataclass(frozen=True)
class Simplex:
    """UnlearnDiffAtk's: k rows of probabilities over the vocabulary (R, k, V)."""

    learning_rate: float
    weight_decay: float  # added to the gradient (Adam with L2, not AdamW)
    update: str = "adam"

    def start(self, keys, table, tokens: int):
        """Even rows (R, k, V): keys (R,), table (V, d)."""
        return jnp.full((len(keys), tokens, len(table)), 1 / len(table), jnp.float32)

    def tokens(self, variable, keys, table):
        """Ids (R, k), drawn from the rows."""
        return jax.vmap(simplex.draw)(keys, variable)

    def settled(self, variable, table):
        """Ids (R, k), the likeliest of each row."""
        return variable.argmax(-1).astype(jnp.int32)

    def gradient(self, at_tokens, table):
        """Of the one-hot rows (R, k, V), from that of the embeddings (R, k, d); cut to [-1, 1]."""
        with full_precision(table.dtype):
            return jnp.clip(at_tokens @ table.T, -1, 1)

    @property
    def optimiser(self):
        if self.update == "sign":
            return optax.sign_sgd(self.learning_rate)
        parts = optax.add_decayed_weights(self.weight_decay), optax.scale_by_adam()
        return optax.chain(*parts, optax.scale(-self.learning_rate))

    def back(self, variable):
        return simplex.project(variable)


@dataclasses.dataclass(frozen=True)
class Nearest:
    """P4D's: k embeddings (R, k, d), each standing for the token whose embedding has the largest cosine with it."""

    learning_rate: float
    weight_decay: float
    decoupled: bool  # AdamW, otherwise Adam with L2

    def start(self, keys, table, tokens: int):
        """The embeddings of tokens drawn evenly from the whole vocabulary, each by a key of its own.

        So a prompt's do not depend on `tokens`, which is the most that any prompt beside it has.
        """
        draw = lambda key, i: jax.random.randint(jax.random.fold_in(key, i), (), 0, len(table), jnp.int32)  # noqa: E731
        ids = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, jnp.arange(tokens, dtype=jnp.int32))
        return table[ids]

    def tokens(self, variable, keys, table):
        return self.settled(variable, table)

    def settled(self, variable, table):
        """Ids (R, k). The variable's own length does not matter to which is nearest."""
        with full_precision(table.dtype):
            length = jnp.linalg.norm(table, axis=-1)
            return (variable @ table.T / jnp.maximum(length, 1e-12)).argmax(-1).astype(jnp.int32)

    def gradient(self, at_tokens, table):
        return at_tokens

    @property
    def optimiser(self):
        parts = [optax.add_decayed_weights(self.weight_decay), optax.scale_by_adam()]
        return optax.chain(*(reversed(parts) if self.decoupled else parts), optax.scale(-self.learning_rate))

    def back(self, variable):
        return variable


def first_moments(space, variable):
    """The optimiser's state with an axis of prompts on every leaf, so that prompts can be taken out and joined."""
    return jax.vmap(space.optimiser.init)(variable)


def move(space, variable, moments, gradient):
    """One step of all prompts: (variable, moments)."""
    update, moments = jax.vmap(space.optimiser.update)(gradient, moments, variable)
    return space.back(optax.apply_updates(variable, update)), moments
