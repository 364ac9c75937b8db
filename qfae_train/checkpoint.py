"""The checkpoint file: everything export needs, nothing that runs.

One zip of plain tensors, numbers and strings (`torch.save`), read by `torch_file`, which runs nothing:

    format     int                  version of this layout
    config     dict                 the configuration, weight files by their bare names
    trained    {name: tensor}       projections, Q-Former, decoder
    frozen     [record, ...]        encoders, then perceptual network: timm name, source, SHA-256
    embedded   {sha256: {name: tensor}}  frozen weights that came from a file and cannot be downloaded again
    embedded_sha256  {sha256: sha256}    of each of these tables, by the file's
    preprocess {spec, sha256}       what the images went through
    parity_images  uint8 (N, S, S, 3)    held-out images, so that export can measure on real ones
    record     dict                 how the training went
    conditioning  dict or None      how far rounding moves its scores; files of earlier versions have none
    resume     dict                 optimiser state; only in the last checkpoint of a run
"""

from __future__ import annotations

import dataclasses
import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfae_runtime.errors import QfaeError
from qfae_runtime.hashing import sha256_of
from qfae_train.autoencoder import AnomalyScorer, assemble, frozen_entries, frozen_model, trained_shapes
from qfae_train.backbone import read_frozen
from qfae_train.checkpoint_check import (
    CONDITIONING,
    EMBEDDED_SHA256,
    PARTS,
    conditioning_of,
    damage,
    embedded_faults,
    fit_faults,
    image_faults,
    preprocessing_faults,
    read_error,
    some,
)
from qfae_train.conditioning import Conditioning
from qfae_train.config import Backbone, Config, ConfigError, from_dict
from qfae_train.output import whole_file
from qfae_train.torch_archive import TorchFileError
from qfae_train.torch_file import read_torch_file
from qfae_train.weight_files import FROM_HUB, WeightFiles
from qfae_train.weights import WeightsError, read_tensors, tensors_sha256

FORMAT = 1


class CheckpointError(QfaeError):
    """A checkpoint is missing, unreadable, of another version, or does not fit its own configuration."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model; see the module's table for the parts."""

    config: Config
    trained: dict[str, Tensor]
    frozen: list[dict[str, str]]
    embedded: dict[str, dict[str, Tensor]]
    parity_images: Tensor
    record: dict[str, Any]
    resume: dict[str, Any] = field(default_factory=dict)
    conditioning: Conditioning | None = None
    """None: nobody measured it."""
    sha256: str = ""
    """Of the file it was read from; '' before it is saved."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint whole or not at all: to a neighbour first, then renamed.

    Raises:
        OutputError: it cannot be written.

    """
    spec = checkpoint.config.preprocess_spec()
    content = {
        "format": FORMAT,
        "config": portable_config(checkpoint.config),
        "trained": {name: tensor.detach().cpu() for name, tensor in checkpoint.trained.items()},
        "frozen": checkpoint.frozen,
        "embedded": checkpoint.embedded,
        EMBEDDED_SHA256: {digest: tensors_sha256(table) for digest, table in checkpoint.embedded.items()},
        "preprocess": {"spec": spec.to_dict(), "sha256": spec.sha256()},
        "parity_images": checkpoint.parity_images,
        "record": checkpoint.record,
        "resume": checkpoint.resume,
        CONDITIONING: checkpoint.conditioning.to_dict() if checkpoint.conditioning is not None else None,
    }
    with whole_file(path) as unfinished:
        try:
            torch.save(content, unfinished)
        except RuntimeError as error:  # how torch's writer, which is not Python's, says that the disk is full
            raise OSError(errno.EIO, f"torch could not write it: {str(error).splitlines()[0]}") from None


def load(path: Path) -> Checkpoint:
    """Return the checkpoint that this project wrote at `path`; `official.open_checkpoint` also takes the authors'.

    Raises:
        CheckpointError: it is missing, damaged, would run code, is of another version, asks for preprocessing that
            this version does not do, or holds frozen weights that it was not trained with.

    """
    return from_parts(path, read_parts(path))


def from_parts(path: Path, content: dict[str, Any], files: WeightFiles = FROM_HUB) -> Checkpoint:
    """Check and take the parts that `read_parts` returned; errors as in `load`.

    `files` are taken in place of embedded weights that are not those it was trained with.
    """
    wrong = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise CheckpointError(f"checkpoint '{path}': not written by qfae-train ({', '.join(wrong)} missing or damaged)")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint '{path}': format {content['format']!r}, but this version reads {FORMAT}; "
            "install the qfae version that wrote it, or train again"
        )
    faults = damage(content)
    if faults:
        raise CheckpointError(f"checkpoint '{path}': damaged inside: {some(faults)}; train or download it again")
    try:
        config = from_dict(content["config"])
    except ConfigError as error:
        raise CheckpointError(f"checkpoint '{path}': its configuration is not valid: {some(error.faults)}") from None
    faults = preprocessing_faults(content["preprocess"], config)
    if faults:
        raise CheckpointError(
            f"checkpoint '{path}': trained on images preprocessed otherwise than this version does it: {some(faults)}"
        )
    faults = image_faults(content["parity_images"], config.model.image_size)
    if faults:
        raise CheckpointError(f"checkpoint '{path}': damaged inside: {some(faults)}; train or download it again")
    faults = embedded_faults(content, files)
    if faults:
        raise CheckpointError(f"checkpoint '{path}': {some(faults)}")
    return Checkpoint(
        config=config,
        trained=content["trained"],
        frozen=content["frozen"],
        embedded=content["embedded"],
        parity_images=content["parity_images"],
        record=content["record"],
        resume=content["resume"],
        conditioning=conditioning_of(content),
        sha256=sha256_of(path),
    )


