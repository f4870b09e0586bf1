"""The environment is read as the README says, and a mistake in it gets one clear sentence."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import settings
import utils


def choose(**environ):
    return utils.settings(environ=environ)


def test_the_profile_follows_the_hardware_unless_it_is_named():
    assert choose().profile == ("full" if torch.cuda.is_available() else "quick")
    assert choose(PROFILE="full").profile == "full"
    assert choose(PROFILE="quick").profile == "quick"


def test_epochs_caps_the_profiles_number():
    assert choose(PROFILE="full").epochs(full=100, quick=5) == 100
    assert choose(PROFILE="quick").epochs(full=100, quick=5) == 5
    assert choose(PROFILE="short").epochs(full=100, quick=5, short=20) == 20
    assert choose(PROFILE="short").epochs(full=100, quick=5) == 100
    assert choose(PROFILE="short", EPOCHS="3").epochs(full=100, quick=5, short=20) == 3
    assert choose(PROFILE="full", EPOCHS="3").epochs(full=100, quick=5) == 3
    assert choose(PROFILE="quick", EPOCHS="30").epochs(full=100, quick=5) == 5


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_on_record_says_where_files_differ_from_it(tmp_path, monkeypatch):
    """All but those in figures/, which a run itself changes."""

    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    for name in [name for name in os.environ if name.startswith("GIT_")]:  # as in a hook
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    (tmp_path / "figures").mkdir()
    record, code = tmp_path / "figures" / "results.json", tmp_path / "code.py"
    record.touch(), code.touch()
    git("init"), git("add", "."), git("commit", "-m", "first")
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    now = settings.commit.__wrapped__  # not the cached answer
    at = now()
    assert re.fullmatch("[0-9a-f]{12}", at)
    record.write_text("another run")
    assert now() == at
    code.write_text("another line")
    assert now() == f"{at}-dirty"
    monkeypatch.setattr(settings, "ROOT", tmp_path / "figures")
    assert now() == "unknown"  # in a repository that is not the project's


def test_with_own_data_epochs_is_the_number(tmp_path):
    assert "at most 30 epochs" in str(choose(EPOCHS="30"))
    assert ", for 30 epochs" in str(choose(EPOCHS="30", PICTURES=str(tmp_path)))


@pytest.mark.skipif(sys.platform == "win32", reason="no path begins with / there")
def test_checkpoints_are_saved_as_often_as_the_place_bears():
    cpu = dataclasses.replace(choose(PROFILE="full"), device=torch.device("cpu"))
    gpu = dataclasses.replace(cpu, device=torch.device("cuda"))
    drive = choose(CHECKPOINT_DIR="/content/drive/MyDrive/vision/checkpoints").checkpoint_dir
    assert cpu.checkpoint("a").every == 0 and gpu.checkpoint("a").every == 60
    assert dataclasses.replace(gpu, checkpoint_dir=drive).checkpoint("a").every == 600
    assert dataclasses.replace(cpu, checkpoint_dir=drive).checkpoint("a").every == 0


def test_a_gpu_that_torch_has_no_code_for_is_refused(monkeypatch):
    capability = {"old": (6, 0), "a T4": (7, 5), "a new one": (12, 1)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    for known in ("a T4", "a new one"):
        settings.require_code(known)
    with pytest.raises(utils.UsageError, match="no code for the old, whose .* is 6.0: install"):
        settings.require_code("old")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx942"])  # AMD's have other names
    settings.require_code("old")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PROFILE", value) for value in ("Full", "fast", "1")),
        *(("EPOCHS", value) for value in ("0", "-1", "ten", "1.5", " ")),
        ("PRECISION", "half"),
        ("THRESHOLD", "high"),
        ("THRESHOLD", "101"),
        ("SIZE", "33"),
        ("SIZE", "00"),
        ("SIZE", "8"),  # a model that halves three times has single pixels then
        ("FLIP", "no"),
        ("RESUME", "2"),
        ("PICTURES", "/nowhere"),
        ("SCENES", "~nobody/scenes"),
        ("MY_PICTURE", "/"),
    ],
)
def test_a_variable_that_makes_no_sense_is_refused(name, value):
    _, meaning = settings.VARIABLES.get(name, ("", "which is no f"))
    with pytest.raises(utils.UsageError, match=f"{name} is '{value}'.*{meaning}"):
        choose(**{name: value})


def test_data_dir_is_absolute_and_defaults_to_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose().data_dir == settings.ROOT / "data"
    assert choose(DATA_DIR="elsewhere").data_dir == tmp_path / "elsewhere"


def test_short_and_full_runs_have_checkpoints_of_their_own(tmp_path):
    assert choose().checkpoint_dir == settings.ROOT / "checkpoints"
    for profile, folder in (("full", ""), ("short", "short"), ("quick", "quick")):
        run = choose(PROFILE=profile, CHECKPOINT_DIR=str(tmp_path))
        assert run.checkpoint("mnist").path.parent == tmp_path / folder
    own = choose(PROFILE="short", CHECKPOINT_DIR=str(tmp_path), PICTURES=str(tmp_path))
    assert own.checkpoint("mnist").path.parent == tmp_path / "own" / tmp_path.name


def test_a_mac_says_which_it_is_and_does_without_nnpack(monkeypatch):
    done = subprocess.CompletedProcess([], 0, "Apple M4\n")
    monkeypatch.setattr(settings, "_processor", settings._processor.__wrapped__)  # nothing is kept
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(settings.platform, "processor", lambda: "arm")  # itself asks a subprocess
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: done)
    flags = []
    monkeypatch.setattr(torch.backends.nnpack, "set_flags", flags.append)
    assert "Apple M4, " in str(choose(PRECISION="float32")) and flags == [False]


def test_quick_runs_write_to_a_folder_of_their_own():
    assert choose(PROFILE="full").figures == settings.ROOT / "figures"
    assert choose(PROFILE="short").figures == settings.ROOT / "figures"
    assert choose(PROFILE="quick").figures == settings.ROOT / "figures" / "quick"


def test_the_precision_can_be_overridden_and_is_printed():
    run = choose(PRECISION="float32")
    assert run.precision == torch.float32
    assert "precision  float32, channels_last" in str(run)
    assert choose(PRECISION="bfloat16").precision == torch.bfloat16
    assert choose().precision == settings.best_precision(choose().device)


@pytest.mark.parametrize(
    "name, capability, precision",
    [
        ("NVIDIA H200", (9, 0), torch.bfloat16),
        ("NVIDIA A100", (8, 0), torch.bfloat16),
        ("Tesla T4", (7, 5), torch.float16),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), torch.float32),
        ("Tesla V100", (7, 0), torch.float16),
        ("Tesla P4", (6, 1), torch.float32),
    ],
)
def test_the_precision_is_the_gpus_native_one(monkeypatch, name, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settings.best_precision(torch.device("cuda")) == precision


@pytest.mark.parametrize(
    "cuda, said", [("13.0", "built for CUDA 13.0 and finds no GPU"), (None, "for CPUs alone")]
)
def test_a_gpu_that_torch_does_not_find_is_mentioned(monkeypatch, cuda, said):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(settings.shutil, "which", lambda name: None)
    assert "GPU" not in str(choose())
    monkeypatch.setattr(settings.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert said in str(choose())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # hidden, as one asked for
    assert "GPU" not in str(choose())


@pytest.mark.parametrize(
    "given, precision, replayed",
    [
        ({}, torch.bfloat16, True),
        (dict(graphs=False), torch.bfloat16, False),
        ({}, torch.float16, False),
        ({}, torch.float32, True),
    ],
)
def test_steps_are_replayed_on_a_gpu_unless_in_float16(monkeypatch, given, precision, replayed):
    asked, cudnn = [], torch.backends.cudnn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(settings, "require_code", asked.append)
    for name in ("benchmark", "allow_tf32"):  # what is set stays in this test
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))
    named = {"PRECISION": str(precision).removeprefix("torch.")}
    run = utils.settings(environ=named, **given)
    assert run.graphs == replayed and run.profile == "full" and asked == [run.device]
    assert run.device.type == "cuda" and run.precision == precision
    assert cudnn.benchmark and cudnn.allow_tf32 == (precision != torch.float32)
    monkeypatch.setattr(settings, "world_size", lambda: 2)
    assert not utils.settings(environ=named, **given).graphs


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(settings.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = settings.join_processes(torch.device("cuda"), 1)
    assert chosen == [device] == [torch.device("cuda", 1)]
    with pytest.raises(utils.UsageError, match="More processes than GPUs here, 2: start one"):
        settings.join_processes(torch.device("cuda"), 2)


@pytest.mark.parametrize(
    "name, amx, avx512, precision",
    [
        ("Intel(R) Xeon(R)", True, True, torch.bfloat16),
        ("Intel(R) Xeon(R)", False, True, torch.float32),
        ("AMD EPYC", False, True, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32),
    ],
)
def test_the_precision_is_the_cpus_fastest(monkeypatch, name, amx, avx512, precision):
    monkeypatch.setattr(settings, "hardware_name", lambda device: name)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert settings.best_precision(torch.device("cpu")) == precision


def test_jupyter_shows_a_usage_error_as_one_line():
    lines = utils.UsageError("Set PROFILE to quick.")._render_traceback_()
    assert lines == ["UsageError: Set PROFILE to quick."]
