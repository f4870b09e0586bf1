"""Downloads that go wrong in every way, damaged files, and a sentence for each."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import victim
from PIL import ExifTags, Image

import checks
import files
import owndata
import utils

pytestmark = pytest.mark.faults


# ---- a server that misbehaves


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` by name; `faults` are what happens to the first requests, in turn."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.faults, self.requests = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        body = self.server.content.get(name)
        self.server.requests.append(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else "fine"
        if body is None or fault in ("404", "503"):
            return self.send_error(int(fault) if body else 404)
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/moved/{name}")
            return self.end_headers()
        if fault == "corrupt":
            body = body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]
        if fault == "another file":
            body = b"<html>Please log in to this network.</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        if fault == "hang up":
            return self.close_connection
        if fault in ("stall", "cut off"):
            self.wfile.write(body[:half])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(3)
            return None
        if fault == "slow":
            for start in range(0, len(body), 1 + len(body) // 5):
                self.wfile.write(body[start : start + 1 + len(body) // 5])
                self.wfile.flush()
                time.sleep(0.3)
            return None
        return self.wfile.write(body)


def serve():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def cifar_archive():
    """A small archive that looks like CIFAR-10's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("data_batch_1", "batches.meta"):
            content = name.encode() * 1000
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def publish(monkeypatch, servers):
    """Two data sets like the real ones on servers of ours, with their hashes."""
    if not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python unpacks no CIFAR-10")
    digits = {name: gzip.compress(name.encode() * 500) for name in files.MNIST_FILES}
    digits = {f"{name}.gz": body for name, body in digits.items()}
    content = {"MNIST": digits, "CIFAR-10": {"cifar-10-python.tar.gz": cifar_archive()}}
    for server in servers:
        server.content = {**content["MNIST"], **content["CIFAR-10"]}
    hashes = {
        data: {name: hashlib.sha256(body).hexdigest() for name, body in archives.items()}
        for data, archives in content.items()
    }
    monkeypatch.setattr(files, "ARCHIVES", hashes)
    monkeypatch.setattr(files, "MIRRORS", dict.fromkeys(hashes, [s.url for s in servers]))
    monkeypatch.setattr(files, "TIME_OUT", 5.0)
    monkeypatch.setattr(files, "PAUSE", 0.01)


@pytest.fixture
def servers(monkeypatch):
    """(first mirror, second mirror) of two small data sets."""
    pair = serve(), serve()
    publish(monkeypatch, pair)
    yield pair
    for server in pair:
        server.shutdown()
        server.server_close()


def whole(folder):
    """Whether both data sets lie in a folder, unpacked, whole and alone."""
    digits = folder / "MNIST" / "raw"
    same = all((digits / n).read_bytes() == n.encode() * 500 for n in files.MNIST_FILES)
    batch = folder / "cifar-10-batches-py" / "data_batch_1"
    rest = [p for p in folder.rglob("*") if "partial" in p.name or p.name.startswith("tmp")]
    return same and batch.read_bytes() == b"data_batch_1" * 1000 and not rest


def nothing_final(folder):
    """Whether a download that failed left nothing that could be taken for a data set."""
    names = [*files.MNIST_FILES, "cifar-10-batches-py", "cifar-10-python.tar.gz"]
    return not [p for p in folder.rglob("*") if p.name in names]


FAULTS = ["503", "404", "redirect", "corrupt", "another file", "hang up", "stall", "cut off"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_first_mirror_is_made_up_for(fault, servers, tmp_path, tally, monkeypatch):
    monkeypatch.setattr(files, "TIME_OUT", 1.0 if fault == "stall" else 5.0)
    for archives in files.ARCHIVES.values():
        servers[0].faults += [fault] * len(archives)
    for name in ("MNIST", "CIFAR-10"):
        files.fetch(name, tmp_path)
    assert (fault == "redirect") == (len(servers[1].requests) == 0)
    tally.add("faults", survived=whole(tmp_path))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "redirect"])
