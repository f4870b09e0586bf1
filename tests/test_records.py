"""A record holds what it must, a longer run is kept, and a quick run stays out of the way."""

import json
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import report
import settings
import utils
from conftest import FIELDS, ROOT


@pytest.fixture
def recorded(run, tmp_path, monkeypatch, classification):
    """One epoch of a small MNIST model, recorded under a ROOT of its own."""
    monkeypatch.setattr(settings, "ROOT", tmp_path)  # where figures/ is
    training, validation = utils.split(utils.load_mnist(run)[0])
    torch.manual_seed(0)
    model = classification.MnistCNN(2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = utils.Batches(training, 256, run, shuffle=True)
    validation = utils.Batches(validation, 256, run)
    schedule = utils.one_cycle(optimizer, batches, 1, 1e-3)
    history = utils.train(model, optimizer, batches, validation, 1, run, schedule)
    yield report.record_run(
        "mnist", run, model, optimizer, schedule, batches, validation, history, 12.5
    )
    plt.close("all")


def test_a_record_says_all_there_is_to_know(recorded):
    assert not [field for field in FIELDS if recorded.get(field) in (None, "", [])]
    assert recorded["official_test_accuracy"] == 12.5
    assert recorded["best_accuracy"] == recorded["history"][0]["validation_accuracy"]
    assert recorded["train_seconds"] == recorded["history"][0]["seconds"]
    assert recorded["source"] == "sample" and recorded["parameters"] > 0


def test_a_record_counts_all_epochs_and_tells_the_best_from_the_last(run, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2))
    images = torch.zeros(6, 3, 1, 1, dtype=torch.uint8)
    mine = utils.Dataset("mine", "own", images, torch.arange(6) % 2, ("a", "b"))
    batches = utils.Batches(mine, 2, run, seed=3)
    epochs = [(1, 2.0, 1.0, 50.0, 80.0, 0.5), (2, 3.0, 0.8, 60.0, 90.0, 0.25)]
    facts = dict(device="an abacus", torch="2.14", commit="c0ffee", date="2026-11-28")
    history = utils.History([*epochs, (3, 4.0, 0.7, 70.0, 85.0, 0.75)], facts)
    optimizer = torch.optim.AdamW(model.parameters())
    made = report.record_run("mine", run, model, optimizer, None, batches, batches, history, 7.0)
    assert (made["best_accuracy"], made["best_epoch"], made["final_accuracy"]) == (90, 2, 85)
    assert (made["train_seconds"], made["evaluation_seconds"]) == (9, 1.5)
    assert made["seed"] == 3
    assert made["epochs"] == 3 and made["flops"] == 3 * 6 * 6 * 6  # epochs, images, 3 x 2 weights
    plt.close("all")


def test_a_quick_run_writes_only_to_its_own_folder(recorded, tmp_path):
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    written = sorted(p.relative_to(tmp_path).as_posix() for p in files)
    assert written == ["figures/quick/mnist.png", "figures/quick/results.json"]
    assert json.loads((tmp_path / written[1]).read_text()) == [recorded]


def test_a_record_gives_way_only_to_as_many_epochs(recorded, tmp_path, capsys):
    folder = tmp_path / "figures"
    history = recorded["history"] * 3
    report.save_record({**recorded, "epochs": 3, "history": history, "seed": 1}, folder)
    report.save_record({**recorded, "epochs": 2, "seed": 2}, folder)
    assert "keeps its record of mnist, 3 epochs of MNIST (sample)" in capsys.readouterr().out
    assert report.load_records(folder)[0]["seed"] == 1
    report.save_record({**recorded, "epochs": 3, "history": history, "seed": 3}, folder)
    report.save_record({**recorded, "run": "cifar10", "source": "full"}, folder)
    report.save_record({**recorded, "run": "cifar10", "source": utils.NOT_PUBLISHED}, folder)
    report.save_record({**recorded, "run": "pictures", "epochs": 9, "dataset": "a"}, folder)
    report.save_record({**recorded, "run": "pictures", "dataset": "b", "seed": 4}, folder)
    assert "keeps its record of cifar10" in capsys.readouterr().out
    assert [(r["run"], r["seed"]) for r in report.load_records(folder)] == [
        ("cifar10", 0),
        ("mnist", 3),
        ("pictures", 4),  # shorter, but of other data
    ]


