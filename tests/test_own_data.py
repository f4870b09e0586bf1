"""Your own pictures and scenes go through the notebooks without touching the code."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw

import colab
import owndata
import report
import settings
import trials
import utils
from checkpoints import Checkpoint
from conftest import ROOT, cell_with, export, run_python

ROADS = (
    "sky building pole road pavement tree sign fence car pedestrian bicyclist unlabelled".split()
)


def handwriting(folder, count=12):
    """Letters in folders: grey PNGs of several sizes, some of them colour JPEGs."""
    random = np.random.default_rng(0)
    for letter in "abc":
        (folder / letter).mkdir(parents=True)
        for number in range(count):
            side = int(random.integers(24, 60))
            image = Image.new("L", (side, side + 5), 255)
            ImageDraw.Draw(image).text((side // 3, side // 4), letter, fill=0)
            if number % 3 == 0:
                image.convert("RGB").save(folder / letter / f"{number}.jpg")
            else:
                image.save(folder / letter / f"{number}.png")
    return folder


def roads(folder, count=20, size=(48, 36)):
    """Road scenes in stripes of 12 classes, in two folders, with the names of the classes."""
    random = np.random.default_rng(0)
    colours = random.integers(256, size=(12, 3))
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        order = random.permutation(12)
        mask = order[np.arange(size[1]) * 12 // size[1]][:, None].repeat(size[0], 1)
        noise = random.integers(-20, 20, size=(size[1], size[0], 3))
        pixels = (colours[mask] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
        mask = mask.astype(np.uint8)
        mask[0, 0] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")
    (folder / "classes.txt").write_text("\n".join(ROADS) + "\n")
    return folder


def run_notebook(name, folder, questions=None, **environ):
    """A notebook as a script, one epoch, no threshold; returns what it printed."""
    export(name, folder, questions)
    settings = dict(PROFILE="quick", EPOCHS="1", THRESHOLD="0", MPLBACKEND="agg")
    environ = {**settings, "CHECKPOINT_DIR": str(folder / "kept"), **environ}
    return run_python(f"{name}.py", cwd=folder, **environ)


def test_handwriting_in_folders_takes_cifar10s_place(tmp_path):
    folder = handwriting(tmp_path / "letters")
    mine = dict(MY_PICTURE=str(folder / "a" / "1.png"), FLIP="0", RESUME="0")
    full = dict(PROFILE="full", DATA_DIR="/nowhere", THRESHOLD="")
    mine["PICTURES"] = str(folder)
    out = run_notebook("imageclassification", tmp_path, {"cifar10"}, **mine, **full)
    assert "letters (own): 23 images 3x32x32, labels of 3 classes" in out
    assert "images of each class: a: " in out and "letters: batches of 8, 1 epoch\n" in out
    printed = [line for line in out.splitlines() if "CIFAR" in line and "epochs of" not in line]
    assert not printed and re.search(r"\nletters +\d+\.\d\d +none set +1 epoch, trained now", out)
    records = {r["run"]: r for r in report.load_records(tmp_path / "figures" / "own")}
    assert records["pictures"]["source"] == "own" and records["pictures"]["dataset"] == "letters"
    assert records["pictures"]["augmentation"] == "flip False, shift 4"
    assert all(record["augmentation"].startswith("flip False") for record in records.values())
    assert records["mnist"]["source"] == "sample"  # in the full profile, too
    assert [f.name for f in (tmp_path / "figures").iterdir()] == ["own"]
    assert (tmp_path / "kept" / "own" / "letters" / "pictures.pt").exists()


def test_road_scenes_take_the_place_of_digits_on_pictures(tmp_path):
    mine = dict(SCENES=str(roads(tmp_path / "roads")), SIZE="40", FLIP="0")
    out = run_notebook("imagesegmentation", tmp_path, **mine)
    assert "roads (own): 13 images 3x40x40, label maps of 12 classes" in out
    assert "Segmentation: passed, or no threshold set" in out and "MNIST-on" not in out
    assert out.count("best on the validation set: segmentation-") == 2  # of the ladder, and of all
    records = report.load_records(tmp_path / "figures" / "own")
    assert len(records) == 5 and {record["dataset"] for record in records} == {"roads"}
    assert all(record["augmentation"].startswith("flip False") for record in records)


def test_pictures_are_resized_and_split(tmp_path):
    training, test = owndata.load_pictures(str(handwriting(tmp_path / "letters")), size=32)
    assert (len(training), len(test)) == (29, 7) and training.classes == ("a", "b", "c")
    assert training.images.shape[1:] == (3, 32, 32) and training.images.float().std() > 10
    for part in ("train", "test"):
        handwriting(tmp_path / "parts" / part, count=4)
    parts = owndata.load_pictures(tmp_path / "parts", size=32)
    assert [len(part) for part in parts] == [12, 12]


def test_masks_are_resized_to_the_nearest_label(tmp_path):
    training, test = owndata.load_scenes(str(roads(tmp_path / "roads")), size=24)
    assert (len(training), len(test)) == (16, 4) and training.classes == tuple(ROADS)
    assert training.images.shape[1:] == (3, 24, 24) and training.labels.shape[1:] == (24, 24)
    assert set(training.labels.unique().tolist()) <= {*range(12), 255}
    rows = training.labels[0, :, 5]
    assert (training.labels[0, 2:] == rows[2:, None]).all()  # stripes are still stripes
    (tmp_path / "roads" / "classes.txt").unlink()
    numbered = owndata.load_scenes(tmp_path / "roads", size=24)[0]
    assert numbered.classes == tuple(f"class {number}" for number in range(12))


def test_video_frames_of_another_shape_than_square(tmp_path):
    run = utils.settings(environ={"SCENES": str(roads(tmp_path / "roads", 5, (480, 360)))})
    training, test = utils.load_scenes(replace(run, size=64))
    assert (len(training), len(test)) == (4, 1) and training.classes == tuple(ROADS)
    assert training.images.shape[1:] == (3, 64, 64) and training.labels.shape[1:] == (64, 64)
    assert set(training.labels.unique().tolist()) >= set(range(12))


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(8, 8, 200), (49, 8, 164), (500, 25, 50), (2000, 100, 50), (50_000, 128, 10)],
)
def test_a_budget_of_about_a_thousand_steps(images, batch, epochs, run, capsys):
    pixels = torch.zeros(images, 1, 4, 4, dtype=torch.uint8)
    mine = utils.Dataset("mine", "own", pixels, torch.arange(images) % 2, ("a", "b"))
    assert run.budget(mine, 128, 16, 20) == [batch, epochs, epochs]
    assert f"mine: batches of {batch}, {epochs} epochs" in capsys.readouterr().out
    assert replace(run, epochs_cap=300).budget(mine, 128, 16) == [batch, 300]
    assert run.budget(replace(mine, source="full"), 128, 16, 20) == [128, 16, 20]


def test_own_data_has_no_threshold_unless_one_is_set(tmp_path):
    assert utils.settings(environ={"PICTURES": str(tmp_path)}).threshold(70.0) == 0
    mark = {"PICTURES": str(tmp_path), "THRESHOLD": "85"}
    assert utils.settings(environ=mark).threshold(70.0) == 85
    assert utils.settings(environ={"THRESHOLD": "100.0"}).threshold(70.0) == 100


def test_scenes_do_not_ungrade_the_notebook_that_has_none(tmp_path, monkeypatch):
    pictures, scenes = tmp_path / "letters", tmp_path / "roads"
    pictures.mkdir(), scenes.mkdir()
    both = {"PICTURES": str(pictures), "SCENES": str(scenes)}
    settings_cell = cell_with(
        "imageclassification.ipynb", "run = replace(utils.settings(), scenes=None)"
    )

    def classification(**variables):
        monkeypatch.setattr(utils, "settings", partial(settings.settings, environ=variables))
        exec(settings_cell, scope := {})
        return scope["run"]

    run = classification(PROFILE="quick", SCENES=str(scenes))
    assert run.threshold(70.0) == 70 and run.figures.name == "quick" and run.scenes is None
    run = classification(**both)
    assert run.checkpoint("pictures").path.parts[-3:] == ("own", "letters", "pictures.pt")
    assert run.digits.profile == "quick" and str(scenes) not in str(run)
    run = settings.settings(environ={**both, "PROFILE": "full"})
    assert run.checkpoint("segmentation-1").path.parts[-2] == "roads"
    assert str(scenes) in str(run) and str(pictures) not in str(run)
    assert run.digits.profile == "full"
    assert settings.settings(environ={"PICTURES": str(pictures)}).pictures == pictures


def test_digits_on_own_pictures_are_called_so(run, tmp_path):
    mine = replace(run, profile="full", pictures=handwriting(tmp_path / "letters"))
    training, test = utils.load_scenes(mine)
    assert training.name == "MNIST-on-letters" and len(training) == 29 and len(test) == 7


def test_the_second_notebook_puts_digits_on_own_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE", "quick")
    monkeypatch.setenv("PICTURES", str(handwriting(tmp_path / "letters")))
    monkeypatch.setattr(trials, "compare", lambda question, variants, *rest: asked.update(variants))
    asked = {}
    cells = report.notebook_definitions("imagesegmentation.ipynb", {"definition", "trials"})
    assert cells.scenes.name == "MNIST-on-letters" and cells.CLASSES == 13
    images, maps = next(iter(asked["made anew"].batches))
    assert images.shape[1:] == (3, 32, 32) and maps.max() >= 10


def test_another_ignore_index(tmp_path):
    folder = roads(tmp_path / "roads")
    pairs = folder / "images", folder / "masks"
    dataset = owndata.load_pairs(*pairs, "roads", ROADS[:11], ignore=11)
    assert 11 not in dataset.labels.unique() and (dataset.labels == 255).sum() > 20 * 48
    (folder / "classes.txt").write_text("\n".join([*ROADS[:11], "void"]))
    training, _ = owndata.load_scenes(folder, size=24)
    assert 11 not in training.labels.unique() and training.classes == tuple(ROADS[:11])


def test_what_is_void_is_no_class_wherever_its_name_stands():
    labels = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for ignore, expected in ((0, [255, 0, 1, 255]), (1, [0, 255, 1, 255]), (2, [0, 1, 255, 255])):
        for names in ("road", "car", "sky"), ():
            there = names or ("class 0", "class 1", "class 2")
            moved, classes = owndata._classes(labels, names, ignore)
            assert moved.flatten().tolist() == expected
            assert classes == there[:ignore] + there[ignore + 1 :]
            utils.Dataset("roads", "own", images, moved, classes)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("Straße\nsky".encode("cp1252"), "is not in UTF-8"), (b"sky\n\nroad\n", "an empty line 2")],
)
def test_names_of_classes_that_cannot_be_read(content, problem, tmp_path):
    (roads(tmp_path / "roads") / "classes.txt").write_bytes(content)
    with pytest.raises(utils.UsageError, match=problem):
        owndata.load_scenes(tmp_path / "roads")


def test_scenes_in_train_and_test(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        (roads(tmp_path / part, count) / "classes.txt").rename(tmp_path / "classes.txt")
    names = tmp_path / "classes.txt"
    names.write_text(names.read_text(), encoding="utf-8-sig")  # as Windows' editors do
    training, test = owndata.load_scenes(tmp_path, size=24)
    assert (len(training), len(test)) == (6, 3)
    assert training.classes == test.classes == tuple(ROADS)
    names.unlink()
    for path in (tmp_path / "test" / "masks").iterdir():  # whose highest class is another
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 11, 0, mask)).save(path)
    with pytest.raises(utils.UsageError, match="or for masks a classes.txt"):
        owndata.load_scenes(tmp_path, size=24)


def test_pictures_a_folder_too_deep_are_no_class(tmp_path):
    for part in ("train", "val"):
        handwriting(tmp_path / part, count=2)
    with pytest.raises(utils.UsageError, match="a is a folder in that of a class"):
        owndata.load_pictures(tmp_path, size=32)


def test_hidden_files_are_no_pictures(tmp_path):
    folder = handwriting(tmp_path / "letters", count=5)
    (folder / "a" / "._1.jpg").write_bytes(b"what macOS keeps beside a file")
    (folder / "a" / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "a" / "1.png", folder / "a" / ".ipynb_checkpoints" / "1-checkpoint.png")
    training, test = owndata.load_pictures(folder, size=32)
    assert len(training) + len(test) == 15


def test_a_torchvision_image_of_sixteen_bits_is_refused():
    deep = [(Image.fromarray(np.full((10, 12), 900, dtype=np.uint16)), 0)]
    with pytest.raises(utils.UsageError, match="image 0 can't be used: its mode I;16 is not 8"):
        owndata.from_torchvision(deep, "deep")


def test_a_torchvision_data_set_in_one_line():
    fake = torchvision.datasets.FakeData(10, (3, 50, 40), num_classes=4)
    dataset = owndata.from_torchvision(fake, "fake", tuple("abcd"), size=32)
    assert dataset.images.shape == (10, 3, 32, 32) and dataset.labels.shape == (10,)
    maps = [(image, Image.fromarray(np.eye(40, 50, dtype=np.uint8))) for image, _ in fake]
    scenes = owndata.from_torchvision(maps, "fake", size=32)
    assert scenes.labels.shape == (10, 32, 32) and scenes.classes == ("class 0", "class 1")
    fake.transform = torchvision.transforms.ToTensor()
    with pytest.raises(utils.UsageError, match="must yield PIL images .* not Tensor and int"):
        owndata.from_torchvision(fake, "fake")
    deep = Image.fromarray(np.zeros((40, 50), np.uint16))
    image = maps[0][0]
    for pairs, sentence in (
        ([(image, (1, deep))], "not Image and tuple"),
        ([(image, "cat")], "not Image and str"),
        ([(image, deep)], "masks must have one byte a pixel, not 2 axes of uint16"),
        ([maps[0], (image, 1)], "must yield classes alone, or masks alone"),
    ):
        with pytest.raises(utils.UsageError, match=sentence):
            owndata.from_torchvision(pairs, "fake", size=32)


def test_names_of_classes_may_be_an_array(tmp_path):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    names = np.array(["road", "car"])
    assert owndata.load_npz(tmp_path / "mine.npz", "mine", names).classes == ("road", "car")


def test_what_is_no_picture_is_left_out_aloud(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
        (tmp_path / name / "2.jfif").touch()
    assert len(owndata.load_folder(tmp_path, "mine")) == 2
    out = capsys.readouterr().out
    assert re.search(r"left out, not of a kind that is read: .*2\.jfif, and 1 more\n", out)


def test_a_name_that_no_folder_can_have_is_refused():
    with pytest.raises(utils.UsageError, match="PICTURES is 'xxx.*, which is no folder here"):
        utils.settings(environ={"PICTURES": "x" * 300})


def test_the_environment_sets_what_the_settings_cell_shows(tmp_path, monkeypatch):
    run = utils.settings(environ={"THRESHOLD": "85.5", "SCENES": str(tmp_path), "SIZE": "96"})
    assert run.threshold(70.0) == 85.5 and run.scenes == tmp_path and run.size == 96
    assert run.figures.name == "own" and str(tmp_path) in str(run)
    monkeypatch.chdir(tmp_path)
    assert utils.settings(environ={"SCENES": "."}).scenes == tmp_path  # which has a name
    run = utils.settings(environ={})
    assert run.threshold(70.0) == 70.0 and run.flip and run.resume and run.my_picture is None
    (tmp_path / "cat.png").touch()
    picture = {"MY_PICTURE": str(tmp_path / "cat.png"), "FLIP": "0", "RESUME": "0"}
    run = utils.settings(environ=picture)
    assert run.my_picture == tmp_path / "cat.png" and not run.flip and not run.resume
    assert "no image flipped" in str(run)


# ---- pictures of what a model does


def test_a_picture_of_your_own(shown, run, tmp_path, classification, segmentation):
    Image.new("RGBA", (300, 200), (200, 30, 30, 255)).save(tmp_path / "mine.png")
    names = tuple(f"class {number}" for number in range(10))
    torch.manual_seed(0)
    for channels, model in ((1, classification.MnistCNN(4)), (3, classification.CifarResNet(4))):
        side = 28 if channels == 1 else 32
        images = torch.zeros(2, channels, side, side, dtype=torch.uint8)
        images[1] = 255
        data = utils.Dataset("toy", "own", images, torch.tensor([0, 1]), names)
        report.show_prediction(model, tmp_path / "mine.png", data, data.statistics(), run)
        bars = shown[-1].axes[1].patches
        assert len(bars) == 5 and bars[0].get_width() >= bars[4].get_width() > 0
    model = segmentation.Segmenter(segmentation.first, 4, classes=10)
    report.show_prediction(model, tmp_path / "mine.png", data, data.statistics(), run)
    assert len(shown) == 3 and len(shown[-1].axes) == 3  # image, labels over it, labels


def test_a_picture_is_normalised_as_the_training_images_are(shown, run):
    class Bright(torch.nn.Module):
        def forward(self, x):
            mean = x.mean((1, 2, 3))
            return torch.stack([0 * mean, mean, -mean], 1)

    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    data = utils.Dataset("toy", "own", images, torch.tensor([0, 1]), ("none", "bright", "dark"))
    for value, name in ((150, "bright"), (50, "dark")):
        statistics = [100 / 255] * 3, [0.2] * 3
        report.show_prediction(Bright(), images[0] * 0 + value, data, statistics, run)
        assert shown[-1].axes[1].get_yticklabels()[0].get_text() == name


def test_an_image_file_has_one_channel_or_three(run, tmp_path, shown):
    images = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    data = utils.Dataset("infrared", "own", images, torch.zeros(2, 8, 8).long(), ("a", "b"))
    model = torch.nn.Conv2d(4, 2, 1)
    with pytest.raises(utils.UsageError, match="infrared has 4 channels: mine.png must be a Tens"):
        report.show_prediction(model, "mine.png", data, data.statistics(), run)
    report.show_prediction(model, images[0], data, data.statistics(), run)
    assert len(shown) == 1


def test_confusion_bars_and_filters(shown):
    labels = torch.tensor([0, 0, 1, 2, 255])
    confusion = utils.confusion_matrix(labels, torch.tensor([0, 1, 1, 2, 0]), 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    report.show_confusion(confusion, ("a", "b", "c"))
    texts = {text.get_position(): text.get_text() for text in shown[-1].axes[0].texts}
    # (prediction, truth)
    assert texts == {(0, 0): "50", (1, 0): "50", (1, 1): "100", (2, 2): "100"}
    scores = utils.class_scores(confusion)
    report.show_class_scores(scores, ("a", "b", "c"))
    heights = [bar.get_height() for bar in shown[-1].axes[0].patches]
    assert heights == pytest.approx([50, 100, 100, 50, 50, 100])
    report.show_filters(torch.nn.Conv2d(3, 8, 3))
    assert len([axes for axes in shown[-1].axes if axes.images]) == 8


def test_calibration(shown):
    """Bins by hand: 30 predictions of 0.65 and 0.75 with 24 right, 10 of 1.0 with 8 right."""
    probabilities = torch.tensor([0.65] * 20 + [0.75] * 10 + [1.0] * 10)
    right = torch.tensor(
        [True] * 15 + [False] * 5 + [True] * 9 + [False] + [True] * 8 + [False] * 2
    )
    (sure, share, count), error = report.calibration(right, probabilities, bins=5)
    assert count.tolist() == [0, 0, 0, 30, 10]
    assert sure[3:].tolist() == pytest.approx([100 * (20 * 0.65 + 10 * 0.75) / 30, 100])
    assert share[3:].tolist() == pytest.approx([80, 80]) and share[:3].isnan().all()
    assert error == pytest.approx((30 * (80 - 100 * 20.5 / 30) + 10 * (100 - 80)) / 40)
    report.show_calibration({"one": (right, probabilities), "two": (right, probabilities)})
    lines = shown[-1].axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [2, 1, 1]  # a bin of ten is left out
    assert lines[1].get_label() == "one: ECE 13.8%"
    (bars, _) = shown[-1].axes[1].patches
    assert bars.get_data().values.tolist() == 6 * [0] + [50, 25, 0, 25]  # percent of 40


def test_thresholds_say_what_was_loaded():
    fresh = utils.History([(1, 1.0, 1.0, 90.0, 91.0, 1.0)])
    fresh.loaded = 0
    loaded = utils.History([(1, 1.0, 1.0, 60.0, 61.0, 1.0)])
    table = report.thresholds([("A", 70.0, 70.0, fresh), ("B", 61.0, 70.0, loaded)]).splitlines()
    assert table[1].split() == "A 70.00 70.00 passed 1 epoch, trained now".split()
    assert "NOT passed" in table[2] and "1 epoch, from a checkpoint" in table[2]
    longer = utils.History([(n, 1.0, 1.0, 60.0, 61.0, 1.0) for n in (1, 2, 3, 4)])
    longer.loaded, longer.planned = 3, 400
    table = report.thresholds([("A", 61.0, 0.0, longer), ("a folder's long name", 1, 2, fresh)])
    lines = table.splitlines()
    hows = "how", "4 of 400", "1 epoch"
    words = "A 61.00 none set 4 of 400 epochs, the first 3 from a checkpoint"
    assert lines[1].split() == words.split()
    assert len({line.index(word) for line, word in zip(lines, hows, strict=True)}) == 1


# ---- Colab


@pytest.mark.skipif(sys.platform == "win32", reason="no path begins with / there")
def test_colab_installs_what_is_missing_and_keeps_its_torch(tmp_path, monkeypatch, capsys):
    mounted, commands = [], []
    drive = types.SimpleNamespace(mount=mounted.append)
    package = types.ModuleType("google.colab")
    package.drive = drive
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    pip = types.SimpleNamespace(run=lambda command, check: commands.append(command))
    monkeypatch.setattr(colab, "subprocess", pip)
    monkeypatch.setattr(colab, "missing_packages", lambda: ["nbval>=0.11"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("DATA_DIR", "CHECKPOINT_DIR"):
        monkeypatch.setenv(name, "")  # as good as none
    colab.set_up("vision")
    assert "nbval>=0.11" in commands[0] and f"torch=={version('torch')}" in commands[0]
    assert mounted == ["/content/drive"] and "NO GPU IS ON" in capsys.readouterr().out
    assert utils.settings().checkpoint_dir.parts[-2:] == ("vision", "checkpoints")
    assert utils.settings().data_dir.parts[-2:] == ("vision", "data")
    monkeypatch.setenv("CHECKPOINT_DIR", "checkpoints/five")
    colab.set_up("vision")  # a folder of their own lies on the Drive, too
    assert utils.settings().checkpoint_dir.parts[-3:] == ("vision", "checkpoints", "five")
    assert f"Checkpoints are kept in {utils.settings().checkpoint_dir}." in capsys.readouterr().out
    mounted.clear()
    colab.set_up()  # both lie on the Drive by now, and without it would be a folder of that name
    assert mounted == ["/content/drive"]
    monkeypatch.setenv("DATA_DIR", "data")
    monkeypatch.delenv("CHECKPOINT_DIR")
    colab.set_up()
    assert mounted == ["/content/drive"]


def test_colab_knows_what_is_missing(tmp_path, monkeypatch):
    assert colab.missing_packages() == []
    (tmp_path / "requirements.txt").write_text(
        "torch>=2\njupyter\nno-such-package-here>=1  # why\n\n"
    )
    assert colab.missing_packages(tmp_path / "requirements.txt") == ["no-such-package-here>=1"]
    assert colab.missing_packages(tmp_path / "nowhere.txt") == []
    monkeypatch.setattr(colab.importlib.metadata, "version", lambda name: 1 / 0)
    (tmp_path / "requirements.txt").write_text("ruff>=0.9  # for the tests alone\n")
    assert colab.missing_packages(tmp_path / "requirements.txt") == []


OLDER = "sys.version_info, sys.version = (3, 10, 12), '3.10.12 (main)'"


@pytest.mark.parametrize("name", ["imageclassification", "imagesegmentation"])
def test_a_notebook_alone_says_what_is_missing(name, tmp_path):
    cells = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    command = [sys.executable, "-c", first]
    alone = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "utils.py is not beside this notebook" in alone.stderr
    beside = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert beside.returncode == 0 and not beside.stdout
    older = [sys.executable, "-c", first.replace("import sys", "import sys; " + OLDER, 1)]
    older = subprocess.run(older, cwd=ROOT, capture_output=True, text=True)
    assert "This needs Python 3.11 or later, and runs in 3.10.12." in older.stderr


def test_all_four_loaders_of_the_readme_read_such_data(tmp_path, monkeypatch):
    """The page's lines, with a few pictures in place of VOC's; their masks are palettes, as its."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "load_pairs" in x]
    handwriting(tmp_path / "pictures")
    photo, mask = Image.new("RGB", (40, 30)), Image.new("P", (40, 30))
    mask.putdata([(0, 1, 255)[n % 3] for n in range(1200)])
    mask.putpalette([7 * n % 256 for n in range(768)])
    for part, image in (("images", photo), ("masks", mask)):
        (tmp_path / part).mkdir()
        for number in range(5):
            image.save(tmp_path / part / f"{number}.png")
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(4) % 2)
    voc = lambda root, download: [(photo, mask)] * 10  # noqa: E731
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", voc)
    monkeypatch.chdir(tmp_path)
    read = []
    for loader in ("load_folder", "load_pairs", "load_npz", "from_torchvision"):
        original = getattr(owndata, loader)

        def load(*parts, original=original, **options):
            read.append(original(*parts, **options))
            return read[-1]

        monkeypatch.setattr(owndata, loader, load)
    exec(lines, scope := {})
    assert [(len(data), data.labels.ndim) for data in read] == [(36, 1), (5, 3), (4, 1), (10, 3)]
    assert read[1].classes == read[2].classes == ("road", "car")
    for data in (read[1], read[3]):
        assert data.labels.unique().tolist() == [0, 1, 255]
    assert (len(scope["training"]), len(scope["validation"])) == (8, 2)


def test_a_trained_model_is_used_as_the_readme_says(tmp_path, monkeypatch, classification, shown):
    """The page's lines, with a quick run's model in place of a short one's."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = next(x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "load_state" in x)
    model = classification.CifarResNet(width=16)
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "quick" / "cifar10.pt")
    checkpoint.start({"model": model}, {})
    checkpoint.save(utils.History(), torch.zeros(2, 3, 32, 32))
    Image.new("RGB", (50, 40)).save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    lines = lines.replace("short", "quick").replace("width=64", "width=16")
    exec(lines, dict(os=os, utils=utils, report=report, torch=torch))
    assert len(shown[0].axes[1].patches) == 5  # bars
