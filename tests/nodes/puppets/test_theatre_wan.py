"""The theatre's Wan: its training stages, its files in the host's own loaders, and nobody else's files in it."""

import dataclasses
import functools
import sys

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.utils
import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.files import weights
from pack.nodes.puppets import render, theatre, world
from pack.nodes.video_identity.method import adapter_from
from support import real_configurations

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training script finds its own modules
import timeboxed  # noqa: E402
import wan_adapter  # noqa: E402
import wan_export  # noqa: E402
import wan_likeness  # noqa: E402
import wan_looks  # noqa: E402
import wan_stages  # noqa: E402
import whole_clip  # noqa: E402

ENCODER = ROOT / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"
CPU = torch.device("cpu")
TINY = wan_stages.Config(
    size=32, pictures=4, clips=3, vae_dim=8, vae_steps=2, vae_batch=2, vae_crop=16, motion_steps=2,
    motion_frames=5, motion_crop=16, image_steps=1, image_batch=2, clip_steps=1, clip_batch=2,
    looks_steps=2, shot_pictures=4, shot_clips=2, shots_steps=2, shots_batch=2, aligned_steps=2,
    likeness_pictures=3, likeness_steps=2,
)
PROMPT = "a red striped cat waving right on a beach"


def noised(module, seed=0):
    """Every weight a little off its initial value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(transformer, autoencoder, paths): random weights in the files that the script's export writes."""
    folder = tmp_path_factory.mktemp("wan")
    dit = noised(wan_stages.make_dit(TINY, CPU))
    vae = whole_clip.build(8)
    mean, deviation = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    paths = folder / "puppets_wan.safetensors", folder / "puppets_wan_vae.safetensors"
    wan_export.save_dit(paths[0], dit.state_dict(), {"steps": 0})
    wan_export.save_vae(paths[1], vae, mean, deviation, {"steps": 0})
    return dit, (vae, mean, deviation), paths


@pytest.fixture(scope="module")
def loaded(written):
    """MODEL, CLIP and VAE as the native nodes give them: Load Diffusion Model, Load Checkpoint, Load VAE."""
    theatre.register()
    transformer, autoencoder = (str(path) for path in written[2])
    model = comfy.sd.load_diffusion_model(transformer)
    clip = comfy.sd.load_checkpoint_guess_config(str(ENCODER), output_vae=False, embedding_directory=None)[1]
    state, metadata = comfy.utils.load_torch_file(autoencoder, return_metadata=True)
    return model, clip, comfy.sd.VAE(sd=state, metadata=metadata)


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def denoise(model, clip, frames=17, size=32, steps=2):
    import comfy.sample

    shape = (1, 16, 1 + frames // 4, size // 8, size // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return comfy.sample.sample(
        model, noise, steps, 3.0, "euler", "simple", encode(clip, PROMPT), encode(clip, ""),
        torch.zeros_like(noise), disable_pbar=True, seed=3,
    )


def test_native_loaders_sample_and_decode_seventeen_frames(loaded):
    model, clip, vae = loaded
    assert isinstance(model.model.model_config, theatre.PuppetsWan)
    latent = denoise(model, clip)
    assert latent.shape == (1, 16, 5, 4, 4) and torch.isfinite(latent).all()
    frames = vae.decode(latent)
    assert frames.shape == (1, 17, 32, 32, 3) and torch.isfinite(frames).all()
    assert denoise(model, clip, frames=1).shape == (1, 16, 1, 4, 4)


def test_the_live_preview_is_the_theatre_s_own(loaded):
    import latent_preview

    latent_format = loaded[0].get_model_object("latent_format")
    assert latent_format.taesd_decoder_name is None
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    assert previewer.decode_latent_to_preview(torch.zeros(1, 16, 5, 4, 6)).size == (6, 4)


def test_the_prompt_reaches_the_transformer(loaded):
    model, clip, _ = loaded
    latent, sigma = torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    one, other = (
        model.model.apply_model(latent, sigma, c_crossattn=encode(clip, text)[0][0])
        for text in (PROMPT, "a blue penguin in the snow")
    )
    assert not torch.allclose(one, other, atol=1e-4)


