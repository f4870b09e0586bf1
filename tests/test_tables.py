"""What the pages and the notebooks say in numbers is what runs left, and no run lacks a fact."""

import json
import re

import pytest

import report
import tables
import trials
from conftest import ROOT

NOTEBOOKS = ("imageclassification.ipynb", "imagesegmentation.ipynb")
MEASURED = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(%|(?= (?:s|min|seconds|minutes|PFLOP)\b))")
GIVEN = {  # percentages and times that no run of ours measured, and whose they are
    "70%": "the pass mark",
    "94%": "airbench94's name",
    "96%": "airbench96's name",
    "94.01%": "airbench94, by its own account",
    "0%": "a block that passes its input on",
    "50%": "a path that weighs as much as its skip; half",
    "20%": "the split",
    "90%": "of a scene's pixels, rounded",
}
REQUIRED = """run profile best_accuracy best_epoch final_accuracy official_test_accuracy
    train_seconds evaluation_seconds dataset source split model parameters multiply_adds flops
    epochs planned_epochs batch_size optimizer schedule augmentation precision seed device torch
    commit date history""".split()


def values(tree, key=""):
    """Every number of a JSON tree but those of single epochs."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            if name != "history":
                yield from values(branch, name)
    elif isinstance(tree, list):
        for branch in tree:
            yield from values(branch, key)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield tree
        if "seconds" in key:
            yield tree / 60
        if key == "flops":
            yield tree / 1e15


def measured() -> list[float]:
    found = []
    for file in [*(ROOT / "figures").glob("*.json"), *(ROOT / "benchmarks").glob("*.json")]:
        found += values(json.loads(file.read_text(encoding="utf-8")))
    return found


def prose() -> dict[str, str]:
    """Pages without their generated blocks and code, and the notebooks' Markdown."""
    texts = {}
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
        texts[page] = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
        texts[name] = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    return texts


def strangers(text: str, known: list[float]) -> list[str]:
    """The percentages and times of a text that are no number of ours, rounded as it rounds."""
    odd = []
    for number, unit in MEASURED.findall(text):
        half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
        value = float(number.replace(",", ""))
        if number + unit not in GIVEN and not any(abs(value - one) <= half for one in known):
            odd.append(number + unit)
    return odd


def test_a_number_that_no_run_gave_is_found():
    known = [83.779, 1332.4, 22.2]
    assert strangers("83.78% after 1,332 s, or 22 minutes; 70% is asked", known) == []
    assert strangers("83.79% after 1,333 s, 7 minutes", known) == ["83.79%", "1,333", "7"]


@pytest.mark.parametrize("page", [*tables.PAGES, *NOTEBOOKS])
def test_numbers_in_prose_are_those_of_runs(page):
    assert strangers(prose()[page], measured()) == []


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(r"<!-- \w+ -->\n(.|\n)+?<!-- /\w+ -->", text)
    assert tables.fill(text) == text, "run `python tables.py`"


def test_a_changed_number_in_a_table_is_found():
    text = "before\n<!-- faults -->\n12 processes\n<!-- /faults -->\nafter"
    filled = tables.fill(text)
    assert filled.startswith("before\n<!-- faults -->\nOn an ") and filled.endswith("-->\nafter")
    assert tables.fill(filled) == filled != tables.fill(filled.replace(" ", "  ")) + " "


def test_every_run_is_on_record_with_all_its_facts():
    found = tables.records()
    assert list(found) == list(tables.WHAT)
    for name, record in found.items():
        missing = [key for key in REQUIRED if record.get(key) is None]
        assert not missing, f"{name} lacks {missing}"
        assert record["source"] not in ("sample", "own")
        assert len(record["history"]) == record["epochs"] >= 1
        scores = [epoch["validation_accuracy"] for epoch in record["history"]]
        assert record["best_accuracy"] == max(scores) == scores[record["best_epoch"] - 1]
        assert record["final_accuracy"] == scores[-1]
        seconds = sum(epoch["seconds"] for epoch in record["history"])
        assert record["train_seconds"] == pytest.approx(seconds)
        assert "dirty" not in record["commit"] and record["commit"] != "unknown"
        assert (ROOT / "figures" / f"{name}.png").exists()


def test_the_notebooks_show_the_runs_on_record():
    """The committed outputs are those of the records: the summaries' lines are in them."""
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
        shown = "".join(
            "".join(output.get("text", "")) for c in cells for output in c.get("outputs", ())
        )
        seg = name == "imagesegmentation.ipynb"
        chosen = [r for r in tables.records().values() if r["run"].startswith("seg") == seg]
        assert chosen
        for line in report.summary(chosen).splitlines()[1:]:
            assert line in shown, f"{name} was not executed with the runs on record: {line}"


def test_trials_have_several_seeds():
    rows = trials.load(ROOT / "figures")
    assert {row["question"] for row in rows} == set(tables.QUESTIONS)
    assert all(len(row["seeds"]) >= 3 and row["source"] != "sample" for row in rows)
