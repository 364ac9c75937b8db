"""From the stored values of a DICOM frame to RGB, by PS3.3 C.7.6.3, C.11.1 and C.11.2.

In this order: the bits that are stored are cut out and take their sign; the modality's table or slope and intercept;
the window that was asked for, else the file's table (VOI LUT), else its first window, else percentiles of the frame;
MONOCHROME1 is inverted; padding is black. Unsigned values of 8 bits or less, neither rescaled nor windowed, are drawn
as they are. Colours keep the high byte of what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qfae_runtime.arrays import Bool, UInt8
from qfae_runtime.readers.window import FUNCTIONS, LINEAR, Range, Values, Window, grey, to_levels

Dataset = Any  # pydicom is an extra: this module must be importable without it


class UnreadableValuesError(Exception):
    """The header contradicts itself or asks for what is not read; the text is the reason."""


@dataclass(frozen=True)
class Format:
    """How the values of a file are stored: `bits` of them count, the highest is number `high_bit`.

    `floating` ones are IEEE 754 numbers; they have no bits to cut.
    """

    bits: int
    high_bit: int
    signed: bool
    photometric: str
    floating: bool = False

    def cut(self, stored: Values) -> Values:
        """Return stored integers with their unused bits removed and their sign extended; floats as they are."""
        if stored.dtype.kind not in "ui":
            return stored
        shift = self.high_bit + 1 - self.bits
        width = 8 * stored.dtype.itemsize
        if shift == 0 and self.bits == width:
            return stored.astype(stored.dtype.str.replace("u", "i"), copy=False) if self.signed else stored
        values = (stored.astype(np.int64) >> shift) & ((1 << self.bits) - 1)
        if self.signed:
            values = np.where(values >= 1 << (self.bits - 1), values - (1 << self.bits), values)
        return values


@dataclass(frozen=True)
class Rule:
    """What is done to the values of one frame, as its header (and functional groups) say."""

    slope: float = 1.0
    intercept: float = 0.0
    modality_table: Table | None = None
    voi_table: Table | None = None
    window: Window | None = None
    padding: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """A look-up table: `values[0]` is for inputs up to `first`, the last for all beyond; `bits` of each count."""

    values: npt.NDArray[np.int64]
    first: int
    bits: int

    def of(self, inputs: Values) -> npt.NDArray[np.int64]:
        """Look values up; fractions are dropped."""
        place = np.clip(np.floor(inputs).astype(np.int64) - self.first, 0, len(self.values) - 1)
        return np.asarray(self.values[place])


def draw_grey(stored: Values, form: Format, rule: Rule, asked: tuple[float, float] | None) -> tuple[UInt8, str | None]:
    """Return the stored values (H, W) of a frame as uint8 (H, W, 3), and what was applied."""
    with np.errstate(over="ignore", invalid="ignore"):  # of floating-point values; numpy would print a warning of it
        return _drawn_grey(stored, form, rule, asked)


def _drawn_grey(
    stored: Values, form: Format, rule: Rule, asked: tuple[float, float] | None
) -> tuple[UInt8, str | None]:
    cut = form.cut(stored)
    padded = _padded(cut, rule.padding)
    applied = []
    if rule.modality_table is not None:
        values: Values = rule.modality_table.of(cut)
        applied.append("modality table")
    elif (rule.slope, rule.intercept) != (1.0, 0.0):
        values = cut * rule.slope + rule.intercept
        applied.append(f"rescaled {rule.slope:.6g},{rule.intercept:.6g}")
    else:
        values = cut
    levels, how = _windowed(values, padded, form, rule, asked, rescaled=bool(applied))
    applied += [how] if how else []
    if form.photometric == "MONOCHROME1":
        levels = 255 - levels
        if form.floating:
            levels[np.isnan(values)] = 0  # what has no value is black, as padding is
        applied.append("inverted")
    if padded is not None and padded.any():
        levels[padded] = 0
        applied.append("padding black")
    return grey(levels), "; ".join(applied) or None


def draw_colour(stored: Values, form: Format) -> tuple[UInt8, str | None]:
    """Return colours (H, W, 3), already RGB, as uint8; more than 8 bits keep their high byte."""
    if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype.kind not in "ui":
        raise UnreadableValuesError(f"expected colours (H, W, 3), got {stored.dtype} {stored.shape}")
    if form.bits <= 8 and stored.dtype.itemsize == 1:
        return stored.astype(np.uint8), None
    shift = max(0, form.bits - 8)
    return (stored.astype(np.int64) >> shift).clip(0, 255).astype(np.uint8), f"{form.bits} bit, high byte"


def _windowed(
    values: Values, padded: Bool | None, form: Format, rule: Rule, asked: tuple[float, float] | None, *, rescaled: bool
) -> tuple[UInt8, str | None]:
    if asked is not None:
        window = Window(*asked, origin="asked for")
        return window.levels(values), str(window)
    if rule.voi_table is not None:
        table = rule.voi_table
        share = table.of(values) / float((1 << table.bits) - 1)
        return to_levels(share), "voi table (file)"
    if rule.window is not None:
        return rule.window.levels(values), str(rule.window)
    if values.dtype.kind in "ui" and not form.signed and form.bits <= 8 and not rescaled:
        if form.bits == 8:
            return values.astype(np.uint8), None
        return to_levels(values / float((1 << form.bits) - 1)), f"{form.bits} bit"
    known = values if padded is None or padded.all() else values[~padded]
    span = Range.of(known, "frame")
    return span.levels(values), str(span)


def _padded(values: Values, padding: tuple[float, float] | None) -> Bool | None:
    if padding is None:
        return None
    low, high = min(padding), max(padding)
    return np.asarray((values >= low) & (values <= high))


def rule_of(header: Dataset, frame: int, form: Format) -> Rule:
    """Read what a header says of one frame: its functional groups first, then those that all share, then itself."""
    rescale = _macro(header, frame, "PixelValueTransformationSequence")
    display = _macro(header, frame, "FrameVOILUTSequence")
    slope, intercept = _number(rescale, "RescaleSlope", 1.0), _number(rescale, "RescaleIntercept", 0.0)
    little = header.original_encoding[1] is not False
    modality = _table(header.get("ModalityLUTSequence"), form.signed, little)
    signed_after = form.signed or intercept < 0
    return Rule(
        slope,
        intercept,
        modality,
        _table(display.get("VOILUTSequence"), signed_after and modality is None, little),
        _window(display),
        _padding(header, form),
    )


def _macro(header: Dataset, frame: int, name: str) -> Dataset:
    """Return the item that holds a macro's attributes for a frame; the header itself where no group has it."""
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for item in (*groups[frame : frame + 1], *shared[:1]):
        if items := item.get(name):
            return items[0]
    return header


