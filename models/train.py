"""Train one model on any mesh, on the text of Python's standard library.

    python -m models.train --family llama --preset debug --mesh fsdp=2,tp=2 --steps 200 --seed 0

The same line works by hand (it starts its own ranks), under torchrun on several hosts, and with
`--mesh ""` in this one process. Status 2 is a mistake in the arguments, 1 a run that failed.
"""

import argparse
import faulthandler
import importlib
import math
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import models
import shardspec as ss
from models import data
from models.checkpoints import checkpoint_of, find_checkpoint, other_settings, saved_step, write_settings
from models.launch import launch, under_launcher
from models.report import Report
from shardspec.policy import STRATEGIES
from shardspec.schedule import SCHEDULES

DTYPES = {"float32": torch.float32, "float64": torch.float64}
VALIDATION_BATCHES = 8
SAMPLE_LIMIT = 100_000_000  # parameters: a larger model is not gathered on every rank for a sample
PROMPT = "def "


class UsageError(Exception):
    """A mistake in the arguments; its message is one line."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError`, so that one place decides which rank prints."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; raise `UsageError` for one that is malformed."""
    parser = Parser(prog="python -m models.train", description=__doc__.splitlines()[0], allow_abbrev=False)
    whole = at_least(1)
    parser.add_argument("--family", default="llama", help="a package of models/")
    parser.add_argument("--preset", default="debug", help="a size of the family")
    parser.add_argument("--mesh", default="", help='sizes of axes, as in fsdp=2,tp=2; "" is one process')
    parser.add_argument("--steps", type=whole, default=200)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--batch", type=whole, default=16, help="sequences in a global batch")
    parser.add_argument("--seq", type=whole, default=128, help="bytes in a sequence")
    parser.add_argument("--lr", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--warmup", type=at_least(0), default=20, help="steps to reach it")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="the largest global gradient norm")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1F1B", help="the order of a pipeline's work")
    parser.add_argument("--microbatches", type=whole, help="of a step (default: one for each stage of a pipeline)")
    parser.add_argument("--attention", choices=STRATEGIES, default="allgather", help="over a sequence split over cp")
    parser.add_argument("--no-sp", action="store_true", help="no sequence parallelism over tp")
    parser.add_argument("--metrics", type=Path, help="JSON lines (default: under runs/)")
    parser.add_argument("--out", type=Path, help="where the run is saved: at its end, and")
    parser.add_argument("--save-every", type=whole, help="after so many steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint, or the --out of a run: its latest one")
    parser.add_argument("--log-every", type=whole, default=10, help="steps between two shown")
    return parser.parse_args(argv)


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def find_family(name: str) -> ModuleType:
    """Import the package models.<name>, which exports RULES, PRESETS and build.

    It exports `loss_fn` too where the model is trained on more than the cross-entropy of the next byte, and
    `update_buffers` where a step changes its buffers.
    """
    families = sorted(module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg)
    if name not in families:
        raise UsageError(f"unknown family {name!r}: there are {', '.join(families)}")
    family = importlib.import_module(f"models.{name}")
    reads = getattr(family, "READS", "text")
    if reads != "text":
        raise UsageError(f"family {name!r} reads {reads}: this job trains on text")
    return family


def find_preset(family: ModuleType, name: str) -> object:
    """Return the config of a preset."""
    if name not in family.PRESETS:
        raise UsageError(f"unknown preset {name!r}: there are {', '.join(family.PRESETS)}")
    return family.PRESETS[name]


def find_rules(family: ModuleType, *, no_sp: bool) -> ss.Rules:
    """Return the family's table, or the one without sequence parallelism."""
    if no_sp and not hasattr(family, "WITHOUT_SP"):
        raise UsageError(f"{family.__name__} has no table without sequence parallelism")
    return family.WITHOUT_SP if no_sp else family.RULES


