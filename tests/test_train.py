"""The loop does what a plain loop written out does, to the bit, and its history tells the truth."""

import dataclasses
import math
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import victim
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import progress
import recipes
import utils


def toy(n=200, seed=0):
    """Three classes of 8x8 images that brightness and stripes tell apart."""
    return victim.toy(n, seed)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )


def fit(run, epochs=3, batches=None):
    model = small_model().to(memory_format=torch.channels_last)
    batches = batches or utils.Batches(toy(), 30, run, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = utils.one_cycle(optimizer, batches, epochs, 0.05)
    validation = utils.Batches(toy(90, seed=1), 64, run, toy().statistics())
    history = utils.train(model, optimizer, batches, validation, epochs, run, schedule)
    return model, history


def test_the_loop_equals_a_plain_one_bit_for_bit(run):
    model, history = fit(run)
    plain = small_model().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    batches = utils.Batches(toy(), 30, run, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=3 * len(batches), cycle_momentum=False
    )
    for epoch in (1, 2, 3):
        plain.train()
        batches.set_epoch(epoch)
        loss_sum = correct = 0
        for x, y in batches:
            logits = plain(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(y)
            correct += (logits.argmax(1) == y).sum().item()
        assert history[epoch - 1].loss == pytest.approx(loss_sum / 200, rel=1e-12)
        assert history[epoch - 1].accuracy == 100 * correct / 200
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "optimizer_of",
    [lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True), lambda m: recipes.Muon(m)],
    ids=["AdamW", "Muon"],
)
def test_float16_leaves_out_the_steps_that_overflow(run, optimizer_of, monkeypatch):
    def trained(run):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3, bias=False), *small_model()[1:]
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        optimizer, batches = optimizer_of(model), utils.Batches(toy(), 10, run, shuffle=True)
        schedule = recipes.linear_decay(optimizer, batches, 3)
        return utils.train(model, optimizer, batches, batches, 3, run, schedule)

    exact, half = trained(run), dataclasses.replace(run, precision=torch.float16)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10))
    assert [e.loss for e in trained(half)] == pytest.approx([e.loss for e in exact], abs=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = utils.settings(environ={"PROFILE": "quick", "PRECISION": "float16"})
        half = dataclasses.replace(half, device=run.device, quiet=True)
        monkeypatch.undo()
        monkeypatch.setattr(
            torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**30)
        )
        late = trained(half)
    assert exact[0].loss < late[0].loss  # some steps went by first
    assert late[-1].validation_accuracy > 90


def test_a_loss_is_of_float32_logits_where_the_model_gives_16_bits(run):
    """On CUDA autocast leaves part of cross_entropy in the type of its logits."""
    half, model, kinds = dataclasses.replace(run, precision=torch.bfloat16), small_model(), set()

    def loss(logits, labels, ignore_index):
        kinds.add(logits.dtype)
        return nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index)

    batches = utils.Batches(toy(), 10, run)
    with half.autocast():
        assert model(next(iter(batches))[0]).dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    utils.train(model, optimizer, batches, batches, 1, half, loss_function=loss)
    assert kinds == {torch.float32}


def test_gradients_that_are_never_finite_in_float16_end_the_run(run):
    half = dataclasses.replace(run, precision=torch.float16)

    def loss(logits, labels, ignore_index):
        return logits.float().square().mean() + (logits.sum() * 0).sqrt()  # whose slope is not

    model = small_model()
    batches = utils.Batches(toy(), 5, run, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with pytest.raises(utils.UsageError, match="^In epoch 1 the gradients are not finite in float"):
        utils.train(model, optimizer, batches, batches, 2, half, loss_function=loss)


# .item(), int() and if; .nonzero() and masks; .unique(). The fake GPU's tests see more in a step
WAITS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
)


