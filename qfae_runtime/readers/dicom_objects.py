"""DICOM objects that hold no image to score, and what to call them. The names are those of PS3.6, class by class."""

from __future__ import annotations

# The first word of these that stands in the name of a SOP class says what the object is.
_KINDS = (
    ("Media Storage Directory", "a DICOM directory (DICOMDIR): name the files it lists instead"),
    ("Segmentation", "a segmentation: regions drawn in an image"),
    ("RT Dose", "a radiotherapy dose grid"),
    ("RT Structure Set", "a radiotherapy structure set: contours"),
    ("Plan", "a treatment plan"),
    ("Color Palette", "a colour palette"),
    ("RT ", "a radiotherapy record"),
    ("Presentation State", "a presentation state: how to show an image"),
    ("Waveform", "a waveform"),
    ("ECG", "a waveform"),
    ("Encapsulated", "an encapsulated document"),
    ("Key Object Selection", "a list of selected objects"),
    (" SR", "a structured report"),
    ("Report", "a structured report"),
    ("Spatial Registration", "a registration"),
    ("Spatial Fiducials", "a set of fiducials"),
    ("Real World Value Mapping", "a mapping of values"),
    ("Tractography", "tractography results: tracks"),
    ("Spectroscopy", "a spectrum"),
    ("Raw Data", "raw data of a scanner"),
    ("Surface Scan", "a surface scan"),
    ("Measurements", "a set of measurements"),
)


def without_image(class_name: str) -> str | None:
    """Return what an object of a SOP class is in words, if it holds no image to score; else None."""
    if "Image Storage" in class_name:  # RT Image is one
        return None
    words = next((words for part, words in _KINDS if part in class_name), None)
    return None if words is None else f"{words} ({class_name})"
