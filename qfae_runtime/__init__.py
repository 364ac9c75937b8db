"""Score images with a certified QFAE engine. Needs no torch. docs/python-api.md has two whole programs.

>>> from qfae_runtime import Scorer, open_engine, preprocess, read_image   # doctest: +SKIP
>>> with open_engine("demo.onnx") as opened:                               # doctest: +SKIP
...     prepared = preprocess(read_image("x.png").pixels, opened.manifest.preprocess)
...     [scored] = Scorer.of(opened).score([prepared])
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qfae")
except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
    __version__ = "0+unknown"

from qfae_runtime.engines import Choice, Engine, OpenedEngine, Scores, open_engine
from qfae_runtime.errors import CanaryError, InputError, QfaeError
from qfae_runtime.manifest import Manifest
from qfae_runtime.preprocess import Prepared, PreprocessSpec, preprocess
from qfae_runtime.readers import ReadOptions, Slice, read_image, read_slices
from qfae_runtime.scorer import Scored, Scorer
from qfae_runtime.selftest import self_test
from qfae_runtime.verdicts import Verdict

__all__ = [
    "CanaryError",
    "Choice",
    "Engine",
    "InputError",
    "Manifest",
    "OpenedEngine",
    "Prepared",
    "PreprocessSpec",
    "QfaeError",
    "ReadOptions",
    "Scored",
    "Scorer",
    "Scores",
    "Slice",
    "Verdict",
    "__version__",
    "open_engine",
    "preprocess",
    "read_image",
    "read_slices",
    "self_test",
]
