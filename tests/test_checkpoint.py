"""Checkpoints of one process: what is refused, what is damaged, and a kill before each thing that a save does."""

import errno
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from shardspec.runtime import publish
from shardspec.runtime.pieces import Piece, entry, leaves, runs, with_leaves


class Tiny(nn.Module):
    """A product with a bias, a tied weight, and a buffer that counts."""

    def __init__(self, width: int = 6, *, extra: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 4, bias=extra)
        self.again = self.down
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        return self.again(torch.tanh(self.down(torch.tanh(self.up(x))) @ self.down.weight).tanh())


PARAMS = {r"up\.weight": "F D", r"up\.bias": "F", r"(down|again)\.weight": "D F", "seen": ""}
RULES = ss.Rules(params=PARAMS, activations={"x": "B@fsdp D"})
WITH_BIAS = RULES.override(params={r"(down|again)\.bias": "D"})


def squares(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return output.square().sum(), output[:, 0].detach().square().sum() * 0 + len(output)


def batch(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(step))}


def shard(build: Callable[[], nn.Module] = Tiny, rules: ss.Rules = RULES) -> ss.Sharded:
    return ss.shard(build, rules, ss.Mesh())


def train(state: ss.TrainState, steps: int) -> ss.TrainState:
    step_fn = ss.train_step(state.home, squares)
    for _ in range(steps):
        state, _ = step_fn(state, batch(state.step))
    return state


