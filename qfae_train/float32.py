"""float32 as float32, on a GPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def whole_float32() -> Iterator[None]:
    """Let PyTorch's float32 products and convolutions keep all their digits; also a decorator.

    On NVIDIA's newer GPUs cuDNN's convolutions, such as patch embeddings, round their factors to the ten bits of TF32
    unless told otherwise: scores then differ from a processor's in the fourth digit.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
