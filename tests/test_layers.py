"""The house's floors: a package imports only what lies below it, so that nothing walks back up."""

import ast
import pathlib
import sys

import pytest

import aegis_jax

PACKAGE = pathlib.Path(aegis_jax.__file__).parent
# From the bottom up; what stands on one line does not import one another.
FLOORS = [
    {"errors", "kinds"},
    {"models"},
    {"diffusion", "parallel"},
    {"erasure", "io"},
    {"attacks"},
    {"world"},
    {"canvas"},
    {"worlds"},
    {"judges"},
    {"evaluation"},
    {"run"},
    {"batch", "plan", "report"},
    {"cli", "__init__"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
OUTSIDE = {"erasure": {"jax", "flax", "optax", "numpy"}, "models": {"jax", "flax", "numpy"}}


def imports(path):
    """Dotted names that a file imports, anywhere in it, of this package and of others."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "configs" not in path.parts]


def test_every_room_has_a_floor():
    assert {room(path) for path in files()} == set(FLOOR)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    mine = room(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "aegis_jax":
            theirs = rest.partition(".")[0]
            below = FLOOR.get(theirs, FLOOR["__init__"]) < FLOOR[mine] if theirs != mine else True
            assert below or theirs == "__version__", f"{mine} imports {name}, which lies above it"
        elif mine in OUTSIDE and top not in sys.stdlib_module_names:
            assert top in OUTSIDE[mine], f"{mine} imports {name}"
