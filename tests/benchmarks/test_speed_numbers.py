"""The numbers of qfae-bench: what is computed from seconds, and the arithmetic that is timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks.speed import gemm
from benchmarks.speed.candidates import CANDIDATES, GEMMS, KNOWN, Candidate
from benchmarks.speed.gemm import Gemm, Product
from benchmarks.speed.plain import PlainScorer
from benchmarks.speed.rounds import Measured, Plan, measure
from benchmarks.speed.rows import contract_kept, failed_rows, instructions, left_out_rows, limit_of
from benchmarks.speed.statistics import Interval, Visit, latency, speed_up, throughput
from benchmarks.speed.torch_engine import compiled, eager, for_torch, package, packaged
from benchmarks.speed.workers import WorkerError, Workers
from qfae_export.graph import InferenceGraph
from qfae_export.layers import Unit
from qfae_export.precision import FP16
from qfae_runtime.agreement import Agreement
from qfae_runtime.contract import CONTRACTS, owed
from qfae_runtime.quantities import QUANTITIES
from qfae_train.checkpoint import build_scorer, load
from tests.export.tiny import SIZE, checkpoint_file, config_of, pictures, scorer_of, vit

# --- what is computed from seconds ---


def test_an_interval_is_students() -> None:
    """1, 2, 3, 4: mean 2.5, standard error 0.645, and 3.182 times that."""
    interval = Interval.over([1.0, 2.0, 3.0, 4.0])
    assert (interval.low, interval.mean, interval.high) == pytest.approx((0.4457, 2.5, 4.5543), abs=1e-4)
    assert Interval.over([2.0]) == Interval(2.0, None, None)


def test_rates_are_over_rounds_and_percentiles_over_calls() -> None:
    visits = [Visit("x", 4, 0, (1.0, 1.0)), Visit("x", 4, 1, (2.0, 2.0, 2.0, 6.0))]
    assert throughput(visits).mean == pytest.approx((4 / 1 + 4 * 4 / 12) / 2)
    assert latency(visits) == pytest.approx({"p50": 2000, "p90": 4000, "p99": 5800})


def test_what_slows_the_machine_slows_both() -> None:
    """The machine's speed halves from round to round; a candidate of 1.5 times the baseline's rate stays one."""
    slow = [Visit("plain", 1, number, (2.0**number,) * 3) for number in range(4)]
    fast = [Visit("fast", 1, number, (2.0**number / 1.5,) * 3) for number in range(4)]
    ratio = speed_up(fast, slow)
    assert ratio is not None
    assert (ratio.low, ratio.mean, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert throughput(fast).low is not None
    assert cast(float, throughput(fast).low) < 0, "taken by themselves, the rates say nothing"
    assert speed_up(fast, []) is None


# --- rounds ---


@dataclass
class Script:
    """Processes that take as long as they are told and remember who was asked; stands for Workers."""

    rates: dict[str, float]
    fails: set[tuple[str, int]] = field(default_factory=set)
    asked: list[tuple[str, int, bool]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    batch: int = 4
    known: set[tuple[str, int]] = field(default_factory=set)

    def of(self, candidate: Candidate) -> Script:
        self.now = candidate.name
        return self

    def settled(self, candidate: Candidate, batch: int) -> bool:
        known = (candidate.name, batch) in self.known
        self.known.add((candidate.name, batch))
        return known

    def ask(self, do: str, batch: int, seconds: float, calls: int, settle: bool) -> dict[str, Any]:
        self.asked.append((self.now, batch, settle))
        if (self.now, batch) in self.fails:
            raise WorkerError("out of memory")
        each = batch / self.rates[self.now]
        return {"seconds": [each] * calls, "first": 9.0 + len(self.asked)}

    def note_memory(self, candidate: Candidate) -> None: ...

    def end(self, name: str) -> None:
        self.ended.append(name)


def run(script: Script, plan: Plan, *names: str) -> Measured:
    return measure(plan, [KNOWN[name] for name in names], cast(Workers, script))


def test_candidates_take_turns_and_begin_in_turn() -> None:
    script = Script({"torch": 100.0, "openvino": 100.0, "onnxruntime": 100.0})
    run(script, Plan(batches=(1, 2), rounds=2), "torch", "openvino", "onnxruntime")
    first, second = ["torch", "openvino", "onnxruntime"], ["openvino", "onnxruntime", "torch"]
    assert [(name, batch) for name, batch, _ in script.asked] == [
        *((name, batch) for batch in (1, 2) for name in first),
        *((name, batch) for batch in (1, 2) for name in second),
    ]


def test_first_calls_are_apart_and_quick_visits_settle() -> None:
    script = Script({"torch": 100.0, "openvino": 0.5})
    measured = run(script, Plan(batches=(1,), rounds=2), "torch", "openvino")
    assert measured.first_calls == {("torch", 1): 10.0, ("openvino", 1): 11.0}, "those of the first round"
    assert [settle for name, _, settle in script.asked if name == "torch"] == [True, True]
    assert [settle for name, _, settle in script.asked if name == "openvino"] == [True, False]  # two seconds each


def test_batches_that_would_take_too_long_are_left_out_with_a_reason() -> None:
    script = Script({"torch": 1.0, "openvino": 100.0})
    measured = run(script, Plan(batches=(1, 8, 64), rounds=1, longest=10), "torch", "openvino")
    assert measured.left_out == {("torch", 64): "a batch would take about 64 s"}
    assert [(name, batch) for name, batch, _ in script.asked if batch == 64] == [("openvino", 64)]


def test_a_candidate_that_fails_is_started_again_for_other_sizes() -> None:
    script = Script({"torch": 1.0, "openvino": 1.0}, fails={("torch", 2)})
    measured = run(script, Plan(batches=(1, 2), rounds=2), "torch", "openvino")
    assert measured.failed == {("torch", 2): "failed in round 1: out of memory"}
    assert script.ended == ["torch"], "at batch 2, once"
    assert [len(measured.of(name, size)) for name in ("torch", "openvino") for size in (1, 2)] == [2, 0, 2, 2]


def test_what_was_begun_is_measured_in_every_round() -> None:
    """Where a batch takes about as long as is allowed, noise must not end it after a round; products never are."""
    script = Script({"torch": 1.0, "gemm-torch": 0.01})
    plan = Plan(batches=(4,), rounds=3, longest=5)
    script.rates["torch"] = 0.9
    measured = run(script, plan, "torch", "gemm-torch")
    assert [len(measured.of(name, 4)) for name in ("torch", "gemm-torch")] == [3, 3]
    assert measured.left_out == {}


def test_what_is_measured_can_be_kept_after_every_size_of_every_round() -> None:
    found: list[tuple[int, int]] = []
    script = Script({"torch": 1.0})
    plan = Plan(batches=(1, 2), rounds=3)

    def keep(measured: Measured) -> None:
        found.append((len(measured.visits), measured.rounds))

    measure(plan, [KNOWN["torch"]], cast(Workers, script), keep=keep)
    assert found == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)], "a round is complete with its last size"


def test_what_failed_or_takes_too_long_is_listed_with_its_batch_size() -> None:
    script = Script({"torch": 0.1, "gemm-numpy": 1.0}, fails={("gemm-numpy", 4)})
    measured = run(script, Plan(batches=(1, 4), rounds=2, longest=10), "torch", "gemm-numpy")
    assert measured.rounds == 2
    [failed], [left_out] = failed_rows(measured), left_out_rows(measured)
    assert (failed["title"], failed["batch"], failed["reason"]) == ("numpy", 4, "failed in round 1: out of memory")
    assert (left_out["title"], left_out["batch"]) == ("PyTorch, trimmed", 4)
    assert left_out["reason"] == "a batch would take about 40 s"


def test_products_are_measured_at_their_own_batch_alone() -> None:
    script = Script({"gemm-torch": 1.0, "torch": 1.0})
    run(script, Plan(batches=(1, 4, 8), rounds=1), "torch", "gemm-torch")
    assert [batch for name, batch, _ in script.asked if name == "gemm-torch"] == [4]


# --- contracts ---

GOOD: dict[str, float | None] = {
    name: 1.0 if quantity.larger_is_better else 0.0 for name, quantity in QUANTITIES.items()
}


def contract(name: str, labels: list[bool | None], images: int = 32, **values: float) -> Any:
    agreement = Agreement(images, None, {**GOOD, **values}, {})
    return contract_kept(KNOWN[name], agreement, labels)


def test_every_candidate_owes_the_contract_of_its_arithmetic() -> None:
    files = {"onnx": "fp32", "fp16": "fp16", "int8": "int8", "plan": "fp32", "plan-fp16": "fp16"}
    for candidate in CANDIDATES:
        name = contract(candidate.name, [])["name"]
        assert name == candidate.precision
        if candidate.model in files:
            assert name == owed(files[candidate.model], candidate.backend)


def test_a_contract_is_kept_or_says_which_bounds_are_broken() -> None:
    """By every bound of the precision: what BF16 may differ by, FP32 may not."""
    kept = {"name": "bf16", "kept": True, "broken": [], "not_bounded": ["auroc_change"]}
    assert contract("torch-bf16", [], score_worst=900, map_pixel=900) == kept
    broken = {"name": "fp32", "kept": False, "broken": ["score_worst", "map_pixel"], "not_bounded": []}
    assert contract("torch", [], score_worst=900, map_pixel=900) == broken
    assert contract("torch-fp16", [], score_distance=0.02, spearman=0.9)["broken"] == ["score_distance", "spearman"]
    fault = contract_kept(KNOWN["openvino"], Agreement(32, None, {}, {}, "score: not finite"), [])
    assert fault["broken"] == list(CONTRACTS["fp32"].bounds), "nothing is known to hold"


def test_few_images_say_nothing_of_ranks() -> None:
    few = contract("torch-bf16", [], images=31, spearman=0.5)
    assert few == {"name": "bf16", "kept": True, "broken": [], "not_bounded": ["auroc_change"]}
    lone = contract("torch-bf16", [], images=31, spearman=0.5, score_distance_max=1.0)
    assert lone["broken"] == ["score_distance_max"]
    assert contract("torch-bf16", [], images=32, spearman=0.5)["broken"] == ["spearman"]


def test_int8_owes_the_auroc_where_labels_tell_it() -> None:
    labels: list[bool | None] = [True, False] * 60
    assert contract("openvino-int8", labels, images=120, auroc_change=0.01)["broken"] == ["auroc_change"]
    unknown = contract("openvino-int8", [None] * 120, images=120, auroc_change=0.01)
    assert (unknown["kept"], unknown["not_bounded"]) == (True, ["auroc_change"])
    assert contract("openvino-int8", labels, images=120)["not_bounded"] == []


# --- how far from the limit ---


def test_an_int8_file_is_held_against_products_of_both_its_precisions() -> None:
    gemm = [
        {"kind": "gemm", "title": title, "precision": precision, "gflops": gflops, "batch": 4}
        for title, precision, gflops in (
            ("numpy", "fp32", 100.0), ("OpenVINO", "fp32", 200.0), ("OpenVINO", "int8", 800.0)
        )
    ]  # fmt: skip
    int8 = {"share_of_flop": 0.75}
    # Of 16 GFLOP, 12 take 12 / 800 s and 4 take 4 / 200 s.
    limit = limit_of(KNOWN["openvino-int8"], gemm, int8)
    assert limit is not None
    assert limit.gflops == pytest.approx(16 / (12 / 800 + 4 / 200))
    assert limit[1:] == ("75% OpenVINO INT8, else OpenVINO FP32", 4)
    assert limit_of(KNOWN["torch"], gemm, int8) == (200.0, "OpenVINO", 4)
    assert limit_of(KNOWN["openvino-bf16"], gemm, int8) is None
    assert limit_of(KNOWN["openvino-int8"], gemm[2:], int8) is None, "FP32 products were not measured"


def test_instructions_that_matter_are_named(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: x\nflags\t\t: fpu avx512_bf16 avx2 sse avx512_vnni\n", encoding="utf-8")
    assert instructions(file) == ["avx2", "avx512_vnni", "avx512_bf16"]
    assert instructions(tmp_path / "none") == []


# --- matrix products ---

PRODUCTS = [Product(6, 32, 16, 3, True), Product(5, 16, 48, 2, True), Product(7, 7, 7, 100, False)]


def test_products_of_stored_weights_count_as_often_as_the_model_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Product] = []
    ticks = iter(range(100))
    monkeypatch.setattr("benchmarks.speed.gemm.time.perf_counter", lambda: float(next(ticks)))
    products = Gemm(PRODUCTS, lambda product: lambda: ran.append(product))
    assert products.flop == 3 * 2 * 6 * 32 * 16 + 2 * 2 * 5 * 16 * 48
    assert products.seconds() == 3 + 2  # one tick each
    assert ran == PRODUCTS[:2]


@pytest.mark.parametrize("candidate", [one for one in GEMMS if "cpu" in one.devices], ids=lambda one: one.name)
def test_every_library_computes_the_product(candidate: Candidate) -> None:
    """A rate counts only if it is that of the right result."""
    if candidate.precision == "bf16" and candidate.backend.startswith("openvino"):
        from qfae_runtime.engines.openvino import has_bf16

        if not has_bf16():
            pytest.skip("this processor has no BF16")
    product = Product(40, 256, 24, 1, True)
    library = candidate.backend.partition("-")[0]
    answer: Any = gemm.maker(library, candidate.precision, "cpu", 1)(product)()
    got = np.asarray(
        answer.float() if isinstance(answer, torch.Tensor) else answer[0] if library != "numpy" else answer
    )
    left, right = gemm._operands(product)
    error = np.abs(got.reshape(40, 24) - left @ right).max()
    assert error < {"fp32": 1e-5, "bf16": 0.1, "int8": 0.2}[candidate.precision]
    if candidate.precision != "fp32":
        assert error > 1e-4, "it is computed in another precision"


# --- PyTorch ---


def test_the_plain_model_scores_as_the_training_modules(tmp_path: Path) -> None:
    config = config_of(encoders=[vit(), vit(48, 4)], hidden_states=(-2, -3), qformer_blocks=2)
    checkpoint = load(checkpoint_file(tmp_path / "tiny.pt", config))
    plain, trimmed = PlainScorer(checkpoint), build_scorer(checkpoint)
    images = torch.from_numpy(pictures(5))
    for got, want in zip(plain(images), trimmed(images), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    # The whole models are there and computed: blocks that no score needs.
    encoders: list[Any] = list(plain.encoders)
    assert [len(one.blocks) for one in encoders] == [3, 4]
    calls: list[int] = []
    for model in (*encoders, *plain.perceptual.models.values()):
        cast(Any, model).blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    plain(images)
    assert len(calls) == 2 + 2 * len(config.score.patch_sizes), "image and reconstruction, once a patch size"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_graph_in_half_precision(precision: str) -> None:
    scorer = scorer_of(config_of())
    images = pictures(4)
    with eager(InferenceGraph(scorer), SIZE, "cpu") as engine:
        want = engine.run(images)
    graph = for_torch(InferenceGraph(scorer), precision)
    types = {name: module.dtype for name, module in graph.named_modules() if isinstance(module, Unit)}
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert [name for name, dtype in types.items() if dtype == half] == InferenceGraph(scorer).halved(FP16)
    assert set(types.values()) == {half, torch.float32}, "streams and LayerNorms"
    with eager(graph, SIZE, "cpu") as engine:
        got = engine.run(images)
    assert got.score.dtype == np.float32
    assert 0 < np.abs(got.score - want.score).max() < 0.1 * want.score.std()


@pytest.mark.parametrize("way", ["compiled", "packaged"])
def test_compiled_graphs_score_as_eager_ones(way: str, tmp_path: Path) -> None:
    # Every kind of block once: compilers take seconds for each.
    scorer = scorer_of(config_of(encoders=[vit(depth=1)], hidden_states=(-1,), blocks=[1]))
    images = pictures(4)
    want = eager(InferenceGraph(scorer), SIZE, "cpu").run(images)
    if way == "compiled":
        engine = compiled(InferenceGraph(scorer), SIZE, "cpu")
    else:
        package(InferenceGraph(scorer), "cpu", tmp_path / "tiny.pt2")
        engine = packaged(tmp_path / "tiny.pt2", SIZE, "cpu")
    got = engine.run(images)
    np.testing.assert_allclose(got.score, want.score, atol=1e-5)
    np.testing.assert_allclose(got.anomaly_map, want.anomaly_map, atol=1e-5)
    first = got.score.copy()
    engine.run(pictures(4)[::-1])
    np.testing.assert_array_equal(got.score, first)  # the arrays are the caller's
