"""What is measured of an engine's outputs: names, the words for them, and which need many images.

Two units, neither of which depends on the choice of images:

PyTorch's own error     how far PyTorch FP32 itself is from FP64, image by image: the unit of an FP32 engine's errors.
                        A sound engine rounds as often as PyTorch does, if elsewhere.
distance and angle      a score multiplies `factors` cosine distances, so its root of that order is a distance d between
                        image and reconstruction (0..2), and sqrt(2 d) an angle between their features, in radians.
                        FP16 moves features by a share of their length, and so distances and angles by about as much on
                        every image, where it moves a small score by a large share and a large one by a small.
"""

from __future__ import annotations

from typing import NamedTuple


class Quantity(NamedTuple):
    """What is measured: the words for it, and whether larger is better."""

    title: str
    larger_is_better: bool = False


QUANTITIES = {
    "score_typical": Quantity("score error, typical / PyTorch's own"),
    "score_worst": Quantity("score error, worst image / PyTorch's own"),
    "score_abs": Quantity("score error, largest"),
    "score_p999": Quantity("score error, p99.9"),
    "score_iqr": Quantity("score error, p99.9 / IQR"),
    "score_distance": Quantity("score error as distance, mean"),
    "score_distance_max": Quantity("score error as distance, largest"),
    "spearman": Quantity("score ranks, Spearman", larger_is_better=True),
    "flips": Quantity("decisions flipped"),
    "flips_share": Quantity("decisions flipped / images"),
    "flips_beyond": Quantity("flips beyond PyTorch's own error"),
    "auroc_change": Quantity("AUROC, change"),
    "map_typical": Quantity("map error, typical / PyTorch's own"),
    "map_worst": Quantity("map error, worst image / PyTorch's own"),
    "map_pixel": Quantity("map error, worst pixel / PyTorch's own"),
    "map_abs": Quantity("map error, largest"),
    "map_angle": Quantity("map error as angle, mean"),
    "map_angle_max": Quantity("map error as angle, worst image"),
    "map_cosine_p1": Quantity("map cosine, p1", larger_is_better=True),
    "map_cosine_min": Quantity("map cosine, least", larger_is_better=True),
    "reconstruction_typical": Quantity("reconstruction, typical / PyTorch's own"),
    "reconstruction_worst": Quantity("reconstruction, worst image / PyTorch's own"),
    "reconstruction_levels": Quantity("reconstruction, grey levels"),
    "reconstruction_p999": Quantity("reconstruction, p99.9 grey levels"),
    "stress_distance": Quantity("stress images: score error as distance, largest"),
    "stress_share": Quantity("stress images: score error / score, as distances, largest"),
    "stress_angle": Quantity("stress images: map error as angle, worst image"),
    "stress_cosine": Quantity("stress images: map cosine, least", larger_is_better=True),
    "stress_reconstruction": Quantity("stress images: reconstruction, mean grey levels"),
}
"""What is measured, in the order of tables.

Errors are absolute differences from the reference, in float64. pN is the Nth percentile: of the images for scores and
for the cosines of their maps, of all pixels for reconstructions. IQR is the interquartile range of the reference's
scores. A decision is score > threshold; a flip lies beyond PyTorch's own error if the reference is more than 30 times
that far from the threshold (agreement.FLIP_REACH).

/ PyTorch's own: the geometric mean of error / PyTorch's own error over the real or over the stress images, whichever is
larger (typical), and the largest error in that unit (worst). A map's error is the RMS over its pixels; `map_pixel` is
that of single pixels; a reconstruction's is the share of its values that differ. The angle of a map's error is the RMS
over its pixels.

Quantities of whole sets (percentiles, means, ranks, decisions, AUROC) leave stress images out: nobody will score such.
Of those, the last three and the worst of everything are taken. The grey levels of a stress image are the mean over its
pixels, and the worst image's count. A share of a distance is one of LEAST_DISTANCE where the distance is less.
"""

LEAST_DISTANCE = 0.002
"""Below what distance an error is no share of it: lower than any stress image's of a trained model (0.003)."""


OF_ALL_IMAGES = (
    "score_typical",
    "score_distance",
    "spearman",
    "flips",
    "flips_share",
    "flips_beyond",
    "auroc_change",
    "map_typical",
    "map_angle",
    "reconstruction_typical",
)
"""Quantities of a whole set of images, which say little about a few of them."""