def _number(item: Dataset, name: str, default: float) -> float:
    value = _first(item.get(name))
    if value is None or not np.isfinite(number := float(value)):
        return default
    return number


def _first(value: Any) -> Any:
    if value is None or isinstance(value, (str, bytes)):
        return value or None
    try:
        return next(iter(value), None)
    except TypeError:
        return value


def _window(item: Dataset) -> Window | None:
    center, width = _first(item.get("WindowCenter")), _first(item.get("WindowWidth"))
    if center is None or width is None:
        return None
    function = str(item.get("VOILUTFunction") or LINEAR).upper()
    window = Window(float(center), float(width), function if function in FUNCTIONS else LINEAR)
    return window if window.usable() else None


def _padding(header: Dataset, form: Format) -> tuple[float, float] | None:
    if form.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return None
    kind = "" if not form.floating else "Float" if form.bits == 32 else "DoubleFloat"
    low, high = (header.get(f"{kind}PixelPadding{end}") for end in ("Value", "RangeLimit"))
    if low is None:
        return None
    high = low if high is None else high
    return (float(low), float(high)) if form.floating else (_as_stored(low, form), _as_stored(high, form))


def _as_stored(value: Any, form: Format) -> int:
    # Written as unsigned or as signed, whatever the pixels are: the bits are meant.
    number = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    number &= (1 << form.bits) - 1
    return number - (1 << form.bits) if form.signed and number >= 1 << (form.bits - 1) else number


def _table(sequence: Any, signed: bool, little: bool) -> Table | None:
    if not sequence:
        return None
    item = sequence[0]
    try:
        entries, first, bits = (int(value) for value in item.LUTDescriptor)
        data = item["LUTData"].value
        values = (
            np.frombuffer(data, "<u2" if little else ">u2")
            if isinstance(data, bytes)
            else np.atleast_1d(np.asarray(data))
        )
        values = values.astype(np.int64)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UnreadableValuesError("its look-up table is damaged") from None
    entries = entries or 65536
    if not 1 <= bits <= 16:
        raise UnreadableValuesError(f"its look-up table is damaged (entries of {bits} bits)")
    if len(values) * 2 == entries:  # two entries of 8 bits in each word
        values = np.stack([values & 0xFF, values >> 8], axis=1).ravel()
    if len(values) < entries or entries < 1:
        raise UnreadableValuesError(f"its look-up table is damaged ({len(values)} of {entries} entries)")
    if signed and first >= 1 << 15:
        first -= 1 << 16
    return Table(values[:entries], first, bits)
