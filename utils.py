"""What both notebooks share, in the order in which a run needs it.

    settings() -> load_*() -> Dataset -> Batches -> model (in the notebook) -> train() -> history
               -> evaluate(), evaluate_pixels()

Images are uint8 until a batch is made; accuracies are percentages; times are seconds. What a run
leaves behind (record, figure, pictures) is report.py's, the quick profile's data is samples.py's,
your own is owndata.py's; files.py downloads and checks, checkpoints.py goes on where a run stopped;
checks.py refuses a model, a loss or labels that do not fit; graphs.py replays steps on a GPU;
settings.py reads the README's variables and chooses device and precision.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import mnist

import files
from checkpoints import Checkpoint, RandomState, facts_of, guarded, out_of_memory, require_finite
from checks import IGNORE, check_fit, check_loss, require_labels
from files import UsageError
from graphs import captured
from progress import Progress
from settings import (
    Settings,
    add_up,
    broadcast_buffers,
    commit,
    dtype_name,
    hardware_name,
    rank,
    world_size,
)
from settings import settings as settings  # for the notebooks

DIGITS = tuple("0123456789")
NOT_PUBLISHED = "not the published files"  # the source of another data set in MNIST's files
REPORT_EVERY = 25  # iterations between two reports, as in the write-up


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 (N, C, H, W), and labels uint8 or int64: (N), or maps (N, H, W); in memory.

    A label is an index into `classes`, or IGNORE, 255, for what is neither learned nor scored.
    `source` says what kind of copy it is: "own" for data of yours, "sample" for a stand-in,
    NOT_PUBLISHED for other data in MNIST's files; any other passes for the published data, whose
    scores are set beside the write-up's. `groups` int64 (N) holds one number for all the images
    that share pixels, which `split` keeps together. `layers` are what scenes were composed of, for
    each a digit and a background: see `compose_scenes`. Raises UsageError for anything else.
    """

    name: str
    source: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    groups: Tensor | None = None
    layers: tuple[Dataset, Dataset] | None = None
    _copies: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        def refuse(problem: str):
            raise UsageError(f"{self.name}: {problem}.")

        if not isinstance(self.images, Tensor) or not isinstance(self.labels, Tensor):
            refuse("images and labels must be tensors: torch.from_numpy makes one of an array")
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            got = f"{dtype_name(self.images.dtype)} {tuple(self.images.shape)}"
            refuse(f"images must be uint8 (N, C, H, W), not {got}")
        if self.images.numel() == 0:
            refuse("there are no images")
        sizes = {(len(self.images),), (len(self.images), *self.images.shape[2:])}
        if tuple(self.labels.shape) not in sizes:
            got = f"{tuple(self.labels.shape)} for images {tuple(self.images.shape)}"
            refuse(f"labels must be one per image or one per pixel, not {got}")
        if self.labels.dtype not in (torch.uint8, torch.int64):
            refuse(f"labels must be uint8 or int64, not {dtype_name(self.labels.dtype)}")
        if len(self.classes) > IGNORE:
            refuse(f"{len(self.classes)} classes are too many: label {IGNORE} means ignored")
        if len(self.classes) < 2:
            refuse(f"there is only one class ({', '.join(self.classes)}), so nothing to tell apart")
        require_labels(self.labels, len(self.classes), self.name)
        if self.groups is not None and len(self.groups) != len(self.images):
            refuse(f"groups must be one per image, not {len(self.groups)} for {len(self.images)}")
        if self.layers and [len(part) for part in self.layers] != 2 * [len(self.images)]:
            refuse("layers must be a digit and a background for each image")

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """The start of a SHA-256 over images and labels."""
        digest = sha256(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()[:16]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(pixels uint8 (N, H, W, C), labels) on a device, one copy for all `Batches` there."""
        if device not in self._copies:
            pixels = self.images.permute(0, 2, 3, 1).contiguous().to(device)
            self._copies[device] = pixels, self.labels.contiguous().to(device)
        return self._copies[device]

    def subset(self, index: Tensor) -> Dataset:
        """The examples at `index`, int64 (M), or where it, bool (N), is true."""
        groups = None if self.groups is None else self.groups[index]
        layers = self.layers and tuple(part.subset(index) for part in self.layers)
        images, labels = self.images[index], self.labels[index]
        return replace(self, images=images, labels=labels, groups=groups, layers=layers)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, on the scale 0 to 1."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.reshape(-1), minlength=256) / channel.numel()
            mean.append((share * levels).sum().item())
            std.append(math.sqrt((share * (levels - mean[-1]) ** 2).sum().item()))
        return mean, std

    def __str__(self) -> str:
        c, h, w = self.images.shape[1:]
        kind = "label maps" if self.labels.ndim == 3 else "labels"
        size = f"{len(self):,} images {c}x{h}x{w}"
        return f"{self.name} ({self.source}): {size}, {kind} of {len(self.classes)} classes"

    __repr__ = __str__


def split(dataset: Dataset, share: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Deal a data set out at random into (training, validation); groups stay together.

    Validation has the part `share` of the examples, or less where groups do not add up to it; both
    keep the data set's order. Raises UsageError where either would be empty.
    """
    groups = torch.arange(len(dataset)) if dataset.groups is None else dataset.groups
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    most = round(share * len(dataset))
    order = torch.randperm(len(sizes), generator=generator(seed))
    order = order[sizes[order] <= most]  # a larger group cannot be held out
    held_out = torch.isin(group, order[sizes[order].cumsum(0) <= most])
    if held_out.all():
        raise UsageError(f"{dataset.name}: with {share:.0%} held out, nothing is left to train on.")
    if not held_out.any():
        raise UsageError(f"{dataset.name} is too small to hold {share:.0%} of it out.")
    return dataset.subset(~held_out), dataset.subset(held_out)


def load_mnist(run: Settings) -> tuple[Dataset, Dataset]:
    """MNIST as (training, official test), images (N, 1, 28, 28): 60,000 + 10,000 of ten digits.

    In the quick profile 4,000 + 1,000. From DATA_DIR, where missing files are downloaded to; other
    data in MNIST's format is read as well, its classes called 0 to 9. Raises UsageError.
    """
    if run.profile == "quick":
        import samples  # only here: the other profiles need none of its packages

        return samples.load_digits()
    folder = run.data_dir / "MNIST" / "raw"
    if not all(os.path.exists(folder / name) for name in files.MNIST_FILES):
        files.fetch("MNIST", run.data_dir)
    source = "full" if files.check_mnist(folder) else NOT_PUBLISHED

    def read(part: str) -> Dataset:  # of the files that were checked
        images = mnist.read_image_file(folder / f"{part}-images-idx3-ubyte")
        labels = mnist.read_label_file(folder / f"{part}-labels-idx1-ubyte")
        return Dataset("MNIST", source, images[:, None], labels, DIGITS)

    return read("train"), read("t10k")


def load_cifar10(run: Settings) -> tuple[Dataset, Dataset]:
    """CIFAR-10 as (training, official test): 50,000 + 10,000 images (N, 3, 32, 32), ten classes.

    From torchvision's files or from image folders, cifar10/{train,test}/CLASS; in the quick profile
    its stand-in: 3,000 + 1,000 patches of ten photographs. In any profile your own pictures where
    PICTURES names their folder, brought to 32x32. Missing files are downloaded. Raises UsageError.
    """
    import owndata  # only here: it makes data sets, so it needs this module

    if run.pictures:
        return owndata.load_pictures(run.pictures, size=32)
    if run.profile == "quick":
        import samples  # only here: the other profiles need none of its packages

        return samples.load_photographs()
    folder = run.data_dir / "cifar10"
    if all(os.path.isdir(folder / part) for part in ("train", "test")):
        jpeg = any(file.suffix.lower() in (".jpg", ".jpeg") for file in folder.rglob("*"))
        source = "JPEG copy" if jpeg else "PNG folders"
        parts = owndata.load_pictures(folder, name="CIFAR-10")
        return tuple(replace(part, source=source) for part in parts)
    if not os.path.isdir(run.data_dir / "cifar-10-batches-py"):
        files.fetch("CIFAR-10", run.data_dir)
    files.check_cifar10(run.data_dir / "cifar-10-batches-py")

    def read(train: bool) -> Dataset:  # of the files that were checked
        part = torchvision.datasets.CIFAR10(run.data_dir, train)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Dataset("CIFAR-10", "full", images, torch.tensor(part.targets), tuple(part.classes))

    return read(train=True), read(train=False)


def load_scenes(run: Settings) -> tuple[Dataset, Dataset]:
    """MNIST-on-CIFAR-10 as (training, official test), made from the two sets above.

    Your own scenes where SCENES names their folder, brought to SIZE.
    """
    if run.scenes:
        import owndata

        return owndata.load_scenes(run.scenes, run.size)
    parts = zip(load_mnist(run.digits), load_cifar10(run), strict=True)
    return tuple(compose_scenes(*part, seed) for seed, part in enumerate(parts))


def compose_scenes(digits: Dataset, backgrounds: Dataset, seed: int) -> Dataset:
    """One scene per background: a digit in a random colour at a random place, blended over it.

    Of digits (M, 1, S, S) and N backgrounds in colour, images (N, 3, H, W) and label maps uint8
    (N, H, W): a pixel is its digit where the ink is over one half, else its background, numbered
    after the digits. No digit is used twice while there are as many as backgrounds. The scenes'
    `layers` are these digits, in the order in which they were dealt, and the backgrounds. Raises
    UsageError for backgrounds that are grey, lack a class or are smaller than the digits.
    """
    if backgrounds.images.shape[1] != 3 or (backgrounds.labels == IGNORE).any():
        raise UsageError(f"{backgrounds.name}: backgrounds must be in colour, each with a class.")
    draws, n = generator(seed), len(backgrounds)
    height, width = backgrounds.images.shape[2:]
    side = digits.images.shape[-1]
    if min(height, width) < side:
        raise UsageError(f"A background of {width}x{height} is too small for digits of {side}.")
    rounds = math.ceil(n / len(digits))
    digits = digits.subset(torch.randperm(len(digits), generator=draws).repeat(rounds)[:n])
    top = torch.randint(height - side + 1, (n,), generator=draws)
    left = torch.randint(width - side + 1, (n,), generator=draws)
    colour = torch.randint(256, (n, 3, 1, 1), generator=draws, dtype=torch.uint8)

    images = backgrounds.images.clone()
    labels = (len(digits.classes) + backgrounds.labels)[:, None, None].to(torch.uint8)
    labels = labels.repeat(1, height, width)
    for y, x in np.ndindex(height - side + 1, width - side + 1):  # 25 places, each in one go
        here = ((top == y) & (left == x)).nonzero()[:, 0]
        rows, columns = slice(y, y + side), slice(x, x + side)
        ink = digits.images[here].float() / 255
        below = images[here, :, rows, columns].float()
        blend = ink * colour[here].float() + (1 - ink) * below
        images[here, :, rows, columns] = blend.round().to(torch.uint8)
        number = digits.labels[here, None, None].to(torch.uint8)
        inked = ink[:, 0] > 0.5
        labels[here, rows, columns] = torch.where(inked, number, labels[here, rows, columns])
    classes = tuple(f"digit {name}" for name in digits.classes) + backgrounds.classes
    # MNIST itself comes in one kind only
    source = NOT_PUBLISHED if digits.source == NOT_PUBLISHED else backgrounds.source
    name = f"MNIST-on-{backgrounds.name if source == 'own' else 'CIFAR-10'}"
    layers = digits, backgrounds
    return Dataset(name, source, images, labels, classes, backgrounds.groups, layers)


def generator(*seeds: int) -> torch.Generator:
    """A generator on the CPU, so that draws are alike on any device, seeded by all the numbers.

    They are whole numbers from 0 up. Zeros at the end count for nothing: (5, 0) is (5).
    """
    if min(seeds) < 0:
        raise UsageError(f"A seed is {min(seeds)}: it must be 0 or more.")
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# ------------------------------------------------------------------------------------- batches


class Batches:
    """Mini-batches of a data set that lies whole on the device, as uint8.

    Yields images float32 (B, C, H, W), channels_last and normalised, and labels int64 (B) or
    (B, H, W), on `run.device`; the last batch may be short. `statistics` are the (mean, std) of
    each channel on the scale 0 to 1, see `Dataset.statistics`: the training set's for every part;
    without them the data set's own. With `shuffle` the order of epoch e comes from (seed, e) alone;
    so do the horizontal flips, with `flip`, and the moves of up to `shift` pixels, the border
    filled by reflection. A label map moves and flips with its image. Until `set_epoch` names
    another epoch, every pass is the same. Raises UsageError for an argument out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        run: Settings,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
        shuffle: bool = False,
        flip: bool = False,
        shift: int = 0,
        seed: int = 0,
    ):
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: it must be at least 1.")
        if not 0 <= shift < min(dataset.images.shape[2:]):
            raise UsageError(f"shift is {shift}: it must be 0 or more, and less than a side.")
        self.dataset, self.batch_size, self.device = dataset, batch_size, run.device
        self.shuffle, self.flip, self.shift, self.seed = shuffle, flip, shift, seed
        self.epoch = 0
        self.together = 1  # how many batches are made in one go
        if run.device.type == "cuda":  # up to four million pixels: a launch takes long there
            self.together = max(1, 2**22 // (batch_size * dataset.images[0, 0].numel()))
        # pixels in rows, so that one index_select cuts, shifts and flips, and gives channels_last
        self.pixels, self.labels = dataset.on(run.device)
        self.mean, self.std = statistics or dataset.statistics()
        channels = dataset.images.shape[1]
        if not np.shape(self.mean) == np.shape(self.std) == (channels,):
            each = f"a mean and a standard deviation of each channel: {channels} of both"
            raise UsageError(f"{dataset.name}: statistics must be {each}.")
        mean = torch.tensor(self.mean)
        std = torch.tensor(self.std).clamp(min=1 / 255)  # of even images, too
        image = self.pixels.new_ones(self.pixels.shape[1:], dtype=torch.float32)
        self.scale = image / (255 * std).to(run.device)  # (H, W, C), so that no product broadcasts
        self.offset = image * (-mean / std).to(run.device)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __str__(self) -> str:
        draws = f"shuffle {self.shuffle}, {self.augmentation}, seed {self.seed}"
        facts = f"batches of {self.batch_size}, {draws}, mean {self.mean}, std {self.std}"
        return f"{self.dataset}, SHA-256 {self.dataset.fingerprint}\n{facts}"

    @property
    def augmentation(self) -> str:
        """What is done to images, in words."""
        return f"flip {self.flip}, shift {self.shift}"

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next pass draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, draws = len(self.dataset), generator(self.seed, self.epoch)
        order = torch.randperm(n, generator=draws) if self.shuffle else torch.arange(n)
        moves = torch.randint(2 * self.shift + 1, (2, n), generator=draws) - self.shift
        flips = self._flips(order, draws)
        order, flips = order.to(self.device), flips.to(self.device, torch.bool)
        down, across = moves.to(self.device)
        augment = self.flip or self.shift
        each, many = self.batch_size, self.batch_size * self.together
        parts = [draw.split(many) for draw in (order, down, across, flips)]
        for some in zip(*parts, strict=True):
            images, labels = self._augmented(*some) if augment else self._plain(some[0])
            yield from zip(images.split(each), labels.split(each), strict=True)

    def _flips(self, order: Tensor, draws: torch.Generator) -> Tensor:
        """1 or 0 for each image of `order`, int64 (N): whether it is mirrored in this epoch."""
        return torch.randint(2 if self.flip else 1, order.shape, generator=draws)

    def _plain(self, index: Tensor) -> tuple[Tensor, Tensor]:
        pixels, labels = self.pixels.index_select(0, index), self.labels.index_select(0, index)
        return self._normalise(pixels), labels.long()

    def _augmented(self, index: Tensor, down: Tensor, across: Tensor, flips: Tensor):
        height, width, channels = self.pixels.shape[1:]
        rows = _reflect(torch.arange(height, device=self.device) + down[:, None], height)
        columns = _reflect(torch.arange(width, device=self.device) + across[:, None], width)
        columns = torch.where(flips[:, None], columns.flip(1), columns)
        # where each pixel is taken from, (B, H, W): its number among those of the whole data set
        spot = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
        pixels = self.pixels.view(-1, channels).index_select(0, spot.view(-1))
        if self.labels.ndim == 1:
            labels = self.labels.index_select(0, index)
        else:
            labels = self.labels.view(-1).index_select(0, spot.view(-1)).view(spot.shape)
        return self._normalise(pixels.view(*spot.shape, channels)), labels.long()

    def _normalise(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.offset, pixels.float(), self.scale).permute(0, 3, 1, 2)

    def pixels_of(self, images: Tensor) -> Tensor:
        """Normalised images, float32 (B, C, H, W), as uint8 on the CPU again, to be looked at."""
        offset, scale = (one[0, 0].view(-1, 1, 1) for one in (self.offset, self.scale))
        return ((images - offset) / scale).round().clamp(0, 255).to(torch.uint8).cpu()


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices just outside 0 to size - 1 folded back inside, the edge not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


# ------------------------------------------------------------------------------------ training


class Epoch(NamedTuple):
    """One line of a history. Accuracies are percentages of the labels: images, or pixels."""

    epoch: int
    seconds: float  # of training alone
    loss: float  # mean of the batches', each weighted by its labels that count
    accuracy: float  # of the same labels, as met: augmented, while the model was still changing
    validation_accuracy: float  # after the epoch
    validation_seconds: float


class History(list):
    """The epochs of a run, of so many `planned`.

    `made`: the device, torch, commit and date that made them; `loaded`: how many came from a
    checkpoint; `stopped`: whether Ctrl-C ended the run.
    """

    def __init__(self, epochs: Iterable[Sequence] = (), made: Mapping[str, str] | None = None):
        super().__init__(Epoch(*epoch) for epoch in epochs)
        self.made, self.loaded, self.planned = dict(made or {}), len(self), len(self)
        self.stopped = False

    def add(self, epoch: Epoch, run: Settings) -> None:
        """Append an epoch that was trained here and now."""
        self.append(epoch)
        device = hardware_name(run.device)
        here = dict(device=device, torch=str(torch.__version__), commit=commit())
        for fact, value in here.items():
            before = self.made.setdefault(fact, value)
            if before.split(", then ")[-1] != value:
                self.made[fact] = f"{before}, then {value}"
        self.made["date"] = datetime.now(UTC).isoformat(timespec="seconds")

    def finished(self, patience: int | None = None) -> bool:
        """Whether all are there, or the best validation accuracy is `patience` epochs old."""
        if self and patience:
            best = max(self, key=lambda e: e.validation_accuracy)
            if len(self) - best.epoch >= patience:
                return True
        return len(self) >= self.planned

    def raise_if_stopped(self, name: str) -> None:
        """Raise KeyboardInterrupt where Ctrl-C ended the run: "Run All" is not to go on."""
        if self.stopped:
            raise KeyboardInterrupt(f"{name}: stopped after {len(self)} of {self.planned} epochs.")


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable,
    validation: Iterable,
    epochs: int,
    run: Settings,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    loss_function: Callable[..., Tensor] = F.cross_entropy,
    checkpoint: Checkpoint | None = None,
    patience: int | None = None,
) -> History:
    """Train for `epochs` passes over `batches` and score `validation` after each.

    Both are `Batches`, or any iterable with a length that yields (images, labels), a torch
    DataLoader say: float32 (B, C, H, W), and int64 (B) or (B, H, W), of which IGNORE counts for
    nothing. `loss_function(logits, labels, ignore_index=IGNORE)`, of float32 logits, is the mean
    over the labels that count; `schedule` steps after every batch. Losses and counts are summed up
    on the device, and no step waits for them; a batch's loss is weighted by its labels, so a short
    one counts for what it is.
    With a `checkpoint` a run that was cut short goes on; with `patience` training ends when the
    best validation accuracy is that many epochs old. Ctrl-C returns the history so far, `stopped`:
    with a checkpoint, model and history are as after the last epoch that was saved; without one,
    the weights keep the steps of the epoch that was begun. On a GPU graphs.py replays the steps,
    where they can be. The model, which must be on `run.device`, is left in evaluation mode. Raises
    UsageError where model, data and checkpoint do not fit, for want of memory, and for a loss or
    weights that are not finite.
    """
    classes = check_fit(model, batches, run)
    check_fit(model, validation, run)
    check_loss(loss_function)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == torch.float16)
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)  # see _tally
    history = History()
    title = checkpoint.path.stem if checkpoint else type(model).__name__
    progress = Progress(title, batches, epochs, run)
    if checkpoint:
        parts = dict(model=model, optimizer=optimizer, schedule=schedule, scaler=scaler)
        parts["random"] = RandomState(batches)
        facts = dict(epochs=epochs, batches=batches, validation=validation, loss=loss_function)
        facts["precision"] = dtype_name(run.precision)
        history = History(*checkpoint.start(parts, facts_of(**parts, **facts)))
    history.planned = epochs
    forward = model if world_size() == 1 else nn.parallel.DistributedDataParallel(model)

    def step(images: Tensor, labels: Tensor) -> None:
        with run.autocast():
            logits = forward(images)
            loss = loss_function(logits.float(), labels, ignore_index=IGNORE)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        _tally(totals, logits, labels, loss)

    step = captured(step, optimizer, schedule, run.graphs)
    with guarded(history, optimizer, batches, checkpoint, step) as interrupted:
        while interrupted or not history.finished(patience):
            if interrupted:
                raise KeyboardInterrupt  # the first one was swallowed
            epoch = len(history) + 1
            model.train()
            if hasattr(batches, "set_epoch"):
                batches.set_epoch(epoch)
            totals.zero_()
            started = clock(run)
            for number, (images, labels) in enumerate(_shares(batches, classes, run), start=1):
                step(images, labels)
                if schedule is not None:
                    schedule.step()
                if number % REPORT_EVERY == 0:
                    progress.step(epoch, number, totals)
            seconds = clock(run) - started
            add_up(totals)
            totals[3] /= world_size()
            require_finite(epoch, number, totals, model, scaler)
            loss_sum, correct, count, _ = totals.tolist()
            if count == 0:
                raise UsageError("There is no label to learn from.")
            broadcast_buffers(model)
            score = evaluate(model, validation, run)
            scores = loss_sum / count, 100 * correct / count, score
            history.add(Epoch(epoch, seconds, *scores, clock(run) - started - seconds), run)
            progress.epoch(history)
            if checkpoint and rank() == 0:
                checkpoint.save(history, images[:2], history.finished(patience))
    model.eval()
    progress.plot(history)
    return history


def _shares(batches: Iterable, classes: int, run: Settings):
    """This process's share of every batch, on the device.

    A batch that has less than an image for each process is left out.
    """
    share, empty = slice(rank(), None, world_size()), True
    for images, labels in batches:
        if len(images) < world_size():
            continue
        if not isinstance(batches, Batches):  # whose labels were looked at before
            require_labels(labels, classes, "A batch")
        empty = False
        images, labels = images[share], labels[share]
        yield images.to(run.device, non_blocking=True), labels.to(run.device, non_blocking=True)
    if empty:
        raise UsageError(f"No batch has an image for each of {world_size()} processes.")


def _tally(totals: Tensor, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
    """Add to float64 (4), on the device: summed loss, correct labels, labels, finite steps.

    The last stands still from the first loss that is not finite, and so names its step.
    """
    counted = (labels != IGNORE).sum()
    correct = (logits.detach().argmax(1) == labels).sum()  # IGNORE is no class
    summed = torch.where(counted > 0, loss.detach().double() * counted, 0.0)  # of none it is NaN
    totals[:3].add_(torch.stack([summed, correct, counted]))
    totals[3:].add_(totals[:1].isfinite())


def one_cycle(
    optimizer: torch.optim.Optimizer, batches: Iterable, epochs: int, peak: float | list[float]
) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle over the whole run: from peak/25 up to `peak` in its first 30%, then to almost 0.

    One peak for all groups of parameters, or a list with one for each. Smith and Topin,
    Super-Convergence, 2018 (arXiv:1708.07120).
    """
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=epochs * len(batches), cycle_momentum=False
    )


