"""The operations of the inference graph: what training's layers become when nothing has to be learned any more.

Every operation is a module that computes in one type (`dtype`), FP32 until `set_dtype` changes it, and casts what
comes in. Rewritings are exact in real numbers; each says why it holds. What they fold is folded in FP64 and rounded
once.

Letters: B images, T tokens, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn
from torch.func import functional_call

from qfae_train.backbone import is_plain

CENTRE, UNIT = 114.0, 64.0
"""Pixels enter as (grey - CENTRE) / UNIT: exact in float16 for every grey level, and close to the normalised scale."""

_DECOMPOSED = (torch.float32, torch.float64)
"""Types in which attention is products and a softmax; in others it is one operation."""


class Unit(nn.Module):
    """An operation with a type of its own; its place in the graph names it in a precision policy."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.rounds = False
        self.folded: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor | None) -> None:
        """Register a constant in FP32, and note what rounding took from an FP64 value."""
        if value is None:
            self.register_buffer(name, None)
            return
        value = value.detach()
        single = value.float()
        self.register_buffer(name, single)
        if not torch.equal(value, single.to(value.dtype)):
            rest = (value - single).float()
            # Rounded up to half a step, it would make another number of the constant when that is FP32 again.
            over = (single + rest.double()).float() != single
            rest = torch.where(over, torch.nextafter(rest, torch.zeros_like(rest)), rest)
            self.folded[name] = rest

    def unround(self) -> None:
        """Compute in FP64 from now on, with constants as they were before they were rounded to FP32, to 1e-14."""
        self.set_dtype(torch.float64)
        for name, rest in self.folded.items():
            kept = self.get_buffer(name)
            if kept.shape == rest.shape:
                kept += rest.to(kept.device)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on; stored constants are converted."""
        self.dtype = dtype
        self.to(dtype)

    def emulate(self) -> None:
        """Compute FP16 in FP32 from now on, rounding what comes in and what goes out; FP16 itself is slow on a CPU.

        What passes float16's range becomes infinite, as it does there.
        """
        self.rounds = self.dtype == torch.float16
        self.set_dtype(torch.float32)

    def taken(self, x: Tensor) -> Tensor:
        """Return what comes in, in the unit's type."""
        return self.given(x.to(self.dtype))

    def given(self, x: Tensor) -> Tensor:
        """Return what goes out, rounded where FP16 is emulated."""
        return x.half().float() if self.rounds else x


class Linear(Unit):
    """`x @ weight + bias`. The weight is stored as it is multiplied, [in, out]: nothing is transposed at run time.

    `input_range`, least and largest value of x, is set where the product is to be INT8 in a file (int8.py).
    `adds_bias` leaves the bias to PyTorch's product, which saves a pass over memory there; engines fuse an addition of
    its own, and it is what they are given.
    """

    weight: Tensor
    bias: Tensor | None
    adds_bias = False
    input_range: tuple[float, float] | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take a weight as torch keeps it, [out, in]."""
        super().__init__()
        self.keep("weight", weight.t().contiguous())
        self.keep("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] from [..., in]."""
        if self.adds_bias and self.bias is not None:
            return self.given(F.linear(self.taken(x), self.weight.t(), self.bias))
        y = self.given(torch.matmul(self.taken(x), self.weight))
        return y if self.bias is None else self.given(y + self.bias)


class Norm(Unit):
    """LayerNorm. Its statistics are FP32 whatever its type: ONNX's LayerNormalization and torch's agree in that."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.keep("weight", norm.weight)
        self.keep("bias", norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] of the same shape."""
        return self.given(F.layer_norm(self.taken(x), self.weight.shape, self.weight, self.bias, self.eps))


class Residual(Unit):
    """The sum of a residual stream and what a sub-layer adds to it."""

    def forward(self, stream: Tensor, update: Tensor) -> Tensor:
        """Return [..., D]."""
        return self.given(self.taken(stream) + self.taken(update))


