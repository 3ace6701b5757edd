"""States and pure steps: initial values, donation, foreign parameters, loading, optimizers, what is not finite."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES
from models.llama.rules import WITHOUT_SP
from shardspec.placement import stored_shape
from tests.distributed import parity
from tests.distributed.harness import CollectiveLog, run_ranks


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    was = torch.get_default_dtype()
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(was)
    torch.set_num_threads(threads)


ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
EXACT = {"rtol": 0, "atol": 1e-10}


def model(*, tied: bool = False) -> nn.Module:
    return parity.make_model(parity.make_config(tied=tied))


def shard(mesh: str, *, rules: ss.Rules = RULES, inputs: bool = True, tied: bool = False, **policy: Any) -> ss.Sharded:
    """The tests' Llama on a mesh, in float64."""
    batch = parity.make_batch(0) if inputs else None
    return ss.shard(lambda: model(tied=tied), rules, ss.Mesh.parse(mesh), batch, policy=ss.Policy(**policy))


def on_mesh(mesh: str, function: Callable[..., Any], *args: object, **options: Any) -> list[Any]:
    """Run `function(sharded, *args)` on every rank of a mesh."""
    return run_ranks(ss.Mesh.parse(mesh).world, lambda rank, world: function(shard(mesh, **options), *args))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: ss.full(tensor) for name, tensor in tensors.items()}


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Bitwise the same under the same names."""
    assert ours.keys() == theirs.keys()
    differ = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differ


def refused(code: str, words: str, function: Callable[..., Any], *args: Any) -> None:
    """`function(*args)` raises a ShardingError of that code, which says the words."""
    with pytest.raises(ss.ShardingError) as caught:
        function(*args)
    assert code in [diagnostic.code for diagnostic in caught.value.diagnostics], caught.value
    assert words in str(caught.value)


def plain_llama(values: Mapping[str, Tensor]) -> nn.Module:
    """The plain model with given parameters."""
    plain = model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(values[name])
    return plain


# Initial values and what a rank holds.


def initial_values(sharded: ss.Sharded) -> dict[str, Tensor]:
    return whole(sharded.init(ss.adamw(**ADAMW), seed=5).params)


def test_initial_weights_are_bitwise_the_same_on_every_mesh():
    [reference] = on_mesh("", initial_values)
    assert all(tensor.std() > 0 or "norm" in name for name, tensor in reference.items())
    for mesh in ("tp=2", "fsdp=4", "dp=2,fsdp=2", "fsdp=2,tp=2"):
        for ours in on_mesh(mesh, initial_values):
            assert_equal(ours, reference)


def test_another_seed_gives_other_weights():
    [one] = on_mesh("", initial_values)
    [other] = on_mesh("", lambda sharded: whole(sharded.init(ss.adamw(**ADAMW), seed=6).params))
    assert not torch.equal(one["layers.0.attention.wq.weight"], other["layers.0.attention.wq.weight"])


@pytest.mark.parametrize("mesh", ["", "tp=2", "fsdp=4", "dp=2,fsdp=2", "fsdp=2,tp=2"])
def test_shapes_placements_and_bytes_on_a_rank_are_those_of_the_plan(mesh: str):
    def look(sharded: ss.Sharded) -> list[Any]:
        state = sharded.init(ss.adamw(**ADAMW))
        rows, resident = [], 0
        for name, view in state.params.items():
            plan, local = sharded.plan.params[name], view.to_local()
            wanted = stored_shape(plan, sharded.fabric.coordinate, sharded.mesh)
            if mesh:
                assert tuple(view.placements) == tuple(plan.placements), name
                assert view.device_mesh.mesh_dim_names == sharded.mesh.axes
            assert tuple(view.shape) == plan.shape, name
            assert tuple(local.shape) == wanted, name
            slots = [state.opt_state[slot][name].to_local() for slot in ("exp_avg", "exp_avg_sq")]
            assert all(tuple(slot.shape) == wanted for slot in slots), name
            rows.append((name, tuple(local.shape), plan.local_shape))
            resident += local.untyped_storage().nbytes()
        planned = sum(
            math.prod(padded_shape(plan, sharded.mesh)) * 8 for plan in sharded.plan.params.values() if not plan.buffer
        )
        held = sum(p.untyped_storage().nbytes() for p in map(to_local, sharded.module.parameters()))
        return [rows, resident, held, planned]

    results = on_mesh(mesh, look)
    assert all(local == planned for _, local, planned in results[0][0])
    for _, resident, held, planned in results:
        assert resident == held == planned


def to_local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def padded_shape(plan: Any, mesh: ss.Mesh) -> tuple[int, ...]:
    """The first rank's shape: FSDP2 pads every other rank's rows to it."""
    return stored_shape(plan, next(mesh.coordinates()), mesh)


# Donation.


def test_a_step_consumes_its_state_and_views_of_it():
    def donate(sharded: ss.Sharded) -> None:
        step = ss.train_step(sharded, parity.loss_fn)
        batch = sharded.local_batch(parity.make_batch(0))
        old = sharded.init(ss.adamw(**ADAMW), seed=1)
        kept, moment = old.params["norm.weight"], old.opt_state["exp_avg"]["norm.weight"]
        new, _ = step(old, batch)
        for read in (lambda: old.params, lambda: old.buffers, lambda: old.opt_state):
            with pytest.raises(ss.DonatedError, match=r"step 0 was consumed by train_step"):
                read()
        uses = [lambda t: t + 1, lambda t: t.to_local() * 2, ss.full, lambda t: t.sum().item()]
        for use in uses:
            for view in (kept, moment):
                with pytest.raises(ss.DonatedError):
                    use(view)
        with pytest.raises(ss.DonatedError):
            step(old, batch)
        with pytest.raises(ss.DonatedError):
            ss.eval_step(sharded, parity.loss_fn)(old, batch)
        with pytest.raises(ss.DonatedError):
            sharded.state_dict(old)
        assert (old.step, old.rng, new.step) == (0, 1, 1)
        assert bool(torch.isfinite(ss.full(new.params["norm.weight"])).all())

    for mesh in ("", "fsdp=2,tp=2"):
        on_mesh(mesh, donate)


def test_without_donation_the_old_state_stays_as_it_was():
    def keep(sharded: ss.Sharded) -> None:
        batch = sharded.local_batch(parity.make_batch(0))
        old = sharded.init(ss.adamw(**ADAMW))
        values = {name: tensor.clone() for name, tensor in whole(old.params).items()}
        step = ss.train_step(sharded, parity.loss_fn, donate=False)
        new, first = step(old, batch)
        assert_equal(whole(old.params), values)
        assert all(float(ss.full(m).abs().max()) == 0 for m in old.opt_state["exp_avg"].values())
        again, second = step(old, batch)
        assert float(first["loss"]) == float(second["loss"])
        assert_equal(whole(new.params), whole(again.params))
        assert not torch.equal(ss.full(new.params["norm.weight"]), values["norm.weight"])

    on_mesh("fsdp=2,tp=2", keep)


def test_a_whole_tensor_taken_from_a_state_outlives_it():
    def take(sharded: ss.Sharded) -> None:
        state = sharded.init(ss.adamw(**ADAMW))
        name = "norm.weight"
        taken, saved = ss.full(state.params[name]), sharded.state_dict(state)[name]
        ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(parity.make_batch(0)))
        assert torch.equal(taken, torch.ones_like(taken))
        assert torch.equal(saved, torch.ones_like(saved))

    for mesh in ("", "dp=2"):
        on_mesh(mesh, take)


def test_a_step_that_raises_before_its_update_donates_nothing_and_leaves_no_trace():
    def run(sharded: ss.Sharded) -> None:
        batch = sharded.local_batch(parity.make_batch(0))
        state = sharded.init(ss.adamw(**ADAMW))
        broken = {"in": ""}

        def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            if broken["in"] == "forward":
                raise InterruptedError
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, interrupt):
                return parity.loss_fn(output, batch)

        def interrupt(tensor: Tensor) -> Tensor:
            if broken["in"] == "backward":
                raise InterruptedError
            return tensor

        step, plain_step = ss.train_step(sharded, loss_fn), ss.train_step(sharded, parity.loss_fn, donate=False)
        wanted, metrics = plain_step(state, batch)
        other, evaluate = sharded.init(ss.adamw(**ADAMW), seed=9), ss.eval_step(sharded, parity.loss_fn)
        others_loss = float(evaluate(other, batch)["loss"])
        refused("SS202", "labls", step, state, {"tokens": batch["tokens"], "labls": batch["labels"]})
        for broken["in"] in ("forward", "backward", "forward"):
            with pytest.raises(InterruptedError):
                step(state, batch)
            # Weights that were gathered for the broken step must not be used for another state.
            assert float(evaluate(other, batch)["loss"]) == others_loss
        broken["in"] = ""
        state, found = step(state, batch)
        assert float(found["loss"]) == float(metrics["loss"])
        assert float(found["grad_norm"]) == float(metrics["grad_norm"])
        assert_equal(whole(state.params), whole(wanted.params))

    for mesh in ("", "fsdp=2,tp=2", "dp=2,fsdp=2"):
        on_mesh(mesh, run)


# The pieces of a step.


def test_gradients_at_foreign_parameters_are_theirs_and_leave_the_state_alone():
    def average(sharded: ss.Sharded) -> Any:
        batch = sharded.local_batch(parity.make_batch(0))
        one, two = (sharded.init(ss.adamw(**ADAMW), seed=seed) for seed in (1, 2))
        before = whole(one.params)
        grad_fn = sharded.value_and_grad(parity.loss_fn)
        mean = {name: (one.params[name] + two.params[name]) / 2 for name in one.params}
        (loss, metrics), grads = grad_fn(mean, batch, one.rng)
        assert float(metrics["loss"]) == float(loss)
        for tensor in mean.values():
            tensor.to_local().mul_(2)  # what is changed in place is read again
        (doubled, _), _ = grad_fn(mean, batch)
        (own, _), _ = grad_fn(one.params, batch)
        assert_equal(whole(one.params), before)
        return before, whole(two.params), float(loss), whole(grads), float(doubled), float(own)

    for mesh in ("fsdp=2,tp=2", "fsdp=4"):
        one, two, loss, grads, doubled, own = on_mesh(mesh, average)[0]
        for values, found in (
            ({name: (one[name] + two[name]) / 2 for name in one}, loss),
            ({name: one[name] + two[name] for name in one}, doubled),
            (one, own),
        ):
            plain = plain_llama(values)
            expected = parity.plain_loss(plain, parity.make_batch(0))
            assert abs(float(expected.detach()) - found) < 1e-10
            if found == loss:
                expected.backward()
                for name, parameter in plain.named_parameters():
                    torch.testing.assert_close(grads[name], parameter.grad, **EXACT)


def test_foreign_parameters_that_do_not_fit_are_refused():
    def misfits(sharded: ss.Sharded) -> None:
        batch = sharded.local_batch(parity.make_batch(0))
        params = sharded.init(ss.adamw(**ADAMW)).params
        grad_fn = sharded.value_and_grad(parity.loss_fn)
        name = "layers.0.attention.wo.weight"
        weight = params[name]
        refused("SS407", name, grad_fn, {k: v for k, v in params.items() if k != name}, batch)
        refused("SS407", "extra", grad_fn, {**params, "extra": weight}, batch)
        refused("SS407", name, grad_fn, {**params, name: ss.full(weight)}, batch)
        refused("SS407", "float32", grad_fn, {**params, name: weight.float()}, batch)

    on_mesh("tp=2", misfits)


def test_a_step_written_by_hand_is_the_ready_made_one():
    def compare(sharded: ss.Sharded) -> None:
        grad_fn = sharded.value_and_grad(parity.loss_fn)
        ready = ss.train_step(sharded, parity.loss_fn, clip=parity.CLIP)

        def by_hand(state: ss.TrainState, batch: dict[str, Any]) -> tuple[ss.TrainState, dict[str, Tensor]]:
            (_, metrics), grads = grad_fn(state.params, batch, state.rng)
            return ss.update(state, grads, clip=parity.CLIP), metrics

        one, two = (sharded.init(ss.adamw(**ADAMW)) for _ in range(2))
        for index in range(3):
            batch = sharded.local_batch(parity.make_batch(index))
            consumed = one
            one, ours = by_hand(one, batch)
            two, theirs = ready(two, batch)
            assert abs(float(ours["loss"]) - float(theirs["loss"])) < 1e-12
            with pytest.raises(ss.DonatedError, match="update"):
                consumed.params  # noqa: B018
        assert (one.step, one.rng) == (two.step, two.rng)
        for name, tensor in whole(one.params).items():
            torch.testing.assert_close(tensor, ss.full(two.params[name]), **EXACT)

    on_mesh("fsdp=2,tp=2", compare)
    on_mesh("", compare)


def test_an_update_takes_some_gradients_and_refuses_those_that_do_not_fit():
    def some(sharded: ss.Sharded) -> None:
        state = sharded.init(ss.sgd(lr=0.5))
        before = whole(state.params)
        name = "layers.0.attention.wo.weight"
        ones = torch.ones_like(state.params[name])
        refused("SS407", "nothing", ss.update, state, {"nothing": ones})
        refused("SS407", name, ss.update, state, {name: ss.full(ones)})
        after = whole(ss.update(state, {name: ones}).params)
        torch.testing.assert_close(after[name], before[name] - 0.5, **EXACT)
        assert_equal(*({k: v for k, v in each.items() if k != name} for each in (after, before)))

    on_mesh("fsdp=2,tp=2", some)


def test_two_states_of_one_model_do_not_disturb_each_other():
    def interleave(sharded: ss.Sharded) -> None:
        batches = [sharded.local_batch(parity.make_batch(index)) for index in range(3)]
        step = ss.train_step(sharded, parity.loss_fn)
        alone = []
        for seed in (1, 2):
            state = sharded.init(ss.adamw(**ADAMW), seed=seed)
            for batch in batches:
                state, _ = step(state, batch)
            alone.append(whole(state.params))
        together = [sharded.init(ss.adamw(**ADAMW), seed=seed) for seed in (1, 2)]
        for batch in batches:
            together = [step(state, batch)[0] for state in together]
        for state, expected in zip(together, alone, strict=True):
            assert_equal(whole(state.params), expected)

    on_mesh("fsdp=2,tp=2", interleave)


def test_evaluation_uses_the_weights_of_the_state_that_it_is_given():
    def evaluate(sharded: ss.Sharded) -> list[Any]:
        batch = sharded.local_batch(parity.make_batch(0))
        evaluated = ss.eval_step(sharded, parity.loss_fn)
        step = ss.train_step(sharded, parity.loss_fn)
        state, other = (sharded.init(ss.adamw(**ADAMW), seed=seed) for seed in (1, 2))
        found = []
        for _ in range(3):
            found.append((whole(other.params), float(evaluated(other, batch)["loss"])))
            found.append((whole(state.params), float(evaluated(state, batch)["loss"])))
            state, metrics = step(state, batch)
            assert abs(float(metrics["loss"]) - found[-1][1]) < 1e-12
        assert float(evaluated(state, batch)["weight"]) == float(metrics["weight"])
        return found

    for mesh in ("fsdp=2", "dp=2,fsdp=2", "fsdp=2,tp=2", ""):
        for values, loss in on_mesh(mesh, evaluate)[0]:
            expected = parity.plain_loss(plain_llama(values), parity.make_batch(0))
            assert abs(float(expected.detach()) - loss) < 1e-10


def test_a_step_after_an_evaluation_runs_the_collectives_of_its_plan():
    def count(sharded: ss.Sharded) -> None:
        batch = sharded.local_batch(parity.make_batch(0))
        step, evaluated = ss.train_step(sharded, parity.loss_fn), ss.eval_step(sharded, parity.loss_fn)
        state, _ = step(sharded.init(ss.adamw(**ADAMW)), batch)
        for _ in range(2):
            evaluated(state, batch)
            with CollectiveLog() as log:
                state, _ = step(state, batch)
            plan = sharded.program(batch, parity.loss_fn)
            ran = Counter((call.kind, call.bytes) for call in log.collectives)
            planned: Counter[tuple[str, int]] = Counter()
            for row in plan.collectives:
                planned[row.kind, row.bytes] += row.count
            assert ran == planned

    on_mesh("fsdp=2", count)


# Loading, saving, and the model that was given.


def test_a_state_dict_goes_in_and_comes_out_as_the_plain_models():
    plain = plain_llama({name: torch.randn_like(p) for name, p in model().named_parameters()})
    given = {name: tensor.clone() for name, tensor in plain.state_dict().items()}

    def load(sharded: ss.Sharded) -> dict[str, Tensor]:
        state = sharded.load(given, ss.adamw(**ADAMW))
        assert_equal(whole(state.params), {n: given[n] for n in state.params})
        again = sharded.init(ss.adamw(**ADAMW), seed=4)  # init uses them from then on
        assert_equal(whole(again.params), whole(state.params))
        state, _ = ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(parity.make_batch(0)))
        return sharded.state_dict(sharded.load(given))

    for mesh in ("", "fsdp=4", "fsdp=2,tp=2"):
        for found in on_mesh(mesh, load):
            assert_equal(found, given)


def test_a_tied_weight_is_saved_under_both_names_and_loaded_from_either():
    def tie(sharded: ss.Sharded) -> None:
        state = sharded.init(ss.adamw(**ADAMW))
        saved = sharded.state_dict(state)
        embedding, output = "tok_embeddings.weight", "output.weight"
        assert output not in state.params
        assert torch.equal(saved[embedding], saved[output])
        for dropped in (embedding, output):
            part = {name: tensor * 2 for name, tensor in saved.items() if name != dropped}
            loaded = sharded.load(part, ss.adamw(**ADAMW))
            assert torch.equal(ss.full(loaded.params[embedding]), saved[embedding] * 2)
        refused("SS404", output, sharded.load, {**saved, output: saved[output] + 1})

    on_mesh("fsdp=2", tie, tied=True, rules=RULES)


def test_a_state_dict_that_does_not_fit_is_refused_with_everything_that_is_wrong():
    def misfit(sharded: ss.Sharded) -> None:
        state = sharded.init(ss.adamw(**ADAMW))
        good = sharded.state_dict(state)
        bad = dict(good)
        del bad["norm.weight"]
        bad["surplus"] = torch.ones(1)
        bad["output.weight"] = torch.ones(3, 3)
        bad["layers.0.attention.wq.weight"] = good["layers.0.attention.wq.weight"].float()
        with pytest.raises(ss.ShardingError) as caught:
            sharded.load(bad)
        text = str(caught.value)
        assert len(caught.value.diagnostics) == 4
        for word in ("norm.weight", "surplus", "(3, 3)", "float32"):
            assert word in text
        rank = sharded.fabric.rank
        refused("SS404" if rank == 1 else "SS403", "norm.weight", sharded.load, bad if rank == 1 else good)
        own = {name: tensor + rank for name, tensor in good.items()}
        refused("SS403", "weights", sharded.load, own)

    on_mesh("fsdp=2", misfit)


def look_at(module: nn.Module) -> list[Any]:
    """Everything about a module that could be changed by accident."""
    rows: list[Any] = []
    for path, child in module.named_modules():
        kept = {key: value for key, value in child.__dict__.items() if not key.startswith("_")}
        hooks = {key: len(value) for key, value in child.__dict__.items() if "hooks" in key and value is not None}
        rows.append((path, type(child), id(child), kept, hooks, sorted(child.__dict__), child.training))
    rows += [(name, id(p), p.data_ptr(), p.grad, p.requires_grad, p._version) for name, p in module.named_parameters()]
    rows += [(name, id(buffer), buffer._version) for name, buffer in module.named_buffers()]
    return rows


def test_the_model_that_was_given_stays_as_it_was():
    def run(rank: int, world: int) -> None:
        torch.manual_seed(0)
        given = model()
        values = copy.deepcopy(given.state_dict())
        before = look_at(given)
        sharded = ss.shard(given, RULES, ss.Mesh(fsdp=2, tp=2), parity.make_batch(0), policy=ss.Policy(remat=True))
        state = sharded.init(ss.adamw(**ADAMW))
        assert_equal(whole(state.params), {name: values[name] for name in state.params})
        batch = sharded.local_batch(parity.make_batch(0))
        state, metrics = ss.train_step(sharded, parity.loss_fn)(state, batch)
        ss.eval_step(sharded, parity.loss_fn)(state, batch)
        assert look_at(given) == before
        assert_equal(given.state_dict(), values)
        expected = parity.plain_loss(given, parity.make_batch(0))
        assert abs(float(expected.detach()) - float(metrics["loss"])) < 1e-10

    run_ranks(4, run)


def test_a_model_on_meta_has_no_values_until_some_are_loaded():
    def run(rank: int, world: int) -> None:
        with torch.device("meta"):
            hollow = Scale()
        sharded = ss.shard(hollow, SCALE_RULES, ss.Mesh(fsdp=2), scale_batch())
        refused("SS406", "weight", sharded.init, ss.sgd(lr=0.1))
        ones = {"weight": torch.ones(4, 4), "seen": torch.zeros(())}
        state = sharded.load(ones, ss.sgd(lr=0.1))
        assert_equal(whole(state.params), {"weight": ones["weight"]})
        filled = ss.shard(hollow, SCALE_RULES, ss.Mesh(fsdp=2), scale_batch())
        refused("SS406", "seen", filled.init, ss.sgd(lr=0.1), 0, {"weight": nn.init.ones_})
        llama = parity.make_config(tied=False)
        with torch.device("meta"):
            hollow = parity.build(llama)
        refused("SS406", "rope_cos", shard_given(hollow).init, ss.sgd(lr=0.1))

    run_ranks(2, run)


def shard_given(given: nn.Module) -> ss.Sharded:
    return ss.shard(given, RULES, ss.Mesh(fsdp=2), parity.make_batch(0))


def test_initial_values_may_be_given_by_functions():
    def run(rank: int, world: int) -> None:
        sharded = ss.shard(Scale, SCALE_RULES, ss.Mesh(fsdp=2), scale_batch())
        fill = {"wei.*": lambda weight: weight.copy_(torch.arange(16.0).view(4, 4))}
        state = sharded.init(ss.sgd(lr=0.1), init=fill)
        assert torch.equal(ss.full(state.params["weight"]), torch.arange(16.0).view(4, 4))
        refused("SS203", "wait", sharded.init, ss.sgd(lr=0.1), 0, {"wait": nn.init.ones_})

    run_ranks(2, run)


# Buffers.


class Scale(nn.Module):
    """One product, and a buffer that counts the forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        return x @ self.weight.T