def test_all_mirrors_fail_and_then_work(fault, servers, tmp_path, tally, monkeypatch):
    monkeypatch.setattr(files, "TIME_OUT", 1.0 if fault == "stall" else 5.0)
    for server in servers:
        server.faults = [fault]
    files.fetch("CIFAR-10", tmp_path)
    assert len(servers[0].requests) == 2 and len(servers[1].requests) == 1
    files.fetch("MNIST", tmp_path)
    tally.add("faults", survived=whole(tmp_path))


SENTENCES = {
    "503": "answered 503",
    "404": "answered 404",
    "corrupt": "the file's hash is wrong",
    "another file": "the file's hash is wrong",
    "hang up": "broke off",
    "stall": "no byte in 1 s",
    "cut off": "broke off",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_a_fault_that_stays_is_one_sentence(fault, servers, tmp_path, tally, monkeypatch):
    monkeypatch.setattr(files, "TIME_OUT", 1.0 if fault == "stall" else 5.0)
    for server in servers:
        server.faults = [fault] * 3
    with pytest.raises(utils.UsageError, match="CIFAR-10 could not be downloaded") as error:
        files.fetch("CIFAR-10", tmp_path)
    assert SENTENCES[fault] in str(error.value)
    for way_out in (servers[0].url, "cifar-10-python.tar.gz", str(tmp_path), "PROFILE=quick"):
        assert way_out in str(error.value)
    tally.add("faults", survived=nothing_final(tmp_path))
    files.fetch("CIFAR-10", tmp_path)
    files.fetch("MNIST", tmp_path)
    tally.add("faults", survived=whole(tmp_path))


def test_without_a_network(tmp_path, monkeypatch, tally):
    server = serve()
    publish(monkeypatch, [server])
    server.shutdown()
    server.server_close()
    with pytest.raises(utils.UsageError, match="no connection") as error:
        files.fetch("MNIST", tmp_path)
    assert all(name in str(error.value) for name in files.ARCHIVES["MNIST"])
    tally.add("faults", survived=nothing_final(tmp_path))


def test_archives_that_were_brought_by_hand_are_used(servers, tmp_path):
    for dataset, archives in files.ARCHIVES.items():
        folder = tmp_path / files.FOLDERS[dataset]
        folder.mkdir(parents=True, exist_ok=True)
        for name in archives:
            (folder / name).write_bytes(servers[0].content[name])
        files.fetch(dataset, tmp_path)
    assert not servers[0].requests and whole(tmp_path)


def test_a_damaged_archive_is_fetched_again(servers, tmp_path, tally):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(cifar_archive()[:1000])
    files.fetch("CIFAR-10", tmp_path)
    files.fetch("MNIST", tmp_path)
    tally.add("faults", survived=whole(tmp_path))


@pytest.mark.parametrize("packed", [True, False])
def test_another_data_set_in_mnists_files_is_not_replaced(packed, servers, tmp_path, tally):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    content = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])  # a whole idx file of three labels
    mine = raw / f"train-labels-idx1-ubyte{'.gz' if packed else ''}"
    mine.write_bytes(gzip.compress(content) if packed else content)
    before = mine.read_bytes()
    with pytest.raises(utils.UsageError, match=f"{mine} is not MNIST's"):
        files.fetch("MNIST", tmp_path)
    tally.add("faults", survived=mine.read_bytes() == before)
    mine.write_bytes(before[:-2])  # a damaged one is no loss
    files.fetch("MNIST", tmp_path)
    files.fetch("CIFAR-10", tmp_path)
    tally.add("faults", survived=whole(tmp_path))


def test_what_a_killed_download_left_is_cleared_away(servers, tmp_path, tally):
    (tmp_path / ".partial" / "unpacking" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / ".partial" / "cifar-10-python.tar.gz").write_bytes(b"half")
    files.fetch("CIFAR-10", tmp_path)
    files.fetch("MNIST", tmp_path)
    tally.add("faults", survived=whole(tmp_path))


def fetch_elsewhere(folder, url, hashes):
    """The body of a process that fetches CIFAR-10 from a server of ours."""
    files.ARCHIVES["CIFAR-10"], files.MIRRORS["CIFAR-10"] = hashes, [url]
    files.fetch("CIFAR-10", folder)


