"""The training run: Adam and OneCycleLR on the perceptual loss, validation, best and last checkpoint, resume.

Two files come of a run: `NAME.pt`, the checkpoint with the best validation AUROC (or the last one where validation
cannot tell, having one class only), and `NAME.last.pt`, the newest one with the optimiser's state, to resume from.
A resumed run gives what an uninterrupted one gives: all randomness of an epoch comes from (seed, epoch).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from qfae_runtime.errors import QfaeError
from qfae_train import checkpoint as files
from qfae_train.alignment import align
from qfae_train.augment import augmentation, paste
from qfae_train.autoencoder import AnomalyScorer, build, normalise
from qfae_train.bmad import held_against
from qfae_train.checkpoint import Checkpoint
from qfae_train.conditioning import Conditioning, measure
from qfae_train.config import Config, Train
from qfae_train.data import DataError, Split, TrainingImages, load_split
from qfae_train.evaluate import Metrics, evaluate
from qfae_train.float32 import whole_float32
from qfae_train.images_check import check_features, check_images
from qfae_train.output import check_writable, last_beside, refuse_existing
from qfae_train.perceptual import Features
from qfae_train.progress import Reporter
from qfae_train.resume import check_data, check_frozen, resumable

PARITY_IMAGES = 32
"""Validation images kept in the checkpoint, for export to measure on."""

ALIGNMENT_IMAGES = 256
"""Training images that the aligned initialisation is fitted on."""

CACHE_LIMIT_GIB = 4.0
"""Frozen features of un-augmented images are kept in memory up to this size: the encoders', and with them the
perceptual network's if there is room for both."""


class Frozen(NamedTuple):
    """What the frozen networks say of a batch: it depends on the images alone, so it can be cached."""

    hidden: list[Tensor]
    target: Features | None
    """None where it is not cached."""


class Cache(NamedTuple):
    """Frozen features of all training images; the encoders' of several variants of them, one variant an epoch."""

    hidden: list[list[Tensor]]
    target: Features | None
    """None where there is no room for it; it is then computed as it is needed."""

    def pick(self, epoch: int, numbers: Tensor, device: torch.device) -> Frozen:
        """Return the rows of the given images."""
        hidden = [states[numbers].to(device) for states in self.hidden[epoch % len(self.hidden)]]
        if self.target is None:
            return Frozen(hidden, None)
        return Frozen(hidden, {key: tokens[numbers].to(device) for key, tokens in self.target.items()})


class TrainingStep(nn.Module):
    """From a batch to its loss; one module, so that precision and device handling wrap all of it."""

    def __init__(self, scorer: AnomalyScorer) -> None:
        super().__init__()
        self.scorer = scorer

    @torch.no_grad()
    def hidden(self, seen: Tensor) -> list[Tensor]:
        """Return the encoders' hidden states of uint8 images (B, S, S, 3)."""
        return self.scorer.autoencoder.hidden(normalise(seen))

    @torch.no_grad()
    def target(self, images: Tensor) -> Features:
        """Return the perceptual features of uint8 images (B, S, S, 3)."""
        return self.scorer.loss_target(normalise(images))

    def forward(self, images: Tensor, seen: Tensor, frozen: Frozen | None, pixel_loss: bool) -> Tensor:
        """Return the loss of uint8 images (B, S, S, 3): of their pixels (smooth L1), or the perceptual loss.

        `seen` is what the encoders look at, the images themselves or the images with something pasted in.
        """
        hidden = frozen.hidden if frozen else self.hidden(seen)
        reconstruction = self.scorer.autoencoder.reconstruct(hidden)
        if pixel_loss:
            # Not L1: its minimum over many images is their median, a brain without folds, and it is slow to leave.
            return F.smooth_l1_loss(reconstruction.float(), normalise(images))
        target = frozen.target if frozen else None
        if target is None:
            target = self.target(images)
        return self.scorer.loss(target, reconstruction)