class Asks(TorchDispatchMode):
    """Counts how often a value is asked for: each time a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_no_step_asks_for_a_value(run, muon, asking):
    """An epoch of eight steps asks no oftener than one of three; a loss that does is noticed."""

    def loss(scores, labels, ignore_index):
        value = F.cross_entropy(scores, labels, ignore_index=ignore_index)
        return value * (2 if asking and value > 0 else 1)

    counts = []
    for images in (90, 240):
        model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), *small_model()[1:])
        model = model.to(memory_format=torch.channels_last)
        optimizer = recipes.Muon(model) if muon else torch.optim.AdamW(model.parameters(), 0.01)
        for group in optimizer.param_groups:
            group["fused"] = True  # or AdamW asks for its counts of steps, which lie on the CPU
        batches = utils.Batches(toy(images), 30, run, shuffle=True, flip=True, shift=2)
        validation = utils.Batches(toy(90, seed=1), 45, run)
        schedule = recipes.linear_decay(optimizer, batches, 1)
        with Asks() as asks:
            utils.train(model, optimizer, batches, validation, 1, run, schedule, loss)
        counts.append(asks.count)
    assert counts[1] - counts[0] == (5 if asking else 0)


def test_seconds_are_of_training_alone(run, monkeypatch):
    now = [0.0]

    class Slow(utils.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1
                yield batch

    def slow_test(*parts):
        now[0] += 100
        return 50.0

    monkeypatch.setattr(utils, "clock", lambda run: now[0])
    monkeypatch.setattr(utils, "evaluate", slow_test)
    _, history = fit(run, epochs=2, batches=Slow(toy(), 30, run))
    assert [(e.seconds, e.validation_seconds) for e in history] == [(7, 100)] * 2


def test_it_learns_and_the_history_says_so(run):
    model, history = fit(run, epochs=5)
    assert [e.epoch for e in history] == [1, 2, 3, 4, 5]
    assert history[-1].loss < history[0].loss / 2
    assert history[-1].validation_accuracy > 95
    assert all(e.seconds > 0 and e.validation_seconds > 0 for e in history)
    validation = utils.Batches(toy(90, seed=1), 64, run, toy().statistics())
    assert utils.evaluate(model, validation, run) == history[-1].validation_accuracy


def test_a_torch_dataloader_works_as_well(run):
    dataset = toy()
    pairs = TensorDataset(dataset.images.float() / 128 - 1, dataset.labels)
    loader = DataLoader(pairs, batch_size=32, shuffle=True)
    _, history = fit(run, epochs=5, batches=loader)
    assert history[-1].accuracy > 95


def test_ignored_pixels_count_for_neither_loss_nor_score(run):
    dataset = toy(64)
    maps = dataset.labels[:, None, None].repeat(1, 8, 8)
    half = maps.clone()
    half[:, 4:] = utils.IGNORE
    model = nn.Conv2d(1, 3, 1)
    with torch.no_grad():
        rows = [
            utils.Batches(dataclasses.replace(dataset, labels=labels), 24, run)
            for labels in (maps, half)
        ]
        upper = [(model(x)[:, :, :4], y[:, :4]) for x, y in rows[0]]
    loss = sum(F.cross_entropy(z, y, reduction="sum").item() for z, y in upper) / (64 * 32)
    correct = sum((z.argmax(1) == y).sum().item() for z, y in upper)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    history = utils.train(model, optimizer, rows[1], rows[1], 1, run)
    assert history[0].loss == pytest.approx(loss, rel=1e-5)
    assert history[0].accuracy == history[0].validation_accuracy == 100 * correct / (64 * 32)


SMOOTHED = partial(F.cross_entropy, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [F.cross_entropy, SMOOTHED, recipes.with_dice])
def test_a_batch_without_a_label_changes_nothing(run, loss):
    dataset = toy(50)
    maps = dataset.labels[:, None, None].repeat(1, 8, 8)
    maps[48:] = utils.IGNORE  # the short last batch
    dataset = dataclasses.replace(dataset, labels=maps)
    results, statistics = [], dataset.statistics()
    for part in (dataset, dataset.subset(torch.arange(48))):
        torch.manual_seed(0)
        model, batches = nn.Conv2d(1, 3, 1), utils.Batches(part, 24, run, statistics)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        history = utils.train(model, optimizer, batches, batches, 2, run, loss_function=loss)
        results.append([n for e in history for n in (e.loss, e.accuracy, e.validation_accuracy)])
    assert results[0] == pytest.approx(results[1]) and all(map(math.isfinite, results[0]))
    empty = utils.Batches(dataset.subset(torch.arange(48, 50)), 24, run)
    with pytest.raises(utils.UsageError, match="There is no label to score"):
        utils.evaluate_pixels(model, empty, 3, run)


def test_the_report_every_25_iterations(run, monkeypatch):
    reports = []
    monkeypatch.setattr(
        progress.Progress, "step", lambda self, epoch, step, totals: reports.append((epoch, step))
    )
    fit(run, epochs=2, batches=utils.Batches(toy(), 4, run, shuffle=True))
    assert reports == [(1, 25), (1, 50), (2, 25), (2, 50)]


def test_a_report_says_where_its_numbers_are_from(run, monkeypatch, capsys):
    monkeypatch.setattr(progress.Progress, "_line", lambda self, text, final: print(text))
    shown = progress.Progress("toy", range(60), 2, run)
    reports = [(1, 25, (50.0, 20, 100, 25)), (1, 50, (80.0, 90, 200, 50)), (2, 25, (1.0, 1, 1, 25))]
    for epoch, step, totals in reports:
        shown.step(epoch, step, torch.tensor(totals, dtype=torch.float64))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2, step 25/60: loss 0.5000, training 20.00%",
        "epoch 1/2, step 50/60: loss 0.4000, training 45.00%",
    ]
    shown.shown, shown.place = 0.0, None
    for step in (25, 50):  # no label has counted yet, and then nothing is said
        shown.step(2, step, torch.tensor((0.0, 0, 0, step), dtype=torch.float64))
    assert capsys.readouterr().out == ""
    shown.quiet = True
    shown.epoch(utils.History([(1, 9.0, 0.4, 45.0, 50.0, 1.0)]))
    shown.shown = 0.0
    shown.step(2, 25, torch.ones(4, dtype=torch.float64))  # nothing of this epoch has arrived yet
    assert capsys.readouterr().out == "epoch 1/2: 9.0 s, loss 0.4000, training 45.00%, " + (
        "validation 50.00%, 10 s left\n"
    )


def test_a_report_that_is_on_its_way_is_left_to_arrive(run, monkeypatch, capsys):
    """A GPU may be hundreds of steps behind: its numbers are shown when they are there."""
    monkeypatch.setattr(progress.Progress, "_line", lambda self, text, final: print(text))
    shown, arrivals, copies = progress.Progress("toy", range(200), 1, run), [], []
    shown.copied = SimpleNamespace(
        query=lambda: bool(arrivals.pop(0)), record=lambda: copies.append(1)
    )
    for step, there in ((25, 1), (50, 0), (75, 0), (100, 1), (125, 1)):
        arrivals.append(there)
        shown.shown = 0.0
        shown.step(1, step, torch.tensor((float(step), step, 100, step), dtype=torch.float64))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/1, step 25/200: loss 0.2500, training 25.00%",
        "epoch 1/1, step 100/200: loss 1.0000, training 100.00%",
    ]
    assert len(copies) == 3 and not arrivals


def test_a_script_prints_a_line_per_epoch(run, capsys):
    fit(run, epochs=2)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and "epoch 2/2" in lines[1] and "validation" in lines[1]


def test_the_clock_waits_for_a_gpu(run, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    utils.clock(run)
    assert not waited
    utils.clock(dataclasses.replace(run, device=torch.device("cuda")))
    assert waited


@pytest.mark.parametrize("asked", [False, True])
def test_steps_are_replayed_where_the_settings_say(asked, tmp_path, monkeypatch):
    wanted, whole = [], victim.settings(tmp_path)
    monkeypatch.setattr(victim, "settings", lambda _: dataclasses.replace(whole, graphs=asked))
    monkeypatch.setattr(utils, "captured", lambda step, *rest: wanted.append(rest[-1]) or step)
    victim.fit(tmp_path, epochs=1)
    assert wanted == [asked]


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)
    schedule = utils.one_cycle(optimizer, range(100), epochs=10, peak=0.4)
    rates = []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.4 / 25) and max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) == 299 and rates[-1] < 1e-5
