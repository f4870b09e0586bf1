"""Exact resume, refusal of what does not fit, and a plain sentence for whatever stops a run."""

import contextlib
import dataclasses
import errno
import functools
import os
import random
import re
import signal
import tempfile
import weakref
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import victim
from jupyter_client import KernelManager
from torch import nn
from torch.nn import functional as F

import checkpoints
import files
import report
import settings
import utils

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The digest of a run that nothing happens to."""
    return victim.fit(tmp_path_factory.mktemp("whole"))[1]


def stopped(folder, epoch, **changes):
    """A folder that holds a run's first epochs."""
    with pytest.raises(victim.Stop):
        victim.fit(folder, stop_after=epoch, **changes)


# ---- going on


@pytest.mark.parametrize("epoch", range(1, victim.EPOCHS + 1))
def test_a_resumed_run_equals_the_uninterrupted_one(epoch, uninterrupted, tmp_path, tally, capsys):
    stopped(tmp_path, epoch)
    history, digest = victim.fit(tmp_path)
    tally.add("faults", survived=digest == uninterrupted)
    assert f"Found {epoch} of 6 epochs in {tmp_path / 'toy.pt'}" in capsys.readouterr().out
    assert [e.epoch for e in history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # as settings() does
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_resumed_run_is_exact_in_every_precision(precision, tmp_path, tally, monkeypatch):
    """In float16 the loss's scale goes on from where it was: it falls at first, and steps with it
    are left out."""
    plain = victim.settings
    monkeypatch.setattr(
        victim, "settings", lambda folder: dataclasses.replace(plain(folder), precision=precision)
    )
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    _, whole = victim.fit(tmp_path / "whole")
    stopped(tmp_path / "cut", 3)
    tally.add("faults", survived=victim.fit(tmp_path / "cut")[1] == whole)


def test_a_run_without_a_checkpoint_is_the_same_run(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.Settings, "checkpoint", lambda *arguments: None)
    assert victim.fit(tmp_path)[1] == uninterrupted
    assert not list(tmp_path.iterdir())


def test_two_processes_find_a_damaged_file_at_once(tmp_path, tally, monkeypatch, capsys):
    stopped(tmp_path, 2)
    file = tmp_path / "toy.pt"
    file.write_bytes(file.read_bytes()[:1000])
    replace = Path.replace

    def slower(path, target):
        replace(path, target)  # by the other process
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", slower)
    state = victim.settings(tmp_path).checkpoint("toy")._read()
    tally.add("faults", survived=len(state["history"]) == 1)
    assert "going on from the one before it" in capsys.readouterr().out


def test_a_finished_run_is_loaded_and_not_repeated(uninterrupted, tmp_path, capsys):
    history, _ = victim.fit(tmp_path)

    def never(*arguments, **options):
        raise AssertionError("it trained again")

    again, digest = victim.fit(tmp_path, loss=Named(never, victim.noisy_loss))
    assert digest == uninterrupted and again == history and again.made == history.made
    assert "Found 6 of 6 epochs" in capsys.readouterr().out


class Named:
    """A loss function that passes for another: its description is a fact of the run."""

    def __init__(self, function, like):
        self.function, self.like = function, like

    def __call__(self, *arguments, **options):
        return self.function(*arguments, **options)

    def __str__(self):
        return checkpoints._describe(self.like)


def test_without_resume_a_run_starts_anew(uninterrupted, tmp_path):
    victim.fit(tmp_path)
    stopped(tmp_path, 2, resume=False)
    history, digest = victim.fit(tmp_path, resume=False)
    assert digest == uninterrupted and len(history) == 6


def with_loader(folder, stop_after=None, schedule=None, freeze=False, **changes):
    """A run on a DataLoader, by default with a generator of its own; returns the weights."""
    torch.manual_seed(0)
    run, network, data = victim.settings(folder), victim.model(), changes.pop("data", victim.toy())
    pairs = torch.utils.data.TensorDataset(data.images.float() / 128 - 1, data.labels)
    options = dict(batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(5))
    loader = torch.utils.data.DataLoader(pairs, **{**options, **changes})
    network[0].weight.requires_grad_(not freeze)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    checkpoint = run.checkpoint("toy")
    if stop_after:
        victim.stop_after_epoch(checkpoint, stop_after)
    schedule = schedule and schedule(optimizer)
    utils.train(
        network, optimizer, loader, loader, 4, run, schedule=schedule, checkpoint=checkpoint
    )
    return network.state_dict()


@pytest.mark.parametrize("options", [{}, dict(generator=None)])
def test_a_dataloader_resumes_exactly_too(options, tmp_path):
    """With a generator of its own, and without."""
    whole = with_loader(tmp_path / "whole", **options)
    with pytest.raises(victim.Stop):
        with_loader(tmp_path / "cut", stop_after=2, **options)
    resumed = with_loader(tmp_path / "cut", **options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("draws", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_the_same_loader_goes_on_after_an_interruption(draws, tmp_path):
    """Its own generator has moved on since it began, and so have numpy's and Python's."""
    run, network, data = victim.settings(tmp_path), victim.model(), victim.toy()
    optimizer = torch.optim.SGD(network.parameters(), 0.05)

    def moved(pairs):
        images, labels = torch.utils.data.default_collate(pairs)
        return images + 0.01 * draws(), labels

    pairs = torch.utils.data.TensorDataset(data.images.float() / 128 - 1, data.labels)
    options = dict(shuffle=True, collate_fn=moved, generator=torch.Generator().manual_seed(5))
    loader = torch.utils.data.DataLoader(pairs, 24, **options)
    checkpoint = run.checkpoint("toy")
    victim.stop_after_epoch(checkpoint, 2)
    with pytest.raises(victim.Stop):
        utils.train(network, optimizer, loader, loader, 4, run, checkpoint=checkpoint)
    again = run.checkpoint("toy")
    assert len(utils.train(network, optimizer, loader, loader, 4, run, checkpoint=again)) == 4
    other = torch.utils.data.DataLoader(
        pairs, 24, **{**options, "generator": torch.Generator().manual_seed(6)}
    )
    with pytest.raises(utils.UsageError, match="SHA-256"):
        utils.train(network, optimizer, other, other, 4, run, checkpoint=again)


def lambda_schedule(base):
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, base)


def two_schedules(first, gamma):
    def make(optimizer):
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=first)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [first])

    return make


