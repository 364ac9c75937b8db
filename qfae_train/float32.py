"""float32 as float32, on a GPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

_BACKENDS: Any = torch.backends
_NEW = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)
_OLD = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn)


def forbid_tf32() -> None:
    """Let PyTorch's float32 products and convolutions keep all their digits, from now on.

    On NVIDIA's newer GPUs cuDNN's convolutions, such as patch embeddings, round their factors to the ten bits of TF32
    unless told otherwise. This is PyTorch's older way of saying so, which all of its parts understand.
    """
    for setting in _OLD:
        setting.allow_tf32 = False


@contextmanager
def whole_float32() -> Iterator[None]:
    """Do so for a while, and leave PyTorch's settings as they were; also a decorator.

    Where the program around has used PyTorch's newer settings, the older ones cannot be read, and the newer are set.
    """
    settings: tuple[Any, ...] = _OLD
    name, value = "allow_tf32", cast(Any, False)
    try:
        before = [getattr(setting, name) for setting in settings]
    except RuntimeError:
        settings, name, value = _NEW, "fp32_precision", "ieee"
        before = [getattr(setting, name) for setting in settings]
    try:
        for setting in settings:
            setattr(setting, name, value)
        yield
    finally:
        for setting, was in zip(settings, before, strict=True):
            setattr(setting, name, was)
