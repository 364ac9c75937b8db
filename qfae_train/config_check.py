"""Combinations of options that cannot be built, found before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from qfae_runtime.preprocess import MAX_IMAGE_SIZE, PREPROCESS_KINDS
from qfae_train.backbone import describe
from qfae_train.backbone_args import (
    LARGEST_DEPTH,
    LARGEST_HEADS,
    LARGEST_MLP_RATIO,
    LARGEST_PATCH,
    LARGEST_WIDTH,
    argument_faults,
)
from qfae_train.config import MAX_SEED, Backbone, Config, Decoder, QFormer

SMALLEST_IMAGE = 16

LARGEST_GRID = 256
"""Patches per side, of encoders, decoder and perceptual network: the attention is over their square."""

LARGEST_MODEL = 4_000_000_000
"""Parameters of one backbone, or of all that is trained: 16 GB in FP32. timm's largest has 2.7e9."""

MOST_ENCODERS = 8

LARGEST_LR = 1e36
"""Adam multiplies it by ten in its first step, in float32."""

LARGEST_COUNT = 1_000_000
"""Epochs, images in a batch, versions of an image."""


Known = Callable[..., bool]
"""Tells whether the values of all the given keys are those the user meant; only then is a check worth its sentence."""


def contradictions(config: Config, faulty: Sequence[str] = ()) -> list[str]:
    """Return one sentence per impossible value or combination: the key, the value and what would be accepted.

    `faulty` are keys whose values are blanks, their faults being told already: what depends on one is not checked.
    """

    def known(*keys: str) -> bool:
        return not any(_within(key, fault) or _within(fault, key) for key in keys for fault in faulty)

    return [
        *_sizes(config, known),
        *_attention(config, known),
        *_ranges(config, known),
        *_total(config, known),
        *_backbones(config, known),
    ]


def _within(key: str, table: str) -> bool:
    return key == table or key.startswith((f"{table}.", f"{table}["))


