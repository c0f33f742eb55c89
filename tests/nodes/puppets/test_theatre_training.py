"""The loop that trains the theatre's models: schedules, averages, optimisers, and runs that stop and go on."""

import csv
import dataclasses
import json
import os
import sys

import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from safetensors.torch import load_file

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training scripts find each other
import optimisers  # noqa: E402
import runner  # noqa: E402


class Regression(torch.nn.Module):
    """A kernel, a matrix and a bias; the loss of a batch is the mean square of what they make of it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.nn.Conv2d(12, 16, 3, padding=1)
        self.matrix = torch.nn.Linear(16, 12)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x, target):
        return (self.matrix(self.kernel(x).movedim(1, -1)).movedim(-1, 1).float() - target).square().mean()


def draw(rng, _step):
    x = torch.from_numpy(rng.standard_normal((2, 12, 4, 4), np.float32))
    return x, x.flip(1)


def make_stage(steps=6, cool_down=2, inspect=None, draw=draw, ema=0.9):
    schedule = runner.Schedule(steps, cool_down, warm_up=2)
    return runner.Stage("tiny", Regression(), draw, schedule, 0.02, 1e-2, ema, seed=3, inspect=inspect)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(runner, "LOG_STEPS", 2)


def averages(folder):
    return load_file(folder / "tiny" / "average.safetensors")


def test_rates_rise_stay_and_fall_as_a_cosine():
    schedule = runner.Schedule(steps=100, cool_down=40, warm_up=4)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert set(factors[4:61]) == {1.0}
    assert factors[80] == pytest.approx(0.5) and factors[70] == pytest.approx(0.5 + 0.5 * np.cos(np.pi / 4))
    assert 0 < factors[99] < 0.01 and schedule.factor(100) == 0
    assert schedule.factor(30) == runner.Schedule(1000, 40, warm_up=4).factor(30), "a later end changes no plateau"


def test_decay_shrinks_the_matrices_that_muon_trains_and_nothing_else(tmp_path):
    ends = []
    for decay in (0.0, 0.5):
        stage = dataclasses.replace(make_stage(steps=4, cool_down=1), matrix_decay=decay)
        stage.module.forward = lambda *_: 0 * sum(value.sum() for value in stage.module.parameters())
        start = {name: value.detach().clone() for name, value in stage.module.named_parameters()}
        assert runner.run(stage, tmp_path / str(decay))
        ends.append({name: value / start[name] for name, value in stage.module.named_parameters()})
    kept = float(np.prod([1 - 0.02 * 0.5 * stage.schedule.factor(step) for step in range(4)]))
    for name in ("kernel.weight", "matrix.weight"):
        torch.testing.assert_close(ends[0][name], torch.ones_like(ends[0][name]))
        torch.testing.assert_close(ends[1][name], torch.full_like(ends[1][name], kept))
    assert torch.equal(ends[0]["kernel.bias"], ends[1]["kernel.bias"])


def test_an_interrupted_run_takes_the_same_steps(tmp_path):
    folders = [tmp_path / name for name in ("straight", "interrupted")]
    assert runner.run(make_stage(), folders[0])
    for _ in range(3):
        stops = iter([False, False, True])

        class Interrupted(runner._Run):
            def _out_of_time(self, stops=stops):
                return next(stops)

        done = Interrupted(make_stage(), folders[1] / "tiny", float("inf"), 5).go()
    assert done and runner.record(folders[1], ["tiny"])["tiny"]["steps"] == 6
    straight, interrupted = (averages(folder) for folder in folders)
    assert straight.keys() == interrupted.keys() and len(straight) == 4
    assert all(torch.equal(straight[key], interrupted[key]) for key in straight)
    rows = [list(csv.DictReader(open(folder / "tiny_losses.csv"))) for folder in folders]
    assert [row["step"] for row in rows[0]] == ["2", "4", "6"]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


def test_a_run_without_time_saves_and_says_that_it_has_not_ended(tmp_path):
    assert not runner.run(make_stage(), tmp_path, minutes=0)
    assert runner.record(tmp_path, ["tiny"])["tiny"]["steps"] == 0
    module = Regression()
    assert not runner.trained(module, tmp_path, "other") and runner.trained(module, tmp_path, "tiny")


def test_it_learns_and_the_average_follows(tmp_path):
    stage = make_stage(steps=60, cool_down=10)
    assert runner.run(stage, tmp_path)
    losses = [float(row["loss"]) for row in csv.DictReader(open(tmp_path / "tiny_losses.csv"))]
    assert losses[-1] < 0.5 * losses[0]
    live, average = dict(stage.module.named_parameters()), averages(tmp_path)
    for name, parameter in live.items():
        distance = (average[name] - parameter).norm() / parameter.norm()
        assert 0 < distance < 0.2


def test_an_average_forgets_its_beginning_and_then_follows_slowly(tmp_path):
    run = runner._Run(make_stage(ema=0.9), tmp_path / "tiny", 1, 5)
    averages, weights = [torch.zeros(1)], [torch.ones(1)]
    found = []
    for count in (1, 10, 10_000):
        run._follow(averages, weights, torch.tensor(count))
        found.append(1 - averages[0].item())
    assert found == pytest.approx([2 / 11, 2 / 11 * 11 / 20, 2 / 11 * 11 / 20 * 0.9])


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path):
    def broken(rng, step):
        x, target = draw(rng, step)
        return x, target * (float("nan") if step == 3 else 1)

    with pytest.raises(FloatingPointError, match="step 3 of tiny"):
        runner.run(make_stage(draw=broken), tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_a_save_killed_between_its_renames_is_found_again(tmp_path):
    runner.run(make_stage(), tmp_path)
    os.replace(tmp_path / "tiny", tmp_path / "tiny.old")
    assert runner.record(tmp_path, ["tiny"])["tiny"]["steps"] == 6
    assert not (tmp_path / "tiny.old").exists()


def test_logged_steps_that_were_not_saved_are_dropped(tmp_path):
    runner.run(make_stage(), tmp_path)
    (tmp_path / "tiny" / "progress.json").write_text(json.dumps({"step": 4}))
    runner.run(make_stage(), tmp_path, minutes=0)
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "tiny_losses.csv"))] == ["2", "4"]


def test_the_last_step_is_inspected_in_eval_mode_without_a_gradient(tmp_path):
    seen = []

    def inspect(module):
        seen.append((module.training, torch.is_grad_enabled()))
        return "3.00 dB", np.zeros((4, 4, 3), np.uint8)

    runner.run(make_stage(inspect=inspect), tmp_path)
    assert seen == [(False, False)]
    assert [path.name for path in (tmp_path / "tiny_sheets").iterdir()] == ["0000006.jpg"]
    assert list(csv.DictReader(open(tmp_path / "tiny_losses.csv")))[-1]["figures"] == "3.00 dB"


def test_a_finished_stage_goes_on_with_a_later_end(tmp_path):
    runner.run(make_stage(), tmp_path)
    assert runner.run(make_stage(steps=8), tmp_path) and runner.record(tmp_path, ["tiny"])["tiny"]["steps"] == 8


# Optimisers


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_trained_as_the_matrix_of_its_rows(layout):
    """PyTorch's Muon on the flattened kernel is the reference; a layout only changes the order of columns."""
    generator = torch.Generator().manual_seed(1)
    start, gradient = (torch.randn(16, 12, 3, 3, generator=generator) for _ in range(2))
    weight = torch.nn.Parameter(start.clone().contiguous(memory_format=layout))
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    ours, reference = optimisers.KernelMuon([weight], 0.02), torch.optim.Muon([matrix], lr=0.02, weight_decay=0.0)
    for _ in range(3):
        weight.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
        ours.step()
        reference.step()
    # It orthogonalises in bf16, whose sums depend on the order of columns.
    torch.testing.assert_close(weight.detach().flatten(1), matrix.detach(), rtol=0, atol=2e-3)
    assert (weight - start).abs().max() > 1e-2


