"""The best models on the whole training sets, and airbench94 beside ours on the same machine.

Every recipe was chosen on the 20% split; here it is trained on all training images, as its peer is,
and scored on the official test set, once, when it is finished. Nothing else should run meanwhile.

    python benchmarks/best.py --json benchmarks/best.json --airbench FOLDER
    python benchmarks/best.py --only mnist-best

FOLDER is a checkout of github.com/KellerJordan/cifar10-airbench. Its airbench94_muon.py is run as
it stands, once for each seed of ours and in turn with them, but for a CPU: cpu for cuda, bfloat16
for half, no compilation, perf_counter for CUDA's events. Its seconds are its own, of training
alone: on a GPU its compilation and warm-up are not in them, while ours have the recording of steps
as graphs. Nothing of it is part of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import recipes  # noqa: E402
import report  # noqa: E402
import settings  # noqa: E402
import utils  # noqa: E402

SMOOTHED = partial(F.cross_entropy, label_smoothing=0.1)


def fit(
    model: torch.nn.Module,
    batches: utils.Batches,
    test_batches: utils.Batches,
    epochs: int,
    run: settings.Settings,
    lr: float = 0.1,
    loss: Callable = SMOOTHED,
    mirror: bool = False,
) -> dict:
    """Train on `batches` as the notebooks do; returns what it took and how it scores."""
    model = model.to(run.device, memory_format=torch.channels_last)
    optimizer = recipes.Muon(model, lr)
    schedule = recipes.linear_decay(optimizer, batches, epochs)
    # the loop asks for a score after each epoch: here it is of images that were trained on
    some = torch.arange(0, len(batches.dataset), len(batches.dataset) // 500)
    seen = utils.Batches(batches.dataset.subset(some), 500, run)
    history = utils.train(model, optimizer, batches, seen, epochs, run, schedule, loss)
    history.raise_if_stopped(type(model).__name__)
    row = dict(
        train_seconds=sum(e.seconds for e in history),
        flops=report.training_flops(model, batches, epochs),
        parameters=report.parameters(model),
        epochs=epochs,
        images=len(batches.dataset),
        seed=batches.seed,
        source=batches.dataset.source,
    )
    if batches.dataset.labels.ndim == 3:
        scores = utils.evaluate_pixels(model, test_batches, len(batches.dataset.classes), run)
        return row | dict(test_accuracy=scores.accuracy, mean_iou=scores.mean_iou)
    views = utils.evaluate(recipes.Views(model, mirror), test_batches, run)
    return row | dict(test_accuracy=views, without_views=utils.evaluate(model, test_batches, run))


def mnist_best(run: settings.Settings, seed: int) -> dict:
    """DigitNet on all 60,000 digits."""
    models = report.notebook_definitions("imageclassification.ipynb")
    training, test = utils.load_mnist(run)
    levels = training.statistics()
    warp = models.WARP
    batches = recipes.Warped(training, 250, run, levels, shuffle=True, seed=seed, **warp)
    torch.manual_seed(seed)
    epochs = run.epochs(full=models.DIGIT_EPOCHS, quick=1)
    return fit(models.DigitNet(), batches, utils.Batches(test, 500, run, levels), epochs, run)


def cifar10(aim: str, run: settings.Settings, seed: int) -> dict:
    """FastNet on all 50,000 pictures."""
    models = report.notebook_definitions("imageclassification.ipynb")
    training, test = utils.load_cifar10(run)
    levels = training.statistics()
    epochs = run.epochs(full=models.FAST_EPOCHS[aim], quick=1)
    shape, sizes = models.SHAPES[aim], recipes.progressive_sizes(epochs)
    options = dict(shuffle=True, flip=True, shift=2, seed=seed, sizes=sizes)
    batches = recipes.Resized(training, 500, run, levels, **options)
    torch.manual_seed(seed)
    seen, _ = next(iter(utils.Batches(training, 5000, run, levels, shuffle=True, seed=seed)))
    started = utils.clock(run)
    model = models.FastNet(*shape).to(run.device).init_whitening(seen)
    whitening = utils.clock(run) - started
    test_batches = utils.Batches(test, 500, run, levels)
    row = fit(model, batches, test_batches, epochs, run, mirror=True)
    return row | dict(train_seconds=row["train_seconds"] + whitening)


def segmentation_best(run: settings.Settings, seed: int) -> dict:
    """SkipNet on all 50,000 scenes."""
    models = report.notebook_definitions("imagesegmentation.ipynb")
    training, test = utils.load_scenes(run)
    levels = training.statistics()
    options = dict(shuffle=True, flip=True, shift=2, seed=seed)
    batches = recipes.Composed(training, 125, run, levels, **options)
    torch.manual_seed(seed)
    epochs = run.epochs(full=models.SKIP_EPOCHS, quick=1)
    test_batches = utils.Batches(test, 500, run, levels)
    return fit(models.SkipNet(), batches, test_batches, epochs, run, 0.05, recipes.with_dice)


RUNS: dict[str, Callable[[settings.Settings, int], dict]] = {
    "mnist-best": mnist_best,
    "cifar10-94": partial(cifar10, "94"),
    "cifar10-96": partial(cifar10, "96"),
    "segmentation-best": segmentation_best,
}


CLOCK = """class _Clock:
    def record(self): import time; self.at = time.perf_counter()
    def elapsed_time(self, end): return 1e3 * (end.at - self.at)
