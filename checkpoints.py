"""Checkpoints: a run that is cut short, anywhere, goes on where it was and ends the same.

After an epoch the whole state of a run goes to one file, and the file before is kept beside it.
Training then starts from what it finds, if that is the same run; `utils.train` does the asking.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import gc
import inspect
import io
import math
import os
import random
import re
import signal
import tempfile
import textwrap
import threading
import time
import traceback
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from files import UsageError, reason, rename, write_whole

if TYPE_CHECKING:  # it imports this module
    from utils import History

FORMAT = 1
KEYS = {"format", "facts", "history", "made", "parts", "probe"}


class Checkpoint:
    """The file of one run: tensors and built-in types only, read with `weights_only=True`.

    With `resume` false, what lies there is deleted and the run starts anew. Saves are at least
    `every` seconds apart, but for the last one; by default every epoch is saved.
    """

    def __init__(self, path: str | Path, resume: bool = True, every: float = 0.0):
        path = Path(path)
        self.path, self.resume, self.every = path, resume, every
        self.kept, self.saved = 0, -math.inf  # epochs in the file, and when this wrote it last
        self.previous = path.with_name(f"{path.name}.previous")
        change = "set RESUME to True (False deletes the checkpoint), run its cell, and "
        self.again = f"{'' if resume else change}run this again"
        self.way_out = f"delete {path}* (RESUME = False would start every run of the notebook anew)"

    def start(self, parts: Mapping, facts: Mapping[str, str]) -> tuple[list, dict]:
        """Bring `parts` (model, optimizer, ..) to where the run was; returns (history, made).

        `facts` are what makes a run this run: where the file's differ, it is refused. Both are
        empty where there is no file yet. On the CPU what follows is bit for bit what would have
        followed without the interruption.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.facts = facts
        require_plain({name: part.state_dict() for name, part in self.parts.items()})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass  # better now than after an epoch
            if not self.resume:
                self.path.unlink(missing_ok=True)
                self.previous.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"Checkpoints cannot be written to {self.path.parent} ({reason(error)}): name "
                "another folder in CHECKPOINT_DIR."
            ) from None
        history, made = self.load()
        if history:
            here = Path.cwd()
            path = self.path.relative_to(here) if self.path.is_relative_to(here) else self.path
            print(
                f"Found {len(history)} of {facts['epochs']} epochs in {path}, "
                f"trained on {made['device']}, {made['date']}."
            )
        return history, made

    def save(self, history: History, images: Tensor, last: bool = False) -> None:
        """Write the state after an epoch; `images` (B, C, H, W) are a few that it trained on.

        After `start`. Nothing is written within `every` seconds of the last save, unless it is the
        `last` epoch. Raises UsageError where it cannot be written.
        """
        if not last and time.monotonic() - self.saved < self.every:
            return
        kept = images.cpu().clone()  # without the rest of a batch that they are a view of
        probe = {"images": kept, "logits": _answer(self.parts["model"], images)}
        state = {
            "format": FORMAT,
            "facts": dict(self.facts),
            "history": [list(epoch) for epoch in history],
            "made": dict(history.made),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "probe": probe,
        }
        require_plain(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        try:
            write_whole(self.path, buffer.getbuffer(), keep=self.previous)
        except OSError as error:
            kept = f"epoch {self.kept}'s is kept" if self.kept else "there is none before it"
            raise UsageError(
                f"The checkpoint {self.path} of epoch {len(history)} could not be written "
                f"({reason(error)}): {kept}; fix that, or copy what is there to another folder, "
                f"name that in CHECKPOINT_DIR, and {self.again}."
            ) from None
        self.kept, self.saved = len(history), time.monotonic()

    def load(self) -> tuple[list, dict]:
        """Bring the parts to the state in the file; returns (history, made), empty without one.

        After `start`, which names parts and facts. A file of another run, or a damaged one, is
        refused by a UsageError.
        """
        state = self._read()
        if state is None:
            return [], {}
        self.kept = len(state["history"])
        for name, here in self.facts.items():
            there, here = _rounded(state["facts"].get(name, "nothing")), _rounded(here)
            if there != here:
                back = f"set PRECISION={there}" if name == "precision" else "put it back"
                raise UsageError(
                    f"{self.path} is of another run, whose {name} was {_difference(there, here)}: "
                    f"{back}, or {self.way_out}."
                )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            answer = _answer(self.parts["model"], state["probe"]["images"])
            logits = state["probe"]["logits"]
            # the same weights on another device round differently, a changed forward() does more
            same = torch.allclose(answer, logits, rtol=0, atol=0.01 * logits.abs().max().item())
        except Exception as error:  # a file that was tampered with can raise nearly everything
            problem = out_of_memory(error)
            if problem is None and of_device(error):
                raise  # not the file's fault
            raise UsageError(
                problem or f"{self.path} does not fit this run ({reason(error)}): {self.way_out}."
            ) from None
        if not same:
            raise UsageError(
                f"{self.path} is of another run: with its weights, this model answers differently, "
                f"so its forward pass has changed: put it back, or {self.way_out}."
            )
        return state["history"], state["made"]

    def _read(self) -> dict | None:
        """The newest whole file's content; None where there is none."""
        problems = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = self._read_one(path)
            except UsageError:
                raise
            except OSError as error:
                problems.append(f"{path} cannot be read ({reason(error)})")
            except Exception as error:  # zipfile raises nearly everything
                if problem := out_of_memory(error):
                    raise UsageError(problem) from None
                problems.append(f"{path} is damaged ({reason(error)})")
            else:
                if problems:
                    print(f"{problems[0]}; going on from the one before it.")
                    with contextlib.suppress(FileNotFoundError):  # another process was faster
                        rename(self.path, self.path.with_name(f"{self.path.name}.damaged"))
                return state
        if problems:
            raise UsageError(f"{' and '.join(problems)}: {self.way_out}.")
        return None

    def _read_one(self, path: Path) -> dict:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises nearly everything
            if problem := out_of_memory(error):
                raise UsageError(problem) from None
            if "weights_only" not in str(error).lower():
                raise ValueError(reason(error)) from None
            raise UsageError(
                f"{path} holds more than tensors and built-in types and was not loaded, for "
                f"loading it could run any program: {self.way_out}."
            ) from None
        version = state.get("format") if isinstance(state, dict) else None
        if version != FORMAT:
            raise UsageError(
                f"{path} is a checkpoint of format {version}, where this version of the project "
                f"reads {FORMAT}: use the version that wrote it, or {self.way_out}."
            )
        if set(state) != KEYS:
            odd = ", ".join(sorted(set(state) ^ KEYS))
            raise UsageError(
                f"{path} is not as this version of the project writes it (see {odd}): "
                f"use the version that wrote it, or {self.way_out}."
            )
        return state


def facts_of(model: nn.Module, optimizer, schedule, scaler, random, **others) -> dict[str, str]:
    """What makes a run this run, as text: compared in this order, and shown where it differs."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        trained = [names.get(id(p), "another") for p in group["params"] if p.requires_grad]
        passing = [*_IMPLEMENTATION, *(["lr"] if "initial_lr" in group else [])]
        passing += ["momentum", "betas"] if "max_momentum" in group else []  # a schedule's, too
        kept = {k: v for k, v in sorted(group.items()) if k not in passing}
        if "lr" in kept:  # for graphs a float32 tensor: as many digits as that has
            kept["lr"] = float(f"{float(kept['lr']):.6g}")
        groups.append({**kept, "params": trained})
    facts = {
        **{name: _describe(value) for name, value in others.items()},
        "optimizer": f"{type(optimizer).__name__} {groups}",
        "schedule": _describe_schedule(schedule),
        "scaler": f"enabled {scaler.is_enabled()}",
        "random numbers": f"of {len(random.generators)} generators of the batches",
        "model": str(model),
        "weights": "\n".join(
            f"{name} {tuple(v.shape)} {v.dtype}" for name, v in model.state_dict().items()
        ),
    }
    return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", text) for name, text in facts.items()}


# what changes no result, and a key that AdamW's groups have from torch 2.7 on
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay")


def _describe(value) -> str:
    """A setting as text: a function by its source, a DataLoader by what it yields."""
    if isinstance(value, torch.utils.data.DataLoader):
        state = RandomState(value)
        kept = state.state_dict()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        for generator in state.generators:  # from where it began, wherever it is now
            generator.manual_seed(generator.initial_seed())
        images, labels = (part.cpu().contiguous().numpy() for part in next(iter(value)))
        state.load_state_dict(kept)
        digest = sha256(images)
        digest.update(labels)
        kinds = type(value.sampler).__name__, type(value.dataset).__name__
        return (
            f"{len(value)} batches of {value.batch_size}, {kinds}, {len(value.dataset)} examples, "
            f"SHA-256 of a batch {digest.hexdigest()[:16]}"
        )
    function = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
    function = getattr(function, "__func__", function)  # a method's
    if (getattr(function, "__module__", None) or "").startswith("torch.nn.functional"):
        return function.__qualname__ if function is value else str(value)
    if inspect.isfunction(function):
        return f"{value} {_describe_function(function)}"
    return str(value.detach().cpu() if isinstance(value, Tensor) else value)


def _describe_function(function) -> str:
    """Its defaults, the plain values it takes from outside itself, its source without comments."""
    code = function.__code__
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    reads = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    outside = {name: function.__globals__.get(name) for name in sorted(reads)}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    outside |= zip(code.co_freevars, cells, strict=True)
    plain = int, float, str, tuple, Tensor
    outside = {name: _describe(item) for name, item in outside.items() if isinstance(item, plain)}
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
        source = ast.unparse(definition)
    except (OSError, SyntaxError, TypeError):  # made by exec, or a lambda
        source = ""
    constants = [item for item in code.co_consts if not inspect.iscode(item)]
    compiled = code.co_code.hex(), code.co_names, constants
    return f"{list(map(_describe, defaults))} {outside}\n{source or compiled}"


def _describe_schedule(schedule) -> str:
    """A schedule's type and constants, whatever step it is at."""
    if schedule is None:
        return "constant"
    state = {k: v for k, v in vars(schedule).items() if k not in _PROGRESS}
    state = {k: v for k, v in state.items() if k[0] != "_" or k in _CONSTANTS}
    functions = [_describe(f) for f in state.pop("lr_lambdas", [])]
    functions += [_describe_schedule(part) for part in getattr(schedule, "_schedulers", ())]
    plain = (bool, int, float, str, list, tuple, dict)
    state = {k: v for k, v in state.items() if isinstance(v, plain)}
    return f"{type(schedule).__name__} {state} {functions}"


_PROGRESS = ("optimizer", "last_epoch", "T_cur", "T_i")
_CONSTANTS = ("_schedule_phases", "_anneal_func_type", "_milestones")  # that are private


def _rounded(text: str) -> str:
    """With seven digits of each fraction: the last ones depend on how a CPU adds up."""
    return re.sub(r"\d+\.\d{7,}", lambda number: f"{float(number[0]):.7g}", text)


def _difference(there: str, here: str) -> str:
    """Two texts, from a little before they differ: "'this' and is now 'that'"."""
    start = len(os.path.commonprefix([there, here]))
    start = max(0, there.rfind(" ", 0, max(0, start - 20)))
    old, new = (" ".join(text[start : start + 90].split()) for text in (there, here))
    return f"'{old}' and is now '{new}'"


def require_plain(value, place: str = "the state") -> None:
    """Refuse what `torch.load` would not give back with weights_only: before it is written."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(item, f"{place}, {key}")
    elif type(value) in (list, tuple):
        for item in value:
            require_plain(item, place)
    elif type(value) not in (int, float, bool, str, type(None), Tensor, nn.Parameter):
        raise UsageError(
            f"A checkpoint can't hold {type(value).__name__} ({place}): use numbers, text and "
            "tensors there, or train without a checkpoint."
        )


@torch.no_grad()
def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits in evaluation mode and float32, on the CPU: a trace of its computing."""
    model.eval()
    device = next(model.parameters()).device
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # to compare across hardware
        return model(images.to(device).float()).float().cpu()


class RandomState:
    """The state of every generator that training may draw from, a DataLoader's own among them."""

    def __init__(self, batches=None):
        owners = batches, getattr(batches, "sampler", None)
        found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g}
        self.generators = list(found.values())

    def state_dict(self) -> dict:
        """Tensors, numbers and text."""
        name, keys, *rest = np.random.get_state()
        version, numbers, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "batches": [generator.get_state() for generator in self.generators],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "python": [version, list(numbers), gauss],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on drawing where `state` was taken."""
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        for generator, at in zip(self.generators, state["batches"], strict=True):
            generator.set_state(at)
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))


def require_finite(
    epoch: int, step: int, totals: Tensor, model: nn.Module | None = None, scaler=None
) -> None:
    """Raise FloatingPointError if the loss up to a step, or the model's state, is not finite.

    Or if the scale of a GradScaler has fallen so far that it left nearly every step out.
    `totals`, float64 (4), are an epoch's sum of losses, correct labels, labels, and finite steps.
    """
    finite = int(totals[3])
    if finite < step:
        raise FloatingPointError(f"The loss of epoch {epoch}, step {finite + 1} is not finite")
    state = model.state_dict() if model else {}
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise FloatingPointError(f"After epoch {epoch}, step {step}, {name} is not finite")
    if scaler and scaler.is_enabled() and scaler.get_scale() < 2**-10:  # halved at each such step
        where = f"In epoch {epoch} the gradients are not finite in float16"
        raise FloatingPointError(f"{where} (PRECISION=float32 may help)")


@contextlib.contextmanager
def guarded(history: History, optimizer, batches, checkpoint: Checkpoint | None, step):
    """The context of the training loop: whatever stops it ends in a sentence, and nothing is lost.

    Ctrl-C raises nothing: `history.stopped` is set, and model and history are as after the last
    epoch that has a checkpoint (where none has, the weights keep what was begun). Yields a list,
    which is not empty once Ctrl-C was pressed. Out of memory and a loss that is not finite become a
    UsageError. The recordings of a `step` (graphs.CapturedStep) are let go of: a traceback would
    keep them, and their memory.
    """
    problem, pressed, chain = None, [], signal.getsignal(signal.SIGINT)

    def note(number, frame) -> None:
        pressed.append(number)
        chain(number, frame)  # raises KeyboardInterrupt, which a destructor may swallow

    listens = callable(chain) and threading.current_thread() is threading.main_thread()
    if listens:
        signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    except KeyboardInterrupt as stop:
        traceback.clear_frames(stop.__traceback__)  # of their tensors
        history.stopped = True
        if checkpoint:
            del history[len(checkpoint.load()[0]) :]  # an epoch whose checkpoint was not written
        if checkpoint and history:
            print(f"Stopped. To go on after epoch {len(history)}, {checkpoint.again}.")
        else:
            part = "The weights keep that epoch's steps."
            print(f"Stopped in epoch {len(history) + 1}. {part}")
    except FloatingPointError as error:
        kept = checkpoint.kept if checkpoint else 0
        good = f"; {checkpoint.path} still holds epoch {kept}" if kept else ""
        anew = checkpoint.way_out if kept else "start anew"
        problem = f"{error}{good}: lower the learning rate and {anew}."
    except (RuntimeError, MemoryError) as error:
        problem = out_of_memory(error, batches)
        if problem is None:
            raise
        if checkpoint and history:
            problem += f" That would be another run: {checkpoint.way_out}."
    else:
        return
    finally:
        if listens:
            signal.signal(signal.SIGINT, chain)
        optimizer.zero_grad()
        getattr(step, "graphs", {}).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if problem:
        raise UsageError(problem) from None


def of_device(error: Exception) -> bool:
    """Whether it is the GPU's own fault, whatever ran on it."""
    return re.match("(CUDA|cuDNN|cuBLAS) error", reason(error), re.I) is not None


def out_of_memory(error: Exception, batches=None) -> str | None:
    """The sentence for an error that is want of memory, None for any other.

    The frames that the error came through let go of their tensors.
    """
    texts = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    # what cuDNN and cuBLAS say when a GPU is full, and seldom otherwise
    unclear = ("unable to find an engine", "status_not_initialized")
    known, text = isinstance(error, (MemoryError, torch.OutOfMemoryError)), str(error).lower()
    probable = any(part in text for part in unclear)
    if not known and not probable and not any(part in text for part in texts):
        return None
    traceback.clear_frames(error.__traceback__)
    what = f"Probably out of memory ({reason(error)})" if probable else "Out of memory"
    size = getattr(batches, "batch_size", None) or 1
    if size == 1:
        return f"{what}: use a smaller model, or stop what else uses the memory."
    return f"{what} with batches of {size}: try a batch size of {size // 2}."
