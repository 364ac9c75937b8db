"""How well scores and anomaly maps separate, with 95 % intervals; the same numbers in scoring and in training.

curves.py: areas under curves, from histograms       image.py: one score per image, one label per image
bootstrap.py: which images a resample holds          pixels.py: maps against masks, in memory that does not grow
per_image.py: a coarse histogram of every image      measure.py: all of it as one `Metrics`
"""

from __future__ import annotations

from qfae_runtime.metrics.bootstrap import Bootstrap
from qfae_runtime.metrics.measure import TITLES, Metrics, measure
from qfae_runtime.metrics.pixels import PixelMetrics

__all__ = ["TITLES", "Bootstrap", "Metrics", "PixelMetrics", "measure"]