def test_a_full_record_and_one_of_more_seeds_do_not_give_way(recorded):
    full, seeds = {**recorded, "profile": "full"}, {**recorded, "seeds": [0, 1, 2]}
    short = {**recorded, "profile": "short"}
    assert not report.gives_way(full, short) and report.gives_way(short, full)
    assert not report.gives_way(seeds, full) and report.gives_way(full, seeds)
    assert report.gives_way(seeds, {**full, "epochs": 2})
    own = {**recorded, "source": "own", "epochs": 9}  # a folder that grows, and needs fewer epochs
    assert report.gives_way(own, {**own, "epochs": 5, "split": "99 training, 25 validation images"})
    assert not report.gives_way(own, {**own, "epochs": 5})
    fashion = {**recorded, "epochs": 9, "source": utils.NOT_PUBLISHED}
    assert report.gives_way(fashion, {**recorded, "source": "full"})  # MNIST by name only


def test_results_that_cannot_be_read_or_written_get_a_sentence(recorded, tmp_path, monkeypatch):
    file = tmp_path / "figures" / "quick" / "results.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(utils.UsageError, match="results.json cannot be read"):
        report.save_record(recorded, file.parent)
    file.unlink()
    with pytest.raises(
        utils.UsageError, match="The record of mnist, or its figure, cannot be written"
    ):
        report.save_record(recorded, tmp_path / "figures" / "quick" / "mnist.png")

    def full_disk(*arguments, **options):
        raise OSError("encoder error -2 when writing image file")  # Pillow's, without an errno

    monkeypatch.setattr(plt.Figure, "savefig", full_disk)
    with pytest.raises(utils.UsageError, match=r"quick \(encoder error -2"):
        report.save_record(recorded, file.parent)


