"""inputs.jsonl: which files are others than before, where a run cannot be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from qfae_runtime.errors import OutputError
from qfae_runtime.inputs import Inputs

from .test_cli import qfae_run
from .test_run import run, table

HOSTILE = 'a,"b"\n<i>.png'


def refusal(images: Path, engine_path: Path, out: Path) -> list[str]:
    """Return what is said to have changed."""
    with pytest.raises(OutputError) as caught:
        run(images, engine_path, out, maps=False, resume=True)
    head, *lines, _ = str(caught.value).splitlines()
    assert head == f"{out}: cannot be resumed, this is another run than the one in it:"
    return [line.removeprefix("  ") for line in lines]


def test_the_list_holds_every_file_as_it_was(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    shutil.copy(dataset / "good" / "img" / "0.png", dataset / "good" / "img" / HOSTILE)
    run(dataset, engine_path, tmp_path / "out", maps=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "inputs.jsonl").read_text("ascii").splitlines()]
    assert [line["source"] for line in lines] == [row["source"] for row in table(tmp_path / "out")]
    assert f"good/img/{HOSTILE}" in {line["source"] for line in lines}
    for line in lines:
        status = (dataset / line["source"]).stat()
        assert (line["state"], line["sha256"]) == (f"{status.st_size} {status.st_mtime_ns}", None)


def test_each_kind_of_change_is_told_with_names_and_numbers(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out, good, ungood = tmp_path / "out", dataset / "good" / "img", dataset / "Ungood" / "img"
    run(dataset, engine_path, out, maps=False)
    rows = (out / "scores.jsonl").read_bytes()
    for number in range(5):
        shutil.copy(good / "0.png", good / f"new{number}.png")
    shutil.copy(good / "0.png", good / HOSTILE)
    (good / "1.png").unlink()
    (good / "2.png").unlink()
    for number in range(3):
        os.utime(ungood / f"{number}.png", ns=(0, 1))
    (ungood / "3.png").write_bytes(b"")
    assert refusal(dataset, engine_path, out) == [
        f"inputs: 6 new: {f'good/img/{HOSTILE}'!r}, 'good/img/new0.png', 'good/img/new1.png' and 3 more",
        "inputs: 2 missing: 'good/img/1.png', 'good/img/2.png'",
        "inputs: 4 with another size or time of change: "
        "'Ungood/img/0.png', 'Ungood/img/1.png', 'Ungood/img/2.png' and 1 more",
    ]
    assert (out / "scores.jsonl").read_bytes() == rows


def test_hashes_are_compared_where_both_runs_have_them(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out, maps=False, hash_inputs=True)
    [line] = refusal(dataset, engine_path, out)
    assert line.startswith("inputs_content_sha256: was '")
    assert line.endswith("', now None")


@pytest.mark.parametrize("damage", ["missing", "no JSON", "no object", "no state"])
def test_a_damaged_list_is_told(dataset: Path, engine_path: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out, maps=False)
    listed = out / "inputs.jsonl"
    if damage == "missing":
        listed.unlink()
    else:
        listed.write_text({"no JSON": "{", "no object": "[1]\n", "no state": '{"source": "a"}\n'}[damage])
    (dataset / "good" / "img" / "0.png").unlink()
    assert refusal(dataset, engine_path, out) == [
        "inputs: other files than before; inputs.jsonl is missing or damaged, so it is not known which"
    ]


def test_the_list_is_written_once_and_again_where_it_is_gone(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dataset, engine_path, out, maps=False)
    written, status = (out / "inputs.jsonl").read_bytes(), (out / "inputs.jsonl").stat()
    (out / "report.html").unlink()
    run(dataset, engine_path, out, maps=False, resume=True)
    assert (out / "inputs.jsonl").stat().st_mtime_ns == status.st_mtime_ns
    (out / "inputs.jsonl").unlink()
    (out / "report.html").unlink()
    run(dataset, engine_path, out, maps=False, resume=True)
    assert (out / "inputs.jsonl").read_bytes() == written


def test_a_run_that_never_had_a_row_may_have_other_files(dataset: Path, engine_path: Path, tmp_path: Path) -> None:
    """Nothing is lost by it; its list and its record are then those of the new files."""
    out = tmp_path / "out"
    run(dataset, engine_path, out, maps=False)
    for name in ("scores.jsonl", "scores.csv", "report.html"):
        (out / name).unlink()
    (dataset / "good" / "img" / "0.png").unlink()
    assert qfae_run(dataset, "--engine", engine_path, "--out", out, "--no-maps", "--resume").exit_code == 0
    assert len((out / "inputs.jsonl").read_text().splitlines()) == len(table(out)) == 11
    assert len(json.loads((out / "run.json").read_text())["parts"]) == 1


def test_the_record_stays_small_and_the_list_is_not_held(tmp_path: Path) -> None:
    """Of 100,000 files: digests in run.json, the list written line by line."""
    number = 100_000
    sources = [f"patient{one // 100:04}/slice-{one:06}.png" for one in range(number)]
    states = ["48213 1764009600000000000"] * number
    inputs = Inputs(sources, states, None)
    tracemalloc.start()
    try:
        assert len(json.dumps(inputs.fingerprint())) < 400
        with (tmp_path / "inputs.jsonl").open("w") as file:
            file.writelines(inputs.lines())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "inputs.jsonl").stat().st_size < 130 * number
    later = Inputs(sources[1:], [*states[2:], "none"], None)
    assert later.changes(tmp_path / "inputs.jsonl") == [
        "inputs: 1 missing: 'patient0000/slice-000000.png'",
        "inputs: 1 with another size or time of change: 'patient0999/slice-099999.png'",
    ]
