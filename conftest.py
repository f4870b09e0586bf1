"""A test run trains afresh: what an earlier run left is loaded only where CHECKPOINT_DIR is set."""

import os
import shutil
import tempfile

_made = None


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="FOLDER", help="where `-m browser` leaves pictures")


def pytest_configure(config):
    global _made
    if "CHECKPOINT_DIR" not in os.environ:
        _made = os.environ["CHECKPOINT_DIR"] = tempfile.mkdtemp(prefix="checkpoints-")
    nbval = config.getoption("nbval", False) or config.getoption("nbval_lax", False)
    if config.args_source is config.ArgsSource.TESTPATHS and not nbval:
        config.args = [path for path in config.args if not path.endswith(".ipynb")]


def pytest_unconfigure(config):
    if _made:
        os.environ.pop("CHECKPOINT_DIR", None)
        shutil.rmtree(_made, ignore_errors=True)
