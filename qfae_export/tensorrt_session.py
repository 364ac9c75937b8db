"""One conversation with TensorRT or TensorRT-RTX, from an ONNX file to a plan in memory.

The module is asked what it can do, never which version it is: TensorRT 10 takes types as written only if told so and
TensorRT 11 always does; TensorRT-RTX writes for cards it does not have, so it times nothing and takes targets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfae_export.builders import Builder
from qfae_export.errors import ExportError
from qfae_export.onnx_facts import OnnxFacts
from qfae_runtime.engines.base import one_line
from qfae_runtime.engines.cuda import Gpu
from qfae_runtime.engines.plan import logger_of


@dataclass(frozen=True)
class Profile:
    """Batch sizes of an optimization profile: kernels are tuned for `opt` and valid from `least` to `most`."""

    least: int
    opt: int
    most: int


class Session:
    """The library's objects for one plan, in the order they are needed, and the errors it reports."""

    def __init__(self, trt: Any, builder: Builder, onnx: Path, facts: OnnxFacts, gpu: Gpu | None) -> None:
        """Take the library's module, the ONNX file and what it holds, and the card, if the plan is for one.

        Raises:
            ExportError: the library does not start.

        """
        self.trt, self.builder, self.onnx, self.facts, self.gpu = trt, builder, onnx, facts, gpu
        self.title = f"{builder.title} {trt.__version__}"
        self.log = logger_of(trt)
        self.log.forget()
        try:
            self.maker = trt.Builder(self.log)
        except TypeError:  # how its bindings say that there is none
            raise ExportError(f"{self.title} does not start: {self._reason()}; reinstall it: {builder.pip}") from None
        self.config = self.maker.create_builder_config()

    @property
    def portable(self) -> bool:
        """Say whether the library writes for cards it need not have, and so times nothing."""
        return hasattr(self.config, "set_compute_capability")

    def parse(self) -> None:
        """Read the ONNX file into a network whose types are those of the file.

        Raises:
            ExportError: the library would choose types itself, lacks an operation, or refuses a node.

        """
        trt, file = self.trt, self.onnx.name
        upgrade = f"install a later one: {self.builder.pip} --upgrade"
        flags = 0
        creation = getattr(trt, "NetworkDefinitionCreationFlag", None)
        strongly_typed = getattr(creation, "STRONGLY_TYPED", None)
        if strongly_typed is not None:
            flags = 1 << int(strongly_typed)
        elif hasattr(trt.BuilderFlag, "FP16"):  # types are for flags to choose, then, not for the file
            raise ExportError(f"{file}: {self.title} has no strongly typed networks; {upgrade}")
        if self.facts.attentions and not hasattr(trt, "IAttention"):
            raise ExportError(
                f"{file}: {self.title} has no attention operation, which TensorRT has from 10.14 on; {upgrade}"
            )
        self.network = self.maker.create_network(flags)
        self.parser = trt.OnnxParser(self.network, self.log)  # the weights are its own: it must outlive the build
        if not self.parser.parse_from_file(str(self.onnx)):
            fault = self.parser.get_error(0) if self.parser.num_errors else None
            node = f" at node {fault.node_name()} ({fault.node_operator()})" if fault else ""
            reason = one_line(fault.desc()) if fault else self._reason()
            raise ExportError(
                f"{file}: {self.title} cannot read it{node}: {reason}; "
                "export the file again, or use a version of the library that this project is tested with"
            )

    def configure(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Set what every plan has in common; return the compute capabilities it names, none where the card decides.

        Raises:
            ExportError: the library does not know a compute capability.

        """
        trt, config = self.trt, self.config
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)  # on by default: FP32 products would keep ten bits of a factor
        if hasattr(trt, "ProfilingVerbosity"):
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # kernels keep the names of their ONNX nodes
        if not self.portable:
            return ()
        unknown = [name for name in targets if not hasattr(trt.ComputeCapability, name)]
        if unknown or not targets:
            known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
            raise ExportError(
                f"targets: {', '.join(unknown) or 'none given'}; {self.title} builds for {', '.join(known)}: name "
                "some of these"
            )
        config.num_compute_capabilities = len(targets)
        for number, name in enumerate(targets):
            # A refusal is an answer here, and without looking at it the plan would be for other cards.
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), number):
                raise ExportError(f"targets: {self.title} refuses {name} beside {', '.join(targets)}; leave it out")
        return tuple(targets)

    def add_profiles(self, profiles: Sequence[Profile]) -> None:
        """Add optimization profiles; every input has the batch as its first dimension.

        Raises:
            ExportError: an input's batch is fixed, or the library takes no such profile.

        """
        inputs = [self.network.get_input(number) for number in range(self.network.num_inputs)]
        for one in profiles:
            profile = self.maker.create_optimization_profile()
            for tensor in inputs:
                batch, *rest = tuple(tensor.shape)
                if batch != -1 or -1 in rest:
                    raise ExportError(
                        f"{self.onnx.name}: input {tensor.name!r} has shape {(batch, *rest)}, expected -1, a free "
                        "batch, in the first place alone; export the file again"
                    )
                profile.set_shape(tensor.name, (one.least, *rest), (one.opt, *rest), (one.most, *rest))
            if self.config.add_optimization_profile(profile) < 0:
                raise ExportError(f"{self.onnx.name}: {self.title} takes no {one}: {self._reason()}")

    def build(self, timings: Path | None) -> Any:
        """Return the plan, an object that holds bytes.

        `timings` is the folder where measured kernels are remembered, if the library measures any and wants them.

        Raises:
            ExportError: the library builds none; holds its reason.

        """
        file = self._use_timings(timings) if timings is not None else None
        plan = self.maker.build_serialized_network(self.network, self.config)
        if plan is None:
            raise ExportError(self._refusal())
        if file is not None:
            self._keep_timings(file)
        return plan

    def open(self, plan: Any) -> Any:
        """Return the plan as an engine on the card.

        Raises:
            ExportError: the library does not open what it has just built.

        """
        self.runtime = self.trt.Runtime(self.log)
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ExportError(
                f"{self.title} does not open the plan it has built: {self._reason()}; free some GPU memory"
            )
        return engine

    def _refusal(self) -> str:
        about_attention = [error for error in self.log.errors if "ttention" in error]
        if not about_attention:
            return (
                f"{self.onnx.name}: {self.title} builds no plan from it: {self._reason()}; "
                "use a version of the library that this project is tested with"
            )
        stages: dict[str, set[int]] = {}
        for one in self.facts.attentions:
            stages.setdefault(one.stage, set()).add(one.head_width)
        widths = ", ".join(f"{stage} {' and '.join(map(str, sorted(found)))}" for stage, found in stages.items())
        return (
            f"{self.onnx.name}: {self.title} has no fused kernel for one of its attentions (width of a head: {widths}; "
            "12 to 128 are fused by TensorRT-RTX 1.7, and FP32 sums are in TensorRT from 11.3 on): upgrade with "
            f"{self.builder.pip} --upgrade, or keep that stage in FP32 in the precision policy "
            f"({about_attention[0]})"
        )

    def _use_timings(self, folder: Path) -> Path | None:
        """Let the builder use what it measured before; return the file for what it measures now, or None.

        Where nothing is timed, asking for timings needs a card all the same.
        """
        if self.portable or self.gpu is None or not hasattr(self.config, "create_timing_cache"):
            return None
        parts = (self.builder.module, self.trt.__version__, self.gpu.name, self.gpu.compute_capability)
        name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in "-".join(parts))
        file = folder / f"{name}.cache"
        content = b""
        with suppress(OSError):
            content = file.read_bytes()
        before = self.config.create_timing_cache(content)
        # Refused if it is damaged, or from another card or version in spite of its name.
        if before is None or not self.config.set_timing_cache(before, False):
            self.config.set_timing_cache(self.config.create_timing_cache(b""), False)
        return file

    def _keep_timings(self, file: Path) -> None:
        with suppress(OSError):  # the next build takes longer, that is all
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.{os.getpid()}")
            part.write_bytes(memoryview(self.config.get_timing_cache().serialize()))
            part.replace(file)

    def _reason(self) -> str:
        return str(self.log.errors[-1]) if self.log.errors else "it gives no reason"
