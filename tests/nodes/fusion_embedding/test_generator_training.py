"""Stage 2, the generator, on real tiny models of ComfyUI: training, resuming, drops, and data read as it goes."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from pack.nodes.fusion_embedding import encoding, layout, method, pairs, sampling, training
from pack.nodes.fusion_embedding.config import ApplyConfig
from pack.nodes.fusion_embedding.method import LORA, WHOLE, Fusion, FusionError
from pack.nodes.training import loop
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.session import session
from support import fusion_trainings, fusions, tiny_model
from support.fusion_trainings import MODEL, VAE, VISION, generated, run_config, same


@pytest.mark.parametrize("whole", [False, True])
def test_the_generator_trains_and_does_not_modify_the_model(whole):
    model = tiny_model.as_loaded(fusions.model())  # a separate one, since sampling patches it
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    objects = list(model.model.parameters())
    rate = 1e-3 if whole else 1e-2
    fusion, loss_map = generated(model=model, steps=30, generator={"whole_unet": whole}, learning_rate=rate)
    losses = torch.tensor(loss_map["loss"])
    assert losses[-8:].mean() < losses[:8].mean()
    assert same(dict(model.model.state_dict()), before)
    assert all(a is b for a, b in zip(objects, model.model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.model.modules())
    assert fusion.unet_kind == (WHOLE if whole else LORA)
    for key in ("pose.conv_out.weight", "embedding.second.weight"):
        assert fusion.generator[key].abs().max() > 0, "a path that starts at 0 was not trained"
    with torch.inference_mode():
        patched, positive, negative = sampling.apply(
            model, fusion, fusions.states(), fusions.fused(), fusions.poses(), ApplyConfig()
        )
        euler = comfy.samplers.sampler_object("euler")
        tiny_model.sample(patched, euler, positive=positive, negative=negative, steps=1)
    if whole:
        assert {key.removeprefix("diffusion_model.") for key in fusion.unet} == dict(
            model.model.diffusion_model.named_parameters()
        ).keys()


@pytest.mark.parametrize("whole", [False, True])
def test_a_generator_resumed_from_its_checkpoint_equals_the_whole_run(folder, whole):
    options = {"generator": {"whole_unet": whole}, "seed": 5}
    expected, losses = generated(steps=4, **options)
    saved = Checkpoints("stage2", {})
    generated(steps=3, checkpoints=saved, checkpoint_every=2, **options)
    again = Checkpoints("stage2", {})
    actual, resumed = generated(steps=4, checkpoints=again, resume_from=saved.path.name, **options)
    assert same(actual.generator, expected.generator) and same(actual.unet, expected.unet) and resumed == losses


def denoised(names, weights, pair):
    """A training forward of one pair with the named paths left out."""
    config = run_config(batch_size=1)
    noisy, sigma = torch.randn(1, 4, 8, 8, generator=fusions.generator(3)), torch.tensor([2.0])
    shares = {name: torch.tensor([float(name in names)]) for name in ("source", "fusion", "pose")}
    with session(sampling.with_fusion_patches(MODEL), (1, 4, 8, 8), config) as denoiser, torch.no_grad():
        return training.FusionDenoiser(denoiser, weights).denoise(
            noisy, sigma, method.PairBatch(pair.states, pair.fused, pair.pose, shares)
        )


def test_a_training_forward_is_what_sampling_computes():
    weights = fusions.weights(MODEL)
    pose = fusions.poses()
    pair = method.EncodedPair(torch.zeros(1, 4, 8, 8), fusions.states(), fusions.fused(), pose.movedim(-1, 1))
    with torch.inference_mode():
        fusion = Fusion(generator=weights)
        patched, positive, negative = sampling.apply(MODEL, fusion, pair.states, pair.fused, pose, ApplyConfig())
    noisy = torch.randn(1, 4, 8, 8, generator=fusions.generator(3))
    for names, conditioning in ((("source", "fusion", "pose"), positive), ((), negative)):
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(conditioning, conditioning)
        seen = []
        with torch.inference_mode():
            sampler = comfy.samplers.KSAMPLER(
                lambda model, x, sigmas, **options: seen.append(
                    model(noisy.clone(), torch.tensor([2.0]), **options["extra_args"])
                ) or x
            )
            guider.sample(noisy, torch.zeros_like(noisy), sampler, torch.tensor([2.0, 0.0]), None, None, True, 1)
        torch.testing.assert_close(denoised(names, weights, pair), seen[0].clone(), rtol=1e-4, atol=1e-4)
    parts = [denoised(names, weights, pair) for names in ((), ("source",), ("fusion",), ("pose",))]
    changes = [float((parts[0] - part).abs().max()) for part in parts[1:]]
    assert min(changes) > 0.01, "a drop drops nothing"


class Counted(pairs.ListedPairs):
    """Notes which pairs were read."""

    def __getitem__(self, index):
        self.__dict__.setdefault("read", []).append(index)
        return super().__getitem__(index)


def counted(count):
    lists = fusions.pair_lists(count)
    return Counted(*([lists[role]] for role in pairs.ROLES))


def test_what_does_not_fit_into_memory_is_read_when_its_turn_comes(monkeypatch):
    small = counted(6)
    cached, _ = generated(small, seed=4)
    assert sorted(set(small.read)) == list(range(6)) and len(small.read) == 6, "read once each"
    monkeypatch.setattr(training, "_CACHE_BYTES", 1000)
    large = counted(6)
    streamed, _ = generated(large, seed=4)
    compared = 2 * 6  # each for the loss before and after
    assert len(large.read) == 1 + 1 + 3 * 2 + compared, "a look at the first, and two in each step"
    assert same(streamed.generator, cached.generator)


def test_pairs_are_encoded_at_the_latent_s_size():
    source, pose, target = fusions.pictures(1, 40, 40), fusions.poses(1, 64, 64), fusions.pictures(1, 67, 90)
    encoded = training.PairEncoder(
        pairs.ListedPairs([source], [pose], [target]), VAE, VISION, fusions.combiner(), VISION, 8
    )
    pair = encoded[0]
    assert encoded.sizes() == [tuple(pair.latent.shape[2:])] == [(8, 11)]
    assert pair.pose.shape == (1, 3, 64, 88) and 0 <= pair.pose.amin() and pair.pose.amax() <= 1
    torch.testing.assert_close(pair.latent, VAE.encode(target[:, 1:65, 1:89]).float())
    torch.testing.assert_close(pair.states, encoding.states(VISION, source))
    expected = encoding.fused(fusions.combiner(), VISION, source, pose)
    torch.testing.assert_close(pair.fused, expected, atol=0.05, rtol=0)
    assert encoded[0] is pair
    tiny = training.PairEncoder(pairs.ListedPairs([source], [pose], [pose[:, :7]]), VAE, VISION, None, None, 8)
    with pytest.raises(FusionError, match="64 x 7 pixels: use 8"):
        tiny[0]


def test_stage_2_alone_and_sdxl():
    alone, _ = generated(fusion=Fusion())
    assert layout.generator_sizes(alone.generator).embedding is None and alone.combiner is None
    model = tiny_model.as_loaded(tiny_model.xl())
    actual, loss_map = generated(model=model, steps=2)
    assert layout.generator_sizes(actual.generator).context == 40
    assert torch.isfinite(torch.tensor(loss_map["loss"])).all()


def test_gradient_checkpointing_changes_nothing():
    plain, _ = generated(seed=8)
    actual, _ = generated(seed=8, gradient_checkpointing=True)
    for key, value in plain.generator.items():
        torch.testing.assert_close(actual.generator[key], value, rtol=1e-4, atol=1e-5)


def test_previews_are_drawn_and_change_nothing(monkeypatch):
    drawn, guidance = [], []
    original, sample = training._preview, comfy.sample.sample
    monkeypatch.setattr(training, "_preview", lambda *args: drawn.append(original(*args)) or drawn[-1])
    monkeypatch.setattr(comfy.sample, "sample", lambda *a, **unequal: guidance.append(a[3]) or sample(*a, **unequal))
    alone, _ = generated(seed=9)
    assert not drawn
    watched, _ = generated(seed=9, preview_every=2)
    assert len(drawn) == 2 and all(image is not None and image.width >= 256 for image in drawn)
    assert guidance == [2.0, 2.0]
    assert same(watched.generator, alone.generator) and same(watched.unet, alone.unet)


def test_a_loss_that_is_no_number_names_the_step():
    with pytest.raises(loop.TrainingDiverged, match="at step"):
        generated(steps=30, learning_rate=0.099, generator={"whole_unet": True}, model=overflowing())


def overflowing():
    model = tiny_model.picture()
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight.mul_(float("inf"))
    return model


def test_an_encoder_of_another_width_is_refused_before_training():
    with pytest.raises(FusionError, match="the combiner takes 20"):
        generated(fusion=Fusion(fusions.combiner(width=20)))


@pytest.mark.parametrize("other", [
    lambda z: z.repeat(1, 4, 1, 1), lambda z: z.unsqueeze(2), lambda z: z[..., ::2, ::2],
])
def test_a_vae_of_another_model_is_refused_before_training(other, monkeypatch):
    encode = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda picture: other(encode(picture)))
    with pytest.raises(FusionError, match=r"vae encodes .* takes \(4, 8, 8\): connect the VAE of the model"):
        generated()


def test_an_encoder_whose_tokens_follow_the_sides_names_the_batch(monkeypatch):
    flexible = fusions.vision(model_type="siglip2_vision_model", image_size=-1, num_patches=16)
    monkeypatch.setattr(fusion_trainings, "VISION", flexible)
    lists = fusions.pair_lists(2)
    sources = [lists["source"][:1], fusions.pictures(1, 64, 40)]
    unequal = pairs.ListedPairs(sources, [lists["pose"]], [lists["target"]])
    with pytest.raises(FusionError, match="gives 15 and 16 tokens .* batch_size to 1"):
        generated(unequal, fusion=Fusion())
    assert generated(unequal, fusion=Fusion(), batch_size=1, steps=1)


def test_a_generator_learns_inside_the_masks_of_its_targets():
    ones, half = torch.ones(1, 64, 64, 1), torch.zeros(1, 64, 64, 1)
    half[:, :32] = 1
    plain, losses = generated(seed=4)
    same_weights, equal = generated(seed=4, masks=[ones] * 4)
    masked, other = generated(seed=4, masks=[half] * 4)
    assert same(plain.generator, same_weights.generator) and losses == equal and losses != other
    assert not same(plain.generator, masked.generator)
