"""A run inside a node: what it returns, saves, shows and reports, with and without checkpoints."""

import logging

import comfy.model_management
import pytest
import torch
from pack.nodes.training import monitor
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.runs import run

CPU = torch.device("cpu")


class InMemory(Checkpoints):
    """Checkpoints that write no file."""

    def __init__(self):
        super().__init__("test", {})
        self.states = []

    def save(self, state):
        self.states.append(state)


def train(steps=4, cancel_at=None, preview_every=0, **options):
    weight = torch.nn.Parameter(torch.ones(2))

    def objective(step, _generator):
        if step == cancel_at:
            comfy.model_management.interrupt_current_processing()
        return weight.square().sum()

    config = TrainingConfig(steps=steps, learning_rate=0.1, checkpoint_every=3, preview_every=preview_every)
    return run(objective, {"weight": weight}, config, CPU, **options), weight


def test_a_run_returns_every_loss_and_reports_its_peak_memory(caplog):
    checkpoints = InMemory()
    with caplog.at_level(logging.INFO):
        loss_map, weight = train(checkpoints=checkpoints, extra_tensors={"shown": torch.zeros(1)})
    assert list(loss_map) == ["loss"] and len(loss_map["loss"]) == 4
    assert loss_map["loss"][0] == 2.0 and float(weight.detach().abs().max()) < 1
    assert sum("training: peak memory" in message for message in caplog.messages) == 1
    (state,) = checkpoints.states
    assert state.step == 3 and {"shown", "parameter.weight"} <= state.tensors.keys()


def test_steps_are_counted_as_the_node_counts_them(caplog):
    """Train Source and Driving Pair with 2 steps makes 4 optimiser steps; bar and log said 4."""
    config = TrainingConfig(steps=4, learning_rate=0.1, steps_per_iteration=2)
    reports = monitor.NodeMonitor(config, CPU)
    shown = []
    reports.bar.update_absolute = lambda value, total=None, preview=None: shown.append((value, total))
    with caplog.at_level(logging.INFO):
        for step in range(1, 5):
            reports.progress(step, 1.0)
    assert reports.bar.total == 2 and shown == [(1, 2), (1, 2), (2, 2), (2, 2)]
    assert [message.split(",")[0] for message in caplog.messages] == [
        f"[Understudy] step {i} of 2" for i in (1, 1, 2, 2)
    ]


def test_a_resumed_run_continues_from_the_state():
    checkpoints = InMemory()
    whole, weight = train(steps=5, checkpoints=checkpoints)
    again, resumed = train(steps=5, checkpoints=InMemory(), resume=checkpoints.states[0])
    assert whole == again and torch.equal(weight, resumed)


def test_a_preparatory_run_saves_and_reports_nothing(caplog):
    with caplog.at_level(logging.INFO):
        train(phase="contexts")
    assert caplog.messages and all("contexts: step" in message for message in caplog.messages)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(cancel_at=1)


FAILURES = [
    torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory"), MemoryError(),
    OSError(28, "No space left on device"), ValueError("bad shape"), TypeError("no colours"), KeyError("model"),
]


@pytest.mark.parametrize("error", FAILURES)
def test_a_preview_that_fails_leaves_the_run_as_it_would_be(error, monkeypatch, caplog):
    tried = []

    def preview():
        tried.append(1)
        raise error

    monkeypatch.setattr(monitor.NodeMonitor, "_card", lambda self: None)
    plain, weight = train(steps=6)
    watched, same = train(steps=6, preview=preview, preview_every=2)
    assert plain == watched and torch.equal(weight, same) and len(tried) == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "training goes on without previews" in warning and (f"{error}" or "MemoryError") in warning


def test_a_preview_without_room_says_so(caplog):
    train(steps=2, preview=lambda: None, preview_every=1)
    assert "a preview was left out" in caplog.text


class Unwritable(InMemory):
    """The disk is full for the first two checkpoints."""

    def save(self, state):
        super().save(state)
        if len(self.states) < 3:
            raise FAILURES[len(self.states)]


def test_checkpoints_that_cannot_be_written_leave_the_run_as_it_would_be(caplog):
    plain, weight = train(steps=10)
    checkpoints = Unwritable()
    watched, same = train(steps=10, checkpoints=checkpoints)
    assert plain == watched and torch.equal(weight, same)
    assert [state.step for state in checkpoints.states] == [3, 6, 9], "it tries again"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and all("checkpoint could not be written" in warning for warning in warnings)


def test_a_cancelled_run_whose_checkpoint_fails_is_cancelled(caplog):
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(checkpoints=Unwritable(), cancel_at=1)
    assert "checkpoint could not be written" in caplog.text


def test_the_note_is_shown_beside_the_loss(caplog):
    with caplog.at_level(logging.INFO):
        train(steps=1, note=lambda: "top-1 50%")
    assert "step 1 of 1, loss 2.0000, top-1 50%" in caplog.text


def test_the_peak_is_the_most_memory_so_far(monkeypatch):
    used = iter([3 << 30, 5 << 30, 4 << 30])

    class Process:
        def memory_info(self):
            return self

        rss = property(lambda self: next(used))

    monkeypatch.setattr(monitor.psutil, "Process", Process)
    peak = monitor.PeakMemory(CPU)
    peak.update()
    peak.update()
    assert peak.gigabytes == 5
