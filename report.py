"""What a run leaves behind: its facts, its record and figure, and pictures of what the model does.

Everything here is drawn from records and predictions; nothing is trained. A figure needs its record
and nothing else, so figures/ can be drawn again from figures/results.json.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import recipes
from files import UsageError, locked, read_image, reason, write_whole
from settings import ROOT, Settings, dtype_name, in_words, rank
from utils import IGNORE, NOT_PUBLISHED, Batches, ClassScores, Dataset, Epoch, History

KINDS = ("digits", "backgrounds")  # what the pixels of MNIST-on-CIFAR-10 are of

# The scores to beat, as the write-up gives them: percent on its 20% split, minutes of training.
WRITE_UP = {
    "mnist": dict(best=93.7625, best_epoch=41, final=93.725, epochs=100, minutes=32, gpu="a T4"),
    "cifar10": dict(best=76.83, best_epoch=35, final=76.5225, epochs=100, minutes=20, gpu="a T4"),
    "segmentation-1": dict(
        best=59.267421875, best_epoch=99, final=59.11447265625, epochs=100, minutes=151.514306,
        gpu="a T4",
    ),
    "segmentation-2": dict(
        best=65.432373046875, best_epoch=35, final=65.160849609375, epochs=50,
        minutes=236.943253203, gpu="a T4",
    ),
    "segmentation-3": dict(
        best=68.498642578125, best_epoch=28, final=67.664384765625, epochs=34, minutes=211.102264,
        gpu="a T4",
    ),
    "segmentation-4": dict(
        best=75.506806640625, best_epoch=56, final=75.3687890625, epochs=100, minutes=143.612789,
        gpu="an A1000",
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------- model facts


def parameters(model: nn.Module) -> int:
    """How many trainable parameters a model has."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.inference_mode()
