"""Weight files of the frozen backbones: found, read without running anything, hashed, and fitted to a model.

A file may be `.safetensors` or a `.pt`/`.pth` of plain tensors; its names may be timm's or those of the original
DINO, DINOv2 and MAE releases, which timm's own filter translates.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from qfae_runtime.errors import QfaeError
from qfae_runtime.hashing import sha256_of
from qfae_train.backbone_args import LARGEST_PATCH
from qfae_train.torch_file import read_torch_file

HUB_FILE = "model.safetensors"
"""What timm's hub calls a model's weights, where the model does not say otherwise."""

_UNREAD = ("norm.", "fc_norm.", "head.")
"""What stands behind the last block: hidden states and features are taken before it, so it need not be there."""

_WRAPPERS = ("model", "state_dict", "teacher", "student")
"""Names under which published files keep their tensors one level down."""

_SHOWN = 8

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of frozen weights: files of all four are about, and each becomes FP32. Trained weights are FP32."""

LARGEST_HEADER = 8 * 2**20
"""Bytes of the table at the beginning of a .safetensors file, about 80,000 tensors."""

LARGEST_TABLE = 2**17
"""Rows of a position table; resampling one takes memory for all of them."""


class WeightsError(QfaeError):
    """A weight file is missing, unreadable or does not fit its model."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a weight file, as stored, and the file's SHA-256.

    Raises:
        WeightsError: no such file, it would run code, or it is not a plain set of tensors.

    """
    if not path.is_file():
        raise WeightsError(f"weights '{path}': no such file")
    try:
        if path.suffix == ".safetensors":
            state: Any = _read_safetensors(path)
        else:
            state = read_torch_file(path)
    except Exception as error:  # safetensors has half a dozen kinds
        reason = str(error).splitlines()[0].partition("; only plain")[0] if str(error) else type(error).__name__
        raise WeightsError(f"weights '{path}': not a plain file of tensors ({reason})") from None
    state = unwrapped(state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"weights '{path}': expected names and tensors, got something else")
    return state, sha256_of(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(LARGEST_HEADER, path.stat().st_size):
        raise ValueError(f"its header claims {header} bytes, accepted are up to {LARGEST_HEADER} within the file")
    tensors: dict[str, Tensor] = load_file(path)  # it compares sizes and offsets with the file's
    return tensors


def unwrapped(state: Any) -> Any:
    """Take the tensors out of a published file's wrapper; DINO's also carry the names of two more modules."""
    for name in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if isinstance(state, dict):
        for prefix in ("module.", "backbone."):
            if state and all(isinstance(name, str) and name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def hub_file(name: str, option: str) -> Path:
    """Return the weight file of timm's model `name` from the hub's cache, downloading it on the first use.

    `option` is the command-line option that takes a file instead; it stands in the error.

    Raises:
        WeightsError: the hub knows no such weights, or cannot be reached.

    """
    try:
        settings: Any = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that timm does not know
        settings = None
    cure = f"pass {option}, or name it in the config (weights = 'FILE' beside timm = '{name}')"
    if settings is None or not settings.hf_hub_id:
        raise WeightsError(
            f"weights of '{name}': timm's hub has none of that name; where you have a file of them, {cure}"
        )
    repository, _, revision = settings.hf_hub_id.partition("@")
    file = settings.hf_hub_filename or HUB_FILE
    try:
        with _without_chatter():
            return _from_hub(repository, file, revision or None)
    except Exception as error:  # every hub client raises its own kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"weights of '{name}': the hub could not supply {file} of {repository} ({reason}); where there is no "
            f"network, fetch that file (or the original release's) elsewhere and {cure}"
        ) from None


def _from_hub(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    # The cache first: asking the hub whether a file is still current takes minutes where there is no network.
    cached = try_to_load_from_cache(repository, file, revision=revision)
    return Path(cached if isinstance(cached, str) else hf_hub_download(repository, file, revision=revision))


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep the hub client's retries off the terminal; what matters is said in one sentence."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def fit(model: Any, state: Mapping[str, Tensor], source: str) -> None:
    """Load tensors of one of FLOATS into a float32 backbone through timm's filter, naming all that does not fit.

    The filter translates the original releases' names and resamples kernel and position table to the model's.

    Raises:
        WeightsError: names are missing, sizes or types differ, or a value is not finite in float32.

    """
    expected = model.state_dict()
    _check_resampled(state, source)
    try:
        given = checkpoint_filter_fn(dict(state), model)
    except Exception as error:  # asserts and runtime errors of the resampling
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"weights '{source}' do not fit the model: {reason}") from None
    faults = [f"{name} is missing" for name in expected if name not in given and not name.startswith(_UNREAD)]
    faults += [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in given.items()
        if name in expected and expected[name].shape != tensor.shape
    ]
    faults += [
        f"{name}: expected {' or '.join(map(plain_type, FLOATS))}, got {plain_type(tensor.dtype)}"
        for name, tensor in given.items()
        if name in expected and tensor.dtype not in FLOATS
    ]
    # Blocks beyond the model's are not just more names: hidden states count from the end, so others would be read.
    faults += [
        f"{name}: not a part of the model" for name in given if name.startswith("blocks.") and name not in expected
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:_SHOWN])
        raise WeightsError(f"weights '{source}' do not fit the model: {shown} ({len(faults)} in all)")
    model.load_state_dict({name: given[name] for name in expected if name in given}, strict=False)
    _check_finite({name: expected[name] for name in given if name in expected}, source)
    for name in expected.keys() - given.keys():  # nobody reads these; they may be memory as it came
        expected[name].zero_()


def _check_resampled(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse what timm's filter would resample for minutes, or cannot: it does both before sizes are compared."""
    for name, tensor in state.items():
        sides, rows = tensor.shape[-2:], tensor.shape[-2:-1]
        if name.endswith("patch_embed.proj.weight") and max(sides, default=0) > LARGEST_PATCH:
            raise WeightsError(
                f"weights '{source}' do not fit the model: {name} has a kernel of {tuple(sides)} pixels, accepted are "
                f"up to {LARGEST_PATCH}"
            )
        if name.endswith("pos_embed") and max(rows, default=0) > LARGEST_TABLE:
            raise WeightsError(
                f"weights '{source}' do not fit the model: {name} has {rows[0]} rows, accepted are up to "
                f"{LARGEST_TABLE}"
            )


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    wrong = {
        name: int((~tensor.isfinite()).sum())
        for name, tensor in tensors.items()
        if not name.startswith(_UNREAD) and not bool(tensor.isfinite().all())
    }
    if wrong:
        shown = "; ".join(f"{name}: {count} of {tensors[name].numel()}" for name, count in list(wrong.items())[:_SHOWN])
        raise WeightsError(
            f"weights '{source}': values that are not finite in float32, in {len(wrong)} tensors: {shown}; "
            "download or convert the file again"
        )


def plain_type(dtype: torch.dtype) -> str:
    """Return a type's name without its module: float32."""
    return str(dtype).removeprefix("torch.")


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and values that does not depend on any file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
