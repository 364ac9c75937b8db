"""Whether a checkpoint's parts are what they claim to be, before anything is built of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfae_runtime.errors import QfaeError
from qfae_runtime.preprocess import PreprocessSpec
from qfae_train.conditioning import Conditioning
from qfae_train.config import Config, shown
from qfae_train.weight_files import WeightFiles
from qfae_train.weights import plain_type, tensors_sha256

SHOWN_FAULTS = 8
"""A damaged file may hold hundreds of tensors; the first few say enough."""

PARTS: dict[str, type] = {
    "format": int,
    "config": dict,
    "trained": dict,
    "frozen": list,
    "embedded": dict,
    "preprocess": dict,
    "parity_images": Tensor,
    "record": dict,
    "resume": dict,
}

EMBEDDED_SHA256 = "embedded_sha256"
"""The part that holds the digests of the embedded tables; checkpoints of the first versions have none."""

CONDITIONING = "conditioning"
"""The part that says how far rounding moves the scores; None, or not there, where nobody measured it."""


def some(faults: list[str]) -> str:
    """Return up to SHOWN_FAULTS of the faults, and how many more there are."""
    more = len(faults) - SHOWN_FAULTS
    return "; ".join(faults if more <= 0 else [*faults[:SHOWN_FAULTS], f"and {more} more"])


def damage(content: Mapping[str, Any]) -> list[str]:
    """Return what is wrong inside parts of the right kind."""
    faults = []
    for number, record in enumerate(content["frozen"]):
        if not isinstance(record, dict):
            faults.append(f"frozen[{number}]: expected a record, got {type(record).__name__}")
            continue
        for name in ("timm", "source", "sha256"):
            value = record.get(name)
            if not isinstance(value, str):
                got = type(value).__name__ if name in record else "nothing"
                faults.append(f"frozen[{number}].{name}: expected a text, got {got}")
            elif not value.isprintable() or len(value) > 255:
                faults.append(f"frozen[{number}].{name}: expected up to 255 printable letters, got {shown(value)}")
    tables = {"trained": content["trained"]}
    for digest, table in content["embedded"].items():
        if isinstance(table, dict):
            tables[f"embedded.{str(digest)[:12]}"] = table
        else:
            faults.append(f"embedded.{str(digest)[:12]}: expected a table of tensors, got {type(table).__name__}")
    for where, table in tables.items():
        for name, tensor in table.items():
            if not isinstance(name, str):
                faults.append(f"{where}: expected names of tensors, got {name!r}")
            elif not isinstance(tensor, Tensor):
                faults.append(f"{where}.{name}: expected a tensor, got {type(tensor).__name__}")
            elif where == "trained" and tensor.dtype != torch.float32:
                faults.append(f"{where}.{name}: expected float32, got {plain_type(tensor.dtype)}")
    digests = content.get(EMBEDDED_SHA256, {})
    if not isinstance(digests, dict) or not all(isinstance(one, str) for one in digests.values()):
        faults.append(f"{EMBEDDED_SHA256}: expected a table of texts, got {shown(digests)}")
    try:
        conditioning_of(content)
    except QfaeError as error:
        faults.append(str(error))
    return faults


def conditioning_of(content: Mapping[str, Any]) -> Conditioning | None:
    """Return what was measured of the model's rounding, None where nobody did.

    Raises:
        ManifestError: the part is not what `Conditioning.to_dict` returns.

    """
    stored = content.get(CONDITIONING)
    if stored is None:
        return None
    return Conditioning.from_dict(stored, CONDITIONING, "qfae-train measures it")


def image_faults(images: Tensor, size: int) -> list[str]:
    """Return what is wrong with the parity images of a model for images of `size` pixels."""
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1:] == (size, size, 3):
        return []
    got = f"{plain_type(images.dtype)} {tuple(images.shape)}"
    return [f"parity_images: expected uint8 (N, {size}, {size}, 3), got {got}"]


def preprocessing_faults(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Return in what the images that a model was trained on differ from what this version makes of a file."""
    now = config.preprocess_spec()
    if not isinstance(stored.get("sha256"), str) or not isinstance(stored.get("spec"), dict):
        return ["no specification and SHA-256 of it are stored"]
    try:
        spec = PreprocessSpec.from_dict(stored["spec"])
        lines = spec.diff(now)
        if not lines and stored["sha256"] != now.sha256():
            lines = [f"SHA-256 {stored['sha256'][:12]} stored, {now.sha256()[:12]} of the specification beside it"]
    except QfaeError as error:
        lines = [str(error)]
    return lines


def embedded_faults(content: Mapping[str, Any], files: WeightFiles) -> list[str]:
    """Return which frozen weights in a checkpoint are not those that it was trained with.

    Tables for which `files` bring the original are taken out instead: that file is compared when it is read.
    """
    digests, faults = content.get(EMBEDDED_SHA256, {}), []
    records = content["frozen"]
    for number, record in enumerate(records):
        table = content["embedded"].get(record["sha256"])
        if table is None or _is_proven(table, record, digests.get(record["sha256"])):
            continue
        last = number == len(records) - 1
        if files.perceptual is not None if last else record["timm"] in files.backbones:
            del content["embedded"][record["sha256"]]
            continue
        option = "--perceptual-weights FILE" if last else f"--backbone-weights {record['timm']}=FILE"
        faults.append(
            f"the frozen weights of {record['timm']!r} in it are not those of {record['source']!r} with which it was "
            f"trained, SHA-256 {record['sha256'][:12]}...; download it again, or pass the original file, {option}"
        )
    return faults


def _is_proven(table: Mapping[str, Tensor], record: Mapping[str, str], digest: str | None) -> bool:
    """Tell whether a table is the one that was embedded.

    The first versions recorded only the SHA-256 of the file it came from; one of safetensors can be made again.
    """
    if digest is not None:
        return tensors_sha256(table) == digest
    if not record["source"].endswith(".safetensors"):
        return False
    from safetensors.torch import save

    plain = {name: tensor.contiguous() for name, tensor in table.items()}
    try:
        made = (hashlib.sha256(save(plain, metadata)).hexdigest() for metadata in (None, {"format": "pt"}))
        return record["sha256"] in made
    except (KeyError, ValueError, RuntimeError):  # a type, or memory that is shared, which no such file can hold
        return False


def fit_faults(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> list[str]:
    """Return the trained tensors that are missing, unknown or of another size than the configuration's."""
    faults = [f"{name}: missing" for name in expected.keys() - given.keys()]
    faults += [f"{name}: not a part of this model" for name in given.keys() - expected.keys()]
    faults += [
        f"{name}: expected {shape}, got {tuple(given[name].shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    return sorted(faults)


def resume_faults(resume: Mapping[str, Any]) -> list[str]:
    """Return what is missing of a training run's state."""
    kinds: dict[str, Any] = {
        "optimizer": dict,
        "schedule": dict,
        "epoch": int,
        "best_epoch": int,
        "best_auroc": float | None,
        "seconds": float | int,
    }
    return [name for name, kind in kinds.items() if name not in resume or not isinstance(resume[name], kind)]


def read_error(path: Path, error: Exception) -> str:
    """Return the sentence for a file that `read_torch_file` refused."""
    reason = (error.strerror or "it cannot be read") if isinstance(error, OSError) else str(error)
    return f"checkpoint '{path}': {reason}"
