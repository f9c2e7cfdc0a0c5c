"""`python -m benchmarks` lists the benchmarks, `python -m benchmarks NAME [options]` runs one."""

import ast
import difflib
import importlib
import pathlib
import sys

HERE = pathlib.Path(__file__).parent


def names() -> dict[str, str]:
    """{name: first line of the docstring} of the scripts here: the modules with a `main`. Imports none of them."""
    found = {}
    for path in sorted(HERE.glob("[a-z]*.py")):
        module = ast.parse(path.read_text("utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            found[path.stem] = ast.get_docstring(module).partition("\n")[0]
    return found


def listing() -> str:
    width = max(map(len, names()))
    lines = [f"  {name:{width}}  {line}" for name, line in names().items()]
    return "\n".join(["python -m benchmarks NAME [options]   (NAME --help: its options)", "", *lines])


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(listing())
        return
    name, *rest = argv
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        advice = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"no benchmark {name!r}{advice}\n\n{listing()}")
    importlib.import_module(f"benchmarks.{name}").main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