def test_records_written_at_the_same_time_are_all_kept(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_history", lambda record: Mock())
    names = [f"run-{n}" for n in range(24)]
    with ThreadPoolExecutor(8) as threads:
        for name in names:
            threads.submit(report.save_record, {**recorded, "run": name}, tmp_path)
    assert [record["run"] for record in report.load_records(tmp_path)] == sorted(names)


def test_a_figure_is_drawn_from_its_record_alone(recorded):
    axes = report.draw_history(json.loads(json.dumps(recorded))).axes[0]
    caption = axes.get_xlabel()
    for fact in ("Run time", "Best score", "at epoch 1", "final score", "MNIST (sample)"):
        assert fact in caption
    assert "Write-up" not in caption  # a sample compares with nothing
    assert "seeds" not in caption
    seeds = report.draw_history({**recorded, "finals": [96.0, 97.5]}).axes[0].get_xlabel()
    assert "The last of 2 seeds; mean final score 96.75%." in seeds
    caption = report.draw_history({**recorded, "source": "full"}).axes[0].get_xlabel()
    assert "Write-up: 32 min for 100 epochs on a T4 GPU.\nBest score 93.76% at epoch 41" in caption


def test_the_curves_are_those_of_the_epochs():
    scores = [(1, 50, 40), (2, 60, 70), (3, 80, 65)]
    epochs = [utils.Epoch(n, 1, 1, seen, unseen, 1) for n, seen, unseen in scores]
    validation, training, best, old = report.draw_curves(epochs, "mnist", "full", 3).axes[0].lines
    assert validation.get_label().startswith("validation")
    assert list(validation.get_ydata()) == [40, 70, 65]
    assert training.get_label().startswith("training")
    assert list(training.get_ydata()) == [50, 60, 80]
    assert best.get_xydata().tolist() == [[2, 70]] and set(old.get_ydata()) == {93.7625}


@pytest.mark.parametrize("name", ["segmentation-4", "cifar10-94"])  # the longest of their kinds
@pytest.mark.parametrize("long", [False, True])
def test_no_caption_is_cut_off(name, long, on_record):
    record = on_record[name]
    if long:  # gone on with on other hardware
        device = "Intel(R) Core(TM) i7-8565U CPU @ 1.80GHz, 4 threads, then Tesla T4"
        record = {**record, "device": device}
    figure = report.draw_history(record)
    figure.canvas.draw()
    caption = figure.axes[0].xaxis.label.get_window_extent()
    assert caption.x0 >= 0 and caption.x1 <= figure.bbox.width


def test_the_summary_compares_full_runs_with_the_write_up(recorded):
    better = {**recorded, "source": "full", "final_accuracy": 99.725}
    assert report.summary([better]).splitlines()[1].split()[-2:] == ["93.72", "+6.00"]
    assert report.summary([recorded]).splitlines()[1].split()[-2:] == ["-", "-"]
    stopped = {**recorded, "epochs": 120, "planned_epochs": 400}
    assert " 120/400 " in report.summary([stopped])
    assert len(report.summary([]).splitlines()) == 1


def test_figures_are_drawn_again_from_the_results(recorded, tmp_path):
    folder = tmp_path / "figures" / "quick"
    before = (folder / "mnist.png").read_bytes()
    (folder / "mnist.png").unlink()
    report.redraw(folder)
    assert (folder / "mnist.png").read_bytes() == before


def test_the_faults_on_record_are_many_and_nothing_was_lost(on_record):
    counts = json.loads((ROOT / "figures" / "faults.json").read_text(encoding="utf-8"))
    assert counts["kills"] >= 50 and counts["inputs"] >= 2000
    assert counts["lost"] == counts["failed_tests"] == 0


def test_the_surest_mistakes_are_shown_with_both_names(monkeypatch):
    titles = []
    monkeypatch.setattr(report, "show_images", lambda images, names: titles.extend(names))
    images = torch.zeros(14, 1, 4, 4, dtype=torch.uint8)
    data = utils.Dataset("two", "own", images, torch.zeros(14).long(), ("a", "b"))
    report.show_mistakes(data, torch.tensor([0, 0] + [1] * 12), torch.arange(14) / 20)
    assert titles == [f"says b, {5 * n}.00%\nlabel a" for n in range(13, 3, -1)]


def test_pictures_of_odd_data_sets(shown):
    """No mistakes, a class with one example, one with none, 25 classes, what is ignored."""
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 2, 2, 3, utils.IGNORE])
    few = utils.Dataset("few", "own", images, labels, tuple("abcd"))
    report.show_classes(few)
    report.show_mistakes(few, labels.clamp(max=3), torch.ones(6))
    maps = torch.arange(5)[:, None, None].repeat(1, 8, 8) * 5 + torch.arange(8) % 5
    maps[0, 0, 0] = utils.IGNORE
    names = tuple(f"class {c}" for c in range(25))
    maps[4] = utils.IGNORE
    maps[2, :2], maps[2, 2] = 10, 11
    many = utils.Dataset("many", "own", images[:5], maps, names)
    report.show_scenes(many, {"label": maps}, count=3)
    assert len(shown) == 2
    under = [axes.get_xlabel() for axes in shown[-1].axes[-2:]]
    assert under == ["class 10, class 11", ""]


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_images_of_other_bands_are_shown_in_grey_or_in_the_first_three(bands, shown):
    images = torch.randint(0, 256, (3, bands, 8, 8), dtype=torch.uint8)
    maps = torch.arange(64).view(1, 8, 8).repeat(3, 1, 1) % 2
    report.show_scenes(utils.Dataset("bands", "own", images, maps, ("a", "b")), {"label": maps}, 1)
    picture = shown[-1].axes[0].images[0].get_array()
    first = images[0].permute(1, 2, 0).numpy() / 255
    expected = first[..., :3] if bands == 4 else first[..., :1].repeat(3, -1)
    np.testing.assert_array_equal(picture, expected)
    pictures = utils.Dataset("bands", "own", images, torch.arange(3) % 2, ("a", "b"))
    report.show_classes(pictures)
    np.testing.assert_array_equal(shown[-1].axes[0].images[0].get_array() / 255, expected)