"""
CPU = {  # what becomes of the peer's file where there is no GPU
    "import torch\n": f"import torch\ntorch.set_flush_denormal(True)  # as ours\n{CLOCK}",
    ".cuda()": "",
    '"cuda"': '"cpu"',
    ".half()": ".bfloat16()",
    "@torch.compile\n": "",
    'model.compile(mode="max-autotune")': "pass",
    "torch.cuda.Event(enable_timing=True)": "_Clock()",
    "torch.cuda.synchronize()": "None",
    '    main("warmup", model)\n': "",
}


def for_cpu(code: str) -> str:
    """The peer's file for a machine without a GPU, as text."""
    for old, new in CPU.items():
        if old not in code:
            raise utils.UsageError(f"The peer's file has no {old!r} any more: see to best.CPU.")
        code = code.replace(old, new)
    return code


def airbench94(folder: Path, run: settings.Settings, seed: int = 0) -> dict:
    """A run of airbench94_muon.py on the same data, number `seed`, which its draws don't follow.

    The seconds are its own, and so is the score.
    """
    code = (folder / "airbench94_muon.py").read_text(encoding="utf-8")
    if "range(200)]" not in code:
        raise utils.UsageError("The peer's file has no range(200) any more: see to airbench94.")
    code = code.replace("range(200)]", "range(1)]")
    code = code if run.device.type == "cuda" else for_cpu(code)
    with tempfile.TemporaryDirectory() as place:
        Path(place, "cifar10").mkdir()
        Path(place, "run.py").write_text(code, encoding="utf-8")
        for part, data in zip(("train", "test"), utils.load_cifar10(run), strict=True):
            # folders are read class by class, and it whitens by the first images: so mix them
            data = data.subset(torch.randperm(len(data), generator=utils.generator(seed)))
            images = data.images.permute(0, 2, 3, 1).contiguous()
            parts = dict(images=images, labels=data.labels, classes=data.classes)
            torch.save(parts, Path(place, "cifar10", f"{part}.pt"))
        command = [sys.executable, "run.py"]
        done = subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True)
    *_, before, last = re.findall(r"^\|.*\d.*\|$", done.stdout, re.MULTILINE)
    *_, seconds = (cell.strip() for cell in before.strip("|").split("|"))
    *_, score, _ = (cell.strip() for cell in last.strip("|").split("|"))
    numbers = dict(train_seconds=float(seconds), test_accuracy=100 * float(score), epochs=8)
    numbers |= dict(seed=seed, precision="float16" if run.device.type == "cuda" else "bfloat16")
    return numbers | dict(flops=0.29e15, images=50_000, source=data.source)  # FLOPs: its README


def table(rows: list[dict]) -> str:
    """A Markdown table with a line for each model: means over its runs, and standard deviations."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        seconds = [row["train_seconds"] for row in mine]
        seconds = mean_of(seconds, 0 if min(seconds) >= 100 else 2)
        score = mean_of([row["test_accuracy"] for row in mine], 2) + "%"
        if mine[0].get("mean_iou"):
            score += f" of pixels, mean IoU {mean_of([row['mean_iou'] for row in mine], 2)}%"
        images, epochs, flops = (mine[0][fact] for fact in ("images", "epochs", "flops"))
        counts = [f"{images:,}", f"{epochs}", f"{len(mine)}"]
        lines.append([model, *counts, f"{seconds} s", f"{flops / 1e15:.2g}", score])
    return report.markdown_table(
        "model | images | epochs | runs | training | PFLOP | official test", lines
    )


def mean_of(values: list[float], digits: int) -> str:
    """The mean, and the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """All rows but the old ones of a model that ran again otherwise, or from the same seed."""
    alike = ("epochs", "hardware", "torch", "commit")
    for row in new:
        old = [
            other
            for other in old
            if other["model"] != row["model"]
            or (other.get("seed", 0) != row["seed"] and all(other[k] == row[k] for k in alike))
        ]
    return [*old, *new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to FILE")
    parser.add_argument("--only", choices=RUNS, action="append", help="this model, and no other")
    parser.add_argument("--airbench", type=Path, metavar="FOLDER", help="the peer's checkout")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--quick", action="store_true", help="samples, an epoch or so")
    options = parser.parse_args()
    profile = "quick" if options.quick else "full"
    run = utils.settings(environ={**os.environ, "PROFILE": profile})
    print(run, flush=True)
    names, seeds = options.only or list(RUNS), range(options.seeds)
    rows, sides = [], []
    for seed in seeds:
        if options.airbench:
            sides.append(("airbench94", partial(airbench94, options.airbench, run, seed)))
        sides += [(name, partial(RUNS[name], run, seed)) for name in names]
    if run.device.type == "cuda":  # kernels are loaded and chosen, as the peer's own warm-up does
        for name in names:
            RUNS[name](replace(run, epochs_cap=6), 0)
    for name, measure in sides:
        rows.append({"model": name, **settings.measured_on(run), **measure()})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if options.json:
            old = json.loads(options.json.read_text()) if options.json.exists() else []
            options.json.write_text(json.dumps(merge(old, rows), indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
