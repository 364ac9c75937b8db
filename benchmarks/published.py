"""Tables 3 and 7 of the supplement, as published: image AUROC in percent, mean and standard deviation."""

from __future__ import annotations

Value = tuple[float, float | None] | None
"""Mean and standard deviation; the latter None where none was given; None for "N/A"."""

DATA_SETS = ("BraTS2021", "LiverCT", "RESC", "RSNA")

OURS = "QFAE"
"""The row of the method itself."""

TABLE_7: dict[str, tuple[Value, Value, Value, Value]] = {
    "f-AnoGAN": ((77.3, 0.18), (58.4, 0.15), (77.4, 0.85), (55.6, 0.09)),
    "GANomaly": ((74.8, 1.93), (53.9, 2.36), (52.6, 3.95), (62.9, 0.65)),
    "DRAEM": ((62.4, 9.03), (69.2, 3.86), (83.2, 8.21), (67.7, 1.72)),
    "UTRAD": ((82.9, 2.32), (55.6, 5.96), (89.4, 1.92), (75.6, 1.24)),
    "DeepSVDD": ((87.0, 0.66), (53.3, 1.24), (74.2, 1.29), (64.5, 3.17)),
    "CutPaste": ((78.8, 0.67), (58.6, 4.2), (90.2, 0.61), (82.6, 1.22)),
    "SimpleNet": ((82.5, 3.34), None, (76.2, 7.46), (69.1, 1.27)),
    "MKD": ((81.5, 0.36), (60.4, 1.61), (89.0, 0.25), (82.0, 0.12)),
    "RD4AD": ((89.5, 0.91), (60.0, 1.4), (87.8, 0.87), (67.6, 1.11)),
    "STFFPM": ((83.0, 0.67), (61.6, 1.7), (84.8, 0.50), (72.9, 1.96)),
    "PaDiM": ((79.0, 0.38), (50.7, 0.5), (75.9, 0.54), (77.5, 1.87)),
    "PatchCore": ((91.7, 0.36), (60.4, 0.82), (91.6, 0.10), (76.1, 0.67)),
    "CFA": ((84.4, 0.87), (61.9, 1.16), (69.9, 0.26), (66.8, 0.23)),
    "CFLOW": ((74.8, 5.32), (49.9, 4.67), (75.0, 5.81), (71.5, 1.49)),
    "CS-Flow": ((90.9, 0.83), (59.4, 0.52), (87.3, 0.58), (83.2, 0.46)),
    "P-VQ*": ((94.3, 0.23), (60.6, 0.62), (89.0, 0.48), (79.2, 0.04)),
    OURS: ((94.3, 0.18), (65.5, 1.96), (91.8, 0.55), (83.8, 0.46)),
}
"""Method, spelt as published -> its values on DATA_SETS, five repetitions each (*: three)."""

TABLE_3: dict[str, tuple[float, float | None]] = {
    "Main Config": (54.1, None),
    "+ Train & Eval with New Preprocessing": (59.5, 1.27),
    "+ Eval Perceptual Patch Sizes [16, 32, 56] -> [8, 16]": (65.5, 1.96),
}
"""LiverCT, step by step."""


def shown(value: Value) -> str:
    """Return a value as the tables print it."""
    if value is None:
        return "N/A"
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.2f}"
