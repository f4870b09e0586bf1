"""A small training run to be killed: every kind of state that a checkpoint has to bring back."""

import hashlib
import os
import random
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import files  # noqa: E402
import progress  # noqa: E402
import utils  # noqa: E402

EPOCHS = 6


def toy(n=240, seed=0):
    """Three classes of 8x8 images that brightness and stripes tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randint(60, (n, 1, 8, 8), generator=generator)
    images[labels == 1] += 120
    images[labels == 2, :, ::2] += 190
    return utils.Dataset("toy", "sample", images.to(torch.uint8), labels, ("a", "b", "c"))


def settings(folder):
    return utils.Settings("full", folder, folder, None, torch.device("cpu"), torch.float32)


def model():
    """Convolution, batch normalisation and dropout, which draws from torch's generator."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(288, 3),
    )  # fmt: skip


def noisy_loss(logits, labels, ignore_index):
    """Cross-entropy, weighted by draws from numpy's and Python's generators."""
    weight = 0.9 + 0.1 * np.random.rand() + 0.1 * random.random()
    return weight * nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index)


def fit(folder, epochs=EPOCHS, network=None, loss=noisy_loss, stop_after=None, **changes):
    """Train in `folder`; returns (history, digest of everything that a run ends with)."""
    run = replace(settings(Path(folder)), resume=changes.pop("resume", True))
    np.random.seed(0)
    random.seed(0)
    network = network or model()
    peak = changes.pop("peak", 0.01)
    optimizer = torch.optim.AdamW(network.parameters(), peak)
    options = dict(batch_size=24, statistics=None, shuffle=True, flip=True, shift=1, seed=3)
    options.update({k: changes.pop(k) for k in list(changes) if k in options})
    batches = utils.Batches(changes.pop("data", toy()), run=run, **options)
    others = changes.pop("validation", toy(90, seed=1))
    validation = utils.Batches(others, 64, run, toy().statistics())
    schedule = utils.one_cycle(optimizer, batches, epochs, peak)
    checkpoint = run.checkpoint("toy")
    if stop_after:
        stop_after_epoch(checkpoint, stop_after)
    history = utils.train(
        network, optimizer, batches, validation, epochs, run, schedule, loss, checkpoint, **changes
    )
    return history, digest(network, optimizer, schedule, history)


def digest(network, optimizer, schedule, history):
    """SHA-256 of weights, optimizer, schedule, generators, and the history but for its times."""
    scores = [(e.epoch, e.loss, e.accuracy, e.validation_accuracy) for e in history]
    best = max((e.validation_accuracy for e in history), default=None)
    generators = torch.rand(3), np.random.rand(3).tolist(), random.random()
    states = [part.state_dict() for part in (network, optimizer, schedule)]
    return fingerprint([*states, scores, best, generators])


def fingerprint(value):
    """SHA-256 of tensors and built-in types, nested in any way."""
    seen = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            seen.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                seen.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            seen.update(repr(value).encode())

    add(value)
    return seen.hexdigest()


class Stop(Exception):
    """What stops a run between two epochs."""


def stop_after_epoch(checkpoint, epoch):
    """Let a run end with an error right after it has saved an epoch."""
    save = checkpoint.save

    def save_and_stop(history, *rest):
        save(history, *rest)
        if len(history) == epoch:
            raise Stop

    checkpoint.save = save_and_stop


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place, count):
    """Have this process kill itself the `count`-th time that it comes to a place."""
    left = [count]

    def now():
        left[0] -= 1
        return left[0] == 0

    def before(owner, name, mine=lambda *arguments: True):
        original = getattr(owner, name)

        def patched(*arguments, **options):
            if mine(*arguments) and now():
                die()
            return original(*arguments, **options)

        setattr(owner, name, patched)

    if place == "in a step":
        before(nn.Dropout, "forward", lambda layer, x: layer.training)
    elif place == "in validation":
        before(nn.Dropout, "forward", lambda layer, x: not layer.training and len(x) > 2)
    elif place == "between epochs":
        before(progress.Progress, "epoch")
    elif place == "before the save":
        before(torch, "save")
    elif place == "with half a file written":
        original = os.fsync

        def cut(handle):
            if stat.S_ISREG(os.fstat(handle).st_mode) and now():
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                die()
            original(handle)

        os.fsync = cut
    elif place == "before the file is flushed":
        before(os, "fsync")
    elif place == "before the old file is renamed":
        before(Path, "replace", lambda path, to: path.suffix == ".pt")
    elif place == "between the two renames":
        before(Path, "replace", lambda path, to: path.suffix == ".partial")
    else:
        raise ValueError(place)


PLACES = {  # and the pass at which one is there in the second epoch of a process's life
    "in a step": 13,
    "in validation": 3,
    "between epochs": 2,
    "before the save": 2,
    "with half a file written": 2,
    "before the file is flushed": 3,  # once for the file, once for its folder
    "before the old file is renamed": 2,
    "between the two renames": 2,
}


def live(folder, started=None, place=None, count=None):
    """The body of a process: train to the end, and leave the digest where it can be read."""
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    if place:
        kill_at(place, count)
    if started is not None:
        started.set()
    result = fit(folder)[1]
    files.write_whole(Path(folder) / "digest", result.encode())


class Program:
    """What an attacker would put into a pickle: a folder shows that it was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
