"""The benchmarks run, and what they left is of full runs. No timing."""

import dataclasses
import inspect
import json
import re
import sys
import types

import pytest
import torch

import report
import tables
import utils
from benchmarks import best, scaling, speed, steps
from conftest import ROOT, train_giving


def small_tasks(run):
    """Every model of the benchmark, on few images and at width 2."""
    few = torch.arange(0, 300, 10)
    for task in speed.tasks(run, width=2).values():
        parts = dict(training=task.training.subset(few), validation=task.validation.subset(few))
        yield dataclasses.replace(task, batch_size=10, **parts)


def test_both_sides_are_measured_for_every_model(run, monkeypatch):
    monkeypatch.setattr(speed, "STEPS", {})  # four steps each
    for task in small_tasks(run):
        rows = speed.throughput(task, run, rounds=1)
        metrics = [row["metric"].split(",")[0] for row in rows]
        assert metrics[:3] == ["training", "evaluation", "input alone"]
        assert {row["model"] for row in rows} == {task.name}
        for row in rows:
            assert row["a"] >= 0 and row["b"] >= 0 and row["rounds"] == 1


def test_a_row_says_how_many_times_as_fast_b_is(run, monkeypatch):
    task = next(small_tasks(run))
    row = speed.compare(task, "training", [1.0, 2.0, 4.0], [2.0, 6.0, 4.0], "images/s")
    assert (row["a"], row["b"]) == (2, 4)
    assert (row["ratio"], row["lowest"], row["highest"]) == (2, 1, 3)
    monkeypatch.setattr(speed, "STEPS", {})  # four steps of ten images
    monkeypatch.setattr(speed, "peak_memory", lambda work, run: None)
    monkeypatch.setattr(speed.Plain, "train", lambda self: 4.0)
    monkeypatch.setattr(speed.Ours, "train", lambda self: 1.0)
    monkeypatch.setattr(speed, "seconds", lambda work, run: 2.0)
    drained = []
    monkeypatch.setattr(speed, "drain", drained.append)
    rows = speed.throughput(task, run, rounds=1)
    ours = [batches.flip if isinstance(batches, utils.Batches) else None for batches in drained]
    theirs = [bool(getattr(batches.dataset, "moves", None)) for batches in drained]
    assert ours == [None, None, False, True] * 2  # a round to warm up, and one
    assert theirs == [False, True, False, False] * 2
    assert rows[0]["ratio"] == 4
    # images/s of training and of evaluation, of 40; of input, four batches and three of ten (twice:
    # neither moved, and moved); then the share of a step that input takes, in %
    expected = [(10, 40), (20, 20), (20, 15), (20, 15), (50, 800 / 3)]
    for row, sides in zip(rows, expected, strict=True):
        assert (row["a"], row["b"]) == pytest.approx(sides)


def test_time_to_score_counts_the_epochs_up_to_the_score(run, monkeypatch):
    task = next(small_tasks(run))
    seconds, scores = iter([10.0, 10.0, 10.0]), iter([20.0, 55.0, 80.0])
    monkeypatch.setattr(speed.Plain, "train", lambda self: next(seconds))
    monkeypatch.setattr(speed.Plain, "test", lambda self: next(scores))
    epochs = [utils.Epoch(n, 2.0, 1.0, 50.0, 30.0 * n, 0.1) for n in (1, 2, 3)]
    monkeypatch.setattr(speed.Ours, "fit", lambda self, count, validation: epochs[:count])
    goals = {50.0: (task, 2), 75.0: (task, 3), 99.0: (task, 3)}
    rows = speed.time_to_score(task, goals, run, budget=25)
    assert [(row["a"], row["b"], row["ratio"]) for row in rows] == [
        (20.0, 4.0, 0.2),
        (30.0, 6.0, 0.2),
        (None, None, None),
    ]


