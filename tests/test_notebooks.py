"""The notebooks read as notebooks should, and grade as the README says."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from torch import nn

import recipes
import report
import utils
from conftest import NOTEBOOKS, ROOT, cell_with, train_giving


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_short_and_need_no_front_end(name):
    notebook = json.loads((ROOT / name).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert len(source.splitlines()) <= 40
            assert not any(line.lstrip().startswith(("%", "!")) for line in source.splitlines())
            assert cell["execution_count"] or not cell["outputs"]  # nbval asks for it
            for output in cell["outputs"]:
                assert output["output_type"] != "error"
                assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert all(len(line) <= 100 for line in source.splitlines())


TRAINED = """# what the threshold cells need of those before them
from types import SimpleNamespace

THRESHOLD, best_model, cifar = 70.0, "first", SimpleNamespace(name="photographs")
models = {name: SimpleNamespace(model=name) for name in ("first", "second")}
mnist_model, cifar_model, mnist_run, run = "mnist", "cifar", None, None
mnist_validation_batches, cifar_validation_batches, validation = "digits", "pictures", "scenes"
right = {("mnist", "digits"), ("cifar", "pictures"), ("first", "scenes")}
utils = SimpleNamespace(evaluate=lambda model, data, run: SCORE if (model, data) in right else 99)
"""


@pytest.mark.parametrize("score", [69.99, 70.0])
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_threshold_that_is_missed_fails_its_own_cell_and_no_other(name, score, tmp_path):
    """nbval's verdict as JUnit XML, on a notebook's threshold cells and two others."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    cells = [cell for cell in notebook.cells if "threshold" in cell.metadata.get("tags", [])]
    assert len(cells) == {"imageclassification.ipynb": 2, "imagesegmentation.ipynb": 1}[name]
    trained = nbformat.v4.new_code_cell(TRAINED.replace("SCORE", str(score)))
    notebook.cells = [trained, *cells, nbformat.v4.new_code_cell("assert THRESHOLD == 70")]
    nbformat.write(notebook, tmp_path / name)
    options = ["--nbval-lax", "--nbval-current-env", "--junit-xml=grades.xml"]
    command = [sys.executable, "-m", "pytest", *options, name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (score < 70), done.stdout
    cases = ElementTree.parse(tmp_path / "grades.xml").findall(".//testcase")
    failures = [case.find("failure") for case in cases]
    assert len(cases) == len(cells) + 2
    assert [failure is not None for failure in failures] == [
        False,
        *[score < 70] * len(cells),
        False,
    ]
    words = [" below 70.0%" in "".join(f.itertext()) for f in failures if f is not None]
    assert words == [True] * len(words)


@pytest.mark.parametrize("name, checked", list(zip(NOTEBOOKS, (8, 5), strict=True)))
def test_cells_whose_outputs_are_compared_have_some(name, checked):
    """nbval-lax looks at those of tagged cells alone: what grades an exercise's models."""
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "nbval-check-output" in c["metadata"].get("tags", [])]
    assert len(tagged) == checked and all(cell["outputs"] for cell in tagged)


@pytest.mark.parametrize("right", [True, False])
def test_a_model_of_other_layers_fails_where_its_shapes_are_compared(right, tmp_path):
    notebook = nbformat.read(ROOT / NOTEBOOKS[1], as_version=4)
    imports = nbformat.v4.new_code_cell("import torch\nfrom torch import nn")
    texts = "class ResBlock", "class Segmenter", "in Segmenter(first)"
    cells = [c for c in notebook.cells if any(t in c.source for t in texts) and "outputs" in c]
    notebook.cells = [imports, *cells]
    assert len(cells) == len(texts)
    if not right:
        assert "nn.MaxPool2d(2),\n" in cells[1].source
        cells[1].source = cells[1].source.replace("nn.MaxPool2d(2),\n", "\n", 1)
    nbformat.write(notebook, tmp_path / NOTEBOOKS[1])
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", NOTEBOOKS[1]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (not right), done.stdout
    assert ("1 failed, 3 passed" in done.stdout) is not right