def test_two_processes_fetch_once(processes, servers, tmp_path, tally):
    servers[0].faults = ["slow"]
    arguments = tmp_path, servers[0].url, files.ARCHIVES["CIFAR-10"]
    both = [processes.Process(target=fetch_elsewhere, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    files.fetch("MNIST", tmp_path)
    assert servers[0].requests.count("/cifar-10-python.tar.gz") == 1
    tally.add("faults", survived=whole(tmp_path))


def test_a_killed_download_leaves_nothing_and_is_done_again(processes, servers, tmp_path, tally):
    servers[0].faults = ["stall"] * 3  # half of the file, then nothing for long
    arguments = tmp_path, servers[0].url, files.ARCHIVES["CIFAR-10"]
    for number in range(3):
        process = processes.Process(target=fetch_elsewhere, args=arguments)
        process.start()
        while len(servers[0].requests) <= number and process.is_alive():
            time.sleep(0.02)
        time.sleep(0.4)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        tally.add("kills", survived=nothing_final(tmp_path))
    files.fetch("CIFAR-10", tmp_path)
    files.fetch("MNIST", tmp_path)
    tally.add("faults", survived=whole(tmp_path))


def test_a_folder_that_cannot_be_written(servers, tmp_path, tally):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", Path("/proc/data")):
        with pytest.raises(utils.UsageError, match="cannot be written to DATA_DIR .*PROFILE=quick"):
            files.fetch("MNIST", folder)
        tally.add("faults")


def test_a_full_disk_while_unpacking(servers, tmp_path, tally, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copyfileobj", full)
        with pytest.raises(utils.UsageError, match="No space left on device.*fix that"):
            files.fetch("MNIST", tmp_path)
    names = [p.name for p in tmp_path.rglob("*") if p.name in files.MNIST_FILES]
    files.fetch("MNIST", tmp_path)
    files.fetch("CIFAR-10", tmp_path)
    tally.add("faults", survived=names == [] and whole(tmp_path))


# ---- archives


def test_an_older_python_says_how_to_unpack(tmp_path, monkeypatch):
    monkeypatch.delattr(files.tarfile, "data_filter", raising=False)
    with pytest.raises(utils.UsageError, match="Python before 3.11.4 .* tar -xzf .*tar.gz -C /"):
        files.unpack(tmp_path / "cifar-10-python.tar.gz")
    assert not (tmp_path / ".partial" / "unpacking").exists()


unpacks_tar = pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="an older Python")


@unpacks_tar
@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "../../escaped"])
def test_an_archive_whose_paths_leave_its_folder_is_refused(name, tmp_path, tally):
    archive = tmp_path / "inner" / "bad.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(utils.UsageError, match="cannot be unpacked") as error:
        files.unpack(archive)
    assert str(archive) in str(error.value)
    tally.add("faults", survived=not list(tmp_path.rglob("escaped")))


@unpacks_tar
def test_a_link_that_leaves_its_folder_is_refused(tmp_path, tally):
    archive = tmp_path / "bad.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(member)
    with pytest.raises(utils.UsageError, match="cannot be unpacked"):
        files.unpack(archive)
    tally.add("faults", survived=not (tmp_path / "link").is_symlink())


@pytest.mark.parametrize("name", ["short.gz", pytest.param("short.tar.gz", marks=unpacks_tar)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_archive_cut_short_is_refused(name, share, tmp_path, tally):
    content = cifar_archive() if "tar" in name else gzip.compress(os.urandom(5000))
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    if name == "short.gz" and share == 0:
        files.unpack(tmp_path / name)  # to gzip, nothing is an archive of nothing
        return
    with pytest.raises(utils.UsageError, match="cannot be unpacked"):
        files.unpack(tmp_path / name)
    tally.add("faults", survived=[p.name for p in tmp_path.rglob("*") if p.is_file()] == [name])


# ---- idx and pickle


def full(run, folder):
    return dataclasses.replace(run, profile="full", data_dir=folder)


@pytest.fixture
def copy(full_data, tmp_path):
    """A copy of the small data sets, to be damaged."""
    return Path(shutil.copytree(full_data, tmp_path / "copy"))


@pytest.mark.parametrize("name", files.MNIST_FILES)
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:7], lambda b: b"", lambda b: b"PK" + b],
)
def test_an_idx_file_that_is_not_whole_is_refused(name, damage, copy, run, tally):
    file = copy / "MNIST" / "raw" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(utils.UsageError, match=f"{name} ha(s|ve).*delete it"):
        utils.load_mnist(full(run, copy))
    tally.add("faults")


