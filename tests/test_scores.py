"""The scores are those of torchmetrics and scikit-learn, ignored pixels and absent classes too."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as metrics
from torch import nn

import report
import utils


class Answers(nn.Module):
    """A model that gives prepared logits, one batch after the other."""

    def __init__(self, logits, batch_size):
        super().__init__()
        self.batches = iter(logits.split(batch_size))

    def forward(self, x):
        return next(self.batches)


def maps(classes=6, absent=(), seed=0):
    """Random label maps (50, 8, 8) with ignored pixels, and logits that are often right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (50, 8, 8), generator=generator)
    for c in absent:
        labels[labels == c] = 0
    logits = torch.randn(50, classes, 8, 8, generator=generator)
    logits += 2 * nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2)
    logits[:, list(absent)] = -100.0
    labels[torch.rand(50, 8, 8, generator=generator) < 0.1] = utils.IGNORE
    images = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    names = tuple(map(str, range(classes)))
    return utils.Dataset("maps", "sample", images, labels, names), logits


def scored(dataset, logits, run):
    batches = utils.Batches(dataset, 16, run, ([0.0] * 3, [1.0] * 3))
    return utils.evaluate_pixels(Answers(logits, 16), batches, len(dataset.classes), run)


@pytest.mark.parametrize("absent", [(), (3,), (1, 5)])
def test_class_scores_agree_with_torchmetrics_and_scikit_learn(run, absent):
    dataset, logits = maps(absent=absent)
    scores, predictions = scored(dataset, logits, run), logits.argmax(1)
    kept = dataset.labels != utils.IGNORE
    truth, prediction = dataset.labels[kept].numpy(), predictions[kept].numpy()
    present = [c for c in range(6) if c not in absent]

    confusion = sklearn.metrics.confusion_matrix(truth, prediction, labels=range(6))
    assert np.array_equal(scores.confusion.numpy(), confusion)
    assert scores.accuracy == pytest.approx(100 * sklearn.metrics.accuracy_score(truth, prediction))
    iou = sklearn.metrics.jaccard_score(truth, prediction, labels=present, average=None)
    assert scores.class_iou[present].tolist() == pytest.approx((100 * iou).tolist())
    recall = sklearn.metrics.recall_score(truth, prediction, labels=present, average=None)
    assert scores.class_accuracy[present].tolist() == pytest.approx((100 * recall).tolist())

    common = dict(num_classes=6, ignore_index=utils.IGNORE)
    theirs = metrics.multiclass_jaccard_index(predictions, dataset.labels, average="none", **common)
    assert scores.mean_iou == pytest.approx(100 * theirs[present].mean().item(), rel=1e-5)
    accuracy = metrics.multiclass_accuracy(predictions, dataset.labels, average="micro", **common)
    assert scores.accuracy == pytest.approx(100 * accuracy.item(), rel=1e-5)


def test_an_absent_class_is_nan_and_left_out_of_the_mean(run):
    scores = scored(*maps(absent=(3,)), run)
    assert scores.class_iou.isnan().tolist() == [c == 3 for c in range(6)]
    assert scores.mean_iou == pytest.approx(np.nanmean(scores.class_iou.numpy()))


def test_digits_and_backgrounds_are_scored_apart():
    """Ten pixels: two of a digit, of which one is found, and eight of two backgrounds."""
    confusion = torch.tensor([[1, 1, 0], [0, 4, 1], [0, 0, 3]])
    scores = utils.class_scores(confusion)
    facts = report.pixel_facts(scores, ("digit 0", "sea", "sky"))
    assert facts["majority"] == pytest.approx(50) and facts["mean_iou"] == scores.mean_iou
    assert facts["digits"] == pytest.approx(dict(share=20, accuracy=50, mean_iou=50))
    of_both = (100 * 4 / 6 + 100 * 3 / 4) / 2
    assert facts["backgrounds"] == pytest.approx(dict(share=80, accuracy=87.5, mean_iou=of_both))
    text = report.describe_pixels(scores, ("digit 0", "sea", "sky"))
    assert text.startswith("80.00% of pixels") and "digits, 20.0% of all: 50.00% right" in text
    both = "baselines: 50.0%, the commonest class everywhere; 80.0%, every background right and "
    assert report.baselines(facts) == f"{both}no digit found"
    for classes in (("sky", "sea", "land"), ("digit 0", "digit 1", "digit 2")):
        alike = report.pixel_facts(scores, classes)  # of one kind
        assert alike == dict(mean_iou=scores.mean_iou, majority=facts["majority"])
        assert report.baselines(alike) == "baselines: 50.0%, the commonest class everywhere"


def test_a_class_that_is_only_predicted_counts_as_nought():
    scores = utils.class_scores(torch.tensor([[5, 5], [0, 0]]))
    assert scores.class_iou.tolist() == [50.0, 0.0] and scores.mean_iou == 25.0
    assert scores.class_accuracy[0] == 50.0 and scores.class_accuracy[1].isnan()


@pytest.mark.parametrize(
    "labels, predictions, sentence",
    [
        ([0, 3], [1, 1], "The labels: 1 labels are out of range 0 to 1, 3 for one"),
        ([0, 1], [1, 3], "Predictions must be classes, 0 to 1"),
        ([0, 255], [1, -1], None),  # an ignored pixel's prediction is nobody's
    ],
)
def test_a_confusion_matrix_has_no_room_for_other_classes(labels, predictions, sentence):
    refusal = pytest.raises(utils.UsageError, match=sentence) if sentence else nullcontext()
    with refusal:
        counts = utils.confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 2)
        assert counts.tolist() == [[0, 1], [0, 0]]


def test_share_of_correct_pixels_is_the_same_either_way(run):
    dataset, logits = maps()
    batches = utils.Batches(dataset, 16, run, ([0.0] * 3, [1.0] * 3))
    assert (
        utils.evaluate(Answers(logits, 16), batches, run) == scored(dataset, logits, run).accuracy
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_model_is_scored_in_the_runs_precision(run, precision):
    dataset, seen = maps()[0], []
    model = nn.Conv2d(3, 6, 1)
    model.register_forward_hook(lambda layer, inputs, out: seen.append(out.dtype))
    batches = utils.Batches(dataset, 50, run, ([0.0] * 3, [1.0] * 3))
    reduced = replace(run, precision=precision)
    utils.evaluate(model, batches, reduced)
    utils.evaluate_pixels(model, batches, 6, reduced)
    utils.predict(model, batches, reduced)
    assert seen == [precision] * 3


def test_share_of_correct_images(run):
    labels, logits = torch.arange(50) % 10, torch.randn(50, 10)
    images = torch.zeros(50, 1, 8, 8, dtype=torch.uint8)
    dataset = utils.Dataset("ten", "sample", images, labels, tuple(map(str, range(10))))
    batches = utils.Batches(dataset, 16, run, ([0.0], [1.0]))
    expected = 100 * sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert utils.evaluate(Answers(logits, 16), batches, run) == pytest.approx(expected)
    predictions, probabilities = utils.predict(Answers(logits, 16), batches, run)
    assert torch.equal(predictions, logits.argmax(1))
    torch.testing.assert_close(probabilities, logits.softmax(1).amax(1))
