"""The authors' released checkpoints: their names for our parameters, and how such a file becomes a `Checkpoint`.

A released `last_ckpt.pth` is one plain state dict with the frozen encoders in it; it says neither its architecture nor
its perceptual network, which come from a configuration and from a weight file or timm's hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfae_runtime.errors import UsageError
from qfae_runtime.hashing import sha256_of
from qfae_train.autoencoder import frozen_entries, trained_shapes
from qfae_train.backbone import create, read_frozen
from qfae_train.checkpoint import Checkpoint, CheckpointError, from_parts, read_parts
from qfae_train.config import Config
from qfae_train.positions import sincos_2d
from qfae_train.weight_files import FROM_HUB, WeightFiles
from qfae_train.weights import FLOATS, plain_type, tensors_sha256, unwrapped

NAMES = (
    ("encoders.{n}.backbone.", "encoders.{n}.model."),
    ("encoders.{n}.projection.", "encoders.{n}.final_projection."),
    ("qformer.queries", "junction.queries"),
    ("qformer.blocks.{n}.attention.qkv.", "junction.blocks.{n}.attn.Wqkv."),
    ("qformer.blocks.{n}.attention.out.", "junction.blocks.{n}.attn.out_proj."),
    ("qformer.blocks.{n}.cross.out.", "junction.blocks.{n}.cross_attn.to_out.0."),
    ("qformer.blocks.{n}.cross.out_norm.", "junction.blocks.{n}.cross_attn.to_out.1."),
    ("qformer.blocks.{n}.cross.", "junction.blocks.{n}.cross_attn."),
    ("qformer.blocks.{n}.norm.", "junction.blocks.{n}.projection.0."),
    ("qformer.blocks.{n}.fc1.", "junction.blocks.{n}.projection.1."),
    ("qformer.blocks.{n}.fc2.", "junction.blocks.{n}.projection.3."),
    ("decoder.class_token", "decoder.cls_token"),
    ("decoder.register_tokens", "decoder.reg_tokens"),
    ("decoder.embed.", "decoder.decoder_embed."),
    ("decoder.blocks.", "decoder.decoder_blocks."),
    ("decoder.norm.", "decoder.decoder_norm."),
    ("decoder.predict.", "decoder.decoder_prediction."),
)
"""How names begin, ours and the authors'; {n} is a number. The first that fits holds."""

POSITIONS = "decoder.decoder_pos_embed"
"""The decoder's fixed table, which the authors' files hold and ours compute."""

_UNREAD = re.compile(r"^encoders\.\d+\.model\.(norm|fc_norm|head)\.")
"""Parts of an encoder that stand behind its last block; nothing reads them, so they may be there or not."""

_THEIR_PARTS = ("encoders.", "junction.", "decoder.")


def ours(name: str) -> str:
    """Return our name of one of the authors' parameters; the name itself where it is none of them."""
    return _renamed(name, [(their, our) for our, their in NAMES])


def theirs(name: str) -> str:
    """Return the authors' name of one of our parameters, so that a fault is told in the names of the user's file."""
    return _renamed(name, NAMES)


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for before, after in pairs:
        found = re.match(re.escape(before).replace(r"\{n\}", r"(\d+)"), name)
        if found:
            return after.replace("{n}", found.group(1) if found.groups() else "") + name[found.end() :]
    return name


def is_official(content: Mapping[str, Any]) -> bool:
    """Tell whether a file holds the authors' state dict, by its names."""
    return bool(content) and all(str(name).startswith(_THEIR_PARTS) for name in content)


def open_checkpoint(path: Path, config: Config | None = None, files: WeightFiles = FROM_HUB) -> Checkpoint:
    """Return a checkpoint of this project, or one of the authors' together with its configuration.

    Raises:
        UsageError: the authors' file came without a configuration, or ours with one.
        CheckpointError: it is missing, damaged, would run code, or does not fit the configuration (every name is
            listed, with what was expected and what was got).
        WeightsError: the perceptual network's weights cannot be had.

    """
    return open_parts(path, read_parts(path), config, files)