relabelled = dataclasses.replace(victim.toy(), labels=victim.toy().labels.flip(0))
OTHER_LOADERS = [
    ("batches", {}, dict(batch_size=12)),
    ("batches", {}, dict(shuffle=False)),
    ("batches", {}, dict(data=victim.toy(seed=7))),
    ("batches", {}, dict(data=relabelled)),
    ("optimizer", {}, dict(freeze=True)),
    (
        "schedule",
        dict(schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5, 9])),
        dict(schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [7, 15])),
    ),
    (
        "schedule",
        dict(schedule=lambda_schedule(lambda step: 0.9**step)),
        dict(schedule=lambda_schedule(lambda step: 0.8**step)),
    ),
    ("schedule", dict(schedule=two_schedules(10, 0.9)), dict(schedule=two_schedules(10, 0.8))),
    ("schedule", dict(schedule=two_schedules(10, 0.9)), dict(schedule=two_schedules(15, 0.9))),
]


@pytest.mark.parametrize(("fact", "before", "after"), OTHER_LOADERS)
def test_another_loader_or_schedule_is_refused(fact, before, after, tmp_path, tally):
    with pytest.raises(victim.Stop):
        with_loader(tmp_path, stop_after=2, **before)
    with pytest.raises(utils.UsageError, match=f"of another run, whose {fact} was"):
        with_loader(tmp_path, **{**before, **after})
    tally.add("faults")


def test_a_last_digit_makes_no_other_run(tmp_path):
    """A sum of floats ends in another digit on a CPU that adds them up in another order."""
    checkpoint, parts = checkpoints.Checkpoint(tmp_path / "run.pt"), {"model": victim.model()}
    checkpoint.start(parts, {"batches": "mean 0.13079522489535841, lr 1.2345678901e-05"})
    checkpoint.save(utils.History(), torch.zeros(2, 1, 8, 8))
    checkpoint.start(parts, {"batches": "mean 0.13079522489535838, lr 1.2345678902e-05"})
    with pytest.raises(utils.UsageError, match="0.1307952, .* now .mean 0.130796"):
        checkpoint.start(parts, {"batches": "mean 0.13079622489535841, lr 1.2345678901e-05"})


