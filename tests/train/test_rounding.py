"""Rounding as FP16 and BF16 engines do it: single operations against casts that are not PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfae_runtime.arrays import Float32
from qfae_train.rounding import Rounding


def half(values: Float32) -> Float32:
    with np.errstate(over="ignore"):
        rounded: Float32 = values.astype(np.float16).astype(np.float32)
    return rounded


def brain(values: Float32) -> Float32:
    """Round to the upper 16 bits of a float32, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    rounded: Float32 = kept.view(np.float32)
    return rounded


CASTS = {torch.float16: half, torch.bfloat16: brain}
TYPES = pytest.mark.parametrize("dtype", CASTS, ids=str)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(a: Float32, b: Float32) -> Float32:
    exact: Float32 = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    return exact


@TYPES
def test_a_linear_layer_rounds_operands_product_bias_and_sum(dtype: torch.dtype) -> None:
    cast, layer, x = CASTS[dtype], nn.Linear(2, 50), drawn(30, 2)
    with torch.no_grad(), Rounding(dtype):
        got = layer(x)
    weight, bias = (tensor.detach().numpy() for tensor in (layer.weight, layer.bias))
    expected = cast(cast(product(cast(x.numpy()), cast(weight).T)) + cast(bias))
    assert np.array_equal(got.numpy(), expected)
    assert not np.array_equal(expected, x.numpy() @ weight.T + bias)


@TYPES
def test_a_convolution_is_such_a_product_of_patches(dtype: torch.dtype) -> None:
    cast, layer, x = CASTS[dtype], nn.Conv2d(2, 40, kernel_size=1), drawn(1, 2, 3, 5)
    with torch.no_grad(), Rounding(dtype):
        got = layer(x)
    flat, weight = x.numpy().reshape(2, 15), layer.weight.detach().numpy().reshape(40, 2)
    assert layer.bias is not None
    bias: Float32 = cast(layer.bias.detach().numpy())[:, None]
    sums: Float32 = cast(product(cast(weight), cast(flat))) + bias
    expected = cast(sums)
    assert np.array_equal(got.numpy().reshape(40, 15), expected)


MATMULS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, b: a @ b,
    "torch.matmul": torch.matmul,
    "Tensor.matmul": lambda a, b: a.matmul(b),
    "torch.bmm": lambda a, b: torch.bmm(a[None], b[None])[0],
    "torch.mm": torch.mm,
}


@TYPES
@pytest.mark.parametrize("way", MATMULS)
def test_every_matrix_product(way: str, dtype: torch.dtype) -> None:
    cast, a, b = CASTS[dtype], drawn(20, 2), drawn(2, 30, seed=1)
    with Rounding(dtype):
        got = MATMULS[way](a, b)
    assert np.array_equal(got.numpy(), cast(product(cast(a.numpy()), cast(b.numpy()))))


@TYPES
def test_attention_rounds_its_operands_and_its_result_but_no_logit(dtype: torch.dtype) -> None:
    cast, (q, k, v) = CASTS[dtype], (8 * drawn(1, 1, 6, 4, seed=seed) for seed in range(3))
    with Rounding(dtype):
        got = F.scaled_dot_product_attention(q, k, v).numpy()[0, 0]
    wide_q, wide_k, wide_v = (cast(one.numpy()[0, 0]).astype(np.float64) for one in (q, k, v))
    logits = wide_q @ wide_k.T / 2
    weights = np.exp(logits - logits.max(1, keepdims=True))
    attended = (weights / weights.sum(1, keepdims=True)) @ wide_v
    assert np.array_equal(cast(got), got)
    step = np.abs(attended).max() * (2.0**-11 if dtype == torch.float16 else 2.0**-8)
    assert np.abs(got - attended).max() <= step


@TYPES
def test_an_activation_rounds_its_result(dtype: torch.dtype) -> None:
    x = drawn(100)
    with Rounding(dtype):
        got = F.gelu(x)
    assert np.array_equal(got.numpy(), CASTS[dtype](F.gelu(x).numpy()))


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "addition": lambda x: x + 1e-5,
    "in place": lambda x: x.clone().add_(1e-5),
    "LayerNorm": nn.LayerNorm(7),
    "softmax": lambda x: x.softmax(dim=-1),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0), dim=-1),
    "scaling": lambda x: x * 1.0001,
}


@pytest.mark.parametrize("operation", KEPT)
def test_what_engines_keep_in_fp32_is_not_rounded(operation: str) -> None:
    x = drawn(5, 7)
    with torch.no_grad():
        expected = KEPT[operation](x)
        with Rounding(torch.float16):
            got = KEPT[operation](x)
    assert torch.equal(got, expected)
    assert not torch.equal(expected, expected.half().float())


def test_what_passes_the_range_of_float16_becomes_infinite() -> None:
    with Rounding(torch.float16):
        assert torch.tensor([[300.0]]).mm(torch.tensor([[300.0]])).item() == np.inf
    with Rounding(torch.bfloat16):
        assert torch.tensor([[300.0]]).mm(torch.tensor([[300.0]])).item() == 90112.0


def test_float64_stays_float64_and_integers_stay_as_they_are() -> None:
    numbers = torch.tensor([[4097]])
    with Rounding(torch.float16):
        product = drawn(1, 3).double() @ drawn(3, 1).double()
        assert torch.equal(numbers.mm(numbers), torch.tensor([[4097**2]]))
    assert product.dtype == torch.float64
    assert product.item() == product.half().item()


def test_kept_modules_are_not_rounded_and_what_follows_is() -> None:
    first, second, x = nn.Linear(3, 4), nn.Linear(4, 5), drawn(2, 3)
    with torch.no_grad():
        exact = first(x)
        with Rounding(torch.float16, kept=[first]):
            assert torch.equal(first(x), exact)
            rounded = second(exact)
        with Rounding(torch.float16):
            assert torch.equal(second(exact), rounded)
            assert not torch.equal(first(x), exact)
        assert not torch.equal(second(exact), rounded)


def test_an_error_within_leaves_nothing_behind() -> None:
    layer, x = nn.Linear(3, 4), drawn(2, 3)
    expected = layer(x)
    rounding = Rounding(torch.float16, kept=[layer])
    with rounding, pytest.raises(RuntimeError):
        layer(drawn(2, 5))
    with pytest.raises(ZeroDivisionError), rounding:
        raise ZeroDivisionError
    assert torch.equal(layer(x), expected)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    other = nn.Linear(3, 4)
    before = other(x)
    with rounding:
        assert not torch.equal(other(x), before)
