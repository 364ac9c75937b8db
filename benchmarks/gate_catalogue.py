"""The faults that the gates are tried with, on a model of the demonstration's shape; gate_faults.py makes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gate_faults import (
    SIZES,
    STAGES,
    Fault,
    above,
    at,
    bf16,
    border,
    carried,
    enters,
    epsilon,
    every,
    fast_gelu,
    gelu,
    greyed,
    half,
    head,
    inner_score,
    noise,
    products,
    put,
    resized,
    rounded_after,
    shift,
    soft,
    swap_heads,
    tf32,
    through,
    times,
    weaken,
    where,
    within,
    without_null,
    without_prefix,
    written,
)


def _edit(function: Any, *arguments: Any) -> Any:
    return lambda graph: function(graph, *arguments)


def weights() -> list[Fault]:
    """Return faults of weights."""
    places = {
        ("q", 1.001): ("encoder.1", "decoder.1", "perceptual.1"),
        ("k", 1.01): ("encoder.3", "decoder.3", "perceptual.1"),
        ("v", 1.001): ("encoder.5", "decoder.2", "perceptual.1"),
    }
    made = [
        (f"one head's {part} x {factor} in {place}", _edit(head, place, part, factor))
        for (part, factor), named in places.items()
        for place in named
    ]
    made += [
        (f"noise of {share:g} on {place}", _edit(noise, place, share))
        for share, place in (
            *((1e-4, one) for one in ("encoder.1.fc1", "qformer.1.cross.kv1", "decoder.2.fc2", "perceptual.1.proj")),
            *((1e-2, one) for one in ("encoder.4.proj", "decoder.head")),
        )
    ]
    made += [(f"weights through FP16: {stage}", _edit(through, stage, torch.float16)) for stage in STAGES]
    made.append(("weights through BF16", _edit(through, "", torch.bfloat16)))
    rows = {"encoder.1.fc1": np.s_[5], "decoder.head": np.s_[:, 7], "perceptual.1.qkv": np.s_[9]}
    made += [(f"a row zeroed: {place}", _edit(put, f"{place}.weight", row, 0.0)) for place, row in rows.items()]
    biased = ("encoder.1.fc1", "decoder.head", "perceptual.1.fc2")
    made += [(f"bias dropped: {place}", _edit(put, f"{place}.bias", ..., 0.0)) for place in biased]
    made += [
        (f"two heads' {part} swapped in {place}", _edit(swap_heads, place, part))
        for part, place in (("k", "encoder.1"), ("v", "decoder.1"), ("q", "perceptual.1"))
    ]
    made.append(("one weight's sign: decoder.1.fc2", _edit(times, "decoder.1.fc2.weight", (3, 3), -1.0)))
    made.append(("one weight times 256: encoder.2.fc1", _edit(times, "encoder.2.fc1.weight", (3, 3), 256.0)))
    return [Fault("weights", name, edit) for name, edit in made]


def constants() -> list[Fault]:
    """Return faults of constants."""
    others = {"encoder": 1e-5, "qformer": 1e-6, "decoder": 1e-6, "perceptual": 1e-5}
    made = [(f"LayerNorm eps {eps:g} in {stage}", _edit(epsilon, stage, eps)) for stage, eps in others.items()]
    made += [(f"LayerNorm eps 0.001 in {stage}", _edit(epsilon, stage, 1e-3)) for stage in STAGES[::3]]
    made += [(f"GELU by tanh in {stage}", gelu(stage)) for stage in STAGES]
    made.append(("GELU by a sigmoid in encoder.1", gelu("encoder.1", fast_gelu)))
    made += [
        (f"softmax scale x 1.01 in {place}", soft(place, lambda right: lambda x, **given: right(x * 1.01, **given)))
        for place in ("encoder.1", "decoder.3", "perceptual")
    ]
    tables = ("encoder.embed.table", "decoder.embed.table", "perceptual.embed4.table", "perceptual.embed14.table")
    made += [(f"positions shifted by one: {table}", _edit(shift, table)) for table in tables]
    made.append(("null key and value dropped", without_null))
    made += [(f"a prefix token dropped: {stage}", _edit(without_prefix, stage)) for stage in ("encoder", "decoder")]
    made.append(("class token zeroed: perceptual 7", _edit(put, "perceptual.embed7.prefix.value", ..., 0.0)))
    made.append(("mean off by half a grey level", enters(lambda x: x + 0.5 / 64)))
    made.append(("standard deviation off by 0.1 %", enters(lambda x: x * 1.001)))
    return [Fault("constants", name, edit) for name, edit in made]


def precision() -> list[Fault]:
    """Return faults of precision."""
    made = [(f"TF32 products in {one or 'all'}", products(one, tf32)) for one in ("", "encoder.1.fc1", "perceptual")]
    made += [
        (f"products' results in FP16: {one}", products(one, half, rounded_after))
        for one in (*STAGES[::2], "perceptual")
    ]
    made += [(f"BF16 products in {one}", products(one, bf16)) for one in ("qformer", "perceptual")]
    made.append(("softmax in FP16: decoder", soft("decoder", partial(rounded_after, to=half))))

    def cosine(right: Any) -> Any:
        return lambda a, b, **given: right(half(a), half(b), **given)

    made.append(("features in FP16 before the cosine", lambda graph: within(graph, "", F, "cosine_similarity", cosine)))
    return [Fault("precision", name, edit) for name, edit in made]


def geometry() -> list[Fault]:
    """Return faults of where things are."""
    found = [
        Fault("geometry", "maps resized with align_corners", resized(align_corners=True)),
        Fault("geometry", "maps resized to the nearest", resized(mode="nearest", align_corners="")),
        Fault("geometry", "maps resized bicubically", resized(mode="bicubic")),
    ]
    turned = {
        "transposed": lambda maps: maps.transpose(0, 2, 1),
        "flipped": lambda maps: maps[:, :, ::-1],
        "moved by a pixel": lambda maps: np.roll(maps, 1, 2),
    }
    found += [Fault("geometry", f"map {name}", after=written("anomaly_map", one)) for name, one in turned.items()]
    for width in (1, 4, 8):
        name = f"border of {width} px left out of the input"
        found.append(Fault("geometry", name, before=partial(border, width)))
    for width in (1, 2, 8):
        name = f"border of {width} px left out of the maximum"
        found.append(Fault("geometry", name, after=partial(inner_score, width)))
    edge = written("anomaly_map", partial(border, 1))
    return [*found, Fault("geometry", "border of 1 px left out of the map", after=edge)]


def batch() -> list[Fault]:
    """Return faults that show in some batches alone."""
    found = [Fault("batch", f"1 % off in batches of {size}", after=at(size, weaken)) for size in SIZES]
    for size, row in ((2, 1), (16, 0), (16, 15)):
        found.append(Fault("batch", f"1 % off at place {row} of {size}", after=at(size, partial(weaken, rows=[row]))))

    def swapped(got: Any, order: list[int], names: tuple[str, ...]) -> Any:
        return got._replace(**{name: getattr(got, name)[order] for name in names})

    every_output = ("score", "anomaly_map", "reconstruction")
    for size, order, names, said in (
        (4, [1, 0, 2, 3], every_output, "two images swapped in batches of 4"),
        (16, [*range(14), 15, 14], every_output, "the last two images swapped in batches of 16"),
        (16, [*range(15), 14], every_output, "the last image's outputs are the one's before, in batches of 16"),
        (8, [7, *range(7)], ("anomaly_map",), "maps of another image in batches of 8"),
        (16, [*range(1, 16), 0], ("reconstruction",), "reconstructions of another image in batches of 16"),
    ):
        found.append(Fault("batch", said, after=at(size, partial(swapped, order=order, names=names))))
    found.append(Fault("batch", "the map of the batch before, at the first place", after=carried))
    found.append(Fault("batch", "1 % off in every 3rd batch", after=partial(every, 3)))
    found.append(Fault("batch", "1 % off in every 7th batch", after=partial(every, 7)))
    return found


def ranges() -> list[Fault]:
    """Return faults of what is large, small, bright or dark."""
    found = []
    for limit in (2.02, 3.9):
        name = f"scores and maps above {limit} wrapped"
        found.append(Fault("range", name, after=above(limit, lambda one: one - one + 0.01)))
    for limit in (2.1, 3.0):
        name = f"scores and maps clipped at {limit}"
        found.append(Fault("range", name, after=above(limit, partial(np.full_like, fill_value=limit))))
    found += [
        Fault("range", f"scores above {limit} are NaN", after=above(limit, lambda one: np.nan, ("score",)))
        for limit in (2.1, 3.9)
    ]
    found += [
        Fault("range", "scores below 0.0001 are 0", after=lambda images, got, state: weaken(got, got.score < 1e-4, 0)),
        Fault("range", "pixels clipped at 250", before=lambda images: np.minimum(images, 250)),
        Fault("range", "pixels clipped at 5", before=lambda images: np.maximum(images, 5)),
        Fault("range", "bright images times 0.0001", after=where(lambda image: image.mean() > 70, 1e-4)),
        Fault("range", "dark images times 0.0001", after=where(lambda image: image.mean() < 40, 1e-4)),
        Fault("range", "NaN for a constant image", after=where(lambda image: np.ptp(image) == 0, np.nan)),
        Fault("range", "images of a mean above 200 half as high", after=where(lambda image: image.mean() > 200, 0.5)),
    ]
    return found


def content() -> list[Fault]:
    """Return faults of images of one kind alone, and of one place."""

    def between(low: float, high: float) -> Any:
        return where(lambda image: low <= image.mean() < high, 0.99)

    def in_score(images: Any, got: Any, state: Any) -> None:
        weaken(got, (got.score > 2.9) & (got.score < 3.1))

    def without_pixels(images: Any) -> Any:
        around = np.stack([np.roll(images, step, axis) for axis in (1, 2) for step in (-1, 1)]).max(0)
        return np.where(images.astype(int) > around.astype(int) + 100, around, images)

    def smoothed(images: Any) -> Any:
        pairs = (images.astype(int) + np.roll(images, 1, 2)) // 2
        fine = np.abs(np.diff(images.astype(int), axis=2)).mean((1, 2, 3)) > 60
        return np.where(fine[:, None, None, None], pairs, images).astype(np.uint8)

    def zeroed(place: Any) -> Any:
        def change(images: Any) -> Any:
            images[place] = 0
            return images

        return change

    middle = np.s_[:, 55:57, 55:57]
    return [
        Fault("content", "images of a mean of 60 to 100 1 % off", after=between(60, 100)),
        Fault("content", "images of a mean of 100 to 140 1 % off", after=between(100, 140)),
        Fault("content", "images of a mean of 140 to 200 1 % off", after=between(140, 200)),
        Fault("content", "scores from 2.9 to 3.1 1 % off", after=in_score),
        Fault(
            "content", "images of little contrast half as high", after=where(lambda image: 0 < image.std() < 12, 0.5)
        ),
        Fault("content", "images without a black pixel 1 % off", after=where(lambda image: image.min() > 0, 0.99)),
        Fault(
            "content", "images with a channel of zeros NaN", after=where(lambda one: (~one.any((0, 1))).any(), np.nan)
        ),
        Fault("content", "single bright pixels removed", before=without_pixels),
        Fault("content", "detail of single pixels smoothed", before=smoothed),
        Fault("content", "one row left out of the input", before=zeroed(np.s_[:, 37])),
        Fault("content", "four pixels in the middle left out of the input", before=zeroed(middle)),
        Fault("content", "one corner's pixel left out of the input", before=zeroed(np.s_[:, -1, -1])),
    ]


def colour() -> list[Fault]:
    """Return faults of colours."""
    made = {
        "strong colours (60 levels) made grey": lambda images: greyed(images, 60),
        "weak colours (up to 20 levels) made grey": lambda images: np.where(
            np.ptp(images, axis=3, keepdims=True) <= 20, greyed(images, 0), images
        ),
        "everything made grey": lambda images: greyed(images, 0),
        "BGR taken for RGB": lambda images: images[..., ::-1],
        "blue dropped for green": lambda images: images[..., [0, 1, 1]],
        "seven bits a channel": lambda images: images & 254,
    }
    found = [Fault("colour", name, before=change) for name, change in made.items()]
    bgr = written("reconstruction", lambda one: one[..., ::-1])
    return [*found, Fault("colour", "the reconstruction in BGR", after=bgr)]


def outputs() -> list[Fault]:
    """Return faults of the outputs themselves."""

    def low(dtype: Any) -> Any:
        return lambda one: one.astype(dtype).astype(np.float32)

    made = [
        ("map through FP16", "anomaly_map", low(np.float16)),
        ("score through FP16", "score", low(np.float16)),
        ("map's negligible values (below 1e-6) are 0", "anomaly_map", lambda one: np.where(one < 1e-6, 0, one)),
        ("reconstruction one level too bright", "reconstruction", lambda one: np.minimum(one, 254) + np.uint8(1)),
        ("reconstruction wraps where it is saturated", "reconstruction", lambda one: np.where(one == 255, 0, one)),
        ("reconstruction of seven bits", "reconstruction", lambda one: one & 254),
        ("score one hundredth of a percent off", "score", lambda one: one * np.float32(1.0001)),
    ]
    found = [Fault("outputs", title, after=written(name, change)) for title, name, change in made]

    def mean(images: Any, got: Any, state: Any) -> Any:
        return got._replace(score=got.anomaly_map.mean((1, 2)))

    def p999(images: Any, got: Any, state: Any) -> Any:
        return got._replace(score=np.percentile(got.anomaly_map, 99.9, axis=(1, 2)).astype(np.float32))

    def cut(images: Any, got: Any, state: Any) -> Any:
        return got._replace(score=got.anomaly_map[:, ::2, ::2].max((1, 2)))

    return [
        *found,
        Fault("outputs", "score is the map's mean", after=mean),
        Fault("outputs", "score is the map's p99.9", after=p999),
        Fault("outputs", "score is the maximum of every second pixel", after=cut),
    ]


def in_part() -> list[Fault]:
    """Return faults of images of one kind at one batch size, or in one place."""

    def of_size(size: int, change: Any) -> Any:
        return lambda images: change(images) if len(images) == size else images

    def reversed_at(place: int) -> Any:
        def change(images: Any) -> Any:
            images[place] = images[place, ..., ::-1]
            return images

        return change

    def alike(size: int, hit: Any, factor: float) -> Any:
        change = where(hit, factor)
        return lambda images, got, state: change(images, got, state) if len(images) == size else None

    def in_window(images: Any, got: Any, state: Any) -> None:
        weaken(got, (got.score > 0.95) & (got.score < 1.65), 0)

    def bordered(images: Any) -> Any:
        inner = np.zeros_like(images)
        inner[:, 2:-2, 2:-2] = images[:, 2:-2, 2:-2]
        return inner

    bgr = [("BGR taken for RGB", size, lambda images: images[..., ::-1]) for size in (1, 2, 4, 8, 16)]
    places = [(f"BGR taken for RGB at place {place}", size, reversed_at(place)) for size, place in ((16, 15), (8, 5))]
    border = ("a border of two pixels left out", 2, bordered)
    found = [
        Fault("part", f"{said} in batches of {size}", before=of_size(size, change))
        for said, size, change in (*bgr, *places, border)
    ]
    hits = (
        ("bright images times 0.0001", lambda image: image.mean() > 100, 1e-4),
        ("NaN for a constant image", lambda image: np.ptp(image) == 0, np.nan),
    )
    found += [
        Fault("part", f"{said} in batches of {size}", after=alike(size, hit, factor))
        for said, hit, factor in hits
        for size in (1, 4)
    ]
    return [*found, Fault("part", "scores from 0.95 to 1.65 are 0", after=in_window)]


FAULTS = [
    *weights(),
    *constants(),
    *precision(),
    *geometry(),
    *batch(),
    *ranges(),
    *content(),
    *colour(),
    *outputs(),
    *in_part(),
]