def multiply_adds(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of one forward pass over one image of shape (C, H, W), in evaluation mode.

    Of convolutions and matrix products, as torch's FlopCounterMode counts them; normalisation,
    activations and pooling count nothing.
    """
    probe = copy.deepcopy(model).to("meta").eval()  # shapes alone: nothing is computed
    with FlopCounterMode(display=False) as counter:
        probe(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def training_flops(model: nn.Module, batches: Batches, epochs: int) -> float:
    """Floating-point operations of that many epochs: two for a multiply-add, the backward pass as
    two forward ones; images count at the size that they have in each epoch."""
    channels, *shape = batches.dataset.images.shape[1:]
    size_of = getattr(batches, "side", None)  # recipes.Resized
    shapes = [(size_of(e),) * 2 if size_of else tuple(shape) for e in range(1, epochs + 1)]
    each = {s: multiply_adds(model, (channels, *s)) for s in set(shapes)}
    return 6.0 * len(batches.dataset) * sum(each[s] for s in shapes)


def receptive_field(model: nn.Module, size: int = 256) -> int:
    """Side, in pixels, of the square of the input that one output position depends on.

    Measured, up to `size` pixels: the extent of the input's gradient at a central output of a fully
    convolutional model, (N, 3, H, W) to (N, C, H, W), with weights above zero, averages for maxima
    and new running statistics, so that nothing cancels or is masked.
    """
    probe = copy.deepcopy(model).cpu().double().eval()
    for module in list(probe.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        if hasattr(module, "reset_running_stats"):  # batch normalisation
            module.reset_running_stats()
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 1 / max(1, parameter[0].numel()))
    image = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    output = probe(image)
    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    touched = image.grad[0].sum(0).nonzero()
    return int((touched.max(0).values - touched.min(0).values).max()) + 1


def notebook_definitions(notebook: str, tags: Collection[str] = ("definition",)) -> SimpleNamespace:
    """What the cells of a notebook with one of `tags` define, by name: its models, say."""
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    namespace = {"torch": torch, "nn": nn, "recipes": recipes}
    for cell in cells:
        if set(tags) & set(cell["metadata"].get("tags", [])):
            exec("".join(cell["source"]), namespace)
    return SimpleNamespace(**namespace)


# ------------------------------------------------------------------------- records and figures


def record_run(
    name: str,
    run: Settings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule,
    batches: Batches,
    validation: Batches,
    history: History,
    official_test_accuracy: float,
    **others,
) -> dict:
    """Write all there is to know about a run to results.json and its figure beside it.

    `keep` says which record stays. `others` are facts of the run besides those that any has.
    Returns the new record.
    """
    if not history:
        raise UsageError(f"{name}: no epoch was trained to its end, so there is nothing to record.")
    best = max(history, key=lambda e: e.validation_accuracy)
    group, data = optimizer.defaults, batches.dataset
    keys = "lr", "adamw_lr", "momentum", "nesterov", "weight_decay"
    settings_of = {k: group[k] for k in keys if k in group}
    record = dict(
        run=name,
        profile=run.profile,
        best_accuracy=best.validation_accuracy,
        best_epoch=best.epoch,
        final_accuracy=history[-1].validation_accuracy,
        official_test_accuracy=official_test_accuracy,
        train_seconds=sum(e.seconds for e in history),
        evaluation_seconds=sum(e.validation_seconds for e in history),
        dataset=data.name,
        source=data.source,
        split=f"{len(data)} training, {len(validation.dataset)} validation images",
        model=type(model).__name__,
        parameters=parameters(model),
        multiply_adds=multiply_adds(model, data.images.shape[1:]),
        flops=training_flops(model, batches, len(history)),
        epochs=len(history),
        planned_epochs=history.planned,
        batch_size=batches.batch_size,
        optimizer=f"{type(optimizer).__name__} {settings_of}",
        schedule="constant" if schedule is None else type(schedule).__name__,
        augmentation=batches.augmentation,
        precision=dtype_name(run.precision),
        seed=batches.seed,
        **others,
        **history.made,
        history=[e._asdict() for e in history],
    )
    save_record(record, run.figures)
    return record


def save_record(record: dict, folder: Path) -> None:
    """Draw a record and put it into folder/results.json, unless a better founded one is there."""
    if rank() == 0:  # of several processes, one saves
        keep([record], folder, "results.json", "run", draw_history(record))


def keep(
    rows: Sequence[dict], folder: Path, file: str, key: str, figure: plt.Figure | None = None
) -> None:
    """Put the rows of one run or question, by its `key`, into a file, in place of those there.

    But for better founded ones, see `gives_way`: they stay.
    """
    name = rows[0][key]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):  # the other notebook may be at it
            found = load_records(folder, file)
            old = next((row for row in found if row[key] == name), None)
            if old and not gives_way(old, rows[0]):
                kept = f"{name}, {old['epochs']} epochs of {old['dataset']} ({old['source']})"
                print(f"{folder.name}/{file} keeps its record of {kept}.")
                return
            found = [row for row in found if row[key] != name]
            text = json.dumps(sorted([*found, *rows], key=lambda row: row[key]), indent=1)
            write_whole(folder / file, f"{text}\n".encode())
            if figure:
                figure.savefig(folder / f"{name}.png", dpi=120)
    except OSError as error:
        raise UsageError(
            f"The record of {name}, or its figure, cannot be written to {folder} "
            f"({reason(error)}): fix that and run this again (what a short or full run has "
            "trained is in its checkpoint)."
        ) from None


def gives_way(old: dict, new: dict) -> bool:
    """Whether a new record may take an old one's place.

    One of more epochs may; of as many, one of more seeds; of as many of both, any but a short one
    in a full one's place. What is of other data may, too, but never in the published data's.
    """
    if _other(new) and not _other(old):  # the published data's stays
        return False
    return _data(old) != _data(new) or _worth(old) <= _worth(new)


def _data(record: dict) -> tuple:
    """What data a record is of; a folder of your own may have grown since."""
    size = record["split"] if record["source"] == "own" else None
    return record["dataset"], size, _other(record)


def _worth(record: dict) -> tuple:
    """What a record is founded on, for comparison: epochs, then seeds, then the profile."""
    return record["epochs"], len(record.get("seeds", [0])), record.get("profile") == "full"


def redraw(folder: Path) -> None:
    """Draw every figure of a folder again from its results.json."""
    for record in load_records(folder):
        draw_history(record).savefig(folder / f"{record['run']}.png", dpi=120)


def load_records(folder: Path, name: str = "results.json") -> list[dict]:
    """The records of a folder's file, none where there is no such file."""
    file = folder / name
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}): repair it, or move it away.") from None


