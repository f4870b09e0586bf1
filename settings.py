"""What a run is made with: the README's variables, the device, the precision, the processes.

`utils.settings()` in the notebooks is `settings()` here.
"""

from __future__ import annotations

import atexit
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torchvision
from torch import Tensor, distributed, nn

from checkpoints import Checkpoint
from files import UsageError

if TYPE_CHECKING:
    from utils import Dataset

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent
VARIABLES = {  # of the environment: what a value must look like, and the same in words
    "PROFILE": ("full|short|quick", "full, short or quick"),
    "EPOCHS": (r"0*[1-9]\d*", "a whole number from 1 up"),
    "SIZE": ("|".join(map(str, range(16, 1025, 8))), "a multiple of 8 from 16 to 1024"),
    "THRESHOLD": (r"\d{1,2}(\.\d*)?|100(\.0*)?", "a percentage"),
    "FLIP": ("[01]", "0 or 1"),
    "RESUME": ("[01]", "0 or 1"),
    "PRECISION": ("float32|bfloat16|float16", "float32, bfloat16 or float16"),
}


@dataclass(frozen=True)
class Settings:
    """What a run is made with; `print` it to see what was chosen."""

    profile: str  # "full" (the write-up's data and epochs), "short" (few epochs), "quick" (samples)
    data_dir: Path
    checkpoint_dir: Path
    epochs_cap: int | None
    device: torch.device
    precision: torch.dtype  # of the matrix products; weights and sums stay float32
    graphs: bool = False  # replay training steps as CUDA graphs, where they can be
    quiet: bool = False  # show no line and no plot of a run
    pictures: Path | None = None  # your own images, one folder per class, in place of CIFAR-10
    scenes: Path | None = None  # your own images/ and masks/, which are used rather than pictures
    size: int = 32  # the side that your own scenes are brought to
    pass_mark: float | None = None  # in place of the notebooks' thresholds
    my_picture: Path | None = None  # an image file for the trained model to label
    flip: bool = True  # whether training mirrors images
    resume: bool = True  # whether runs go on from their checkpoints

    def pick(self, full: T, quick: T, short: T | None = None) -> T:
        """The value that belongs to the profile; the short one's is the full one's by default."""
        if self.profile == "short" and short is not None:
            return short
        return quick if self.profile == "quick" else full

    def epochs(self, full: int, quick: int, short: int | None = None) -> int:
        """The profile's number of epochs, capped by EPOCHS."""
        return min(self.pick(full, quick, short), self.epochs_cap or sys.maxsize)

    def budget(self, dataset: Dataset, batch_size: int, *epochs: int) -> list[int]:
        """[batch size, epochs ..]: as given, but for your own data about 1,000 steps.

        A batch is then a twentieth of the data, 8 at least and `batch_size` at most; all `epochs`
        are one number, 10 to 200, or EPOCHS. It is printed.
        """
        if dataset.source == "own":
            batch_size = min(batch_size, max(8, len(dataset) // 20))
            enough = min(200, max(10, math.ceil(1000 * batch_size / len(dataset))))
            epochs = [self.epochs_cap or enough] * len(epochs)
            print(f"{dataset.name}: batches of {batch_size}, {in_words(epochs[0])}")
        return [batch_size, *epochs]

    def threshold(self, default: float) -> float:
        """The percentage to be graded by: THRESHOLD where it is set; 0, none, for your own data."""
        default = 0.0 if self.kind == "own" else default
        return default if self.pass_mark is None else self.pass_mark

    @property
    def own(self) -> Path | None:
        """The folder of your own data that is used, if any is."""
        return self.scenes or self.pictures

    @property
    def digits(self) -> Settings:
        """What MNIST is trained with: beside your own pictures, the quick profile."""
        return replace(self, profile="quick") if self.pictures and not self.scenes else self

    @property
    def kind(self) -> str:
        """A folder's name: neither a quick run nor your own data touches what the others made."""
        return "own" if self.own else self.pick("", "quick")

    @property
    def figures(self) -> Path:
        """Where pictures and results go."""
        return ROOT / "figures" / self.kind

    def checkpoint(self, name: str) -> Checkpoint:
        """Where a run keeps its state, for `train`; without `resume` it starts anew."""
        folder = self.pick("", "quick", "short")
        if self.own:
            folder = f"own/{self.own.resolve().name}"
        every = 60.0 if self.device.type == "cuda" else 0.0  # there an epoch may take a second
        if self.checkpoint_dir.is_relative_to("/content/drive"):  # Colab's: each file is uploaded,
            every *= 10  # and what it replaces may stay in the Drive's bin, up to 250 MB a time
        return Checkpoint(self.checkpoint_dir / folder / f"{name}.pt", self.resume, every)

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        reduced = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=reduced)

    def __str__(self) -> str:
        data = self.pick(f"the full data in {_short(self.data_dir)}", "the sample data, no network")
        autocast = "" if self.precision == torch.float32 else " autocast"
        graphs = ", steps replayed as CUDA graphs" if self.graphs else ""
        data = f"{data}, and your own in {self.own}" if self.own else data
        kind = "for" if self.own else "at most"
        cap = f", {kind} {in_words(self.epochs_cap)}" if self.epochs_cap else ""
        cap += "" if self.flip else ", no image flipped"
        return (
            f"profile    {self.profile}: {data}{cap}\n"
            f"hardware   {hardware_name(self.device)}{unused_gpu(self.device)}\n"
            f"precision  {dtype_name(self.precision)}{autocast}, channels_last{graphs}\n"
            f"versions   Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}"
        )


def settings(graphs: bool = True, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the README's variables from the environment; choose device and precision.

    `graphs` are used on CUDA alone, by one process, and not in float16, in which Muon's steps wait
    for the device (AdamW's, fused, would not; that has not been tried).

    Under torchrun it joins the processes. It sets torch's global flags: denormal numbers are
    flushed to zero, cuDNN tries its algorithms, and multiplies float32 in TF32 where the precision
    is another; on a Mac NNPACK is off. Raises UsageError for a value that makes no sense.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if int(environ.get("WORLD_SIZE") or 1) > 1 and "LOCAL_RANK" in environ:  # by torchrun
        device = join_processes(device, int(environ["LOCAL_RANK"]))
    value = {name: environ.get(name) or None for name in VARIABLES}
    for name, (pattern, meaning) in VARIABLES.items():
        if value[name] and not re.fullmatch(pattern, value[name], re.ASCII):
            raise UsageError(f"{name} is {value[name]!r}: set it to {meaning}, or leave it out.")
    paths = {}
    for name, what in (("PICTURES", "folder"), ("SCENES", "folder"), ("MY_PICTURE", "file")):
        path = _absolute(environ[name]) if environ.get(name) else None
        paths[name.lower()] = path
        if path and not (os.path.isfile if what == "file" else os.path.isdir)(path):
            raise UsageError(f"{name} is {environ[name]!r}, which is no {what} here.")
    for name, default in (("DATA_DIR", "data"), ("CHECKPOINT_DIR", "checkpoints")):
        paths[name.lower()] = _absolute(environ.get(name) or ROOT / default).resolve()
    if sys.platform == "darwin":  # NNPACK slows conv2d down (ultralytics/ultralytics#26221)
        torch.backends.nnpack.set_flags(False)
    # torch 2.9 warns of the names used here, which every version has
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
    torch.set_flush_denormal(True)  # without it, dead weights' averages halve AdamW's speed on CPUs
    named = value["PRECISION"]
    precision = getattr(torch, named) if named else best_precision(device)
    if device.type == "cuda":
        require_code(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision != torch.float32  # it is float32, then
    if precision == torch.float16:  # a step that overflows is left out, and it may be the first
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
    able = device.type == "cuda" and world_size() == 1 and precision != torch.float16
    return Settings(
        profile=value["PROFILE"] or ("full" if device.type == "cuda" else "quick"),
        epochs_cap=int(value["EPOCHS"]) if value["EPOCHS"] else None,
        device=device,
        precision=precision,
        graphs=graphs and able,
        size=int(value["SIZE"] or 32),
        pass_mark=float(value["THRESHOLD"]) if value["THRESHOLD"] else None,
        flip=value["FLIP"] != "0",
        resume=value["RESUME"] != "0",
        **paths,
    )


def join_processes(device: torch.device, local_rank: int) -> torch.device:
    """Join the processes that torchrun started; returns this one's device. Only the first prints.

    In `train` each then takes its share of every batch, and gradients are averaged; batch
    normalisation averages over the share alone. Folders must be common to all machines.
    """
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if device.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UsageError(f"More processes than GPUs here, {gpus}: start one for each.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 prints and saves."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def add_up(counts: Tensor) -> None:
    """Sum what the processes counted, in place."""
    if world_size() > 1:
        distributed.all_reduce(counts)


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's averages of batch normalisation, in place."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def best_precision(device: torch.device) -> torch.dtype:
    """The fastest dtype that the hardware multiplies natively.

    bfloat16 from CUDA compute capability 8.0 on (a T4, 7.5, only emulates it) and on CPUs with
    AMX or AMD's AVX512-BF16 (on an Intel Xeon with that and no AMX, float32 trained faster);
    float16 on the older tensor cores (a GeForce GTX 16's 7.5 comes without); float32 elsewhere.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        cores = capability >= (7, 0) and "GTX 16" not in hardware_name(device)
        return torch.float16 if cores else torch.float32
    checks = ["_is_amx_tile_supported"]
    if "Intel" not in hardware_name(device):
        checks.append("_is_avx512_bf16_supported")
    native = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if native else torch.float32


def require_code(device: torch.device) -> None:
    """Refuse a GPU older than all that this build of torch has code for, before its first kernel.

    In 2026 the usual builds begin with the T4's compute capability, 7.5.
    """
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(digits) for digits in re.findall(r"sm_(\d+)", str(torch.cuda.get_arch_list()))]
    if known and 10 * major + minor < min(known):
        raise UsageError(
            f"torch {torch.__version__} has no code for the {torch.cuda.get_device_name(device)}, "
            f"whose compute capability is {major}.{minor}: install a build of torch for CUDA 12.6, "
            "or hide the GPU with CUDA_VISIBLE_DEVICES=-1."
        )


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and its thread count, and how many there are at work."""
    times = f"{world_size()} x " if world_size() > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    return f"{times}{_processor()}, {torch.get_num_threads()} threads"


def unused_gpu(device: torch.device) -> str:
    """What to say of an NVIDIA GPU that is here, and not hidden, if torch does not use it."""
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    if device.type == "cuda" or hidden or shutil.which("nvidia-smi") is None:
        return ""
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is for CPUs alone"
    return f" (nvidia-smi is here, but torch {built} and finds no GPU: see the README)"


@cache  # Muon asks for the precision at every step
def _processor() -> str:
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":  # where that is "arm"
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True).stdout.strip() or name
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if "model name" in x), name)
    return name


@cache
def commit() -> str:
    """The commit this checkout is at, with -dirty where tracked files outside figures/ differ."""
    if not (ROOT / ".git").exists():  # git would answer for an outer one, or ask to be installed
        return "unknown"
    options = dict(cwd=ROOT, capture_output=True, text=True)
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        at = subprocess.run(command, check=True, **options).stdout.strip()
        command = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)figures"]
        return at + ("-dirty" if subprocess.run(command, **options).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measured_on(run: Settings) -> dict[str, str]:
    """The facts of a measurement: the machine, the versions, and when it began."""
    return dict(
        hardware=hardware_name(run.device),
        precision=dtype_name(run.precision),
        torch=str(torch.__version__),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def in_words(epochs: int) -> str:
    """1 epoch, 2 epochs, .."""
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def dtype_name(dtype: torch.dtype) -> str:
    """float32, say."""
    return str(dtype).removeprefix("torch.")


def _absolute(path: str | Path) -> Path:
    """The absolute path, "~", "." and ".." resolved, so that its last part is a name."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _short(path: Path) -> str:
    """A path as seen from the project, where it lies in it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
