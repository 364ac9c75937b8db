"""Every command of the README is run as it stands there, in a folder with a few slices in place of thousands."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import save_file

from demo.dataset import items, write
from demo.spread import with_results
from qfae_runtime.cli import run_command
from qfae_train.config import Backbone, Perceptual
from tests.benchmarks.test_reproduce import tree
from tests.commands import ROOT, run
from tests.export.tiny import checkpoint_file, picture_folder
from tests.train.made_up import DINOV2, config, made_up, toml

README = (ROOT / "README.md").read_text(encoding="utf-8")
FEW = {("train", "good"): 8, ("valid", "good"): 19, ("valid", "Ungood"): 3, ("test", "good"): 3, ("test", "Ungood"): 3}

TESTED_HERE = (".", "python", "qfae-train", "qfae-export", "qfae-run", "qfae-bench", "make", "pip")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return [shlex.split(line) for line in lines if shlex.split(line)[0] == program]


def test_no_command_is_left_untested() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert lines
    assert {shlex.split(line)[0] for line in lines} == set(TESTED_HERE)


def test_train_export_run(tmp_path: Path) -> None:
    [activate], [build], [calibrate, score] = commands("."), commands("python"), commands("qfae-run")[:2]
    train, export = commands("qfae-train")[0], commands("qfae-export")[0]
    assert activate == [".", ".venv/bin/activate"]
    assert run(*build, "--splits", "valid", cwd=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "build/demo/data/valid")
    write(items(tmp_path / "build/demo/data", 0, ["train", "valid", "test"], FEW))

    done = run(*train, "--epochs", "1", "--batch-size", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.pt").is_file()
    shutil.copy(ROOT / "demo/weights/demo.pt", tmp_path)  # what an hour of training gives
    for command in (export, calibrate, score):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    table = re.findall(r"^\| (`[^|]+`) \| (.+) \|$", README.partition("`qfae-run` writes into")[2], flags=re.MULTILINE)
    on_request = [option for _, what in table for option in re.findall(r"^with `(--[a-z-]+)`: ", what)]
    assert on_request == ["--save-maps"]
    assert set(on_request) <= {option for parameter in run_command.params for option in parameter.opts}
    listed = [cell for cell, what in table if not what.startswith("with `--")]
    names = {name.rstrip("/") for cell in listed for name in re.findall(r"`([^`]+)`", cell)}
    assert names == {path.name for path in (tmp_path / "results").iterdir()}
    assert {"demo.pt", "demo.last.pt", "demo.onnx", "demo.json", "demo.golden.npz"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_published_models(tmp_path: Path) -> None:
    """The commands as they stand, but for the preset's 700 million weights, in whose place a small model is named."""
    made = made_up(tmp_path, config(train={"epochs": 1, "workers": 0}, score={"patch_sizes": [16, 28]}))
    (tmp_path / "small.toml").write_text(toml(made.config), encoding="utf-8")
    tree(tmp_path / "BMAD/Brain", train=4, masks="label", images="img")
    files = ["--perceptual-weights", str(made.files.perceptual)]
    save_file({name.removeprefix("encoders.0.model."): tensor for name, tensor in made.state.items()
               if ".model." in name}, tmp_path / "encoder.safetensors")  # fmt: skip
    encoder = ["--backbone-weights", f"{DINOV2}={tmp_path / 'encoder.safetensors'}"]

    def small(words: list[str], *more: str) -> list[str]:
        at = words.index("--preset")
        assert words[at + 1] == "brats"
        return [*words[:at], "--config", "small.toml", *words[at + 2 :], *more]

    export, (evaluate, seeds) = commands("qfae-export")[1], commands("qfae-train")[1:3]
    for words in (small(export, *files), small(evaluate, *files), small(seeds, *files, *encoder, "--batch-size", "4")):
        done = run(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "last_ckpt.onnx").is_file()
    assert json.loads((tmp_path / "runs/brats/brats.seeds.json").read_text(encoding="utf-8"))["statistics"]
    assert ["make", "reproduce", "DATA=BMAD"] in commands("make")  # tests/benchmarks/test_reproduce.py runs it


