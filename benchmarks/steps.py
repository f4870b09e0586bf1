"""How long a training step of every model takes here: ordinary, and replayed as a CUDA graph.

    python benchmarks/steps.py --json benchmarks/steps.json

Each model has its notebook's batch size, augmentation and optimizer, and a rate that falls, on
random images of the full size: what they show makes no difference to the time. Two epochs are
trained by `utils.train`, the first to warm up and to record the graph; a step is the second's
seconds over its steps, the making of batches included. Validation, checkpoints and plots are not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recipes  # noqa: E402
import report  # noqa: E402
import settings  # noqa: E402
import utils  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A model, and how its notebook trains it."""

    make: Callable[[], nn.Module]
    batch_size: int
    steps: int  # in an epoch here
    shape: tuple[int, ...] = (3, 32, 32)
    pixels: bool = False  # a label for every one
    muon: bool = True
    batches: type = utils.Batches
    options: dict = field(default_factory=lambda: dict(flip=True, shift=4))
    loss: Callable = F.cross_entropy


def cases() -> dict[str, Case]:
    """Every model of both notebooks, by the name of its run."""
    reader = report.notebook_definitions("imageclassification.ipynb")
    painter = report.notebook_definitions("imagesegmentation.ipynb")
    digits = dict(shape=(1, 28, 28), options={})
    found = {
        "mnist": Case(reader.MnistCNN, 16, 1000, muon=False, **digits),
        "cifar10": Case(reader.CifarResNet, 128, 200, muon=False),
    }
    for name, layers in painter.LADDER.items():
        found[name] = Case(partial(painter.Segmenter, layers), 64, 200, pixels=True)
    digits["options"] = reader.WARP
    found["mnist-best"] = Case(reader.DigitNet, 250, 192, batches=recipes.Warped, **digits)
    for aim, shape in reader.SHAPES.items():
        options = dict(flip=True, shift=2, sizes=(32,))
        make = partial(reader.FastNet, *shape)
        found[f"cifar10-{aim}"] = Case(make, 500, 80, batches=recipes.Resized, options=options)
    found["segmentation-best"] = Case(
        painter.SkipNet, 125, 100, pixels=True, batches=recipes.Composed,
        options=dict(flip=True, shift=2), loss=recipes.with_dice,
    )  # fmt: skip
    return found


def noise(count: int, shape: tuple[int, ...], pixels: bool = False) -> utils.Dataset:
    """Random images uint8 (count, *shape), of ten classes; or, with `pixels`, scenes of such."""
    draws = utils.generator(0)
    images = torch.randint(256, (count, *shape), generator=draws, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=draws)
    data = utils.Dataset("noise", "sample", images, labels, utils.DIGITS)
    return utils.compose_scenes(noise(count, (1, 28, 28)), data, seed=0) if pixels else data


def measure(case: Case, run: settings.Settings) -> float:
    """Seconds of a training step."""
    data = noise(case.batch_size * case.steps, case.shape, case.pixels)
    torch.manual_seed(0)
    model = case.make().to(run.device, memory_format=torch.channels_last)
    batches = case.batches(data, case.batch_size, run, shuffle=True, **case.options)
    if case.muon:
        optimizer = recipes.Muon(model, 0.05)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=True)
    schedule = recipes.linear_decay(optimizer, batches, 2)
    some = utils.Batches(data.subset(torch.arange(case.batch_size)), case.batch_size, run)
    history = utils.train(model, optimizer, batches, some, 2, run, schedule, case.loss)
    history.raise_if_stopped(type(model).__name__)
    return history[-1].seconds / len(batches)


def table(rows: list[dict]) -> str:
    """A Markdown table: milliseconds a step, and what the write-up's epochs come to."""
    lines = []
    for row in rows:
        steps = [row.get(kind) for kind in ("step_seconds", "replayed_seconds")]
        steps = [f"{1e3 * s:.2f} ms" if s else "-" for s in steps]
        whole = row.get("epochs_seconds")
        whole = f"{row['epochs']}, {report.duration(whole)}" if whole else "-"
        lines.append([f"`{row['model']}`", f"{row['batch_size']}", *steps, whole])
    head = "model | batch | ordinary step | replayed | the write-up's epochs, replayed"
    return report.markdown_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="four steps each")
    options = parser.parse_args()
    run = replace(utils.settings(environ={**os.environ, "PROFILE": "full"}), quiet=True)
    print(run, flush=True)
    facts, rows = settings.measured_on(run), []
    for name, case in cases().items():
        case = replace(case, steps=4) if options.quick else case
        row = dict(model=name, batch_size=case.batch_size, steps=case.steps)
        row |= dict(step_seconds=measure(case, replace(run, graphs=False)))
        if run.graphs:
            row |= dict(replayed_seconds=measure(case, run))
            if old := report.WRITE_UP.get(name):
                images = 48_000 if name == "mnist" else 40_000  # in an epoch of the write-up's
                steps = old["epochs"] * math.ceil(images / case.batch_size)
                whole = steps * row["replayed_seconds"]
                row |= dict(epochs=old["epochs"], epochs_seconds=whole)
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    facts |= dict(six_models_seconds=sum(row.get("epochs_seconds", 0) for row in rows), rows=rows)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
