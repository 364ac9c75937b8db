"""qfae-bench as its user meets it: processes, rows, table, page, and what is refused or missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed import candidates, gpu
from benchmarks.speed.bench import Options, _able
from benchmarks.speed.candidates import CANDIDATES, KNOWN, candidates_on
from benchmarks.speed.cli import command, main, parse_options
from benchmarks.speed.page import latency_plot, write_page
from benchmarks.speed.readme import committed, with_results
from benchmarks.speed.revision import commit
from benchmarks.speed.rows import limit_of, missing_row, read
from benchmarks.speed.subject import Asked
from benchmarks.speed.table import named, notes, title_of
from qfae_export.cli import main as export
from qfae_runtime.errors import UsageError
from tests.commands import ROOT, run
from tests.export.tiny import checkpoint_file

from .conftest import of_kind


def test_a_row_says_what_was_measured(rows: list[dict[str, Any]]) -> None:
    engines = of_kind(rows, "engine")
    # The baseline joins whatever is asked for.
    names = {"torch-plain", "torch", "onnxruntime", "openvino", "openvino-int8"}
    assert {(row["candidate"], row["batch"]) for row in engines} == {(name, size) for name in names for size in (1, 4)}
    for row in engines:
        assert row["rounds"] == 2
        assert row["calls"] >= 6
        int8 = row["precision"] == "int8"
        assert (1e-4 if int8 else 0) < row["error"]["score_iqr"] < (0.5 if int8 else 1e-3)
        assert row["error"]["spearman"] > (0.95 if int8 else 0.999)
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        assert row["images_per_second"]["low"] < row["images_per_second"]["mean"] < row["images_per_second"]["high"]
        assert row["cold_start_s"] > row["load_s"] > 0
        assert row["first_call_s"] > 0
        assert row["host_peak_bytes"] > 50e6
        assert row["disk_bytes"] > 100_000
        assert row["version"]
        assert row["gflops"] == pytest.approx(
            row["images_per_second"]["mean"] * of_kind(rows, "conditions")[0]["gflop_per_image"]
        )
        assert row["contract"]["name"] == row["precision"]
        assert row["contract"]["kept"] == (row["contract"]["broken"] == [])
        assert row["contract"]["kept"] or int8
    plain = [row for row in engines if row["candidate"] == "torch-plain"]
    assert all(row["times_plain"] == {"mean": 1, "low": 1, "high": 1} for row in plain)


def test_conditions(rows: list[dict[str, Any]]) -> None:
    [row] = of_kind(rows, "conditions")
    assert row["model"] == "tiny.pt"
    assert row["threads"] == 1
    assert row["device"] == "cpu"
    assert row["batches"] == [1, 4]
    assert row["images_of_errors"] >= 32
    assert row["reference"] == "cpu"
    assert {"torch", "onnxruntime", "openvino", "numpy"} <= row["versions"].keys()
    assert row["hardware"]["processor"]
    assert row["complete"]
    assert row["candidates"] == ["torch-plain", "torch", "onnxruntime", "openvino", "openvino-int8"]
    assert (row["files"], row["longest"]) == (12, 20.0)
    int8 = row["int8"]
    assert int8["kept_fp32"] == ["decoder"]
    assert 0.1 < int8["share_of_flop"] < 1
    assert int8["calibrated_on"]["measured_on_too"] == 0, "the tiny checkpoint brings images of its own"
    assert row["commit"] == commit()
    assert row["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", row["commit"])


def test_ctrl_c_leaves_what_was_measured(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows[0]["rounds_done"] == 2
    rows[0] |= {"complete": False, "rounds_done": 1}

    def interrupted(options: Options, say: Any, keep: Any) -> Any:
        keep(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.speed.cli.bench", interrupted)
    with pytest.raises(SystemExit) as left:
        main(["--ckpt", "tiny.pt", "--out", str(tmp_path)])
    assert left.value.code == 130
    assert f"interrupted; what was measured is in {tmp_path / 'rows.jsonl'}" in capsys.readouterr().err
    assert read(tmp_path / "rows.jsonl") == rows
    assert "1 of 2 rounds" in title_of(rows[0])
    assert "incomplete: it was ended early" in title_of(rows[0])
    assert "incomplete" in (tmp_path / "bench.html").read_text(encoding="utf-8")


def test_an_engine_is_held_against_the_fastest_products_of_its_precision(rows: list[dict[str, Any]]) -> None:
    gemm = of_kind(rows, "gemm")
    fp32 = {"gemm-torch", "gemm-numpy", "gemm-onnxruntime", "gemm-openvino"}
    assert {row["candidate"] for row in gemm} == {*fp32, "gemm-openvino-int8"}
    for row in of_kind(rows, "engine"):
        limit = limit_of(KNOWN[row["candidate"]], gemm, of_kind(rows, "conditions")[0]["int8"])
        assert limit is not None
        assert row["share_of_gemm"] == pytest.approx(row["gflops"] / limit.gflops)
        assert (row["gemm_of"], row["gemm_batch"]) == (limit.title, 4)


def test_files_through_qfae_run(rows: list[dict[str, Any]]) -> None:
    without, with_maps = of_kind(rows, "end_to_end")
    assert (without["maps"], with_maps["maps"]) == (False, True)
    assert without["files"] == with_maps["files"] == 12
    for row in (without, with_maps):
        [engine] = [one for one in of_kind(rows, "engine") if (one["candidate"], one["batch"]) == (row["candidate"], 4)]
        assert row["error"] == engine["error"]
        assert row["contract"] == engine["contract"]
        assert row["contract"]["kept"]
        assert row["transfer_s"] is None, "on a processor nothing is moved"
        seconds = row["seconds"]
        for stage in ("decoding", "preprocessing", "engine", "writing"):
            assert seconds[f"scoring_{stage}"] > 0, stage
        assert row["share_of_engine"]["mean"] > 0
        assert row["images_per_second"]["mean"] == pytest.approx(12 / seconds["scoring"], rel=0.5)
        assert seconds["process"] > seconds["total"] > seconds["scoring"]
    assert with_maps["seconds"]["scoring_drawing"] > 0


def test_the_table(measured: Path) -> None:
    printed = (measured.parent / "printed.txt").read_text(encoding="utf-8")
    assert re.search(
        r"OpenVINO, FP32 +4 +[\d.]+ +[\d.]+ +[\d.]+ ± \S+ +[\d.]+ +\d+% +\d\.\de-\d\d +1\.0000 +kept", printed
    )
    assert re.search(r"OpenVINO, INT8 +4 ", printed)
    assert re.search(r"qfae-run, 12 files of 240 x 240 px, .* without heat maps: [\d.]+ ± ", printed)
    assert re.search(r"GFLOP/s of the FP32 products alone: \S.* \d+, \S.* \d+, \S.* \d+, \S.* \d+\n", printed)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_one_file_with_two_plots(measured: Path) -> None:
    parser = Tags()
    parser.feed((measured / "bench.html").read_text(encoding="utf-8"))
    names = [tag for tag, _ in parser.seen]
    assert names.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not [attrs for _, attrs in parser.seen if "href" in attrs or "src" in attrs]
    labels = [attrs["aria-label"] for tag, attrs in parser.seen if tag == "svg"]
    assert labels == ["latency against batch size", "throughput against score error"]
    # A line for every candidate through every batch size; a point for each in the second plot.
    lines = [str(attrs["points"]).split() for tag, attrs in parser.seen if tag == "polyline"]
    assert [len(line) for line in lines] == [2, 2, 2, 2, 2]
    assert names.count("circle") == 10 + 5


def test_labels_of_a_plot_never_lie_over_another(rows: list[dict[str, Any]]) -> None:
    alike = [
        {**of_kind(rows, "engine")[0], "title": f"candidate {number}", "candidate": str(number)} for number in range(20)
    ]
    plot = latency_plot(alike, {named(row): "#000" for row in alike})
    heights = sorted(line["label_y"] for line in plot["lines"])
    assert np.diff(heights).min() >= 14.9
    assert heights[-1] <= 371


def test_a_page_of_values_that_are_not_finite(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for row in of_kind(rows, "engine"):
        row["error"] = {"fault": "score: the engine has 3 values that are not finite"}
    write_page(rows, tmp_path / "page.html")
    assert "not finite" in (tmp_path / "page.html").read_text(encoding="utf-8")


# --- an engine alone ---


@pytest.mark.usefixtures("quick_export")
def test_an_exported_engine_as_it_is(tmp_path: Path) -> None:
    checkpoint_file(tmp_path / "tiny.pt")
    with pytest.raises(SystemExit) as left:
        export(["--ckpt", str(tmp_path / "tiny.pt")])
    assert left.value.code == 0
    stale = tmp_path / "bench/model/model.fp32.plan"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = run(
        "qfae-bench", "--engine", "tiny.onnx", "--against", "torch,openvino,openvino-int8", "--batches", "1",
        "--rounds", "1", "--seconds", "0.01", "--files", "6", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "bench/rows.jsonl")
    [row] = of_kind(rows, "engine")
    assert row["candidate"] == "openvino"
    assert [(one["candidate"], one["files"], one["maps"]) for one in of_kind(rows, "end_to_end")] == [
        ("openvino", 6, False),
        ("openvino", 6, True),
    ]
    assert row["error"]["score_iqr"] < 1e-3
    assert row["times_plain"] is None
    reasons = {row["candidate"]: row["reason"] for row in of_kind(rows, "missing")}
    lacks = dict.fromkeys(("torch-plain", "torch"), "PyTorch needs the checkpoint: pass --ckpt")
    assert reasons == {**lacks, "openvino-int8": "there is no int8 file of this engine"}
    assert "not measured: openvino-int8: there is no int8 file of this engine" in done.stdout
    assert of_kind(rows, "conditions")[0]["model"] == "tiny.onnx"
    assert not stale.exists(), "it was built of another engine"


# --- options and what is missing ---


def given(**changes: Any) -> dict[str, Any]:
    values = {one.name: one.default for one in command.params if one.name is not None}
    values |= {"device": "cpu", "out": "bench", "backbone_weights": (), "perceptual_weights": None}
    return {name: None if repr(value).startswith("Sentinel") else value for name, value in values.items()} | changes


def test_every_fault_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(
            ["x"],
            given(random_weights="0", batches="1,0", rounds="many", seconds="-1", against="torch,warp", device="cpu"),
        )
    assert caught.value.faults == [
        "'x': unexpected; everything is named by an option",
        "--random-weights: name the architecture with --preset or --config",
        f"--against: got 'warp'; accepted are {', '.join(one.name for one in candidates_on('cpu'))}",
        "--batches: got '0', expected a whole number in 1..4096",
        "--rounds: got 'many', expected a whole number in 1..1000",
        "--seconds: got '-1', expected seconds, more than 0",
    ]
    with pytest.raises(
        UsageError, match="nothing to measure: name --engine, --ckpt, or --preset with --random-weights"
    ):
        parse_options([], given())
    with pytest.raises(UsageError, match="--against: got 'tensorrt'; does not run on cpu"):
        parse_options([], given(ckpt="x.pt", against="tensorrt"))


def test_defaults() -> None:
    options = parse_options([], given(preset="brats", random_weights="0"))
    assert options.asked == Asked(config="brats", random_weights=0)
    assert options.plan.batches == (1, 2, 4, 8, 16, 32, 64)
    assert options.candidates == CANDIDATES, "what cannot run here is listed"
    assert Options(Asked(), Path("x"), ()).gemm_batch == 8


def gpu_options(*words: str) -> Options:
    """What `make bench-gpu ARGS="..."` measures, as click and the command understand it."""
    parsed = command.make_context("qfae-bench", gpu.arguments(words)).params
    return parse_options(parsed.pop("rest"), parsed)


def test_bench_gpu_measures_what_is_given_in_place_of_its_own(tmp_path: Path) -> None:
    assert gpu_options().asked == Asked(config="brats", random_weights=0)
    assert gpu_options().plan.batches == (1, 8, 32, 64)
    assert [one.name for one in gpu_options().candidates][:2] == ["torch-plain", "torch-fp16"]
    assert gpu_options().plan.longest_build == 240
    assert [one.name for one in gpu_options("--against", "torch-fp16").candidates] == ["torch-plain", "torch-fp16"]
    for words in (("--device", "cpu"), ("--device=cpu",)):
        assert gpu_options(*words).candidates == CANDIDATES, "on a processor, what can run is measured"
    assert gpu_options("--preset=demo", "--batches=1,2", "--files", "0").asked == Asked(config="demo", random_weights=0)
    assert gpu_options("--preset=demo", "--batches=1,2", "--files", "0").plan.batches == (1, 2)
    assert gpu_options("--device", "cpu", "--rounds=2", "--rounds", "9").plan.rounds == 9
    assert gpu_options("--device", "cpu").device == "cpu"
    file = tmp_path / "weights.pt"
    file.touch()
    twice = gpu_options("--backbone-weights", f"a={file}", f"--backbone-weights=b={file}")
    assert twice.asked.encoders == {"a": str(file), "b": str(file)}


def test_bench_gpu_leaves_out_its_own_model_for_another() -> None:
    assert gpu_options("--engine=x.onnx").asked == Asked(engine="x.onnx")
    assert gpu_options("--ckpt=my.pt").asked == Asked(ckpt="my.pt")
    assert gpu_options("--ckpt", "last.pth", "--preset", "liver").asked == Asked(ckpt="last.pth", config="liver")
    assert gpu_options("--config=my.toml").asked == Asked(config="my.toml", random_weights=0)
    assert gpu_options("--config", "my.toml", "--random-weights=3").asked == Asked(config="my.toml", random_weights=3)


def test_missing_packages_come_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "find_spec", lambda name: None)
    for candidate in CANDIDATES:
        reason = candidates.lacking(candidate, candidate.devices[0])
        assert reason is not None
        assert re.fullmatch(r"[a-z, ]+ not installed: pip install .+", reason)


@pytest.mark.parametrize(
    ("device", "names", "reason"),
    [
        (
            "cpu",
            "torch-fp16, torch-graph-fp16, torch-graph-fp16-streams, torch-compile-fp16, "
            "torch-compile-fp16-streams, aotinductor-fp16, onnxruntime-fp16, onnxruntime-tensorrt, tensorrt, "
            "tensorrt-fp16",
            "runs on cuda:0 alone: pass --device cuda:0 on a machine with an NVIDIA GPU",
        ),
        (
            "cuda:0",
            "onnxruntime-int8, openvino, openvino-bf16, openvino-int8",
            "runs on cpu alone: pass --device cpu",
        ),
    ],
)
def test_what_runs_on_another_device_alone_is_listed_in_one_sentence(device: str, names: str, reason: str) -> None:
    missing: list[dict[str, Any]] = []
    able = _able(CANDIDATES, lambda one: candidates.lacking(one, device), missing)
    assert set(able) <= set(candidates_on(device))
    assert len(able) + len(missing) == len(CANDIDATES), "nothing is passed over in silence"
    assert f"not measured: {names}: {reason}" in notes(missing)


def test_notes_name_each_reason_once() -> None:
    missing = [
        {**missing_row(KNOWN["torch"], "a batch would take about 40 s"), "batch": 8},
        missing_row(KNOWN["openvino"], "openvino not installed: pip install x"),
        {**missing_row(KNOWN["torch-plain"], "a batch would take about 40 s"), "batch": 4},
        missing_row(KNOWN["openvino-bf16"], "openvino not installed: pip install x"),
    ]
    assert notes(missing) == [
        "not measured: torch at batch 8, torch-plain at batch 4: a batch would take about 40 s",
        "not measured: openvino, openvino-bf16: openvino not installed: pip install x",
    ]


def test_a_compiler_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.candidates.shutil.which", lambda name: None)
    assert candidates.lacking(KNOWN["torch-compile"], "cpu") == (
        "no C++ compiler found, which torch needs for this: install g++"
    )
    assert candidates.lacking(KNOWN["torch"], "cpu") is None


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--ckpt", str(tmp_path / "no.pt"), "--out", str(tmp_path / "bench")])
    assert left.value.code == 1
    assert "CheckpointError: checkpoint" in capsys.readouterr().err


# --- what is committed ---


def test_the_readme_shows_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed(ROOT), "there are rows"
    assert with_results(text, committed(ROOT)) == text, "run: python -m benchmarks.speed.readme"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_rows_are_whole(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    [conditions] = of_kind(lines, "conditions")
    machine = title_of(conditions).partition(" on ")[2].partition(",")[0]
    assert all(word.lower() in path.stem for word in machine.split()[:2]), "the hardware stands in the name"
    for row in of_kind(lines, "engine"):
        assert row["error"] is not None, "no speed without the score error"
        assert math.isfinite(row["images_per_second"]["mean"])
