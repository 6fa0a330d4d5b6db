"""The map of modules in CONTRIBUTING.md: every module with the first sentence of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

from benchmarks import records

#: The packages, lowest layer first: each imports only those before it.
PACKAGES: Final = ("runtime/petseg_runtime", "petseg", "export/petseg_export", "benchmarks")


def module_map() -> str:
    """Returns a list of modules for each package."""
    return "\n\n".join("\n".join(_modules(records.ROOT / package)) for package in PACKAGES)


def _modules(package: Path) -> list[str]:
    own = package.relative_to(records.ROOT)
    lines = [f"**{own}** {_about(package / '__init__.py')}", ""]
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path.name)):
        name = path.relative_to(package)
        if name.parts[-1] != "__init__.py":
            lines.append(f"- `{name}`: {_about(path)}")
        elif name != Path("__init__.py"):
            lines.append(f"- **{name.parent}/** {_about(path)}")
    return lines


def _about(path: Path) -> str:
    """Returns the first sentence or paragraph of a module's docstring, in Markdown."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = re.split(r"\n\n|(?<=\.)(?<!et al\.)\s", docstring, maxsplit=1)[0]
    return " ".join(first.replace("``", "`").split()).removesuffix(".").removesuffix(":")