def test_bench(tmp_path: Path) -> None:
    """The command as it stands, on a tiny model and with one candidate."""
    checkpoint_file(tmp_path / "demo.pt")
    [bench] = commands("qfae-bench")
    quick = ("--against", "onnxruntime", "--batches", "1", "--rounds", "1", "--seconds", "0.01", "--files", "0")
    done = run(*bench, *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"bench.html", "rows.jsonl"} <= {path.name for path in (tmp_path / "bench").iterdir()}


def test_fp16_and_tensorrt(tmp_path: Path) -> None:
    """As far as a machine without TensorRT and GPU comes: FP16, the reason why there is no plan, and verifying."""
    checkpoint_file(tmp_path / "brats.pt")
    export, rebuild, verify = commands("qfae-export")[2:5]
    done = run(*export, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "brats.fp16.onnx").is_file()
    if not (tmp_path / "brats.plan").is_file():
        assert "no plan: TensorRT" in done.stdout
        assert shlex.join(rebuild) in done.stdout
        done = run(*rebuild, cwd=tmp_path)
        assert (done.returncode, "TensorRT" in done.stderr) == (1, True)
        verify = [word.replace("brats.plan", "brats.fp16.onnx") for word in verify]
    done = run(*verify, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_int8(tmp_path: Path) -> None:
    checkpoint_file(tmp_path / "brats.pt")
    picture_folder(tmp_path / "normals", 33)
    picture_folder(tmp_path / "images", 3)
    [export], score = commands("qfae-export")[5:], commands("qfae-run")[2]
    for command in (export, score):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results/run.json").read_text(encoding="utf-8"))["counts"]["scored"] == 3


@pytest.mark.parametrize("target", ["demo", "test", "demo-train", "reproduce"])
def test_make_knows_its_targets(target: str) -> None:
    """`make test` runs this very test and tests/test_road.py runs the demo's program; here, that make calls them."""
    done = subprocess.run(
        ["make", "--dry-run", target, "DATA=BMAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    expected = {
        "demo": "python -m demo.run",
        "test": "bin/pytest",
        "demo-train": "qfae-train --preset demo",
        "reproduce": 'python -m benchmarks.reproduce --data "BMAD"',
    }
    assert done.returncode == 0, done.stderr
    assert expected[target] in done.stdout
    assert target == "demo-train" or target in {words[1] for words in commands("make")}


def test_pip_install(tmp_path: Path) -> None:
    """The source tree installs, with everything the programs read, and asks for torch only in its extras."""
    source, target = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "tests", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    lines = commands("pip")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", target)

    done = run("pip", *lines[0][1:], *offline, cwd=source)

    assert done.returncode == 0, done.stderr
    [distribution] = importlib.metadata.distributions(path=[str(target)])
    required = distribution.requires or []
    bare = [name for name in required if "extra ==" not in name]
    export = [name for name in required if 'extra == "export"' in name]
    assert bare
    assert not any(re.match(r"torch|timm|onnx\b", name) for name in bare)
    assert any(name.startswith("qfae[train]") for name in export)
    assert lines[1][-1] == ".[export]"
    assert lines[2][-1] == ".[openvino]"
    assert [name for name in required if name.startswith("openvino") and 'extra == "openvino"' in name]
    assert len(lines) == 3
    for package in ("qfae_train", "qfae_export", "qfae_runtime"):
        shipped = {
            path.name for path in (ROOT / package).rglob("*") if path.suffix in (".toml", ".safetensors", ".html")
        }
        assert shipped <= {path.name for path in (target / package).rglob("*")}
    scripts = {entry.name for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert {"qfae-train", "qfae-export", "qfae-run"} <= scripts


def test_the_toml_of_the_readme_is_a_configuration() -> None:
    encoder, perceptual = (tomllib.loads(text) for text in blocks("toml"))
    assert Backbone(**encoder["model"]["encoders"][0]).timm.endswith("dinov2.lvd142m")
    assert Perceptual(**encoder["perceptual"]) == Perceptual()
    assert Perceptual(**perceptual["perceptual"]).weights


def test_the_numbers_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "demo/results.json").read_text(encoding="utf-8"))
    assert with_results(README, results) == README
    assert f"**{results['runs'][0]['image_auroc']:.3f}**" in README


def test_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