SCALE_RULES = ss.Rules(params={"weight": "F@fsdp D", "seen": ""}, activations={"x": "B@fsdp D"})


def scale_batch(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.arange(rows * 4.0).reshape(rows, 4)}


def squares(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return output.square().sum(), (batch["x"][:, 0] * 0 + 1).sum()


def test_a_buffer_that_forward_writes_belongs_to_the_state():
    def run(rank: int, world: int) -> None:
        sharded = ss.shard(Scale, SCALE_RULES, ss.Mesh(fsdp=2), scale_batch())
        batch = sharded.local_batch(scale_batch())
        step, keep = ss.train_step(sharded, squares), ss.train_step(sharded, squares, donate=False)
        one, two = (sharded.init(ss.sgd(lr=1e-3)) for _ in range(2))
        seen = lambda state: float(ss.full(state.buffers["seen"]))  # noqa: E731
        for index in range(3):
            one, _ = step(one, batch)
            ss.eval_step(sharded, squares)(one, batch)
            sharded.value_and_grad(squares)(one.params, batch)
            assert (seen(one), seen(two)) == (index + 1, 0)
        other, _ = keep(two, batch)
        assert (seen(two), seen(other), seen(sharded.init(ss.sgd(lr=1e-3)))) == (0, 1, 0)
        bad = {"x": batch["x"] * math.inf}
        worse, _ = keep(other, bad)
        assert seen(worse) == 1
        assert float(sharded.state_dict(one)["seen"]) == 3
        loaded = sharded.load(sharded.state_dict(one), ss.sgd(lr=1e-3))
        assert seen(loaded) == 3
        refused("SS404", "seen", sharded.load, {"weight": torch.ones(4, 4)})

    run_ranks(2, run)


# Optimizers, and what is not finite.


def test_sgd_with_momentum_is_torchs():
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}

    def run(sharded: ss.Sharded) -> Any:
        state = sharded.init(ss.sgd(**options))
        first = whole(state.params)
        step = ss.train_step(sharded, parity.loss_fn)
        for index in range(3):
            state, _ = step(state, sharded.local_batch(parity.make_batch(index)))
        return first, whole(state.params)

    for mesh in ("fsdp=2,tp=2", "dp=2"):
        first, last = on_mesh(mesh, run)[0]
        plain = plain_llama(first)
        optimizer = torch.optim.SGD(plain.parameters(), **options)
        for index in range(3):
            optimizer.zero_grad()
            parity.plain_loss(plain, parity.make_batch(index)).backward()
            optimizer.step()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(last[name], parameter.detach(), **EXACT)