def test_the_ladder_is_trained_with_muon_and_the_fast_net_as_in_its_table(run, monkeypatch):
    tasks, seen = {task.name: task for task in small_tasks(run)}, []
    tasks["fast"] = speed.fast_net(tasks["cifar10"], run, 2)
    monkeypatch.setattr(utils, "train", train_giving(utils.History([[1] * 6]), seen))
    for name in ("cifar10", "segmentation-1", "fast"):
        speed.Ours(tasks[name], tasks[name].training, tasks[name].validation, run).fit(2, [])
    kinds = [(type(x["optimizer"]).__name__, type(x["schedule"]).__name__) for x in seen]
    assert kinds == [("AdamW", "OneCycleLR"), ("Muon", "LinearLR"), ("Muon", "LinearLR")]
    fast = seen[2]
    assert fast["batches"].sizes == (24, 32) and fast["batches"].flip and fast["batches"].shift == 2
    assert fast["loss_function"].keywords == dict(label_smoothing=0.1)
    assert report.parameters(fast["model"]) == 146_442  # as in its table


def test_both_sides_see_the_same_images(run):
    """Without moves, A's images are B's but for the rounding of float32."""
    task = next(small_tasks(run))
    plain = speed.PlainData(task.training, task.training.statistics())
    ours = utils.Batches(task.training, len(task.training), run)
    images, labels = next(iter(ours))
    for index, (image, label) in enumerate(plain):
        torch.testing.assert_close(images[index], image, atol=1e-5, rtol=1e-5)
        assert labels[index] == label
        if index == len(plain) - 1:
            break


def test_the_plain_side_moves_a_label_map_with_its_image():
    """A pixel's number is its label: at the same place after any move, or fill."""
    numbers = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8)
    names = tuple(map(str, range(65)))
    data = utils.Dataset("numbers", "sample", numbers[:, None].repeat(1, 3, 1, 1), numbers, names)
    plain, seen = speed.PlainData(data, ([0.0] * 3, [1 / 255] * 3), moved=True), set()
    torch.manual_seed(0)
    for _ in range(20):
        image, labels = plain[0]
        assert torch.equal(image[0].round().long(), labels.long())
        seen.add(tuple(labels.flatten().tolist()))
    assert len(seen) > 5


def test_the_results_say_where_the_last_full_run_was_made(on_record):
    saved = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    made = saved["machine"]
    where = f"{made['hardware']}, torch {made['torch']}, {' and '.join(made['data'][:2])}"
    page = " ".join((ROOT / "RESULTS.md").read_text(encoding="utf-8").split())
    assert f"{where}, {made['date'][:10]}" in page


@pytest.mark.parametrize("name", ["mnist", "cifar10", "segmentation-4"])
def test_the_saved_run_is_a_full_one(name, on_record):
    saved = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    rows = [row for row in saved["rows"] if row["model"] == name and "b_is" not in row]
    assert len(rows) >= 5 and all(row["rounds"] >= 5 or "memory" in row["metric"] for row in rows)


@pytest.mark.parametrize("file", ["best.json", "best_epyc.json"])
def test_the_best_models_were_measured_on_one_machine(file, on_record):
    rows = json.loads((ROOT / "benchmarks" / file).read_text(encoding="utf-8"))
    assert len({(row["hardware"], row["torch"]) for row in rows}) == 1


def test_several_runs_of_a_best_model_are_one_line():
    row = dict(images=50_000, epochs=8, flops=2.9e14)
    scores = [("a", 90.0, 100.0), ("b", 89.0, 90.0), ("a", 91.0, 110.0)]
    rows = [dict(row, model=m, test_accuracy=s, train_seconds=t) for m, s, t in scores]
    _, _, a, b = best.table(rows).splitlines()
    assert a == "| a | 50,000 | 8 | 2 | 105 ± 7 s | 0.29 | 90.50 ± 0.71% |"
    assert b == "| b | 50,000 | 8 | 1 | 90.00 s | 0.29 | 89.00% |"


def test_old_rows_of_a_model_stay_beside_new_ones_where_all_but_the_seed_is_alike():
    def row(model, seed, epochs=8):
        return dict(model=model, seed=seed, epochs=epochs, hardware="h", torch="2", commit="c")

    old = [row("a", 0), row("a", 1), row("b", 0)]
    assert best.merge(old, [row("a", 1), row("a", 2)]) == [
        row("a", 0),
        row("b", 0),
        *(row("a", n) for n in (1, 2)),
    ]
    assert best.merge(old, [row("a", 2, epochs=9)]) == [row("b", 0), row("a", 2, epochs=9)]


