"""Engines: what they are (base), what runs them (backends), and how one is opened (opening)."""

from qfae_runtime.engines.backends import BACKENDS, CPU_BACKENDS, DEVICES
from qfae_runtime.engines.base import Engine, Scores
from qfae_runtime.engines.opened import Candidate, Choice, OpenedEngine
from qfae_runtime.engines.opening import open_engine

__all__ = [
    "BACKENDS",
    "CPU_BACKENDS",
    "DEVICES",
    "Candidate",
    "Choice",
    "Engine",
    "OpenedEngine",
    "Scores",
    "open_engine",
]
