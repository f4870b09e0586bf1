"""What makes training fast changes nothing but the time: each speed-up against doing without it."""

import contextlib
import dataclasses
import math
import random
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import graphs
import recipes
import utils
from settings import best_precision


@pytest.fixture(scope="module")
def digits():
    quick = utils.settings(environ={"PROFILE": "quick"})
    training, test = utils.load_mnist(quick)
    return training, test


def some(digits):
    """A thousand training digits, mixed: they lie class by class."""
    return digits[0].subset(torch.randperm(4000, generator=utils.generator(0))[:1000])


def losses(run, model, digits, epochs=2, loader=None, fused=True, channels_last=True):
    """The losses of a small model's epochs, with a speed-up or without."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model = model(4).to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, fused=fused)
    batches = loader or utils.Batches(some(digits), 50, run)
    validation = utils.Batches(digits[1], 500, run)
    history = utils.train(model, optimizer, batches, validation, epochs, run)
    assert history[-1].loss < 0.8 * history[0].loss  # or there would be little to compare
    return [e.loss for e in history]


def test_batches_made_on_the_device(run, classification, digits):
    training = some(digits)
    mean, std = training.statistics()
    images = (training.images.float() / 255 - mean[0]) / std[0]
    loader = DataLoader(TensorDataset(images, training.labels), batch_size=50)
    model = classification.DigitNet
    ours, theirs = losses(run, model, digits), losses(run, model, digits, loader=loader)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_batches_made_together(run, digits):
    options = dict(run=run, shuffle=True, flip=True, shift=3)
    single, several = (utils.Batches(digits[0], 150, **options) for _ in range(2))
    several.together = 4
    for (x, y), (images, labels) in zip(single, several, strict=True):
        assert torch.equal(x, images) and torch.equal(y, labels)
        assert images.stride() == x.stride()


def test_channels_last(run, classification, digits):
    model = classification.DigitNet
    plain = losses(run, model, digits, channels_last=False)
    assert losses(run, model, digits) == pytest.approx(plain, rel=1e-3)


def test_fused_optimiser(run, classification, digits):
    model = classification.DigitNet
    assert losses(run, model, digits) == pytest.approx(
        losses(run, model, digits, fused=False), rel=1e-3
    )


def test_bfloat16_reaches_the_same_loss(run, classification, digits):
    reduced = dataclasses.replace(run, precision=torch.bfloat16)
    model = classification.DigitNet
    exact = losses(run, model, digits)
    rounded = losses(reduced, model, digits)
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != exact  # it was really used


def test_large_batches_score_as_small_ones_do(run, classification, digits):
    torch.manual_seed(0)
    model = classification.MnistCNN(8)
    batches = utils.Batches(digits[0], 16, run, shuffle=True)
    utils.train(model, torch.optim.AdamW(model.parameters(), 1e-3), batches, batches, 1, run)
    scores = {
        utils.evaluate(model, utils.Batches(digits[1], size, run), run) for size in (16, 128, 1000)
    }
    assert len(scores) == 1 and scores.pop() > 30  # it has learned to tell digits apart


@pytest.mark.skipif(
    best_precision(torch.device("cpu")) != torch.bfloat16,
    reason="this CPU emulates bfloat16, which takes minutes",
)
def test_bfloat16_costs_three_tenths_of_a_point_at_most_beyond_chance(run, classification, digits):
    """Mean over five seeds, on the sample's 1,000 test digits; two standard errors are chance."""
    accuracy = {torch.float32: [], torch.bfloat16: []}
    for precision, scores in accuracy.items():
        settings = dataclasses.replace(run, precision=precision)
        for seed in range(5):
            torch.manual_seed(seed)
            model = classification.MnistCNN(8).to(memory_format=torch.channels_last)
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
            batches = utils.Batches(digits[0], 64, settings, shuffle=True, seed=seed)
            validation = utils.Batches(digits[1], 500, settings, digits[0].statistics())
            schedule = utils.one_cycle(optimizer, batches, 5, 3e-3)
            history = utils.train(model, optimizer, batches, validation, 5, settings, schedule)
            scores.append(history[-1].validation_accuracy)
    exact, reduced = accuracy.values()
    assert statistics.mean(exact) > 95 and statistics.mean(reduced) > 95  # whatever the spread
    gains = [b - a for a, b in zip(exact, reduced, strict=True)]
    chance = 2 * statistics.stdev(gains) / math.sqrt(5)
    assert statistics.mean(gains) >= -0.3 - chance, accuracy