class Attend(Unit):
    """softmax(q k^T) v for every head. The scale is part of the weights that made q.

    FP32: as products and a softmax, which every ONNX runtime runs. FP16: as one attention operation. `widen` casts its
    operands to FP32 first, which makes TensorRT take a fused kernel that accumulates in FP32; PyTorch's own kernels
    accumulate so anyway, and are slow on wide operands. A `constant_q` is repeated for the batch before all that:
    repeated afterwards, its cast would be folded into the constant, and no fused kernel fits what is left.
    """

    def __init__(self, heads: int, *, constant_q: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.constant_q = constant_q
        self.widen = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Tq, H * K] from q [B, Tq, H * K] and k, v [B, Tk, H * K]; a constant q has B = 1."""
        if self.constant_q and self.dtype not in _DECOMPOSED:
            q = q.expand(k.shape[0], -1, -1)
        q, k, v = (self._split(self.taken(part)) for part in (q, k, v))  # each [B, H, T, K]
        if self.dtype in _DECOMPOSED:
            attended = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1), v)
        else:
            attended = _one_operation(q, k, v, widen=self.widen)
        return self.given(attended.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        heads: Tensor = tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return heads


class TransformerBlock(nn.Module):
    """timm's plain pre-norm block, its constants folded.

    - LayerScale multiplies what `proj` and `fc2` give: it is multiplied into their rows.
    - The attention's scale is multiplied into q's rows.
    - k's bias adds the same number to every logit of a query, which the softmax takes out: it is dropped.
    - v's bias passes the softmax unchanged, since weights sum to 1: it is moved behind the attention.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        width = attention.qkv.in_features
        self.norm1 = Norm(block.norm1)
        q, k, v = exact(attention.qkv.weight).split(width)
        scale = 1 / math.sqrt(width // attention.num_heads)
        of_q, _, of_v = _bias(attention.qkv).split(width)
        self.qkv = Linear(torch.cat([q * scale, k, v]), torch.cat([of_q * scale, of_v.new_zeros(2 * width)]))
        self.attention = Attend(attention.num_heads)
        through = torch.mv(exact(attention.proj.weight), of_v)
        self.proj = _scaled(attention.proj, block.ls1, through)
        self.residual1 = Residual()
        self.norm2 = Norm(block.norm2)
        self.fc1 = Linear(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2 = _scaled(mlp.fc2, block.ls2)
        self.residual2 = Residual()

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return [B, T, D]; `lengths` cut T into sequences that do not see each other."""
        qkv = self.qkv(self.norm1(x))
        parts = qkv.split(list(lengths), dim=1) if len(lengths) > 1 else [qkv]
        attended = [self.attention(*part.chunk(3, dim=2)) for part in parts]
        joined = torch.cat(attended, dim=1) if len(attended) > 1 else attended[0]
        x = self.residual1(x, self.proj(joined))
        out: Tensor = self.residual2(x, self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return out


class CausalAttend(Unit):
    """Self-attention of the queries: query i sees those up to i, and all heads share one key and one value head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.widen = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, Q, H * K] from q [B, Q, H * K] and k, v [B, Q, K]."""
        q = self.taken(q).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, Q, K]
        k, v = (self.taken(part)[:, None] for part in (k, v))  # [B, 1, Q, K]
        if self.dtype in _DECOMPOSED:
            unseen = torch.full((q.shape[2], q.shape[2]), -math.inf, device=q.device).triu(1)
            logits = torch.matmul(q, k.transpose(2, 3)) + unseen
            attended = torch.matmul(torch.softmax(logits, dim=-1), v)
        else:
            # Copied, for TensorRT finds no fused kernel for heads that share their memory.
            k, v = (part.repeat(1, self.heads, 1, 1) for part in (k, v))
            attended = _one_operation(q, k, v, widen=self.widen, causal=True)
        return self.given(attended.transpose(1, 2).flatten(2))


def _one_operation(q: Tensor, k: Tensor, v: Tensor, *, widen: bool, causal: bool = False) -> Tensor:
    if widen:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal, scale=1.0).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)


class Constant(Unit):
    """What reads no image, computed once."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.keep("value", value)

    def forward(self) -> Tensor:
        """Return the constant."""
        return self.value


class Embed(nn.Module):
    """A product, a table of positions added to it, and tokens that stand before it: where a residual stream begins.

    It has the wider type of product and table.
    """

    def __init__(self, product: Linear, table: Tensor, prefix: Tensor) -> None:
        """Take the table [1, T, D] with the product's bias added, and the prefix [1, P, D]."""
        super().__init__()
        self.product = product
        self.table = Constant(table)
        self.prefix = Constant(prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, P + T, D] from [B, T, in]."""
        tokens: Tensor = self.product(x) + self.table()
        prefix = self.prefix()
        if prefix.shape[1] == 0:
            return tokens
        return torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)


class ForeignBlock(Unit):
    """A block of another kind than timm's plain one, as timm computes it, in FP32 (or FP64) whatever the policy."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        for module in block.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # as products and a softmax: no engine fuses an FP32 attention
        self.block = block

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Stay in FP32 where less is asked for: its own operations are not known here."""
        super().set_dtype(torch.promote_types(dtype, torch.float32))

    def emulate(self) -> None:
        """Stay in FP32."""

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return [B, T, D]."""
        if len(lengths) > 1:
            raise ValueError("a foreign block takes one sequence")
        out: Tensor = self.block(x.to(self.dtype))
        return out


def inference_block(block: Any) -> nn.Module:
    """Return the block's form for inference: folded if it is timm's plain block, as it is otherwise."""
    return TransformerBlock(block) if is_plain(block) else ForeignBlock(block)


def exact(tensor: Tensor) -> Tensor:
    """Return a parameter in FP64, where folding is done."""
    return tensor.detach().double()


def exactly(module: nn.Module, *inputs: Tensor, reads: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return what a module computes in FP64 with its FP32 parameters, which stay as they are.

    `reads` are the parameters that it needs, by name; all of them unless told.
    """
    needed = dict((*module.named_parameters(), *module.named_buffers())) if reads is None else reads
    tensors = {name: exact(one) for name, one in needed.items() if one.is_floating_point()}
    with torch.no_grad():
        out: Tensor = functional_call(module, tensors, tuple(exact(one) for one in inputs))
    return out


def chained(second: nn.Linear, first: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one product that equals `second(first(x))`, in FP64."""
    outer, inner = exact(second.weight), exact(first.weight)
    return outer @ inner, outer @ _bias(first) + _bias(second)


def patch_kernel(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a patch kernel for pixels as they enter: return it [D, p * p * 3] and what its bias gains, [D], in FP64.

    `kernel` [D, 3, p, p] expects normalised pixels, a * (what enters) + b; the sum over a * kernel takes the first, b
    times its sum is added to the bias.
    """
    factor, offset = entering_to_normalised()
    flat = exact(kernel).permute(0, 2, 3, 1).flatten(1)  # patches are flattened row, column, colour
    return flat * factor, flat.sum(dim=1) * offset


def entering_to_normalised() -> tuple[float, float]:
    """Return a and b of normalised = a * entering + b, for the normalisation of training."""
    from qfae_train.autoencoder import MEAN, STD

    return UNIT / 255 / STD, (CENTRE / 255 - MEAN) / STD


def patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Return [B, T, p * p * 3], row by row, from pixels [B, S, S, 3]."""
    grid = pixels.shape[1] // patch_size
    cut = pixels.reshape(-1, grid, patch_size, grid, patch_size * 3)  # rows of a patch lie apart, columns do not
    return cut.transpose(2, 3).reshape(-1, grid * grid, patch_size * patch_size * 3)


def _bias(linear: nn.Linear) -> Tensor:
    if linear.bias is None:
        return torch.zeros(linear.out_features, dtype=torch.float64)
    return exact(linear.bias)


def _scaled(linear: nn.Linear, scale: nn.Module, added: Tensor | None = None) -> Linear:
    bias = _bias(linear) if added is None else _bias(linear) + added
    if not isinstance(scale, LayerScale):
        return Linear(linear.weight, bias)
    gamma = exact(scale.gamma)
    return Linear(exact(linear.weight) * gamma[:, None], bias * gamma)
