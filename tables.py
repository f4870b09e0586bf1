"""The tables of README.md and RESULTS.md, made of the JSON files that runs left.

`python tables.py` draws figures/ again from its results.json, takes the README's picture from the
committed notebook, and rewrites every table that stands between `<!-- name -->` and
`<!-- /name -->`. Nothing is trained, and no number is written by hand.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable

import matplotlib

import report
import trials
from benchmarks import best, speed, steps
from settings import ROOT

PAGES = ("README.md", "RESULTS.md")
FIGURES, BENCHMARKS = ROOT / "figures", ROOT / "benchmarks"
RUNGS = [name for name in report.WRITE_UP if name.startswith("segmentation")]
LADDERS = (  # what the rungs were trained with, and the file of benchmarks/; None: the records
    ("AdamW, one cycle", "ladder_adamw.json"),
    ("Muon, in earlier code", "ladder_before.json"),
    ("Muon", "ladder_three.json"),
    ("Muon, paths that start at zero", "ladder_zero.json"),
    ("Muon", "ladder_six.json"),
    ("Muon (on record)", None),
)
WHAT = {  # each run's model, in words
    "mnist": "four convolutions",
    "cifar10": "four convolutions with ResBlocks between",
    "segmentation-1": "the same for pixels",
    "segmentation-2": "one step larger",
    "segmentation-3": "two steps larger",
    "segmentation-4": "three steps larger",
    "mnist-best": "five convolutions, Muon, warped digits",
    "cifar10-94": "`FastNet`: whitening, Muon, growing images",
    "cifar10-96": "the same, with longer paths and more channels",
    "segmentation-best": "`SkipNet`: an encoder and decoder, Muon, the Dice loss, new scenes",
}


def records() -> dict[str, dict]:
    """The full records by run, in the order of WHAT."""
    found = {record["run"]: record for record in report.load_records(FIGURES)}
    return {name: found[name] for name in WHAT if name in found}


def of_planned(record: dict) -> str:
    """The epochs of a record, and of how many where it was ended early."""
    planned = record["planned_epochs"]
    return f"{record['epochs']}" + (f" of {planned}" if planned != record["epochs"] else "")


def percent(record: dict, several: str, single: str = "") -> str:
    """A record's score, or the mean of those of several seeds and their standard deviation."""
    return best.mean_of(record[several] if several in record else [record[single]], 2) + "%"


def runs() -> str:
    """The write-up's six models and the best ones, each with both scores."""
    rows, found = [], records()
    for name, what in WHAT.items():
        record, old = found.get(name), report.WRITE_UP.get(name)
        theirs = f"{old['final']:.2f}% after {old['epochs']} epochs" if old else "-"
        ours = ["not measured"] * 2 + ["-"]
        if record:
            ours = [percent(record, "finals", "final_accuracy")]
            ours.append(percent(record, "tests", "official_test_accuracy"))
            ours.append(f"{of_planned(record)}, {report.duration(record['train_seconds'])}")
        rows.append([f"`{name}`", what, theirs, *ours])
    head = "run | model | the write-up's final score | ours | official test | epochs, training"
    return report.markdown_table(head, rows, left=3)


def results() -> str:
    """Every record, with what it cost."""
    rows = []
    for name, record in records().items():
        seeds = len(record.get("seeds", [record["seed"]]))
        test = percent(record, "tests", "official_test_accuracy")
        epoch = record["train_seconds"] / record["epochs"]
        if "tests_with_views" in record:
            test += f"; in views {percent(record, 'tests_with_views')}"
        if "mean_iou" in record:
            test += f", mean IoU {record['mean_iou']:.2f}%"
        rows.append(
            [
                f"`{name}`",
                f"{record['best_accuracy']:.2f}% at {record['best_epoch']}",
                percent(record, "finals", "final_accuracy"),
                test,
                of_planned(record),
                f"{seeds}",
                report.duration(record["train_seconds"]),
                f"{epoch:.{0 if epoch >= 10 else 2}f} s",
                f"{record['parameters'] / 1e6:.2f} M",
                f"{record['flops'] / 1e15:.2g}",
            ]
        )
    head = "run | best, epoch | final | official test | epochs | seeds | training"
    return report.markdown_table(f"{head} | an epoch | parameters | PFLOP", rows)


def pixels() -> str:
    """The test scores of the models of pixels, digits and backgrounds apart, and baselines."""
    found = [r for r in records().values() if "majority" in r]
    if not found:
        return "not measured"
    rows = [["the commonest class everywhere", f"{found[0]['majority']:.2f}%", *"---"]]
    share = found[0]["backgrounds"]["share"]
    rows += [["every background right, no digit found", f"{share:.2f}%", "-", "0%, 0%", "-"]]
    for r in found:
        kinds = [f"{r[k]['accuracy']:.2f}%, {r[k]['mean_iou']:.2f}%" for k in report.KINDS]
        score = f"{r['official_test_accuracy']:.2f}%"
        rows += [[f"`{r['run']}`", score, f"{r['mean_iou']:.2f}%", *kinds]]
    head = "digits right, their mean IoU | backgrounds right, their mean IoU"
    return report.markdown_table(f"model | pixels | mean IoU | {head}", rows)


