"""Train once per seed, score the test split with each, and say how much the results differ."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfae_runtime.errors import OutputError
from qfae_runtime.metrics import TITLES
from qfae_train.conditioning import Conditioning
from qfae_train.config import Config
from qfae_train.evaluate import evaluate_checkpoint
from qfae_train.fit import fit
from qfae_train.output import last_beside, seed_path, whole_file


@dataclass(frozen=True)
class Summary:
    """What came of several seeds."""

    runs: list[dict[str, Any]]
    """One a seed: `seed`, `checkpoint`, `valid_image_auroc`, `epoch`, `conditioning`, and `test`, the results on the
    test split."""
    file: Path
    best: Path
    """The checkpoint with the best validation AUROC: choosing by test results would flatter them."""

    def statistics(self) -> dict[str, dict[str, float]]:
        """Return mean and sample standard deviation of each result that every seed has."""
        found = {}
        for name in TITLES:
            values = [run["test"][name] for run in self.runs]
            if all(value is not None for value in values):
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                found[name] = {"mean": statistics.mean(values), "std": spread}
        return found

    def text(self) -> str:
        """Return a line per seed, one per metric with mean and standard deviation, in percent, and what FP16 does."""
        lines = []
        for run in self.runs:
            test = run["test"]
            shown = [f"{title} {100 * test[name]:.2f}" for name, title in TITLES.items() if test[name] is not None]
            lines.append(f"seed {run['seed']}: {', '.join(shown) or '; '.join(test['notes'])}")
        for name, one in self.statistics().items():
            spread = f"{100 * one['mean']:.2f} ± {100 * one['std']:.2f}"
            lines.append(f"{TITLES[name]}: {spread} over {len(self.runs)} seeds")
        for run in self.runs:
            lines.append(f"seed {run['seed']}: {Conditioning.from_dict(run['conditioning']).sentence()}")
        return "\n".join(lines)


def fit_seeds(
    config: Config, data: Path, out: Path, *, seeds: list[int], resume: bool, overwrite: bool, device: str
) -> Summary:
    """Train with each seed into NAME.seedN.pt, evaluate it on the test split, and write NAME.seeds.json beside.

    With `resume`, seeds that are done are not trained again and the unfinished one goes on.

    Raises:
        OutputError: results are already there and neither `resume` nor `overwrite` is set.
        QfaeError: whatever `fit` and `evaluate_checkpoint` raise.

    """
    file = out.with_name(out.stem + ".seeds.json")
    if file.exists() and not (resume or overwrite):
        raise OutputError(f"'{file}': results are already there; add --resume to go on or --overwrite to start anew")
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        own = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        path = seed_path(out, seed)
        begun = last_beside(path).exists()
        result = fit(own, data, path, resume=resume and begun, overwrite=overwrite, device=device)
        test = evaluate_checkpoint(result.best, data, batch_size=config.train.batch_size, device=device)
        runs.append(
            {
                "seed": seed,
                "checkpoint": result.best.name,
                "valid_image_auroc": result.best_auroc,
                "epoch": result.best_epoch,
                "conditioning": result.conditioning.to_dict(),
                "test": test.to_dict(),
            }
        )
        best = max(runs, key=lambda run: run["valid_image_auroc"] or 0.0)
        summary = Summary(list(runs), file, out.with_name(best["checkpoint"]))
        _write(summary, config)  # after each seed: five of them take days
    return summary


def _write(summary: Summary, config: Config) -> None:
    content = {
        "statistics": summary.statistics(),
        "runs": summary.runs,
        "benchmark": config.data.benchmark or None,
    }
    with whole_file(summary.file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