def clock(run: Settings) -> float:
    """Seconds, with the device's work done."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# -------------------------------------------------------------------------------------- scores


def _outputs(model: nn.Module, batches: Iterable, run: Settings, scored: bool = True):
    """(logits, labels) of every batch, on the device, from the model in evaluation mode.

    With `scored`, labels are checked, and each of several processes takes its part of the batches.
    """
    model.eval()
    mine = itertools.islice(batches, rank(), None, world_size()) if scored else batches
    try:
        for images, labels in mine:
            with run.autocast():
                logits = model(images.to(run.device, non_blocking=True))
            if scored and not isinstance(batches, Batches):
                require_labels(labels, logits.shape[1], "A batch")
            yield logits, labels.to(run.device, non_blocking=True)
    except (RuntimeError, MemoryError) as error:
        problem = out_of_memory(error, batches)
        if problem is None:
            raise
        raise UsageError(problem) from None


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable, run: Settings) -> float:
    """Percentage of labels that the model gets right: of images, or of pixels for label maps.

    Raises UsageError where there is no label, for want of memory and, of other batches than
    `Batches`, for a label that is none of the model's classes.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=run.device)  # correct, labels
    for logits, labels in _outputs(model, batches, run):
        counts += torch.stack([(logits.argmax(1) == labels).sum(), (labels != IGNORE).sum()])
    add_up(counts)
    correct, count = counts.tolist()
    if count == 0:
        raise UsageError("There is no label to score.")
    return 100 * correct / count


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Scores of the labels of images, or pixels, class by class, in percent."""

    accuracy: float  # of all labels
    class_accuracy: Tensor  # float64 (classes,), recall: of the class's labels; NaN where none is
    class_iou: Tensor  # float64 (classes,), intersection over union; NaN where no prediction either
    mean_iou: float  # of the classes that are a label or a prediction somewhere
    confusion: Tensor  # int64 (classes, classes): rows are the truth


@torch.inference_mode()
def evaluate_pixels(
    model: nn.Module, batches: Iterable, classes: int, run: Settings
) -> ClassScores:
    """Every per-pixel score from one confusion matrix, counted on the device.

    Raises UsageError as `evaluate` does, and for a label or prediction that is none of `classes`.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=run.device)
    for logits, labels in _outputs(model, batches, run):
        confusion += confusion_matrix(labels, logits.argmax(1), classes)
    add_up(confusion)
    return class_scores(confusion.cpu())


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """int64 (classes, classes), rows the truth, of labels and predictions, integers of one shape.

    Labels that are IGNORE are left out; other numbers than 0 to classes - 1 are refused.
    """
    require_labels(labels, classes, "The labels")
    counted = labels != IGNORE
    labels, predictions = labels[counted].long(), predictions[counted].long()
    if ((predictions < 0) | (predictions >= classes)).any():
        raise UsageError(f"Predictions must be classes, 0 to {classes - 1}.")
    pairs = labels * classes + predictions
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def class_scores(confusion: Tensor) -> ClassScores:
    """The scores that a confusion matrix, int64 (classes, classes), holds.

    A class is left out of the mean IoU where it is neither a pixel's truth nor its prediction.
    Raises UsageError where nothing was counted.
    """
    if not confusion.any():
        raise UsageError("There is no label to score.")
    hits, truth, predictions = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    iou = 100 * hits / (truth + predictions - hits)  # 0 / 0 is NaN
    accuracy = 100 * hits.sum().item() / confusion.sum().item()
    return ClassScores(accuracy, 100 * hits / truth, iou, iou.nanmean().item(), confusion)


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable, run: Settings) -> tuple[Tensor, Tensor]:
    """(classes int64, their probabilities float32) for every image or pixel, on the CPU.

    Each is (N) or (N, H, W), in the batches' order, which is the data set's if they do not shuffle.
    Raises UsageError for want of memory.
    """
    predictions, probabilities = [], []
    for logits, _ in _outputs(model, batches, run, scored=False):
        probability, prediction = logits.float().softmax(1).max(1)
        predictions.append(prediction.cpu())
        probabilities.append(probability.cpu())
    return torch.cat(predictions), torch.cat(probabilities)
