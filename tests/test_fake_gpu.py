"""Training steps on a GPU that is not there: torch's fake tensors have a device, and no data.

They refuse what a recording as a CUDA graph would: to mix devices, and to ask for a value. The step
is `utils.train`'s own, but for the backward pass, which is torch's alone and can't be faked without
a driver: zeros are the gradients.
"""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

import graphs
import recipes
import tables
import utils
from benchmarks import steps

GPU = torch.device("cuda", 0)


old = torch.__version__.startswith("2.6.")
pytestmark = [
    pytest.mark.skipif(old, reason="this torch asks for a CUDA driver"),
    pytest.mark.filterwarnings("ignore:CUDA is not available"),  # so autocast is off
]


@pytest.fixture
def fake(run, monkeypatch):
    """Settings of a GPU that multiplies bfloat16, inside the mode that fakes it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(utils.Dataset, "__post_init__", lambda self: None)  # asks for values
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield dataclasses.replace(run, device=GPU, precision=torch.bfloat16, graphs=True)


@pytest.fixture
def recorded(monkeypatch):
    """The step that `utils.train` hands over to be recorded; autocast is off without CUDA."""

    def keep(step, *rest):
        kept.append(step)
        raise InterruptedError  # before the first batch

    def the_step(model, optimizer, batches, run, schedule=None, loss=F.cross_entropy):
        def backward(loss):
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        with pytest.raises(InterruptedError):
            utils.train(model, optimizer, batches, batches, 1, run, schedule, loss)
        return kept.pop()

    kept = []
    monkeypatch.setattr(utils, "captured", keep)
    for name in ("check_fit", "Progress"):  # which ask for values, before the loop
        monkeypatch.setattr(utils, name, lambda *parts: None)
    return the_step


@pytest.fixture
def case(name):
    return steps.cases()[name]


@pytest.fixture
def noise(case):
    """A batch and a half for a case: made before the mode, for scenes are made by their values."""
    return steps.noise(3 * case.batch_size // 2, case.shape, case.pixels)


@pytest.mark.parametrize("name", tables.WHAT)
def test_a_step_stays_on_the_device(case, noise, fake, recorded):
    with GPU:
        model = case.make().train()
    if case.muon:
        optimizer = recipes.Muon(model)
    else:  # the notebooks' is fused, which torch can't fake
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    statistics = [[0.5] * case.shape[0], [0.25] * case.shape[0]]
    batches = case.batches(noise, case.batch_size, fake, statistics, shuffle=True, **case.options)
    schedule = recipes.linear_decay(optimizer, batches, 1)
    assert graphs.replayable(optimizer, schedule)
    step, seen = recorded(model, optimizer, batches, fake, schedule, case.loss), []
    graphs.settle(optimizer, replayed=True)
    for images, labels in batches:
        assert images.device == labels.device == GPU
        step(images, labels)
        schedule.step()
        seen.append(len(images))
    assert seen == [case.batch_size, case.batch_size // 2]
    assert all(group["lr"].device == GPU for group in optimizer.param_groups)
    averages = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert averages and {value.device for value in averages} == {GPU}


def test_what_a_recording_would_refuse_is_refused_here(fake, recorded):
    with GPU:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    graphs.settle(optimizer, replayed=True)

    def asks(logits, labels, ignore_index):
        return logits.mean() * logits.mean().item()

    def mixes(logits, labels, ignore_index):
        return (logits + torch.zeros(3, 2)).mean()

    with pytest.raises(DataDependentOutputException):
        recorded(model, optimizer, [], fake, loss=asks)(images, labels)
    with pytest.raises(RuntimeError, match="devices"):
        recorded(model, optimizer, [], fake, loss=mixes)(images, labels)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_counts_of_steps_lie_where_the_optimizer_reads_them(fake, fused, replayed):
    weight = torch.nn.Parameter(torch.zeros(2, device=GPU))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    optimizer.state[weight]["step"] = torch.zeros((), device="cpu" if replayed else GPU)
    graphs.settle(optimizer, replayed)
    where = GPU if fused or replayed else torch.device("cpu")
    assert optimizer.state[weight]["step"].device == where


@pytest.mark.parametrize("name", ["segmentation-2"])
def test_muon_steps_on_a_gpu_that_has_float16_alone(case, fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with GPU:
        model = case.make()
    optimizer = recipes.Muon(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # ordinary: a T4's steps are not replayed
    assert recipes.orthogonal(torch.zeros(3, 4, 5, device=GPU)).dtype == torch.float16