@pytest.mark.parametrize("profile, scenes", [("full", 70), ("short", 70), ("quick", 60)])
def test_the_pass_marks_are_the_write_ups(profile, scenes):
    """Of all but the sample scenes, as the settings cells have them."""
    marks = []
    for name in NOTEBOOKS:
        run = utils.settings(environ={"PROFILE": profile})
        exec(cell_with(name, "THRESHOLD = run.threshold("), scope := dict(run=run, replace=replace))
        marks.append(scope["THRESHOLD"])
    assert marks == [70, scenes]


def epochs(profile):
    """The epochs of the write-up's six models, as the settings cells have them."""
    scope = dict(run=utils.settings(environ={"PROFILE": profile}), replace=replace)
    for name in NOTEBOOKS:
        exec(cell_with(name, "THRESHOLD = run.threshold("), scope)
    return {"mnist": scope["MNIST_EPOCHS"], "cifar10": scope["CIFAR_EPOCHS"], **scope["EPOCHS"]}


def test_a_full_run_has_the_write_ups_epochs():
    assert epochs("full") == {name: old["epochs"] for name, old in report.WRITE_UP.items()}


@pytest.mark.parametrize("name", report.WRITE_UP)
def test_a_run_on_record_has_the_epochs_of_its_profile(name, on_record):
    record = on_record[name]
    assert record["planned_epochs"] == epochs(record["profile"])[name]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_settings_cell_says_what_the_later_cells_do(name, run):
    """RESUME = False there starts all runs anew; MY_PICTURE is the variable's."""
    source = cell_with(name, "RESUME = run.resume")
    run = replace(run, my_picture=Path("mine.png"))
    for line, resume in (("RESUME = run.resume", True), ("RESUME = False", False)):
        scope = dict(run=run, replace=replace)
        exec(source.replace("RESUME = run.resume", line), scope)
        assert scope["run"].resume is scope["run"].digits.resume is resume
        assert scope.get("mnist_run", scope["run"]).resume is resume
        assert scope["MY_PICTURE"] == Path("mine.png")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_my_picture_is_what_the_best_model_labels(name):
    def model(which, score):
        if name == NOTEBOOKS[0]:
            return which, dict(final_accuracy=score)
        return SimpleNamespace(model=which, scores=SimpleNamespace(accuracy=score))

    labelled, scope = [], dict.fromkeys("cifar cifar_statistics scenes statistics run".split())
    models = {"first": model("worse", 70.0), "second": model("best", 80.0)}
    show = lambda model, picture, *_: labelled.append((model, picture))  # noqa: E731
    scope |= dict(models=models, report=SimpleNamespace(show_prediction=show))
    exec(cell_with(name, "picture = MY_PICTURE or"), scope | dict(MY_PICTURE="mine.png"))
    assert labelled == [("best", "mine.png")]


