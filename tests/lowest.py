"""The lowest versions that pyproject.toml allows, as requirements for pip: what `make test-lowest` installs.

    python tests/lowest.py export openvino   # the bare install and these extras

Only what pyproject.toml names is pinned; what those packages need in turn is for pip to choose.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[(?P<extras>[^\]]*)\])?(?P<bounds>[^;]*)(;.*)?$")


def lowest(project: dict[str, Any], extras: list[str]) -> dict[str, str]:
    """Return the lowest allowed version of each package that the bare install and `extras` name.

    Raises:
        ValueError: a package without a lower bound, for which nobody knows what was tried.

    """
    found: dict[str, str] = {}
    waiting = [*project["dependencies"], *(f"{project['name']}[{extra}]" for extra in extras)]
    while waiting:
        line = waiting.pop(0)
        match = _REQUIREMENT.match(line.strip())
        if match is None:
            raise ValueError(f"pyproject.toml: {line!r} is not a requirement that tests/lowest.py can read")
        if match["name"] == project["name"]:
            for extra in (match["extras"] or "").split(","):
                waiting += project["optional-dependencies"][extra.strip()]
            continue
        bound = re.search(r">=\s*([^,\s]+)", match["bounds"])
        if bound is None:
            raise ValueError(f"pyproject.toml: {line!r} has no lower bound; name the lowest version that was tried")
        found[match["name"]] = bound[1]
    return found


def main() -> None:
    """Print one requirement a line."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    for name, version in sorted(lowest(project, sys.argv[1:]).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
