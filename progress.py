"""Shows a run as it goes: a plot and a line in a notebook, a line per epoch in a script."""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from checkpoints import require_finite
from settings import Settings


class Progress:
    """What a run of so many epochs of `batches` looks like from outside.

    The report every 25 iterations shows totals whose copy was begun at an earlier report and has
    arrived, so it never waits for the device; it is drawn every two seconds at most. A loss that is
    not finite raises there. A quiet run shows nothing, and still raises.
    """

    def __init__(self, title: str, batches: Iterable, epochs: int, run: Settings):
        self.title, self.epochs, self.steps, self.quiet = title, epochs, len(batches), run.quiet
        self.source = getattr(getattr(batches, "dataset", None), "source", "own")
        cuda = run.device.type == "cuda"
        self.totals = torch.zeros(4, dtype=torch.float64, pin_memory=cuda)
        self.copied = torch.cuda.Event() if cuda else None
        self.place, self.displays, self.shown, self.pause = None, {}, 0.0, 0.0

    def step(self, epoch: int, step: int, totals: Tensor) -> None:
        """Every 25 iterations: mean loss and accuracy of the epoch so far."""
        arrived = self.copied is None or self.copied.query()
        if self.place:
            if not arrived:
                return  # a newer copy would arrive later still: a GPU may be many steps behind
            require_finite(*self.place, self.totals)
            loss, correct, count, _ = self.totals.tolist()
            if count and time.perf_counter() - self.shown > 2:  # some labels may be ignored
                scores = f"loss {loss / count:.4f}, training {100 * correct / count:.2f}%"
                at = f"epoch {self.place[0]}/{self.epochs}, step {self.place[1]}/{self.steps}"
                self._line(f"{at}: {scores}", final=False)
        self.place = epoch, step
        self.totals.copy_(totals, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def epoch(self, history: Sequence) -> None:
        """After every epoch: its seconds, loss and accuracies, the time left; and the plot, but for
        short epochs, lest drawing take more than a fiftieth of the time."""
        self.place = None  # what was copied is of this epoch
        e = history[-1]
        scores = f"training {e.accuracy:.2f}%, validation {e.validation_accuracy:.2f}%"
        line = f"epoch {e.epoch}/{self.epochs}: {e.seconds:.1f} s, loss {e.loss:.4f}, {scores}"
        if left := self.epochs - e.epoch:
            left *= sum(e.seconds + e.validation_seconds for e in history) / len(history)
            line += f", {left:.0f} s left" if left < 120 else f", {left / 60:.0f} min left"
        self._line(line, final=True)
        if time.perf_counter() > self.pause:
            self.plot(history)

    def plot(self, history: Sequence) -> None:
        """Accuracy against epoch so far; only in a notebook, always in the same place."""
        if self.quiet or not history or not _in_notebook():
            return
        import report  # only here: a script draws nothing while it trains

        started = time.perf_counter()
        figure = report.draw_curves(history, self.title, self.source, self.epochs)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        picture = base64.b64encode(buffer.getvalue()).decode()
        self._display("plot", {"image/png": picture, "text/plain": f"{self.title}: a plot"})
        self.pause = 50 * (time.perf_counter() - started) + started

    def _line(self, text: str, final: bool) -> None:
        self.shown = time.perf_counter()
        if self.quiet:
            return
        if _in_notebook():
            self._display("line", {"text/plain": text})
        elif sys.stdout.isatty():
            print(f"\r{text:<99}", end="\n" if final else "", flush=True)
        elif final:
            print(text, flush=True)

    def _display(self, name: str, message: dict) -> None:
        """Show a message, or put it where the last one of that name stands."""
        from IPython.display import display

        if name in self.displays:
            self.displays[name].update(message, raw=True)
        else:
            self.displays[name] = display(message, raw=True, display_id=True)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
