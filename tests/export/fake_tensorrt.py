"""A double of TensorRT's module that has what the code calls and writes down how it was called.

Differences between the versions are attributes that are there or not, as in the real modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from qfae_export.onnx_facts import read_facts

PLAN = b"ptrt plan bytes"


@dataclass
class Calls:
    """What was asked of the library, and what it is to answer."""

    network_flags: list[int] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    verbosity: str | None = None
    profiles: list[dict[str, tuple[Any, ...]]] = field(default_factory=list)
    timings_made_of: list[bytes] = field(default_factory=list)
    timings_used: list[bytes] = field(default_factory=list)
    targets: dict[int, str] = field(default_factory=dict)
    opened: list[bytes] = field(default_factory=list)
    # Answers.
    inputs: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"images": (-1, 224, 224, 3)})
    builds: bool = True
    starts: bool = True
    opens: bool = True
    says: tuple[tuple[int, str], ...] = ()
    lost: tuple[str, ...] = ()
    refused_targets: tuple[str, ...] = ()
    refused_timings: tuple[bytes, ...] = ()


class Module(SimpleNamespace):
    """A module is known by itself, not by what is in it."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def tensorrt(version: str, calls: Calls) -> Any:
    """TensorRT 10 or 11, as the version says."""
    ten = version.startswith("10.")
    trt = _common(version, calls)
    trt.BuilderFlag = SimpleNamespace(TF32="TF32", **({"FP16": "FP16"} if ten else {}))
    if ten:
        trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    return trt


def tensorrt_rtx(version: str, calls: Calls) -> Any:
    """TensorRT-RTX: it takes targets, and its timing cache is there but must not be touched."""
    trt = _common(version, calls)
    trt.BuilderFlag = SimpleNamespace(TF32="TF32")
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
    trt.ComputeCapability = SimpleNamespace(**{name: name for name in ("SM75", "SM80", "SM86", "SM89", "SM120")})
    plain = trt.Builder

    class Builder(plain):  # type: ignore[misc, valid-type]
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()

            def set_compute_capability(capability: str, index: int) -> bool:
                accepted = index < config.num_compute_capabilities and capability not in calls.refused_targets
                if accepted:
                    calls.targets[index] = capability
                return accepted

            config.num_compute_capabilities = 0
            config.set_compute_capability = set_compute_capability
            return config

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            lines = [
                f'function={{ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x1 layers="[ONNX Layer: {node}]" }}\n'
                for node in network.attentions
                if node not in calls.lost
            ]
            return PLAN + b"\nmain {\n" + "".join(lines).encode()

    trt.Builder = Builder
    return trt


def _common(version: str, calls: Calls) -> Any:
    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    class Builder:
        def __init__(self, log: Any) -> None:
            for severity, message in calls.says:
                log.log(severity, message)
            if not calls.starts:
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int) -> Any:
            calls.network_flags.append(flags)
            tensors = [SimpleNamespace(name=name, shape=shape) for name, shape in calls.inputs.items()]
            return SimpleNamespace(num_inputs=len(tensors), get_input=lambda number: tensors[number], attentions=[])

        def create_builder_config(self) -> Any:
            return _config(calls)

        def create_optimization_profile(self) -> Any:
            profile: dict[str, tuple[Any, ...]] = {}
            return SimpleNamespace(set_shape=lambda name, *shapes: profile.update({name: shapes}), shapes=profile)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            return PLAN + json.dumps(network.attentions).encode() if calls.builds else None

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, log: Any) -> None:
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            from pathlib import Path

            self.network.attentions += [one.node for one in read_facts(Path(path)).attentions]
            return True

    class Runtime:
        def __init__(self, log: Any) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            calls.opened.append(plan)
            return _engine(json.loads(plan.removeprefix(PLAN)), calls) if calls.opens else None

    return Module(
        __version__=version,
        ILogger=ILogger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        IAttention=object,
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED", LAYER_NAMES_ONLY="LAYER_NAMES_ONLY"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
    )


def _config(calls: Calls) -> Any:
    class Config:
        timings: Any = None

        def clear_flag(self, flag: str) -> None:
            calls.cleared.append(flag)

        def set_flag(self, flag: str) -> None:
            calls.set.append(flag)

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "profiling_verbosity":
                calls.verbosity = value
            object.__setattr__(self, name, value)

        def add_optimization_profile(self, profile: Any) -> int:
            calls.profiles.append(profile.shapes)
            return len(calls.profiles) - 1

        def create_timing_cache(self, content: bytes) -> Any:
            calls.timings_made_of.append(content)
            return SimpleNamespace(content=content, serialize=lambda: content + b" more")

        def set_timing_cache(self, timings: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            accepted = timings.content not in calls.refused_timings
            if accepted:
                self.timings = timings
                calls.timings_used.append(timings.content)
            return accepted

        def get_timing_cache(self) -> Any:
            return self.timings

    return Config()


def _engine(attentions: list[str], calls: Calls) -> Any:
    layers = [
        {"Name": "x", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1", "Metadata": f"[ONNX Layer: {node}]"}
        for node in attentions
        if node not in calls.lost
    ]
    layers.append({"Name": "y", "LayerType": "gemm", "TacticName": "gemm", "Metadata": "[ONNX Layer: head/MatMul]"})
    inspector = SimpleNamespace(
        execution_context=None, get_engine_information=lambda form: json.dumps({"Layers": layers})
    )
    return SimpleNamespace(
        num_optimization_profiles=len(calls.profiles),
        create_engine_inspector=lambda: inspector,
        create_execution_context=lambda strategy: SimpleNamespace(
            set_optimization_profile_async=lambda profile, stream: True
        ),
    )
