"""Plans: what each library is asked for, shown by doubles, and every refusal by its text."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

from qfae_export import builders, tensorrt_plan
from qfae_export.builders import BUILDERS, available
from qfae_export.errors import ExportError
from qfae_export.tensorrt_plan import Plan, Profile, buckets, build_plan, profiles_for
from qfae_runtime.engines.cuda import Gpu
from qfae_runtime.errors import OutputError
from tests.export import fake_tensorrt
from tests.export.attention_files import PLACE, attention_file, custom_operation_file, fixed_batch_file
from tests.export.fake_tensorrt import PLAN, Calls

NODE = f"{PLACE}/Attention"
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.95.05", "13.0")
needs_rtx = pytest.mark.skipif(available("rtx-plan") is not None, reason=f"{available('rtx-plan')}")


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return attention_file(tmp_path / "a.fp16.onnx")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (builders, tensorrt_plan):
        monkeypatch.setattr(module, "current_gpu", lambda: H100)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (builders, tensorrt_plan):
        monkeypatch.setattr(module, "current_gpu", lambda: None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Any:
    """Install a double in a library's place: install("10.16.1.11") or install("1.7.1", "rtx-plan")."""

    def install(version: str, kind: str = "plan", **attributes: Any) -> Any:
        make = fake_tensorrt.tensorrt if kind == "plan" else fake_tensorrt.tensorrt_rtx
        module = make(version, calls)
        for name, value in attributes.items():
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)
        monkeypatch.setitem(sys.modules, BUILDERS[kind].module, module)
        return module

    return install


def plan_of(file: Path, kind: str = "plan", max_batch: int = 4, **options: Any) -> Plan:
    return build_plan(file, file.with_name("a.plan"), kind, max_batch, cache=file.parent / "cache", **options)


