"""The map of the house in CONTRIBUTING.md: every module, with what its docstring says first."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

from benchmarks import records

#: The packages, lowest first: each imports those before it alone.
HOUSE: Final = ("runtime/petseg_runtime", "petseg", "export/petseg_export", "benchmarks")


def rooms() -> str:
    """A list for each package."""
    return "\n\n".join("\n".join(_of(records.ROOT / package)) for package in HOUSE)


def _of(package: Path) -> list[str]:
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
    """The first sentence or paragraph of a module, in Markdown."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = re.split(r"\n\n|(?<=\.)\s", said, maxsplit=1)[0]
    return " ".join(first.replace("``", "`").split()).removesuffix(".").removesuffix(":")