def lion(lr: float) -> ss.Optimizer:
    """Lion (arXiv:2302.06675) as a pair of pure functions; its state is a tuple and a Python count."""

    def init(params: dict[str, Tensor]) -> Any:
        return ({name: torch.zeros_like(tensor) for name, tensor in params.items()}, 0)

    def update(grads: Any, state: Any, params: Any, step: int) -> Any:
        moments, count = state
        assert step == count + 1
        fresh = {n: params[n] - lr * (0.9 * moments[n] + 0.1 * grads[n]).sign() for n in grads}
        return fresh, ({n: 0.99 * moments[n] + 0.01 * grads[n] for n in grads}, count + 1)

    return ss.Optimizer(init=init, update=update)


def by_norms(lr: float) -> ss.Optimizer:
    """Each update divided by the norm of its gradient, as in LARS (arXiv:1708.03888): of whole parameters."""

    def update(grads: Any, state: Any, params: Any, step: int) -> Any:
        return {n: params[n] - lr * grads[n] / (grads[n].norm() + 1) for n in grads}, state

    return ss.Optimizer(init=lambda params: {}, update=update)


def test_an_optimizer_that_takes_a_part_for_the_whole_is_refused():
    def run(sharded: ss.Sharded) -> None:
        state = sharded.init(by_norms(1e-2))
        step, batch = ss.train_step(sharded, parity.loss_fn), sharded.local_batch(parity.make_batch(0))
        if sharded.mesh.world == sharded.mesh["dp"]:
            step(state, batch)
        else:
            refused("SS407", "rank's part of a parameter", step, state, batch)
            assert state.params, "nothing was donated"

    for mesh in ("", "dp=2", "fsdp=2", "tp=2"):
        on_mesh(mesh, run)


