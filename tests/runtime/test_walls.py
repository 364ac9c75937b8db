"""The runtime is what a hospital installs: it must import and run where torch and the other packages are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORBIDDEN = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "lightning",
    "qfae_train",
    "qfae_export",
    "matplotlib",
)

BLOCKED_RUN = f"""
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Wall())
import pkgutil, importlib, qfae_runtime
for module in pkgutil.walk_packages(qfae_runtime.__path__, "qfae_runtime."):
    importlib.import_module(module.name)
from qfae_runtime.cli import main
try:
    main(sys.argv[1:])
finally:
    loaded = [name for name in sys.modules if name.partition(".")[0] in {FORBIDDEN!r}]
    assert not loaded, loaded
    print("WALL HOLDS")
"""


def test_a_whole_run_without_torch(engine_path: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = [str(dataset), "--engine", str(engine_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_RUN, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("WALL HOLDS")
    assert (tmp_path / "out" / "report.html").is_file()


def test_neither_scikit_learn_nor_scipy_is_imported_without_labels(
    engine_path: Path, dataset: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from qfae_runtime.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('sklearn' in sys.modules or 'scipy' in sys.modules)"
    )
    image = dataset / "good" / "img" / "0.png"
    done = subprocess.run(
        [sys.executable, "-c", script, str(image), "--engine", str(engine_path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("arguments", [["-c", "import qfae_runtime.engines.onnxruntime"], ["-m", "qfae_runtime.cli"]])
def test_no_telemetry_is_left_behind(
    arguments: list[str], engine_path: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QFAE_CACHE", raising=False)
    if "-m" in arguments:
        arguments = [*arguments, str(dataset), "--engine", str(engine_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert left == ({(".cache", "qfae")} if "-m" in arguments else set())


def test_no_source_file_names_a_forbidden_import() -> None:
    for path in Path(__file__).parents[2].glob("qfae_runtime/**/*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].partition(".")[0] not in FORBIDDEN, f"{path}: {line}"