def values(state: ss.TrainState) -> dict[str, Tensor]:
    """Every tensor of a state, copied."""
    found = {"/".join(path): leaf for path, leaf in leaves(state.opt_state.raw if state.opt_state else None)}
    found = {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor)}
    return {name: tensor.clone() for name, tensor in (found | state.home.state_dict(state)).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of step 2 with AdamW."""
    ss.save(train(shard().init(ss.adamw(lr=0.1), seed=4), 2), tmp_path / "state")
    return tmp_path / "state"


def refused(code: str, *words: str) -> Any:
    """Within it, a ShardingError of one code is raised that says the words."""

    def says(error: ss.ShardingError) -> bool:
        return {one.code for one in error.diagnostics} == {code} and all(word in str(error) for word in words)

    return pytest.raises(ss.ShardingError, check=says)


# The round trip.


def test_a_run_that_is_saved_and_restored_goes_on_bitwise_as_if_it_had_not_been(tmp_path: Path):
    through = train(shard().init(ss.adamw(lr=0.1), seed=4), 6)
    state = train(shard().init(ss.adamw(lr=0.1), seed=4), 3)
    ss.save(state, tmp_path / "deep" / "state")
    again = ss.restore(shard(), tmp_path / "deep" / "state")
    assert (again.step, again.rng) == (3, state.rng)
    assert same(values(again), values(state))
    assert same(values(train(again, 3)), values(through))
    assert same(values(train(state, 3)), values(through))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state"]


def test_the_options_of_the_optimizer_are_the_saved_ones_or_those_that_are_given(tmp_path: Path):
    groups = {r"up\..*": {"weight_decay": 0.5, "lr": 0.2}}
    ss.save(shard().init(ss.adamw(lr=0.1, betas=(0.5, 0.6), groups=groups)), tmp_path / "state")
    again = ss.restore(shard(), tmp_path / "state")
    assert again.opt_state.optimizer.lr(1) == 0.1
    wanted = train(shard().init(ss.adamw(lr=0.1, betas=(0.5, 0.6), groups=groups)), 2)
    assert same(values(train(again, 2)), values(wanted))
    other = ss.restore(shard(), tmp_path / "state", optimizer=ss.adamw(lr=0.7))
    assert other.opt_state.optimizer.lr(1) == 0.7


def test_a_schedule_is_given_again_or_is_that_of_the_last_state(tmp_path: Path):
    schedule = ss.adamw(lr=lambda step: 0.1 / step)
    sharded = shard()
    ss.save(sharded.init(schedule), tmp_path / "state")
    assert ss.restore(sharded, tmp_path / "state").opt_state.optimizer is schedule
    with refused("SS408", "optimizer=", "functions"):
        ss.restore(shard(), tmp_path / "state")
    assert ss.restore(shard(), tmp_path / "state", optimizer=schedule).step == 0


def test_a_state_without_an_optimizer_is_saved_and_restored(tmp_path: Path):
    weights = {name: torch.randn_like(tensor) for name, tensor in Tiny().state_dict().items()}
    weights["again.weight"] = weights["down.weight"]
    ss.save(shard().load(weights), tmp_path / "state")
    again = ss.restore(shard(), tmp_path / "state")
    assert again.opt_state is None
    plain = Tiny()
    plain.load_state_dict(again.home.state_dict(again), strict=True)
    assert same(plain.state_dict(), weights)
    with refused("SS408", "optimizer/exp_avg/up.weight"):
        ss.restore(shard(), tmp_path / "state", optimizer=ss.adamw())


def test_a_model_on_meta_is_given_its_values_by_a_checkpoint(saved: Path):
    with torch.device("meta"):
        hollow = Tiny()
    again = ss.restore(ss.shard(hollow, RULES, ss.Mesh()), saved)
    assert same(values(again), values(ss.restore(shard(), saved)))
    assert train(again, 1).step == 3


def test_grad_fn_reads_the_restored_buffers(saved: Path):
    again = ss.restore(shard(), saved)
    assert float(again.buffers["seen"]) == 2
    again.home.value_and_grad(squares)(again.params, batch(0))
    assert float(again.buffers["seen"]) == 2


def test_a_save_consumes_nothing_and_takes_no_consumed_state(tmp_path: Path):
    state = shard().init(ss.adamw())
    ss.save(state, str(tmp_path / "state"))
    train(state, 1)
    with pytest.raises(ss.DonatedError):
        ss.save(state, tmp_path / "state")
    with refused("SS407", "ss.save takes (state, path)"):
        ss.save(tmp_path / "state", state)
    with refused("SS410", "is a int"):
        ss.save(shard().init(ss.adamw()), 3)
    with refused("SS407", "ss.restore takes (sharded, path)"):
        ss.restore(tmp_path / "state", state)


def test_a_state_whose_step_was_not_finite_says_so_instead_of_being_saved(tmp_path: Path):
    home = shard()
    step_fn = ss.train_step(home, squares)
    state, _ = step_fn(home.init(ss.adamw()), {"x": torch.full((3, 4), torch.inf)})
    with pytest.raises(ss.NonFiniteError):
        ss.save(state, tmp_path / "state")
    assert not (tmp_path / "state").exists()


# What does not fit.


def test_an_optimizer_of_another_kind_is_refused(saved: Path):
    with refused("SS408", "ss.adamw", "ss.sgd"):
        ss.restore(shard(), saved, optimizer=ss.sgd(lr=0.1))
    with refused("SS408", "ss.adamw", "of your own"):
        ss.restore(shard(), saved, optimizer=(lambda params: {}, lambda *_: None))
    with refused("SS407", "the optimizer is 3"):
        ss.restore(shard(), saved, optimizer=3)
    with refused("SS407", "optimizer group 'nothing' matches no trainable parameter"):
        ss.restore(shard(), saved, optimizer=ss.adamw(groups={"nothing": {}}))


def test_momentum_that_was_not_saved_is_missing(tmp_path: Path):
    ss.save(shard().init(ss.sgd(lr=0.1)), tmp_path / "state")
    with refused("SS408", "does not have 3 entries", "optimizer/momentum_buffer/up.bias (float32 [6])"):
        ss.restore(shard(), tmp_path / "state", optimizer=ss.sgd(lr=0.1, momentum=0.9))


def test_all_entries_that_are_missing_surplus_or_misshapen_are_listed(saved: Path):
    with refused(
        "SS408",
        "does not have 3 entries", "params/down.bias (float32 [4])", "optimizer/exp_avg_sq/down.bias (float32 [4])",
        "has 9 entries of another shape", "params/up.weight: [6, 4] is saved, [8, 4] is needed",
    ):  # fmt: skip
        ss.restore(shard(lambda: Tiny(8, extra=True), WITH_BIAS), saved)
    bigger = saved.with_name("bigger")
    ss.save(shard(lambda: Tiny(extra=True), WITH_BIAS).init(ss.adamw()), bigger)
    with refused("SS408", "has 3 entries that the state has no place for", "optimizer/exp_avg/down.bias"):
        ss.restore(shard(), bigger)


def test_a_checkpoint_of_another_dtype_is_refused_and_not_cast(saved: Path):
    with refused("SS408", "params/up.weight: float32 is saved, float64 is needed", "of another dtype"):
        ss.restore(shard(lambda: Tiny().double()), saved)


def test_moments_of_a_parameter_that_is_frozen_now_are_surplus(saved: Path):
    def frozen() -> nn.Module:
        model = Tiny()
        model.up.weight.requires_grad_(False)
        return model

    with refused("SS408", "has 2 entries", "optimizer/exp_avg/up.weight"):
        ss.restore(shard(frozen), saved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 1, "f": print}, "optimizer/f is a builtin_function_or_method"),
        ({"a/b": 1, "a": {"b": 2}}, None),
        ({1: 1, "1": 2}, "two values of the optimizer's state go by the name optimizer/1"),
    ],
    ids=["function", "slash", "twins"],
)
def test_an_optimizers_state_that_no_file_can_hold_is_refused(content: dict, words: str | None, tmp_path: Path):
    own = ss.Optimizer(init=lambda params: content, update=lambda grads, state, params, step: (params, state))
    state = shard().init(own)
    if words is None:
        ss.save(state, tmp_path / "state")
        assert ss.restore(shard(), tmp_path / "state", optimizer=own).opt_state.raw == content
        return
    with refused("SS410", words):
        ss.save(state, tmp_path / "state")
    assert not (tmp_path / "state").exists()


# What is damaged.


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_file_is_named(saved: Path, name: str, damage: str):
    DAMAGES[damage](saved / name)
    words = ["there is no checkpoint"] if (name, damage) == ("manifest.json", "gone") else [name]
    with refused("SS409", *words):
        ss.restore(shard(), saved)


def test_a_manifest_that_was_edited_is_damaged_and_one_of_another_format_is_told_apart(saved: Path):
    manifest = json.loads((saved / "manifest.json").read_text())
    for change, words in (({"step": 7}, "is damaged"), ({"format": 99}, "format 99")):
        (saved / "manifest.json").write_text(json.dumps(manifest | change))
        with refused("SS409", words):
            ss.restore(shard(), saved)


def test_what_is_no_checkpoint_is_told_apart_and_never_overwritten(tmp_path: Path):
    state = shard().init(ss.adamw())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "empty").mkdir()
    for name, words in {"file": "is no folder", "folder": "has no manifest.json", "absent": "nothing"}.items():
        with refused("SS409", words):
            ss.restore(shard(), tmp_path / name)
    for name in ("file", "folder"):
        with refused("SS410", name):
            ss.save(state, tmp_path / name)
    assert (tmp_path / "folder" / "mine").exists()
    ss.save(state, tmp_path / "empty")
    assert ss.restore(shard(), tmp_path / "empty").step == 0


def test_a_link_to_a_checkpoint_is_followed_and_stays(saved: Path):
    link = saved.with_name("latest")
    link.symlink_to(saved)
    ss.save(train(ss.restore(shard(), link), 1), link)
    assert link.is_symlink()
    assert ss.restore(shard(), saved).step == 3


# Kills.


WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def child(function: Callable[[], None]) -> int:
    """Run a function in a fork; its status."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except ss.ShardingError as error:
            os._exit(4 if error.diagnostics[0].code == "SS410" and "no space" in str(error) else 3)
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "no space left")