def test_any_pair_of_pure_functions_is_an_optimizer():
    def run(sharded: ss.Sharded) -> Any:
        state = sharded.init(lion(1e-3))
        first = whole(state.params)
        step = ss.train_step(sharded, parity.loss_fn)
        for index in range(3):
            consumed = state
            state, metrics = step(state, sharded.local_batch(parity.make_batch(index)))
            with pytest.raises(ss.DonatedError):
                consumed.params  # noqa: B018
            assert "lr" not in metrics
        return first, whole(state.params)

    # fsdp=4: rows that do not divide, so that what the optimizer makes is not padded as FSDP2 wants it
    for mesh in ("", "fsdp=4", "fsdp=2,tp=2"):
        first, last = on_mesh(mesh, run)[0]
        plain = plain_llama(first)
        moments = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
        for index in range(3):
            plain.zero_grad()
            parity.plain_loss(plain, parity.make_batch(index)).backward()
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    p.sub_(1e-3 * (0.9 * moments[name] + 0.1 * p.grad).sign())
                    moments[name] = 0.99 * moments[name] + 0.01 * p.grad
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(last[name], parameter.detach(), **EXACT)


def test_an_optimizer_that_raises_donates_nothing():
    def fail(*_: Any) -> Any:
        raise ArithmeticError

    def run(sharded: ss.Sharded) -> None:
        state = sharded.init(ss.Optimizer(init=lambda params: {}, update=fail))
        with pytest.raises(ArithmeticError):
            ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(parity.make_batch(0)))
        assert state.params

    on_mesh("fsdp=2", run)