def parse_mesh(text: str) -> ss.Mesh:
    """Read the mesh; under a launcher its size must be the world's."""
    world = int(os.environ["WORLD_SIZE"]) if under_launcher() else None
    try:
        return ss.Mesh.parse(text, world=world)
    except ss.ShardingError as error:
        first = error.diagnostics[0]
        raise UsageError(f"{first.what} ({first.why})" if first.why else first.what) from None


def find_device(asked: str) -> str:
    """Return "cpu" or "cuda"."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> int:
    """Check the arguments, then run as a rank, alone, or as the launcher of ranks."""
    try:
        options = parse_arguments(argv)
        family = find_family(options.family)
        config = find_preset(family, options.preset)
        find_rules(family, no_sp=options.no_sp)
        options.world = parse_mesh(options.mesh).world
        options.device = find_device(options.device)
        longest = getattr(config, "max_seq_len", options.seq)
        if options.seq > longest:
            raise UsageError(f"--seq {options.seq}: preset {options.preset} reads at most {longest}")
        find_resumed(options)
        if options.save_every and not options.out:
            raise UsageError("--save-every needs --out, the folder to save to")
        if is_first():
            touch(metrics_path(options))
            make_out(options)
    except UsageError as error:
        return refuse(f"error: {error}", status=2)
    if options.world > 1 and not under_launcher():
        return launch(run_rank, options, options.world)
    try:
        run_rank(options)
    except ss.ShardingError as error:
        return refuse(str(error), status=1)
    return 0


def refuse(message: str, *, status: int) -> int:
    """Print on the first rank what every rank has found, and return the status to exit with."""
    if is_first():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # a launcher ends every rank when one exits: let the first one print
    return status


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def run_rank(options: argparse.Namespace) -> None:
    """Train as one rank of the mesh."""
    faulthandler.enable()
    torch.set_default_dtype(DTYPES[options.dtype])
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if options.world > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    train(options)
    if options.world > 1:
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Run the job that `options` describes, from the plan to the closing line."""
    family = find_family(options.family)
    config = find_preset(family, options.preset)
    corpus = data.load_corpus()
    shape = {"batch": options.batch, "seq": options.seq}

    def build() -> torch.nn.Module:
        return family.build(config)

    mesh = parse_mesh(options.mesh)
    # Where a rank holds a part of the sequence, the places of its tokens come with them.
    whole = data.with_positions if mesh["cp"] > 1 else dict
    inputs = whole(data.train_batch(corpus.train, seed=options.seed, step=0, **shape))
    rules = find_rules(family, no_sp=options.no_sp)
    policy = ss.Policy(schedule=options.schedule, microbatches=options.microbatches, attention=options.attention)
    sharded = ss.shard(build, rules, mesh, inputs, policy=policy)
    if is_first():
        print(sharded.plan, flush=True)

    optimizer = ss.adamw(lr=schedule(options), betas=(0.9, 0.95), weight_decay=options.weight_decay)
    if options.resume:
        state = ss.restore(sharded, options.resume, optimizer=optimizer)
    else:
        state = sharded.init(optimizer, seed=options.seed)
    loss = getattr(family, "loss_fn", loss_fn)
    step_fn = ss.train_step(sharded, loss, clip=options.clip, buffers=getattr(family, "update_buffers", None))
    report = Report(
        metrics_path(options) if is_first() else None,
        start=state.step,
        steps=options.steps,
        tokens_per_step=options.batch * options.seq,
        log_every=options.log_every,
    )
    with report.running():
        for step in range(state.step, options.steps):
            batch = whole(data.train_batch(corpus.train, seed=options.seed, step=step, **shape))
            state, metrics = step_fn(state, sharded.local_batch(batch))
            report.step(step + 1, metrics)
            if options.out and (step + 1 == options.steps or (step + 1) % (options.save_every or options.steps) == 0):
                report.flush()  # whoever goes on from here finds the metrics of the steps before
                ss.save(state, checkpoint_of(options.out, step + 1))
        rate = report.tokens_per_second
        batches = data.validation_batches(corpus.validation, count=VALIDATION_BATCHES, **shape)
        validation = validate(sharded, state, map(whole, batches))
        unigram = data.entropy_unigram(corpus.train, corpus.validation)
        report.write(step=options.steps, validation_loss=validation, unigram=unigram, tokens_per_s=rate)
    text = sample(sharded, state, build, options.seed)
    if is_first():
        print(text)
        print(
            f"done: mesh={options.mesh} steps={options.steps} loss={report.loss:.4f} val={validation:.4f} "
            f"unigram={unigram:.4f} tokens_per_s={rate:.0f}",
            flush=True,
        )


