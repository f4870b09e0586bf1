"""The notebooks' training beside that of most people, of the write-up's models, in one process.

A is what most people would write: a torchvision data set with ToTensor and Normalize, a
DataLoader, float32 (on a GPU that has TF32, convolutions in that: torch's default), SGD, `.item()`
at every step. B is what the notebooks run: `utils.Batches` and `utils.train`, with AdamW or, for
the ladder, Muon. The sides take turns, A B A B, after a warm-up round that is not counted; the
table shows medians over the rounds, and the lowest and highest ratio of any round. For the time to
a score, B may be any model of the notebooks, of any width; the table says which.

    python benchmarks/speed.py --json benchmarks/speed.json    # the full data, all of it
    python benchmarks/speed.py --quick                         # the samples, under two minutes
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recipes  # noqa: E402
import report  # noqa: E402
import settings  # noqa: E402
import utils  # noqa: E402

MOVES = dict(flip=True, shift=4)  # the augmentation of most of the notebooks' models
STEPS = {"mnist": 200, "cifar10": 8}  # in a round; the segmentation models take 4
ON_CUDA = 25  # times as many there


class PlainData(torchvision.datasets.VisionDataset):
    """A data set as torchvision's own: an array in memory, a PIL image and a transform per item."""

    def __init__(self, dataset: utils.Dataset, statistics, moved: bool = False):
        crop = v2.RandomCrop(dataset.images.shape[2:], padding=4, padding_mode="reflect")
        to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*statistics)])
        super().__init__(root=None, transform=to_tensor)
        self.moves = v2.Compose([crop, v2.RandomHorizontalFlip()]) if moved else None
        self.data = dataset.images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.targets = (
            dataset.labels.tolist() if dataset.labels.ndim == 1 else dataset.labels.long()
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        image, target = Image.fromarray(self.data[index]), self.targets[index]
        if self.moves:
            target = target if isinstance(target, int) else tv_tensors.Mask(target)
            image, target = self.moves(image, target)
        return self.transform(image), target


@dataclass
class Task:
    """A model, its data and its batch size: what both sides are given."""

    name: str
    make: Callable[[int], nn.Module]  # width to model
    width: int
    batch_size: int
    peak: float  # learning rate of side B
    training: utils.Dataset
    validation: utils.Dataset
    # what else side B has, as in the notebooks
    moves: dict  # how images are flipped and moved
    muon: bool = False  # Muon, its rates falling in a line, in place of AdamW and one cycle
    batches: Callable[..., utils.Batches] = utils.Batches
    loss: Callable[..., torch.Tensor] = F.cross_entropy


class Plain:
    """Side A: the write-up's model as most people would train it."""

    def __init__(self, task: Task, training, validation, run: settings.Settings, seed: int = 0):
        torch.manual_seed(seed)
        self.device = run.device
        self.model = task.make(task.width).to(run.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        levels = task.training.statistics()
        plain, moved = (PlainData(training, levels, moved=moved) for moved in (False, True))
        self.batches = self.unmoved = DataLoader(plain, task.batch_size, shuffle=True)
        self.moved = DataLoader(moved, task.batch_size, shuffle=True)
        self.validation = DataLoader(PlainData(validation, levels), task.batch_size)

    def train(self) -> float:
        """One epoch; returns its seconds."""
        self.model.train()
        started = time.perf_counter()
        for x, y in self.batches:
            x, y = x.to(self.device), y.to(self.device)
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()  # waits for the device, every time
        return time.perf_counter() - started

    @torch.no_grad()
    def test(self) -> float:
        self.model.eval()
        correct = total = 0
        for x, y in self.validation:
            x, y = x.to(self.device), y.to(self.device)
            correct += (self.model(x).argmax(1) == y).sum().item()
            total += y.numel()
        return 100 * correct / total


class Ours:
    """Side B: what the notebooks run."""

    def __init__(self, task: Task, training, validation, run: settings.Settings, seed: int = 0):
        torch.manual_seed(seed)
        self.run, self.task = replace(run, quiet=True), task
        levels = task.training.statistics()
        self.model = task.make(task.width).to(run.device, memory_format=torch.channels_last)
        if task.muon:
            self.optimizer = recipes.Muon(self.model, task.peak)
        else:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), task.peak, weight_decay=0.05, fused=True
            )
        common = dict(statistics=levels, shuffle=True, seed=seed)
        size = task.batch_size
        self.batches = task.batches(training, size, run, **common, **task.moves)
        # whole passes over the data set: what is done once an epoch is spread as it should be
        self.unmoved = utils.Batches(task.training, size, run, **common)
        self.moved = utils.Batches(task.training, size, run, **common, **MOVES)
        self.validation = utils.Batches(validation, 500, run, levels)
        self.one_image = utils.Batches(validation.subset(torch.zeros(1).long()), 1, run, levels)

    def train(self) -> float:
        """One epoch; returns its seconds. With graphs, the second of two: the first records."""
        return self.fit(2 if self.run.graphs else 1, self.one_image)[-1].seconds

    def fit(self, epochs: int, validation) -> list[utils.Epoch]:
        parts, task = (self.optimizer, self.batches), self.task
        if task.muon:
            schedule = recipes.linear_decay(*parts, epochs)
        else:
            schedule = utils.one_cycle(*parts, epochs, task.peak)
        history = utils.train(self.model, *parts, validation, epochs, self.run, schedule, task.loss)
        history.raise_if_stopped(type(self.model).__name__)
        return history

    def test(self) -> float:
        return utils.evaluate(self.model, self.validation, self.run)


