"""What the pages and the notebooks say in numbers is what runs left, and no run lacks a fact."""

import json
import re
import shutil
import statistics
import subprocess
from functools import partial

import pytest

import report
import tables
import trials
from conftest import FIELDS, NOTEBOOKS, ROOT, skip_unless_committed

MEASURED = re.compile(
    r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(%|\s(?:s|seconds)\b|\s(?:min|minutes?)\b|\sPFLOP)"
)
GIVEN = {  # percentages that no run of ours measured, and what they are
    "70%": "the pass mark",
    "94%": "airbench94's name",
    "96%": "airbench96's name",
    "94.01%": "airbench94, by its own account",
    "20%": "of the training set: the validation set",
    "75%": "an aim: pixels, in 45 minutes on two cores",
    "93.7625%": "the write-up's best score of MNIST, in all its digits",
    "93.725%": "its final score of MNIST, in all its digits",
    "76.5225%": "its final score of CIFAR-10",
    "99.4%": "an aim: MNIST, in five minutes on two cores",
}

SEVERAL = ("finals", "tests", "tests_with_views")  # one for each seed
PERCENT = "accuracy iou majority mean spread share efficiency without_views".split()


def values(tree, key="", metric=""):
    """(unit, value) of every percentage and time of a JSON tree, but not of single epochs."""
    if isinstance(tree, dict):
        metric = str(tree.get("metric", ""))  # the benchmark's rows say what a and b are
        for name, branch in tree.items():
            if name != "history":
                yield from values(branch, name, metric)
    elif isinstance(tree, list):
        if key in SEVERAL and len(tree) > 1:
            yield from (("%", statistics.mean(tree)), ("%", statistics.stdev(tree)))
        for branch in tree:
            yield from values(branch, key, metric)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        words = key.split("_")
        if key in ("a", "b"):  # of a benchmark's row, whose metric ends with its unit
            words = {"%": ["accuracy"], "s": ["seconds"]}.get(metric.rpartition(", ")[2], [])
        if key in (*PERCENT, *SEVERAL) or {"accuracy", "iou"} & set(words):
            yield "%", tree
        if "seconds" in words:
            yield from (("s", tree), ("min", tree / 60))
        if key == "flops":
            yield "PFLOP", tree / 1e15


def measured() -> list[tuple[str, float]]:
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


def strangers(text: str, known: list[tuple[str, float]]) -> list[str]:
    """The percentages and times of a text that are no number of ours, rounded as it rounds."""
    odd, text = [], re.sub(r"([\d.]+)\s±\s([\d.]+)(%|\ss\b)", r"\1\3 \2\3", text)
    for number, unit in MEASURED.findall(text):
        short = {"seconds": "s", "minute": "min", "minutes": "min"}.get(unit.strip(), unit.strip())
        half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
        value = float(number.replace(",", ""))
        near = any(abs(value - one) <= half for kind, one in known if kind == short)
        if number + unit not in GIVEN and not near:
            odd.append(number + unit)
    return odd


@pytest.fixture
def as_executed(on_record):
    """The same, where the notebooks have the outputs that are committed, too."""
    skip_unless_committed(*NOTEBOOKS)
    return on_record


def test_a_number_that_no_run_gave_is_found():
    row = dict(mean_iou=83.779, train_seconds=1332.4, flops=2.9e14, epochs=7, seed=99)
    rows = [dict(metric=f"speed, {unit}", a=a) for unit, a in (("%", 31.0), ("s", 17), ("MB", 44))]
    known = list(values([row, *rows, dict(history=[dict(accuracy=55.0)])]))
    right = "83.78% after 1,332 s, or 22\nminutes; 0.29 PFLOP; 31%; 17 s; 70% is asked"
    assert strangers(right, known) == []
    wrong = "83.79% after 1,333 s, 7 minutes, 99%, 44%, 44 s, 31 s, 55%, 12.34 ± 83.78%"
    odd = ["83.79%", "1,333 s", "7 minutes", "99%", "44%", "44 s", "31 s", "55%", "12.34%"]
    assert strangers(wrong, known) == odd


@pytest.mark.parametrize("page", [*tables.PAGES, *NOTEBOOKS])
def test_numbers_in_prose_are_those_of_runs(page, on_record):
    assert strangers(prose()[page], measured()) == []


