"""Questions answered by experiment: short trainings on one budget, each from several seeds.

`python trials.py` answers all of both notebooks' again, on the full data, into figures/trials.json;
`python trials.py mnist` answers one. The notebooks show that record; in the quick profile they also
ask the sample.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recipes
import report
import settings
import utils
from files import UsageError

CLASSIFICATION = {  # what a notebook asks, in words
    "mnist": "MNIST: batch, width, a ResBlock, the learning rate",
    "cifar10": "CIFAR-10: where the convolutions are, and the batch",
    "cifar10-ideas": "CIFAR-10: what each idea of `FastNet` is worth",
}
SEGMENTATION = {
    "segmentation": "Segmentation: what each rung of the ladder is worth, and `SkipNet`",
    "ladder": "Segmentation: the ladder alone, with more epochs",
    "starts": "Segmentation: the ladder, with residual paths that start at zero",
    "scenes": "Segmentation: the same scenes every epoch, or new ones",
    "strokes": "Segmentation: what the loss does for thin strokes",
    "skips": "Segmentation: what the encoder's features are worth to `SkipNet`'s decoder",
}
QUESTIONS = CLASSIFICATION | SEGMENTATION
asked: set[str] | None = None  # those that `python trials.py` answers now


@dataclass(frozen=True)
class Variant:
    """One answer that is tried: a model, its batches and its highest learning rate.

    With `muon` the rate is that of the filters; AdamW has a weight decay of 0.05.
    """

    make: Callable[[], nn.Module]
    batches: utils.Batches
    lr: float
    muon: bool = False  # Muon, in place of AdamW
    schedule: Literal["cycle", "line", "constant"] | None = None  # None: Muon's line, AdamW's cycle
    smoothing: float = 0.0  # label_smoothing, for a loss that takes it, as cross_entropy does
    views: Callable[[nn.Module], nn.Module] | None = None  # what is scored, recipes.Views say
    loss: Callable[..., Tensor] = F.cross_entropy  # a function of (logits, labels, ignore_index)


def compare(
    question: str,
    variants: Mapping[str, Variant],
    validation: utils.Batches,
    epochs: int,
    run: settings.Settings,
    seeds: Sequence[int] | None = None,
) -> str:
    """Train every variant from every seed and return a table, a line a variant.

    Scores are of the validation set after the last epoch, mean and sample standard deviation over
    the seeds, by default three, in the quick profile two; `jitter` is the mean absolute change of
    the score between epochs in the second half. For label maps the mean IoU stands beside them.
    trials.json keeps the rows; the record of the full data, where there is one, is shown below
    them. On the full data `python trials.py` alone runs them: a full or short run of a notebook
    shows what is on record, and nothing is run on your own data. What is trained already of the
    full data is kept until the question is answered, so that one that was cut short goes on.
    """
    full = settings.ROOT / "figures"
    seeds = seeds or run.pick(full=(0, 1, 2), quick=(0, 1))
    if len(seeds) < 2:
        raise UsageError(f"{question}: one seed has no spread; give two or more.")
    if asked is not None and question not in asked:
        return f"{question}: not run now."
    record = [row for row in load(full) if row["question"] == question]
    if validation.dataset.source == "own":
        text = "Not run on your own data."
    elif asked is None and run.profile != "quick":
        text = f"Not run in the {run.profile} profile: `python trials.py {question}` does that."
    else:
        started = f"trials/{question}-{epochs}" if run.profile == "full" else None
        rows = [
            _row(question, name, variant, validation, epochs, run, seeds, started)
            for name, variant in variants.items()
        ]
        if settings.rank() == 0:
            report.keep(rows, run.figures, "trials.json", "question")
            if started:
                shutil.rmtree(run.checkpoint_dir / started, ignore_errors=True)
        text = table(rows)
    if record and (run.figures != full or asked is None):
        text += f"\n\nOn record, of the full data:\n\n{table(record)}"
    return text


def _row(question, name, variant, validation, epochs, run, seeds, started) -> dict:
    """All there is to know about a variant's runs; `started` is the folder of their checkpoints."""
    histories, scores, pixels, data = [], [], [], variant.batches.dataset
    quiet, batches = replace(run, quiet=True), copy.copy(variant.batches)
    loss = variant.loss
    loss_name = getattr(loss, "__name__", type(loss).__name__)
    if variant.smoothing:
        loss = partial(loss, label_smoothing=variant.smoothing)
    for seed in seeds:
        torch.manual_seed(seed)
        batches.seed = seed
        model = variant.make().to(run.device, memory_format=torch.channels_last)
        optimizer, schedule = _optimizer(model, variant, epochs)
        title = re.sub(r"\W+", "-", f"{name} {seed}")
        checkpoint = started and run.checkpoint(f"{started}/{title}")
        history = utils.train(
            model, optimizer, batches, validation, epochs, quiet, schedule, loss, checkpoint
        )
        history.raise_if_stopped(name)
        histories.append(history)
        scores.append(history[-1].validation_accuracy)
        if variant.views:
            scores[-1] = utils.evaluate(variant.views(model), validation, run)
        if data.labels.ndim == 3:
            of_pixels = utils.evaluate_pixels(model, validation, len(data.classes), run)
            pixels.append(report.pixel_facts(of_pixels, data.classes))
    curves = np.array([[e.validation_accuracy for e in history] for history in histories])
    changes = np.abs(np.diff(curves[:, max(0, epochs // 2 - 1) :]))
    ious = [one["mean_iou"] for one in pixels]
    kinds = [kind for kind in report.KINDS if pixels and kind in pixels[0]]
    devices = dict.fromkeys(history.made["device"] for history in histories)
    return dict(
        question=question,
        variant=name,
        seeds=list(seeds),
        epochs=epochs,
        mean=np.mean(scores),
        spread=np.std(scores, ddof=1),
        jitter=changes.mean() if changes.size else None,
        mean_iou=np.mean(ious) if ious else None,
        iou_spread=np.std(ious, ddof=1) if ious else None,
        **{f"{kind}_iou": np.mean([one[kind]["mean_iou"] for one in pixels]) for kind in kinds},
        seconds=np.mean([sum(e.seconds for e in history) for history in histories]),
        multiply_adds=report.multiply_adds(model, data.images.shape[1:]),
        batch_size=batches.batch_size,
        learning_rate=variant.lr,
        parameters=report.parameters(model),
        recipe=f"Muon {variant.muon}, {_schedule(variant)}, smoothing {variant.smoothing}, "
        f"views {getattr(variant.views, 'keywords', variant.views)}, {batches.augmentation}"
        + ("" if variant.loss is F.cross_entropy else f", {loss_name}"),
        dataset=data.name,
        source=data.source,
        split=f"{len(data)} training, {len(validation.dataset)} validation images",
        precision=settings.dtype_name(run.precision),
        **{**histories[-1].made, "device": ", ".join(devices)},
    )


def _optimizer(model: nn.Module, variant: Variant, epochs: int):
    """(optimizer, schedule) of a variant."""
    lr, batches = variant.lr, variant.batches
    if variant.muon:
        optimizer = recipes.Muon(model, lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=True)
    if _schedule(variant) == "line":
        return optimizer, recipes.linear_decay(optimizer, batches, epochs)
    if _schedule(variant) == "constant":
        return optimizer, None
    peaks = [group["lr"] for group in optimizer.param_groups]
    return optimizer, utils.one_cycle(optimizer, batches, epochs, peaks)


def _schedule(variant: Variant) -> str:
    return variant.schedule or ("line" if variant.muon else "cycle")


def load(folder: Path) -> list[dict]:
    """The rows of folder/trials.json."""
    return report.load_records(folder, "trials.json")


def table(rows: Sequence[dict]) -> str:
    """Rows as a table, and what they were made on."""
    wide = max(len(row["variant"]) for row in rows) + 2
    pixels, apart = rows[0]["mean_iou"] is not None, "digits_iou" in rows[0]
    jitters = not pixels and rows[0]["epochs"] >= 4  # fewer are all progress
    lines = [
        f"{'':<{wide}}{'parameters':>11}{'mult-adds':>11}{'seconds':>9}{'score %':>9}{'spread':>8}"
    ]
    lines[0] += f"{'mean IoU %':>11}" * pixels + f"{'jitter':>8}" * jitters
    if apart:  # the mean IoU's spread, and its two halves
        lines[0] += f"{'spread':>8}{'digits':>8}{'backgrounds':>13}"
    for row in rows:
        lines.append(
            f"{row['variant']:<{wide}}{row['parameters']:>11,}"
            f"{row['multiply_adds'] / 1e6:>9,.1f} M{row['seconds']:>9.1f}{row['mean']:>9.2f}"
            f"{row['spread']:>8.2f}"
        )
        if pixels:
            lines[-1] += f"{row['mean_iou']:>11.2f}"
        if jitters:
            lines[-1] += f"{row['jitter']:>8.2f}"
        if apart:
            lines[-1] += f"{row['iou_spread']:>8.2f}{row['digits_iou']:>8.2f}"
            lines[-1] += f"{row['backgrounds_iou']:>13.2f}"
    row = rows[0]
    devices, precisions = (dict.fromkeys(r[key] for r in rows) for key in ("device", "precision"))
    lines.append(
        f"{len(row['seeds'])} seeds each, {settings.in_words(row['epochs'])}; {row['dataset']} "
        f"({row['source']}), {row['split']}; {', '.join(precisions)}; {', '.join(devices)}"
    )
    return "\n".join(lines)


def main() -> None:
    """Run the notebooks' cells that the chosen questions need, in the full or quick profile."""
    import trials  # what the notebooks know by this name, which is not __main__

    chosen = set(sys.argv[1:])
    if unknown := chosen - set(QUESTIONS):
        raise SystemExit(f"{', '.join(unknown)}? The questions are {', '.join(QUESTIONS)}.")
    trials.asked = chosen or set(QUESTIONS)
    if os.environ.get("PROFILE") != "quick":
        os.environ["PROFILE"] = "full"
    matplotlib.use("agg")
    tags = {"definition", "trials", *trials.asked}
    if trials.asked & set(CLASSIFICATION):
        report.notebook_definitions("imageclassification.ipynb", tags)
    if trials.asked & set(SEGMENTATION):
        report.notebook_definitions("imagesegmentation.ipynb", tags)


if __name__ == "__main__":
    main()
