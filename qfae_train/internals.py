"""What happens inside a model: the figures that decide how much rounding it bears.

Printed with `--verbose`. Hidden states of low rank make a projection amplify what rounding changed in them, and
attention with large logits turns small changes of the logits into other weights: FP16 rounds a logit of 200 by up to
0.06, and with it the exponential by 6 %.

Letters: N images, L tokens, C width of a backbone, D width of the Q-Former, H heads, Q queries, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qfae_train.autoencoder import AnomalyScorer, normalise
from qfae_train.encoder import Encoder
from qfae_train.float32 import whole_float32

IMAGES = 32
"""Images that the command line measures on; covariances of 1,024 channels need several thousand tokens."""

_BATCH = 4
"""Images at a time."""


@dataclass(frozen=True)
class States:
    """The hidden states that one tap of an encoder reads."""

    name: str
    """Such as 'encoder 1, block 5': encoders and blocks are numbered from 1."""
    width: int
    """C, the largest possible effective rank."""
    effective_rank: float
    """From 1, all variance in one direction, to C, the same in all; see `effective_rank`."""
    largest: float
    median: float
    smallest: float
    """Variances of the hidden states along the eigenvectors of their covariance."""


@dataclass(frozen=True)
class Gain:
    """By how much an encoder's projection amplifies the relative rounding errors of its hidden states; see `gain`."""

    name: str
    largest: float
    typical: float


@dataclass(frozen=True)
class Internals:
    """The figures of one model on some images."""

    images: int
    states: list[States]
    gains: list[Gain]
    logits: dict[str, float | None]
    """The largest absolute attention logit by place, scaled as for the softmax; None where no image reaches one."""

    def lines(self) -> list[str]:
        """Return the figures as text."""
        found = [f"internals, on {self.images} images"]
        for one in self.states:
            variances = f"largest {one.largest:.2g}, median {one.median:.2g}, smallest {one.smallest:.2g}"
            found.append(f"  {one.name}: effective rank {one.effective_rank:.1f} of {one.width}; variance {variances}")
        found += [f"  {one.name}: gain largest {one.largest:.1f}, typical {one.typical:.1f}" for one in self.gains]
        shown = [f"{place} {'none' if value is None else f'{value:.1f}'}" for place, value in self.logits.items()]
        return [*found, f"  largest attention logit: {', '.join(shown)}"]


@whole_float32()
@torch.no_grad()
def internals(scorer: AnomalyScorer, images: Tensor) -> Internals:
    """Return the figures of a scorer on uint8 images (N, S, S, 3); their hidden states are kept in memory."""
    was_training = scorer.training
    scorer.eval()
    device = next(scorer.parameters()).device
    encoders = [one for one in scorer.autoencoder.encoders if isinstance(one, Encoder)]
    hidden: list[list[Tensor]] = [[] for _ in encoders]
    logits: dict[str, float | None] = dict.fromkeys(PLACES)
    for part in images.split(_BATCH):
        _look(scorer, encoders, normalise(part.to(device)), hidden, logits)
    scorer.train(was_training)
    states, gains = [], []
    for number, (encoder, parts) in enumerate(zip(encoders, hidden, strict=True), start=1):
        whole = torch.cat(parts)
        for tap, one in zip(encoder.taps, whole.chunk(len(encoder.taps), dim=1), strict=True):
            states.append(_states(f"encoder {number}, block {tap + 1}", one))
        gains.append(Gain(f"encoder {number}, projection", *gain(encoder.projection.weight, whole)))
    return Internals(len(images), states, gains, logits)


def spectrum(states: Tensor) -> Tensor:
    """Return the variances (C,) of states (N, L, C) along the eigenvectors of their covariance, ascending, float64."""
    flat = states.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    return torch.linalg.eigvalsh(flat.T @ flat / len(flat)).clamp_min(0)


def effective_rank(variances: Tensor) -> float:
    """Return exp(entropy of the variances' shares), Roy and Vetterli's effective rank (EUSIPCO 2007) of a covariance.

    1 where all variance lies in one direction, C where it is the same in all; 0 where there is none.
    """
    total = variances.sum()
    if total == 0:
        return 0.0
    shares = variances / total
    return float(torch.special.entr(shares).sum().exp())


