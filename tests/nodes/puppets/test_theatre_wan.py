"""The theatre's Wan: its training stages, its files in the host's own loaders, and nobody else's files in it."""

import math
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
from safetensors.torch import load_file
from support import real_configurations

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training scripts find each other
import half_files  # noqa: E402
import puppets_sd  # noqa: E402
import puppets_wan  # noqa: E402
import runner  # noqa: E402
import sd_autoencoder  # noqa: E402
import sd_unet  # noqa: E402
import text_encoder  # noqa: E402
import wan_autoencoder  # noqa: E402
import wan_transformer  # noqa: E402
import whole_clip  # noqa: E402

CPU = torch.device("cpu")
TINY = puppets_wan.Config(
    frames=6, clips=4, size=32, frames_steps=2, frames_cool_down=1, frames_batch=2, frames_crop=16, clips_steps=2,
    clips_cool_down=1, clips_batch=2, clips_crop=16, transformer_steps=2, transformer_cool_down=1, clip_batch=2,
    frame_batch=3,
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
def encoder(tmp_path_factory):
    """A `puppets_sd` checkpoint of random weights, for its text encoder."""
    path = tmp_path_factory.mktemp("encoder") / "puppets_sd.safetensors"
    torch.manual_seed(0)
    denoiser, autoencoder = noised(sd_unet.Denoiser(5.0)), sd_autoencoder.NarrowTAESD()
    tensors = puppets_sd.checkpoint_tensors(denoiser, autoencoder)
    half_files.save_half(path, tensors, {})
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(transformer, autoencoder, paths): random weights in the files that the script's export writes."""
    folder = tmp_path_factory.mktemp("wan")
    transformer = noised(wan_transformer.make_transformer())
    vae = whole_clip.build(8)
    mean, deviation = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    paths = folder / "puppets_wan.safetensors", folder / "puppets_wan_vae.safetensors"
    puppets_wan.save_transformer(paths[0], transformer.state_dict(), {"steps": 0})
    puppets_wan.save_autoencoder(paths[1], vae, mean, deviation, {"steps": 0})
    return transformer, (vae, mean, deviation), paths


@pytest.fixture(scope="module")
def loaded(written, encoder):
    """MODEL, CLIP and VAE as the native nodes give them: Load Diffusion Model, Load Checkpoint, Load VAE."""
    theatre.register()
    transformer, autoencoder = (str(path) for path in written[2])
    model = comfy.sd.load_diffusion_model(transformer)
    clip = comfy.sd.load_checkpoint_guess_config(str(encoder), output_vae=False, embedding_directory=None)[1]
    state, metadata = comfy.utils.load_torch_file(autoencoder, return_metadata=True)
    return model, clip, comfy.sd.VAE(sd=state, metadata=metadata)


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def denoise(model, clip, frames=9, size=32, steps=2):
    import comfy.sample

    shape = (1, 16, 1 + frames // 4, size // 8, size // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return comfy.sample.sample(
        model, noise, steps, 3.0, "euler", "simple", encode(clip, PROMPT), encode(clip, ""),
        torch.zeros_like(noise), disable_pbar=True, seed=3,
    )


def test_native_loaders_sample_and_decode_nine_frames(loaded):
    model, clip, vae = loaded
    assert isinstance(model.model.model_config, theatre.PuppetsWan)
    latent = denoise(model, clip)
    assert latent.shape == (1, 16, 3, 4, 4) and torch.isfinite(latent).all()
    frames = vae.decode(latent)
    assert frames.shape == (1, 9, 32, 32, 3) and torch.isfinite(frames).all()
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


def test_the_loaded_transformer_is_the_trained_one(loaded, written, encoder):
    """ComfyUI's velocity at a noise level gives the training loss, of the same module before the export."""
    model, clip, _ = loaded
    clean, noise = torch.randn(2, 1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.7])
    denoiser = wan_transformer.VideoDenoiser(text_encoder.trained(encoder, CPU))
    denoiser.transformer.load_state_dict(written[0].state_dict())
    with torch.no_grad(), puppets_wan.host_in_training():
        expected = denoiser(clean, noise, sigma, text_encoder.tokens([PROMPT]))
    noisy = 0.3 * clean + 0.7 * noise
    denoised = model.model.apply_model(noisy, sigma, c_crossattn=encode(clip, PROMPT)[0][0])
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
        assert path.stat().st_size <= half_files.LIMIT
        assert {tensor.dtype for tensor in comfy.utils.load_torch_file(str(path)).values()} == {torch.float16}
    full = whole_clip.build(wan_autoencoder.DIM)
    assert 2 * sum(parameter.numel() for parameter in full.parameters()) < half_files.LIMIT