def ended_at(count: int, root: Path, function: Callable[[], None], end: Callable[[], None] = die) -> int:
    """Run a function in a fork that comes to an end just before its `count`-th act on files below `root`."""

    def run() -> None:
        left = [count]

        def watch(event: str, arguments: tuple) -> None:
            # What a removal of a folder removes is named relative to it.
            path = str(arguments[0]) if event in WRITES else "/"
            if path.startswith(str(root)) or not path.startswith("/"):
                left[0] -= 1
                if not left[0]:
                    end()

        sys.addaudithook(watch)
        sync = os.fsync

        def synced(handle: int) -> None:
            watch("os.rename", (root,))
            sync(handle)

        os.fsync = synced
        function()
        os._exit(0 if left[0] > 0 else 5)

    return child(run)


@pytest.mark.parametrize(
    ("end", "after_a_kill"),
    [(die, False), (die, True), (disk_full, False)],
    ids=["kill", "kill after one between the renames", "full disk"],
)
def test_an_end_before_any_act_on_files_leaves_one_complete_checkpoint(
    end: Callable[[], None], after_a_kill: bool, tmp_path: Path
):
    """Every act of a save, one after the other: opens, syncs, renames, removals.

    What lies there before is a checkpoint; or what a save that was killed between its two renames left.
    """
    home = shard()
    old = train(home.init(ss.adamw(lr=0.1), seed=4), 1)
    new, _ = ss.train_step(home, squares, donate=False)(old, batch(1))
    wanted = {1: values(old), 2: values(new)}
    found: dict[int, int] = {}
    window = 0
    while after_a_kill:
        window += 1
        folder = tmp_path / f"window {window}" / "state"
        ss.save(old, folder)
        assert ended_at(window, folder.parent, lambda folder=folder: ss.save(new, folder)) == -signal.SIGKILL
        if not folder.exists():
            break
    for count in range(1, 200):
        folder = tmp_path / f"{count}" / "state"
        ss.save(old, folder)
        if window:
            ended_at(window, folder.parent, lambda folder=folder: ss.save(new, folder))
            assert not folder.exists()
        status = ended_at(count, folder.parent, lambda folder=folder: ss.save(new, folder), end)
        state = ss.restore(home, folder)
        assert same(values(state), wanted[state.step]), count
        found[count] = state.step
        if status == 0:
            break
        # A full disk is told, but where nothing was to be made: a folder that is there already.
        assert status == -signal.SIGKILL if end is die else status == 4 or (status, state.step) == (5, 2)
        ss.save(new, folder)
        assert ss.restore(home, folder).step == 2
        assert [path.name for path in folder.parent.iterdir()] == ["state"]
    assert status == 0
    steps = list(found.values())
    assert steps == sorted(steps) or end is disk_full, "once the new one is there, it stays"
    assert steps.count(1) > 10
    assert steps.count(2) > 3


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(saved: Path, monkeypatch):
    home = shard()
    newer = train(ss.restore(home, saved), 1)
    read = publish.locate
    calls: list[Path] = []

    def locate(folder: Path) -> Path | None:
        calls.append(folder)
        if len(calls) == 2:  # after the first read, before it is looked whether it still is the same
            monkeypatch.setattr("shardspec.runtime.restore.locate", read)
            ss.save(newer, saved)
        return read(folder)

    monkeypatch.setattr("shardspec.runtime.restore.locate", locate)
    again = ss.restore(home, saved)
    assert again.step == 3
    assert same(values(again), values(newer))


