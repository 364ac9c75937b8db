"""Pretrain the demo's tiny vision transformers by masked autoencoding on the normal training slices.

    python -m demo.pretrain encoder --data build/demo/data --out build/demo/demo_encoder.safetensors

The published models stand on DINOv2 and MAE backbones of 300 million weights that saw natural images; the demo has no
such thing at hand and makes two of its own, an encoder and a perceptual network. Both differ from plain MAE (He et al.
2022) in one point: the patch size changes from step to step between three, the kernel and the position table being
resampled exactly as the perceptual network does it.

A tiny transformer that learns nothing else keeps its hidden states in two or three dimensions of 128. A projection that
reads the others amplifies them by hundreds, and with them what FP16 rounds. So the encoder is also asked to use all of
them: the second moment of some blocks' states, E[x x^T], is drawn to the identity, and the decoder reads the mean of
all blocks' normalised states, so that each of them has to tell something. VICReg (Bardes et al. 2022) asks nearly the
same of the covariance of embeddings; that would leave the mean free, which grew to 99 % of the states' mean square, so
that a rounding of 0.05 % was one of 0.5 % of what differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn
from safetensors.torch import save
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from demo.dataset import COUNTS
from qfae_runtime.layout import find_images
from qfae_runtime.preprocess import preprocess
from qfae_runtime.readers.image import read_image
from qfae_train.autoencoder import normalise, perceptual_backbone
from qfae_train.backbone import create
from qfae_train.config import Config, load
from qfae_train.positions import sincos_2d

MASKED = {8: 0.75, 16: 0.6, 28: 0.5}
"""Fraction of tokens hidden, by patch size: larger patches hide more with each token."""

SHARE = {8: 0.5, 16: 0.3, 28: 0.2}
"""Fraction of the steps taken at each patch size."""


@dataclass(frozen=True)
class Recipe:
    """What is asked of a backbone apart from predicting hidden patches."""

    depth: int
    """Blocks that are pretrained; the shipped file holds the first ones, as many as the preset asks for."""
    steps: int
    """Optimiser steps."""
    slices: int
    """Slices seen: those numbered below this."""
    moment: float = 0.0
    """Weight of the distance between the second moment of hidden states and the identity."""
    moment_blocks: tuple[int, ...] = ()
    """Blocks whose states that distance is taken of, numbered from 1."""
    all_blocks: bool = False
    """The decoder reads the mean of all blocks' normalised states in place of the last block's."""


RECIPES = {
    "encoder": Recipe(
        depth=6, steps=6000, slices=COUNTS["train", "good"], moment=0.02, moment_blocks=(1, 3, 5), all_blocks=True
    ),
    "perceptual": Recipe(depth=6, steps=4000, slices=3000),
}


class MaskedAutoencoder(nn.Module):
    """A ViT that sees some patches, and a small decoder that predicts the pixels of the others."""

    def __init__(self, vit: Any, recipe: Recipe, patch_sizes: Sequence[int], width: int = 64, depth: int = 1) -> None:
        super().__init__()
        self.vit = vit
        self.recipe = recipe
        self.size: int = vit.patch_embed.img_size[0]
        grid = vit.patch_embed.grid_size[0]
        table = torch.cat([torch.zeros(1, vit.embed_dim), sincos_2d(vit.embed_dim, grid)])[None]
        vit.pos_embed = nn.Parameter(table, requires_grad=False)
        for p in patch_sizes:
            side = self.size // p
            resampled = resample_abs_pos_embed(table, new_size=[side, side], num_prefix_tokens=1)
            self.register_buffer(f"table_{p}", resampled.clone())
            self.register_buffer(f"decoder_table_{p}", sincos_2d(width, side)[None])
        self.into = nn.Linear(vit.embed_dim, width)
        self.hidden = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 2, 4.0, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({str(p): nn.Linear(width, p * p) for p in patch_sizes})

    def forward(self, images: Tensor, patch_size: int) -> Tensor:
        """Return the recipe's loss on normalised grey images (B, 3, S, S)."""
        table = self.get_buffer(f"table_{patch_size}")
        kernel = resample_patch_embed(self.vit.patch_embed.proj.weight, [patch_size, patch_size])
        grid = F.conv2d(images, kernel, self.vit.patch_embed.proj.bias, stride=patch_size)
        tokens = grid.flatten(2).transpose(1, 2) + table[:, 1:]
        batch, count, _ = tokens.shape

        keep = round(count * (1 - MASKED[patch_size]))
        order = torch.rand(batch, count, device=images.device).argsort(dim=1)
        seen, unseen = order[:, :keep], order[:, keep:]
        first = (self.vit.cls_token + table[:, :1]).expand(batch, -1, -1)
        x = torch.cat([first, _pick(tokens, seen)], dim=1)
        states = []
        for block in self.vit.blocks:
            x = block(x)
            states.append(x[:, 1:])
        if self.recipe.all_blocks:
            read = torch.stack([F.layer_norm(one, one.shape[-1:]) for one in states]).mean(0)
        else:
            read = self.vit.norm(states[-1])
        x = self.into(read)

        positions = self.get_buffer(f"decoder_table_{patch_size}").expand(batch, -1, -1)
        x = torch.cat([x + _pick(positions, seen), self.hidden + _pick(positions, unseen)], dim=1)
        for block in self.blocks:
            x = block(x)
        predicted = self.heads[str(patch_size)](self.norm(x[:, keep:]))
        target = _pick(_patches(images[:, :1], patch_size), unseen)
        # Per-patch contrast, as MAE found better; the floor keeps empty background from blowing up.
        mean, std = target.mean(-1, keepdim=True), target.std(-1, keepdim=True)
        loss = F.mse_loss(predicted, (target - mean) / (std + 0.1))
        for number in self.recipe.moment_blocks:
            loss = loss + self.recipe.moment * moment_distance(states[number - 1])
        return loss