def test_the_peers_file_is_changed_for_a_cpu_in_all_that_names_cuda():
    peer = "\n".join(best.CPU)
    assert not re.search("cuda|half|compile", best.for_cpu(peer).replace("_Clock", ""))
    with pytest.raises(utils.UsageError, match="The peer's file has no"):
        best.for_cpu("import torch\n")


PEER = """import torch
# .cuda() "cuda" .half() model.compile(mode="max-autotune") range(200)]
# torch.cuda.Event(enable_timing=True) torch.cuda.synchronize()
@torch.compile
def classes():
    return len(torch.load("cifar10/train.pt")["labels"][:200].unique())
if False:
    pass
    main("warmup", model)
print(f"| 1 | {classes()} |", "| 1 | 0.5 | 0 |", sep="\\n")
"""


def test_the_peer_whitens_by_images_of_all_classes(run, tmp_path):
    """It takes the first ones that it is given, and a data set may lie class by class."""
    training, _ = utils.load_cifar10(run)
    assert len(training.labels[:200].unique()) == 1
    (tmp_path / "airbench94_muon.py").write_text(PEER, encoding="utf-8")
    row = best.airbench94(tmp_path, run)
    assert row["train_seconds"] == 10  # the classes that it saw
    assert row["test_accuracy"] == 50


@pytest.mark.parametrize("name", ["mnist-best", "cifar10-94", "segmentation-best"])
def test_the_best_models_are_trained_and_scored(name, run, monkeypatch):
    for load in ("load_mnist", "load_cifar10", "load_scenes"):
        parts = getattr(utils, load)(run)
        parts = [part.subset(torch.arange(min(500, len(part)))) for part in parts]
        monkeypatch.setattr(utils, load, lambda run, parts=parts: parts)
    row = best.RUNS[name](dataclasses.replace(run, quiet=True), 3)
    assert (row["images"], row["epochs"], row["seed"]) == (500, 1, 3)
    assert row["flops"] > 0 and row["train_seconds"] > 0
    assert f" | {row['test_accuracy']:.2f}%" in best.table([{"model": name, **row}])


def test_a_run_that_was_stopped_leaves_no_row(run, monkeypatch):
    history = utils.History()
    history.stopped, history.planned = True, 3
    monkeypatch.setattr(utils, "train", train_giving(history))
    with pytest.raises(KeyboardInterrupt, match="DigitNet: stopped after 0 of 3 epochs"):
        best.mnist_best(run, seed=0)
    task = next(small_tasks(run))
    with pytest.raises(KeyboardInterrupt, match="stopped after 0 of 3 epochs"):
        speed.time_to_score(task, {50.0: (task, 3)}, run, budget=0)