class FakeStream:
    def wait_stream(self, other):
        pass


def test_a_captured_step_sees_every_batch(monkeypatch):
    """The recording's bookkeeping, with graphs that replay on the CPU: not a test of CUDA."""
    seen, tapes, recorded = [], {}, []

    class Graph:
        def replay(self):
            images, labels = tapes[self]
            seen.append((images.clone(), labels.clone()))

    @contextlib.contextmanager
    def recording(graph, **options):
        recorded.append(graph)
        yield
        recorded.append(None)

    def step(images, labels):
        if recorded and recorded[-1]:
            tapes[recorded[-1]] = images, labels  # recorded, not run
        else:
            seen.append((images.clone(), labels.clone()))

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], 0.1)
    graphs.settle(optimizer, replayed=True)
    captured, rate = graphs.CapturedStep(step, optimizer), optimizer.param_groups[0]["lr"]
    sizes = [4, 4, 4, 4, 2, 4, 6, 6, 6, 6, 4, 6]  # a short one, and images that have grown
    batches = [
        (torch.full((n, 1), place), torch.full((n,), place)) for place, n in enumerate(sizes)
    ]
    for place, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.1 * place  # as a schedule may
        captured(*batch)
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(0.1 * place)
    assert len(tapes) == 2 and len(seen) == len(batches)
    for (images, labels), (x, y) in zip(seen, batches, strict=True):
        assert torch.equal(images, x) and torch.equal(labels, y)


def test_a_step_is_no_longer_replayed_once_what_it_was_recorded_with_has_changed(monkeypatch):
    """A recording would keep the momentum and the weight decay that it was made with."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], 0.1)
    graphs.settle(optimizer, replayed=True)
    ran, replayed = [], SimpleNamespace(replay=lambda: ran.append("replayed"))
    captured = graphs.CapturedStep(lambda images, labels: ran.append("run"), optimizer)
    monkeypatch.setattr(captured, "record", lambda *batch: (replayed, *batch))
    batch, (group,) = (torch.zeros(4, 1), torch.zeros(4)), optimizer.param_groups
    for step in range(12):
        group["lr"] = 0.1 * step  # a rate is no reason
        if step == 6:
            group["weight_decay"] = 0.3
        captured(*batch)
    assert ran == 3 * ["run"] + 3 * ["replayed"] + 6 * ["run"]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()), None])
def test_a_step_that_draws_on_the_cpu_is_not_replayed(draw, monkeypatch):
    """A replay would repeat the one draw of the recording."""
    monkeypatch.setattr(torch.cuda, "graph", lambda *parts, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    captured = object.__new__(graphs.CapturedStep)
    captured.step, captured.pool = lambda images, labels: draw and draw(), None
    refusal = pytest.raises(utils.UsageError, match="draws random numbers on the CPU")
    with refusal if draw else contextlib.nullcontext():
        captured.record(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (RuntimeError("not permitted"), utils.UsageError, r"\(not permitted\): restart"),
        (torch.OutOfMemoryError("as it is"), torch.OutOfMemoryError, "as it is"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError, "^CUBLAS_STATUS_ALLOC_FAILED$"),
        (KeyboardInterrupt("as it is"), KeyboardInterrupt, "as it is"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_named(error, raised, words, monkeypatch):
    """The recording's own end hides why; its stream is left, whatever happens."""
    streams = ["first"]

    @contextlib.contextmanager
    def recording(graph, **options):
        streams.append("recording")
        try:
            yield
        except BaseException:
            raise RuntimeError("capture_end failed")  # noqa: B904

    def step(images, labels):
        raise error

    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    captured = object.__new__(graphs.CapturedStep)
    captured.step, captured.pool = step, None
    with pytest.raises(raised, match=words):
        captured.record(torch.zeros(1), torch.zeros(1))
    assert streams == ["first", "recording", "first"]