def open_parts(
    path: Path, content: dict[str, Any], config: Config | None = None, files: WeightFiles = FROM_HUB
) -> Checkpoint:
    """Return the checkpoint in the parts that `read_parts` returned; errors as in `open_checkpoint`."""
    state = unwrapped(content)
    if not is_official(state):
        if config is not None and "format" in content:
            raise UsageError(
                f"--preset, --config: {path} holds its own configuration; leave them out (they are for the authors' "
                "checkpoints)"
            )
        return from_parts(path, content, files)
    if config is None:
        raise UsageError(
            f"{path}: a checkpoint of the authors' release, which does not say its architecture; name it with "
            "--preset or --config"
        )
    return _converted(path, state, files.applied_to(config))


def _converted(path: Path, state: dict[str, Tensor], config: Config) -> Checkpoint:
    _check(path, state, config)
    embedded, records = {}, []
    for number, entry in enumerate(config.model.encoders):
        prefix = f"encoders.{number}.model."
        tensors = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        records.append({"timm": entry.timm, "source": path.name, "sha256": tensors_sha256(tensors)})
        embedded[records[-1]["sha256"]] = tensors
    perceptual, record = read_frozen(*frozen_entries(config)[-1])
    embedded[record["sha256"]] = perceptual
    size = config.model.image_size
    return Checkpoint(
        config=config,
        trained={ours(name): tensor for name, tensor in state.items() if ".model." not in name and name != POSITIONS},
        frozen=[*records, record],
        embedded=embedded,
        parity_images=torch.zeros(0, size, size, 3, dtype=torch.uint8),
        record={"origin": "the authors' release"},
        sha256=sha256_of(path),
    )


def _check(path: Path, state: Mapping[str, Tensor], config: Config) -> None:
    """Hold every name and size against the configuration.

    Raises:
        CheckpointError: something is missing, unknown, of another size, or another position table; all of it.

    """
    expected = expected_shapes(config)
    faults = [
        f"{name}: expected {shape}, missing"
        for name, shape in expected.items()
        if name not in state and not _UNREAD.match(name) and name != POSITIONS
    ]
    for name, tensor in state.items():
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if name not in expected and not _UNREAD.match(name):
            faults.append(f"{name}: not a part of this architecture, got {got}")
        elif name in expected and got != expected[name]:
            faults.append(f"{name}: expected {expected[name]}, got {got}")
        elif isinstance(tensor, Tensor) and tensor.dtype not in (FLOATS if ".model." in name else FLOATS[:1]):
            faults.append(f"{name}: expected float32, got {plain_type(tensor.dtype)}")
    table = state.get(POSITIONS)
    if not faults and table is not None:
        side = config.model.image_size // config.model.decoder.patch_size
        error = float((table[0].float() - sincos_2d(config.model.decoder.dim, side)).abs().max())
        if error > 1e-4:
            faults.append(f"{POSITIONS}: expected the sine-cosine table, got one that differs by up to {error:.2g}")
    if faults:
        listed = "\n  ".join(sorted(faults))
        raise CheckpointError(
            f"checkpoint '{path}': does not fit the configuration ({len(faults)} of its names); pass the --preset or "
            f"--config it was trained with:\n  {listed}"
        )


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the authors' names and sizes of a whole checkpoint of this configuration, without allocating weights."""
    with torch.device("meta"):
        encoders = [create(entry, config.model.image_size) for entry in config.model.encoders]
        shapes = {
            f"encoders.{number}.model.{name}": tuple(tensor.shape)
            for number, encoder in enumerate(encoders)
            for name, tensor in encoder.state_dict().items()
        }
    shapes |= {theirs(name): shape for name, shape in trained_shapes(config).items()}
    return shapes | {POSITIONS: (1, config.model.qformer.queries, config.model.decoder.dim)}