def draw_curves(
    history: Sequence, title: str, source: str, epochs: int, height: float = 3.6
) -> plt.Figure:
    """Accuracy against epoch, of a whole run or of one that is under way, with the score to beat.

    Colours of Okabe and Ito, which colour-blind readers can tell apart; markers differ in print.
    """
    old = write_up({"run": title, "source": source})
    x = [e.epoch for e in history]
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    plt.close(figure)  # it is shown by whoever asked for it, not by the notebook as well
    style = dict(markevery=max(1, len(x) // 10), markersize=5)
    validation = [e.validation_accuracy for e in history]
    axes.plot(x, validation, "o-", color="#0072B2", label="validation, the 20% split", **style)
    training = [e.accuracy for e in history]
    axes.plot(x, training, "s:", color="#E69F00", label="training, mean over the epoch", **style)
    best = max(history, key=lambda e: e.validation_accuracy)
    star = dict(
        color="#D55E00", markersize=15, mfc="none", label=f"best, {best.validation_accuracy:.2f}%"
    )
    axes.plot(best.epoch, best.validation_accuracy, "*", **star)
    if old:
        label = f"the write-up's best{_elsewhere(title)}, {old['best']:.2f}%"
        axes.axhline(old["best"], color="black", ls="--", lw=1, label=label)
    of_pixels = "pixel " if title.startswith("segmentation") else ""
    axes.set(
        title=f"{title}: accuracy against epoch", xlabel="epoch", ylabel=f"{of_pixels}accuracy, %"
    )
    axes.set_xlim(0.5, epochs + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)  # covers no point
    return figure


def draw_history(record: dict) -> plt.Figure:
    """Accuracy against epoch for one record, its facts and the write-up's in the caption."""
    history, old = [Epoch(**e) for e in record["history"]], write_up(record)
    figure = draw_curves(history, record["run"], record["source"], record["epochs"], height=4.8)
    made = f"{record['dataset']} ({record['source']}) on {record['device']}, {record['precision']}."
    caption = textwrap.fill(made, 90) + (
        f"\nRun time {duration(record['train_seconds'])} for {in_words(record['epochs'])}. "
        f"Best score {record['best_accuracy']:.2f}% at epoch {record['best_epoch']}, "
        f"final score {record['final_accuracy']:.2f}%."
    )
    if len(finals := record.get("finals", [])) > 1:
        caption += f"\nThe last of {len(finals)} seeds; mean final score {np.mean(finals):.2f}%."
    if old:
        caption += (
            f"\nWrite-up{_elsewhere(record['run'])}: {old['minutes']:.0f} min for "
            f"{old['epochs']} epochs on {old['gpu']} GPU.\n"
            f"Best score {old['best']:.2f}% at epoch {old['best_epoch']}, "
            f"final score {old['final']:.2f}%."
        )
    figure.axes[0].set_xlabel(f"epoch\n\n{caption}", fontsize=9)
    if record["source"] == "own":
        title = f"{record['run']} ({record['dataset']}): accuracy against epoch"
        figure.axes[0].set_title(title)
    return figure


def thresholds(rows: Sequence[tuple[str, float, float, History]]) -> str:
    """A table of (name, score, threshold, history): passed or not, and whether trained just now.

    A threshold of 0 is none.
    """
    wide = max(14, *(len(name) for name, *_ in rows)) + 2
    lines = [f"{'threshold':<{wide}}{'score %':>9}{'needed %':>10}   {'result':<12}how"]
    for name, score, needed, history in rows:
        done, planned = len(history), history.planned
        of = "" if done == planned else f"{done} of "
        part = f"the first {history.loaded} " if history.loaded < done else ""
        origin = f"{part}from a checkpoint" if history.loaded else "trained now"
        how = f"{of}{in_words(planned)}, {origin}"
        result = ("passed" if score >= needed else "NOT passed") if needed else ""
        mark = f"{needed:.2f}" if needed else "none set"
        lines.append(f"{name:<{wide}}{score:>9.2f}{mark:>10}   {result:<12}{how}")
    return "\n".join(lines)


def markdown_table(head: str, rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; `left` columns are aligned to the left, the others to the right."""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + " --- |" * left + " --: |" * (columns - left)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def duration(seconds: float) -> str:
    """Seconds up to two minutes, minutes from there."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def write_up(record: dict) -> dict | None:
    """The write-up's facts for a record's run; None for other data, which compares with nothing."""
    return None if _other(record) else WRITE_UP.get(record["run"])


def _elsewhere(run: str) -> str:
    """What to add to the write-up's score where its data is not ours."""
    return ", other data" if run.startswith("segmentation") else ""


def _other(record: dict) -> bool:
    """Whether a record is of other data than the published sets."""
    return record["source"] in ("sample", "own", NOT_PUBLISHED)


def summary(records: Sequence[dict]) -> str:
    """A table of records, one line a run, beside the write-up's final scores."""
    lines = [
        f"{'run':<17}{'parameters':>11}{'mult-adds':>11}{'epochs':>8}{'seconds':>9}"
        f"{'final %':>9}{'test %':>8}{'write-up %':>12}{'diff':>7}"
    ]
    for record in records:
        old, epochs = write_up(record), f"{record['epochs']}"
        elsewhere = _elsewhere(record["run"])  # whose scores do not compare
        final = np.mean(record.get("finals", [record["final_accuracy"]]))  # over the seeds
        test = np.mean(record.get("tests", [record["official_test_accuracy"]]))
        if record["planned_epochs"] != record["epochs"]:
            epochs += f"/{record['planned_epochs']}"
        lines.append(
            f"{record['run']:<17}{record['parameters']:>11,}"
            f"{record['multiply_adds'] / 1e6:>9,.0f} M{epochs:>8}"
            f"{record['train_seconds']:>9.1f}{final:>9.2f}{test:>8.2f}"
            + (f"{old['final']:>12.2f}" if old else f"{'-':>12}")
            + (f"{final - old['final']:>+7.2f}" if old and not elsewhere else f"{'-':>7}")
        )
    if records and "majority" in records[-1]:
        lines.append(baselines(records[-1]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ pictures


def class_counts(dataset: Dataset) -> str:
    """How many images, or pixels, each class has."""
    labels = dataset.labels[dataset.labels != IGNORE]
    counts = torch.bincount(labels.long(), minlength=len(dataset.classes))
    unit = "pixels" if dataset.labels.ndim == 3 else "images"
    rows = [f"{name}: {n:,}" for name, n in zip(dataset.classes, counts.tolist(), strict=True)]
    return f"{unit} of each class: " + ", ".join(rows)


def _visible(images: Tensor) -> np.ndarray:
    """Images uint8 (N, C, H, W) as (N, H, W, 3): their first three bands, or the first in grey."""
    bands = 3 if images.shape[1] >= 3 else 1
    return images[:, :bands].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def show_images(images: Tensor, titles: Sequence[str], columns: int = 10) -> None:
    """Images uint8 (N, C, H, W) in a grid, each framed and under its title."""
    rows = math.ceil(len(images) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.15 * columns, 1.35 * rows), squeeze=False, layout="constrained"
    )
    for axes, image, title in zip(grid.flat, _visible(images), titles, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=7)
        axes.set(xticks=[], yticks=[])
    for axes in grid.flat[len(images) :]:
        axes.axis("off")
    plt.show()


def show_classes(dataset: Dataset) -> None:
    """The first two examples of every class of a classification data set, a column a class."""
    present = [c for c in dataset.labels.unique() if c != IGNORE]
    columns = [(dataset.labels == c).nonzero()[:2, 0].tolist() for c in present]
    index = torch.tensor([column[0] for column in columns] + [column[-1] for column in columns])
    titles = [dataset.classes[label] for label in dataset.labels[index]]
    show_images(dataset.images[index], titles, columns=len(columns))


def show_mistakes(dataset: Dataset, predictions: Tensor, probabilities: Tensor) -> None:
    """The ten wrong predictions with the highest probability, with both labels."""
    wrong = ((predictions != dataset.labels) & (dataset.labels != IGNORE)).nonzero()[:, 0]
    worst = wrong[probabilities[wrong].argsort(descending=True)][:10]
    if len(worst) == 0:
        print("There are no mistakes.")
        return
    names, sure = dataset.classes, 100 * probabilities  # the surest differ in their decimals alone
    titles = [
        f"says {names[predictions[i]]}, {sure[i]:.2f}%\nlabel {names[dataset.labels[i]]}"
        for i in worst
    ]
    show_images(dataset.images[worst], titles)


def calibration(right: Tensor, probabilities: Tensor, bins: int = 10) -> tuple[Tensor, float]:
    """How often predictions of about one probability are right.

    Predictions (N), right ones True, are dealt by their probability, above 0 and up to 1, into bins
    of equal width. Returns float64 (3, bins): of each bin the mean probability (confidence) and the
    share of right predictions (accuracy), both in percent and NaN where it is empty, and the number
    of predictions; and the expected calibration error, the distance of a bin's two percentages,
    averaged over all predictions (Naeini et al., *Obtaining Well Calibrated Probabilities Using
    Bayesian Binning*, 2015).
    """
    place = (probabilities.double() * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    said, hits = (torch.bincount(place, each.double(), bins) for each in (probabilities, right))
    error = 100 * (said - hits).abs().sum() / len(right)
    return torch.stack([100 * said / count, 100 * hits / count, count.double()]), error.item()


def show_calibration(models: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """A reliability diagram of (right, probabilities) for each model, see `calibration`.

    A bin of fewer than 20 predictions is left out of it, as its share is mostly chance. Below it is
    the share of all predictions that each bin has.
    """
    figure, (axes, below) = plt.subplots(
        2, figsize=(4.6, 5.2), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    axes.plot([0, 100], [0, 100], color="black", ls="--", lw=1, label="perfectly calibrated")
    for (name, predictions), marker in zip(models.items(), itertools.cycle("os^Dv"), strict=False):
        (sure, share, count), error = calibration(*predictions)
        shown = count >= 20
        label = f"{name}: ECE {error:.1f}%"
        axes.plot(sure[shown].numpy(), share[shown].numpy(), marker=marker, label=label)
        edges = torch.linspace(0, 100, len(count) + 1)
        below.stairs((100 * count / count.sum()).numpy(), edges.numpy())
    axes.set(ylabel="accuracy, %", title="reliability diagram", xlim=(0, 102), ylim=(0, 102))
    below.set(xlabel="confidence, %", ylabel="predictions, %")
    axes.legend(loc="lower right", fontsize=8)
    plt.show()


def show_confusion(confusion: Tensor, classes: Sequence[str]) -> None:
    """A confusion matrix, int64 (classes, classes), rows the truth: each row in percent."""
    share = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    n = len(classes)
    figure, axes = plt.subplots(figsize=(2 + 0.38 * n, 1.2 + 0.38 * n), layout="constrained")
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(n), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(n), classes, fontsize=8)
    axes.set(xlabel="prediction", ylabel="truth", title="percent of each class")
    for row, column in (share >= 0.5).nonzero().tolist():
        value = share[row, column].item()
        colour = "white" if value > 50 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    plt.show()


def pixel_facts(scores: ClassScores, classes: Sequence[str]) -> dict:
    """Facts for the record of a model of pixels: its mean IoU, and two baselines.

    `majority` is the score of calling every pixel by the commonest class, in percent: no skill.
    Where some classes are digits, they and the backgrounds have each their share of all pixels,
    their accuracy and their mean IoU: the backgrounds' share is the score of naming them all and
    finding no digit.
    """
    pixels, hits = scores.confusion.sum(1), scores.confusion.diag()
    facts = dict(mean_iou=scores.mean_iou, majority=100 * (pixels.max() / pixels.sum()).item())
    digits = torch.tensor([name.startswith("digit ") for name in classes])
    kinds = dict(digits=digits, backgrounds=~digits) if 0 < digits.sum() < len(digits) else {}
    for kind, chosen in kinds.items():
        facts[kind] = dict(
            share=100 * (pixels[chosen].sum() / pixels.sum()).item(),
            accuracy=100 * (hits[chosen].sum() / pixels[chosen].sum()).item(),
            mean_iou=scores.class_iou[chosen].nanmean().item(),
        )
    return facts


def describe_pixels(scores: ClassScores, classes: Sequence[str]) -> str:
    """Scores of pixels in words: all of them, then digits and backgrounds, where there are both."""
    facts = pixel_facts(scores, classes)
    lines = [f"{scores.accuracy:.2f}% of pixels, mean IoU {scores.mean_iou:.2f}%"]
    for kind in KINDS:
        if of := facts.get(kind):
            lines.append(
                f"{kind}, {of['share']:.1f}% of all: {of['accuracy']:.2f}% right, "
                f"mean IoU {of['mean_iou']:.2f}%"
            )
    return "\n".join(lines)


def baselines(record: dict) -> str:
    """What the scores of pixels are to be seen beside, see `pixel_facts`."""
    text = f"baselines: {record['majority']:.1f}%, the commonest class everywhere"
    if "backgrounds" in record:
        share = record["backgrounds"]["share"]
        text += f"; {share:.1f}%, every background right and no digit found"
    return text


def show_class_scores(scores: ClassScores, classes: Sequence[str]) -> None:
    """Accuracy and intersection over union of every class, of images or of pixels, as bars."""
    figure, axes = plt.subplots(figsize=(0.45 * len(classes) + 2, 3.4), layout="constrained")
    x = np.arange(len(classes))
    axes.bar(x - 0.2, scores.class_accuracy.numpy(), 0.4, color="#0072B2", label="accuracy")
    axes.bar(x + 0.2, scores.class_iou.numpy(), 0.4, color="#E69F00", hatch="//", label="IoU")
    axes.axhline(scores.mean_iou, color="black", ls="--", lw=1, label="mean IoU")
    axes.set_xticks(x, classes, rotation=90, fontsize=8)
    axes.set(ylabel="%", ylim=(0, 100), title="class by class")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def show_filters(convolution: nn.Conv2d) -> None:
    """What a first convolution learned: its filters, each from its lowest weight to its highest."""
    weights = convolution.weight.detach().float().cpu()
    low, high = weights.amin((1, 2, 3), True), weights.amax((1, 2, 3), True)
    pictures = (255 * (weights - low) / (high - low).clamp(min=1e-9)).to(torch.uint8)
    show_images(pictures, [""] * len(pictures), columns=min(16, len(pictures)))


@torch.inference_mode()
def show_prediction(
    model: nn.Module, picture: str | Path | Tensor, dataset: Dataset, statistics, run: Settings
) -> None:
    """The five likeliest classes of an image file of your own, or its label map over it.

    A file is brought to the size and the channels of `dataset`'s; a Tensor, uint8 (C, H, W), has
    them.
    """
    channels, height, width = dataset.images.shape[1:]
    if not isinstance(picture, Tensor):
        if channels not in (1, 3):
            raise UsageError(f"{dataset.name} has {channels} channels: {picture} must be a Tensor.")
        mode = "RGB" if channels == 3 else "L"
        pixels = read_image(picture, mode, (width, height)).reshape(height, width, channels)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
    batch = Dataset("picture", "own", picture[None], torch.zeros(1).long(), dataset.classes)
    images, _ = next(iter(Batches(batch, 1, run, statistics)))
    probability = model.eval()(images).float().softmax(1)[0].cpu()
    if probability.ndim == 3:
        label = probability.argmax(0)[None]
        scene = Dataset("picture", "own", picture[None], label, dataset.classes)
        show_scenes(scene, {"prediction": label}, count=1)
        return
    likeliest = probability.topk(min(5, len(dataset.classes)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.2), layout="constrained")
    left.imshow(_visible(picture[None])[0])
    left.axis("off")
    names = [dataset.classes[c] for c in likeliest.indices]
    right.barh(range(len(names)), 100 * likeliest.values.numpy(), color="#0072B2")
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="probability, %", xlim=(0, 100))
    plt.show()


def show_scenes(dataset: Dataset, maps: Mapping[str, Tensor], count: int = 6) -> None:
    """Scenes from all over a data set, a column each, with a row per label map (N, H, W).

    The first map is also drawn over its image. Ignored pixels are white. Under a map stand the
    two commonest classes of those that have a thirtieth of its pixels. From 21 classes on, colours
    repeat.
    """
    shades = plt.get_cmap("tab20").colors
    shades = shades[0::2] + shades[1::2]  # of 20 classes, digits dark and backgrounds light
    palette = np.ones((256, 3))
    palette[: len(dataset.classes)] = [shades[c % 20] for c in range(len(dataset.classes))]
    scenes = torch.linspace(0, len(dataset) - 1, count).long()
    photographs = _visible(dataset.images[scenes]) / 255
    painted = {title: palette[labels[scenes].numpy()] for title, labels in maps.items()}
    first = next(iter(maps))
    grey = photographs.mean(-1, keepdims=True)  # so that a colour in it is a class's
    rows = {"image": photographs, f"{first}, overlaid": 0.4 * grey + 0.6 * painted[first]}
    rows |= painted

    size = (1.3 * count + 1.4, 1.3 * len(rows))
    figure, grid = plt.subplots(len(rows), count, figsize=size, layout="constrained", squeeze=False)
    for line, (title, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(title, fontsize=8)
        for axes, picture, scene in zip(line, pictures, scenes, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            under = _commonest(maps[title][scene], dataset.classes) if title in maps else ""
            axes.set_xlabel(under, fontsize=6, labelpad=2)
    patches = [Patch(color=palette[c], label=name) for c, name in enumerate(dataset.classes)]
    figure.legend(handles=patches, loc="outside right center", fontsize=7)
    plt.show()


def _commonest(labels: Tensor, classes: Sequence[str]) -> str:
    """The two commonest classes of those that have a thirtieth of a label map's (H, W) pixels."""
    labels = labels[labels != IGNORE].long()
    counts = torch.bincount(labels, minlength=2).topk(2)
    pairs = zip(counts.values.tolist(), counts.indices.tolist(), strict=True)
    return ", ".join(classes[c] for count, c in pairs if count and 30 * count >= len(labels))
