"""Tables 3 and 7 of the supplement with a column of our own, for each BMAD data set that is at hand.

    make reproduce DATA=BMAD                                        trains five seeds of each; days on a GPU
    make reproduce DATA=BMAD CKPTS="BraTS2021=brain/last_ckpt.pth"  takes given checkpoints instead

Every model is evaluated twice on the test images: in PyTorch, and through the engine that qfae-export made of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from benchmarks.tables import Measured, Step, print_tables, to_json
from benchmarks.through_engine import engine_scores
from qfae_export.export import export
from qfae_export.options import Options
from qfae_runtime.contract import MIN_IMAGES
from qfae_runtime.errors import QfaeError, UsageError
from qfae_runtime.layout import scan
from qfae_runtime.metrics import Metrics
from qfae_train.bmad import BENCHMARKS, Benchmark, benchmark_of_folder
from qfae_train.checkpoint import Checkpoint, CheckpointError, read_parts, save
from qfae_train.checkpoint import load as load_checkpoint
from qfae_train.config import Config, from_dict, load
from qfae_train.data import split_folder
from qfae_train.evaluate import evaluate_checkpoint
from qfae_train.fit import fit
from qfae_train.official import is_official, open_parts
from qfae_train.options import check_device, parse_seeds
from qfae_train.output import last_beside, seed_path, whole_file
from qfae_train.weight_files import WeightFiles, parse_weight_files
from qfae_train.weights import unwrapped

PUBLISHED_SEEDS = "42,7,13,65,91"
MAIN_PATCH_SIZES = (16, 32, 56)


def steps_of(benchmark: Benchmark, config: Config) -> list[Step]:
    """Return what is measured on a data set: the preset itself, and before it, for LiverCT, the steps of Table 3."""
    if benchmark.name != "LiverCT":
        return [Step("preset", config)]
    coarse = dataclasses.replace(config, score=dataclasses.replace(config.score, patch_sizes=MAIN_PATCH_SIZES))
    return [Step("main", with_kind(coarse, "resize")), Step("preprocessing", coarse), Step("preset", config)]


def with_kind(config: Config, kind: str) -> Config:
    """Return the configuration with another preprocessing."""
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, kind=kind))


def find_roots(data: Path) -> dict[str, Path]:
    """Return the BMAD roots at or directly below a folder, by data set.

    Raises:
        UsageError: there is none, or two for one data set.

    """
    if not data.is_dir():
        raise UsageError(f"--data: {data}: no such folder; name the one that holds the BMAD data sets")
    found: dict[str, Path] = {}
    for folder in [data.absolute(), *sorted(path for path in data.absolute().iterdir() if path.is_dir())]:
        benchmark = benchmark_of_folder(folder.name)
        if benchmark is None or not (folder / "test").is_dir():
            continue
        if benchmark.name in found:
            raise UsageError(f"--data: both {found[benchmark.name]} and {folder} are {benchmark.name}; keep one")
        found[benchmark.name] = folder
    if not found:
        names = ", ".join(sorted(name for one in BENCHMARKS.values() for name in one.folders))
        raise UsageError(f"--data: {data}: no BMAD data set in it; a root is called one of {names}, and holds test/")
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """What was asked for; `configs` replace the presets, `checkpoints` the training, by data set."""

    out: Path
    seeds: list[int]
    device: str
    configs: dict[str, Config]
    checkpoints: dict[str, list[Path]]
    files: WeightFiles

    def check(self, benchmark: Benchmark, root: Path) -> None:
        """Look for the folders that will be needed, before days go into training.

        Raises:
            UsageError: a split is missing.

        """
        needed = ("test",) if benchmark.name in self.checkpoints else ("train", "valid", "test")
        missing = [split for split in needed if split_folder(root, split) is None]
        if missing:
            raise UsageError(
                f"--data: {root}: no {', '.join(f'{split}/' for split in missing)}; {benchmark.name} needs it"
            )

    def measure(self, benchmark: Benchmark, root: Path) -> list[Measured]:
        """Return the results of every step on one data set."""
        folder = self.out / benchmark.name
        steps = steps_of(benchmark, self.configs.get(benchmark.name) or load(benchmark.presets[0]))
        own = self.configs.get(benchmark.name)
        given = [
            (path.stem, taken(path, benchmark, own, self.files)) for path in self.checkpoints.get(benchmark.name, ())
        ]
        trained: dict[str, list[tuple[str, Checkpoint]]] = {}
        results = []
        for step in steps:
            kind = step.config.preprocess.kind
            # Steps that differ in the score alone share their models, which the first of them trains.
            if not given and kind not in trained:
                trained[kind] = list(self._trained(step, root, folder))
            models = [one for one in given if one[1].config.preprocess.kind == kind] if given else trained[kind]
            measured = Measured(benchmark.name, step.name, [], [])
            for name, checkpoint in models:
                in_torch, engine = self._both(name, with_score(checkpoint, step.config), root, folder, step)
                measured.torch.append(in_torch)
                measured.engine.append(engine)
            results.append(measured)
        return results

    def _trained(self, step: Step, root: Path, folder: Path) -> Iterable[tuple[str, Checkpoint]]:
        """Train one model per seed; a finished one is taken as it is, if it is of this configuration."""
        config = self.files.applied_to(step.config)
        for seed in self.seeds:
            own = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            out = seed_path(folder / f"{config.preprocess.kind}.pt", seed)
            fit(own, root, out, resume=last_beside(out).exists(), device=self.device)
            yield out.stem, load_checkpoint(out)

    def _both(self, name: str, checkpoint: Checkpoint, root: Path, folder: Path, step: Step) -> tuple[Metrics, Metrics]:
        path = folder / step.name / f"{name}.pt"
        save(path, checkpoint)
        in_torch = evaluate_checkpoint(path, root, files=self.files, device=self.device, say=click.echo)
        few = len(scan([root / "test"]).images) < MIN_IMAGES
        exported = export(
            Options(path, parity_images=None if few else root / "test", overwrite=True, weights=self.files),
            lambda text: click.echo(f"{root.name}, {step.name}: {text}", err=True),
        )
        return in_torch, engine_scores(exported.engine, root / "test")


def with_score(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    """Return the model with another configuration of its score, which no weight depends on.

    Raises:
        ConfigError: its perceptual network has no such blocks.

    """
    own = from_dict(dataclasses.replace(checkpoint.config, score=config.score).to_dict())
    return dataclasses.replace(checkpoint, config=own, resume={})


def taken(path: Path, benchmark: Benchmark, config: Config | None, files: WeightFiles) -> Checkpoint:
    """Return a given checkpoint: ours as it is, the authors' with the first preset of the data set that fits it.

    Raises:
        CheckpointError: it fits none; the faults of the last one are told.

    """
    content = read_parts(path)
    if not is_official(unwrapped(content)):
        return open_parts(path, content)
    candidates = [config] if config else [load(preset) for preset in benchmark.presets]
    for candidate in candidates[:-1]:
        try:
            return open_parts(path, content, candidate, files)
        except CheckpointError:
            continue
    return open_parts(path, content, candidates[-1], files)


def pairs(texts: Iterable[str], option: str, faults: list[str]) -> list[tuple[str, Path]]:
    """Read NAME=FILE options whose names are data sets; what is wrong is appended to `faults`."""
    found = []
    for text in texts:
        name, _, file = text.partition("=")
        if name not in BENCHMARKS or not Path(file).is_file():
            faults.append(
                f"{option}: got {text!r}, expected NAME=FILE, NAME one of {', '.join(BENCHMARKS)}, FILE there"
            )
        else:
            found.append((name, Path(file)))
    return found


@click.command()
@click.option("--data", required=True, metavar="DIR", help="A BMAD root, or the folder that holds them.")
@click.option("--out", default="build/reproduce", show_default=True, help="Folder for models, engines and results.")
@click.option("--ckpt", multiple=True, metavar="NAME=FILE", help="Take a checkpoint in place of training. [repeatable]")
@click.option("--config", multiple=True, metavar="NAME=FILE.toml", help="In place of the preset. [repeatable]")
@click.option("--seeds", default=PUBLISHED_SEEDS, show_default=True, help="Seeds to train with.")
@click.option("--device", default="auto", show_default=True, help="Where PyTorch computes: auto, cpu or cuda.")
@click.option("--backbone-weights", multiple=True, metavar="NAME=FILE", help="As in qfae-train.")
@click.option("--perceptual-weights", metavar="FILE", help="As in qfae-train.")
def main(data: str, out: str, seeds: str, device: str, **given: Any) -> None:
    """Measure the published data sets that are at hand, and print Tables 3 and 7 with our column."""
    faults: list[str] = []
    checkpoints: dict[str, list[Path]] = {}
    for name, path in pairs(given["ckpt"], "--ckpt", faults):
        checkpoints.setdefault(name, []).append(path)
    configs = dict(pairs(given["config"], "--config", faults))
    files = parse_weight_files(given["backbone_weights"], given["perceptual_weights"], faults)
    chosen = parse_seeds(seeds, faults)
    check_device(device, faults)
    try:
        if faults:
            raise UsageError(faults)
        run = Run(
            Path(out), chosen, device,
            {name: load(path) for name, path in configs.items()}, checkpoints, files,
        )  # fmt: skip
        roots = find_roots(Path(data))
        for name, root in roots.items():
            run.check(BENCHMARKS[name], root)
    except QfaeError as error:
        raise click.ClickException(str(error)) from None
    results: list[Measured] = []
    failures = []
    for name, root in roots.items():
        click.echo(f"{name}: {root}", err=True)
        try:
            results += run.measure(BENCHMARKS[name], root)
        except QfaeError as error:  # the others are measured all the same
            failures.append(f"{name}: {error}")
            click.echo(failures[-1], err=True)
        write(Path(out) / "results.json", results, failures)  # after each data set: one takes days to train
    print_tables(results)
    click.echo(f"all of it as JSON: {Path(out) / 'results.json'}")
    if failures:
        raise click.ClickException("; ".join(failures))


def write(path: Path, results: list[Measured], failures: list[str]) -> None:
    """Write all results as JSON, whole or not at all."""
    content = {"results": to_json(results), "failures": failures}
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