def read_parts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint file holds, unpickling plain tensors, numbers and strings only.

    Raises:
        CheckpointError: no such file, it would run code, it is damaged, or it is no table of parts.

    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{path}': no such file")
    try:
        content = read_torch_file(path)
    except (TorchFileError, OSError) as error:
        raise CheckpointError(read_error(path, error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint '{path}': expected a table of parts, got {type(content).__name__}")
    return content


def portable_config(config: Config) -> dict[str, Any]:
    """Return the configuration as plain tables, without the folders of the machine it ran on."""
    table = config.to_dict()
    for entry in [table["perceptual"], *table["model"]["encoders"]]:
        entry["weights"] = Path(entry["weights"]).name if entry["weights"] else ""
    return table


def embed_frozen(config: Config, frozen: list[dict[str, str]]) -> dict[str, dict[str, Tensor]]:
    """Return the frozen weights that came from files, by SHA-256; equal files are kept once."""
    return {
        record["sha256"]: read_tensors(Path(entry.weights))[0]
        for (entry, _), record in zip(frozen_entries(config), frozen, strict=True)
        if entry.weights
    }


def build_scorer(checkpoint: Checkpoint, files: WeightFiles = FROM_HUB) -> AnomalyScorer:
    """Return the checkpoint's model on the CPU, in eval mode, float32.

    `files` supply frozen weights that are not in the checkpoint, in place of the hub.

    Raises:
        CheckpointError: trained tensors do not fit the configuration.
        WeightsError: frozen weights cannot be had, or are not the ones the model was trained with.

    """
    config = checkpoint.config
    _check_fit(trained_shapes(config), checkpoint)  # before weights are allocated that a configuration only claims
    backbones = frozen_backbones(checkpoint, files)
    scorer = assemble(config, backbones[:-1], backbones[-1])
    load_trained(scorer, checkpoint)
    return scorer.eval()


def frozen_backbones(checkpoint: Checkpoint, files: WeightFiles = FROM_HUB) -> list[nn.Module]:
    """Return the frozen backbones at full depth, encoders first, the perceptual network last; errors as above."""
    config = checkpoint.config
    entries = frozen_entries(files.applied_to(without_files(config)))
    if len(checkpoint.frozen) != len(entries):
        raise CheckpointError(
            f"checkpoint: {len(entries)} frozen backbones in its config, {len(checkpoint.frozen)} recorded"
        )
    backbones = []
    for number, ((entry, option), record) in enumerate(zip(entries, checkpoint.frozen, strict=True)):
        state, source = _frozen_tensors(checkpoint, entry, option, record)
        backbones.append(frozen_model(config, number, state, source))
    return backbones


def without_files(config: Config) -> Config:
    """Return the configuration with the hub as the source of all frozen weights: files stayed where it was trained."""
    encoders = tuple(dataclasses.replace(entry, weights="") for entry in config.model.encoders)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoders=encoders),
        perceptual=dataclasses.replace(config.perceptual, weights=""),
    )


def load_trained(scorer: AnomalyScorer, checkpoint: Checkpoint) -> None:
    """Load the trained tensors into a scorer.

    Raises:
        CheckpointError: a name is missing, unknown or of another size; all are listed.

    """
    state = scorer.autoencoder.trained_state()
    _check_fit({name: tuple(tensor.shape) for name, tensor in state.items()}, checkpoint)
    scorer.autoencoder.load_state_dict(checkpoint.trained, strict=False)


def _check_fit(expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    faults = fit_faults(expected, checkpoint.trained)
    if faults:
        raise CheckpointError(f"checkpoint does not fit its configuration: {'; '.join(faults)}")


def _frozen_tensors(
    checkpoint: Checkpoint, entry: Backbone, option: str, record: dict[str, str]
) -> tuple[dict[str, Tensor], str]:
    """Return one backbone's tensors, from the checkpoint, a file or the hub, and what to call their source."""
    embedded = checkpoint.embedded.get(record["sha256"])
    if embedded is not None:
        return embedded, f"{record['source']}, embedded in the checkpoint"
    state, now = read_frozen(entry, option)
    if now["sha256"] != record["sha256"]:
        raise WeightsError(
            f"weights of '{entry.timm}': those of {entry.weights or 'the hub'} have SHA-256 {now['sha256'][:12]}..., "
            f"the model was trained with {record['sha256'][:12]}...; supply the original file ({option})"
        )
    return state, now["source"]
