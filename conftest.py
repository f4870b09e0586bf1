"""A test run trains afresh: what an earlier run left is loaded only where CHECKPOINT_DIR is set."""

import os
import shutil
import tempfile


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="FOLDER", help="where `-m browser` leaves pictures")


def pytest_configure(config):
    if not os.environ.get("CHECKPOINT_DIR"):
        made = os.environ["CHECKPOINT_DIR"] = tempfile.mkdtemp(prefix="checkpoints-")
        config.add_cleanup(lambda: os.environ.pop("CHECKPOINT_DIR", None))
        config.add_cleanup(lambda: shutil.rmtree(made, ignore_errors=True))
    nbval = config.getoption("nbval", False) or config.getoption("nbval_lax", False)
    if config.args_source is config.ArgsSource.TESTPATHS and not nbval:
        config.args = [path for path in config.args if not path.endswith(".ipynb")]
