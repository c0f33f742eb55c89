"""The paths beside diffusers and plain layers, both objectives, and what shapes and pictures are refused."""

import diffusers.models.controlnets.controlnet as diffusers_controlnet
import pytest
import torch
from pack.kernels import fusion_embedding as kernel
from pack.nodes.fusion_embedding import layout, method
from pack.nodes.fusion_embedding.config import (
    ApplyConfig,
    CombinerConfig,
    GeneratorConfig,
    RetargetConfig,
)
from pack.nodes.fusion_embedding.method import Fusion, FusionError
from support import fusions

SIZES = layout.Sizes(encoder=10, context=8, embedding=6, time=12, channels=5)
CHANNELS = (4, 6, 8, 10)


def generator(sizes=SIZES, seed=0):
    return layout.new_generator(sizes, 7, CHANNELS, fusions.generator(seed))


def test_the_pose_path_is_diffusers_own():
    """Weights go from one to the other by name, and give the same residual."""
    theirs = diffusers_controlnet.ControlNetConditioningEmbedding(5, block_out_channels=CHANNELS)
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=fusions.generator(i)))
    ours = {f"pose.{key}": value for key, value in theirs.state_dict().items()}
    assert ours.keys() == {key for key in generator() if key.startswith("pose.")}
    for height, width in ((64, 64), (40, 72), (33, 50)):
        pose = fusions.pictures(2, height, width).movedim(-1, 1)
        with torch.no_grad():
            expected = theirs(pose)
        torch.testing.assert_close(method.pose_residual(ours, pose), expected, rtol=1e-5, atol=1e-6)
    assert layout.pose_reduction(ours) == 8


def test_projections_are_plain_layers_in_the_published_order():
    w = generator() | {"embedding.second.weight": torch.randn(12, 6, generator=fusions.generator(5))}
    layers = torch.nn.Sequential(
        torch.nn.Linear(10, 7), torch.nn.GELU(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 8)
    )
    w["appearance.norm.weight"] = 1 + 0.3 * torch.randn(7, generator=fusions.generator(3))
    w["appearance.norm.bias"] = 0.3 * torch.randn(7, generator=fusions.generator(4))
    names = {"0": "first", "2": "norm", "3": "second"}
    parts = ("weight", "bias")
    layers.load_state_dict({f"{i}.{p}": w[f"appearance.{name}.{p}"] for i, name in names.items() for p in parts})
    states = torch.randn(2, 3, 10, generator=fusions.generator(1))
    with torch.no_grad():
        torch.testing.assert_close(method.appearance_tokens(w, states), layers(states))
        mlp = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU(), torch.nn.Linear(6, 12))
        mlp.load_state_dict({
            f"{i}.{part}": w[f"embedding.{name}.{part}"]
            for i, name in (("0", "first"), ("2", "second")) for part in ("weight", "bias")
        })
        fused = fusions.fused(2, 6)
        torch.testing.assert_close(method.class_embedding(w, fused), mlp(fused))


def test_a_new_generator_adds_nothing_but_tokens():
    w = generator()
    assert not method.pose_residual(w, fusions.poses().movedim(-1, 1)).any()
    assert not method.class_embedding(w, fusions.fused(3, 6)).any()
    assert method.appearance_tokens(w, fusions.states(1, hidden=10)).std() > 0.01


def test_a_start_follows_its_seed_and_not_the_global_one():
    state = torch.get_rng_state()
    first, again, other = generator(), generator(), generator(seed=1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["appearance.first.weight"], other["appearance.first.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_are_read_from_weights():
    assert layout.generator_sizes(generator()) == SIZES
    alone = layout.Sizes(encoder=10, context=8, embedding=None, time=0, channels=5)
    assert layout.generator_sizes(generator(alone)) == alone
    assert layout.combiner_width(fusions.combiner(width=9)) == 9


def test_drawings_one_at_a_time_give_the_same_and_what_is_left_out_is_0():
    w = generator()
    for key in ("embedding.second.weight", "embedding.second.bias", "pose.conv_out.weight"):
        w[key] = torch.randn(w[key].shape, generator=fusions.generator(len(key)))
    states, fused = torch.randn(3, 4, 10, generator=fusions.generator(1)), fusions.fused(3, 6)
    pose = fusions.pictures(3, 32, 40).movedim(-1, 1)
    together = method.unet_inputs(w, states, fused, pose)
    with torch.no_grad():
        for part, expected in zip(method.unet_inputs(w, states, fused, pose), together, strict=True):
            torch.testing.assert_close(part, expected)
    none = method.left_out(w, together)
    dropped = method.unet_inputs(w, states, fused, pose, {name: torch.zeros(3) for name in method.CONDITIONS})
    for part, expected in zip(dropped, none, strict=True):
        torch.testing.assert_close(part, expected.expand_as(part))
    only = method.unet_inputs(w, states, fused, pose, {name: torch.tensor([0.0, 1, 0]) for name in method.CONDITIONS})
    for part, expected, empty in zip(only, together, none, strict=True):
        torch.testing.assert_close(part[1], expected[1])
        torch.testing.assert_close(part[::2], empty.expand_as(part[::2]))


@pytest.mark.parametrize("key", sorted(generator()))
def test_a_generator_with_a_bad_weight_is_refused_by_name(key):
    w = generator()
    with pytest.raises(FusionError):
        layout.generator_sizes({k: v for k, v in w.items() if k != key})
    with pytest.raises(FusionError):
        layout.generator_sizes(w | {key: torch.zeros(*w[key].shape, 2)})
    with pytest.raises(FusionError, match="pose.blocks.9.odd|embedding.third"):
        layout.generator_sizes(w | {"embedding.third": torch.zeros(1)})


@pytest.mark.parametrize("key", sorted(fusions.combiner()))
def test_a_combiner_with_a_bad_weight_is_refused_by_name(key):
    w = fusions.combiner()
    with pytest.raises(FusionError):
        layout.combiner_width({k: v for k, v in w.items() if k != key})
    with pytest.raises(FusionError):
        layout.combiner_width(w | {key: torch.zeros(*w[key].shape, 2)})


def test_the_objective_is_the_published_loss_with_the_step_s_dropout():
    source, pose, target = (torch.randn(6, 12, generator=fusions.generator(i)) for i in range(3))
    w, config = fusions.combiner(), CombinerConfig(temperature=0.1)
    asked = []

    def encode(indices):
        asked.append(indices)
        return source[indices], pose[indices], target[indices]

    objective = method.RetrievalObjective(encode, 6, w, 4, config)
    loss = objective(0, fusions.generator(9))
    generator = fusions.generator(9)
    order = torch.randperm(6, generator=generator)[:4]
    fused = kernel.combine(source[order], pose[order], w, kernel.dropout(0.5, generator))
    expected = kernel.source_enhanced_info_nce(source[order], target[order], fused, 0.1, 1e-4)
    assert asked == [order.tolist()] and len(set(asked[0])) == 4
    assert torch.equal(loss, expected)
    assert objective.accuracy().startswith("top-1 ")


class Recorder:
    """Stands for the denoising error and keeps what it was asked."""

    def __init__(self):
        self.asked = []
        self.denoiser = self
        self.sigmas = torch.arange(10.0)
        self.model = self

    def process_latent_in(self, latent):
        return latent

    def loss_at(self, clean, batch, noise, level):
        self.asked.append((clean, batch, noise, level))
        return torch.zeros(len(clean))


class Ready:
    """Pairs that are encoded already, of two sizes."""

    def sizes(self):
        return [(4, 4)] * 6 + [(4, 8)] * 2

    def __getitem__(self, index):
        shape = (1, 2, *self.sizes()[index])
        return method.EncodedPair(torch.full(shape, float(index)), torch.zeros(1, 3, 5), torch.ones(1, 2),
                                torch.zeros(1, 3, 8, 8))


def recorded(draws=400, batch=4, **settings):
    recorder = Recorder()
    objective = method.PoseTransferObjective(recorder, Ready(), batch, GeneratorConfig(**settings))
    for i in range(draws):
        objective(i, fusions.generator(i))
    return recorder.asked


def test_drops_are_independent_and_as_often_as_asked():
    asked = recorded(source_drop=0.2, fusion_drop=0.5, pose_drop=0.0)
    shares = {name: torch.cat([batch.keep[name] for _, batch, _, _ in asked]) for name in method.CONDITIONS}
    assert shares["source"].mean() == pytest.approx(0.8, abs=0.04)
    assert shares["fusion"].mean() == pytest.approx(0.5, abs=0.05) and shares["pose"].all()
    both = (shares["source"] * shares["fusion"]).mean()
    assert both == pytest.approx(0.4, abs=0.05)
    within = [len(set(batch.keep["fusion"].tolist())) for _, batch, _, _ in asked if len(batch.pose) == 4]
    assert max(within) == 2, "pictures of a batch drop together"


def test_noise_has_an_offset_that_is_equal_over_a_picture():
    for offset in (0.0, 0.5):
        noise = torch.cat([noise for _, _, noise, _ in recorded(noise_offset=offset) if noise.shape[-1] == 4])
        means = noise.mean((2, 3))
        assert means.var() == pytest.approx(1 / 16 + offset**2, rel=0.15)
        assert noise.var((2, 3)).mean() == pytest.approx(1.0, abs=0.05)


def test_batches_are_of_one_size_without_repetition_and_the_noise_levels_are_even():
    asked = recorded()
    for clean, batch, _, _ in asked:
        indices = clean[:, 0, 0, 0].tolist()
        assert len(set(indices)) == len(indices) == (4 if clean.shape[-1] == 4 else 2)
        assert all((index >= 6) == (clean.shape[-1] == 8) for index in indices)
    wide = sum(clean.shape[-1] == 8 for clean, *_ in asked) / len(asked)
    assert wide == pytest.approx(0.25, abs=0.07)
    levels = torch.cat([level for *_, level in asked])
    assert levels.min() == 0 and levels.max() == 9 and levels.float().mean() == pytest.approx(4.5, abs=0.25)


def test_a_pose_without_a_person_is_refused_by_number():
    poses = fusions.poses(3)
    method.check_poses(poses)
    poses[1] = 0
    with pytest.raises(FusionError, match="pose 2 of 3 shows no person"):
        method.check_poses(poses)
    opaque = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 8, 8, 4)
    plain = torch.tensor([0.9, 0.1, 0.1]).expand(1, 8, 8, 3)
    for blank in (
        torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8, 3), torch.full((1, 8, 8, 3), float("nan")), opaque, plain
    ):
        with pytest.raises(FusionError, match="pose shows no person"):
            method.check_poses(blank)
    grey = fusions.poses(1)[..., :1]
    for drawn in (grey, grey.expand(-1, -1, -1, 3)):
        with pytest.raises(FusionError, match="pose is grey, .* connect the coloured"):
            method.check_poses(drawn)