def gain(weight: Tensor, states: Tensor) -> tuple[float, float]:
    """Return by how much a projection (D, C) amplifies relative rounding errors of states (N, L, C): largest, typical.

    Rounding changes each channel by a share of its root mean square r, in no particular direction. The projection makes
    of it the same share of W diag(r) times that direction: at most |W diag(r)|, its largest singular value, and in the
    root mean square of the D outputs its Frobenius norm / sqrt(D). Relative to the outputs' own standard deviation d,
    the root of the mean of their variances, that is

        largest = |W diag(r)| / d,    typical = |W diag(r)|_F / (sqrt(D) d).

    Both are about 1 where the states use all directions alike; where the projection whitens a direction of standard
    deviation s, the largest is at least r / s. At a gain of 10, FP16's 0.05 % in the input are 0.5 % in the output.
    """
    x, w = states.flatten(0, 1).double(), weight.double().to(states.device)
    rounded = w * x.square().mean(0).sqrt()
    x = x - x.mean(0)
    spread = ((w @ (x.T @ x / len(x))) * w).sum(dim=1).mean().sqrt()  # variances of the outputs: the diagonal of W C W'
    largest, whole = torch.linalg.matrix_norm(rounded, 2), torch.linalg.matrix_norm(rounded)
    return float(largest / spread), float(whole / len(w) ** 0.5 / spread)


def _states(name: str, states: Tensor) -> States:
    variances = spectrum(states)
    return States(
        name,
        len(variances),
        effective_rank(variances),
        float(variances[-1]),
        float(variances.median()),
        float(variances[0]),
    )


PLACES = ("encoder", "Q-Former self-attention", "Q-Former cross-attention", "decoder", "perceptual")
"""Where there is attention, in the order of the data."""


class _Attentions(TorchFunctionMode):
    """Notes the logits of every attention computed within it; `note` takes each one's largest (Q, L) and `is_causal`.

    The attention itself stays what it is, so the logits are those of the model, wherever they are computed.
    """

    def __init__(self, note: Callable[[Tensor, bool], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]  # [N, H, Q, K], [N, H, L, K]
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            # One image at a time: those of all would take gigabytes at full size.
            largest = [(a @ b.transpose(-2, -1)).abs().amax(dim=0) * scale for a, b in zip(q, k, strict=True)]
            self.note(torch.stack(largest).amax(dim=0), bool(kwargs.get("is_causal")))
        return func(*args, **kwargs)


@contextmanager
def _fused(scorer: AnomalyScorer) -> Iterator[None]:
    """Let timm's attentions use the function that is watched, also where TIMM_FUSED_ATTN=0 says otherwise."""
    modules: list[Any] = [module for module in scorer.modules() if hasattr(module, "fused_attn")]
    before = [module.fused_attn for module in modules]
    try:
        for module in modules:
            module.fused_attn = True
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.fused_attn = was


def _look(
    scorer: AnomalyScorer,
    encoders: list[Encoder],
    x: Tensor,
    hidden: list[list[Tensor]],
    logits: dict[str, float | None],
) -> None:
    """Run normalised images (n, 3, S, S) through all stages; append hidden states, raise the logits by place."""
    autoencoder, options = scorer.autoencoder, scorer.config.score
    seen: list[tuple[Tensor, bool]] = []

    def keep(place: str, found: Tensor) -> None:
        if found.numel():
            logits[place] = max(logits[place] or 0.0, float(found.max()))

    with _fused(scorer), _Attentions(lambda largest, causal: seen.append((largest, causal))):
        states = []
        for encoder, kept in zip(encoders, hidden, strict=True):
            seen.clear()
            states.append(encoder.hidden(x))
            kept.append(states[-1])
            for number, (found, _) in enumerate(seen):
                keep("encoder", _reached(found, encoder.backbone.num_prefix_tokens if number == 0 else 0))
        seen.clear()
        tokens = autoencoder.qformer(autoencoder.context(states))
        own = [found for found, causal in seen if causal]
        cross = [found for found, causal in seen if not causal]
        for found in own[1:]:  # in the first block the queries see each other before they have seen an image
            keep("Q-Former self-attention", found.tril())  # query i sees the queries up to i
        for number, found in enumerate(cross):
            keep("Q-Former cross-attention", found[:, 1:] if number == 0 else found)  # the null token is no image's
        seen.clear()
        reconstruction = autoencoder.decoder(tokens)
        prefix = autoencoder.decoder.register_tokens.shape[1] + 1
        for number, (found, _) in enumerate(seen):
            keep("decoder", _reached(found, prefix if number == 0 else 0))
        seen.clear()
        scorer.perceptual(torch.cat([x, reconstruction]), options.patch_sizes, options.blocks)
        for number, (found, _) in enumerate(seen):
            keep("perceptual", _reached(found, 1 if number < len(options.patch_sizes) else 0))


def _reached(logits: Tensor, prefix: int) -> Tensor:
    """Return the logits (Q, L) without those between the prefix tokens, which no image has reached in a first block."""
    return torch.cat([logits[:prefix, prefix:].flatten(), logits[prefix:].flatten()])
