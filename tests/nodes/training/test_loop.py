"""Just the loop, on a small regression: resume, cancel, non-finite values, seeds, the global random state."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.training import loop
from pack.nodes.training.config import MUON, OPTIMIZERS, LoraConfig, TrainingConfig

STEPS = 12


class Stop(Exception):
    pass


class Recorder:
    """A monitor that stops before step `stop_at` and records what it receives."""

    def __init__(self, stop_at=None):
        self.stop_at, self.checks, self.progressed, self.states, self.warnings = stop_at, 0, [], [], []

    def check(self):
        if self.checks == self.stop_at:
            raise Stop
        self.checks += 1

    def progress(self, step, loss):
        self.progressed.append((step, loss))

    def checkpoint(self, state):
        self.states.append(state)

    def warn(self, line):
        self.warnings.append(line)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for name in ("a", "b")}


def objective_of(weights):
    def objective(_step, generator):
        x = torch.randn(5, 3, generator=generator)
        return (x @ weights["a"].T - (x @ weights["b"].T).relu() - 1).square().mean()

    return objective


def run(stop_at=None, resume=None, **settings):
    weights = parameters()
    monitor = Recorder(stop_at)
    config = TrainingConfig(**{"steps": STEPS, "learning_rate": 1e-2, "seed": 5, **settings})
    try:
        losses = loop.train(objective_of(weights), weights, config, monitor, resume)
    except Stop:
        losses = None
    return weights, losses, monitor


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@given(stop=st.integers(1, STEPS - 1), decay=st.sampled_from((0.0, 0.5, 1.0)), optimizer=st.sampled_from(OPTIMIZERS))
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop, decay, optimizer):
    whole, losses, _ = run(decay=decay, optimizer=optimizer)
    _, _, stopped = run(stop_at=stop, decay=decay, optimizer=optimizer)
    (state,) = stopped.states
    assert state.step == stop and state.losses == losses[:stop]
    resumed, again, _ = run(resume=copy.deepcopy(state), decay=decay, optimizer=optimizer)
    assert again == losses
    assert same(whole, resumed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_without_its_moments_differs(optimizer):
    whole, _, _ = run(optimizer=optimizer)
    state = run(stop_at=6, optimizer=optimizer)[2].states[0]
    state.tensors = {key: value for key, value in state.tensors.items() if key.startswith("parameter.")}
    assert not same(whole, run(resume=state, optimizer=optimizer)[0])


def test_cancel_acts_before_the_next_step_and_before_the_first_saves_nothing():
    _, _, monitor = run(stop_at=4)
    assert [step for step, _ in monitor.progressed] == [1, 2, 3, 4]
    assert run(stop_at=0)[2].states == []


def test_a_run_stopped_inside_a_step_saves_the_steps_before_it():
    """Such as out of memory, or ComfyUI's cancel in the middle of the model."""
    weights, monitor = parameters(), Recorder()
    good = objective_of(weights)

    def objective(step, generator):
        if step == 3:
            raise MemoryError
        return good(step, generator)

    with pytest.raises(MemoryError):
        loop.train(objective, weights, TrainingConfig(steps=STEPS, learning_rate=1e-2, seed=5), monitor)
    (state,) = monitor.states
    whole, losses, _ = run()
    assert state.step == 3 and same(whole, run(resume=state)[0])


def test_checkpoints_come_at_their_steps():
    monitor = run(checkpoint_every=4)[2]
    assert [state.step for state in monitor.states] == [4, 8, 12]
    assert [state.step for state in run(stop_at=8, checkpoint_every=4)[2].states] == [4, 8]
    assert monitor.states[0].tensors["parameter.a"].data_ptr() != monitor.states[1].tensors["parameter.a"].data_ptr()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_for_a_checkpoint_s_copy_is_told_and_ends_no_run(error, monkeypatch):
    expected, losses, _ = run()
    copied, calls = loop._snapshot, []

    def scarce(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return copied(*arguments)

    monkeypatch.setattr(loop, "_snapshot", scarce)
    weights, again, monitor = run(checkpoint_every=4)
    assert again == losses and same(weights, expected)
    assert [state.step for state in monitor.states] == [4, 12]
    (warning,) = monitor.warnings
    assert "could not be copied for a checkpoint" in warning and "out of memory" in warning


def test_no_memory_for_the_last_copy_of_a_stopped_run_leaves_what_stopped_it(monkeypatch):
    def none(*_arguments):
        raise MemoryError

    monkeypatch.setattr(loop, "_snapshot", none)
    _, losses, monitor = run(stop_at=3)
    assert losses is None and monitor.states == [] and len(monitor.warnings) == 1


def test_the_seed_decides_and_the_global_stream_is_left_as_it_was():
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    first = run()[0]
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    assert same(first, run()[0])
    assert not same(first, run(seed=6)[0])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_value_that_is_not_finite_stops_the_run_and_names_the_step(what, value):
    weights, monitor = parameters(), Recorder()
    weights_before = {}

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(_context, x):
            return x.clone()

        @staticmethod
        def backward(_context, gradient):
            return gradient * value

    def objective(step, _generator):
        if step < 3:
            return weights["a"].square().mean() + weights["b"].square().mean()
        weights_before.update({name: weight.detach().clone() for name, weight in weights.items()})
        total = weights["a"].sum()
        return total * value if what == "loss" else Bad.apply(total)

    with pytest.raises(loop.TrainingDiverged, match=f"{what} became .* at step 4 of 12.*learning_rate"):
        loop.train(objective, weights, TrainingConfig(steps=STEPS, learning_rate=1e-2), monitor)
    assert same(weights, weights_before)
    assert monitor.states == []


def test_a_checkpoint_of_other_parameters_is_refused_by_name():
    state = run(stop_at=3)[2].states[0]
    state.tensors["parameter.b"] = torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"shape \(7, 3\) for b, where this run has shape \(4, 3\)"):
        run(resume=state)
    with pytest.raises(ValueError, match="raise steps"):
        run(resume=loop.State(step=STEPS + 1))