@pytest.mark.parametrize("optimizer", [ss.adamw(**ADAMW), lion(1e-3)], ids=["adamw", "lion"])
def test_a_step_that_is_not_finite_skips_its_update_and_says_so_on_every_rank(optimizer: ss.Optimizer):
    def run(rank: int, world: int) -> None:
        sharded = shard("fsdp=2,tp=2")
        good = sharded.local_batch(parity.make_batch(0))
        rows = torch.arange(parity.ROWS)[:, None].expand(parity.ROWS, parity.SEQ)
        row = sharded.local_batch({"tokens": rows, "labels": rows})["tokens"]

        def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            total, weight = ss.cross_entropy(output, batch["labels"])
            return total * blow["up"], weight

        blow = {"up": 1.0}
        step = ss.train_step(sharded, loss_fn)
        state, _ = step(sharded.init(optimizer), good)
        before, moments = whole(state.params), state.opt_state.raw
        moments = copy.deepcopy(moments)
        blow["up"] = math.inf if bool((row == 0).any()) else 1.0  # on the ranks of row 0 alone
        state, metrics = step(state, good)
        for name in ("loss", "weight", "grad_norm"):
            with pytest.raises(ss.NonFiniteError, match="step 2"):
                float(metrics[name])
        assert_equal(whole(state.params), before)
        assert_same_tree(state.opt_state.raw[0] if isinstance(moments, tuple) else state.opt_state.raw, moments)
        with pytest.raises(ss.NonFiniteError, match="step 2"):
            step(state, good)
        blow["up"] = 1.0
        _, fine = step(sharded.init(optimizer), good)  # the failure was another state's
        assert math.isfinite(float(fine["loss"]))
        state, fine = step(state, good)  # told once; the state is as it was before
        assert math.isfinite(float(fine["loss"]))
        assert not torch.equal(ss.full(state.params["norm.weight"]), before["norm.weight"])

    run_ranks(4, run)