def test_a_layout_of_which_no_matrix_is_a_view_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        optimisers.KernelMuon([torch.nn.Parameter(torch.zeros(16, 3, 3, 12).permute(0, 3, 2, 1))], 0.02)


def test_a_weight_without_a_gradient_stays():
    weights = [torch.nn.Parameter(torch.ones(16, 16)) for _ in range(2)]
    weights[0].grad = torch.eye(16)
    optimisers.KernelMuon(weights, 0.02).step()
    assert (weights[0] != 1).any() and (weights[1] == 1).all()


def test_embeddings_outer_layers_and_small_things_are_adamws():
    module = torch.nn.ModuleDict({
        "token_embedding": torch.nn.Embedding(16, 16), "first": torch.nn.Linear(16, 16, bias=False),
        "hidden": torch.nn.Conv2d(16, 16, 3), "narrow": torch.nn.Conv2d(3, 16, 3, bias=False),
        "frozen": torch.nn.Linear(16, 16, bias=False).requires_grad_(False),
    })
    matrices, others = optimisers.split_parameters(module, ("first.",))
    assert [id(p) for p in matrices] == [id(module["hidden"].weight)]
    wanted = {"token_embedding.weight", "first.weight", "hidden.bias", "narrow.weight"}
    assert {id(p) for p in others} == {id(p) for name, p in module.named_parameters() if name in wanted}
