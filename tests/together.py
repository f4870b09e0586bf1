"""A training run for one process or for several, started by torchrun: see test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report  # noqa: E402
import utils  # noqa: E402


class Cut(utils.Batches):
    """Batches whose second epoch is interrupted before it begins."""

    def set_epoch(self, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        super().set_epoch(epoch)


def main(folder: Path, again: bool) -> None:
    """Two epochs on digits, in float32; the first process leaves what came out in folder.

    Then a second such run, which is cut short after its first epoch, and goes on when run `again`.
    """
    run = utils.settings(environ={**os.environ, "PRECISION": "float32"})
    training, test = utils.load_mnist(run)
    training = training.subset(torch.arange(0, 4000, 5))  # 800: the last batch has 32
    validation = utils.Batches(test, 100, run, training.statistics())
    notebook = report.notebook_definitions("imageclassification.ipynb")
    history = _plain("both", utils.Batches, notebook, run, training, validation)
    normed = _normed(notebook, run, training, validation)
    kind = utils.Batches if again else Cut
    cut = _plain("cut", kind, notebook, run, training, validation)
    if utils.rank() == 0:
        result = dict(losses=[e.loss for e in history], accuracy=[e.accuracy for e in history])
        result["validation"] = [e.validation_accuracy for e in history]
        result["device"] = history.made["device"]
        result["cut"] = [e.loss for e in cut]
        result |= normed
        (folder / "result.json").write_text(json.dumps(result))


def _plain(name, kind, notebook, run, training, validation) -> utils.History:
    """Two epochs of a model without batch normalisation."""
    torch.manual_seed(utils.rank())  # the first process's weights must win
    model = notebook.MnistCNN(4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    batches = kind(training, 64, run, shuffle=True)
    schedule = utils.one_cycle(optimizer, batches, 2, 2e-3)
    checkpoint = run.checkpoint(name)
    return utils.train(
        model, optimizer, batches, validation, 2, run, schedule, checkpoint=checkpoint
    )


def _normed(notebook, run, training, validation) -> dict:
    """A model with batch normalisation: its score, and whether all processes ended with one."""
    torch.manual_seed(0)
    model = notebook.DigitNet(4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    batches = utils.Batches(training, 64, run, shuffle=True)
    checkpoint = run.checkpoint("normed")
    history = utils.train(model, optimizer, batches, validation, 2, run, checkpoint=checkpoint)
    averages = sum(buffer.double().sum() for buffer in model.buffers())
    everyones = averages.clone()
    utils.add_up(everyones)
    alike = bool(everyones == utils.world_size() * averages)
    scores = dict(
        recorded=history[-1].validation_accuracy,
        score=utils.evaluate(model, validation, run),
        confusion=utils.evaluate_pixels(model, validation, 10, run).confusion.tolist(),
    )
    return dict(scores, alike=alike)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "again" in sys.argv)