def assert_same_tree(ours: Any, theirs: Any) -> None:
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_same_tree(ours[key], value)
        else:
            assert torch.equal(ours[key], value), key


def test_a_hand_written_update_that_is_not_finite_says_so_at_the_next():
    def run(sharded: ss.Sharded) -> None:
        state = sharded.init(ss.adamw(**ADAMW))
        before = whole(state.params)
        grads = {name: torch.full_like(tensor, math.nan) for name, tensor in state.params.items()}
        state = ss.update(state, grads)
        assert_equal(whole(state.params), before)
        with pytest.raises(ss.NonFiniteError):
            ss.update(state, grads)

    on_mesh("fsdp=2", run)


def test_metrics_are_scalars_and_equal_on_every_rank():
    def run(sharded: ss.Sharded) -> dict[str, float]:
        step = ss.train_step(sharded, parity.loss_fn, clip=parity.CLIP)
        schedule = ss.adamw(lr=lambda step: 0.1 / step)
        state, _ = step(sharded.init(schedule), sharded.local_batch(parity.make_batch(0)))
        state, metrics = step(state, sharded.local_batch(parity.make_batch(1)))
        assert all(metric.shape == () for metric in metrics.values())
        return {name: float(metric) for name, metric in metrics.items()}

    first, *others = on_mesh("dp=2,fsdp=2", run)
    assert first.keys() == {"loss", "weight", "grad_norm", "lr"}
    assert first["lr"] == 0.05
    assert first["weight"] == float((parity.make_batch(1)["labels"] != -100).sum())
    assert all(other == first for other in others)


