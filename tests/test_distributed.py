"""Two processes on the CPU do what one does: same batches, same losses, same checkpoint.

And the notebooks run as plain scripts, in the full profile, too.
"""

import json
import shutil
import sys

import pytest
import victim

import report
import utils
from conftest import ROOT, RUNS, export, run_python

windows_cannot = pytest.mark.skipif(
    sys.platform == "win32", reason="torchrun does not start there (pytorch issue 148283)"
)


def start(processes, script, *arguments, cwd, **environ):
    """Run a script alone or by torchrun; returns what it printed."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = together if processes > 1 else []
    here = dict(PROFILE="quick", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | environ
    return run_python(*launcher, script, *arguments, cwd=cwd, timeout=600, **here)


@windows_cannot
def test_two_processes_train_as_one_does(tmp_path):
    results, script = {}, ROOT / "tests" / "together.py"
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        out = start(processes, script, folder, cwd=folder, CHECKPOINT_DIR=str(folder))
        assert out.count("epoch 2/2") == 2  # of two models: one process prints
        results[processes] = json.loads((folder / "result.json").read_text())
    one, two = results[1], results[2]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.3)
    assert two["validation"] == pytest.approx(one["validation"], abs=0.3)
    assert two["device"] == f"2 x {one['device']}"
    assert two["alike"] and two["recorded"] == two["score"]
    assert sum(map(sum, two["confusion"])) == 1000
    assert len(one["cut"]) == len(two["cut"]) == 1
    for processes, saved in ((2, one), (1, two)):  # what one saved, two load, and the reverse
        folder = tmp_path / str(3 - processes)
        again = dict(cwd=tmp_path, CHECKPOINT_DIR=str(folder))
        out = start(processes, script, folder, "again", **again)
        assert out.count("Found 2 of 2 epochs") == 2
        assert out.count("Found 1 of 2 epochs") == 1  # what was cut short goes on
        loaded = json.loads((folder / "result.json").read_text())
        assert loaded["losses"] == saved["losses"] and loaded["device"] == saved["device"]
        assert loaded["cut"] == pytest.approx(one["losses"], rel=1e-4)
    assert loaded["score"] == two["score"]  # by one process, of the averages that two saved
    assert loaded["confusion"] == two["confusion"]


@pytest.mark.parametrize("notebook, passed", [("imageclassification", 2), ("imagesegmentation", 1)])
def test_the_full_profile_runs_under_torchrun_and_as_a_script(
    notebook, passed, full_data, tmp_path
):
    """All models at their full width, on tiny files in the full data's formats; no threshold.

    Two processes train, where torchrun starts; one then loads what they left.
    """
    export(notebook, tmp_path, questions={"mnist", "scenes"})
    kept, processes = tmp_path / "kept", 1 if sys.platform == "win32" else 2
    environ = dict(PROFILE="full", EPOCHS="1", THRESHOLD="0", DATA_DIR=str(full_data))
    environ |= dict(MPLBACKEND="agg", CHECKPOINT_DIR=str(kept))
    script, runs = f"{notebook}.py", RUNS[notebook]
    trained = len(runs) + 4 * len({"mnist-best", "cifar10-94"} & set(runs))  # from five seeds

    def are_recorded():
        records = report.load_records(tmp_path / "figures")
        assert [record["run"] for record in records] == runs
        assert {r["epochs"] for r in records} == {1} and {r["profile"] for r in records} == {"full"}
        assert processes == 1 or all(r["device"].startswith("2 x ") for r in records)
        assert records[-1]["source"] == utils.NOT_PUBLISHED  # other digits in MNIST's four files
        assert report.write_up(records[-1]) is None
        assert all((tmp_path / "figures" / f"{run}.png").exists() for run in runs)
        assert not (tmp_path / "figures" / "quick").exists()

    out = start(processes, script, cwd=tmp_path, **environ)
    assert out.count("epoch 1/1: ") == trained  # one process prints
    assert out.count(": passed, or no threshold set") == passed
    assert all({run, f"{run}-0"} & {path.stem for path in kept.glob("*.pt")} for run in runs)
    are_recorded()
    shutil.rmtree(tmp_path / "figures")
    again = start(1, script, cwd=tmp_path, **environ)  # finished runs are loaded
    assert again.count("Found 1 of 1 epochs in") == trained and "epoch 1/1: " not in again
    are_recorded()


def test_batches_that_are_too_small_to_share_are_refused(run, monkeypatch):
    batches = utils.Batches(victim.toy(), 1, run)
    assert len(list(utils._shares(batches, 3, run))) == len(batches)
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    with pytest.raises(utils.UsageError, match="No batch has an image for each of 2 processes"):
        list(utils._shares(batches, 3, run))


def test_one_process_is_a_world_of_its_own():
    utils.settings(environ={"PROFILE": "quick", "WORLD_SIZE": "8"})  # as a cluster's shell has it
    assert utils.world_size() == 1 and utils.rank() == 0