@pytest.mark.parametrize(
    ("model", "problem"), [("minst", "The models are mnist, "), ("mnist", "is of another machine")]
)
def test_rows_of_another_machine_are_not_taken_for_this_ones(model, problem, tmp_path, monkeypatch):
    there, file = "an abacus", tmp_path / "speed.json"
    machine = dict(hardware=there, precision="float32", torch=torch.__version__, data=[])
    file.write_text(json.dumps(dict(machine=machine, rows=[])), encoding="utf-8")
    options = ["--quick", "--only", model, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    with pytest.raises(SystemExit, match=problem):
        speed.main()
    assert there in file.read_text(encoding="utf-8")


def test_a_model_measured_again_keeps_the_rows_of_the_others(tmp_path, monkeypatch):
    file = tmp_path / "speed.json"

    def measure(model, card):
        def throughput(task, run, rounds):
            metrics = "training, images/s", f"share of {card} TFLOP/s, %"
            return [dict(model=model, metric=metric, a=1, b=card) for metric in metrics]

        monkeypatch.setattr(speed, "throughput", throughput)
        options = ["--quick", "--only", model, "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["speed.py", *options])
        speed.main()
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        assert all(row["commit"] and row["date"] for row in rows)
        return [(row["model"], row["b"]) for row in rows]

    monkeypatch.setattr(speed, "table", str)
    monkeypatch.setattr(speed, "brief", str)
    assert measure("cifar10", 700) == [("cifar10", 700)] * 2
    both = [("mnist", 700)] * 2 + [("cifar10", 700)] * 2
    assert measure("mnist", 700) == both
    assert measure("cifar10", 650) == [("cifar10", 650)] * 2 + both[:2]


@pytest.mark.parametrize("name", ["mnist", "segmentation-best"])
def test_a_models_steps_are_timed(run, name):
    case = dataclasses.replace(steps.cases()[name], batch_size=20, steps=2)
    assert steps.measure(case, dataclasses.replace(run, quiet=True)) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun does not start there")
def test_the_work_of_several_processes_is_compared_with_that_of_one(tmp_path, monkeypatch):
    small = types.SimpleNamespace(steps=1, width=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes, where there may be one GPU
    assert scaling.round_of(1, small) > 0 and scaling.round_of(2, small) > 0
    threads, speeds = torch.get_num_threads(), {1: 100.0, 3: 150.0}
    monkeypatch.setattr(scaling, "round_of", lambda processes, options: speeds[processes])
    options = ["--processes", "3", "--rounds", "2", "--json", str(tmp_path / "scaling.json")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options])
    scaling.main()
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert (result["efficiency"], result["alone"], result["rounds"]) == (50, 100, 2)


def test_every_model_has_its_steps():
    assert set(steps.cases()) == set(tables.WHAT)
    row = dict(model="mnist", batch_size=16, step_seconds=0.00384)
    assert steps.table([row]).splitlines()[-1] == "| `mnist` | 16 | 3.84 ms | - | - |"
    row |= dict(replayed_seconds=0.000747, epochs=100, epochs_seconds=224.1)
    assert steps.table([row]).endswith("| 3.84 ms | 0.75 ms | 100, 3.7 min |")


def test_steps_are_those_of_the_runs_on_record(run, on_record):
    for name, case in steps.cases().items():
        record = on_record[name]
        data = steps.noise(2, case.shape, case.pixels)
        batches = case.batches(data, case.batch_size, run, **case.options)
        done = without_sizes(batches.augmentation)
        assert done == without_sizes(record["augmentation"]), name
        assert case.batch_size == record["batch_size"], name
        assert case.muon == record["optimizer"].startswith("Muon"), name
        assert report.parameters(case.make()) == record["parameters"], name
        assert case.loss.__name__ == record.get("loss", "cross_entropy"), name


def without_sizes(augmentation):
    """What is done to images, but for the sides that they grow through."""
    return augmentation.partition(", sizes")[0]


@pytest.fixture
def best_run(run, monkeypatch):
    """A function that gives what benchmarks/best.py trains a model with, and on what."""
    fit, calls = inspect.signature(best.fit), []

    def watch(*parts, **options):
        call = fit.bind(*parts, **options)
        call.apply_defaults()
        calls.append(call.arguments)
        return dict(train_seconds=0)

    def call(name):
        best.RUNS[name](run, 0)
        return calls.pop()

    monkeypatch.setattr(best, "fit", watch)
    return call


@pytest.mark.parametrize("name", best.RUNS)
def test_a_best_model_learns_from_the_training_set_and_is_scored_on_the_other(name, run, best_run):
    load = {"mnist-best": utils.load_mnist, "segmentation-best": utils.load_scenes}
    data, call = load.get(name, utils.load_cifar10)(run), best_run(name)
    found = [call[part].dataset.fingerprint for part in ("batches", "test_batches")]
    assert found == [part.fingerprint for part in data]


@pytest.mark.parametrize("name", best.RUNS)
def test_a_best_model_is_trained_as_the_run_on_record(name, best_run, on_record):
    record, call = on_record[name], best_run(name)
    assert call["batches"].batch_size == record["batch_size"]
    done = without_sizes(call["batches"].augmentation)
    assert done == without_sizes(record["augmentation"])
    assert report.parameters(call["model"]) == record["parameters"]
    rate = rf"'(lr|filters)': {call['lr']},"  # the second in older records
    assert re.search(rate, record["optimizer"])
    assert call["mirror"] == name.startswith("cifar10")
    if name == "segmentation-best":
        assert call["loss"].__name__ == record["loss"]
    else:
        assert call["loss"].keywords == dict(label_smoothing=record["smoothing"])