def test_noise_levels_are_spread_over_the_sampler_s_schedule(loaded):
    levels = np.sort(wan_transformer.noise_levels(np.random.default_rng(0), 1000).numpy())
    sigmas = loaded[0].get_model_object("model_sampling").sigmas.numpy()
    assert np.abs(levels - sigmas).max() < 4e-3


def test_all_that_the_video_model_sees_are_close_ups_without_what_is_held_out():
    takes = [take(i) for i in range(60) for take in (wan_transformer.frame_take, wan_transformer.clip_take)]
    assert {take.framing for take in takes} == {"close_up"} and len(set(takes)) == len(takes)
    assert not {(take.identity.species, take.action) for take in takes} & world.HELD_OUT["close_up"]


def test_a_clip_is_half_a_cycle_from_its_phase_on():
    take = wan_transformer.clip_take(0)
    clip = wan_transformer.draw_clip(take, 48)
    cycle = render.render_clip(take, 16, 48)
    assert clip.shape == (9, 48, 48, 3)
    assert all((frame == picture.image).all() for frame, picture in zip(clip, cycle, strict=False))
    assert (wan_transformer.draw_frame(take, 48) == clip[:1]).all()


def test_a_frame_s_own_pixels_are_what_a_latent_stands_for():
    pixels = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    found = wan_autoencoder.mean_colours(pixels)
    assert found.shape == (1, 3, 3, 2, 2)
    torch.testing.assert_close(found[0, :, 0, 1, 0], pixels[0, :, 0, 8:, :8].mean((1, 2)))
    torch.testing.assert_close(found[0, :, 2, 0, 1], pixels[0, :, 5:9, :8, 8:].mean((1, 2, 3)))
    assert wan_autoencoder.mean_colours(pixels[:, :, :1]).shape == (1, 3, 1, 2, 2)


def test_pixels_and_bytes_are_the_same_clip():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), np.uint8)
    pixels = wan_autoencoder.to_pixels(images)
    assert pixels.shape == (2, 3, 5, 8, 8) and pixels.min() >= -1
    assert (wan_autoencoder.to_images(pixels) == images).all()


@pytest.mark.parametrize("step", [0, 1])
def test_clips_and_frames_come_by_turns_with_their_own_captions(monkeypatch, step):
    """Each latent holds its number, each caption the take's phase: both have to be of the same take."""
    monkeypatch.setattr(text_encoder, "training_text", lambda take, *_a: str(take.phase))
    monkeypatch.setattr(text_encoder, "tokens", lambda texts: texts)
    data = {kind: np.broadcast_to(np.arange(n, dtype=np.float16)[:, None, None, None, None], (n, 16, t, 4, 4))
            for kind, n, t in (("frames", 30, 1), ("clips", 20, 3))}
    draw = wan_transformer.drawer(data, {"frames": 6, "clips": 4}, 0.25, 0.2, 0.1)
    clean, noise, sigma, texts = draw(np.random.default_rng(5), step)
    assert clean.shape == noise.shape == ((4, 16, 3, 4, 4), (6, 16, 1, 4, 4))[step] and sigma.shape == (len(clean),)
    take = (wan_transformer.clip_take, wan_transformer.frame_take)[step]
    assert texts == [str(take(int(number)).phase) for number in clean[:, 0, 0, 0, 0]]


