"""Small DICOM files made for tests: uncompressed, with whatever the header is to say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def dicom_bytes(pixels: np.typing.NDArray[Any], **attributes: Any) -> bytes:
    """Return a file of `pixels`: (H, W), (H, W, 3), or (N, H, W) frames; `attributes` are laid over the usual ones."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = attributes.get("SOPClassUID", SecondaryCaptureImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    meta.TransferSyntaxUID = syntax = attributes.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    encoding = (syntax.is_implicit_VR, syntax.is_little_endian)
    header = FileDataset(io.BytesIO(), {}, b"\0" * 128, meta, *encoding)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    frames = pixels.ndim == 3 and not colour
    header.SamplesPerPixel = 3 if colour else 1
    header.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        header.PlanarConfiguration = 0
    if frames:
        header.NumberOfFrames = len(pixels)
    header.Rows, header.Columns = pixels.shape[1:] if frames else pixels.shape[:2]
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    content = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    if pixels.dtype.kind == "f":  # of these DICOM states no bits stored
        setattr(header, "FloatPixelData" if header.BitsAllocated == 32 else "DoubleFloatPixelData", content)
    else:
        header.BitsStored, header.HighBit = header.BitsAllocated, header.BitsAllocated - 1
        header.PixelRepresentation = int(pixels.dtype.kind == "i")
        header.PixelData = content + b"\0" * (len(content) % 2)
    for name, value in attributes.items():
        setattr(header, name, value)
    if "PixelData" in header:
        header["PixelData"].VR = "OB" if header.BitsAllocated <= 8 else "OW"
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def item(**attributes: Any) -> Dataset:
    """Return an item of a sequence."""
    made = Dataset()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def write_dicom(path: Path, pixels: np.typing.NDArray[Any], **attributes: Any) -> Path:
    """Write the file of `dicom_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dicom_bytes(pixels, **attributes))
    return path