# Batches.


def test_a_loss_whose_weight_is_below_one_is_divided_by_it():
    def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        total, weight = ss.cross_entropy(output, batch["labels"])
        return total * 1e-3, weight * 1e-3

    def run(sharded: ss.Sharded) -> float:
        state = sharded.init(ss.adamw(**ADAMW))
        batch = sharded.local_batch(parity.make_batch(0))
        both = [float(ss.eval_step(sharded, fn)(state, batch)["loss"]) for fn in (loss_fn, parity.loss_fn)]
        return both[0] - both[1]

    assert abs(on_mesh("fsdp=2", run)[0]) < 1e-10


def test_a_batch_of_which_nothing_counts_has_loss_zero_and_a_finite_step():
    def run(sharded: ss.Sharded) -> None:
        masked = parity.make_batch(0) | {"labels": torch.full((parity.ROWS, parity.SEQ), -100)}
        state = sharded.init(ss.sgd(lr=0.1))
        before = whole(state.params)
        state, metrics = ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(masked))
        assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
        assert_equal(whole(state.params), before)

    on_mesh("fsdp=2,tp=2", run)


@pytest.mark.parametrize("inputs", [True, False], ids=["with inputs", "without inputs"])
def test_batches_may_change_their_shape_between_steps(inputs: bool):
    def run(sharded: ss.Sharded) -> Any:
        assert (sharded.plan is not None) == inputs
        step = ss.train_step(sharded, parity.loss_fn)
        state = sharded.init(ss.sgd(lr=0.1))
        first, losses = whole(state.params), []
        for rows, length in SHAPES:
            whole_batch = {name: item[:rows, :length] for name, item in parity.make_batch(0).items()}
            state, metrics = step(state, sharded.local_batch(whole_batch))
            losses.append(float(metrics["loss"]))
        assert sharded.plan is not None
        return first, losses

    first, losses = on_mesh("fsdp=2,tp=2", run, inputs=inputs)[0]
    plain = plain_llama(first)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for (rows, length), found in zip(SHAPES, losses, strict=True):
        loss = parity.plain_loss(plain, {name: item[:rows, :length] for name, item in parity.make_batch(0).items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(float(loss.detach()) - found) < 1e-10


SHAPES = [(16, 8), (4, 8), (8, 2), (16, 8)]


def test_a_loader_that_reads_only_its_part_needs_no_global_batch():
    def run(sharded: ss.Sharded) -> tuple[float, float]:
        state = sharded.init(ss.adamw(**ADAMW))
        evaluated, place = ss.eval_step(sharded, parity.loss_fn), sharded.fabric.coordinate["fsdp"]
        mine = {name: item.chunk(2)[place] for name, item in parity.make_batch(0).items()}
        parts = (mine, sharded.local_batch(parity.make_batch(0)))
        one, two = (float(evaluated(state, part)["loss"]) for part in parts)
        return one, two

    one, two = on_mesh("fsdp=2,tp=2", run, rules=WITHOUT_SP)[0]
    assert one == two
