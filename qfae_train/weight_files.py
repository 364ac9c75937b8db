"""Files of frozen weights named on the command line, in place of timm's hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qfae_runtime.errors import UsageError
from qfae_train.config import Config

BACKBONE_OPTION, PERCEPTUAL_OPTION = "--backbone-weights", "--perceptual-weights"

BACKBONE_HELP = "File of an encoder's frozen weights in place of timm's hub; NAME is timm's.  [repeatable]"
PERCEPTUAL_HELP = "File of the perceptual network's frozen weights in place of timm's hub."


@dataclass(frozen=True)
class WeightFiles:
    """Weight files by timm's name for encoders, and the perceptual network's; empty means the hub."""

    backbones: Mapping[str, Path] = field(default_factory=dict)
    perceptual: Path | None = None

    def applied_to(self, config: Config) -> Config:
        """Return the configuration with these files in it.

        Raises:
            UsageError: a name is not one of the configuration's encoders.

        """
        names = [entry.timm for entry in config.model.encoders]
        unknown = [name for name in self.backbones if name not in names]
        if unknown:
            raise UsageError(
                [f"{BACKBONE_OPTION}: no encoder is called '{name}'; there is {', '.join(names)}" for name in unknown]
            )
        encoders = tuple(
            dataclasses.replace(entry, weights=str(self.backbones.get(entry.timm, entry.weights)))
            for entry in config.model.encoders
        )
        perceptual = config.perceptual
        if self.perceptual is not None:
            perceptual = dataclasses.replace(perceptual, weights=str(self.perceptual))
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, encoders=encoders), perceptual=perceptual
        )


FROM_HUB = WeightFiles()


def parse_weight_files(backbones: Sequence[str], perceptual: str | None, faults: list[str]) -> WeightFiles:
    """Read the options' texts; what is wrong with them is appended to `faults`."""
    files: dict[str, Path] = {}
    for text in backbones:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            faults.append(f"{BACKBONE_OPTION}: got {text!r}, expected NAME=FILE with timm's name of the encoder")
        elif not Path(path).is_file():
            faults.append(f"{BACKBONE_OPTION}: {path}: no such file")
        elif name in files:
            faults.append(f"{BACKBONE_OPTION}: '{name}' is given twice")
        else:
            files[name] = Path(path)
    if perceptual is not None and not Path(perceptual).is_file():
        faults.append(f"{PERCEPTUAL_OPTION}: {perceptual}: no such file")
    return WeightFiles(files, Path(perceptual) if perceptual is not None else None)
