"""What a run shows while it goes, and what it leaves behind: a live line and JSON lines."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """Collects the metrics of each step and shows them; on ranks other than 0 it only reads them.

    Metrics stay tensors until `log_every` steps have gathered, so that a device is not waited for at
    every step.
    """

    def __init__(self, path: Path | None, *, steps: int, start: int = 0, tokens_per_step: int, log_every: int) -> None:
        self.loss = float("nan")
        self._file = None
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._log_every = log_every
        self._pending: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._began = self._timed_from = time.perf_counter()
        self._start = self._done = self._untimed = start
        self._live: Progress | None = None
        if path is not None:
            kept = lines_until(path, start)
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(kept)

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Show progress until the block ends: a bar on a terminal, a line now and then elsewhere."""
        console = Console()
        with contextlib.ExitStack() as stack:
            if self._file is not None:
                stack.enter_context(self._file)
                if console.is_terminal:
                    self._live = stack.enter_context(progress_bar(console, self._steps))
            self._began = self._timed_from = time.perf_counter()
            yield self

    @property
    def tokens_per_second(self) -> float:
        """Global tokens a second, the first step left out where there is another (it pays for warm-up)."""
        return (self._done - self._untimed) * self._tokens_per_step / (time.perf_counter() - self._timed_from)

    def step(self, step: int, metrics: dict[str, torch.Tensor]) -> None:
        """Take the metrics of step `step`, counted from 1."""
        self._pending.append((step, metrics))
        if step % self._log_every == 0 or step in {self._start + 1, self._steps}:
            self.flush()
        if step == self._start + 1 < self._steps:
            self._timed_from, self._untimed = time.perf_counter(), step

    def write(self, **entry: float | list[Any]) -> None:
        """Append one JSON line of numbers, and of lists of them."""
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def flush(self) -> None:
        """Write and show the steps that have gathered."""
        if not self._pending:
            return
        for step, metrics in self._pending:
            values = {name: value.tolist() if value.ndim else float(value) for name, value in metrics.items()}
            self.loss = float(metrics["loss"])
            self.write(step=step, **values)
        self._done = self._pending[-1][0]
        self._pending.clear()
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=self._done, loss=self.loss, rate=self.tokens_per_second)
        elif self._file is not None:
            print(self._line(), flush=True)

    def _line(self) -> str:
        left = (time.perf_counter() - self._began) / (self._done - self._start) * (self._steps - self._done)
        return (
            f"step {self._done:>{len(str(self._steps))}}/{self._steps}  loss {self.loss:.4f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {left:.0f} s left"
        )


def lines_until(path: Path, step: int) -> list[str]:
    """The JSON lines of steps up to `step`: what a run that goes on from there has before its own."""
    if not step or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [
        line
        for line in lines
        if line.endswith("\n") and json.loads(line).keys() >= {"step", "loss"} and json.loads(line)["step"] <= step
    ]


def progress_bar(console: Console, steps: int) -> Progress:
    """Build the live line: step, loss, tokens a second, time left."""
    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
    bar.add_task("train", total=steps, loss=float("nan"), rate=0.0)
    return bar