def test_the_loaded_transformer_is_the_trained_one(loaded, written):
    """The host's velocity at a noise level equals the training loss's, on the same module before the export."""
    model, clip, _ = loaded
    clean, noise = torch.randn(2, 1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    context, sigma = encode(clip, PROMPT)[0][0], torch.tensor([0.7])
    with torch.no_grad(), wan_stages.host_in_training():
        expected = wan_stages.flow_loss(written[0], clean, noise, sigma, context)
    noisy = 0.3 * clean + 0.7 * noise
    denoised = model.model.apply_model(noisy, sigma, c_crossattn=context)
    velocity = (noisy - denoised) / 0.7
    # fp16 weights on one side.
    torch.testing.assert_close((velocity - (noise - clean)).square().mean(), expected, rtol=5e-3, atol=0)


def test_a_clip_in_one_pass_equals_the_host_s_walk():
    vae = noised(whole_clip.build(8))
    clip = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        for pixels in (clip, clip[:, :, :1]):
            latent = vae.encode(pixels)
            torch.testing.assert_close(whole_clip.encode(vae, pixels), latent, rtol=0, atol=1e-4)
            torch.testing.assert_close(whole_clip.decode(vae, latent), vae.decode(latent), rtol=0, atol=1e-4)


def test_folded_latents_are_normal_in_the_model_s_space(loaded, written):
    """`process_latent_in` of the host's latents gives the training's normalised ones; decoding undoes it."""
    model, _, vae = loaded
    trained, mean, deviation = written[1]
    clip = torch.rand(1, 17, 32, 32, 3, generator=torch.Generator().manual_seed(5))
    latent = vae.encode(clip[0])
    with torch.no_grad():
        raw = whole_clip.encode(trained, clip.movedim(-1, 1) * 2 - 1)
        pixels = whole_clip.decode(trained, raw)
    shape = (1, 16, 1, 1, 1)
    expected = (raw - mean.view(shape)) / deviation.view(shape)
    torch.testing.assert_close(model.model.process_latent_in(latent).float(), expected, rtol=0, atol=2e-2)
    decoded = (pixels.movedim(1, -1) + 1) / 2
    torch.testing.assert_close(vae.decode(latent).float(), decoded.clamp(0, 1), rtol=0, atol=2e-2)


def test_saved_as_one_checkpoint_it_loads_again(loaded, tmp_path):
    """Save Checkpoint and Load Checkpoint: the text encoder travels with the transformer."""
    path = tmp_path / "whole.safetensors"
    comfy.sd.save_checkpoint(str(path), *loaded)
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)[:3]
    assert isinstance(model.model.model_config, theatre.PuppetsWan)
    latent = denoise(model, clip)
    torch.testing.assert_close(latent, denoise(*loaded[:2]), rtol=0, atol=0)
    torch.testing.assert_close(vae.decode(latent), loaded[2].decode(latent), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Wan 2.1 1.3B", "Wan 2.1 14B"])
def test_a_real_wan_is_not_captured(name):
    theatre.register()
    state = real_configurations.build(name).diffusion_model.state_dict()
    found = comfy.model_detection.model_config_from_unet(state, "")
    assert type(found) is real_configurations.REAL_CONFIGURATIONS[name].host_class
    assert found.latent_format.taesd_decoder_name == "lighttaew2_1"
    # Not even with the marker, or where a caller passes no weights to look at.
    assert not theatre.PuppetsWan.matches(found.unet_config, {**state, theatre.WAN_MARKER: torch.ones(1)})
    assert not theatre.PuppetsWan.matches(found.unet_config)


def test_another_tiny_wan_is_not_captured(written):
    theatre.register()
    state = written[0].state_dict()
    found = comfy.model_detection.model_config_from_unet(state, "")
    assert type(found) is comfy.supported_models.WAN21_T2V
    found = comfy.model_detection.model_config_from_unet({**state, theatre.WAN_MARKER: torch.ones(1)}, "")
    assert type(found) is theatre.PuppetsWan


def test_files_are_small_and_half_precision(written):
    for path in written[2]:
        assert path.stat().st_size <= wan_export.LIMIT
        assert {tensor.dtype for tensor in comfy.utils.load_torch_file(str(path)).values()} == {torch.float16}
    full = whole_clip.build(wan_stages.Config().vae_dim)
    assert 2 * sum(parameter.numel() for parameter in full.parameters()) < wan_export.LIMIT


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_value_that_fp16_cannot_hold_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="head.bias is not finite"):
        wan_export.save_dit(tmp_path / "bad.safetensors", {"head.bias": torch.tensor([value])}, {})
    assert not list(tmp_path.iterdir())


def test_noise_levels_are_spread_over_the_sampler_s_schedule(loaded):
    levels = np.sort(wan_stages.noise_levels(np.random.default_rng(0), 1000))
    sigmas = loaded[0].get_model_object("model_sampling").sigmas.numpy()
    assert np.abs(levels - sigmas).max() < 4e-3