def test_only_a_step_that_reads_the_device_is_replayed():
    weight = torch.nn.Parameter(torch.zeros(2))
    adamw = torch.optim.AdamW([weight], 0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    assert graphs.replayable(adamw, None)
    assert graphs.replayable(adamw, utils.one_cycle(adamw, [1], 9, 1))
    turning = cycle(adamw, 1, total_steps=9)  # the momentum, too
    assert not graphs.replayable(adamw, turning)
    both = torch.optim.lr_scheduler.ChainedScheduler([turning], adamw)
    assert not graphs.replayable(adamw, both)
    sgd = torch.optim.SGD([weight], 0.1)  # reads its rate in Python
    assert not graphs.replayable(sgd, None)
    assert graphs.captured(seen := object(), sgd, None, wanted=True) is seen


def test_an_optimizer_goes_on_with_graphs_and_without():
    weight = torch.nn.Parameter(torch.ones(2))
    groups = [dict(params=[]), dict(params=[weight])]
    optimizer = torch.optim.AdamW(groups, 0.1)
    weight.square().sum().backward()
    optimizer.step()
    graphs.settle(optimizer, replayed=True)
    for group in optimizer.param_groups:
        assert group["capturable"] and group["lr"].dtype == torch.float32
    saved = optimizer.state_dict()  # as a checkpoint of a GPU has it
    other = torch.optim.AdamW([dict(params=[]), dict(params=[weight])], 0.1)
    other.load_state_dict(saved)
    with pytest.raises(AssertionError, match="capturable"):
        other.step()  # on a CPU
    graphs.settle(other, replayed=False)
    other.step()
    group = other.param_groups[1]
    assert not group["capturable"] and group["lr"] == pytest.approx(0.1)
    assert other.state[weight]["step"] == 2


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


@ON_CUDA
@pytest.mark.parametrize("muon", [False, True])
def test_replayed_graphs_learn_as_ordinary_steps_do(classification, digits, muon, monkeypatch):
    """On a GPU: 20 steps of full batches and a short one each epoch, which some atomics blur."""
    losses, replays, replay = {}, [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph)
    )
    for replayed in (False, True):
        run = utils.settings(graphs=replayed, environ={"PROFILE": "quick"})
        torch.manual_seed(0)
        model = classification.DigitNet(8) if muon else classification.MnistCNN(8)
        model = model.to(run.device, memory_format=torch.channels_last)
        if muon:
            optimizer = recipes.Muon(model)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), 5e-3, fused=True)
        batches = utils.Batches(some(digits), 49, run, shuffle=True)
        schedule = recipes.linear_decay(optimizer, batches, 5)
        validation = utils.Batches(digits[1], 500, run)
        history = utils.train(model, optimizer, batches, validation, 5, run, schedule)
        losses[replayed] = [e.loss for e in history]
        assert (len(replays) > 50) == run.graphs  # never in float16
    # on a CPU, losses from weights 1e-7 apart end up to 0.15 apart
    assert losses[True] == pytest.approx(losses[False], rel=0.3)
    assert losses[True][-1] < losses[True][0] / 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_stacked_filters_step_as_single_ones_do(device, segmentation, monkeypatch):
    def of_one_shape(self):  # as on a GPU
        shapes = dict.fromkeys(w.shape for w in self.filters)
        return [[w for w in self.filters if w.shape == shape] for shape in shapes]

    steps = []
    first = recipes.Muon.stacks if device == "cuda" else of_one_shape
    for stacks in (first, lambda self: [[w] for w in self.filters]):
        monkeypatch.setattr(recipes.Muon, "stacks", stacks)
        torch.manual_seed(0)
        model = segmentation.Segmenter(segmentation.fourth, 16).to(device)
        optimizer = recipes.Muon(model)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        before = [weight.clone() for weight in optimizer.filters]
        optimizer.step()
        steps.append([w - b for w, b in zip(optimizer.filters, before, strict=True)])
    for one, other in zip(*steps, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()  # bfloat16's rounding