@pytest.mark.parametrize(("decay", "rates"), [
    (0.0, (0.1, 0.1, 0.1, 0.1)), (0.5, (0.1, 0.1, 0.1, 0.05)), (1.0, (0.1, 0.075, 0.05, 0.025)),
])
def test_it_is_adamw_step_by_step(decay, rates):
    """Against the formulas of Loshchilov and Hutter, written out for one parameter and no clipping."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    config = TrainingConfig(steps=4, learning_rate=0.1, weight_decay=0.2, max_gradient_norm=1e9, decay=decay)
    loop.train(lambda _step, _generator: (weight**2).sum(), {"w": weight}, config, Recorder())
    w, m, v = torch.tensor([2.0, -3.0], dtype=torch.float64), 0.0, 0.0
    for t, rate in enumerate(rates, 1):
        g = 2 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * 0.2 * w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=0)


def test_muon_s_steps_have_equal_singular_values_of_the_length_of_adamw_s():
    """Against orthogonalisation by singular values; the first step is down the whole gradient."""
    start, target = (torch.randn(4, 96, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    weight = torch.nn.Parameter(start.clone())
    config = TrainingConfig(1, 0.01, weight_decay=0.0, max_gradient_norm=1e9, optimizer=MUON)
    loop.train(lambda _step, _generator: (weight - target).square().sum() / 2, {"w": weight}, config, Recorder())
    left, _, right = torch.linalg.svd(start - target, full_matrices=False)
    step, expected = start - weight.detach(), 0.01 * 0.2 * 96**0.5 * (left @ right)
    assert torch.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.97  # of five Newton-Schulz steps
    torch.testing.assert_close(step.norm(), expected.norm(), rtol=0.15, atol=0)
    assert 0.5 < step.square().mean().sqrt() / 0.01 / 0.2 < 1.5  # the root mean square that Liu et al. ask for


def test_masks_are_adamw_s():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    config = TrainingConfig(1, 0.01, optimizer=MUON)
    with pytest.raises(ValueError, match="optimizer is Muon"):
        loop.train(lambda *_: weight.sum(), {"w": weight}, config, Recorder(), masks=lambda: {"w": weight > 0})


def test_a_pytorch_without_muon_says_what_to_do(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="has no Muon: set optimizer to AdamW, or update PyTorch to 2.9 or later"):
        run(optimizer=MUON)


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (TrainingConfig, {"steps": 0}, "steps"),
        (TrainingConfig, {"optimizer": "SGD"}, "optimizer"),
        (TrainingConfig, {"batch_size": 0}, "batch_size"),
        (TrainingConfig, {"learning_rate": 0.0}, "learning_rate"),
        (TrainingConfig, {"learning_rate": float("nan")}, "learning_rate"),
        (TrainingConfig, {"min_snr_gamma": -1.0}, "min_snr_gamma"),
        (TrainingConfig, {"decay": -0.1}, "decay"),
        (TrainingConfig, {"decay": 1.1}, "decay"),
        (TrainingConfig, {"dtype": "fp16"}, "dtype"),
        (LoraConfig, {"rank": 0}, "rank"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(config, settings, named):
    base = {"steps": 1, "learning_rate": 1e-4} if config is TrainingConfig else {}
    with pytest.raises(ValueError, match=named):
        config(**{**base, **settings})


def test_a_loss_that_rose_to_that_of_an_untrained_model_is_warned_of():
    def rising(to, start=0.01, end=None):
        weights = parameters()

        def objective(step, _generator):
            return weights["a"].sum() * 0 + (start if step == 0 else to if step < 8 or end is None else end)

        monitor = Recorder()
        loop.train(objective, weights, TrainingConfig(steps=STEPS, learning_rate=0.1), monitor)
        return monitor.warnings

    assert not rising(0.5) and not rising(1.0, start=0.5) and not rising(1.0, end=0.01)
    (message,) = rising(1.0)
    assert "rose from 0.0100 to 1.0000" in message and "lower learning_rate (0.1)" in message
