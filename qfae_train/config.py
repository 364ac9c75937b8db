"""Configuration: one dataclass a TOML table, presets as TOML files, every fault reported at once.

The dataclasses are the only home of option names, types, defaults and help texts; the command line and the README
read them from here. `load` returns a `Config` or raises `ConfigError` listing every fault.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qfae_runtime.errors import UsageError
from qfae_runtime.preprocess import PreprocessSpec
from qfae_train.bmad import BENCHMARKS

PRESETS = Path(__file__).parent / "presets"

MAX_SEED = 2**31 - 1
"""Each epoch draws from seed * 1_000_003 + epoch, which torch takes as a 64-bit number."""

LARGEST_FILE = 2**20
"""Bytes of a TOML file; the longest preset has 1.4 kB."""

LONGEST_LIST = 64
"""Values of a list: encoders, hidden states, patch sizes, blocks."""

MAX_INT = 2**63 - 1

LONGEST_SHOWN = 200
"""Letters of a wrong value that an error shows."""

T = TypeVar("T")


class ConfigError(UsageError):
    """A configuration that cannot be built; `faults` holds one sentence per fault."""


def shown(value: Any) -> str:
    """Return a value as an error shows it: on one line, cut where it is long, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, tables in tables in tables
        text = f"a {type(value).__name__} too large to show"
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."


