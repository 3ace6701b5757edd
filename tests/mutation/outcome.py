"""What becomes of an edited table: it is refused, or it runs as the plain program does; anything else is a bug."""

import random
import traceback
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor, nn

import shardspec as ss
from tests.distributed.harness import RankError, run_ranks
from tests.mutation.damaging import damaged, entries_of
from tests.mutation.preserving import kept
from tests.mutation.subjects import MESHES, SUBJECTS, Subject, make_batch, points

TOLERANCE = 1e-10
STEPS = 2
CLIP = 0.5
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
CHUNK = 30
"""How many tables the same ranks run before they are forked anew."""

REFUSED, PARITY = "refused", "in parity"
DIFFERS, RUN_FAILS, CHECK_FAILS = "differs", "fails at run", "the check fails"


@attrs.frozen(eq=False, kw_only=True)
class Mutant:
    """A right table with one thing changed, and the mesh that it is tried on."""

    subject: Subject
    mesh: str
    intent: str
    """"damaging" or "preserving"."""
    mutator: str
    text: str
    rules: ss.Rules

    @property
    def world(self) -> int:
        """The number of ranks."""
        return ss.Mesh.parse(self.mesh).world

    def __str__(self) -> str:
        return f"{self.subject} on {self.mesh}, {self.mutator}: {self.text}"


@attrs.frozen(eq=False, kw_only=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    detail: str = ""
    """Codes, differences, or a traceback."""
    diagnostics: tuple[ss.Diagnostic, ...] = ()

    @property
    def third(self) -> bool:
        """Neither refused nor in parity."""
        return self.verdict not in (REFUSED, PARITY)

    def __str__(self) -> str:
        return f"{self.verdict}: {self.mutant}\n  {self.detail}"


def draw(count: int, seed: int) -> list[Mutant]:
    """`count` different mutants, every second one meant to keep the meaning, over all subjects and meshes."""
    rng = random.Random(seed)
    drawn: dict[object, Mutant] = {}
    while len(drawn) < count:
        at = len(drawn)
        subject, mesh = rng.choice(SUBJECTS), MESHES[at // 2 % len(MESHES)]
        if at % 2:
            intent, (mutator, (text, rules)) = "preserving", kept(subject, ss.Mesh.parse(mesh), rng)
        else:
            intent, (mutator, (text, rules)) = "damaging", damaged(subject.rules, points(subject), rng)
        mutant = Mutant(subject=subject, mesh=mesh, intent=intent, mutator=mutator, text=text, rules=rules)
        drawn.setdefault((subject.name, mesh, repr(entries_of(rules))), mutant)
    return list(drawn.values())


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and the number of labels that count."""
    return ss.cross_entropy(output, batch["labels"])


def check(mutant: Mutant) -> Outcome | None:
    """The refusal of a mutant, or the crash of its check; nothing where it is accepted."""
    try:
        ss.compile(mutant.subject.make, mutant.rules, ss.Mesh.parse(mutant.mesh), make_batch(0), loss_fn)
    except ss.ShardingError as error:
        codes = " ".join(sorted({each.code for each in error.diagnostics}))
        return Outcome(mutant=mutant, verdict=REFUSED, detail=codes, diagnostics=error.diagnostics)
    except Exception:  # any other error is what is looked for
        return Outcome(mutant=mutant, verdict=CHECK_FAILS, detail=traceback.format_exc())
    return None


def run_sharded(mutant: Mutant) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients, losses, norms and parameters of steps, on the ranks of the mesh; called on every rank."""
    torch.set_default_dtype(torch.float64)
    sharded = ss.shard(mutant.subject.make, mutant.rules, ss.Mesh.parse(mutant.mesh), make_batch(0))
    state = sharded.init(ss.adamw(**OPTIMIZER), seed=3)
    found = {"initial": _whole(state.params)}
    (loss, _), grads = sharded.value_and_grad(loss_fn)(state.params, sharded.local_batch(make_batch(0)), state.rng)
    found |= {"loss": {"": loss.detach()}, "grads": _whole(grads)}
    step_fn = ss.train_step(sharded, loss_fn, clip=CLIP)
    told: dict[str, Tensor] = {}
    for step in range(STEPS):
        state, metrics = step_fn(state, sharded.local_batch(make_batch(step)))
        told |= {f"{name} {step}": metrics[name].detach().clone() for name in ("loss", "grad_norm")}
    return found | {"metrics": told, "params": _whole(state.params)}


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: ss.full(tensor).clone() for name, tensor in tensors.items()}


def run_plain(subject: Subject, initial: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same by a plain loop with torch's own loss, optimizer and clipping."""
    model = subject.make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    _plain_loss(model, 0).backward()
    found = {
        "loss": {"": _plain_loss(model, 0).detach()},
        "grads": {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
    }
    told: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = _plain_loss(model, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        told |= {f"loss {step}": loss.detach(), f"grad_norm {step}": norm.detach()}
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return found | {"metrics": told, "params": params}


def _plain_loss(model: nn.Module, step: int) -> Tensor:
    batch = make_batch(step)
    logits = model(batch["tokens"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def worst(plain: dict[str, dict[str, Tensor]], sharded: dict[str, dict[str, Tensor]]) -> tuple[float, str]:
    """The largest difference and where it is."""
    found = [(float("inf"), f"{kind} have other names") for kind in plain if plain[kind].keys() != sharded[kind].keys()]
    for kind, tensors in plain.items():
        for name in tensors.keys() & sharded[kind].keys():
            gap = float((tensors[name] - sharded[kind][name].cpu()).abs().max())
            found.append((gap if gap == gap else float("inf"), f"{kind} {name}".strip()))
    return max(found)


def on_rank(rank: int, world: int, mutants: Sequence[Mutant]) -> list[tuple[float, str] | None]:
    """Run mutants of one world size on this rank; rank 0 compares each with the plain program."""
    torch.set_num_threads(1)
    found: list[tuple[float, str] | None] = []
    for mutant in mutants:
        sharded = run_sharded(mutant)
        found.append(None if rank else worst(run_plain(mutant.subject, sharded["initial"]), sharded))
    return found


def run(mutants: Sequence[Mutant]) -> Iterator[Outcome]:
    """The outcome of mutants that the check accepts; those of one world size share ranks."""
    for world in sorted({mutant.world for mutant in mutants}):
        same = [mutant for mutant in mutants if mutant.world == world]
        for start in range(0, len(same), CHUNK):
            yield from _run_chunk(world, same[start : start + CHUNK])


def _run_chunk(world: int, mutants: Sequence[Mutant]) -> Iterator[Outcome]:
    try:
        gaps = run_ranks(world, on_rank, mutants, timeout=60 + 20 * len(mutants))[0]
    except RankError as error:
        if len(mutants) == 1:
            yield Outcome(mutant=mutants[0], verdict=RUN_FAILS, detail=str(error))
            return
        for mutant in mutants:  # so that a failure is one mutant's own
            yield from _run_chunk(world, [mutant])
        return
    for mutant, (gap, where) in zip(mutants, gaps, strict=True):
        verdict = PARITY if gap <= TOLERANCE else DIFFERS
        yield Outcome(mutant=mutant, verdict=verdict, detail=f"{gap:.1e} at {where}")


def outcomes(mutants: Sequence[Mutant]) -> list[Outcome]:
    """What became of each: checked here, and run on forked ranks where it is accepted."""
    checked = [(mutant, check(mutant)) for mutant in mutants]
    return [found for _, found in checked if found] + list(run([mutant for mutant, found in checked if not found]))
