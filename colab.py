"""Setting up a notebook in Google Colab; the first cell of each calls it there, and only there."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
NOT_NEEDED = {"jupyter", "nbval", "torchmetrics", "hypothesis", "ruff"}  # by the notebooks there


def set_up(drive: str | None = None) -> None:
    """Install what is missing, never another torch; put data and checkpoints on a Drive folder.

    Without `drive`, the Drive is mounted if DATA_DIR or CHECKPOINT_DIR lies on it.
    """
    missing = missing_packages()
    if missing:
        print(f"Installing {', '.join(missing)} ...")
        pinned = [
            f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "torchvision")
        ]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *missing, *pinned]
        subprocess.run(command, check=True)
    folders = [os.environ.get(name, "") for name in ("DATA_DIR", "CHECKPOINT_DIR")]
    if drive or any(folder.startswith("/content/drive") for folder in folders):
        from google.colab import drive as google_drive

        google_drive.mount("/content/drive")
    if drive:
        folder = Path("/content/drive/MyDrive") / drive
        for name, usual in (("DATA_DIR", "data"), ("CHECKPOINT_DIR", "checkpoints")):
            own = os.environ.get(name) or usual  # yours may be elsewhere
            os.environ[name] = str(folder / own)
            print(f"{usual.capitalize()} are kept in {os.environ[name]}.")
    if not torch.cuda.is_available():
        print("\n*** NO GPU IS ON. Choose Runtime, Change runtime type, T4 GPU, and run all again.")
        if not os.environ.get("PROFILE"):
            print("*** Without one, the quick profile runs: samples in place of the full data.\n")


def missing_packages(requirements: Path = ROOT / "requirements.txt") -> list[str]:
    """What the notebooks need and is not installed, as pip takes it; versions are not compared."""
    if not requirements.exists():
        return []
    missing = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        name = re.match(r"[\w.-]*", requirement).group()
        if not name or name in NOT_NEEDED:
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing
