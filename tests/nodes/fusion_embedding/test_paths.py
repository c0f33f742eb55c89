"""What each path of a generator learns: its own rate and clipping, its gradient as told, an early drop of the source.

The loop is tested against AdamW written out in numpy.
"""

import comfy.model_management
import numpy as np
import pytest
import torch
from pack.nodes.fusion_embedding import training, training_nodes
from pack.nodes.fusion_embedding.config import CombinerConfig, GeneratorConfig, within_budget
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.training import loop
from pack.nodes.training.config import TrainingConfig
from support import fusions
from support.fusion_trainings import MODEL, VAE, VISION, combined, generated, same

SCALES = {"large": 100.0, "small": 0.5}  # of the gradients of two parts
START = {"large": [1.0, -2.0], "small": [3.0, 0.5]}
RATE, DECAY, BETAS, EPSILON = 0.01, 0.01, (0.9, 0.999), 1e-8


class Monitor:
    def check(self):
        pass

    progress = checkpoint = warn = lambda *_: None


def trained(steps=4, **options):
    """Two parts that are pulled towards 0, each step harder, with gradients of very different sizes."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in START.items()}
    paths = loop.Paths({name: [name] for name in START}, **options)
    config = TrainingConfig(steps=steps, learning_rate=RATE, weight_decay=DECAY, checkpoint_every=0)
    loop.train(
        lambda step, _: sum(SCALES[n] * 2**step * p.square().sum() / 2 for n, p in parameters.items()), parameters,
        config, Monitor(), paths=paths,
    )
    return {name: value.detach().numpy() for name, value in parameters.items()}, paths


def by_hand(steps=4, factors=(), clip_each=False):
    """AdamW (Loshchilov and Hutter), clipping and rates, in numpy; also the norms before clipping."""
    values = {name: np.array(value) for name, value in START.items()}
    means, squares = ({name: np.zeros(2) for name in START} for _ in range(2))
    norms = []
    for step in range(steps):
        gradients = {name: SCALES[name] * 2.0**step * value for name, value in values.items()}
        lengths = {name: np.sqrt((gradient**2).sum()) for name, gradient in gradients.items()}
        whole = np.sqrt(sum(length**2 for length in lengths.values()))
        norms.append(list(lengths.values()))
        for name, gradient in gradients.items():
            g = gradient * min(1, 1 / ((lengths[name] if clip_each else whole) + 1e-6))
            rate = RATE * dict(factors).get(name, 1)
            means[name] = BETAS[0] * means[name] + (1 - BETAS[0]) * g
            squares[name] = BETAS[1] * squares[name] + (1 - BETAS[1]) * g**2
            mean, square = means[name] / (1 - BETAS[0] ** (step + 1)), squares[name] / (1 - BETAS[1] ** (step + 1))
            values[name] = values[name] * (1 - rate * DECAY) - rate * mean / (np.sqrt(square) + EPSILON)
    return values, norms


@pytest.mark.parametrize("options", [
    {}, {"factors": {"small": 5.0}}, {"clip_each": True}, {"clip_each": True, "factors": {"large": 0.1}},
])
def test_rates_and_clipping_of_paths_are_adamw_s_by_hand(options):
    actual, paths = trained(**options)
    expected, norms = by_hand(**options)
    for name in START:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9)
    np.testing.assert_allclose(list(paths.norms), norms, rtol=1e-9)
    assert paths.medians() == pytest.approx(dict(zip(START, np.median(norms, axis=0), strict=True)))


def test_a_parameter_of_no_path_is_refused():
    parameters = {"a": torch.nn.Parameter(torch.ones(1)), "b": torch.nn.Parameter(torch.ones(1))}
    with pytest.raises(KeyError, match="of no path: \\['b'\\]"):
        loop.Paths({"one": ["a"]}).groups(parameters)


def test_the_embedding_s_rate_is_that_of_what_reads_it_alone():
    options = {"embedding_tokens": 2}
    plain, fast = (
        generated(steps=1, generator={**options, "embedding_rate": rate})[0].generator for rate in (1.0, 3.0)
    )
    start = generated(steps=1, generator={**options, "embedding_rate": 0.0})[0].generator
    of_embedding = {key for key in plain if key.startswith(("embedding.", "embedding_tokens."))}
    assert 0 < len(of_embedding) < len(plain)
    for key in plain:
        if key in of_embedding:  # a first step of AdamW is as long as its rate, whatever the gradient
            torch.testing.assert_close(fast[key] - start[key], 3 * (plain[key] - start[key]), rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(fast[key], plain[key])
    assert any(not torch.equal(plain[key], start[key]) for key in of_embedding)


def test_the_node_tells_the_gradient_of_each_path_and_which_of_them_starves(caplog, monkeypatch):
    with caplog.at_level("INFO"):
        generated(steps=2, generator={"embedding_tokens": 1})
    told, = (line for line in caplog.messages if "gradient norms of the last 2 steps" in line)
    assert all(f"{part} " in told for part in ("appearance", "class embedding", "embedding tokens", "pose", "UNet"))
    # The class embedding's last layer starts at 0, so that its first gradient is small, but here not so small.
    assert not any("below a hundredth" in line for line in caplog.messages)
    monkeypatch.setattr(training, "_STARVED", 1e9)
    with caplog.at_level("INFO"):
        generated(steps=1)
    assert "the gradient of the class embedding is below a hundredth of the largest" in caplog.text


def test_the_source_is_dropped_more_often_at_first(monkeypatch):
    kept = []
    denoise = training.FusionDenoiser.denoise

    def noted(self, noisy, sigma, batch):
        if len(noisy) == 4:  # not the loss before and after, which takes pairs one by one
            kept.append({name: int(values.sum()) for name, values in batch.keep.items()})
        return denoise(self, noisy, sigma, batch)

    monkeypatch.setattr(training.FusionDenoiser, "denoise", noted)
    config = {"source_drop": 0.0, "fusion_drop": 0.0, "pose_drop": 0.0, "early_source_drop": 0.99, "early_steps": 2}
    generated(steps=4, batch_size=4, generator=config)
    assert [step["source"] for step in kept] == [0, 0, 4, 4]
    assert all(step["fusion"] == step["pose"] == 4 for step in kept)
    assert GeneratorConfig(source_drop=0.9, early_source_drop=0.5, early_steps=1).drop("source", 0) == 0.9


@pytest.mark.parametrize(("budgets", "pairs", "steps"), [
    (GeneratorConfig.budgets, 101_966, 80_926), (CombinerConfig.budgets, 101_966, 10_622),
])
def test_a_published_budget_counts_epochs_in_steps(budgets, pairs, steps):
    assert within_budget("published", budgets, pairs)["steps"] == steps
    assert "epochs" not in within_budget("published", budgets, pairs)
    assert within_budget("custom", budgets, pairs) == {}


def test_a_budget_replaces_the_settings_and_the_node_says_so(folder, caplog, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train_generator", lambda *args, **_: seen.append(args[-2:]) or (Fusion(), {}))
    inputs = {
        "model": MODEL, "vae": VAE, "appearance_encoder": VISION, "steps": 7, "learning_rate": 0.5e-4,
        "batch_size": 2, "whole_unet": False, "seed": 0, "dataset_folder": "none", "resume_from": "none",
    }
    lists = fusions.pair_lists(4)
    with caplog.at_level("INFO"):
        for budget in ("custom", "consumer", "published"):
            values = {name: [value] for name, value in {**inputs, "budget": budget}.items()}
            training_nodes.UnderstudyTrainFusionGenerator.execute(**values, **{n: [v] for n, v in lists.items()})
    chosen = [
        (config.steps, config.batch_size, config.learning_rate, generator.whole_unet, generator.batch_size)
        for config, generator in seen
    ]
    assert chosen == [(7, 2, 0.5e-4, False, 2), (10_000, 1, 1e-4, False, 1), (4, 126, 1e-4, True, 126)]
    assert "budget published: batch_size 126, learning_rate 0.0001, whole_unet True, steps 4" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_encoder_streams_in_bit_for_bit(checkpointing):
    plain, losses = combined(train_encoder=True, seed=3)
    streamed, same_losses = combined(
        train_encoder=True, seed=3, offload=True, gradient_checkpointing=checkpointing
    )
    assert losses == same_losses and same(plain.combiner, streamed.combiner)
    assert same(plain.encoder.get_sd(), streamed.encoder.get_sd())
    assert not same(plain.encoder.get_sd(), VISION.get_sd()), "nothing was trained"
    assert not any("forward" in module.__dict__ for module in VISION.model.modules())
    assert comfy.model_management.in_training is False


def kept_weights(monkeypatch, **settings):
    """How many of the encoder's trained copies autograd keeps for the backward pass of a step."""
    kept, copies = set(), set()
    encode = training._TrainableEmbeddings.__call__

    def noted(self, indices):
        module = VISION.model
        copies.update(weight.data_ptr() for weight in module.parameters() if weight.requires_grad)

        def note(tensor):
            kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return encode(self, indices)

    monkeypatch.setattr(training._TrainableEmbeddings, "__call__", noted)
    combined(train_encoder=True, steps=1, **settings)
    return len(copies), len(copies & kept)


def test_no_trained_matrix_is_kept_until_the_backward_pass(monkeypatch):
    copies, kept = kept_weights(monkeypatch)
    assert copies > 10 and kept > 5
    monkeypatch.undo()
    assert kept_weights(monkeypatch, offload=True)[1] == 0