def test_an_idx_file_of_nothing_is_refused(tmp_path):
    (tmp_path / "labels").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 0]))
    with pytest.raises(utils.UsageError, match="labels holds nothing: delete it"):
        files.check_idx(tmp_path / "labels", 1)


def test_idx_files_of_two_counts_are_refused(copy, run, tally):
    raw = copy / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(utils.UsageError, match="holds 120 images but .* holds 40 labels"):
        utils.load_mnist(full(run, copy))
    tally.add("faults")


def test_the_published_files_are_told_from_others(copy, run, monkeypatch):
    raw = copy / "MNIST" / "raw"
    known = {n: hashlib.sha256((raw / n).read_bytes()).hexdigest() for n in files.MNIST_FILES}
    monkeypatch.setattr(files, "MNIST_FILES", known)
    assert {part.source for part in utils.load_mnist(full(run, copy))} == {"full"}
    with open(raw / "train-images-idx3-ubyte", "r+b") as file:
        file.seek(1000)
        file.write(b"\x07")
    sources = {part.source for part in utils.load_scenes(full(run, copy))}
    assert sources == {utils.NOT_PUBLISHED}  # an image changed: no longer MNIST, in no scene either


def test_pickles_that_are_not_cifar10s_are_not_unpickled(tmp_path, run, tally):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(victim.Program(tmp_path / "hacked")))
    with pytest.raises(utils.UsageError, match="data_batch_1 is not as published: delete"):
        utils.load_cifar10(full(run, tmp_path))
    (folder / "data_batch_1").unlink()
    with pytest.raises(utils.UsageError, match="data_batch_1 is missing: delete"):
        utils.load_cifar10(full(run, tmp_path))
    tally.add("faults", survived=not (tmp_path / "hacked").exists())


# ---- images


def folders(root, count=3, size=(12, 10), names=("cat", "dog")):
    """Images in one folder per class."""
    random = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def test_a_truncated_image_is_named(tmp_path, tally, capsys):
    root = folders(tmp_path / "pictures")
    cut(root / "cat" / "1.png")
    (root / "dog" / "2.png").write_text("not an image")
    with pytest.raises(utils.UsageError, match="cat/1.png cannot be read as an image .*1 more"):
        owndata.load_folder(root, "mine")
    dataset = owndata.load_folder(root, "mine", skip_unreadable=True)
    out = capsys.readouterr().out
    assert "cat/1.png" in out and "dog/2.png cannot be read as an image (not an image file)" in out
    whole = owndata.load_folder(folders(tmp_path / "again"), "mine")
    kept = [0, 2, 3, 4]
    same = torch.equal(dataset.images, whole.images[kept])
    tally.add("faults", survived=same and dataset.labels.tolist() == [0, 0, 1, 1])


def test_a_truncated_jpeg_is_refused(tmp_path, tally):
    root = folders(tmp_path / "pictures")
    photograph = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(root / "cat" / "9.jpg")
    cut(root / "cat" / "9.jpg")
    with pytest.raises(utils.UsageError, match="9.jpg cannot be read .*truncated"):
        owndata.load_folder(root, "mine")
    tally.add("faults")


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_more_than_eight_bits_are_not_cut_off_silently(dtype, mode, tmp_path, tally):
    root = folders(tmp_path / "pictures")
    name = "deep.png" if dtype == np.uint16 else "deep.tiff"
    Image.fromarray(np.full((10, 12), 900).astype(dtype)).save(root / "cat" / name)
    with pytest.raises(utils.UsageError, match=f"its mode {mode} is not 8 bits"):
        owndata.load_folder(root, "mine")
    tally.add("faults")


def test_hidden_folders_are_no_class(tmp_path):
    root = folders(tmp_path / "pictures", names=("cat", "dog", ".ipynb_checkpoints"))
    assert owndata.load_folder(root, "mine").classes == ("cat", "dog")


