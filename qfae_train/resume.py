"""What a run must have in common with the one that it goes on with."""

from __future__ import annotations

from pathlib import Path

from qfae_train.checkpoint import Checkpoint, CheckpointError, load, portable_config
from qfae_train.checkpoint_check import resume_faults
from qfae_train.config import Config, differences
from qfae_train.data import Split
from qfae_train.output import last_beside


def resumable(out: Path, config: Config) -> Checkpoint:
    """Return the newest checkpoint of the run that writes `out`.

    Raises:
        CheckpointError: there is none, or it cannot be gone on from with this configuration.

    """
    last = last_beside(out)
    if not last.is_file():
        raise CheckpointError(f"nothing to resume: '{last}' does not exist; leave --resume out to start a new run")
    earlier = load(last)
    changed = differences(portable_config(earlier.config), portable_config(config))
    if changed:
        raise CheckpointError(
            f"cannot resume '{last}': it was trained with another configuration ({'; '.join(changed)}); use the same "
            "preset and options, or --overwrite to start anew"
        )
    if not earlier.resume:
        raise CheckpointError(f"cannot resume '{last}': it holds no optimiser state; resume from a .last file")
    faults = resume_faults(earlier.resume)
    if faults:
        raise CheckpointError(
            f"cannot resume '{last}': its state is damaged ({', '.join(faults)}); --overwrite to start anew"
        )
    if not out.is_file():
        epoch = earlier.resume["best_epoch"]
        raise CheckpointError(
            f"cannot resume '{last}': the best checkpoint '{out}' (of epoch {epoch}) is missing; put it back, or "
            "--overwrite to start anew"
        )
    return earlier


def check_frozen(last: Path, earlier: Checkpoint, records: list[dict[str, str]]) -> None:
    """Hold the frozen weights against those that the checkpoint was trained with.

    Raises:
        CheckpointError: some are others.

    """
    changed = [
        now["timm"] for then, now in zip(earlier.frozen, records, strict=True) if then["sha256"] != now["sha256"]
    ]
    if changed:
        raise CheckpointError(
            f"cannot resume '{last}': the frozen weights of {', '.join(changed)} are not those it was trained with; "
            "put the original files back, or --overwrite to start anew"
        )


def check_data(last: Path, earlier: Checkpoint, train: Split) -> None:
    """Hold the training images against those that the checkpoint was trained on.

    Raises:
        CheckpointError: their number is another, or their pixels or their order are.

    """
    then, now = earlier.record.get("train_images"), len(train)
    if then != now:
        changed = f"it was trained on {then} images, the data set now holds {now}"
    elif earlier.resume.get("train_sha256", train.sha256) != train.sha256:  # older files do not say
        changed = f"it was trained on other images: there are {now} as before, but not with the same pixels"
    else:
        return
    raise CheckpointError(
        f"cannot resume '{last}': {changed}; put the original images back, or --overwrite to start anew"
    )