def drain(batches) -> Callable[[], object]:
    """Work that makes every batch and keeps none."""
    return lambda: collections.deque(batches, maxlen=0)


def seconds(work: Callable[[], object], run: settings.Settings) -> float:
    """How long some work takes, the device's part included."""
    started = utils.clock(run)
    work()
    return utils.clock(run) - started


def peak_memory(work: Callable[[], object], run: settings.Settings) -> float | None:
    """Megabytes that some work adds to what is held before it; None where that can't be told."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, so that it is not counted
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start a new peak
    except OSError:
        work()
        return None
    held = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - held) / 1e3


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def compare(task: Task, metric: str, a: list[float], b: list[float], unit: str):
    """A row of the table: medians of both sides and the ratio, B over A, of each round."""
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    return dict(
        model=task.name,
        metric=f"{metric}, {unit}",
        a=statistics.median(a),
        b=statistics.median(b),
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        rounds=len(ratios),
    )


def head(part: utils.Dataset, count: int) -> utils.Dataset:
    """The first examples of a part, from its start again where it has too few."""
    return part.subset(torch.arange(count) % len(part))


def throughput(task: Task, run: settings.Settings, rounds: int) -> list[dict]:
    """Training, evaluation and input speed of both sides in turn, and the memory they take."""
    steps = STEPS.get(task.name, 4) * (ON_CUDA if run.device.type == "cuda" else 1)
    count = steps * task.batch_size
    training = head(task.training, count)
    validation = head(task.validation, min(count, 1000))
    sides = [side(task, training, validation, run) for side in (Plain, Ours)]
    memory = [[peak_memory(side.train, run)] for side in sides]  # in the warm-up round
    times = {m: ([], []) for m in ("training", "evaluation", "input", "input, moved")}
    for number in range(rounds + 1):
        for turn, side in enumerate(sides):
            measured = {
                "training": side.train(),
                "evaluation": seconds(side.test, run),
                "input": seconds(drain(side.unmoved), run) / len(side.unmoved),
                "input, moved": seconds(drain(side.moved), run) / len(side.moved),
            }
            if number > 0:  # the first round warms up
                for measure, value in measured.items():
                    times[measure][turn].append(value)

    def rate(measure, images):
        return [[images / t for t in side] for side in times[measure]]

    ours = "input, moved" if task.moves else "input"  # as it trains
    pairs = zip((times["input"][0], times[ours][1]), times["training"], strict=True)
    shares = [[100 * steps * i / t for i, t in zip(*pair, strict=True)] for pair in pairs]
    still, moved = (rate(kind, task.batch_size) for kind in ("input", "input, moved"))
    rows = [
        compare(task, "training", *rate("training", count), "images/s"),
        compare(task, "evaluation", *rate("evaluation", len(validation)), "images/s"),
        compare(task, "input alone, neither flipped nor moved", *still, "images/s"),
        compare(task, "input alone, flipped and moved", *moved, "images/s"),
        compare(task, "input's share of a step", *shares, "%"),
    ]
    if [None] not in memory:
        rows.append(compare(task, "peak memory of training", *memory, "MB"))
    if run.device.type == "cuda":
        rows += on_cuda(task, times["training"], steps, run)
    return rows


def on_cuda(task: Task, times, steps: int, run: settings.Settings) -> list[dict]:
    """Step time, TFLOP/s and their share of the card's measured matrix rate in this precision."""
    x = torch.randn(8192, 8192, device=run.device, dtype=run.precision)
    x @ x
    product = min(seconds(lambda: x @ x, run) for _ in range(10))
    card = 2 * 8192**3 / product / 1e12
    flops = 6 * report.multiply_adds(task.make(task.width), task.training.images.shape[1:])
    speed = [[flops * task.batch_size * steps / t / 1e12 for t in side] for side in times]
    share = [[100 * s / card for s in side] for side in speed]
    step = [[1e6 * t / steps for t in side] for side in times]
    kind = settings.dtype_name(run.precision)
    return [
        compare(task, "step", *step, "us"),
        compare(task, "arithmetic", *speed, "TFLOP/s"),
        compare(task, f"arithmetic's share of {card:.0f} TFLOP/s ({kind} matrix)", *share, "%"),
    ]


