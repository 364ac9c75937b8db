"""The lower bounds of pyproject.toml: every package has one, and `make test-lowest` installs exactly those."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from tests.lowest import PYPROJECT, lowest

PROJECT: dict[str, Any] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]


def made(*requirements: str, **extras: list[str]) -> dict[str, Any]:
    return {"name": "qfae", "dependencies": list(requirements), "optional-dependencies": extras}


def test_every_package_has_a_bound() -> None:
    found = lowest(PROJECT, ["dev", "tensorrt", "tensorrt-rtx"])
    assert {
        "click",
        "onnxruntime",
        "timm",
        "torch",
        "torchvision",
        "onnx",
        "pytest",
        "mypy",
        "tensorrt",
    } <= found.keys()
    assert "qfae" not in found


def test_versions_that_ran_a_files_code_are_not_allowed() -> None:
    """timm 1.0.22 to 1.0.25 unpickled the file named by `checkpoint_path`."""
    assert tuple(map(int, lowest(PROJECT, ["train"])["timm"].split("."))) > (1, 0, 25)


def test_extras_of_extras_markers_and_several_bounds() -> None:
    project = made("a>=1.2,<3", all=["qfae[one,two]"], one=["b[fast]>=0.1; platform_machine == 'x'"], two=["C-d >= 2"])
    assert lowest(project, ["all"]) == {"a": "1.2", "b": "0.1", "C-d": "2"}
    assert lowest(project, []) == {"a": "1.2"}


def test_a_package_without_a_bound() -> None:
    with pytest.raises(ValueError, match=r"^pyproject\.toml: 'torchvision' has no lower bound; name the lowest"):
        lowest(made("torchvision"), [])


def test_what_is_installed_is_allowed() -> None:
    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())

    for name, bound in lowest(PROJECT, ["export", "openvino", "medical", "demo", "test"]).items():
        try:
            assert number(version(name)) >= number(bound), name
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed")