class Clock:
    """Reaches the deadline of half a second at its `stop`-th question, and is behind it at every other."""

    def __init__(self, stop):
        self.stop, self.asked = stop, 0

    def monotonic(self):
        self.asked += 1
        return 1.0 if self.asked == self.stop else self.asked * 1e-6


# By stage, the question that is asked before the second step (or part).
BEFORE_SECOND = {
    "vae": 4, "motion": 4, "encode": 2, "dit": 4, "looks": 4, "shots": 4, "aligned": 4, "likeness": 4,
}


def run_stages(folder, monkeypatch, interrupted):
    """Every stage to its end; the calls that each took."""
    for split, count in (("train", TINY.pictures), ("validation", 2)):
        images = [render.render(world.sample_take(i, split), TINY.size).image for i in range(count)]
        np.save(folder / f"{split}_{count}_{TINY.size}.npy", np.stack(images))
    stages = {"vae": wan_stages.train_vae, "motion": wan_stages.train_motion, "encode": wan_stages.encode_all,
              "dit": functools.partial(wan_stages.train_dit, encoder=ENCODER),
              "looks": functools.partial(wan_looks.train_looks, encoder=ENCODER),
              "shots": functools.partial(wan_looks.train_shots, encoder=ENCODER),
              "aligned": functools.partial(wan_looks.train_aligned, encoder=ENCODER),
              "likeness": functools.partial(wan_likeness.train, encoder=ENCODER)}
    calls = dict.fromkeys(stages, 1)
    for name, stage in stages.items():
        clock = Clock(BEFORE_SECOND[name] if interrupted else 0)
        monkeypatch.setattr(timeboxed, "time", clock)
        monkeypatch.setattr(wan_stages, "time", clock)
        while not stage(folder, TINY, CPU, deadline=0.5):
            calls[name] += 1
    return calls


def tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def test_interrupted_stages_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(wan_stages, "PART", {"pictures": 4, "clips": 2})
    monkeypatch.setattr(wan_stages, "CHECKED_PICTURES", 2)
    monkeypatch.setattr(wan_stages, "CHECKED_CLIPS", 1)
    folders = [tmp_path / name for name in ("straight", "interrupted")]
    for folder in folders:
        folder.mkdir()
    assert set(run_stages(folders[0], monkeypatch, False).values()) == {1}
    assert set(run_stages(folders[1], monkeypatch, True).values()) == {2}
    trained = ("vae", "motion", "dit", "looks", "shots", "aligned", "likeness")
    straight, interrupted = (
        {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in trained} for folder in folders
    )
    for name, state in straight.items():
        pairs = list(zip(tensors(state), tensors(interrupted[name]), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)
    assert straight["dit"]["done"] == TINY.image_steps + TINY.clip_steps
    pictures, clips = wan_stages.latents(folders[1], TINY)
    assert pictures.shape == (4, 16, 1, 4, 4) and clips.shape == (3, 16, 5, 4, 4)
    mean, deviation = wan_stages.statistics(clips)
    assert mean.shape == deviation.shape == (16,) and (deviation > 0).all()
    files_written = tmp_path / "transformer.safetensors", tmp_path / "autoencoder.safetensors"
    wan_export.export(folders[0], TINY, CPU, *files_written, ENCODER)
    exported, *_ = weights.read(files_written[0])
    average = straight["likeness"]["modules"]["average"]
    assert set(exported) == {*average, theatre.WAN_MARKER}
    assert all(torch.equal(exported[name], tensor.half()) for name, tensor in average.items())


def test_clips_keep_out_what_is_held_out():
    clips = [wan_stages.clip_takes(i) for i in range(200)]
    assert not {(take.identity.species, take.action) for takes in clips for take in takes} & world.HELD_OUT_PAIRS


def test_every_sixth_clip_has_two_who_do_the_same():
    clips = [wan_stages.clip_takes(i) for i in range(24)]
    assert [len(takes) for takes in clips] == [1, 1, 1, 1, 1, 2] * 4
    for first, second in clips[5::6]:
        assert (first.action, first.mirrored) == (second.action, second.mirrored)
        assert first.identity != second.identity
    frames = wan_stages.clip_frames(clips[5], 48)
    alone = wan_stages.clip_frames(clips[5][:1], 48)
    assert frames.shape == alone.shape == (17, 48, 48, 3) and (frames != alone).any((1, 2, 3)).all()


@pytest.mark.parametrize("rank", [2, 16])  # by AdamW alone, and by Muon alone
def test_the_adapter_learns_from_clips_of_one_puppet_and_pictures_of_it(tmp_path, written, monkeypatch, rank):
    """On random latents: clips and first frames by turns, averaged, and nothing of the clothes in words."""
    config = dataclasses.replace(TINY, clips=6)
    rng = np.random.default_rng(0)
    for kind, frames in (("pictures", 1), ("clips", 5)):
        for path, start, stop in wan_stages._parts(tmp_path, config, kind):
            wan_stages.keep(path, rng.standard_normal((stop - start, 16, frames, 4, 4), np.float32))
    assert wan_adapter.alone(config) == [0, 1, 2, 3, 4]
    assert all("striped" not in text and "hat" not in text for text in wan_adapter.texts(config, [0, 1, 2], 0))
    settings = wan_adapter.AdapterConfig(adapter_rank=rank, adapter_steps=4, adapter_batch=2, adapter_pictures=3)
    seen, objective = [], wan_adapter.DenoisingObjective

    class Noted(objective):
        def loss_at(self, clean, *arguments):
            seen.append(tuple(clean.shape[:3]))
            return super().loss_at(clean, *arguments)

    monkeypatch.setattr(wan_adapter, "DenoisingObjective", Noted)
    assert wan_adapter.train(tmp_path, config, settings, CPU, written[2][0], ENCODER, deadline=0) is None
    trained, log = wan_adapter.train(tmp_path, config, settings, CPU, written[2][0], ENCODER)
    assert log[-1][0] == 4 and all(block.v.up.any() for block in trained.blocks)
    assert seen == [(3, 16, 1), (2, 16, 5)] * 2
    (state,) = (torch.load(path, weights_only=True) for path in tmp_path.glob("puppets_wan_identity_*.pt"))
    kept = {name: state["modules"][name]["blocks/0/self_attn/v_loras/up/weight"] for name in ("live", "average")}
    assert torch.equal(trained.blocks[0].v.up, kept["average"]) and not torch.equal(kept["average"], kept["live"])
    path = tmp_path / "adapter.safetensors"
    wan_export.save_adapter(path, trained.tensors(), {"steps": 2})
    adapter_from(weights.read(path)[0]).check(theatre.WAN_CONFIG["dim"], theatre.WAN_CONFIG["num_layers"])


def test_a_reference_is_the_same_puppet_on_white_in_no_held_out_action():
    rng = np.random.default_rng(0)
    who = world.sample_identity(3)
    takes = [wan_adapter.reference_take(who, rng) for _ in range(40)]
    assert {take.identity for take in takes} == {who} and len({take.action for take in takes}) > 5
    assert not {(who.species, take.action) for take in takes} & world.HELD_OUT_PAIRS
    image = wan_adapter.reference_image(takes[0], 96)
    assert image.shape == (1, 96, 96, 3) and (image[0, [0, 0, -1, -1], [0, -1, 0, -1]] > 0.97).all()


def test_a_given_frame_is_clean_and_not_learnt():
    generator = torch.Generator().manual_seed(3)
    clean, noise = torch.randn(2, 1, 16, 2, 4, 4, generator=generator)
    seen = []

    def blind(x, timestep, context):
        seen.append((x, timestep))
        return torch.zeros_like(x)

    loss = wan_stages.flow_loss(blind, clean, noise, torch.tensor([[0.0, 0.5]]), None)
    (x, timestep), = seen
    assert torch.equal(x[:, :, 0], clean[:, :, 0]) and timestep.tolist() == [[0.0, 500.0]]
    assert torch.allclose(loss, (noise - clean)[:, :, 1].square().mean())


def test_a_weight_says_how_much_each_place_counts():
    generator = torch.Generator().manual_seed(4)
    clean, noise = torch.randn(2, 2, 16, 1, 4, 4, generator=generator)
    weight = torch.rand(2, 1, 4, 4, generator=generator)
    level = torch.full((2,), 0.5)

    def loss(weight):
        return wan_stages.flow_loss(lambda x, *_a, **_k: 0 * x, clean, noise, level, None, weight=weight)

    error = (noise - clean).square().mean(1)
    assert torch.allclose(loss(weight), (weight * error).sum() / weight.sum())
    assert torch.allclose(loss(torch.ones_like(weight)), loss(None))


def test_an_average_forgets_its_beginning_and_then_follows_slowly():
    live, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for module, value in ((live, 1.0), (average, 0.0)):
        torch.nn.init.constant_(module.weight, value)
    found = []
    for index in (0, 1, 10, 10_000):
        timeboxed.follow(average, live, index, 0.9)
        found.append(average.weight.item())
    assert found == pytest.approx([0, 9 / 11, 1 - 2 / 11 * 11 / 20, 1 - 0.9 * 2 / 11 * 11 / 20])