def time_to_score(
    task: Task, goals: dict[float, tuple[Task, int]], run: settings.Settings, budget: float
) -> list[dict]:
    """Seconds of training until the 20% split first passes each goal, one run a side and goal.

    A trains `task` until it passes the last goal or has spent its budget in seconds; B trains the
    task that stands beside the goal for its number of epochs. Both are scored after every epoch,
    which the seconds leave out.
    """
    plain = Plain(task, task.training, task.validation, run, seed=1)
    spent, passed = 0.0, {}
    while len(passed) < len(goals) and spent < budget:
        spent += plain.train()
        score = plain.test()
        print(f"  {task.name}, A: {score:.2f}% after {spent:.0f} s", flush=True)
        passed.update({goal: spent for goal in goals if score >= goal and goal not in passed})
    rows = []
    for goal, (fast, epochs) in goals.items():
        ours = Ours(fast, task.training, task.validation, run, seed=1)
        history = ours.fit(epochs, ours.validation)
        scores = [e.validation_accuracy for e in history]
        print(f"  {task.name}, B: {', '.join(f'{score:.2f}%' for score in scores)}", flush=True)
        within = next((n for n, score in enumerate(scores, start=1) if score >= goal), None)
        b = sum(e.seconds for e in history[:within]) if within else None
        a = passed.get(goal)
        row = dict(model=task.name, metric=f"time to {goal}% of the 20% split, s", a=a, b=b)
        row.update(ratio=b / a if a and b else None, rounds=1)
        row["b_is"] = f"{fast.name}, batch {fast.batch_size}, {settings.in_words(epochs)}"
        rows.append(row)
    return rows


def tasks(run: settings.Settings, width: int) -> dict[str, Task]:
    """The six models of the notebooks, with their data."""
    models = report.notebook_definitions("imageclassification.ipynb")
    ladder = report.notebook_definitions("imagesegmentation.ipynb")
    loads = (utils.load_mnist, utils.load_cifar10, utils.load_scenes)
    digits, pictures, scenes = (utils.split(load(run)[0]) for load in loads)
    found = [
        Task("mnist", models.MnistCNN, width, 16, 5e-4, *digits, {}),
        Task("cifar10", models.CifarResNet, width, 128, 1e-3, *pictures, MOVES),
    ]
    for name, layers in ladder.LADDER.items():
        make = partial(ladder.Segmenter, layers)
        found.append(Task(name, make, width, 64, 0.05, *scenes, MOVES, muon=True))
    return {task.name: task for task in found}