def test_a_class_that_cannot_be_read_is_named(tmp_path):
    root = folders(tmp_path / "pictures", names=("cat", "dog"))
    for file in (root / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(utils.UsageError, match="dog has no image that can be read"):
        owndata.load_folder(str(root), "mine", skip_unreadable=True)


def test_images_are_read_as_viewers_show_them(tmp_path):
    ink = Image.new("RGBA", (6, 4))  # black, and all of it transparent
    ink.putpixel((0, 0), (0, 0, 0, 255))
    ink.save(tmp_path / "ink.png")
    grey = files.read_image(tmp_path / "ink.png", "L")
    assert grey[0, 0] == 0 and grey.sum() == 255 * 23
    wide = Image.new("RGB", (16, 8), "white")
    wide.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by a quarter
    wide.save(tmp_path / "wide.jpg", exif=exif)
    tall = files.read_image(tmp_path / "wide.jpg", "RGB")
    assert tall.shape == (16, 8, 3) and tall[:6].max() < 50 and tall[10:].min() > 200


def test_masks_are_matched_with_upright_images_and_hidden_files_are_left_alone(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for hidden in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / folder / hidden).write_bytes(b"no image")
    mask = Image.fromarray((np.arange(128) % 2).astype(np.uint8).reshape(16, 8))
    for name in ("one", "two"):
        Image.new("RGB", (16, 8)).save(tmp_path / "images" / f"{name}.jpg", exif=exif)
        mask.save(tmp_path / "masks" / f"{name}.png")
    pairs = owndata.load_pairs(tmp_path / "images", tmp_path / "masks", "mine")
    assert pairs.images.shape == (2, 3, 16, 8) and pairs.labels.shape == (2, 16, 8)
    mask.save(tmp_path / "masks" / "two.png", "JPEG")  # whatever its name says
    with pytest.raises(utils.UsageError, match="two.png is a JPEG, which blurs the classes"):
        owndata.load_pairs(tmp_path / "images", tmp_path / "masks", "mine")


def test_test_folders_of_other_names_are_refused(tmp_path, run, tally):
    folders(tmp_path / "cifar10" / "train", names=("bird", "cat", "dog"))
    folders(tmp_path / "cifar10" / "test", names=("cat", "dog", "fox"))
    with pytest.raises(utils.UsageError, match="must have the same classes: folders"):
        utils.load_cifar10(full(run, tmp_path))
    tally.add("faults")


def test_nothing_that_could_be_read(tmp_path):
    root = folders(tmp_path / "pictures", count=1)
    for name in ("cat", "dog"):
        (root / name / "0.png").write_text("not an image")
    with pytest.raises(utils.UsageError, match="No image could be read"):
        owndata.load_folder(root, "mine", skip_unreadable=True)


DIFFER = r"dog.0\.png is 9x9 but .*cat.0\.png is 12x10"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "needs a folder of images for each class"),
        (lambda root: root.mkdir(), "needs a folder of images for each class"),
        (lambda root: folders(root).joinpath("bird").mkdir(), "bird has no image that can be read"),
        (lambda root: folders(root, names=("cat",)), "there is only one class \\(cat\\)"),
        (lambda root: folders(root, names=("cat",)) and folders(root, 1, (9, 9), ("dog",)), DIFFER),
    ],
)
def test_folders_that_will_not_do(make, sentence, tmp_path, tally):
    make(tmp_path / "pictures")
    with pytest.raises(utils.UsageError, match=f"(?i){sentence}"):
        owndata.load_folder(tmp_path / "pictures", "mine")
    tally.add("faults")