def moment_distance(states: Tensor) -> Tensor:
    """Return the squared distance of the second moment of tokens (B, T, D) to the identity, in units of D."""
    flat = states.flatten(0, 1)
    moment = flat.T @ flat / len(flat)
    identity = torch.eye(len(moment), device=states.device)
    return (moment - identity).square().sum() / len(moment)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _patches(images: Tensor, patch_size: int) -> Tensor:
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def load_slices(folder: Path, config: Config, count: int) -> Tensor:
    """Return the preprocessed slices whose file's number is below `count`, uint8 (N, S, S), grey."""
    spec = config.preprocess_spec()
    paths = [path for path in find_images(folder) if int(path.stem) < count]
    slices = [preprocess(read_image(path).pixels, spec).image[..., 0] for path in paths]
    return torch.from_numpy(np.stack(slices))


def batch_of(slices: Tensor, index: Tensor) -> Tensor:
    """Return normalised images (B, 3, S, S); half of the batch is flipped left to right."""
    images = normalise(slices[index][..., None].expand(-1, -1, -1, 3))
    return torch.where(torch.rand(len(index), 1, 1, 1) < 0.5, images, images.flip(3))


def pretrain(
    name: str, config: Config, slices: Tensor, steps: int, batch_size: int, lr: float, seed: int
) -> dict[str, Tensor]:
    """Return the state of the ViT pretrained by the recipe of that name, float16 (what the shipped file holds)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    recipe = RECIPES[name]
    backbone = config.model.encoders[0] if name == "encoder" else perceptual_backbone(config)
    vit = create(replace(backbone, args={**backbone.args, "depth": recipe.depth}), config.model.image_size)
    model = MaskedAutoencoder(vit, recipe, list(SHARE))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    running: dict[int, float] = {}
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}")) as progress:
        task = progress.add_task("masked pretraining", total=steps, loss="")
        for step in range(steps):
            p = int(rng.choice(list(SHARE), p=list(SHARE.values())))
            index = torch.from_numpy(rng.integers(0, len(slices), batch_size))
            loss = model(batch_of(slices, index), p)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            running[p] = 0.98 * running.get(p, loss.item()) + 0.02 * loss.item()
            shown = "  ".join(f"p{k} {v:.3f}" for k, v in sorted(running.items()))
            progress.update(task, advance=1, loss=f"loss {shown}")
            if (step + 1) % 500 == 0:
                progress.console.print(f"step {step + 1}: loss {shown}")
    rescale(vit, batch_of(slices, torch.arange(min(64, len(slices)))))
    kept = create(backbone, config.model.image_size).state_dict()
    return {key: tensor.detach().half().contiguous() for key, tensor in vit.state_dict().items() if key in kept}


@torch.no_grad()
def rescale(vit: Any, images: Tensor) -> None:
    """Scale the residual stream so that hidden states have unit mean square; the function stays the same.

    Every block reads the stream through a LayerNorm, so a common factor on all that is added to it changes no feature's
    direction. Left alone it grows to twenty in pretraining, and a projection trained on such inputs diverges at any
    learning rate that moves the rest.
    """
    hidden = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, norm=False)
    factor = 1.0 / torch.stack(hidden).square().mean().sqrt()
    written = [vit.cls_token, vit.pos_embed, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias]
    for block in vit.blocks:
        written += [block.attn.proj.weight, block.attn.proj.bias, block.mlp.fc2.weight, block.mlp.fc2.bias]
    for tensor in written:
        tensor.mul_(factor)


@click.command()
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Demo data set.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Weight file to write (.safetensors).")
@click.option("--steps", type=int, help="Optimiser steps.  [default: the recipe's]")
@click.option("--batch-size", default=64, show_default=True, help="Slices per step.")
@click.option("--lr", default=1.5e-3, show_default=True, help="Largest learning rate.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights, order and masks.")
def main(name: str, data: Path, out: Path, steps: int | None, batch_size: int, lr: float, seed: int) -> None:
    """Pretrain one of the demo's backbones, by the recipe of that NAME, on the normal training slices."""
    config, steps = load("demo"), steps or RECIPES[name].steps
    slices = load_slices(data / "train", config, RECIPES[name].slices)
    state = pretrain(name, config, slices, steps, batch_size, lr, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = {
        "name": name,
        **asdict(RECIPES[name]),
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "slices": len(slices),
    }
    out.write_bytes(save(state, metadata={"recipe": json.dumps(recipe)}))
    click.echo(f"backbone in {out}")


if __name__ == "__main__":
    main()