class TrainingError(QfaeError):
    """A run that cannot go on."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    best: Path
    last: Path
    best_auroc: float | None
    best_epoch: int
    conditioning: Conditioning
    """Of the best checkpoint: how far rounding moves its scores."""


@dataclass
class Run:
    """The moving parts of a training run."""

    config: Config
    out: Path
    fabric: Fabric
    step: TrainingStep
    wrapped: Any
    optimizer: torch.optim.Optimizer
    schedule: OneCycleLR
    train: Split
    valid: Split
    frozen_records: list[dict[str, str]]
    embedded: dict[str, dict[str, Tensor]]
    reporter: Reporter
    epoch: int = 0
    best_auroc: float | None = None
    best_epoch: int = 0
    seconds: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the incomplete last one is dropped."""
        return len(self.train) // self.config.train.batch_size

    @property
    def last_path(self) -> Path:
        """Where the newest checkpoint goes."""
        return last_beside(self.out)


@whole_float32()
def fit(
    config: Config, data: Path, out: Path, *, resume: bool = False, overwrite: bool = False, device: str = "auto"
) -> Result:
    """Train on `data` and write `out` and its `.last` neighbour.

    Raises:
        DataError, InputError: the data set cannot be used, or shows one picture.
        WeightsError: frozen weights are not available, or do not tell the training images apart.
        CheckpointError: there is nothing to resume from, or it is of another configuration, other data
            or other frozen weights, or the best checkpoint is missing.
        OutputError: `out` cannot be written, or exists and neither `resume` nor `overwrite` is set.
        TrainingError: the loss or its gradient is no longer a finite number.

    """
    run = _start(config, data, out, resume, overwrite, device)
    if run.epoch >= config.train.epochs:  # resumed after its end
        return _finished(run)
    cache = _cache(run)
    with run.reporter.running(config.train.epochs * run.steps_per_epoch, run.epoch * run.steps_per_epoch):
        while run.epoch < config.train.epochs:
            began = time.monotonic()
            loss = _epoch(run, cache)
            run.epoch += 1
            due = run.epoch % config.train.validate_every == 0 or run.epoch == config.train.epochs
            metrics = evaluate(run.step.scorer, run.valid, config.train.batch_size) if due else None
            run.seconds += time.monotonic() - began
            if metrics is not None:
                _keep(run, metrics, loss)
    return _finished(run)


def _finished(run: Run) -> Result:
    """Say how the run ended; measure what rounding does to the best checkpoint, unless its file says so already."""
    best = files.load(run.out)
    conditioning = best.conditioning
    if conditioning is None:
        run.reporter.say("measuring how far rounding moves the scores")
        files.load_trained(run.step.scorer, best)
        # Validation images may have been exchanged since, and labels with them.
        known = torch.equal(_parity_images(run.valid), best.parity_images)
        labels = run.valid.anomalous[_parity_numbers(run.valid)].tolist() if known else []
        conditioning = measure(run.step.scorer, best.parity_images, labels)
        files.save(run.out, replace(best, conditioning=conditioning))
    return Result(run.out, run.last_path, run.best_auroc, run.best_epoch, conditioning)