def loss_fn(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy of the next byte and the number of bytes."""
    return ss.cross_entropy(logits_of(output), batch["labels"])


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits, the first of several things that a family's forward may return."""
    return output[0] if isinstance(output, tuple) else output


def schedule(options: argparse.Namespace) -> Callable[[int], float]:
    """Return the learning rate as a function of the step: linear warm-up, then a cosine to a tenth."""

    def rate(step: int) -> float:
        warm = min(1.0, step / options.warmup) if options.warmup else 1.0
        done = max(0, step - options.warmup) / max(1, options.steps - options.warmup)
        return options.lr * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))

    return rate


def metrics_path(options: argparse.Namespace) -> Path:
    """Return where the metrics go: as told, or named after the run."""
    mesh = options.mesh.replace("=", "").replace(",", "-") or "single"
    return options.metrics or Path("runs") / f"{options.family}-{options.preset}-{mesh}.jsonl"


def find_resumed(options: argparse.Namespace) -> None:
    """Find the checkpoint to go on from, and make sure that this run can."""
    if not options.resume:
        return
    options.resume = find_checkpoint(options.resume)
    step = saved_step(options.resume)
    if step >= options.steps:
        raise UsageError(f"--steps {options.steps}: {options.resume} is of step {step} already")
    differs = other_settings(options.resume, options)
    if differs:
        raise UsageError(differs)


def make_out(options: argparse.Namespace) -> None:
    """Make the folder of the run, before anything long begins."""
    try:
        if options.out:
            write_settings(options.out, options)
    except OSError as error:
        raise UsageError(f"--out {options.out}: {error.strerror}") from None


def touch(path: Path) -> None:
    """Make sure that `path` can be written, before anything long begins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"--metrics {path}: {error.strerror}") from None


def validate(sharded: ss.Sharded, state: ss.TrainState, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss over global batches, in nats a byte."""
    step_fn = ss.eval_step(sharded, loss_fn)
    losses = [float(step_fn(state, sharded.local_batch(batch))["loss"]) for batch in batches]
    return sum(losses) / len(losses)


def sample(sharded: ss.Sharded, state: ss.TrainState, build: Callable[[], torch.nn.Module], seed: int) -> str:
    """Gather the model and let it write; every rank must call this, since each holds a part."""
    with torch.device("meta"):
        hollow = build()
    size = sum(p.numel() for p in hollow.parameters())
    if size > SAMPLE_LIMIT:
        return f"no sample: {size:,} parameters are more than {SAMPLE_LIMIT:,}"
    full = sharded.state_dict(state)
    if not is_first():
        return ""
    model = build()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(full[name])
    return generate(model.eval(), PROMPT, length=300, seed=seed)


@torch.no_grad()
def generate(model: torch.nn.Module, prompt: str, *, length: int, seed: int, temperature: float = 0.7) -> str:
    """Continue `prompt` by `length` bytes drawn from the model's distribution."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits_V = logits_of(model(tokens))[0, -1, :256].float() / temperature
        drawn = torch.multinomial(logits_V.softmax(-1), 1, generator=rng)
        tokens = torch.cat((tokens, drawn[None]), dim=1)
    text = bytes(tokens[0].tolist()).decode(errors="replace")
    return "".join(char if char.isprintable() or char == "\n" else "\N{MIDDLE DOT}" for char in text)


if __name__ == "__main__":
    sys.exit(main())
