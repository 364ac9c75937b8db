"""What is said of a measurement: tables with PyTorch FP32's own column, links, and sentences that accuse nobody."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qfae_export.images import ParityImages
from qfae_export.parity import measure
from qfae_export.parity_report import ROUNDED, ParityError, ParityReport, accepted, certificate_of, link
from qfae_export.wide import print_wide
from qfae_runtime.agreement import Agreement, Reference
from qfae_runtime.certificate import read_certificate
from qfae_runtime.checked import Fields
from qfae_runtime.contract import CONTRACTS, demanded
from qfae_runtime.engines.base import Scores
from qfae_runtime.errors import ManifestError
from tests.export.echo import COUNT, OWN, Echo, Fault, made_up, made_up_images, spoil

BY = 50 * OWN


@pytest.fixture
def images() -> ParityImages:
    return made_up_images()


@pytest.fixture
def reference() -> Reference:
    return made_up()


def right(answer: Scores, numbers: list[int]) -> None:
    """No fault."""


def pytorch_of(reference: Reference, factor: float = 1.0) -> Agreement:
    """PyTorch FP32, off by its own error everywhere."""
    by = np.float32(factor * OWN)
    scores = reference.scores
    return reference.compare(scores._replace(score=scores.score + by, anomaly_map=scores.anomaly_map + by))


def report_of(
    images: ParityImages, reference: Reference, fault: Fault, precision: str = "fp32", pytorch: Agreement | None = None
) -> ParityReport:
    return measure(Echo(images, reference.scores, fault), images, reference, CONTRACTS[precision], pytorch)


def shown(report: ParityReport) -> str:
    text = StringIO()
    print_wide(Console(width=60, file=text), report.table())
    return text.getvalue()


def rows_of(report: ParityReport) -> dict[str, list[str]]:
    """The cells of the table by the words of their rows."""
    table = report.table()
    columns = [list(column.cells) for column in table.columns]
    return {str(columns[0][row]): [str(column[row]) for column in columns[1:]] for row in range(table.row_count)}


def test_the_table_shows_pytorchs_own_error_beside_the_engines(images: ParityImages, reference: Reference) -> None:
    pytorch = pytorch_of(reference)
    report = report_of(images, reference, spoil("score", 1, (), lambda value: value + 5 * OWN), pytorch=pytorch)
    table = report.table()
    assert [str(column.header) for column in table.columns] == [
        "measured",
        "PyTorch FP32",
        "all images",
        "batch 1",
        "batch 3 to 10, worst",
        "bound",
    ]
    rows = rows_of(report)
    assert rows["score error, worst image / PyTorch's own"] == [
        "1.00", "5.00", "0.00", "5.00", f"≤ {CONTRACTS['fp32'].bounds['score_worst']:g}"
    ]  # fmt: skip
    assert rows["map error, typical / PyTorch's own"][0] == "1.00"
    assert rows["score error, largest"][:2] == ["1.0e-05", "5.0e-05"]
    assert rows["score error, largest"][-1] == "", "shown beside the bounds, not bounded itself"
    assert rows["score ranks, Spearman"][2:4] == ["–", "–"], "few images say nothing of ranks"


def test_without_pytorch_the_table_has_no_such_column(images: ParityImages, reference: Reference) -> None:
    assert "PyTorch FP32" not in [str(one.header) for one in report_of(images, reference, right).table().columns]


def test_the_table_shows_errors_bounds_and_faults(images: ParityImages, reference: Reference) -> None:
    text = shown(report_of(images, reference, spoil("score", 1, (), lambda value: value + BY)))
    for part in ("on 10 images, contract fp32", "score error, worst image", "batch 3", "50.00", "≤ "):
        assert part in text, part
    text = shown(report_of(images, reference, spoil("score", 1, (), lambda value: float("nan"))))
    assert "none" in text
    with_stress = made_up_images().with_stress()
    assert "on 10 images and 14 stress images, contract fp32" in shown(
        report_of(with_stress, made_up(with_stress), right)
    )


def test_what_is_beyond_its_bound_is_red_and_nothing_else(images: ParityImages, reference: Reference) -> None:
    rows = rows_of(report_of(images, reference, spoil("score", 1, (), lambda value: value + BY)))
    red = {title for title, cells in rows.items() if any("[red]" in cell for cell in cells)}
    assert red == {"score error, worst image / PyTorch's own"}


def test_the_least_bound_that_would_have_passed(images: ParityImages, reference: Reference) -> None:
    report = report_of(images, reference, spoil("score", 4, (), lambda value: value + BY))
    assert report.worst.values["score_worst"] == pytest.approx(50, rel=1e-2)
    enough = {name: report.worst.values[name] or 0.0 for name in ("score_worst", "score_abs")}
    assert replace(report.contract, bounds=enough).holds(report.worst.values)


# --- links ---


def test_links_name_the_first_step_beyond_its_bounds(images: ParityImages, reference: Reference) -> None:
    scores, labels = reference.scores, images.labels
    good = link("PyTorch FP32", "graph FP32", reference, scores, "fp32", labels, COUNT)
    spoilt = scores._replace(score=scores.score + np.float32(0.01))
    bad = link("graph FP32", "ONNX FP32", reference, spoilt, "fp32", labels, COUNT)
    lost = link("ONNX FP32", "ONNX FP16", reference, scores.of([0, 1]), "fp16", labels, COUNT)
    assert (good.passed, bad.passed, lost.passed) == (True, False, False)
    report = replace(report_of(images, reference, right), links=(good, bad, lost))
    assert report.guilty() == "graph FP32 -> ONNX FP32"
    text = StringIO()
    Console(width=120, file=text).print(report.chain())
    assert "graph FP32 → ONNX FP32" in text.getvalue()
    lines = [line for line in text.getvalue().splitlines() if "→" in line]
    assert [line.split()[line.split().index("→") + 3] for line in lines] == [str(COUNT)] * 3
    assert "–" in lines[2], "nothing of the lost rows is a number"


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (4.0, True), (8.0, False)])
def test_a_step_is_measured_by_the_same_yardstick(
    images: ParityImages, reference: Reference, factor: float, passed: bool
) -> None:
    by = np.float32(factor * OWN)
    scores = reference.scores
    step = link(
        "graph FP32", "ONNX FP32", reference, scores._replace(score=scores.score + by), "fp32", images.labels, COUNT
    )
    assert step.measured["score_typical"] == pytest.approx(factor, rel=0.02)
    assert step.passed is passed


def test_a_step_of_few_images_is_not_judged_by_what_few_say_little_about(
    images: ParityImages, reference: Reference
) -> None:
    few = [0, 3, 4]
    part = reference.of(few)
    off = part.scores._replace(score=part.scores.score + np.float32(8 * OWN))
    labels = [images.labels[number] for number in few]
    assert not link("a", "b", part, off, "fp32", labels, 3).passed
    assert link("a", "b", part, off, "fp32", labels, COUNT).passed
    worse = part.scores._replace(score=part.scores.score + np.float32(BY))
    assert not link("a", "b", part, worse, "fp32", labels, COUNT).passed


def test_a_step_is_not_blamed_for_a_bound_that_pytorch_breaks_itself(
    images: ParityImages, reference: Reference
) -> None:
    scores = reference.scores
    moved = scores._replace(reconstruction=scores.reconstruction.copy())
    moved.reconstruction[2, 1, 1, 2] ^= 2
    worse = moved._replace(score=scores.score + np.float32(BY))
    levels = reference.compare(moved, images.labels)  # PyTorch FP32, two levels off itself
    blamed, excused, still = (
        link("graph FP32", "ONNX FP32", reference, got, "fp32", images.labels, COUNT, pytorch)
        for got, pytorch in ((moved, pytorch_of(reference)), (moved, levels), (worse, levels))
    )
    assert (blamed.passed, excused.passed, still.passed) == (False, True, False)
    assert replace(report_of(images, reference, right), links=(excused, still)).guilty() == "graph FP32 -> ONNX FP32"
    assert replace(report_of(images, reference, right), links=(excused,)).guilty() is None
    assert [excused.keeps(one) for one in (None, pytorch_of(reference).values, levels.values)] == [False, False, True]


def test_what_rounding_breaks_is_told_without_what_pytorch_breaks(images: ParityImages, reference: Reference) -> None:
    scores = reference.scores
    off = scores._replace(reconstruction=scores.reconstruction ^ np.uint8(8), score=scores.score * 2)
    pytorch = reference.compare(scores._replace(reconstruction=scores.reconstruction ^ np.uint8(4)), images.labels)
    broken = link("graph FP32", ROUNDED, reference, off, "fp16", images.labels, COUNT, pytorch)
    report = replace(report_of(images, reference, right, "fp16"), links=(broken,))
    [text] = report.failures()
    assert "reconstruction, p99.9 grey levels" in text
    assert "score error as distance" in text
    [text] = replace(report, pytorch=pytorch).failures()
    assert "reconstruction" not in text
    assert "score error as distance" in text


# --- refusing ---


def test_what_is_refused_is_said_with_the_step_and_a_cure(images: ParityImages, reference: Reference) -> None:
    report = report_of(images, reference, spoil("score", 4, (), lambda value: value + BY))
    scores = reference.scores
    spoilt = scores._replace(score=scores.score + np.float32(BY))
    bad = link("graph FP32", "ONNX FP32", reference, spoilt, "fp32", images.labels, COUNT)
    with pytest.raises(ParityError) as refused:
        accepted(replace(report, links=(bad,)), "tiny.onnx", "onnxruntime")
    lines = str(refused.value).splitlines()
    assert lines[0] == "tiny.onnx: onnxruntime does not compute what PyTorch FP64 computes, so nothing was written:"
    assert lines[1].startswith("  all images: score error, worst image / PyTorch's own: 50 exceeds ")
    assert lines[-2] == "the first step that is beyond its bounds: graph FP32 -> ONNX FP32"
    assert lines[-1].startswith("PyTorch FP32 keeps these bounds where it was compared with FP64, and this engine ")
    assert refused.value.report.links == (bad,)


def test_no_step_within_its_bounds_is_blamed(images: ParityImages, reference: Reference) -> None:
    """An engine may add up to more than its bounds by steps of which each keeps them."""
    scores = reference.scores
    good = link("graph FP32", "ONNX FP32", reference, scores, "fp32", images.labels, COUNT)
    report = replace(report_of(images, reference, spoil("score", 4, (), lambda value: value + BY)), links=(good,))
    assert report.guilty() is None
    with pytest.raises(ParityError) as refused:
        accepted(report, "tiny.onnx", "onnxruntime")
    text = str(refused.value)
    assert "step" not in text
    assert "ONNX FP32" not in text
    assert "fault" not in text


def test_what_keeps_its_bounds_is_accepted(images: ParityImages, reference: Reference) -> None:
    report = report_of(images, reference, right, pytorch=pytorch_of(reference))
    assert accepted(report, "tiny.onnx", "onnxruntime") is report


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_cure_is_that_of_the_precision(images: ParityImages, reference: Reference, precision: str) -> None:
    report = report_of(images, reference, spoil("score", 4, (), lambda value: 1.9), precision)
    cures = {"fp32": "PyTorch FP32 keeps", "fp16": "FP16 rounds more", "int8": "INT8 rounds more"}
    with pytest.raises(ParityError) as refused:
        accepted(report, "tiny.onnx", "onnxruntime")
    assert str(refused.value).splitlines()[-1].startswith(cures[precision])
    with pytest.raises(ParityError, match="the ONNX file it was built from keeps its contract"):
        accepted(report, "tiny.plan", "tensorrt")


def test_rounding_that_the_engine_hides_is_refused(images: ParityImages, reference: Reference) -> None:
    scores = reference.scores
    off = link("graph FP32", ROUNDED, reference, scores._replace(score=scores.score * 2), "fp16", images.labels, COUNT)
    report = report_of(images, reference, right, "fp16")
    assert report
    broken = replace(report, links=(off,))
    assert not broken
    [text] = broken.failures()
    assert text.startswith(
        "graph FP16: rounded as FP16 rounds, the graph breaks the contract: score error as distance,"
    )


# --- what these images cannot show ---


def many(count: int, anomalous: int) -> ParityImages:
    labels = tuple(number < anomalous for number in range(count))
    return replace(made_up_images(count), labels=labels)


@pytest.mark.parametrize(
    ("precision", "count", "anomalous", "untold"),
    [
        ("fp32", 10, 5, []),
        ("fp16", 10, 5, ["flipped", "AUROC"]),
        ("fp16", 50, 25, ["AUROC"]),
        ("fp16", 200, 100, []),
        ("int8", 19, 9, ["flipped", "AUROC"]),
        ("int8", 20, 10, ["AUROC"]),
        ("int8", 116, 58, []),
        ("int8", 116, 0, ["AUROC"]),
        ("bf16", 49, 20, ["flipped", "AUROC"]),
    ],
)
def test_bounds_that_so_few_images_cannot_show_are_told(
    precision: str, count: int, anomalous: int, untold: list[str]
) -> None:
    images = many(count, anomalous)
    reference = made_up(images)
    contract = demanded(precision, images.labels)
    report = measure(Echo(images, reference.scores, right), images, reference, contract)
    said = report.untold()
    assert len(said) == len(untold), said
    for text, word in zip(said, untold, strict=True):
        assert text.startswith(f"{precision.upper()}'s ")
        assert word in text
        assert "pass --parity-images DIR" in text
    bounded = {"flips_share", "auroc_change"} & set(contract.bounds)
    assert len(bounded) == (0 if precision == "fp32" else 2) - len(untold)


def test_how_many_images_would_do_is_told_truly() -> None:
    """With as many as the sentence asks for, nothing is left to tell."""
    for precision, flips, least, auroc in (("fp16", 50, "10,000", 200), ("int8", 20, "3,334", 116)):
        images = many(10, 5)
        report = report_of(images, made_up(images), right, precision)
        said = report.untold()
        assert f"these are 10 images, expected {flips} or more" in said[0]
        assert f"--parity-count {flips} or more" in said[0]
        assert f"these images make 25 pairs of a normal and an anomalous one, expected {least} or more" in said[1]
        assert f"--parity-count {auroc} or more, half of them of each kind" in said[1]
        enough = many(auroc, auroc // 2)
        contract = demanded(precision, enough.labels)
        assert {"flips_share", "auroc_change"} <= set(contract.bounds)


def test_bounds_that_pytorch_breaks_itself_are_told(images: ParityImages, reference: Reference) -> None:
    fault = spoil("reconstruction", 2, (1, 1, 2), lambda value: value + 2)
    pytorch = reference.compare(Echo(images, reference.scores, fault).run(images.pixels), images.labels)
    report = report_of(images, reference, fault, pytorch=pytorch)
    assert report
    assert report.untold() == [
        "PyTorch FP32 itself breaks these bounds on these images, so they are left out: reconstruction, grey levels"
    ]
    assert report_of(images, reference, right, pytorch=pytorch_of(reference)).untold() == []


def test_a_bound_that_pytorch_breaks_is_not_said_to_lack_images() -> None:
    images = many(60, 30)
    reference = made_up(images)
    scores = reference.scores
    flipped = scores._replace(score=scores.score[::-1].copy())
    contract = demanded("fp16", images.labels)
    pytorch = reference.compare(flipped, images.labels)
    report = measure(Echo(images, scores, right), images, reference, contract, pytorch)
    assert "flips_share" not in report.contract.bounds
    said = report.untold()
    assert not [text for text in said if "flipped decisions are not bounded" in text]
    assert "decisions flipped / images" in said[-1]


# --- certificates ---


def test_a_step_that_was_excused_is_read_again_and_one_that_was_not_is_refused(
    images: ParityImages, reference: Reference, tmp_path: Path
) -> None:
    scores = reference.scores
    moved = scores._replace(reconstruction=scores.reconstruction.copy())
    moved.reconstruction[2, 1, 1, 2] ^= 2
    pytorch = reference.compare(moved, images.labels)
    excused = link("graph FP32", "ONNX FP32", reference, moved, "fp32", images.labels, COUNT, pytorch)
    engine = Echo(images, scores, right)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"weights")
    report = replace(report_of(images, reference, right, pytorch=pytorch), links=(excused,))
    stored = json.loads(json.dumps(replace(certificate_of(path, engine, report), images=32).to_dict()))
    [read] = read_certificate(Fields({"certificate": [stored]}, "tiny.json"), "tiny.json")
    assert read.links == (excused,)
    stored["pytorch"] = pytorch_of(reference).values
    stored["contract"]["bounds"] = dict(CONTRACTS["fp32"].bounds)
    with pytest.raises(ManifestError, match=r"links\.0\.passed.*since a measured quantity breaks its bound"):
        read_certificate(Fields({"certificate": [stored]}, "tiny.json"), "tiny.json")


def test_a_certificate_holds_what_pytorch_itself_was_off_by(images: ParityImages, tmp_path: Path) -> None:
    with_stress = images.with_stress()
    reference = made_up(with_stress)
    pytorch = pytorch_of(reference)
    engine = Echo(with_stress, reference.scores, right)
    report = measure(engine, with_stress, reference, CONTRACTS["fp32"], pytorch)
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"weights")
    entry = certificate_of(path, engine, report)
    assert entry.passed
    assert (entry.images, entry.stress_images, entry.batches) == (COUNT, 14, (1, 3, COUNT))
    assert entry.pytorch == pytorch.values
    assert entry.measured == report.worst.values
    assert entry.reference == "PyTorch FP64"
    assert certificate_of(path, engine, replace(report, pytorch=None)).pytorch is None