def test_the_best_of_the_five_is_the_one_that_is_graded():
    scores = {"segmentation-1": 60.0, "segmentation-3": 80.0, "segmentation-best": 70.0}
    models = {n: SimpleNamespace(scores=SimpleNamespace(accuracy=s)) for n, s in scores.items()}
    choice, *_ = cell_with(NOTEBOOKS[1], "best_model = ").splitlines()
    exec(choice, scope := dict(models=models))
    assert scope["best_model"] == "segmentation-3"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_model_that_was_stopped_goes_on_no_record(name, run, monkeypatch):
    """The best classifiers, and all models of pixels."""
    scope = dict(partial=partial, nn=nn, torch=torch, utils=utils, report=report, recipes=recipes)
    exec(cell_with(name, "def fit(name, make"), scope)
    history = utils.History([(1, 1, 1, 1, 1, 1)])
    history.stopped, history.planned = True, 2
    monkeypatch.setattr(utils, "train", train_giving(history))
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    data = utils.Dataset("toy", "sample", images, torch.arange(4) % 2, ("a", "b"))
    batches, make = utils.Batches(data, 2, run), partial(nn.Conv2d, 1, 2, 3, bias=False)
    scope |= dict(run=run, validation=batches, SEED=0, RATE=0.1, models={})
    more = [batches, batches, 2, run, (0,), False] if name == NOTEBOOKS[0] else [2]
    with pytest.raises(KeyboardInterrupt, match="first: stopped after 1 of 2 epochs"):
        scope["fit"]("first", make, batches, *more)
    assert not scope["models"]


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_a_first_model_that_was_stopped_stops_run_all(name, run, monkeypatch):
    """Before the official test; one that `patience` ended early goes on to it."""
    cell = cell_with(NOTEBOOKS[0], f"{name}_history = utils.train(")
    model = lambda *sizes: nn.Conv2d(1, 2, 3)  # noqa: E731
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    data = utils.Dataset("toy", "sample", images, torch.arange(4) % 2, ("a", "b"))
    batches = utils.Batches(data, 2, run)
    scope = dict(torch=torch, utils=utils, run=run, mnist_run=run, SEED=0, MnistCNN=model)
    scope |= dict(CifarResNet=model, cifar=data, CIFAR_RUN="cifar10")
    for kind in ("mnist", "cifar"):
        scope |= {f"{kind}_batches": batches, f"{kind}_validation_batches": batches}
        sizes = dict(WIDTH=1, PEAK=0.1, EPOCHS=2)
        scope |= {f"{kind.upper()}_{fact}": value for fact, value in sizes.items()}
    scope["cifar_epochs"], history = 2, utils.History([(1, 1, 1, 1, 1, 1)])
    history.planned = 2
    monkeypatch.setattr(utils, "train", train_giving(history))
    exec(cell, scope)
    history.stopped = True
    with pytest.raises(KeyboardInterrupt, match="stopped after 1 of 2 epochs"):
        exec(cell, scope)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_to_expect_is_what_the_readme_says(name, monkeypatch):
    table = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in table if line.startswith(f"| all of `{name}`"))
    quick, short, full = (cell.strip() for cell in row.split("|")[2:5])
    source, said = cell_with(name, "expected = run.pick("), {}
    for profile in ("quick", "short", "full"):
        run = utils.settings(environ={"PROFILE": profile})
        monkeypatch.setattr(utils, "settings", lambda run=run, **_: run)
        exec(source, scope := {})
        said[profile] = scope["expected"]
        monkeypatch.undo()
    assert said == dict(quick=quick, short=short, full=full)


def test_a_students_models_are_graded_in_the_authors_notebook(tmp_path, monkeypatch):
    """By the README's lines: of the student's cells only those with models count."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "theirs" in x]
    name = "imageclassification.ipynb"
    ours, theirs = (nbformat.read(ROOT / name, 4) for _ in range(2))
    for cell in theirs.cells:
        cell.source = f"# the student's\n{cell.source}"
    nbformat.write(ours, tmp_path / name)
    nbformat.write(theirs, tmp_path / "theirs.ipynb")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), {})
    found = nbformat.read(tmp_path / name, 4)
    assert len(found.cells) == len(ours.cells)
    for cell, our_cell, their_cell in zip(found.cells, ours.cells, theirs.cells, strict=True):
        model = "definition" in cell.metadata.get("tags", [])
        assert cell == dict(our_cell, source=their_cell.source) if model else cell == our_cell


def test_pytest_trains_anew_unless_a_folder_is_named(tmp_path, monkeypatch):
    """In a folder of its own, which is gone afterwards."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    code = "import os\ndef test():\n    folder = os.environ['CHECKPOINT_DIR']\n"
    code += "    os.makedirs(folder, exist_ok=True)\n    open('where', 'w').write(folder)\n"
    (tmp_path / "test_it.py").write_text(code)
    monkeypatch.delenv("CHECKPOINT_DIR", raising=False)
    for given in (None, tmp_path / "mine"):
        if given:
            monkeypatch.setenv("CHECKPOINT_DIR", str(given))
        subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, check=True)
        folder = Path((tmp_path / "where").read_text())
        assert folder == given if given else (tmp_path not in folder.parents)
        assert folder.exists() == bool(given) and folder != ROOT / "checkpoints"


def test_pytest_alone_passes_the_notebooks_by():
    command = [sys.executable, "-m", "pytest", "-m", "faults", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "test_checkpoints.py" in done.stdout, done.stderr
    assert ".ipynb" not in done.stdout