# Pieces.


def test_runs_are_the_stretches_of_consecutive_numbers():
    assert runs(torch.tensor([4, 5, 6, 0, 1, 9])) == [(0, 4, 3), (3, 0, 2), (5, 9, 1)]
    assert runs(torch.tensor([], dtype=torch.long)) == []


@pytest.mark.parametrize("seed", range(30))
def test_boxes_are_a_piece_and_each_lies_where_the_whole_has_it(seed: int):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(0, 3)))
    whole = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    index = tuple(torch.tensor(sorted(rng.sample(range(n), rng.randint(0, n))), dtype=torch.long) for n in shape)
    local = whole
    for dim, rows in enumerate(index):
        local = local.index_select(dim, rows)
    boxes = Piece(shape, local, index).boxes()
    assert sum(box.numel() for box in boxes.values()) == local.numel()
    for offset, box in boxes.items():
        place = tuple(slice(start, start + length) for start, length in zip(offset, box.shape, strict=True))
        assert torch.equal(whole[place], box)


def test_a_tensor_without_elements_is_one_box():
    assert list(Piece.whole(torch.empty(0, 5)).boxes()) == [(0, 0)]


def test_names_of_nested_values_are_json_pointers():
    tree = {"a/b": [1, {"~": 2}], "c": (3,)}
    assert [entry(*path) for path, _ in leaves(tree)] == ["a~1b/0", "a~1b/1/~0", "c/0"]
    assert with_leaves(tree, {path: -leaf for path, leaf in leaves(tree)}) == {"a/b": [-1, {"~": -2}], "c": (-3,)}
