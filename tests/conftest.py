"""Small data sets on disk, the models as the notebooks define them, and the count of faults."""

import collections
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
from datetime import UTC, datetime
from multiprocessing import forkserver
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # what each notebook trains and records
    "imageclassification": ["cifar10", "cifar10-94", "cifar10-96", "mnist", "mnist-best"],
    "imagesegmentation": [f"segmentation-{n}" for n in (1, 2, 3, 4, "best")],
}
NOTEBOOKS = [f"{name}.ipynb" for name in RUNS]
FIELDS = """run profile best_accuracy best_epoch final_accuracy official_test_accuracy
    train_seconds evaluation_seconds dataset source split model parameters multiply_adds flops
    epochs planned_epochs batch_size optimizer schedule augmentation precision seed device torch
    commit date history""".split()  # of a record
sys.path.insert(0, str(ROOT))

import report  # noqa: E402
import tables  # noqa: E402
import utils  # noqa: E402

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # where the tests' servers are

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job that a script put behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform == "win32":  # no SIGKILL, SIGALRM and fork server there
    collect_ignore = ["test_files.py", "test_fuzz.py", "test_kills.py"]

CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cell_with(name, text):
    """The source of a notebook's only cell of code that holds a text."""
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = [source for source in sources if text in source]
    assert len(found) == 1, f"{len(found)} cells of {name} have {text!r}"
    return found[0]


def train_giving(history, seen=None):
    """A `utils.train` that takes what the real one takes, into `seen`, and gives a history."""
    signature = inspect.signature(utils.train)

    def train(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        if seen is not None:
            seen.append(given)
        return history

    return train


def export(name, folder, questions=None):
    """A notebook as a script, with what it imports; `questions` are all that is asked then."""
    for file in ROOT.glob("*.py"):  # first: an older script of that name may lie among them
        shutil.copy(file, folder)
    if questions is not None:  # all of them take longest
        with (folder / "trials.py").open("a", encoding="utf-8") as trials:
            trials.write(f"\nasked = {questions!r}\n")
    command = [sys.executable, "-m", "nbconvert", "--to", "script", "--output-dir", folder]
    subprocess.run([*command, ROOT / f"{name}.ipynb"], check=True, capture_output=True)


def run_python(*command, cwd, timeout=None, **environ):
    """What Python prints that is started with these arguments, and ends well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def skip_unless_committed(*files):
    """Skip the test where these files are, or may be, someone's own."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip(f"without git nobody can tell whose runs {files} hold")
    command = ["git", "diff", "--quiet", "HEAD", "--", *files]
    if subprocess.run(command, cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"{files} differ from what is committed, or nothing is: runs of your own?")


class Tally(collections.Counter):
    """Processes killed, inputs tried, faults injected, and what was lost by them."""

    def add(self, kind, survived=True):
        """Count one; where something was lost, count that too, and fail."""
        self[kind] += 1
        self["lost"] += not survived
        assert survived, f"lost by {kind} {self[kind]}"


counts = Tally(kills=0, inputs=0, faults=0, lost=0)


@pytest.fixture
def shown(monkeypatch):
    """What is shown, figure after figure."""
    figures = []
    monkeypatch.setattr(report.plt, "show", lambda: figures.append(report.plt.gcf()))
    yield figures
    report.plt.close("all")


@pytest.fixture(scope="session")
def tally():
    """What a run of `pytest -m faults` counts."""
    return counts


def pytest_sessionfinish(session, exitstatus):
    """Leave the count in figures/faults.json, if all fault tests were run, and nothing else."""
    options = session.config.option
    some = session.config.args_source is not session.config.ArgsSource.TESTPATHS or any(
        getattr(options, name, None) for name in "keyword lf maxfail deselect ignore".split()
    )
    if options.markexpr != "faults" or options.collectonly or some or exitstatus not in (0, 1):
        return
    facts = dict(
        machine=utils.hardware_name(torch.device("cpu")),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=utils.commit(),
        failed_tests=session.testsfailed,
    )
    text = json.dumps({**counts, **facts}, indent=1)
    (ROOT / "figures").mkdir(exist_ok=True)
    (ROOT / "figures" / "faults.json").write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def processes():
    """A way to start processes that have torch already, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["victim"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for the server to find it
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # or most are killed while they look for a GPU
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module", autouse=True)
def plain_settings():
    """The variables that change what a notebook prints are not the caller's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in "EPOCHS SIZE THRESHOLD FLIP RESUME PICTURES SCENES MY_PICTURE".split():
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def classification():
    return report.notebook_definitions("imageclassification.ipynb")


@pytest.fixture(scope="session")
def segmentation():
    return report.notebook_definitions("imagesegmentation.ipynb")


@pytest.fixture
def run(tmp_path):
    """Quick settings on the CPU in float32, whatever the machine has."""
    folders = tmp_path / "data", tmp_path / "checkpoints"
    return utils.Settings("quick", *folders, None, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def full_data(tmp_path_factory):
    """A DATA_DIR with tiny files in the formats of the full data: idx, and image folders."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 120), ("t10k", 40)):
        images = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        raw = folder / "MNIST" / "raw"
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    for part, count in (("train", 10), ("test", 4)):
        for name in CIFAR_CLASSES:
            (folder / "cifar10" / part / name).mkdir(parents=True)
            for number in range(count):
                image = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                file = folder / "cifar10" / part / name / f"{number:04}.png"
                Image.fromarray(image).save(file)
    return folder


@pytest.fixture
def on_record():
    """The runs on record, where all records are as they were committed: not someone's own."""
    skip_unless_committed("figures/*.json", "benchmarks/*.json")
    return tables.records()