def _sizes(config: Config, known: Known) -> Iterable[str]:
    size = config.model.image_size
    if not known("model.image_size"):
        return
    if not SMALLEST_IMAGE <= size <= MAX_IMAGE_SIZE:
        yield f"model.image_size: got {size}; accepted are {SMALLEST_IMAGE} to {MAX_IMAGE_SIZE} pixels"
        return
    for key, values in {
        "model.decoder.patch_size": (config.model.decoder.patch_size,),
        "loss.patch_sizes": config.loss.patch_sizes,
        "score.patch_sizes": config.score.patch_sizes,
    }.items():
        if not known(key):
            continue
        if not values:
            yield f"{key}: got an empty list; at least one patch size is needed"
        if len(set(values)) < len(values):
            yield f"{key}: got {list(values)}; each patch size may stand there once"
        for value in values:
            accepted = ", ".join(str(d) for d in _patch_sizes(size))
            if value < 1 or size % value:
                yield f"{key}: {value} does not divide the image size {size}; accepted are {accepted}"
            elif not _sane_patch(size, value):
                yield f"{key}: got {value} for the image size {size}; accepted are {accepted}"
    patch = config.model.decoder.patch_size
    told = not known("model.decoder.patch_size", "model.qformer.queries") or patch < 1 or size % patch
    if not told and config.model.qformer.queries != (size // patch) ** 2:
        side = size // patch
        yield (
            f"model.qformer.queries: got {config.model.qformer.queries}; the decoder's {side}x{side} grid of "
            f"{patch}-pixel patches needs {side * side}"
        )


def _sane_patch(size: int, patch: int) -> bool:
    return patch <= LARGEST_PATCH and size // patch <= LARGEST_GRID


def _patch_sizes(size: int) -> list[int]:
    return [d for d in range(4, size // 2 + 1) if size % d == 0 and _sane_patch(size, d)]


def _attention(config: Config, known: Known) -> Iterable[str]:
    parts: dict[str, QFormer | Decoder] = {"model.qformer": config.model.qformer, "model.decoder": config.model.decoder}
    for part, options in parts.items():
        key, dim, heads = f"{part}.heads", options.dim, options.heads
        if known(key, f"{part}.dim") and (heads < 1 or dim < 1 or dim % heads):
            yield f"{key}: {heads} heads do not divide the width {dim}"
    for part, options in parts.items():
        ratio, width = options.mlp_ratio, options.dim * options.mlp_ratio
        if known(f"{part}.dim", f"{part}.mlp_ratio") and ratio > 0 and 0 < width < 1:
            yield f"{part}.mlp_ratio: got {ratio}; {options.dim} times it is the hidden width, which must be at least 1"
    for part, options in parts.items():
        if known(f"{part}.dim") and options.dim % 4:
            yield f"{part}.dim: got {options.dim}; the sine-cosine table needs a multiple of 4"


def _model_bounds(config: Config) -> list[tuple[str, float, float]]:
    """Return keys of the model's sizes, their values, and the largest that are accepted."""
    qformer, decoder = config.model.qformer, config.model.decoder
    return [
        ("model.qformer.blocks", qformer.blocks, LARGEST_DEPTH),
        ("model.qformer.dim", qformer.dim, LARGEST_WIDTH),
        ("model.qformer.heads", qformer.heads, LARGEST_HEADS),
        ("model.qformer.cross_head_dim", qformer.cross_head_dim, 1024),
        ("model.qformer.mlp_ratio", qformer.mlp_ratio, LARGEST_MLP_RATIO),
        ("model.decoder.depth", decoder.depth, LARGEST_DEPTH),
        ("model.decoder.dim", decoder.dim, LARGEST_WIDTH),
        ("model.decoder.heads", decoder.heads, LARGEST_HEADS),
        ("model.decoder.mlp_ratio", decoder.mlp_ratio, LARGEST_MLP_RATIO),
        ("model.decoder.register_tokens", decoder.register_tokens, 1024),
    ]


def _total(config: Config, known: Known) -> Iterable[str]:
    bounds = _model_bounds(config)
    within = all(value <= largest for _, value, largest in bounds)
    count = trained_parameters(config) if within and known("model.qformer", "model.decoder") else 0
    if count > LARGEST_MODEL:
        yield f"model: {count:.2g} trained parameters in Q-Former and decoder; accepted are up to {LARGEST_MODEL:.0e}"


def _ranges(config: Config, known: Known) -> Iterable[str]:
    train, augment = config.train, config.augment
    positive = {
        "model.qformer.blocks": config.model.qformer.blocks,
        "model.qformer.cross_head_dim": config.model.qformer.cross_head_dim,
        "model.qformer.mlp_ratio": config.model.qformer.mlp_ratio,
        "model.decoder.depth": config.model.decoder.depth,
        "model.decoder.mlp_ratio": config.model.decoder.mlp_ratio,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.lr": train.lr,
        "train.validate_every": train.validate_every,
    }
    for key, value in positive.items():
        if known(key) and value <= 0:
            yield f"{key}: got {value}; it must be above 0"
    for key, value in {
        "model.decoder.register_tokens": config.model.decoder.register_tokens,
        "train.workers": train.workers,
        "train.seed": train.seed,
        "train.grad_clip": train.grad_clip,
        "augment.rotation": augment.rotation,
        "augment.paste_variants": augment.paste_variants,
        "augment.jitter": augment.jitter,
    }.items():
        if known(key) and value < 0:
            yield f"{key}: got {value}; it must not be negative"
    for key, value, largest in (
        *_model_bounds(config),
        ("train.seed", train.seed, MAX_SEED),
        ("train.lr", train.lr, LARGEST_LR),
        ("train.epochs", train.epochs, LARGEST_COUNT),
        ("train.batch_size", train.batch_size, LARGEST_COUNT),
        ("train.workers", train.workers, 1024),
        ("augment.paste_variants", augment.paste_variants, LARGEST_COUNT),
    ):
        if known(key) and value > largest:
            yield f"{key}: got {value}; accepted are values up to {largest}"
    for key, value in {
        "model.qformer.dropout": config.model.qformer.dropout,
        "train.pct_start": train.pct_start,
        "train.pixel_warmup": train.pixel_warmup,
        "augment.vertical_flip": augment.vertical_flip,
        "augment.paste": augment.paste,
    }.items():
        if known(key) and not 0 <= value <= 1:
            yield f"{key}: got {value}; accepted are values from 0 to 1"
    for key, ends in {
        "augment.crop_scale": augment.crop_scale,
        "augment.crop_ratio": augment.crop_ratio,
    }.items():
        if known(key) and not 0 < ends[0] <= ends[1]:
            low, high = ends
            yield f"{key}: got [{low}, {high}]; it must be a range of positive numbers, smallest first"
    if known("preprocess.kind") and config.preprocess.kind not in PREPROCESS_KINDS:
        accepted = ", ".join(repr(kind) for kind in PREPROCESS_KINDS)
        yield f"preprocess.kind: got {config.preprocess.kind!r}; accepted are {accepted}"


def _backbones(config: Config, known: Known) -> Iterable[str]:
    size, sized = config.model.image_size, known("model.image_size")
    if known("model.encoders") and not config.model.encoders:
        yield "model.encoders: got an empty list; at least one encoder is needed"
    if len(config.model.encoders) > MOST_ENCODERS:
        yield f"model.encoders: got {len(config.model.encoders)}; accepted are at most {MOST_ENCODERS}"
        return
    if known("model.hidden_states") and not config.model.hidden_states:
        yield "model.hidden_states: got an empty list; at least one is needed"
    for number, encoder in enumerate(config.model.encoders):
        key = f"model.encoders[{number}]"
        own = f"{key}.hidden_states" if encoder.hidden_states else "model.hidden_states"
        depth, faults = _depth(encoder, size, key) if sized and known(key) else (0, [])
        yield from faults
        for state in (encoder.hidden_states or config.model.hidden_states) if depth and known(own) else ():
            if not -depth <= state <= -1:
                yield f"{own}: {state} for {key}, which has {depth} blocks; accepted are -1 to -{depth}"
    perceptual = config.perceptual
    entry = Backbone(perceptual.timm, perceptual.patch_size, perceptual.args, perceptual.weights)
    depth, faults = _depth(entry, size, "perceptual") if sized and known("perceptual") else (0, [])
    yield from faults
    for fault in describe(entry, size).unlike_mae if depth else ():
        yield f"perceptual: {entry.timm!r} has {fault}; accepted are plain vision transformers such as MAE's"
    for key, blocks in (("loss.blocks", config.loss.blocks), ("score.blocks", config.score.blocks)):
        if not known(key):
            continue
        if not blocks:
            yield f"{key}: got an empty list; at least one block is needed"
        if len(set(blocks)) < len(blocks):
            yield f"{key}: got {list(blocks)}; each block may stand there once"
        for block in blocks if depth else ():
            if not 1 <= block <= depth:
                yield f"{key}: block {block} of a perceptual network with {depth} blocks; accepted are 1 to {depth}"


def _depth(backbone: Backbone, image_size: int, key: str) -> tuple[int, list[str]]:
    """Return the number of blocks, and what is wrong with the entry (then the number is 0)."""
    faults = list(argument_faults(backbone, key))
    if faults:
        return 0, faults
    if backbone.patch_size < 1 or image_size % backbone.patch_size:
        return 0, [f"{key}.patch_size: {backbone.patch_size} does not divide the image size {image_size}"]
    if not _sane_patch(image_size, backbone.patch_size):
        accepted = ", ".join(str(d) for d in _patch_sizes(image_size))
        return 0, [
            f"{key}.patch_size: got {backbone.patch_size} for the image size {image_size}; accepted are {accepted}"
        ]
    try:
        shape = describe(backbone, image_size)
    except Exception as error:  # each of timm's models raises its own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return 0, [f"{key}: {backbone.timm!r} with args {backbone.args} cannot be used: {reason}"]
    if shape.patch_size != backbone.patch_size:
        return 0, [
            f"{key}.patch_size: got {backbone.patch_size}, but {backbone.timm!r} has patches of {shape.patch_size}"
        ]
    if shape.parameters > LARGEST_MODEL:
        return 0, [
            f"{key}: {backbone.timm!r} with args {backbone.args} has {shape.parameters:.2g} parameters; accepted are "
            f"up to {LARGEST_MODEL:.0e}"
        ]
    return shape.depth, []


def trained_parameters(config: Config) -> float:
    """Return about how many parameters are trained, the projections of the encoders left out."""
    qformer, decoder = config.model.qformer, config.model.decoder
    crossed = (qformer.blocks + 1) // 2
    read = qformer.dim * (qformer.queries + qformer.blocks * qformer.dim * (2 + 2 * qformer.mlp_ratio))
    read += crossed * 4 * qformer.dim * qformer.heads * qformer.cross_head_dim
    drawn = decoder.depth * decoder.dim**2 * (4 + 2 * decoder.mlp_ratio)
    return read + drawn + decoder.dim * (qformer.dim + decoder.register_tokens + 3 * decoder.patch_size**2)