def pairs(root):
    """Images and masks of one size."""
    random = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number in range(3):
        pixels = random.integers(256, size=(10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.jpg", quality=95)
        mask = Image.fromarray(random.choice([0, 1, 255], size=(10, 12)).astype(np.uint8))
        if number == 1:
            mask = Image.fromarray(np.array(mask), mode="P")
            mask.putpalette(random.integers(256, size=768).astype(np.uint8).tobytes())
        mask.save(root / "masks" / f"{number}.png")
    return root / "images", root / "masks", "roads", ("road", "car")


def test_pairs_of_images_and_masks(tmp_path):
    dataset = owndata.load_pairs(*pairs(tmp_path))
    assert dataset.images.shape == (3, 3, 10, 12) and dataset.labels.shape == (3, 10, 12)
    random = np.random.default_rng(0)
    random.integers(256, size=(10, 12, 3), dtype=np.uint8)
    first = random.choice([0, 1, 255], size=(10, 12))
    assert (dataset.labels[0].numpy() == first).all()
    assert set(dataset.labels[1].unique().tolist()) == {0, 1, 255}  # a palette's numbers


def resize(path, size):
    Image.open(path).resize(size).save(path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: (root / "masks/1.png").unlink(), "3 images in .*, 2 masks in .*: 1 has no"),
        (
            lambda root: resize(root / "masks/1.png", (5, 5)),
            "is 5x5 but its image .* is 12x10",
        ),
        (
            lambda root: resize(root / "images/1.jpg", (5, 5)),
            "is 12x10 but its image .* is 5x5",
        ),
        (
            lambda root: Image.open(root / "images/1.jpg").save(root / "masks/1.png"),
            "one byte.* 3 axes",
        ),
        (
            lambda root: Image.fromarray(np.ones((10, 12), np.uint16)).save(root / "masks/1.png"),
            "1.png must hold class indices of one byte a pixel, not 2 axes of uint16",
        ),
        (
            lambda root: Image.fromarray(np.full((10, 12), 9, np.uint8)).save(root / "masks/1.png"),
            "1.png has a pixel of class 9, of 2 from 0 on",
        ),
        (lambda root: [p.unlink() for p in root.glob("masks/*")], "masks is empty or not there"),
        (lambda root: cut(root / "masks/1.png", 0.5), "1.png cannot be read as an image"),
        (
            lambda root: (root / "images/1.png").write_bytes(b""),
            "images has two files of one name",
        ),
    ],
)
def test_pairs_that_will_not_do(spoil, sentence, tmp_path, tally):
    arguments = pairs(tmp_path)
    spoil(tmp_path)
    with pytest.raises(utils.UsageError, match=sentence):
        owndata.load_pairs(*arguments)
    tally.add("faults")


@pytest.mark.parametrize("ignore", [-100, 256])
def test_an_ignored_class_is_of_one_byte(ignore, tmp_path):
    with pytest.raises(utils.UsageError, match=f"ignore is {ignore}: a mask's pixels are 0 to 255"):
        owndata.load_pairs(*pairs(tmp_path), ignore=ignore)


# ---- npz


def test_npz_in_any_layout(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(6, 3, 8, 9), dtype=np.uint8)
    layouts = {"nchw": images, "nhwc": images.transpose(0, 2, 3, 1), "grey": images[:, 0]}
    layouts["two bands"] = images[:, :2].transpose(0, 2, 3, 1)
    for layout, array in layouts.items():
        np.savez_compressed(tmp_path / f"{layout}.npz", images=array, labels=np.arange(6) % 2)
        dataset = owndata.load_npz(tmp_path / f"{layout}.npz", "mine", ("a", "b"))
        expected = images[:, : {"grey": 1, "two bands": 2}.get(layout, 3)]
        assert (dataset.images.numpy() == expected).all() and dataset.labels.dtype == torch.int64


def test_npz_labels_are_no_measure_of_memory(tmp_path):
    labels = np.array([0, 1, 0, 2**32 - 1], dtype=np.uint32)  # "ignore", to some
    np.savez(tmp_path / "mine.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    with pytest.raises(utils.UsageError, match="1 labels are out of range 0 to 254, 4294967295"):
        owndata.load_npz(tmp_path / "mine.npz", "mine")


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (dict(images=np.zeros((4, 8, 8))), "images must be uint8"),
        (dict(labels=np.array([0.0, 1, 0, 1])), "labels whole numbers, not uint8 and float64"),
        (dict(labels=np.array([0, 1, 0, 7])), "1 labels are out of range 0 to 1, 7 for one"),
        (dict(labels=np.array([0, -1, 0, 1])), "out of range 0 to 1, -1 for one"),
        (dict(labels=np.array([0, 1, 0])), r"not \(3,\) for images \(4, 1, 8, 8\)"),
        (dict(images=np.zeros((0, 8, 8), np.uint8)), "there are no images"),
        (dict(images=np.zeros((4, 8), np.uint8)), r"must be uint8 \(N, C, H, W\)"),
        (dict(labels=np.array([{}, 1, 2, 3], dtype=object)), "cannot be read as npz .*pickle"),
    ],
)
def test_npz_files_that_will_not_do(arrays, sentence, tmp_path, tally):
    good = dict(images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, 0, 1]))
    np.savez(tmp_path / "mine.npz", **{**good, **arrays})
    with pytest.raises(utils.UsageError, match=sentence):
        owndata.load_npz(tmp_path / "mine.npz", "mine", ("a", "b"))
    tally.add("faults")


