"""Training steps replayed as CUDA graphs, and an optimizer made ready for that, or not.

A graph is a recording of what a step launches on the GPU; its Python runs while it is recorded and
never again. `utils.train` uses what `captured` makes of its step as it would the step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from checkpoints import out_of_memory
from files import UsageError, reason


def captured(step: Callable, optimizer: torch.optim.Optimizer, schedule, wanted: bool) -> Callable:
    """The step, replayed as a CUDA graph if that is `wanted` and can be done."""
    wanted = wanted and replayable(optimizer, schedule)
    settle(optimizer, wanted)
    return CapturedStep(step, optimizer) if wanted else step


def replayable(optimizer: torch.optim.Optimizer, schedule) -> bool:
    """Whether a recording would keep on learning as the step does.

    The optimizer must read its numbers from the device (be `capturable`, as AdamW and Muon can),
    and the schedule, and any that it is made of, rewrite nothing but learning rates.
    """
    able = all(group.get("capturable") is not None for group in optimizer.param_groups)
    schedules = schedule, *getattr(schedule, "_schedulers", ())
    return able and not any(getattr(one, "cycle_momentum", False) for one in schedules)


def settle(optimizer: torch.optim.Optimizer, replayed: bool) -> None:
    """Keep learning rates and counts of steps where graphs read them, or where plain steps do.

    Whatever the run was trained with before: a checkpoint made with graphs goes on without, on a
    CPU say, and the other way round.
    """
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        rate = float(group.get("lr", 0.0))
        group["lr"] = torch.tensor(rate, device=device) if replayed else rate
        if "capturable" in group:
            group["capturable"] = replayed
        on_device = replayed or group.get("fused")
        for state in (optimizer.state.get(weight, {}) for weight in group["params"]):
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device if on_device else "cpu")


class CapturedStep:
    """A training step, replayed as a CUDA graph: one launch takes the place of hundreds.

    That is what a small batch spends its time on. Each shape of batch has three ordinary steps,
    then its own graph: the short last one, too, and images that grow (`recipes.Resized`). The
    recording is part of an epoch's seconds. Where a schedule changes more of the optimizer than its
    rates, steps are ordinary from then on. Losses and layers that ask for a value, draw on the CPU,
    or read in Python what changes from step to step can't be replayed:
    `utils.settings(graphs=False)` is for them.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None], optimizer: torch.optim.Optimizer):
        self.step, self.seen, self.graphs = step, Counter(), {}
        self.groups = optimizer.param_groups  # settled: their rates are what a graph reads
        self.rates = [group["lr"] for group in self.groups]
        self.fixed = self.constants()
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        for group, rate in zip(self.groups, self.rates, strict=True):
            if group["lr"] is not rate:  # some schedules put a number in its place
                rate.fill_(group["lr"])
                group["lr"] = rate
        if self.fixed and self.constants() != self.fixed:
            self.graphs, self.fixed = {}, None
        shape = images.shape
        if self.fixed and shape not in self.graphs and self.seen[shape] == 3:
            self.graphs[shape] = self.record(images.clone(), labels.clone())
        if shape in self.graphs:
            graph, kept_images, kept_labels = self.graphs[shape]
            kept_images.copy_(images)
            kept_labels.copy_(labels)
            graph.replay()
            return
        self.seen[shape] += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):  # as a recording: away from the default stream
                self.step(images.clone(), labels.clone())  # aligned as those of a recording
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)

    def constants(self) -> list[list]:
        """What the optimizer reads in Python, which a recording keeps as it was."""
        names = "params", "lr", "initial_lr"
        return [[v for k, v in sorted(g.items()) if k not in names] for g in self.groups]

    def record(self, images: Tensor, labels: Tensor):
        """(graph, images, labels): what a replay reads, and does. Nothing is run."""
        graph, before, drawn = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), _drawn()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(images, labels)
        except RuntimeError as error:
            first = error.__context__ or error  # the recording's own end fails, too
            if isinstance(first, KeyboardInterrupt) or out_of_memory(first):
                raise first from None
            raise UsageError(
                f"The training step can't be recorded as a CUDA graph ({reason(first)}): "
                "restart the kernel and use utils.settings(graphs=False)."
            ) from None
        finally:
            torch.cuda.set_stream(before)  # which a recording that fails does not
        if _drawn() != drawn:
            raise UsageError(
                "The training step draws random numbers on the CPU, which a CUDA graph would "
                "repeat: use utils.settings(graphs=False)."
            )
        return graph, images, labels


def _drawn() -> tuple:
    """Where the CPU's generators stand: torch's, NumPy's and Python's."""
    _, keys, place, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), keys.tolist(), place, random.getstate()
