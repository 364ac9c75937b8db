"""FP16's and BF16's rounding in PyTorch: what an engine of fewer bits computes, emulated on any device.

Rounded is what such an engine computes in fewer bits: products (linear layers, matrix products, convolutions,
attention), their operands, weights and biases, and activations. What it keeps in FP32 is left as it is: sums of
residual streams, LayerNorm, softmax, and everything from features to score. A product is summed in the type of its
operands and rounded once; its bias is added after that, and the sum is rounded again. What passes float16's range
becomes infinite, as it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

Function = Callable[..., Any]

# Some of these are one function under two names.
_CONVOLUTIONS: tuple[Function, ...] = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_PRODUCTS: tuple[Function, ...] = (
    *(torch.matmul, torch.mm, torch.bmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
    F.scaled_dot_product_attention,
)
_ACTIVATIONS: tuple[Function, ...] = (F.gelu, F.relu, F.silu, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh)


class Rounding(TorchFunctionMode):
    """A `with` in which PyTorch rounds what an engine of type `dtype` rounds; see the module.

    `kept` are modules that such an engine keeps in FP32. `joined` are pairs of linear layers, one after the other, that
    it makes one product of: what lies between them is not rounded. It may be entered again after it was left.
    """

    def __init__(
        self, dtype: torch.dtype, kept: Iterable[nn.Module] = (), joined: Iterable[tuple[nn.Linear, nn.Linear]] = ()
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self._kept = list(kept)
        pairs = list(joined)
        self._first = {id(first.weight) for first, _ in pairs}
        self._second = {id(second.weight) for _, second in pairs}
        self._handles: list[RemovableHandle] = []
        self._within = 0  # how many of the kept modules are running

    def __enter__(self) -> Self:
        """Begin to round."""
        super().__enter__()  # type: ignore[no-untyped-call]
        for module in self._kept:
            self._handles.append(module.register_forward_pre_hook(lambda *_: self._step(1)))
            self._handles.append(module.register_forward_hook(lambda *_: self._step(-1), always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Compute as before from now on."""
        while self._handles:
            self._handles.pop().remove()
        self._within = 0
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute `func`, rounded if it is an operation that such an engine rounds."""
        named = dict(kwargs or {})
        if self._within:
            return func(*args, **named)
        if func is F.linear or func in _CONVOLUTIONS:
            return self._layer(func, *args, **named)
        if func in _PRODUCTS:
            operands, options = map(self.rounded, args), {name: self.rounded(one) for name, one in named.items()}
            return self.rounded(func(*operands, **options))
        if func in _ACTIVATIONS:
            return self.rounded(func(*args, **named))
        return func(*args, **named)

    @overload
    def rounded(self, value: Tensor) -> Tensor: ...

    @overload
    def rounded(self, value: Any) -> Any: ...

    def rounded(self, value: Any) -> Any:
        """Return a tensor of floats as the lower precision holds it, in its own type; anything else as it is."""
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype).to(value.dtype)
        return value

    def _layer(
        self, func: Function, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **named: Any
    ) -> Tensor:
        taken = x if id(weight) in self._second else self.rounded(x)
        goes_on = id(weight) in self._first  # to the product that it is one with
        y: Tensor = func(taken, self.rounded(weight), None, *args, **named)
        if not goes_on:
            y = self.rounded(y)
        if bias is None:
            return y
        added = self.rounded(bias)
        if func is not F.linear:
            added = added[(...,) + (None,) * (weight.ndim - 2)]
        y = y + added
        return y if goes_on else self.rounded(y)

    def _step(self, change: int) -> None:
        self._within += change
