"""What code a rule depends on, as a hash: what makes its results stale, and what their headers name.

Standard library only, since the graph needs it before any job starts.
"""

from __future__ import annotations

import ast
from pathlib import Path

from wmdd_core.digests import digest

ROOT = Path(__file__).resolve().parent.parent

INFRASTRUCTURE = {
    "wmdd_core.artifacts",
    "wmdd_core.code",
    "wmdd_core.digests",
    "wmdd_core.errors",
    "wmdd_core.memory",
    "wmdd_core.progress",
    "workflow_scripts.job",
}
"""How work is reported and stored, not what is computed: edits there make no result stale."""


def code_hash(rule: str) -> str:
    """A hash of the code that a rule depends on: its script and what that imports of this project.

    Taken over the syntax trees without docstrings, so that an edited comment costs no rerun;
    `INFRASTRUCTURE` is left out.
    """
    seen: dict[str, str] = {}
    _collect(f"workflow_scripts.{rule}", seen)
    return digest(sorted(seen.items()))


_PARSED: dict[str, tuple[str, list[str]]] = {}


def _collect(module: str, seen: dict[str, str]) -> None:
    if module in seen or module in INFRASTRUCTURE:
        return
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        return
    if module not in _PARSED:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        _PARSED[module] = (_without_docstrings(tree), sorted(_local_imports(tree)))
    seen[module], imports = _PARSED[module]
    for imported in imports:
        _collect(imported, seen)


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [
                s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree)


def _local_imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.startswith(("wmdd_core.", "workflow_scripts."))}


def code_variable(rule: str) -> str:
    """The environment variable by which Snakemake's main process tells jobs the hash of a rule's code."""
    return f"WMDD_CODE_{rule.upper()}"


def source_stamp() -> str:
    """A digest of times and sizes of this project's modules: while it stays the same, so does their code."""
    modules = sorted([*ROOT.glob("workflow_scripts/*.py"), *ROOT.glob("wmdd_core/*.py")])
    return digest([[m.name, (status := m.stat()).st_size, status.st_mtime_ns] for m in modules])
