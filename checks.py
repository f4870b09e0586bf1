"""What is refused before a model is trained on data, or scored: what does not fit together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from checkpoints import RandomState, of_device, out_of_memory
from files import UsageError, reason
from settings import Settings, dtype_name

IGNORE = 255  # the label of a pixel that neither the loss nor a score counts


def require_labels(labels: Tensor, classes: int, whose: str) -> None:
    """Refuse labels that are neither a class nor IGNORE."""
    wrong = (labels < 0) | (labels >= classes) & (labels != IGNORE)
    if wrong.any():
        first, where = labels[wrong][0].item(), f"out of range 0 to {classes - 1}"
        raise UsageError(f"{whose}: {int(wrong.sum())} labels are {where}, {first} for one.")


def check_fit(model: nn.Module, batches: Iterable, run: Settings) -> int:
    """How many classes the model scores; data that it can't be trained or scored on is refused.

    Two images of the first batch are tried; the model is left in evaluation mode.
    """
    from utils import Dataset  # only here: it imports this module

    name, dataset = type(model).__name__, getattr(batches, "dataset", None)
    if len(batches) == 0:
        raise UsageError("There are no batches.")
    random = RandomState(batches)
    before = random.state_dict()  # a DataLoader draws its order
    images, labels = next(iter(batches))
    random.load_state_dict(before)
    images, labels = images[:2].to(run.device), labels[:2].to(run.device)
    if (images.dtype, labels.dtype) != (torch.float32, torch.int64):
        found = f"{dtype_name(images.dtype)} and {dtype_name(labels.dtype)}"
        raise UsageError(f"A batch must be float32 images and int64 labels, not {found}.")
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except (RuntimeError, ValueError) as error:
        problem, shape = out_of_memory(error), tuple(images.shape[1:])
        if problem is None and of_device(error):
            raise
        refused = f"{name} can't take images of shape {shape}: {reason(error)}."
        raise UsageError(problem or refused) from None
    if not isinstance(logits, Tensor):
        raise UsageError(f"{name} must return logits, a Tensor, not {type(logits).__name__}.")
    if logits.ndim < 2 or (len(logits), *logits.shape[2:]) != labels.shape:
        given, needed = tuple(logits.shape[1:]), tuple(labels.shape[1:])
        raise UsageError(
            f"{name} gives scores of shape {given} for an image, where a label's shape is {needed}"
            f": it should give (classes{''.join(f', {side}' for side in needed)})."
        )
    if logits.shape[1] > IGNORE:
        has = f"{logits.shape[1]} classes: {IGNORE} at most, for label {IGNORE} means ignored"
        raise UsageError(f"{name} gives scores for {has}.")
    if isinstance(dataset, Dataset):
        if logits.shape[1] != len(dataset.classes):
            has = f"{logits.shape[1]} classes, where {dataset.name} has {len(dataset.classes)}"
            raise UsageError(f"{name} gives scores for {has}: make its last layer that wide.")
        if not (dataset.labels != IGNORE).any():
            raise UsageError(f"{dataset.name}: every label is {IGNORE}, which is ignored.")
    return logits.shape[1]


def check_loss(loss_function: Callable) -> None:
    """Refuse a loss that takes no `ignore_index` when it is called, as nn.CrossEntropyLoss()."""
    try:
        signature = inspect.signature(getattr(loss_function, "forward", loss_function))
    except ValueError:  # what is compiled cannot be looked into
        return
    try:
        signature.bind(None, None, ignore_index=IGNORE)
    except TypeError:
        takes = "(logits, labels, ignore_index), as nn.functional.cross_entropy does"
        raise UsageError(f"loss_function must take {takes}: {loss_function} does not.") from None