@pytest.mark.parametrize("page", tables.PAGES)
def test_commits_in_prose_exist(page, on_record):
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    if git(["git", "rev-parse", "--is-shallow-repository"]).stdout.strip() != "false":
        pytest.skip("a shallow clone lacks them")
    text = (ROOT / page).read_text(encoding="utf-8")
    for commit in re.findall(r"`([0-9a-f]{7,12})`", text):
        assert git(["git", "cat-file", "-e", commit]).returncode == 0, commit


def ratios_on_amx(name):
    """The lowest and the highest of the models' ratios of training speed."""
    rows = json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))["rows"]
    ratios = [row["ratio"] for row in rows if row["metric"].startswith("training,")]
    return f"{min(ratios):.3g} to {max(ratios):.3g}"


def test_the_readme_gives_the_ratios_of_the_speed_benchmark(on_record):
    rows = json.loads((ROOT / "benchmarks" / "speed.json").read_text(encoding="utf-8"))["rows"]
    ratio = {(row["model"], row["metric"]): row["ratio"] for row in rows}
    training = {model: r for (model, metric), r in ratio.items() if metric.startswith("training,")}
    rungs = [f"{r:.3g}" for model, r in training.items() if model.startswith("seg")]
    moved = [f"{r:.0f}" for (_, metric), r in ratio.items() if "flipped and moved" in metric]
    sooner = (1 / ratio[name, f"time to {report.WRITE_UP[name]['best']:.2f}% of the 20% split, s"]
              for name in ("mnist", "cifar10"))  # fmt: skip
    said = (
        f"B trains {training['mnist']:.3g} (mnist), {training['cifar10']:.3g} (cifar10) and "
        f"{min(rungs)} to {max(rungs)} (segmentation) times as fast as A",
        f"flipped and moved, is {min(moved)} to {max(moved)} times as fast",
        "write-up's best scores {:.3g} (mnist) and {:.3g} (cifar10) times sooner".format(*sooner),
    )
    said += (f"A's speed in bfloat16, {ratios_on_amx('speed_amx_float32.json')} in float32",)
    said += (f"had {ratios_on_amx('speed_amx.json')} times A's speed in bfloat16",)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [sentence for sentence in said if sentence not in readme] == []


def test_the_readme_says_how_much_slower_a_cpu_without_amx_was(on_record):
    def read(name):
        return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))

    rows = read("speed_noamx.json")["rows"]
    rates = {row["model"]: row["b"] for row in rows if row["metric"].startswith("training,")}
    slower = {}
    for name in ("mnist", "cifar10"):
        images = int(on_record[name]["split"].split()[0])
        epoch = on_record[name]["train_seconds"] / on_record[name]["epochs"]
        slower[name] = f"{images / rates[name] / epoch:.2g} ({name})"
    said = f"speed, {slower['mnist']} and {slower['cifar10']} times as long as on record"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert said in readme and "the four rungs took ten and a half hours" in readme
    rungs = [one["train_seconds"] + one["evaluation_seconds"] for one in read("ladder_six.json")]
    assert len(rungs) == 4 and round(2 * sum(rungs) / 3600) == 21


HEADINGS = {  # what stands before the final score of each run
    "segmentation-1": "### First: ",
    "segmentation-2": "### Second: ",
    "segmentation-3": "### Third: ",
    "segmentation-4": "### Fourth: ",
    "segmentation-best": "### The best on record, ",
    "mnist-best": "### The best on digits, ",
    "cifar10-94": "### Fast: ",
}


@pytest.mark.parametrize("run", HEADINGS)
def test_a_heading_gives_its_own_runs_score(run, on_record):
    said = re.findall(re.escape(HEADINGS[run]) + r"([\d.]+%)", "\n".join(prose().values()))
    scores = on_record[run].get("finals", [on_record[run]["final_accuracy"]])
    assert said == [f"{statistics.mean(scores):.2f}%"]


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_results(page, on_record):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run `python tables.py`"


@pytest.mark.parametrize("page", tables.PAGES)
def test_no_table_was_wrapped(page):
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        assert "| --- |" not in line or re.fullmatch(r" *\|( -+:? \|)+", line), line


def test_every_table_has_its_place():
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in tables.PAGES)
    for mark in (r"<!-- (\w+) -->\n", r"\n<!-- /(\w+) -->"):
        assert sorted(re.findall(mark, text)) == sorted(tables.BLOCKS)