def _start(config: Config, data: Path, out: Path, resume: bool, overwrite: bool, device: str) -> Run:
    check_writable(out)
    last = last_beside(out)
    earlier = resumable(out, config) if resume else None
    if not resume and not overwrite:
        refuse_existing(out)
    reporter = Reporter()
    spec = config.preprocess_spec()
    train = load_split(data, "train", spec)
    valid = load_split(data, "valid", spec)
    if len(train) < config.train.batch_size:
        raise DataError(
            f"data '{data}': {len(train)} training images are fewer than one batch of {config.train.batch_size}; "
            "lower train.batch_size"
        )
    if earlier is not None:
        check_data(last, earlier, train)
    else:
        check_images(data, train)
    torch.manual_seed(config.train.seed)
    fabric = Fabric(accelerator=device, devices=1, precision=config.train.precision)  # type: ignore[arg-type]
    scorer, records = build(config)
    if earlier is not None:
        check_frozen(last, earlier, records)
        files.load_trained(scorer, earlier)
    else:
        check_features(config, scorer, records, data, train, reporter.say)
    if earlier is None and config.model.qformer.query_init == "aligned":
        align(scorer.autoencoder, normalise(train.rgb(slice(ALIGNMENT_IMAGES))))
    if earlier is None and overwrite:
        last.unlink(missing_ok=True)  # or a run that stops before its first checkpoint would resume the old one
    step = TrainingStep(scorer)
    trainable = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=config.train.lr)
    schedule = _schedule(optimizer, config.train, config.train.epochs * (len(train) // config.train.batch_size))
    wrapped, optimizer = fabric.setup(step, optimizer)
    wrapped.mark_forward_method("hidden")
    wrapped.mark_forward_method("target")
    run = Run(
        config, out, fabric, step, wrapped, optimizer, schedule, train, valid, records,
        files.embed_frozen(config, records), reporter,
    )  # fmt: skip
    if earlier is not None:
        _restore(run, earlier)
    device_name = torch.cuda.get_device_name() if fabric.device.type == "cuda" else fabric.device.type
    for name, split in (("train", train), ("valid", valid)):
        reporter.say(held_against(config.data.benchmark, name, len(split)))
    reporter.say(f"training on {device_name}")
    return run


def _schedule(optimizer: torch.optim.Optimizer, options: Train, total: int) -> OneCycleLR:
    """Return the learning rate's course over `total` steps."""
    pct_start = options.pct_start
    if pct_start * total == 1:  # the rise takes exactly one step, where torch divides by zero
        if total == 1:
            total = 2  # of which one is taken; the share cannot grow beyond 1
        else:
            pct_start *= 1 + 1e-9
    return OneCycleLR(optimizer, options.lr, total_steps=total, pct_start=pct_start)


def _restore(run: Run, earlier: Checkpoint) -> None:
    state = earlier.resume
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    run.epoch, run.best_auroc, run.best_epoch = state["epoch"], state["best_auroc"], state["best_epoch"]
    run.seconds = state["seconds"]
    run.reporter.say(f"resuming after epoch {run.epoch}")


def _epoch(run: Run, cache: Cache | None) -> float:
    """Train one epoch; return its mean loss."""
    options = run.config.train
    run.step.train()
    warmup = options.pixel_warmup * options.epochs * run.steps_per_epoch
    total = torch.zeros((), device=run.fabric.device)
    for number, (images, numbers) in enumerate(_batches(run)):
        frozen = cache.pick(run.epoch, numbers, run.fabric.device) if cache else None
        pixel_loss = run.epoch * run.steps_per_epoch + number < warmup
        seen = images if cache else paste(images, run.config.augment.paste)
        images, seen = (part.to(run.fabric.device, non_blocking=True) for part in (images, seen))
        loss = run.wrapped(images, seen, frozen, pixel_loss)
        run.optimizer.zero_grad()
        run.fabric.backward(loss)
        if options.grad_clip:
            norm = run.fabric.clip_gradients(
                run.wrapped, run.optimizer, max_norm=options.grad_clip, error_if_nonfinite=False
            )
            # Steps with infinite gradients belong to float16: its scaler leaves them out and scales less.
            if options.precision != "16-mixed" and norm is not None and not torch.isfinite(norm):
                raise _diverged(run, f"the norm of the gradient is {float(norm)}")
        run.optimizer.step()
        run.schedule.step()
        total += loss.detach()
        run.reporter.advance(f"epoch {run.epoch + 1}/{options.epochs} {'pixels' if pixel_loss else 'perceptual'}", loss)
    if not torch.isfinite(total):
        raise _diverged(run, f"the loss is {float(total)}")
    return float(total) / run.steps_per_epoch


def _diverged(run: Run, what: str) -> TrainingError:
    return TrainingError(
        f"{what} in epoch {run.epoch + 1}: training has diverged; start anew with a lower train.lr "
        f"(it was {run.config.train.lr})"
    )


def _batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield uint8 images (B, S, S, 3) and their numbers, shuffled by (seed, epoch); the incomplete last is dropped."""
    options = run.config.train
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.epoch)
    torch.manual_seed(options.seed * 1_000_003 + run.epoch)  # dropout
    change = augmentation(run.config.augment, run.config.model.image_size)
    if change is None:
        order = torch.randperm(len(run.train), generator=generator)
        for numbers in order.split(options.batch_size)[: run.steps_per_epoch]:
            yield run.train.rgb(numbers), numbers
        return
    yield from DataLoader(
        TrainingImages(run.train, change),
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        generator=generator,
        pin_memory=run.fabric.device.type == "cuda",
    )


@torch.no_grad()
def _cache(run: Run) -> Cache | None:
    """Return the frozen features of all training images where they are finite in number and have room."""
    options = run.config.augment
    wanted = options.paste_variants if options.paste else 1
    if options.enabled or not wanted:
        return None
    run.step.eval()
    variants, room_for_target = _room(run, wanted)
    if not variants:
        return None
    if variants < wanted:
        run.reporter.say(
            f"keeping {variants} of {wanted} versions of each image (augment.paste_variants): "
            f"the features of more pass {CACHE_LIMIT_GIB:g} GiB"
        )
    torch.manual_seed(run.config.train.seed)  # of what is pasted, the same in a resumed run
    hidden: list[list[Tensor]] = []
    for _ in run.reporter.track(range(variants), "frozen features"):
        pasted = (paste(images, options.paste) for images in _in_order(run))
        parts = [[_stored(one, run) for one in run.wrapped.hidden(seen.to(run.fabric.device))] for seen in pasted]
        hidden.append([torch.cat(states) for states in zip(*parts, strict=True)])
    if not room_for_target:
        return Cache(hidden, None)
    targets = [
        {key: tokens.cpu() for key, tokens in run.wrapped.target(images.to(run.fabric.device)).items()}
        for images in _in_order(run)
    ]
    return Cache(hidden, {key: torch.cat([part[key] for part in targets]) for key in targets[0]})


def _room(run: Run, variants: int) -> tuple[int, bool]:
    """Return how many variants' hidden states the cache has room for, and whether it has for the targets too."""
    images = next(_in_order(run))
    batches = len(run.train) / len(images)
    device_images = images.to(run.fabric.device)
    of_states = batches * sum(_stored(states, run).nbytes for states in run.wrapped.hidden(device_images))
    of_targets = batches * sum(tokens.nbytes for tokens in run.wrapped.target(device_images).values())
    limit = CACHE_LIMIT_GIB * 2**30
    variants = min(variants, int(limit / of_states))
    return variants, variants * of_states + of_targets <= limit


def _in_order(run: Run) -> Iterator[Tensor]:
    """Yield all training images in batches, uint8 (B, S, S, 3)."""
    for numbers in torch.arange(len(run.train)).split(run.config.train.batch_size):
        yield run.train.rgb(numbers)


def _stored(states: Tensor, run: Run) -> Tensor:
    """Return hidden states as the cache keeps them: in the type that the mixed precision would cast them to."""
    return states.to("cpu", torch.bfloat16 if run.config.train.precision == "bf16-mixed" else torch.float32)


def _keep(run: Run, metrics: Metrics, loss: float) -> None:
    """Write the last checkpoint, and the best one if this is it; report."""
    auroc = metrics.image_auroc
    best = auroc is None or run.best_auroc is None or auroc >= run.best_auroc
    if best:
        run.best_auroc, run.best_epoch = auroc, run.epoch
    record = {
        "epoch": run.epoch,
        "epochs": run.config.train.epochs,
        "loss": loss,
        "valid_image_auroc": auroc,
        "valid_pixel_auroc": metrics.pixel_auroc,
        "train_images": len(run.train),
        "seconds": round(run.seconds, 1),
        "torch": str(torch.__version__),  # a class of its own, which weights_only would refuse to load
    }
    newest = Checkpoint(
        config=run.config,
        trained=run.step.scorer.autoencoder.trained_state(),
        frozen=run.frozen_records,
        embedded=run.embedded,
        parity_images=_parity_images(run.valid),
        record=record,
    )
    if best:
        files.save(run.out, newest)
    state = {
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "epoch": run.epoch,
        "best_auroc": run.best_auroc,
        "best_epoch": run.best_epoch,
        "seconds": run.seconds,
        "train_sha256": run.train.sha256,
    }
    files.save(run.last_path, replace(newest, resume=state))
    shown = " ".join(f"{k} {v:.4f}" for k, v in (("image", auroc), ("pixel", metrics.pixel_auroc)) if v is not None)
    run.reporter.say(f"epoch {run.epoch}: loss {loss:.5f}, validation AUROC {shown or 'unknown (one class only)'}")


def _parity_images(valid: Split) -> Tensor:
    """Return up to PARITY_IMAGES validation images, uint8 (N, S, S, 3), spread over the split and its classes."""
    return valid.rgb(_parity_numbers(valid)).contiguous()


def _parity_numbers(valid: Split) -> Tensor:
    return torch.linspace(0, len(valid) - 1, min(PARITY_IMAGES, len(valid))).round().long()
