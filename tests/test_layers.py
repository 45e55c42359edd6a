"""Which packages import which."""

import ast

import pytest
from conftest import ROOT

PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
MAY = {"core": set(), "data": {"core"}, "gpt": {"core", "engine"}, "training": {"core", "data", "gpt", "interop"},
       "interop": {"core", "data", "bitgpt", "engine"}}  # engine/ runs both twins, whose own kernels it compiles


@pytest.mark.parametrize("package", MAY)
def test_a_package_imports_what_it_may(package: str) -> None:
    found = set()
    for path in (ROOT / package).glob("*.py"):
        if path.name not in ("train.py", "generate.py"):  # scripts
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {name.partition(".")[0] for name in names}
    assert MAY.keys() < PACKAGES and found & PACKAGES - {package} == MAY[package]
