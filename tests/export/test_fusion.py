"""The proof of fusion: what a plan says of its kernels, and that no plan with a lost attention passes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from qfae_export.builders import BUILDERS, available
from qfae_export.errors import ExportError
from qfae_export.fusion import Kernel, kernels_of_engine, kernels_of_inspector, kernels_of_plan, prove
from qfae_export.onnx_facts import Attention, OnnxFacts, read_facts
from qfae_export.tensorrt_plan import build_plan
from qfae_export.tensorrt_session import Profile, Session
from tests.export.attention_files import PLACE, attention_file

needs_rtx = pytest.mark.skipif(available("rtx-plan") is not None, reason=f"{available('rtx-plan')}")

NODES = [
    "encoder.1.attention/Attention",
    "encoder.2.attention/Attention",
    "decoder.1.attention/Attention",
    *(f"perceptual.{n}.attention/Attention{size}" for n in (1, 2, 3) for size in ("", "_1")),
]
ATTENTIONS = [Attention(node, 64) for node in NODES]


def record(name: str, *nodes: str, unique: str = "") -> bytes:
    """One line of a program, as TensorRT-RTX 1.7 writes it."""
    layers = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f'  function={{ name={name} fqn={name}_{unique or "0x1"} args={{ "a" "b" }} kernel_kind=7 cond_fqn = '
        f'{{ exec_cond = "c" function = {name}_com }} layers="{layers}" swap_ab=false }}\n'
    ).encode()


def fused(node: str, unique: str = "0x1") -> bytes:
    return record("_gemm_mha_v2", node, unique=unique)


def program(*records: bytes) -> bytes:
    return b"\x00\xff{\n sub_tensor={ }\n}\nmain {\n label bb1: \n" + b"".join(records) + b"}\nshape_main {\n}\n\x00"


def source(unique: str, traits: str = "") -> bytes:
    head = f"using Traits = fmha::{traits};\n" if traits else ""
    return f'{head}extern "C" __global__ void __launch_bounds__(128) _gemm_mha_v2_{unique}(half* a) {{}}\n'.encode()


def check(plan: bytes, profiles: int = 1, attentions: list[Attention] | None = None) -> Any:
    kernels = kernels_of_plan(plan)
    names = {"plan": "brats.plan", "builder": "TensorRT-RTX 1.7.1", "source": "records of its kernels"}
    return prove(ATTENTIONS if attentions is None else attentions, kernels, profiles, **names)


def test_a_whole_plan() -> None:
    report = check(program(*map(fused, NODES)) + source("0x1", "Ampere_hmma_fp32_traits"))
    assert report.describe() == {
        "attentions": 9,
        "fused": 9,
        "stages": {"encoder": 2, "decoder": 1, "perceptual": 6},
        "profiles": 1,
        "accumulates": {"fp32": 9},
        "source": "records of its kernels",
    }
    assert report.summary() == "9 of 9 attentions fused (2 encoder, 1 decoder, 6 perceptual; 9 accumulate in fp32)"


def test_plans_are_read_where_they_lie() -> None:
    plan = program(*map(fused, NODES))
    assert kernels_of_plan(memoryview(bytearray(plan))) == kernels_of_plan(plan)


def test_one_missing_is_named() -> None:
    with pytest.raises(ExportError) as caught:
        check(program(*map(fused, NODES[:-1])))
    assert str(caught.value) == (
        "brats.plan: TensorRT-RTX 1.7.1 fused 8 of 9 attentions, expected all (perceptual has 5 of 6, without "
        "perceptual.3.attention/Attention_1); the others would run at a fraction of the speed: try another version of "
        "it, or keep them in FP32 in the precision policy"
    )


def test_several_missing_are_named_by_stage_and_shortened() -> None:
    with pytest.raises(ExportError, match=r"fused 2 of 9 attentions") as caught:
        check(program(*map(fused, NODES[1:3])))
    assert "encoder has 1 of 2, without encoder.1.attention/Attention; perceptual has 0 of 6, without " in str(
        caught.value
    )
    assert "perceptual.2.attention/Attention and 3 more)" in str(caught.value)
    assert "decoder" not in str(caught.value)


def test_a_kernel_that_prepares_an_attention_is_none() -> None:
    lost = NODES[3]
    around = [
        record("__myl_AddReshTranReshMove", "perceptual.1.qkv/Add", lost),
        record("sm80_xmma_gemm_f16f16_f16f32_f32", lost, "perceptual.1.proj/MatMul"),
    ]
    with pytest.raises(ExportError, match=rf"perceptual has 5 of 6, without {lost}\)"):
        check(program(*around, *(fused(node) for node in NODES if node != lost)))


def test_a_similar_name_is_another_attention() -> None:
    lost = "perceptual.1.attention/Attention"
    assert f"{lost}_1" in NODES
    with pytest.raises(ExportError, match=rf"without {lost}\)"):
        check(program(*(fused(node) for node in NODES if node != lost)))


def test_one_kernel_may_do_more_than_the_attention() -> None:
    more = record("_gemm_mha_v2", "encoder.1.attention/Cast", NODES[0], "encoder.1.attention/Cast_1")
    assert check(program(more, *map(fused, NODES[1:]))).attentions == 9


def test_every_profile_must_have_all() -> None:
    whole, short = program(*map(fused, NODES)), program(*map(fused, NODES[1:]))
    assert check(whole + whole, profiles=2).profiles == 2
    with pytest.raises(ExportError, match=rf"encoder has 1 of 2, without {NODES[0]}\)"):
        check(whole + short, profiles=2)
    # Two kernels in one program are not one in each of two.
    twice = program(*map(fused, NODES), fused(NODES[0]))
    with pytest.raises(ExportError, match=rf"encoder has 1 of 2, without {NODES[0]}\)"):
        check(twice + short, profiles=2)
    with pytest.raises(ExportError, match=r"fused 0 of 9"):
        check(whole, profiles=2)


def test_a_plan_without_records_proves_nothing() -> None:
    for plan in (b"", b"\x00" * 1000, program(), program(record("_gemm_mha_v2"))):
        with pytest.raises(ExportError) as caught:
            check(plan)
        assert str(caught.value) == (
            "brats.plan: the records of its kernels name no ONNX nodes, expected one record for each kernel; whether "
            "TensorRT-RTX 1.7.1 fused the attentions cannot be told: use a version of it that this project is tested "
            "with"
        )


def test_nothing_to_fuse_is_no_fault() -> None:
    report = check(program(record("gemm", "decoder.head/MatMul")), attentions=[])
    assert (report.attentions, report.summary()) == (0, "no attention to fuse")


def test_what_kernels_accumulate_in() -> None:
    kinds = ["0xa", "0xb", "0xc", *["0xa"] * 6]
    plan = program(*(fused(node, unique) for node, unique in zip(NODES, kinds, strict=True)))
    plan += (
        source("0xa", "Ampere_hmma_fp32_traits")
        + b"\x00" * 9
        + source("0xc")
        + source("0xb", "Ampere_hmma_fp16_traits")
    )
    # 0xc has no traits of its own, and those before it are 0xa's.
    report = check(plan)
    assert report.accumulates == {"fp32": 7, "fp16": 1, "unknown": 1}
    assert report.summary().endswith("7 accumulate in fp32, 1 accumulate in fp16, 1 accumulate in unknown)")


LAYERS: list[Any] = [
    {
        "Name": "_gemm_mha_v2_myl0_17",
        "LayerType": "kgen",
        "TacticName": "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a",
        "Metadata": f"[ONNX Layer: {NODES[0]}]\x1e[ONNX Layer: encoder.1.attention/Cast]",
    },
    {
        "Name": f"/mha/{NODES[1]}+/mha/x",
        "LayerType": "gemm",
        "TacticName": "sm90_xmma_gemm_f16f16",
        "Metadata": f"[ONNX Layer: {NODES[1]}]",
    },
    {"Name": "reshape", "LayerType": "shape_call"},
    "a layer of which only the name is known",
]


def test_kernels_of_an_inspector() -> None:
    kernels = kernels_of_inspector(json.dumps({"Layers": LAYERS, "I/O Tensors": []}), 1)
    assert kernels == [
        Kernel(1, "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a kgen", (NODES[0], "encoder.1.attention/Cast")),
        Kernel(1, "sm90_xmma_gemm_f16f16 gemm", (NODES[1],)),
        Kernel(1, "shape_call", ()),
    ]
    assert [kernel.fused for kernel in kernels] == [True, False, False]  # not by a name made of ONNX names


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"Bindings": []}'])
def test_an_inspector_that_says_nothing(text: str) -> None:
    with pytest.raises(ExportError, match=r"^the engine inspector wrote no list of layers \(.*tested with$"):
        kernels_of_inspector(text, 0)


class Inspected:
    """An engine of two profiles; the second has lost an attention."""

    num_optimization_profiles = 2

    def __init__(self, opens: bool = True) -> None:
        self.opens = opens
        self.strategies: list[str] = []
        self.execution_context: Any = None

    def create_engine_inspector(self) -> Any:
        return self

    def create_execution_context(self, strategy: str) -> Any:
        self.strategies.append(strategy)

        def select(profile: int, stream: int) -> bool:
            context.profile = profile
            return self.opens

        context = SimpleNamespace(profile=0, set_optimization_profile_async=select)
        return context

    def get_engine_information(self, form: str) -> str:
        assert form == "json"
        return json.dumps({"Layers": LAYERS[: 1 - self.execution_context.profile] + LAYERS[1:]})


FAKE: Any = SimpleNamespace(
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="no memory"),
    LayerInformationFormat=SimpleNamespace(JSON="json"),
)


def test_every_profile_of_an_engine_is_inspected() -> None:
    engine = Inspected()
    kernels = kernels_of_engine(FAKE, engine)
    assert engine.strategies == ["no memory"] * 2
    assert [(kernel.program, kernel.fused) for kernel in kernels if kernel.nodes] == [(0, True), (0, False), (1, False)]
    with pytest.raises(ExportError, match=rf"encoder has 0 of 1, without {NODES[0]}\)"):
        prove(ATTENTIONS[:1], kernels, 2, plan="a.plan", builder="TensorRT 11", source="layers")


def test_a_profile_that_cannot_be_opened() -> None:
    with pytest.raises(ExportError, match=r"^optimization profile 0 of the plan cannot be opened on this GPU"):
        kernels_of_engine(FAKE, Inspected(opens=False))


def test_facts_of_a_file(tmp_path: Path) -> None:
    facts = read_facts(attention_file(tmp_path / "one.onnx", width=48))
    assert facts == OnnxFacts("fp16", (Attention(f"{PLACE}/Attention", 48),), ())
    assert facts.to_fuse() == facts.attentions
    assert facts.attentions[0].stage == "perceptual"


def test_an_attention_that_was_written_out_counts_unless_the_policy_keeps_it(tmp_path: Path) -> None:
    facts = read_facts(attention_file(tmp_path / "out.onnx", width=48, form="written out"))
    lost = Attention(f"{PLACE}/Softmax", 48)
    assert facts == OnnxFacts("fp16", (), (lost,))
    assert facts.to_fuse() == facts.to_fuse(["decoder", "perceptual.11"]) == (lost,)
    assert facts.to_fuse(["perceptual.1"]) == facts.to_fuse([PLACE]) == ()


def test_fp32_files_have_nothing_to_fuse(tmp_path: Path) -> None:
    facts = read_facts(attention_file(tmp_path / "fp32.onnx", form="opset 18"))
    assert (facts.precision, len(facts.written_out), facts.to_fuse()) == ("fp32", 1, ())


def test_blocks_of_another_kind_compute_in_fp32(tmp_path: Path) -> None:
    path = attention_file(tmp_path / "out.onnx", form="written out")
    model = onnx.load(path)
    [softmax] = [node for node in model.graph.node if node.op_type == "Softmax"]
    softmax.name = "perceptual.1.block.attention/Softmax"
    onnx.save(model, path)
    assert read_facts(path).written_out == ()


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    missing, noise = tmp_path / "missing.onnx", tmp_path / "noise.onnx"
    noise.write_bytes(b"\xff" * 64)
    foreign = attention_file(tmp_path / "foreign.onnx", producer="pytorch")
    for path, said in (
        (missing, "cannot be read (No such file or directory); name the ONNX file that qfae-export wrote"),
        (
            foreign,
            "was written by pytorch in opset 23, expected qfae-export and opset 18 or 23; export it with this qfae",
        ),
    ):
        with pytest.raises(ExportError) as caught:
            read_facts(path)
        assert str(caught.value) == f"{path}: {said}"
    with pytest.raises(ExportError, match=r"noise.onnx: is no ONNX file \(.*or copy it again$"):
        read_facts(noise)


@needs_rtx
def test_a_real_plan_with_one_attention(tmp_path: Path) -> None:
    plan = build_plan(attention_file(tmp_path / "one.onnx"), tmp_path / "one.plan", "rtx-plan", 4)
    assert plan.fusion.describe() | {"source": ""} == {
        "attentions": 1,
        "fused": 1,
        "stages": {"perceptual": 1},
        "profiles": 1,
        "accumulates": {"fp32": 1},
        "source": "",
    }


@needs_rtx
def test_a_real_plan_of_two_profiles(tmp_path: Path) -> None:
    path = attention_file(tmp_path / "one.onnx")
    facts, builder = read_facts(path), BUILDERS["rtx-plan"]
    session = Session(import_module(builder.module), builder, path, facts, None)
    session.parse()
    session.configure(["SM80", "SM120"])
    session.add_profiles([Profile(1, 2, 4), Profile(4, 8, 8)])
    kernels = kernels_of_plan(session.build(None))
    names = {"plan": "a.plan", "builder": "TensorRT-RTX", "source": "records"}
    assert prove(facts.attentions, kernels, 2, **names).profiles == 2
    with pytest.raises(ExportError, match=r"fused 0 of 1"):
        prove(facts.attentions, kernels, 3, **names)


@needs_rtx
def test_a_real_plan_whose_attention_fell_apart(tmp_path: Path) -> None:
    path, out = attention_file(tmp_path / "lost.onnx", width=8, form="written out"), tmp_path / "lost.plan"
    with pytest.raises(ExportError, match=rf"fused 0 of 1 .* \(perceptual has 0 of 1, without {PLACE}/Softmax\)"):
        build_plan(path, out, "rtx-plan", 4)
    assert not list(tmp_path.glob("*plan*"))
    # The same file, kept apart on purpose, is a plan.
    assert build_plan(path, out, "rtx-plan", 4, kept=["perceptual"]).fusion.attentions == 0


@needs_rtx
def test_a_real_attention_that_is_written_out_and_fused_all_the_same(tmp_path: Path) -> None:
    path = attention_file(tmp_path / "whole.onnx", form="written out")
    report = build_plan(path, tmp_path / "whole.plan", "rtx-plan", 4).fusion
    assert (report.stages, report.accumulates) == ({"perceptual": 1}, {"fp16": 1})


@needs_rtx
def test_a_real_attention_without_a_kernel(tmp_path: Path) -> None:
    path = attention_file(tmp_path / "narrow.onnx", width=8)
    with pytest.raises(ExportError) as caught:
        build_plan(path, tmp_path / "narrow.plan", "rtx-plan", 4)
    said = str(caught.value)
    assert said.startswith("narrow.onnx: TensorRT-RTX ")
    assert "has no fused kernel for one of its attentions (width of a head: perceptual 8; 12 to 128 are fused" in said
    assert "upgrade with pip install tensorrt-rtx-cu13 --upgrade, or keep that stage in FP32" in said
    assert "\n" not in said
    assert not list(tmp_path.glob("*plan*"))
