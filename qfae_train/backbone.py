"""Frozen vision transformers: made by timm, their weights from timm's hub or from a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from qfae_runtime.errors import QfaeError
from qfae_train.config import Backbone


class WeightsError(QfaeError):
    """A weight file is missing, unreadable or does not fit its model."""


@dataclass(frozen=True)
class BackboneShape:
    """What a backbone's configuration amounts to."""

    depth: int
    patch_size: int
    unlike_mae: tuple[str, ...]
    """What keeps the model from being a perceptual network; see `unlike_mae`."""


def create(backbone: Backbone, image_size: int, *, pretrained: bool = False) -> nn.Module:
    """Return timm's model without its head, for square images of `image_size` pixels."""
    args: dict[str, Any] = {"img_size": image_size, "num_classes": 0, **backbone.args}
    model: nn.Module = timm.create_model(backbone.timm, pretrained=pretrained, **args)
    return model


def describe(backbone: Backbone, image_size: int) -> BackboneShape:
    """Return what the configuration amounts to, without allocating weights.

    Raises:
        TypeError: timm's model is not a plain vision transformer.
        Exception: whatever timm raises at a name or arguments that it does not know.

    """
    return _describe(backbone.timm, json.dumps(backbone.args, sort_keys=True, default=str), image_size)


@lru_cache(maxsize=64)
def _describe(name: str, args: str, image_size: int) -> BackboneShape:
    with torch.device("meta"):
        model: Any = create(Backbone(name, 0, json.loads(args)), image_size)
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"it is a {type(model).__name__}, expected a VisionTransformer")
    return BackboneShape(len(model.blocks), model.patch_embed.patch_size[0], tuple(unlike_mae(model)))


def unlike_mae(vit: Any) -> list[str]:
    """List what a vision transformer computes beyond MAE's, which is all that the perceptual network computes."""
    found = []
    if vit.num_prefix_tokens != 1 or vit.cls_token is None:
        found.append(f"{vit.num_prefix_tokens} prefix tokens, expected one class token")
    elif vit.pos_embed is None or vit.no_embed_class:
        found.append("a class token without a position")
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.patch_embed.norm, nn.Identity):
        found.append("a norm before the blocks")
    for block in vit.blocks:
        attention = getattr(block, "attn", None)
        if type(block) is not Block or type(attention) is not Attention:
            found.append(f"blocks of the kind {type(block).__name__}, expected timm's plain Block")
            break
        extras = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
        if any(extra is not None and not isinstance(extra, nn.Identity) for extra in extras):
            found.append("a norm or gate within the attention")
            break
    return found


def load_frozen(backbone: Backbone, image_size: int) -> tuple[nn.Module, dict[str, str]]:
    """Return the backbone with its weights, in eval mode and without gradients, and where they came from.

    The record holds `timm`, `source` ('hub' or the file's name) and `sha256` (of the file, or of the tensors when
    timm's hub supplied them).

    Raises:
        WeightsError: the hub or the file cannot supply weights that fit.

    """
    if backbone.weights:
        path = Path(backbone.weights)
        state, digest = read_tensors(path)
        model = create(backbone, image_size)
        load_into(model, state, path.name)
        record = {"timm": backbone.timm, "source": path.name, "sha256": digest}
    else:
        model = _from_hub(backbone, image_size)
        record = {"timm": backbone.timm, "source": "hub", "sha256": tensors_sha256(model.state_dict())}
    return freeze(model), record


def freeze(model: nn.Module) -> nn.Module:
    """Switch dropout and gradients off, for good."""
    return model.eval().requires_grad_(False)


def _from_hub(backbone: Backbone, image_size: int) -> nn.Module:
    try:
        return create(backbone, image_size, pretrained=True)
    except Exception as error:  # every hub client raises its own kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"weights of {backbone.timm!r}: timm's hub could not supply them ({reason}); "
            "where there is no network, download the model's file elsewhere and name it in the config "
            f"(weights = 'FILE' beside timm = {backbone.timm!r})"
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a .safetensors file or of a .pt/.pth state dict, as stored, and the file's SHA-256.

    Raises:
        WeightsError: no such file, or it is not a plain set of tensors.

    """
    if not path.is_file():
        raise WeightsError(f"weights '{path}': no such file")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(content)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"weights '{path}': not a plain file of tensors ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"weights '{path}': expected names and tensors, got something else")
    return state, digest


def load_into(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load tensors of any float type into a float32 backbone, naming everything that does not fit.

    Raises:
        WeightsError: names are missing or sizes differ.

    """
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected.keys() - state.keys()]
    faults += [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in expected and expected[name].shape != tensor.shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:8])
        raise WeightsError(f"weights '{source}' do not fit the model: {shown} ({len(faults)} in all)")
    model.load_state_dict({name: state[name] for name in expected})


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and values that does not depend on any file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
