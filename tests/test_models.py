"""The six models are the write-up's, as the notebooks define them."""

import pytest
import torch
from torch import nn

import report


def convolutions(model):
    """(in, out) channels of the 3x3 convolutions that stand in no ResBlock, in order."""
    inside = {m for block in model.modules() if is_block(block) for m in block.modules()}
    return [
        (m.in_channels, m.out_channels)
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and m not in inside and m.kernel_size == (3, 3)
    ]


def is_block(module):
    return type(module).__name__ == "ResBlock"


def blocks(model):
    return [m for m in model.modules() if is_block(m)]


def test_mnist_has_four_convolutions(classification):
    model = classification.MnistCNN()
    assert convolutions(model) == [(1, 64), (64, 128), (128, 256), (256, 512)]
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 3
    assert not blocks(model)
    assert model(torch.zeros(16, 1, 28, 28)).shape == (16, 10)


def test_cifar_has_a_block_between_the_convolutions(classification):
    model = classification.CifarResNet()
    assert convolutions(model) == [(3, 64), (64, 128), (128, 256), (256, 512)]
    assert len(blocks(model)) == 3
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 3
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "arguments, skips", [((8, 8), False), ((8, 16), True), ((8, 8, 2), True), ((8, 16, 2), True)]
)
def test_the_skip_has_a_convolution_only_where_size_or_channels_change(
    classification, arguments, skips
):
    block = classification.ResBlock(*arguments)
    assert len(convolutions_of(block.path)) == 2
    assert [m.kernel_size for m in convolutions_of(block.skip)] == ([(1, 1)] if skips else [])
    stride = arguments[2] if len(arguments) > 2 else 1
    assert block(torch.zeros(2, 8, 12, 12)).shape == (2, arguments[1], 12 // stride, 12 // stride)


def convolutions_of(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def test_a_block_adds_its_path_to_its_input(classification):
    block = classification.ResBlock(8, 8).eval()
    nn.init.zeros_(block.path[-1].weight)  # the path's last batch normalisation
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x.relu())


def test_both_notebooks_define_the_same_block(classification, segmentation):
    block, other = (notebook.ResBlock(4, 6, 2) for notebook in (classification, segmentation))
    x = torch.randn(2, 4, 8, 8)
    other.load_state_dict(block.state_dict())
    assert torch.equal(block(x), other(x))


def test_the_best_on_digits_normalises_five_convolutions(classification):
    model = classification.DigitNet()
    assert convolutions(model) == [(1, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 5
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 2
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("length", [2, 3])
def test_convolutions_move_into_the_paths(classification, length):
    model = classification.in_paths(4, 10, length)
    paths = [m for m in model.modules() if isinstance(m, classification.LongBlock)]
    assert [len(convolutions_of(block.path)) for block in paths] == 3 * [length]
    inside = sum(len(convolutions_of(block)) for block in paths)
    assert len(convolutions_of(model)) - inside == 2  # the first convolution and the fourth
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    for block in paths:
        nn.init.zeros_(block.path[-1].weight)
        x = torch.randn(2, block.path[0].in_channels, 6, 6)
        assert torch.equal(block.eval()(x), block.skip(x).relu())


def test_each_rung_adds_to_the_one_before(segmentation):
    rungs = [layers(width=2) for layers in segmentation.LADDER.values()]
    count = [
        (sum(isinstance(m, nn.Conv2d) for m in rung), sum(map(is_block, rung))) for rung in rungs
    ]
    assert count == [(4, 3), (6, 4), (8, 5), (10, 6)]
    for smaller, larger in zip(rungs, rungs[1:], strict=False):
        assert list(map(repr, larger[: len(smaller)])) == list(map(repr, smaller))


def test_the_ladder_labels_every_pixel_and_stays_affordable(segmentation):
    costs = []
    for layers in segmentation.LADDER.values():
        small = segmentation.Segmenter(layers, 4)
        assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 20, 32, 32)
        costs.append(report.multiply_adds(segmentation.Segmenter(layers), (3, 32, 32)))
    assert costs == sorted(costs) and costs[-1] < 2.5e9


def test_width_scales_every_model(classification, segmentation):
    for model in (classification.MnistCNN, classification.CifarResNet):
        assert report.parameters(model(8)) < report.parameters(model()) / 40
    for layers in segmentation.LADDER.values():
        small, full = segmentation.Segmenter(layers, 8), segmentation.Segmenter(layers)
        assert report.parameters(small) < report.parameters(full) / 40


@pytest.mark.parametrize("skips", [True, False])
def test_a_decoder_without_skips_is_handed_zeros(segmentation, skips):
    model, handed = segmentation.SkipNet(4, skips=skips).eval(), []
    for join in model.join:
        join.register_forward_pre_hook(lambda layer, inputs: handed.append(inputs[0]))
    model(torch.randn(2, 3, 32, 32))
    for both in handed:  # what came up from coarser maps, then what the encoder saw
        up, fine = both.chunk(2, dim=1)
        assert up.any() and bool(fine.any()) == skips
    assert [both.shape[1:] for both in handed] == [(32, 8, 8), (16, 16, 16), (8, 32, 32)]


def test_multiply_adds_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert report.multiply_adds(model, (3, 6, 6)) == 36 * 9 * 3 * 8 + 8 * 36 * 5


@pytest.mark.parametrize(
    "layers, field",
    [
        ([nn.Conv2d(3, 4, 3, padding=1)], 3),
        ([nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)], 5),
        ([nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)], 8),
        ([nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1)], 12),
    ],
)
def test_the_receptive_field_is_the_known_one(layers, field):
    assert report.receptive_field(nn.Sequential(*layers), size=64) == field


def test_a_trained_model_has_the_same_receptive_field():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(100.0)  # at which nothing would pass the ReLU
    layers = nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    assert report.receptive_field(nn.Sequential(*layers), size=64) == 5
    assert norm.running_mean.tolist() == [100.0] * 4