def test_the_same_objects_go_on_after_an_interruption(tmp_path):
    weights = []
    for cut in (False, True):
        run, network = victim.settings(tmp_path / str(cut)), victim.model()
        optimizer = torch.optim.AdamW(network.parameters(), 0.01)
        batches = utils.Batches(victim.toy(), 24, run, shuffle=True)
        schedule = utils.one_cycle(optimizer, batches, 4, 0.01)
        rest = network, optimizer, batches, batches, 4, run, schedule
        if cut:
            loss = fails_at(3, 4, interrupt, F.cross_entropy)
            assert len(utils.train(*rest, loss, run.checkpoint("toy"))) == 2
        assert len(utils.train(*rest, checkpoint=run.checkpoint("toy"))) == 4
        weights.append(network.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_setting_that_cannot_be_saved_is_told_before_training(tmp_path):
    network = victim.model()
    optimizer = torch.optim.SGD(network.parameters(), np.float64(0.01))
    run = victim.settings(tmp_path)
    batches = utils.Batches(victim.toy(), 24, run)
    with pytest.raises(utils.UsageError, match="can't hold float64"):
        utils.train(network, optimizer, batches, batches, 1, run, checkpoint=run.checkpoint("toy"))


def test_a_damaged_checkpoint_does_not_push_out_the_good_one(uninterrupted, tmp_path, tally):
    """Damage, then a crash in the middle of the next save."""
    stopped(tmp_path, 3)
    content = bytearray((tmp_path / "toy.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "toy.pt").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(victim.Stop):
        patch.setattr(Path, "replace", crash_before_the_last_rename(Path.replace))
        victim.fit(tmp_path)
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def crash_before_the_last_rename(original):
    def replace(path, target):
        if path.suffix == ".partial":
            raise victim.Stop
        return original(path, target)

    return replace


def test_the_record_says_what_trained_the_run_not_what_loaded_it(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "hardware_name", lambda device: "2 x a T4")
    monkeypatch.setattr(utils, "commit", lambda: "c0ffee")
    stopped(tmp_path, 2)
    monkeypatch.setattr(utils, "hardware_name", lambda device: "a T4")
    monkeypatch.setattr(utils, "commit", lambda: "facade")
    stopped(tmp_path, 4)
    stopped(tmp_path, 6)
    monkeypatch.setattr(utils, "hardware_name", lambda device: "a laptop")
    history, _ = victim.fit(tmp_path)
    assert history.made["device"] == "2 x a T4, then a T4"
    assert history.made["commit"] == "c0ffee, then facade"
    assert history.made["torch"] == torch.__version__


# ---- another run, another version, a damaged file


CHANGES = {
    "optimizer": dict(peak=0.02),
    "batches": dict(seed=4),
    "loss": dict(loss=F.cross_entropy),
    "epochs": dict(epochs=7),
    "model": dict(
        network=lambda: nn.Sequential(*victim.model()[:3], nn.Dropout(0.4), *victim.model()[4:])
    ),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_another_run_is_refused_with_what_differs(fact, tmp_path, tally):
    stopped(tmp_path, 2)
    before = (tmp_path / "toy.pt").read_bytes()
    changes = {k: v() if k == "network" else v for k, v in CHANGES[fact].items()}
    with pytest.raises(utils.UsageError, match="of another run, whose .* was .* is now") as error:
        victim.fit(tmp_path, **changes)
    assert "RESUME = False" in str(error.value)
    assert f"whose {fact} was" in str(error.value)
    tally.add("faults", survived=(tmp_path / "toy.pt").read_bytes() == before)


def test_what_differs_is_shown_where_one_text_only_goes_on():
    facts = f"batches of 125, {'mean 0.5, ' * 20}std 0.2"
    for there, here in ((facts, f"{facts}, layers ab cd"), (f"{facts}, layers ab cd", facts)):
        was, now = checkpoints._difference(there, here).split(" and is now ")
        assert was != now and ("layers" in was) == ("layers" in there)


def test_another_precision_is_refused_and_can_be_put_back(tmp_path, monkeypatch, tally):
    stopped(tmp_path, 2)
    whole = victim.settings(tmp_path)
    other = dataclasses.replace(whole, precision=torch.bfloat16)
    monkeypatch.setattr(victim, "settings", lambda folder: other)
    said = "precision was 'float32' and is now 'bfloat16': set PRECISION=float32, or delete"
    with pytest.raises(utils.UsageError, match=said):
        victim.fit(tmp_path)
    monkeypatch.setattr(victim, "settings", lambda folder: whole)
    tally.add("faults", survived=len(victim.fit(tmp_path)[0]) == victim.EPOCHS)


def test_another_version_of_torch_or_python_is_no_other_run():
    assert checkpoints._describe(F.cross_entropy) == "cross_entropy"  # not its docstring
    optimizer = torch.optim.SGD(victim.model().parameters(), 0.1)
    schedule = utils.one_cycle(optimizer, range(10), 3, 0.1)
    before = checkpoints._describe_schedule(schedule)
    schedule._new_in_the_next_version = 1
    assert checkpoints._describe_schedule(schedule) == before
    assert before != checkpoints._describe_schedule(utils.one_cycle(optimizer, range(10), 3, 0.2))
    assert before != checkpoints._describe_schedule(utils.one_cycle(optimizer, range(10), 4, 0.1))


FACTOR, FLOOR = 2.0, torch.tensor([0.5, 1.0])


def a_loss(gamma=2.0, floor=FLOOR):
    def loss(logits, labels, ignore_index, power=gamma):
        terms = F.cross_entropy(logits, labels, ignore_index=ignore_index, weight=floor)
        return FACTOR * terms**power + gamma

    return loss


def a_commented_loss(gamma=2.0, floor=FLOOR):
    def loss(logits, labels, ignore_index, power=gamma):
        """The same, to a reader."""
        # by class
        terms = F.cross_entropy(logits, labels, ignore_index=ignore_index, weight=floor)
        return FACTOR * terms**power + gamma  # to a power

    return loss


def another_loss(gamma=2.0, floor=FLOOR):
    def loss(logits, labels, ignore_index, power=gamma):
        terms = F.cross_entropy(logits, labels, ignore_index=ignore_index, weight=floor)
        return FACTOR * terms**power - gamma

    return loss


def test_a_loss_is_told_by_its_source_its_defaults_and_what_it_takes_from_outside(monkeypatch):
    def facts(loss):
        text = checkpoints._describe(loss)
        text = re.sub(r" at 0x\w+", "", text)
        return text.replace("another_loss", "a_loss").replace("a_commented_loss", "a_loss")

    first = facts(a_loss())
    assert facts(a_loss()) == first and "** power + gamma" in first
    assert facts(a_commented_loss()) == first
    others = [a_loss(gamma=3.0), a_loss(floor=torch.ones(2)), another_loss()]
    others += [partial(a_loss(), power=3.0), partial(a_loss(), power=4.0)]
    others += [partial(a_loss(), power=torch.tensor(4.0))]
    assert len({first, *map(facts, others)}) == 7
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert facts(a_loss()) != first


def test_a_loss_without_a_source_of_its_own_is_told_by_what_it_was_compiled_to():
    made = [lambda x: x + 1.5, lambda x: x - 1.5, lambda x: x - 2.5]
    for end in ("+ 1.5", "- 1.5", "- 2.5"):
        exec(f"def loss(logits):\n    return logits {end}", own := {})
        made.append(own["loss"])
    made += [partial(loss, 1) for loss in made]
    assert len({re.sub(r" at 0x\w+", "", checkpoints._describe(loss)) for loss in made}) == 12


class OfAnObject:
    def loss(self, logits, labels, ignore_index):
        return F.cross_entropy(logits, labels, ignore_index=ignore_index) + FACTOR

    @functools.wraps(loss)
    def wrapped(self, *arguments, **options):
        return self.loss(*arguments, **options)

    def __repr__(self):
        return "an object"


@pytest.mark.parametrize("name", ["loss", "wrapped"])
def test_a_loss_that_is_a_method_or_wrapped_is_told_by_its_own_source(name, monkeypatch):
    before = checkpoints._describe(getattr(OfAnObject(), name))
    assert "+ FACTOR" in before and "{'FACTOR': '2.0'}" in before
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert checkpoints._describe(getattr(OfAnObject(), name)) != before


def test_a_loss_of_torch_is_told_by_its_name_and_arguments():
    parts = torch.optim.SGD([torch.zeros(1)]), None, torch.amp.GradScaler("cpu")
    smooth = partial(F.cross_entropy, label_smoothing=0.1)
    facts = checkpoints.facts_of(victim.model(), *parts, checkpoints.RandomState(), loss=smooth)
    # the text in the checkpoints of best models that were trained before functions had sources
    assert facts["loss"] == "functools.partial(<function cross_entropy>, label_smoothing=0.1)"


@pytest.mark.parametrize("address", ["0x7f3c5a1be0d0", "0x000001D5C3B7F0A0"])
def test_where_a_loss_lies_in_memory_makes_no_other_run(address):
    """The second address is written as on Windows."""
    model = victim.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parts = model, optimizer, None, torch.amp.GradScaler("cpu"), checkpoints.RandomState()
    loss = f"functools.partial(<function dice at {address}>, weight=2)"  # as text
    facts = checkpoints.facts_of(*parts, loss=loss)
    assert facts["loss"] == "functools.partial(<function dice>, weight=2)"


def test_where_a_schedule_is_makes_no_other_run():
    optimizer = torch.optim.SGD(victim.model().parameters(), 0.1)
    schedules = torch.optim.lr_scheduler
    for schedule in (
        schedules.CosineAnnealingWarmRestarts(optimizer, 2, T_mult=2),
        two_schedules(3, 0.9)(optimizer),
    ):
        before = checkpoints._describe_schedule(schedule)
        for _ in range(5):
            optimizer.step()
            schedule.step()
        assert checkpoints._describe_schedule(schedule) == before


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_where_a_cycle_of_momentum_is_makes_no_other_run(optimizer):
    network, draws = victim.model(), checkpoints.RandomState()
    optimizer, scaler = optimizer(network.parameters(), 0.1), torch.amp.GradScaler(enabled=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    before = checkpoints.facts_of(network, optimizer, schedule, scaler, draws)
    optimizer.step()
    schedule.step()
    assert checkpoints.facts_of(network, optimizer, schedule, scaler, draws) == before


def test_a_learning_rate_that_a_graph_made_a_tensor_is_the_same():
    def optimizer_fact(rate, **options):
        network = victim.model()
        optimizer = torch.optim.AdamW(network.parameters(), 0.1, **options)
        optimizer.param_groups[0]["lr"] = rate
        scaler, draws = torch.amp.GradScaler("cpu", enabled=False), checkpoints.RandomState()
        return checkpoints.facts_of(network, optimizer, None, scaler, draws)["optimizer"]

    assert optimizer_fact(0.001) == optimizer_fact(torch.tensor(0.001))
    assert optimizer_fact(0.001, fused=True) == optimizer_fact(0.001, capturable=True)
    assert optimizer_fact(0.001) != optimizer_fact(torch.tensor(0.00101))


def one_off(part):
    """The data, but for one grey level of one pixel, or one label."""
    data = victim.toy()
    value = data.images[100, 0, 3] if part == "images" else data.labels[100:101]
    value[0] = value[0] - 1 if value[0] else 1
    return data


OTHER_DATA = [
    ("batches", dict(data=one_off("images"), statistics=victim.toy().statistics())),
    ("batches", dict(data=one_off("labels"))),
    ("batches", dict(batch_size=25)),  # as many of them
    ("batches", dict(shuffle=False)),
    ("batches", dict(statistics=([0.5], [0.25]))),
    ("validation", dict(validation=victim.toy(90, seed=2))),
]


@pytest.mark.parametrize(("fact", "change"), OTHER_DATA)
def test_other_data_is_refused(fact, change, tmp_path, tally):
    stopped(tmp_path, 2)
    with pytest.raises(utils.UsageError, match=f"of another run, whose {fact} was"):
        victim.fit(tmp_path, **change)
    tally.add("faults")


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_takes_no_draw_from_a_dataloader(kept, tmp_path):
    """Training is that of a plain loop, whose shuffles, dropout and noise come from its seeds."""
    run, data, weights = victim.settings(tmp_path), victim.toy(), []
    validation = utils.Batches(victim.toy(90, seed=1), 64, run)
    pairs = torch.utils.data.TensorDataset(data.images.float() / 128 - 1, data.labels)
    for plain in (True, False):
        network = victim.model()
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        torch.manual_seed(7), np.random.seed(8), random.seed(9)
        loader = torch.utils.data.DataLoader(pairs, 24, shuffle=True)
        if plain:
            for images, labels in (batch for _ in range(2) for batch in loader):
                optimizer.zero_grad()
                victim.noisy_loss(network(images), labels, utils.IGNORE).backward()
                optimizer.step()
        else:
            checkpoint = run.checkpoint("toy") if kept else None
            loss = dict(loss_function=victim.noisy_loss, checkpoint=checkpoint)
            utils.train(network, optimizer, loader, validation, 2, run, **loss)
        weights.append(network.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_changed_forward_pass_is_noticed(tmp_path, tally):
    class Plain(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    class Changed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.flip(3))

    Changed.__name__ = "Plain"
    stopped(tmp_path, 2, network=Plain(*victim.model()))
    with pytest.raises(utils.UsageError, match="this model answers differently"):
        victim.fit(tmp_path, network=Changed(*victim.model()))
    tally.add("faults")


def test_what_a_model_answers_is_compared_in_float32(monkeypatch):
    """TF32, which newer GPUs have, rounds so coarsely that deep models answer differently."""

    class Spy(nn.Linear):
        def forward(self, x):
            self.coarse = torch.backends.cudnn.allow_tf32
            return super().forward(x)

    spy = Spy(2, 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    checkpoints._answer(spy, torch.zeros(1, 2))
    assert not spy.coarse and torch.backends.cudnn.allow_tf32


def rewrite(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("off, goes_on", [(0.003, True), (0.03, False)])
def test_a_run_begun_on_a_gpu_goes_on_here(off, goes_on, tmp_path, tally):
    """As graphs leave it: a rate in a tensor, other generators, logits that are rounded there."""
    stopped(tmp_path, 3)

    def as_on_a_gpu(state):
        state["parts"]["random"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 9
        for group in state["parts"]["optimizer"]["param_groups"]:
            group |= dict(capturable=True, fused=True, lr=torch.tensor(group["lr"]))
        logits = state["probe"]["logits"]
        logits += off * logits.abs().max()

    rewrite(tmp_path / "toy.pt", as_on_a_gpu)
    if goes_on:
        tally.add("faults", survived=len(victim.fit(tmp_path)[0]) == victim.EPOCHS)
        return
    with pytest.raises(utils.UsageError, match="with its weights, this model answers differently"):
        victim.fit(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.update(extra=1), "is not as this version of the project writes it"),
        (lambda state: state.pop("probe"), "is not as this version of the project writes it"),
        (lambda state: state.update(format=2), "is a checkpoint of format 2"),
        (lambda state: state.pop("format"), "is a checkpoint of format None"),
        (lambda state: state["parts"].pop("optimizer"), "does not fit this run"),
        (lambda state: state["parts"]["model"].pop("0.weight"), "does not fit this run"),
        (lambda state: state["parts"]["model"].update(new=torch.ones(1)), "does not fit this run"),
        (lambda state: state["parts"]["random"].pop("torch"), "does not fit this run"),
    ],
)
def test_an_odd_checkpoint_is_refused(change, sentence, tmp_path, tally):
    stopped(tmp_path, 2)
    rewrite(tmp_path / "toy.pt", change)
    with pytest.raises(utils.UsageError, match=sentence) as error:
        victim.fit(tmp_path)
    assert "RESUME = False" in str(error.value)
    tally.add("faults")


def test_a_fault_of_the_device_is_not_the_checkpoints(tmp_path, tally, monkeypatch, uninterrupted):
    stopped(tmp_path, 2)

    def fails(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_answer", fails)
        with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access"):
            victim.fit(tmp_path)
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def test_a_checkpoint_that_holds_a_program_is_not_run(tmp_path, tally):
    stopped(tmp_path, 2)
    state = torch.load(tmp_path / "toy.pt", weights_only=True)
    torch.save({**state, "history": victim.Program(tmp_path / "hacked")}, tmp_path / "toy.pt")
    with pytest.raises(utils.UsageError, match="holds more than tensors"):
        victim.fit(tmp_path)
    tally.add("faults", survived=not (tmp_path / "hacked").exists())


def test_the_one_before_takes_over_from_a_damaged_checkpoint(
    uninterrupted, tmp_path, tally, capsys
):
    stopped(tmp_path, 4)
    content = bytearray((tmp_path / "toy.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "toy.pt").write_bytes(content)
    _, digest = victim.fit(tmp_path)
    assert "toy.pt is damaged (a checksum is wrong); going on" in capsys.readouterr().out
    tally.add("faults", survived=digest == uninterrupted)


@pytest.mark.parametrize(
    ("member", "method", "problem"),  # member 6 is an int64, whose bytes are no header of LZMA
    [(0, zipfile.ZIP_DEFLATED, "Error -3"), (6, zipfile.ZIP_LZMA, "Invalid or unsupported")],
)
def test_the_one_before_takes_over_where_unpacking_fails(
    member, method, problem, uninterrupted, tmp_path, tally, capsys
):
    stopped(tmp_path, 4)
    content = bytearray((tmp_path / "toy.pt").read_bytes())
    name = content.rindex(b"archive/data/%d" % member)  # in the directory
    content[name - 36] ^= method  # where its method was 0: stored
    (tmp_path / "toy.pt").write_bytes(content)
    _, digest = victim.fit(tmp_path)
    assert f"toy.pt is damaged ({problem}" in capsys.readouterr().out
    tally.add("faults", survived=digest == uninterrupted)


def test_want_of_memory_while_reading_is_no_damage(uninterrupted, tmp_path, tally, monkeypatch):
    stopped(tmp_path, 4)

    def full(archive):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "testzip", full)
        with pytest.raises(utils.UsageError, match="^Out of memory"):
            victim.fit(tmp_path)
    assert not (tmp_path / "toy.pt.damaged").exists()
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def test_two_damaged_checkpoints_are_refused(tmp_path, tally):
    stopped(tmp_path, 4)
    for name in ("toy.pt", "toy.pt.previous"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
    with pytest.raises(utils.UsageError, match="toy.pt is damaged .* and .*previous is damaged"):
        victim.fit(tmp_path)
    tally.add("faults")


def test_a_checkpoint_holds_tensors_and_built_in_types_only(tmp_path):
    victim.fit(tmp_path)
    with zipfile.ZipFile(tmp_path / "toy.pt") as archive:
        assert archive.testzip() is None
    state = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert set(state) == checkpoints.KEYS and len(state["history"]) == 6
    before = torch.load(tmp_path / "toy.pt.previous", weights_only=True)
    assert len(before["history"]) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.pt", "toy.pt.previous"]


def test_a_checkpoint_keeps_two_images_and_not_their_batch(tmp_path):
    victim.fit(tmp_path)
    images = torch.load(tmp_path / "toy.pt")["probe"]["images"]
    assert len(images) == 2 and images.untyped_storage().nbytes() == images.nbytes


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    with pytest.raises(utils.UsageError, match=r"can't hold object \(the state, parts\)"):
        checkpoints.require_plain({"parts": [1.0, object()]})


# ---- what stops a run


def fails_at(epoch, step, what, loss=victim.noisy_loss):
    """A loss that does something at a step: 10 steps make an epoch."""
    left = [10 * (epoch - 1) + step]

    def lossy(logits, labels, ignore_index):
        left[0] -= 1
        value = loss(logits, labels, ignore_index=ignore_index)
        return what(value) if left[0] == 0 else value

    return Named(lossy, loss)


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (1, 10), (2, 1), (3, 7), (4, 10)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    epoch, step, value, uninterrupted, tmp_path, tally
):
    loss = fails_at(epoch, step, lambda loss: loss * value)
    place = f"epoch {epoch}, step {step} is not finite"
    with pytest.raises(utils.UsageError, match=place) as error:
        victim.fit(tmp_path, loss=loss)
    assert "lower the learning rate" in str(error.value)
    if epoch > 1:
        assert f"{tmp_path / 'toy.pt'} still holds epoch {epoch - 1}" in str(error.value)
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def test_it_is_seen_within_the_epoch_without_waiting_for_its_end(tmp_path):
    steps = []
    loss = fails_at(1, 30, lambda loss: loss * float("nan"), F.cross_entropy)

    def counted(logits, labels, ignore_index):
        steps.append(1)
        return loss(logits, labels, ignore_index=ignore_index)

    with pytest.raises(utils.UsageError, match="epoch 1, step 30 is not finite"):
        victim.fit(tmp_path, loss=counted, batch_size=2)
    assert len(steps) == 75  # of 120: looked for every 25 steps, in values of 25 steps before


def test_weights_that_are_not_finite_are_not_saved(uninterrupted, tmp_path, tally):
    """The last step of an epoch goes wrong after its loss was taken."""

    def spoil(loss):
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    with pytest.raises(utils.UsageError, match="After epoch 3, step 10, .* is not finite"):
        victim.fit(tmp_path, loss=fails_at(3, 10, spoil))
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def interrupt(loss):
    signal.raise_signal(signal.SIGINT)
    return loss


def test_ctrl_c_before_anything_is_saved_leaves_the_model_in_evaluation_mode(tmp_path):
    network = victim.model()
    history, _ = victim.fit(tmp_path, network=network, loss=fails_at(1, 2, interrupt))
    assert len(history) == 0 and not network.training


@pytest.mark.parametrize(("epoch", "step"), [(2, 1), (3, 7), (6, 10)])
def test_ctrl_c_returns_what_there_is(epoch, step, uninterrupted, tmp_path, tally, capsys):
    network = victim.model()
    history, _ = victim.fit(tmp_path, network=network, loss=fails_at(epoch, step, interrupt))
    assert len(history) == epoch - 1 and history.stopped and not network.training
    out = capsys.readouterr().out
    assert f"Stopped. To go on after epoch {epoch - 1}, run this again." in out
    saved = torch.load(tmp_path / "toy.pt", weights_only=True)["parts"]["model"]
    assert all(torch.equal(saved[k], v) for k, v in network.state_dict().items())
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def test_what_is_said_of_running_again_follows_resume(run, tmp_path):
    def of(resume):
        here = dataclasses.replace(run, checkpoint_dir=tmp_path, resume=resume)
        return here.checkpoint("toy").again

    assert of(True) == "run this again"
    change = "set RESUME to True (False deletes the checkpoint), run its cell, and "
    assert of(False) == f"{change}run this again"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_destructor_is_not_lost(uninterrupted, tmp_path, tally):
    """Python ignores what is raised there; training then ends with its epoch."""

    class Leaving:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def leave(loss):
        Leaving()
        return loss

    history, _ = victim.fit(tmp_path, loss=fails_at(3, 4, leave))
    assert len(history) == 3
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def test_ctrl_c_in_validation_and_in_a_save(uninterrupted, tmp_path, tally, monkeypatch, capsys):
    for owner, name in ((utils, "evaluate"), (checkpoints, "write_whole")):
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            calls, original = [], getattr(owner, name)

            def late(*arguments, calls=calls, original=original, **options):
                calls.append(1)
                if len(calls) == 3:
                    signal.raise_signal(signal.SIGINT)
                return original(*arguments, **options)

            patch.setattr(owner, name, late)
            assert len(victim.fit(folder)[0]) == 2
            out = capsys.readouterr().out  # an epoch whose checkpoint was not written is not done
            assert "Stopped. To go on after epoch 2, run this again." in out
        tally.add("faults", survived=victim.fit(folder)[1] == uninterrupted)


def test_ctrl_c_in_the_first_epoch_leaves_nothing_to_record(tmp_path, run, capsys):
    history, _ = victim.fit(tmp_path, loss=fails_at(1, 3, interrupt))
    said = capsys.readouterr().out
    assert history == [] and "Stopped in epoch 1. The weights keep that epoch's steps." in said
    with pytest.raises(utils.UsageError, match="no epoch was trained to its end"):
        report.record_run("toy", run, *[None] * 5, history, 0.0)


def test_ctrl_c_without_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils.Settings, "checkpoint", lambda *arguments: None)
    history, _ = victim.fit(tmp_path, loss=fails_at(3, 2, interrupt))
    assert len(history) == 2 and "Stopped in epoch 3." in capsys.readouterr().out


def test_a_cell_that_is_stopped_in_jupyter_is_no_error(tmp_path, tally):
    """A real kernel, interrupted as its stop button does."""
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(Path(victim.__file__).parent))
    client = kernel.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        shown, plots = [], []

        def look(message):
            if "image/png" in message["content"].get("data", {}):
                plots.append(message["header"]["msg_type"])
            shown.append(str(message["content"].get("data", message["content"].get("text", ""))))
            if "epoch 3/1000" in shown[-1]:  # before it is saved
                kernel.interrupt_kernel()

        code = f"import victim; history, _ = victim.fit({str(tmp_path)!r}, epochs=1000)"
        reply = client.execute_interactive(code, timeout=120, output_hook=look)
        assert reply["content"]["status"] == "ok" and "Stopped" in "".join(shown)
        first, *later = plots  # the curve is always in the same place
        assert first == "display_data" and set(later) == {"update_display_data"}
        shown.clear()
        client.execute_interactive("print(len(history))", timeout=60, output_hook=look)
        names = "toy.pt", "toy.pt.previous"  # it may be stopped between two renames
        file = next(tmp_path / name for name in names if (tmp_path / name).exists())
        kept = torch.load(file, weights_only=True)["history"]
        tally.add("faults", survived=int("".join(shown)) == len(kept) >= 2)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_an_interrupted_run_has_its_figure(tmp_path, run, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    network = victim.model()
    history, _ = victim.fit(tmp_path, network=network, loss=fails_at(4, 2, interrupt))
    batches = utils.Batches(victim.toy(), 24, run)
    optimizer = torch.optim.AdamW(network.parameters())
    record = report.record_run(
        "toy", run, network, optimizer, None, batches, batches, history, 50.0
    )
    assert record["epochs"] == 3 and (tmp_path / "figures/quick/toy.png").exists()


def test_an_interrupted_run_frees_its_memory(tmp_path):
    network, seen = victim.model(), []

    def watch(loss):
        seen.append(weakref.ref(loss))
        return interrupt(loss)

    victim.fit(tmp_path, network=network, loss=fails_at(3, 2, watch))
    assert seen[0]() is None
    assert all(p.grad is None for p in network.parameters())


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def really_no_memory():
    return torch.empty(2**60)


def no_engine():  # cuDNN's words
    raise RuntimeError("FIND was unable to find an engine to execute this computation")


def no_handle():  # cuBLAS's words
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`")


@pytest.mark.parametrize(
    "allocate, what_happened",
    [
        (no_memory, "Out of memory"),
        (really_no_memory, "Out of memory"),
        (no_engine, r"Probably out of memory \(FIND was unable .* this computation\)"),
        (no_handle, r"Probably out of memory \(CUDA error: CUBLAS_STATUS_NOT_.*\)"),
    ],
)
def test_out_of_memory_says_which_batch_size_to_try(
    allocate, what_happened, uninterrupted, tmp_path, tally
):
    held = []

    def what(loss):
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        return loss + activations.sum() + allocate()

    words = "with batches of 24: try a batch size of 12"
    with pytest.raises(utils.UsageError, match=f"^{what_happened} {words}") as error:
        victim.fit(tmp_path, loss=fails_at(3, 2, what))
    assert error.value and held[0]() is None  # no traceback holds on to tensors
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


@pytest.mark.parametrize("problem", [None, utils.UsageError, KeyboardInterrupt, RuntimeError])
def test_recordings_do_not_outlive_training(problem):
    step, errors = SimpleNamespace(graphs={"shape": "recording"}), (utils.UsageError, RuntimeError)
    with pytest.raises(errors) if problem in errors else contextlib.nullcontext():
        optimizer = torch.optim.SGD([torch.zeros(1)])
        with checkpoints.guarded(utils.History(), optimizer, None, None, step):
            assert step.graphs
            if problem:
                raise problem
    assert step.graphs == {}


def test_out_of_memory_in_evaluation(run):
    class Hungry(nn.Module):
        def forward(self, x):
            return torch.empty(2**60)

    with pytest.raises(utils.UsageError, match="batches of 64: try a batch size of 32"):
        utils.evaluate(Hungry(), utils.Batches(victim.toy(), 64, run), run)


def test_other_errors_are_not_disguised(tmp_path):
    def broken(loss):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        victim.fit(tmp_path, loss=fails_at(2, 2, broken))


# ---- the disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_a_full_disk_keeps_the_checkpoint_before(uninterrupted, tmp_path, tally):
    """The file that is written beside the checkpoint leads to a device that is always full."""
    stopped(tmp_path, 3)
    before = (tmp_path / "toy.pt").read_bytes()
    (tmp_path / "toy.pt.partial").symlink_to("/dev/full")
    with pytest.raises(utils.UsageError, match="epoch 4 could not be written .*No space left"):
        victim.fit(tmp_path)
    assert (tmp_path / "toy.pt").read_bytes() == before
    assert not (tmp_path / "toy.pt.partial").is_symlink()
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are POSIX")
def test_a_quota_keeps_the_checkpoint_before(uninterrupted, tmp_path, tally):
    resource = pytest.importorskip("resource")
    stopped(tmp_path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(utils.UsageError, match="File too large.*epoch 3's is kept"):
            victim.fit(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, tally):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", "/proc/here")[: 2 if os.name == "posix" else 1]:
        with pytest.raises(utils.UsageError, match="cannot be written to .*CHECKPOINT_DIR"):
            victim.fit(folder, loss=fails_at(1, 1, lambda loss: pytest.fail("it trained")))
        tally.add("faults")


@pytest.mark.parametrize(
    ("number", "times", "passes"),
    [
        (5, 2, True),
        (32, 2, True),
        (5, 3, False),
        (None, 1, False),
    ],  # Windows' numbers; None: another system
)
def test_what_is_open_in_windows_is_renamed_once_it_is_closed(
    number, times, passes, tmp_path, monkeypatch, tally
):
    busy, rename = PermissionError(errno.EACCES, "Access is denied"), Path.replace
    busy.winerror = number
    problems = times * [busy]

    def replace(path, new):
        if problems:
            raise problems.pop()
        return rename(path, new)

    files.write_whole(tmp_path / "kept", b"old")
    monkeypatch.setattr(files, "RENAME_PAUSES", (0.001, 0.001))
    monkeypatch.setattr(Path, "replace", replace)
    with contextlib.nullcontext() if passes else pytest.raises(PermissionError):
        files.write_whole(tmp_path / "kept", b"new")
    assert (tmp_path / "kept").read_bytes() == (b"new" if passes else b"old")
    tally.add("faults")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_told_before_training(tmp_path, tally):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    with pytest.raises(utils.UsageError, match="Permission denied.*CHECKPOINT_DIR"):
        victim.fit(folder)
    tally.add("faults")


def test_a_read_only_disk_is_told_before_training(tmp_path, monkeypatch, tally):
    def refuse(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(utils.UsageError, match="Read-only file system.*CHECKPOINT_DIR"):
        victim.fit(tmp_path, loss=fails_at(1, 1, lambda loss: pytest.fail("it trained")))
    tally.add("faults")


# ---- stopping early


@pytest.fixture
def rarely(monkeypatch):
    """Checkpoints as on a GPU with short epochs: the first epoch of a session, and the last."""
    original = checkpoints.Checkpoint.__init__

    def init(self, path, resume=True, every=0.0):
        original(self, path, resume, every=1e9)

    monkeypatch.setattr(checkpoints.Checkpoint, "__init__", init)


def test_rare_saves_change_nothing_but_where_a_run_goes_on(
    uninterrupted, rarely, tmp_path, tally, capsys
):
    history, _ = victim.fit(tmp_path, loss=fails_at(4, 7, interrupt))
    assert len(history) == 1
    assert "Stopped. To go on after epoch 1, run this again." in capsys.readouterr().out
    with pytest.raises(utils.UsageError, match="epoch 5, step 3 .* still holds epoch 2: lower"):
        victim.fit(tmp_path, loss=fails_at(4, 3, lambda loss: loss * float("nan")))  # from epoch 2
    tally.add("faults", survived=victim.fit(tmp_path)[1] == uninterrupted)
    assert "Found 2 of 6 epochs" in capsys.readouterr().out
    victim.fit(tmp_path)
    assert "Found 6 of 6 epochs" in capsys.readouterr().out


def test_a_plateau_is_saved_however_rare_saves_are(rarely, tmp_path, monkeypatch):
    scores = iter([50.0, 60.0, 55.0, 58.0])
    monkeypatch.setattr(utils, "evaluate", lambda *arguments: next(scores))
    assert len(victim.fit(tmp_path, patience=2)[0]) == 4
    assert len(victim.fit(tmp_path, patience=2)[0]) == 4


def test_a_plateau_is_a_best_score_that_is_old():
    scores = 50.0, 60.0, 55.0, 60.0  # an equal one is no improvement
    history = utils.History((n, 1.0, 1.0, 50.0, score, 1.0) for n, score in enumerate(scores, 1))
    history.planned = 6
    assert history.finished(2) and not history.finished(3) and not history.finished()
    history.planned = 4
    assert history.finished() and history.finished(3)
    started = utils.History()
    started.planned = 1
    assert not started.finished(1)


def test_training_stops_at_a_plateau_and_stays_stopped(tmp_path, monkeypatch):
    scores = iter([50.0, 60.0, 55.0, 58.0, 59.0, 70.0])
    monkeypatch.setattr(utils, "evaluate", lambda *arguments: next(scores))
    history, _ = victim.fit(tmp_path, patience=2)
    assert [e.validation_accuracy for e in history] == [50.0, 60.0, 55.0, 58.0]
    assert not history.stopped  # by anyone
    assert len(victim.fit(tmp_path, patience=2)[0]) == 4
    assert len(victim.fit(tmp_path)[0]) == 6  # off by default: the rest is trained