def refusal(file: Path, kind: str = "plan", **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        plan_of(file, kind, **options)
    assert not list(file.parent.glob("*plan*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (32, (1, 2, 4, 8, 16, 32)), (48, (1, 2, 4, 8, 16, 32, 48))],
)
def test_buckets(largest: int, sizes: tuple[int, ...]) -> None:
    assert buckets(largest) == sizes


@pytest.mark.parametrize("largest", [1, 2, 3, 32, 48, 4096])
def test_profiles_hold_their_buckets_and_never_one_size_alone(largest: int) -> None:
    sizes = buckets(largest)
    tuned = profiles_for(sizes, portable=False)
    assert [profile.opt for profile in tuned] == list(sizes)
    assert profiles_for(sizes, portable=True) == (Profile(1, largest, max(2, largest)),)
    for profile in (*tuned, *profiles_for(sizes, portable=True)):
        assert 1 <= profile.least <= profile.opt <= profile.most
        assert profile.least < profile.most


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("version", "flags"), [("10.16.1.11", 1 << 1), ("11.4.1.9", 0)])
def test_one_road_for_tensorrt_10_and_11(version: str, flags: int, install: Any, calls: Calls, file: Path) -> None:
    install(version)
    calls.inputs = {"images": (-1, 224, 224, 3), "pixels": (-1, 224, 224, 3)}
    plan = plan_of(file)
    assert calls.network_flags == [flags]
    assert (calls.cleared, calls.set, calls.verbosity) == (["TF32"], [], "DETAILED")
    sizes = [tuple(shape[0] for shape in profile["images"]) for profile in calls.profiles]
    assert sizes == [(1, 1, 2), (1, 2, 2), (2, 4, 4)]
    assert all(profile["images"] == profile["pixels"] for profile in calls.profiles)
    assert calls.profiles[0]["images"][2] == (2, 224, 224, 3)
    assert (plan.buckets, plan.targets, plan.gpu) == ((1, 2, 4), (), H100)
    assert calls.opened == [plan.path.read_bytes()]
    assert plan.describe() | {"seconds": 0.0} == {
        "builder": "tensorrt",
        "version": version,
        "gpu": {
            "name": "NVIDIA H100 80GB HBM3",
            "compute_capability": "9.0",
            "driver": "580.95.05",
            "cuda": "13.0",
        },
        "targets": [],
        "buckets": [1, 2, 4],
        "profiles": [
            {"least": 1, "opt": 1, "most": 2},
            {"least": 1, "opt": 2, "most": 2},
            {"least": 2, "opt": 4, "most": 4},
        ],
        "tf32": False,
        "seconds": 0.0,
        "fusion": {
            "attentions": 1,
            "fused": 1,
            "stages": {"perceptual": 1},
            "profiles": 3,
            "accumulates": {"unknown": 1},
            "source": "layers of the engine inspector",
        },
    }


@pytest.mark.usefixtures("card")
def test_the_file_is_the_bare_plan(install: Any, file: Path) -> None:
    install("11.4.1.9")
    assert plan_of(file).path.read_bytes().startswith(PLAN)
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.fp16.onnx", "a.plan", "cache"]


@pytest.mark.usefixtures("card")
def test_timings_are_remembered(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    plan_of(file)
    [kept] = (file.parent / "cache" / "timings").iterdir()
    assert kept.name == "tensorrt-11.4.1.9-NVIDIA-H100-80GB-HBM3-9.0.cache"
    plan_of(file)
    assert calls.timings_used == [b"", b" more"]
    assert kept.read_bytes() == b" more more"


@pytest.mark.usefixtures("card")
def test_timings_the_library_does_not_want_are_replaced(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    plan_of(file)
    calls.refused_timings = (b" more",)
    plan_of(file)
    assert calls.timings_made_of == [b"", b" more", b""]
    assert calls.timings_used == [b"", b""]


@pytest.mark.usefixtures("card")
def test_timings_that_cannot_be_kept_are_no_fault(install: Any, file: Path) -> None:
    install("11.4.1.9")
    (file.parent / "cache").write_text("a file where a folder should be")
    assert plan_of(file).path.exists()


@pytest.mark.usefixtures("no_card")
def test_the_road_of_tensorrt_rtx(install: Any, calls: Calls, file: Path) -> None:
    install("1.7.1.116", "rtx-plan")
    plan = plan_of(file, "rtx-plan", max_batch=32)
    assert calls.network_flags == [1 << 0]
    assert calls.targets == {0: "SM80", 1: "SM86", 2: "SM89", 3: "SM120"}
    assert [profile["images"][:3] for profile in calls.profiles] == [
        ((1, 224, 224, 3), (32, 224, 224, 3), (32, 224, 224, 3))
    ]
    assert calls.timings_made_of == []  # asking for them takes a card
    assert (calls.cleared, calls.opened) == (["TF32"], [])
    assert (plan.gpu, plan.targets, plan.buckets) == (None, ("SM80", "SM86", "SM89", "SM120"), (1, 2, 4, 8, 16, 32))


@pytest.mark.usefixtures("no_card")
def test_targets_of_ones_own(install: Any, calls: Calls, file: Path) -> None:
    install("1.7.1.116", "rtx-plan")
    assert plan_of(file, "rtx-plan", targets=["SM75"]).targets == ("SM75",)
    assert calls.targets == {0: "SM75"}


@pytest.mark.usefixtures("no_card")
def test_targets_the_library_does_not_take(install: Any, calls: Calls, file: Path) -> None:
    install("1.7.1.116", "rtx-plan")
    known = "TensorRT-RTX 1.7.1.116 builds for SM120, SM75, SM80, SM86, SM89: name some of these"
    assert refusal(file, "rtx-plan", targets=["SM90", "SM80"]) == f"targets: SM90; {known}"
    assert refusal(file, "rtx-plan", targets=[]) == f"targets: none given; {known}"
    calls.refused_targets = ("SM75",)
    assert refusal(file, "rtx-plan", targets=["SM75", "SM80"]) == (
        "targets: TensorRT-RTX 1.7.1.116 refuses SM75 beside SM75, SM80; leave it out"
    )


@pytest.mark.usefixtures("card")
def test_a_lost_attention_leaves_no_plan(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    calls.lost = (NODE,)
    assert (
        f"a.plan: TensorRT 11.4.1.9 fused 0 of 1 attentions, expected all (perceptual has 0 of 1, without {NODE})"
        in (refusal(file))
    )


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    for kind, said in (
        ("plan", "TensorRT is not installed: pip install tensorrt"),
        ("rtx-plan", "TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13"),
    ):
        monkeypatch.setitem(sys.modules, BUILDERS[kind].module, None)
        assert available(kind) == said
        assert refusal(file, kind) == f"a.fp16.onnx: no {kind} can be built from it here: {said}"


@pytest.mark.usefixtures("no_card")
def test_no_card(install: Any, file: Path) -> None:
    install("11.4.1.9")
    assert refusal(file) == (
        "a.fp16.onnx: no plan can be built from it here: TensorRT builds a plan on the card it will run on, and torch "
        "sees no CUDA GPU on this machine; copy a.fp16.onnx and its .json there and run: qfae-export --onnx a.fp16.onnx"
    )
    install("1.7.1.116", "rtx-plan")
    assert available("rtx-plan") is None


@pytest.mark.usefixtures("card")
def test_a_known_bad_version_builds_nothing(install: Any, calls: Calls, tmp_path: Path) -> None:
    install("10.4.0")
    assert refusal(attention_file(tmp_path / "a.onnx", form="opset 18")) == (
        "TensorRT 10.4.0 is not used: a DINOv3 ViT-B/16 was reported to come out wrong: cosine 0.018 with PyTorch in "
        "FP32, NaN in FP16 (NVIDIA/TensorRT#4742); install version 10.5 or a later one: pip install tensorrt --upgrade"
    )
    assert calls.network_flags == []


@pytest.mark.usefixtures("card")
def test_libraries_that_cannot_do_it(install: Any, file: Path) -> None:
    install(
        "8.6.1", NetworkDefinitionCreationFlag=object(), BuilderFlag=fake_tensorrt.tensorrt("10.1", Calls()).BuilderFlag
    )
    assert refusal(file) == (
        "a.fp16.onnx: TensorRT 8.6.1 has no strongly typed networks; install a later one: "
        "pip install tensorrt --upgrade"
    )
    install("10.10.0.31", IAttention=None)
    assert refusal(file) == (
        "a.fp16.onnx: TensorRT 10.10.0.31 has no attention operation, which TensorRT has from 10.14 on; "
        "install a later one: pip install tensorrt --upgrade"
    )


@pytest.mark.usefixtures("card")
def test_a_library_that_does_not_start(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    calls.starts, calls.says = False, ((3, "hello"), (1, "CUDA initialization failure with error: 35"))
    assert refusal(file) == (
        "TensorRT 11.4.1.9 does not start: CUDA initialization failure with error: 35; reinstall it: "
        "pip install tensorrt"
    )


@pytest.mark.usefixtures("card")
def test_a_build_that_fails(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    calls.builds = False
    cure = "use a version of the library that this project is tested with"
    assert refusal(file) == f"a.fp16.onnx: TensorRT 11.4.1.9 builds no plan from it: it gives no reason; {cure}"
    calls.says = ((0, "out of\nmemory  " + "x" * 500), (2, "a warning"))
    said = refusal(file)
    assert said.startswith("a.fp16.onnx: TensorRT 11.4.1.9 builds no plan from it: out of memory xxx")
    assert said.endswith(f"xxx ...; {cure}")


@pytest.mark.usefixtures("card")
def test_a_plan_that_does_not_open(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    calls.opens = False
    assert refusal(file) == (
        "TensorRT 11.4.1.9 does not open the plan it has built: it gives no reason; free some GPU memory"
    )


@pytest.mark.usefixtures("card")
def test_inputs_without_a_free_batch(install: Any, calls: Calls, file: Path) -> None:
    install("11.4.1.9")
    calls.inputs = {"images": (2, 224, 224, 3)}
    assert refusal(file) == (
        "a.fp16.onnx: input 'images' has shape (2, 224, 224, 3), expected -1, a free batch, in the first place alone; "
        "export the file again"
    )


@pytest.mark.usefixtures("card")
def test_a_full_disk_keeps_what_was_there(install: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("11.4.1.9")
    old = file.with_name("a.plan")
    old.write_bytes(b"the plan of yesterday")

    def full(path: Path, content: Any) -> int:
        with path.open("wb") as half:
            half.write(bytes(content[:3]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError) as caught:
        plan_of(file)
    said = str(caught.value)
    assert said.startswith(f"{old}: cannot be written (No space left on device; 0.00 GB are needed, ")
    assert said.endswith(" GB are free); nothing of it was kept: free some space or choose another folder")
    assert old.read_bytes() == b"the plan of yesterday"
    assert not list(file.parent.glob(".*"))


@needs_rtx
def test_a_node_the_parser_refuses(tmp_path: Path) -> None:
    said = refusal(custom_operation_file(tmp_path / "a.onnx"), "rtx-plan")
    assert said.startswith("a.onnx: TensorRT-RTX ")
    assert " cannot read it at node decoder.head/Telepathy (Telepathy): " in said
    assert said.endswith("; export the file again, or use a version of the library that this project is tested with")


@needs_rtx
def test_a_real_file_with_a_fixed_batch(tmp_path: Path) -> None:
    said = refusal(fixed_batch_file(tmp_path / "a.onnx"), "rtx-plan")
    assert "input 'images' has shape (2, 4), expected -1, a free batch" in said


@needs_rtx
def test_the_terminal_stays_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As outside of pytest: Python's stderr is the process's.
    monkeypatch.setattr(sys, "stderr", open(2, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
    steps: list[str] = []

    def say(step: str) -> None:
        steps.append(step)
        print(f"progress: {step}", file=sys.stderr)

    before = sys.stderr
    # The library itself writes "Internal Error" to the process's stderr here.
    refusal(attention_file(tmp_path / "a.onnx", width=8), "rtx-plan", say=say)
    assert sys.stderr is before
    print("still here", file=sys.stderr)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "".join(f"progress: {step}\n" for step in steps) + "still here\n")
    assert [step.split(" for ")[0] for step in steps] == ["reading a.onnx", "building a.plan"]
