"""What rounding does to a model, made up."""

from __future__ import annotations

from itertools import product

from qfae_train.conditioning import ALL, STAGES, TYPES, Conditioning, Row

SOUND: dict[str, float | None] = {
    "score_distance": 2e-4,
    "score_distance_max": 1e-3,
    "spearman": 0.9999,
    "map_angle": 3e-4,
    "map_angle_max": 1e-3,
    "reconstruction_p999": 0.0,
    "stress_distance": 1e-3,
    "stress_share": 2e-3,
    "stress_angle": 1e-3,
    "stress_cosine": 0.9999,
    "stress_reconstruction": 0.1,
    "flips": 0.0,
    "reconstruction_levels": 1.0,
}


def made(
    changed: dict[tuple[str, str], dict[str, float | None]] | None = None,
    faults: dict[tuple[str, str], str] | None = None,
    images: int = 32,
) -> Conditioning:
    """Sound values, but for those `changed` by (precision, stage); rows with faults have none."""
    rows = []
    for place in [("fp32", ALL), *product(TYPES, (ALL, *STAGES))]:
        fault = (faults or {}).get(place)
        values = {} if fault is not None else {**SOUND, **(changed or {}).get(place, {})}
        rows.append(Row(*place, values, None if fault is not None else 1.5e-3, fault))
    return Conditioning(images, 14, 0.25, tuple(rows))
