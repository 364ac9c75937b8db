"""Each rewriting equals what it rewrites, on random weights whose every constant shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from qfae_export.layers import (
    Attend,
    CausalAttend,
    ForeignBlock,
    Linear,
    TransformerBlock,
    chained,
    entering_to_normalised,
    inference_block,
    patch_kernel,
    patches,
)
from qfae_train.autoencoder import normalise
from qfae_train.qformer import QueryAttention
from tests.export.tiny import pictures


def rough(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every constant far from the value it would be forgotten at."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval()


def block(**options: Any) -> Block:
    return rough(Block(24, 3, qkv_bias=True, **options))  # type: ignore[return-value]


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"proj_bias": False}, {"mlp_ratio": 2.0}])
def test_folded_block(options: dict[str, Any]) -> None:
    plain, x = block(**options), torch.randn(2, 7, 24)
    torch.testing.assert_close(TransformerBlock(plain)(x, [7]), plain(x), atol=1e-4, rtol=1e-4)


def test_packed_sequences_do_not_see_each_other() -> None:
    plain, x = block(init_values=0.1), torch.randn(2, 9, 24)
    apart = torch.cat([plain(x[:, :2]), plain(x[:, 2:6]), plain(x[:, 6:])], dim=1)
    torch.testing.assert_close(TransformerBlock(plain)(x, [2, 4, 3]), apart, atol=1e-4, rtol=1e-4)


def test_the_bias_of_k_is_gone_and_v_s_is_behind_the_attention() -> None:
    plain: Any = block()
    folded = TransformerBlock(plain)
    bias = folded.qkv.bias
    assert bias is not None
    assert float(bias[24:].abs().max()) == 0
    assert float(bias[:24].abs().min()) > 0
    with torch.no_grad():
        plain.attn.qkv.bias[24:48] += 100.0  # all keys of a query alike
    x = torch.randn(1, 5, 24)
    torch.testing.assert_close(folded(x, [5]), TransformerBlock(plain)(x, [5]))


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"scale_attn_norm": True}, {"scale_mlp_norm": True}, {"act_layer": nn.SiLU}],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_blocks_are_left_as_they_are(options: dict[str, Any]) -> None:
    other, x = block(**options), torch.randn(2, 6, 24)
    want = other(x)
    kept = inference_block(other)
    assert isinstance(kept, ForeignBlock)
    torch.testing.assert_close(kept(x, [6]), want, atol=1e-5, rtol=1e-5)
    kept.set_dtype(torch.float16)
    assert kept(x.half(), [6]).dtype == torch.float32


def test_two_products_in_one() -> None:
    first, second = rough(nn.Linear(6, 5)), rough(nn.Linear(5, 4, bias=False), 1)
    x = torch.randn(3, 6)
    weight, bias = chained(second, first)  # type: ignore[arg-type]
    assert weight.dtype == bias.dtype == torch.float64
    torch.testing.assert_close(Linear(weight, bias)(x), second(first(x)))


def test_a_product_is_folded_in_double_precision_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.tensor([0.5, 1 / 3, -2.0, 7.0], dtype=torch.float64)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    unit = Linear(weight, bias)
    assert torch.equal(unit.weight, weight.t().float())
    assert torch.equal(unit(x), x.float() @ unit.weight + bias.float())
    unit.unround()
    torch.testing.assert_close(unit(x), x @ weight.t() + bias, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(unit.weight, weight.t(), rtol=1e-14, atol=0)
    unit.set_dtype(torch.float32)
    assert torch.equal(unit.weight, weight.t().float())
    assert set(unit.state_dict()) == {"weight", "bias"}


def test_what_single_precision_holds_is_not_kept_twice() -> None:
    weight, bias = torch.randn(4, 6), torch.tensor([0.5, 1.0, -2.0, 7.0], dtype=torch.float64)
    assert Linear(weight, bias).folded == {}
    assert Linear(weight.double(), None).folded == {}
    assert set(Linear(weight.double() / 3, bias).folded) == {"weight"}


def test_rounding_gives_back_the_same_number_where_it_fell_just_short_of_half_a_step() -> None:
    step = 2.0**-23
    short = step / 2 - 2.0**-52  # float32 holds it as half a step, which would be rounded to the even neighbour
    whole = torch.tensor([[1 + step + short, 1 + step - short, 1 + step / 2, 1 + 3 * step / 2]], dtype=torch.float64)
    unit = Linear(whole, None)
    before = unit.weight.clone()
    unit.unround()
    torch.testing.assert_close(unit.weight, whole.t(), rtol=1e-14, atol=0)
    unit.set_dtype(torch.float32)
    assert torch.equal(unit.weight, before)
    assert torch.equal(before, whole.t().float())


def test_a_constant_that_was_changed_since_stays_changed_in_double_precision() -> None:
    whole = torch.tensor([1 / 3, 2 / 3, 5 / 3], dtype=torch.float64)
    unit = Linear(whole[:, None], None)
    unit.weight[0, 1] *= 1.001
    changed = unit.weight.clone()
    unit.unround()
    torch.testing.assert_close(unit.weight[0, [0, 2]], whole[[0, 2]], rtol=1e-14, atol=0)
    assert unit.weight[0, 1].item() == pytest.approx(2 / 3 * 1.001, rel=1e-7)
    unit.set_dtype(torch.float32)
    assert torch.equal(unit.weight, changed)
    unit.weight = unit.weight[:, :2]  # cut, as a fault might
    unit.unround()
    assert torch.equal(unit.weight, changed[:, :2].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_attend_causally_with_one_key_head(dtype: torch.dtype) -> None:
    plain: Any = rough(QueryAttention(24, 3))
    queries = torch.randn(2, 5, 24)
    q, k, v = plain.qkv(queries).split([24, 8, 8], dim=2)
    attend = CausalAttend(3)
    attend.set_dtype(dtype)
    got = plain.out(attend(q / 8**0.5, k, v).float())
    torch.testing.assert_close(got, plain(queries), atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)


@pytest.mark.parametrize("widen", [True, False])
def test_fp16_attention_takes_a_constant_q(widen: bool) -> None:
    q, k, v = torch.randn(1, 4, 16), torch.randn(3, 6, 16), torch.randn(3, 6, 16)
    exact, half = Attend(2, constant_q=True), Attend(2, constant_q=True)
    half.set_dtype(torch.float16)
    half.widen = widen
    got = half(q, k, v)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), exact(q, k, v), atol=5e-3, rtol=0)


def test_pixels_enter_without_rounding_in_float16() -> None:
    greys = torch.arange(256.0)
    entering = (greys - 114) / 64
    assert torch.equal(entering.half().float() * 64 + 114, greys)
    factor, offset = entering_to_normalised()
    want = normalise(greys.to(torch.uint8)[None, :, None, None].expand(1, 256, 1, 3))[0, 0, :, 0]
    torch.testing.assert_close(entering * factor + offset, want)


@pytest.mark.parametrize("size", [8, 16])
def test_a_kernel_for_pixels_as_they_enter(size: int) -> None:
    convolution: Any = rough(nn.Conv2d(3, 10, size, stride=size))
    images = torch.from_numpy(pictures(2))
    want: Tensor = convolution(normalise(images)).flatten(2).transpose(1, 2)
    kernel, gain = patch_kernel(convolution.weight)
    got = patches((images.float() - 114) / 64, size) @ kernel.T.float() + gain.float() + convolution.bias
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