def option(help_text: str, default: Any = dataclasses.MISSING, choices: tuple[Any, ...] = ()) -> Any:
    """Return a dataclass field that carries its help text and the values it accepts."""
    metadata = {"help": help_text, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Backbone:
    """A frozen vision transformer used as an encoder."""

    timm: str = option("timm's name of the model, with its pretrained tag")
    patch_size: int = option("pixels per side of a patch; weights of another size are resampled by timm")
    args: dict[str, Any] = option(
        "the model's shape, where it is not timm's: embed_dim, depth, ... (backbone_args.py)", {}
    )
    weights: str = option("weight file in place of the hub's, relative to the TOML file; '' means the hub", "")
    hidden_states: tuple[int, ...] = option("this encoder's own, in place of model.hidden_states", ())


@dataclass(frozen=True)
class QFormer:
    """The Q-Former between encoder and decoder."""

    blocks: int = option("number of blocks; cross-attention stands in the odd ones", 1)
    dim: int = option("width of queries and context tokens", 768)
    queries: int = option("number of trained queries, one per decoded patch", 784)
    heads: int = option("query heads of the self-attention and heads of the cross-attention", 8)
    cross_head_dim: int = option("width of a cross-attention head", 64)
    mlp_ratio: float = option("hidden width of the MLP, in units of dim", 4.0)
    dropout: float = option("dropout of the MLP during training", 0.01)
    query_init: str = option(
        "start of the queries: N(0, 1e-3), the sine-cosine table, or that table with aligned attention (alignment.py)",
        "normal",
        ("normal", "sincos", "aligned"),
    )


@dataclass(frozen=True)
class Decoder:
    """The transformer decoder."""

    dim: int = option("width", 768)
    depth: int = option("number of blocks", 6)
    heads: int = option("attention heads", 12)
    patch_size: int = option("pixels per side of a decoded patch", 8)
    register_tokens: int = option("trained prefix tokens beside the class token", 4)
    mlp_ratio: float = option("hidden width of the MLP, in units of dim", 4.0)


@dataclass(frozen=True)
class Model:
    """The autoencoder."""

    encoders: tuple[Backbone, ...] = option("frozen encoders; their context tokens are concatenated")
    image_size: int = option("pixels per side of the square input", 224)
    hidden_states: tuple[int, ...] = option("blocks whose outputs are the context, counted from the end", (-2, -4))
    qformer: QFormer = option("the Q-Former", QFormer())
    decoder: Decoder = option("the decoder", Decoder())


@dataclass(frozen=True)
class Perceptual:
    """The frozen perceptual network."""

    timm: str = option("timm's name of the model, with its pretrained tag", "vit_large_patch16_224.mae")
    patch_size: int = option("patch size the weights were trained with", 16)
    args: dict[str, Any] = option("the model's shape, where it is not timm's; as for an encoder", {})
    weights: str = option("weight file in place of the hub's, relative to the TOML file; '' means the hub", "")


@dataclass(frozen=True)
class Loss:
    """The perceptual loss."""

    patch_sizes: tuple[int, ...] = option("patch sizes of the perceptual network", (32, 56))
    blocks: tuple[int, ...] = option("perceptual blocks compared, numbered from 1", (16, 20))


@dataclass(frozen=True)
class Score:
    """The anomaly score and the anomaly map."""

    patch_sizes: tuple[int, ...] = option("patch sizes of the perceptual network", (16, 32, 56))
    blocks: tuple[int, ...] = option("perceptual blocks compared, numbered from 1", (12, 16, 20))
    fusion: str = option("multiply the patch sizes' maps or keep them apart", "product", ("product", "separate"))
    spatial: str = option("reduction of a map to a number", "max", ("max", "mean"))
    across: str = option("reduction across maps to the image score", "mean", ("mean", "max"))
    pixel_map: str = option("reduction across maps to the anomaly map", "mean", ("mean", "max"))


@dataclass(frozen=True)
class Preprocess:
    """From a decoded image to the square input."""

    kind: str = option("preprocessing", "resize")


@dataclass(frozen=True)
class Data:
    """What is known of the data set beforehand."""

    benchmark: str = option(
        "published data set whose image counts the folder's are held against; '' means none", "", ("", *BENCHMARKS)
    )


@dataclass(frozen=True)
class Augment:
    """Training augmentations, in the order of the supplement's section 1.4."""

    enabled: bool = option(
        "crop, rotate, flip and jitter training images; without it and paste, frozen features are cached", True
    )
    crop_scale: tuple[float, float] = option("area range of RandomResizedCrop", (0.9, 1.0))
    crop_ratio: tuple[float, float] = option("aspect range of RandomResizedCrop", (0.8, 1.2))
    rotation: float = option("largest rotation either way, degrees", 10.0)
    vertical_flip: float = option("probability of a vertical flip", 0.5)
    jitter: float = option("largest relative change of brightness and of contrast", 0.1)
    paste: float = option("probability that the encoder sees a region of another image, which it must leave out", 0.0)
    paste_variants: int = option(
        "pasted versions of each image, made once (fewer for want of memory); 0 means always new", 0
    )


@dataclass(frozen=True)
class Train:
    """The training run."""

    epochs: int = option("passes over the training images", 300)
    batch_size: int = option("images per step", 64)
    lr: float = option("largest learning rate of OneCycleLR", 8e-5)
    pct_start: float = option("fraction of the steps in which the learning rate rises", 0.15)
    seed: int = option("seed of initialisation, order and augmentation", 42)
    pixel_warmup: float = option("fraction of the steps trained on pixels before the perceptual loss takes over", 0.0)
    grad_clip: float = option("largest norm of the gradient, which is scaled down to it; 0 means no limit", 0.0)
    validate_every: int = option("epochs between validations", 10)
    precision: str = option("arithmetic of the training step", "32-true", ("32-true", "bf16-mixed", "16-mixed"))
    workers: int = option("processes that read and augment images", 4)


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint needs to be rebuilt."""

    model: Model = option("the autoencoder")
    perceptual: Perceptual = option("the perceptual network", Perceptual())
    loss: Loss = option("the training loss", Loss())
    score: Score = option("score and anomaly map", Score())
    preprocess: Preprocess = option("preprocessing", Preprocess())
    data: Data = option("the data set", Data())
    augment: Augment = option("augmentations", Augment())
    train: Train = option("the training run", Train())

    def preprocess_spec(self) -> PreprocessSpec:
        """Return the preprocessing specification that training, export and scoring share."""
        return PreprocessSpec(kind=self.preprocess.kind, image_size=self.model.image_size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain tables, lists, strings and numbers, as TOML and JSON hold them."""
        plain: dict[str, Any] = _plain(self)
        return plain


def presets() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(source: str | Path) -> Config:
    """Return the preset of that name, or the TOML file at that path, checked.

    Raises:
        ConfigError: there is no such preset or file, it is not TOML, or it holds faults (all of them are listed).

    """
    path = Path(source) if str(source).endswith(".toml") else PRESETS / f"{source}.toml"
    if not path.is_file():
        raise ConfigError([f"config '{source}': no such file or preset; presets are {', '.join(presets())}"])
    return from_dict(_anchor_weights(_read_toml(path), path.parent))


def _read_toml(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ConfigError([f"config '{path}': {size} bytes; a configuration has at most {LARGEST_FILE}"])
    try:
        # Windows' editors begin a file with a byte-order mark, which TOML does not know.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"config '{path}': cannot be read: {error.strerror}"]) from None
    except RecursionError:
        raise ConfigError(
            [f"config '{path}': lists or tables nested too deeply; a configuration has 4 levels"]
        ) from None
    except ValueError as error:  # TOML's own, bytes that are no UTF-8, numbers of thousands of digits
        raise ConfigError([f"config '{path}': not valid TOML: {_cut(str(error))}"]) from None


def from_dict(table: dict[str, Any]) -> Config:
    """Return the checked configuration of nested plain tables (from TOML, a checkpoint or a manifest).

    Raises:
        ConfigError: unknown keys, wrong types or impossible combinations; all of them are listed.

    """
    from qfae_train.config_check import contradictions

    faults: list[str] = []
    config = _build(Config, table, "", faults)
    if isinstance(table, dict):
        blanks = [fault.partition(": ")[0] for fault in faults]
        faults += contradictions(config, blanks + _misspelt(Config, table, ""))
    if faults:
        raise ConfigError(faults)
    return config


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Return 'key: before -> now' for each value in which two nested plain tables differ."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, _join(path, key))
        elif old != new:
            found.append(f"{_join(path, key)}: {old!r} -> {new!r}")
    return found


def _anchor_weights(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make weight files named in a TOML file relative to that file, not to the working folder."""
    model = table.get("model")
    encoders = model.get("encoders") if isinstance(model, dict) else None
    for entry in [table.get("perceptual"), *(encoders if isinstance(encoders, list) else [])]:
        if isinstance(entry, dict) and isinstance(entry.get("weights"), str) and entry["weights"]:
            entry["weights"] = str(folder / entry["weights"])
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _build(cls: type[T], table: Any, path: str, faults: list[str]) -> T:
    """Return `cls` filled from a table; what is wrong is appended to `faults` and stands blank in the result."""
    if not isinstance(table, dict):
        faults.append(f"{path or 'config'}: expected a table, got {shown(table)}")
        blank: T = _blank(cls)
        return blank
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in (key for key in table if key not in fields):
        faults.append(f"{_join(path, _key(key))}: unknown key; {path or 'config'} accepts {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        where = _join(path, name)
        if name in table:
            values[name] = _value(hints[name], table[name], where, faults)
            choices = spec.metadata["choices"]
            if choices and values[name] == table[name] and values[name] not in choices:
                accepted = ", ".join(repr(choice) for choice in choices)
                faults.append(f"{where}: got {shown(table[name])}; accepted are {accepted}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            faults.append(f"{where}: missing; it is {spec.metadata['help']}")
            values[name] = _blank(hints[name])
    return cls(**values)


def _blank(hint: Any) -> Any:
    """Return what stands for a value that is missing or wrong, so that everything else can still be checked."""
    if not dataclasses.is_dataclass(hint):
        return (typing.get_origin(hint) or hint)()
    hints = typing.get_type_hints(hint)
    missing = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(hint) if f.default is missing and f.default_factory is missing]
    return hint(**{name: _blank(hints[name]) for name in required})  # type: ignore[operator]


def _misspelt(cls: Any, table: Any, path: str) -> list[str]:
    """Return the keys left out of a table that an unknown key beside them may mean: their values are not known."""
    if not isinstance(table, dict):
        return []
    hints = typing.get_type_hints(cls)
    unknown = [_key(key) for key in table if key not in hints][:LONGEST_LIST]
    absent = [name for name in hints if name not in table]
    found = [_join(path, name) for key in unknown for name in difflib.get_close_matches(key, absent, n=1)]
    for name in (name for name in hints if name in table):
        parts, kind = {_join(path, name): table[name]}, hints[name]
        if typing.get_origin(kind) is tuple and isinstance(table[name], list | tuple):
            parts, kind = {f"{_join(path, name)}[{n}]": e for n, e in enumerate(table[name])}, typing.get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            found += [key for where, part in parts.items() for key in _misspelt(kind, part, where)]
    return found


def _value(hint: Any, value: Any, where: str, faults: list[str]) -> Any:
    """Return `value` as the type `hint` asks for, or a blank after naming the fault."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, faults)  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            faults.append(f"{where}: expected a list, got {shown(value)}")
            return _blank(hint)
        fixed = items[-1] is not Ellipsis
        if fixed and len(value) != len(items):
            faults.append(f"{where}: expected {len(items)} values, got {shown(value)}")
            return _blank(hint)
        if len(value) > LONGEST_LIST:
            faults.append(f"{where}: got {len(value)} values; accepted are at most {LONGEST_LIST}")
            return _blank(hint)
        return tuple(_value(items[0], item, f"{where}[{n}]", faults) for n, item in enumerate(value))
    expected: type = hint if isinstance(hint, type) else (origin or types.NoneType)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            value = math.inf
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{where}: expected a finite number, got {value!r}")
        return _blank(hint)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        faults.append(f"{where}: expected {_type_name(expected)}, got {shown(value)}")
        return _blank(hint)
    if isinstance(value, int) and abs(value) > MAX_INT:
        faults.append(f"{where}: expected a whole number of at most 64 bits, got {shown(value)}")
        return _blank(hint)
    return value


def _type_name(cls: type) -> str:
    names: dict[type, str] = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
    }
    return names.get(cls, "a table")


def _key(key: Any) -> str:
    """Return an unknown key as an error shows it."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= LONGEST_SHOWN else shown(key)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
