"""Which packages import which: each only some of those above it."""

import ast

import pytest
from conftest import ROOT

PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
MAY = {"core": set(), "data": {"core"}, "kernels": {"core"}, "gpt": {"core", "kernels"},
       "bitgpt": {"core", "kernels", "gpt"}, "engine": {"core", "data", "kernels", "gpt", "bitgpt"},
       "interop": {"core", "data", "kernels", "bitgpt", "engine"},
       "training": {"core", "data", "gpt", "bitgpt", "interop"},
       "benchmarks": {"core", "kernels", "gpt", "bitgpt", "engine", "training"}}



@pytest.mark.parametrize("package", MAY)
def test_a_package_imports_what_it_may(package: str) -> None:
    found = set()
    for path in (ROOT / package).glob("*.py"):
        if path.name not in ("train.py", "generate.py"):  # scripts
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {name.partition(".")[0] for name in names}
    assert MAY.keys() == PACKAGES and found & PACKAGES - {package} == MAY[package]


def test_no_package_imports_one_that_imports_it() -> None:
    names = list(MAY)
    assert all(names.index(other) < names.index(package) for package in MAY for other in MAY[package])