def test_an_array_that_is_missing_is_named(tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(utils.UsageError, match="no array called images: it has x, labels"):
        owndata.load_npz(tmp_path / "mine.npz", "mine", ("a", "b"))
    with pytest.raises(utils.UsageError, match="cannot be read as npz .*No such file"):
        owndata.load_npz(tmp_path / "other.npz", "mine", ("a", "b"))


# ---- a data set that does not go with the model


def linear(inputs, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs, classes))


def toy(channels=1, classes=3, shape=()):
    images = torch.zeros(12, channels, 4, 4, dtype=torch.uint8)
    labels = torch.arange(12).view(12, *([1] * len(shape))).expand(12, *shape) % classes
    return utils.Dataset("toy", "own", images, labels.clone(), tuple("abcdefghij")[:classes])


@pytest.mark.parametrize(
    ("dataset", "model", "sentence"),
    [
        (toy(channels=3), linear(16, 3), r"Sequential can't take images of shape \(3, 4, 4\)"),
        (toy(classes=4), linear(16, 3), "scores for 3 classes, where toy has 4"),
        (toy(), linear(16, 4), "scores for 4 classes, where toy has 3"),
        (toy(), linear(16, 300), "scores for 300 classes: 255 at most"),
        (toy(shape=(4, 4)), linear(16, 3), r"scores of shape \(3,\) .*give \(classes, 4, 4\)"),
        (toy(), torch.nn.Conv2d(1, 3, 1), r"scores of shape \(3, 4, 4\) .*give \(classes\)"),
    ],
)
def test_a_model_that_does_not_fit_is_told_before_training(dataset, model, sentence, run, tally):
    batches = utils.Batches(dataset, 4, run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(utils.UsageError, match=sentence):
        utils.train(model, optimizer, batches, batches, 1, run)
    tally.add("faults")


def test_a_fault_of_the_device_is_not_the_models(run, tally):
    class Broken(torch.nn.Linear):
        def forward(self, images):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model, batches = Broken(16, 3), utils.Batches(toy(), 4, run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access"):
        utils.train(model, optimizer, batches, batches, 1, run)
    tally.add("faults")


def test_a_dataloader_with_labels_out_of_range_is_told_in_time(run, tally):
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1, 4, 4), labels)
    loader, model = torch.utils.data.DataLoader(data, 4), linear(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(utils.UsageError, match="A batch: 1 labels are out of range 0 to 2, 3"):
        utils.train(model, optimizer, loader, loader, 1, run)
    tally.add("faults")


def test_a_dataloader_with_labels_out_of_range_is_not_scored(run, tally):
    """-100, say, which torch's own losses ignore; of what is only to be labelled, none is read."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, -100])
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1, 4, 4), labels)
    loader, model = torch.utils.data.DataLoader(data, 4), linear(16, 3)
    sentence = "A batch: 1 labels are out of range 0 to 2, -100"
    with pytest.raises(utils.UsageError, match=sentence):
        utils.evaluate(model, loader, run)
    with pytest.raises(utils.UsageError, match=sentence):
        utils.evaluate_pixels(model, loader, 3, run)
    assert len(utils.predict(model, loader, run)[0]) == 8
    tally.add("faults")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.uint8, torch.int64),
        (torch.float64, torch.int64),
        (torch.float32, torch.int32),
        (torch.float32, torch.float32),
    ],
)
def test_batches_of_other_types_are_told_before_training(images, labels, run, tally):
    pairs = torch.zeros(8, 1, 4, 4, dtype=images), torch.zeros(8, dtype=labels)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pairs), 4)
    model = linear(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(utils.UsageError, match="must be float32 images and int64 labels"):
        utils.train(model, optimizer, loader, loader, 1, run)
    tally.add("faults")


def test_a_loss_must_take_what_is_ignored(run, tally):
    model, batches = linear(16, 3), utils.Batches(toy(), 4, run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parts = model, optimizer, batches, batches, 1, run
    with pytest.raises(utils.UsageError, match=r"loss_function must take .* CrossEntropyLoss\(\)"):
        utils.train(*parts, loss_function=torch.nn.CrossEntropyLoss())
    checks.check_loss(max)  # a builtin: it cannot be looked into
    tally.add("faults")


def test_a_model_must_return_logits(run, tally):
    class Named(torch.nn.Linear):  # as torchvision's segmentation models do
        def forward(self, x):
            return {"out": super().forward(x.flatten(1))}

    model, batches = Named(16, 3), utils.Batches(toy(), 4, run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(utils.UsageError, match="Named must return logits, a Tensor, not dict"):
        utils.train(model, optimizer, batches, batches, 1, run)
    tally.add("faults")


@pytest.mark.parametrize("validation", [toy(channels=3), toy(classes=5), toy(shape=(4, 4))])
def test_validation_is_looked_at_before_training(validation, run, tally):
    model = linear(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches, others = (utils.Batches(data, 4, run) for data in (toy(), validation))
    with pytest.raises(utils.UsageError, match="Sequential"):
        utils.train(model, optimizer, batches, others, 1, run)
    tally.add("faults")


@pytest.mark.parametrize(
    ("labels", "classes", "sentence"),
    [
        (torch.zeros(12, dtype=torch.int8), 200, "labels must be uint8 or int64, not int8"),
        (np.zeros(12), 3, "must be tensors: torch.from_numpy"),
        (torch.zeros(12, dtype=torch.int64), 300, "300 classes are too many"),
    ],
)
def test_labels_that_a_data_set_cannot_hold(labels, classes, sentence):
    names = tuple(f"class {number}" for number in range(classes))
    with pytest.raises(utils.UsageError, match=sentence):
        utils.Dataset("toy", "own", toy().images, labels, names)


def test_masks_of_nothing_but_one_class_and_ignored_pixels(tmp_path, tally):
    """Black and white masks: white is 255, which would be ignored in silence."""
    arguments = pairs(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray((np.arange(120).reshape(10, 12) % 2 * 255).astype(np.uint8)).save(path)
    with pytest.raises(utils.UsageError, match=r"fewer than two classes \(0\) besides 255"):
        owndata.load_pairs(*arguments)
    tally.add("faults")


def test_no_batches_and_no_labels(run):
    model = linear(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(utils.UsageError, match="no batches"):
        utils.train(model, optimizer, [], [], 1, run)
    ignored = utils.Dataset("toy", "own", toy().images, torch.full((12,), 255), tuple("abc"))
    with pytest.raises(utils.UsageError, match="no label to score"):
        utils.evaluate(model, utils.Batches(ignored, 4, run), run)
    some, none = utils.Batches(toy(), 4, run), utils.Batches(ignored, 4, run)
    for parts in ((none, some), (some, none)):
        with pytest.raises(utils.UsageError, match="toy: every label is 255"):
            utils.train(model, optimizer, *parts, 1, run)
    loader = [(torch.zeros(2, 1, 4, 4), torch.full((2,), 255))]
    with pytest.raises(utils.UsageError, match="no label to learn from"):
        utils.train(model, optimizer, loader, some, 1, run)


@pytest.mark.parametrize("problem", [NotImplementedError(), OSError(errno.ENOLCK, "no locks")])
def test_a_file_system_without_locks_is_no_obstacle(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=problem))
    with files.locked(tmp_path / ".lock"):
        pass
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=OSError(errno.EROFS, "no")))
    with pytest.raises(OSError, match="no"), files.locked(tmp_path / ".lock"):
        pass