def test_the_loss_is_the_velocity_s(encoder, monkeypatch):
    denoiser = wan_transformer.VideoDenoiser(text_encoder.trained(encoder, CPU))
    clean, noise = torch.randn(2, 2, 16, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    sigma, seen = torch.tensor([0.25, 1.0]), []
    monkeypatch.setattr(denoiser, "predict", lambda noisy, *_a: seen.append(noisy) or 0.5 * noisy)
    loss = denoiser(clean, noise, sigma, None)
    errors = []
    for i, level in enumerate(sigma.tolist()):
        mixed = (1 - level) * clean[i] + level * noise[i]
        torch.testing.assert_close(seen[0][i], mixed)
        errors.append((0.5 * mixed - (noise[i] - clean[i])).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_the_text_encoder_is_not_trained(encoder):
    denoiser = wan_transformer.VideoDenoiser(text_encoder.trained(encoder, CPU))
    assert not any(parameter.requires_grad for parameter in denoiser.text.parameters())
    assert all(parameter.requires_grad for parameter in denoiser.transformer.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder):
    """The folder of two steps of every stage, and the exported files."""
    folder = tmp_path_factory.mktemp("puppets_wan")
    paths = folder / "transformer.safetensors", folder / "autoencoder.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puppets_wan, "ENCODER", encoder)
        patch.setattr(puppets_wan, "_CHECKED", 8)
        patch.setattr(wan_autoencoder, "SHOWN", 2)
        patch.setattr(wan_transformer, "SHOWN", 1)
        for train in (puppets_wan.train_frames, puppets_wan.train_clips, puppets_wan.train_transformer):
            assert train(folder, TINY, math.inf)
        puppets_wan.export(folder, TINY, *paths)
    return folder, paths


def test_every_stage_goes_on_from_the_one_before(trained):
    folder, _ = trained
    for name in ("frames", "clips", "transformer"):
        assert runner.record(folder, [name])[name]["steps"] == 2 and list((folder / f"{name}_sheets").iterdir())
    found = wan_autoencoder.trained(folder, CPU).state_dict()
    frames, clips = (load_file(folder / name / "average.safetensors") for name in ("frames", "clips"))
    assert all(torch.equal(found[key], clips[key]) for key in found)
    # Two steps at half the rates later, and in time for the first time.
    kernel = "vae.encoder.conv1.weight"
    assert 0 < (frames[kernel] - clips[kernel]).abs().max() < 0.1
    assert not frames[kernel][:, :, 0].any() and clips[kernel][:, :, 0].any()
    for layer in ("vae.conv1", "vae.conv2"):
        assert torch.equal(frames[f"{layer}.weight"], clips[f"{layer}.weight"])


def test_latents_are_normal_and_the_exported_files_are_what_was_trained(trained):
    folder, paths = trained
    clips = np.load(folder / "latents_clips_4.npy")
    assert clips.shape == (4, 16, 3, 4, 4) and np.load(folder / "latents_frames_6.npy").shape == (6, 16, 1, 4, 4)
    mean, deviation = wan_transformer.statistics(clips)
    normal = wan_transformer.normalised(clips, mean, deviation).astype(np.float64)
    assert np.abs(normal.mean((0, 2, 3, 4))).max() < 1e-2 and np.abs(normal.std((0, 2, 3, 4)) - 1).max() < 1e-2
    exported, *_ = weights.read(paths[0])
    average = load_file(folder / "transformer" / "average.safetensors")
    names = {name.removeprefix("transformer.") for name in average if name.startswith("transformer.")}
    assert set(exported) == {*names, theatre.WAN_MARKER}
    assert all(torch.equal(exported[name], average[f"transformer.{name}"].half()) for name in names)


def test_a_later_transformer_begins_with_the_one_before_and_reads_with_the_text_encoder_of_today(trained, encoder):
    folder, _ = trained
    denoiser = wan_transformer.VideoDenoiser(text_encoder.trained(encoder, CPU))
    reads = denoiser.text.get_input_embeddings().weight
    changed = reads.add_(1).clone()
    puppets_wan.load_transformer(denoiser, folder, 1)
    average = load_file(folder / "transformer" / "average.safetensors")
    assert torch.equal(reads, changed)
    found = denoiser.transformer.state_dict()
    assert all(torch.equal(value, average[f"transformer.{key}"]) for key, value in found.items())
    with pytest.raises(SystemExit, match="stage 2"):
        puppets_wan.load_transformer(denoiser, folder, 2)