def test_the_pages_show_what_is_there(as_executed):
    assert (ROOT / "figures" / "scenes.png").read_bytes() == tables.scenes()
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        shown = re.findall(r"""["(](figures/[\w-]+\.png)""", text)
        assert shown and all((ROOT / file).exists() for file in shown)
    curves = {f"figures/{name}.png" for name in tables.WHAT}
    assert set(shown) == curves, "of RESULTS.md"


def test_all_that_is_derived_can_be_made_again(as_executed, tmp_path, monkeypatch):
    for folder in ("figures", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.p*"))
        monkeypatch.setattr(tables, folder.upper(), tmp_path / folder)
    for name in (*tables.PAGES, "imagesegmentation.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.main()
    for page in tables.PAGES:
        assert (tmp_path / page).read_bytes() == (ROOT / page).read_bytes()
    made = {file.name for file in (tmp_path / "figures").glob("*.png")}
    assert made == {file.name for file in (ROOT / "figures").glob("*.png")}


def test_a_changed_number_in_a_table_is_found():
    filled = tables.fill("before\n<!-- faults -->\n<!-- /faults -->\nafter")
    assert filled.startswith("before\n<!-- faults -->\n") and filled.endswith("-->\nafter")
    changed = re.sub(r"\d+ processes", "1 processes", filled)
    assert changed != filled == tables.fill(changed)


def test_every_run_is_on_record_with_all_its_facts(on_record):
    assert list(on_record) == list(tables.WHAT)
    for name, record in on_record.items():
        missing = [key for key in FIELDS if record.get(key) is None]
        assert not missing, f"{name} lacks {missing}"
        assert record["source"] not in ("sample", "own")
        assert len(record["history"]) == record["epochs"] >= 1
        scores = [epoch["validation_accuracy"] for epoch in record["history"]]
        assert record["best_accuracy"] == max(scores) == scores[record["best_epoch"] - 1]
        assert record["final_accuracy"] == scores[-1]
        seconds = sum(epoch["seconds"] for epoch in record["history"])
        assert record["train_seconds"] == pytest.approx(seconds)
        assert re.fullmatch("[0-9a-f]{12}(, then [0-9a-f]{12})*", record["commit"])
        assert (ROOT / "figures" / f"{name}.png").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebooks_show_the_runs_on_record(name, as_executed):
    """The committed outputs have the lines of the summaries and of the questions' tables."""
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    segmentation = name == "imagesegmentation.ipynb"
    chosen = [r for r in as_executed.values() if r["run"].startswith("seg") == segmentation]
    lines = report.summary(chosen).splitlines()[1:]
    for row in trials.load(ROOT / "figures"):
        if (row["mean_iou"] is not None) == segmentation:
            lines += trials.table([row]).splitlines()[1:]
    assert chosen and len(lines) > len(chosen)
    for line in lines:
        assert " ".join(line.split()) in " ".join(shown.split()), f"not shown in {name}: {line}"


def test_the_write_ups_epochs_would_take_what_the_readme_says(on_record):
    readme, hours = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    for name, old in report.WRITE_UP.items():
        record, kind = on_record[name], name.startswith("seg")
        seconds = (record["train_seconds"] + record["evaluation_seconds"]) / record["epochs"]
        hours[kind] = hours.get(kind, 0) + old["epochs"] * seconds / 3600
    for kind in (False, True):
        assert f"| {hours[kind]:.0f} hours for the write-up's models |" in readme


HOURS = "no one two three four five six seven eight nine ten".split()


def test_the_short_profile_took_what_the_readme_says(on_record):
    """To the half hour, training and scoring of every seed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in NOTEBOOKS:
        hours, segmentation = 0, name == "imagesegmentation.ipynb"
        for record in on_record.values():
            if record["run"].startswith("seg") == segmentation:
                seconds = record["train_seconds"] + record["evaluation_seconds"]
                hours += len(record.get("seeds", [0])) * seconds / 3600
        halves = round(2 * hours)
        took = HOURS[halves // 2] + (" and a half" if halves % 2 else "")
        assert re.search(rf"all of `{name}` \| \w+ minutes \| {took} hours \|", readme), took


def test_trials_have_several_seeds(on_record):
    rows = trials.load(ROOT / "figures")
    assert {row["question"] for row in rows} == set(trials.QUESTIONS)
    assert all(len(row["seeds"]) >= 3 and row["source"] != "sample" for row in rows)
