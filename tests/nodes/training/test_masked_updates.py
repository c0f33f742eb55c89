"""Steps that a mask restricts, against AdamW written out for single numbers."""

import math

import numpy as np
import pytest
import torch
from pack.nodes.training import loop
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.seeds import seed_for

SIZE = 12
BETAS, EPSILON = (0.9, 0.999), 1e-8  # as PyTorch ships AdamW


class Monitor:
    def __init__(self, stop=None):
        self.stop = stop
        self.states = []
        self.done = 0

    def check(self):
        if self.done == self.stop:
            raise KeyboardInterrupt

    def progress(self, step, loss):
        self.done = step

    def checkpoint(self, state):
        self.states.append(state)

    def warn(self, line):
        raise AssertionError(line)


def start():
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(4))


def mask_of(step):
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(100 + step)) < 0.5


class Run:
    """Pulls a vector toward random targets, one per step, with one mask per step."""

    def __init__(self):
        self.parameters = {"x": torch.nn.Parameter(start())}
        self.step = 0

    def __call__(self, step, generator):
        self.step = step
        target = torch.randn(SIZE, generator=generator)
        return (self.parameters["x"] - target).square().mean()

    def masks(self):
        return {"x": mask_of(self.step)}


def config(**settings):
    return TrainingConfig(**{
        "steps": 9, "learning_rate": 0.05, "weight_decay": 0.1, "max_gradient_norm": 1e9, "checkpoint_every": 0,
        "seed": 2, **settings,
    })


def trained(steps=9, **options):
    run = Run()
    monitor = options.pop("monitor", None) or Monitor()
    masks = options.pop("masks", run.masks)
    settings = config(steps=steps, **options.pop("settings", {}))
    loop.train(run, run.parameters, settings, monitor, masks=masks, **options)
    return run.parameters["x"].detach().clone(), monitor


def reference(steps):
    """Each element separately: in a step where its mask is False, value and moments stay, and it is not counted."""
    x, targets = start().double().tolist(), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed_for(2, "step", step))
        targets.append(torch.randn(SIZE, generator=generator).double().tolist())
    for i in range(SIZE):
        mean = square = 0.0
        moved = 0
        for step in range(steps):
            if not mask_of(step)[i]:
                continue
            gradient = 2 * (x[i] - targets[step][i]) / SIZE
            x[i] *= 1 - 0.05 * 0.1
            mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
            square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
            moved += 1
            unbiased = mean / (1 - BETAS[0] ** moved), square / (1 - BETAS[1] ** moved)
            x[i] -= 0.05 * unbiased[0] / (math.sqrt(unbiased[1]) + EPSILON)
    return torch.tensor(x, dtype=torch.float32)


def test_it_is_adamw_for_each_element_that_may_change():
    actual, _ = trained()
    torch.testing.assert_close(actual, reference(9), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", range(1, 9))
def test_what_is_masked_keeps_its_bits_and_its_moments(steps):
    _, before = trained(steps, settings={"checkpoint_every": 1})
    _, after = trained(steps + 1, settings={"checkpoint_every": 1})
    held = ~mask_of(steps)
    old, new = before.states[-1].tensors, after.states[-1].tensors
    assert held.any() and new["exp_avg.x"].any()
    for key in ("parameter.x", "exp_avg.x", "exp_avg_sq.x"):
        assert torch.equal(old[key][held], new[key][held]), key
    assert not torch.equal(old["parameter.x"][~held], new["parameter.x"][~held])


def test_masks_that_let_everything_pass_are_pytorchs_adamw():
    plain, _ = trained(masks=None)
    everything, _ = trained(masks=lambda: {"x": torch.ones(SIZE, dtype=torch.bool)})
    torch.testing.assert_close(plain, everything, rtol=1e-6, atol=1e-7)
    nothing, _ = trained(masks=lambda: {"x": torch.zeros(SIZE, dtype=torch.bool)})
    assert torch.equal(nothing, start())


def test_a_stopped_run_continues_bit_for_bit():
    whole, _ = trained()
    stopped = Monitor(stop=5)
    with pytest.raises(KeyboardInterrupt):
        trained(monitor=stopped)
    resumed, _ = trained(resume=stopped.states[-1])
    assert torch.equal(resumed, whole)


def test_a_rarely_freed_element_moves_as_far_as_a_free_one():
    """The first step that frees an element moves it by the learning rate, however late that is."""
    late = 7
    rarely = torch.arange(SIZE) == 3

    class Late(Run):
        def masks(self):
            return {"x": ~rarely if self.step < late else torch.ones(SIZE, dtype=torch.bool)}

    run = Late()
    loop.train(run, run.parameters, config(steps=late + 1, weight_decay=0.0), Monitor(), masks=run.masks)
    assert float((run.parameters["x"].detach() - start())[3].abs()) == pytest.approx(0.05, rel=1e-4)


def test_a_checkpoint_with_one_count_for_all_goes_on():
    stopped = Monitor(stop=5)
    with pytest.raises(KeyboardInterrupt):
        trained(monitor=stopped, masks=None)
    state = stopped.states[-1]
    assert state.tensors["step.x"].ndim == 0
    ones = torch.ones(SIZE, dtype=torch.bool)
    resumed, _ = trained(masks=lambda: {"x": ones}, resume=state)
    torch.testing.assert_close(resumed, trained(masks=None)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
def test_a_fixed_norm_leaves_each_vectors_length_and_what_is_masked(masked):
    """Against numpy: the free part of every vector is the unconstrained step, at the length that it had."""
    shape = 4, 3

    class Vectors:
        def __init__(self):
            torch.manual_seed(0)
            self.parameters = {"x": torch.nn.Parameter(torch.randn(shape))}
            self.target = torch.randn(shape)

        def __call__(self, step, generator):
            return (self.parameters["x"] - self.target).square().sum()

    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [True, True, False]])
    found = {}
    for fixed in (False, True):
        run = Vectors()
        before = run.parameters["x"].detach().clone().numpy()
        masks = (lambda: {"x": mask}) if masked else None
        settings = config(steps=1, weight_decay=0.0)
        loop.train(run, run.parameters, settings, Monitor(), masks=masks, fixed_norm=fixed)
        found[fixed] = run.parameters["x"].detach().numpy()
    free = mask.numpy() if masked else np.ones(shape, bool)
    expected = before.copy()
    for row in range(shape[0]):
        moved = found[False][row][free[row]]
        if moved.size:
            expected[row][free[row]] = moved * np.linalg.norm(before[row][free[row]]) / np.linalg.norm(moved)
    np.testing.assert_allclose(found[True], expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found[True], axis=1), np.linalg.norm(before, axis=1), rtol=1e-5)
    assert not np.allclose(found[True], found[False])
