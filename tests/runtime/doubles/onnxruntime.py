"""A double of ONNX Runtime's GPU build: it computes on the CPU, and does with providers as it is told."""

from __future__ import annotations

from typing import Any

import onnxruntime as genuine

GPU_PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


class FakeOnnxRuntime:
    """Stands in for the module. `started` are the providers that do start; `asked` what sessions were asked for."""

    def __init__(self) -> None:
        self.available = list(GPU_PROVIDERS)
        self.started = list(GPU_PROVIDERS)
        self.asked: list[dict[str, dict[str, str]]] = []
        self.options: list[Any] = []
        self.preloaded = 0
        self.batches: list[int] = []
        self.SessionOptions = genuine.SessionOptions
        self.ExecutionMode = genuine.ExecutionMode

    def get_available_providers(self) -> list[str]:
        return self.available

    def preload_dlls(self, directory: str) -> None:
        assert directory == ""  # else it looks for torch
        self.preloaded += 1

    def InferenceSession(  # the name of what it stands for
        self, model: Any, options: Any, providers: list[str], provider_options: list[dict[str, str]]
    ) -> _Session:
        self.asked.append(dict(zip(providers, provider_options, strict=True)))
        self.options.append(options)
        return _Session(self, genuine.InferenceSession(model, options, providers=["CPUExecutionProvider"]), providers)


class _Session:
    def __init__(self, module: FakeOnnxRuntime, session: Any, providers: list[str]) -> None:
        self._module, self._session, self._providers = module, session, providers
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.get_overridable_initializers = session.get_overridable_initializers

    def get_providers(self) -> list[str]:
        return [one for one in self._providers if one in self._module.started]

    def run(self, names: list[str], feed: dict[str, Any]) -> Any:
        self._module.batches.append(len(feed["images"]))
        return self._session.run(names, feed)
