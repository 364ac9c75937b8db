"""Which code this is: its commit for whoever reads rows, a digest for whoever keeps files that it wrote."""

from __future__ import annotations

import hashlib
import json
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from qfae_runtime.hashing import sha256_of

_HERE = Path(__file__).parent

_PACKAGES = ("qfae_export", "qfae_train", "qfae_runtime")
_MODULES = (
    "subject.py",
    "work.py",
    "gemm.py",
    "opening.py",
    "torch_engine.py",
)  # of this package; the others write none
_LIBRARIES = ("torch", "timm", "onnx", "onnxscript", "onnx_ir", "tensorrt")


def writers() -> dict[str, str]:
    """Return what the files of a model depend on beside the model: a digest of the code, the libraries' versions."""
    digests = {name: sha256_of(_HERE / name) for name in _MODULES}
    for root in _roots():
        paths = [path for path in root.rglob("*") if path.suffix in (".py", ".npz")]
        digests |= {f"{root.name}/{path.relative_to(root).as_posix()}": sha256_of(path) for path in paths}
    found = {"code": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _roots() -> list[Path]:
    """Return the folders of the packages, without importing them."""
    specs = [find_spec(name) for name in _PACKAGES]
    return [Path(spec.submodule_search_locations[0]) for spec in specs if spec and spec.submodule_search_locations]


def commit(root: Path = _HERE.parents[1]) -> str | None:
    """Return the commit of a checkout, with "+" where tracked files differ from it; None: no checkout, or no git."""
    if not (root / ".git").exists():  # git would go on to the folders above, and find another project's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
