"""How a method's settings are checked: every value that is out of its range is named, in one error."""

import contextlib
from collections.abc import Callable, Iterator

from aegis_jax.errors import AegisError


@contextlib.contextmanager
def checking(config, order: Callable = list) -> Iterator[Callable]:
    """need(ok, key, want): notes the setting `key`, such as "latents.steps", where it is not ok.

    order: of what is told. Raises `AegisError` on leaving, if there is anything to tell.
    """
    problems: list[str] = []

    def need(ok, key: str, want: str) -> None:
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        if not ok:
            problems.append(f"{key}={value!r} (want {want})")

    yield need
    if problems:
        raise AegisError("config: " + "; ".join(order(problems)))