def fast_net(task: Task, run: settings.Settings, epochs: int) -> Task:
    """Side B of `cifar10`: the first notebook's narrow `FastNet`, trained as its table's first."""
    definitions = report.notebook_definitions("imageclassification.ipynb")
    levels = task.training.statistics()
    seen, _ = next(iter(utils.Batches(task.training, 2000, run, levels, shuffle=True)))

    def make(width: int) -> nn.Module:
        return definitions.FastNet((width, 2 * width, 2 * width)).init_whitening(seen.cpu())

    return replace(
        task,
        name="FastNet((32, 64, 64)), Muon",
        make=make,
        width=32,
        peak=0.1,
        moves=dict(flip=True, shift=2),
        muon=True,
        batches=partial(recipes.Resized, sizes=recipes.progressive_sizes(epochs)),
        loss=partial(F.cross_entropy, label_smoothing=0.1),
    )


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        a, b = ("not reached" if row[side] is None else f"{row[side]:,.4g}" for side in "ab")
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g}"
        spread = f"{row['lowest']:.3g} to {row['highest']:.3g}" if row["rounds"] > 1 else "one run"
        metric = row["metric"] + (f" (B: {row['b_is']})" if "b_is" in row else "")
        lines.append([row["model"], metric, a, b, ratio, spread])
    return report.markdown_table(
        "model | measure | A | B | B over A | lowest to highest", lines, left=2
    )


def brief(rows: list[dict]) -> str:
    """How many times as fast B is, a line a model: the table of RESULTS.md."""
    measures = {
        "training": "training",
        "evaluation": "evaluation",
        "input alone": "input alone, neither",
        "the same, flipped and moved": "input alone, flipped",
    }
    ratios, times = [], []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["metric"]: row for row in rows if row["model"] == model}
        those = [
            next(found[m] for m in found if m.startswith(start)) for start in measures.values()
        ]
        share = found["input's share of a step, %"]
        cells = [f"{row['ratio']:.3g}" for row in those] + [f"{share[s]:.2g}%" for s in "ab"]
        ratios.append([model, *cells])
    for row in (row for row in rows if "b_is" in row):
        a, b = ("not reached" if row[s] is None else f"{row[s]:.0f} s" for s in "ab")
        sooner = f"{1 / row['ratio']:.3g}" if row["ratio"] else "-"
        score = row["metric"].removeprefix("time to ").removesuffix(", s")
        times.append([f"{row['model']}: {score}", row["b_is"], a, b, sooner])
    head = f"B over A | {' | '.join(measures)} | input's share of a step, A | B"
    second = report.markdown_table("time to a score | B is | A | B | A over B", times, left=2)
    return f"{report.markdown_table(head, ratios)}\n\n{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="samples, width 16, three rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument(
        "--budget", type=float, default=2400, help="seconds that A may train for a score"
    )
    parser.add_argument("--only", metavar="MODEL", help="measure one model, keep FILE's other rows")
    parser.add_argument("--no-graphs", action="store_true", help="on CUDA, ordinary steps for B")
    options = parser.parse_args()
    profile = "quick" if options.quick else "full"
    run = utils.settings(graphs=not options.no_graphs, environ={**os.environ, "PROFILE": profile})
    print(run, flush=True)
    rows, found = [], tasks(run, 16 if options.quick else 64)
    data = sorted({f"{t.training.name} ({t.training.source})" for t in found.values()})
    machine = dict(settings.measured_on(run), data=data)
    old = {"machine": machine, "rows": []}
    if options.only and options.json and options.json.exists():
        old = json.loads(options.json.read_text())
    if options.only not in (None, *found):
        raise SystemExit(f"{options.only}? The models are {', '.join(found)}.")
    facts = "hardware", "precision", "torch", "data"
    if any(old["machine"][fact] != machine[fact] for fact in facts):
        raise SystemExit(f"{options.json} is of another machine, torch or data: name another file.")
    for task in found.values():
        if options.only not in (None, task.name):
            continue
        rows += throughput(task, run, 3 if options.quick else options.rounds)
        print(f"{task.name}: measured", flush=True)
    if not options.quick and not options.only:
        mnist, cifar = found["mnist"], found["cifar10"]
        small = replace(mnist, name="MnistCNN(16)", width=16, batch_size=128, peak=4e-3)
        rows += time_to_score(mnist, {93.76: (small, 1)}, run, options.budget)
        goals = {70.0: (fast_net(cifar, run, 1), 1), 76.83: (fast_net(cifar, run, 2), 2)}
        rows += time_to_score(cifar, goals, run, options.budget)
    rows = [dict(row, date=machine["date"], commit=machine["commit"]) for row in rows]
    again = {(row["model"], "b_is" in row) for row in rows}  # times to a score apart
    rows += [row for row in old["rows"] if (row["model"], "b_is" in row) not in again]
    print(table(rows))
    print(brief(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