def ladder() -> str:
    """Every run of the four rungs at full width: the shares of validation and of test pixels."""
    rows = []
    for words, file in LADDERS:
        found = records().values()
        if file:
            found = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
        rungs = {r["run"]: r for r in found if r["run"] in RUNGS}
        where = dict.fromkeys(f"{r['device']}, {r['precision']}" for r in rungs.values())
        epochs = [f"{r['epochs']}" for r in rungs.values()]
        epochs = epochs[:1] if len(set(epochs)) == 1 else epochs
        scores = {
            name: f"{r['final_accuracy']:.2f}%, {r['official_test_accuracy']:.2f}%"
            for name, r in rungs.items()
        }
        cells = [scores.get(name, "not measured") for name in RUNGS]
        rows.append([words, "; ".join(where), ", ".join(epochs), *cells])
    head = "trained with | on | epochs | first | second | third | fourth"
    return report.markdown_table(head, rows, left=2)


def machines() -> str:
    """What the records were made on: each machine and version, and under it its runs by commit."""
    made = {}
    for name, r in records().items():
        where = f"{r['device']}, {r['precision']}, torch {r['torch']}, `PROFILE={r['profile']}`"
        data = f"{r['dataset']} ({r['source']}), commit `{r['commit']}`, {r['date'][:10]}"
        made.setdefault(where, {}).setdefault(data, []).append(f"`{name}`")
    lines = []
    for where, made_there in made.items():
        lines += [
            f"- {where}",
            *(f"  - {', '.join(names)}: {data}" for data, names in made_there.items()),
        ]
    return "\n".join(lines)


def questions() -> str:
    """The trials on the full data, a table a question."""
    parts = []
    for question, words in trials.QUESTIONS.items():
        rows = [row for row in trials.load(FIGURES) if row["question"] == question]
        table = "not measured"
        if rows:
            made = dict.fromkeys(row["commit"] for row in rows)
            table = f"{trials.table(rows)}\ncommit {', '.join(made)}, {rows[0]['date'][:10]}"
        parts.append(f"{words}\n\n```\n{table}\n```")
    return "\n\n".join(parts)


def best_models() -> str:
    """The best models on all training images, beside their peer."""
    return best.table(json.loads((BENCHMARKS / "best.json").read_text(encoding="utf-8")))


def speed_ups() -> str:
    """How many times as fast as the write-up's recipe."""
    return speed.brief(json.loads((BENCHMARKS / "speed.json").read_text(encoding="utf-8"))["rows"])


def gpu() -> str:
    """What a training step takes on a GPU."""
    facts = json.loads((BENCHMARKS / "steps.json").read_text(encoding="utf-8"))
    made = f"{facts['hardware']}, {facts['precision']}, torch {facts['torch']}"
    return f"{steps.table(facts['rows'])}\n\n({made}, commit `{facts['commit']}`)"


def faults() -> str:
    """What the last run of `pytest -m faults` came to."""
    counts = json.loads((FIGURES / "faults.json").read_text(encoding="utf-8"))
    failed = f", {counts['failed_tests']} tests failed" if counts["failed_tests"] else ""
    return (
        f"Last result: {counts['kills']:,} processes killed at random and chosen moments and "
        f"resumed,\n{counts['inputs']:,} damaged files given to the readers, {counts['faults']:,} "
        f"other faults; {counts['lost']} lost{failed}\n"
        f"({counts['machine']}, commit `{counts['commit']}`, {counts['date'][:10]})."
    )


def scenes() -> bytes:
    """A PNG: scenes, truth and the best model's labels, as the committed notebook shows them."""
    cells = json.loads((ROOT / "imagesegmentation.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = next(cell for cell in cells if '"SkipNet": predictions' in "".join(cell["source"]))
    return base64.b64decode(shown["outputs"][-1]["data"]["image/png"])


BLOCKS: dict[str, Callable[[], str]] = {
    "runs": runs,
    "results": results,
    "pixels": pixels,
    "ladder": ladder,
    "machines": machines,
    "questions": questions,
    "best": best_models,
    "speed": speed_ups,
    "gpu": gpu,
    "faults": faults,
}


def fill(text: str) -> str:
    """A page with every block as it is now."""

    def block(found: re.Match) -> str:
        return f"<!-- {found[1]} -->\n{BLOCKS[found[1]]()}\n<!-- /{found[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def main() -> None:
    matplotlib.use("agg")
    report.redraw(FIGURES)
    (FIGURES / "scenes.png").write_bytes(scenes())
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(fill(text), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