def test_what_is_no_drawing_on_black_is_told():
    """A photograph and a skeleton on white give a picture without a word, of nobody's pose."""
    drawing = fusions.poses(1)
    assert method.pose_warnings(fusions.poses(3)) == []
    assert method.pose_warnings((drawing + 0.05 * fusions.pictures(1)).clamp(0, 1)) == []  # JPEG's noise
    (white,) = method.pose_warnings(torch.where(drawing.amax(-1, keepdim=True) > 0, drawing, 1.0))
    assert "pose looks like a skeleton on white" in white and "SDPose Draw Keypoints" in white
    (photograph,) = method.pose_warnings(torch.cat([drawing, fusions.pictures(1)]), "pose")
    assert photograph.startswith("pose 2 of 2 looks like a photograph")


@pytest.mark.parametrize(("counts", "expected"), [((1, 1), 1), ((1, 4), 4), ((4, 1), 4), ((4, 4), 4), ((2, 4), None),
                                                  ((3, 2), None), ((0, 1), 1), ((0, 0), None)])
def test_batches_are_equal_or_one(counts, expected):
    named = dict(zip(("source", "pose"), counts, strict=True))
    if expected is None or 0 in counts:
        with pytest.raises(FusionError, match="source|pose"):
            method.common_batch_size(named)
    else:
        assert method.common_batch_size(named) == expected


def test_parts_are_named():
    assert Fusion().parts == []
    assert Fusion(fusions.combiner(), unet={"a": torch.zeros(1)}, unet_kind="lora").parts == ["combiner", "LoRA"]
    assert Fusion(unet={"a": torch.zeros(1)}, unet_kind="whole").parts == ["whole UNet"]


@pytest.mark.parametrize("make", [
    lambda: CombinerConfig(temperature=0.0), lambda: CombinerConfig(batch_size=1),
    lambda: GeneratorConfig(pose_drop=1.0), lambda: GeneratorConfig(source_drop=-0.1),
    lambda: GeneratorConfig(noise_offset=2.0),
    lambda: ApplyConfig(strength=-1.0), lambda: RetargetConfig(amount=1.5),
])
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="use"):
        make()
