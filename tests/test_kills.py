"""A run that is killed anywhere and started again ends with the same bits as one that is not."""

import random
import time

import pytest
import torch
import victim

pytestmark = pytest.mark.faults


def run(processes, *arguments):
    process = processes.Process(target=victim.live, args=arguments)
    process.start()
    return process


def finish(process):
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    """(digest of a run that nothing happened to, its seconds)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    started = processes.Event()
    process = run(processes, folder, started)
    assert started.wait(120)
    since = time.perf_counter()
    assert finish(process) == 0
    return (folder / "digest").read_text(), time.perf_counter() - since


def loadable(folder):
    """Whether what lies in a folder after a kill is whole: nothing, or a checkpoint to the end."""
    for file in folder.glob("toy.pt*"):
        if file.suffix != ".partial":
            try:
                torch.load(file, weights_only=True)
            except Exception:
                return False
    return True


@pytest.mark.parametrize("kills", [8, pytest.param(600, marks=pytest.mark.long)])
def test_killed_at_random_moments(kills, processes, uninterrupted, tmp_path, tally):
    """Each run is killed again and again until it gets to its end between two kills."""
    digest, seconds = uninterrupted
    moments, done, runs = random.Random(0), 0, 0
    while done < kills:
        folder = tmp_path / str(runs)
        folder.mkdir()
        runs += 1
        while not (folder / "digest").exists():
            started = processes.Event()
            process = run(processes, folder, started)
            assert started.wait(120)
            if done < kills:
                process.join(moments.uniform(0, 0.7 * seconds))
                if process.exitcode is None:
                    process.kill()
            code = finish(process)
            assert code in (0, -9)
            if code == -9 and not (folder / "digest").exists():
                done += 1
                tally.add("kills", survived=loadable(folder))
        tally.add("faults", survived=(folder / "digest").read_text() == digest)


@pytest.mark.parametrize("place", victim.PLACES)
@pytest.mark.parametrize("epoch", [2, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_kind_of_place(place, epoch, processes, uninterrupted, tmp_path, tally):
    """Killed there in the first or second epoch of every life, until it is allowed to live."""
    count = victim.PLACES[place] if epoch == 2 else 1
    for _ in range(victim.EPOCHS - 2):
        assert finish(run(processes, tmp_path, None, place, count)) == -9
        tally.add("kills", survived=loadable(tmp_path))
    assert finish(run(processes, tmp_path)) == 0
    tally.add("faults", survived=(tmp_path / "digest").read_text() == uninterrupted[0])
