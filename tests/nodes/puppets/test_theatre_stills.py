"""How `puppets_sd` is trained: its pictures, autoencoder and UNet, and the file that comes of them."""

import csv
import dataclasses
import math
import shutil
import sys

import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.puppets import theatre, tokenizer, world
from safetensors.torch import load_file

sys.path.append(str(ROOT / "workflows" / "theatre"))  # where the training scripts find each other
import autoencoding  # noqa: E402
import half_files  # noqa: E402
import pictures  # noqa: E402
import puppets_sd  # noqa: E402
import runner  # noqa: E402
import sd_autoencoder  # noqa: E402
import sd_unet  # noqa: E402
import text_encoder  # noqa: E402

CPU = torch.device("cpu")
TINY = puppets_sd.Config(
    pictures=14, size=32, autoencoder_steps=2, autoencoder_cool_down=1, autoencoder_batch=2, autoencoder_crop=16,
    decoder_steps=2, decoder_cool_down=1, unet_steps=2, unet_cool_down=1, unet_batch=3,
)


def noised(module, scale=0.02):
    """Every weight a little off its initial value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return module


# Pictures


def test_every_seventh_still_is_a_close_up_and_none_shows_what_is_held_out():
    takes = [world.still_take(i) for i in range(140)]
    assert [take.framing for take in takes] == (["full"] * 6 + ["close_up"]) * 20
    assert not any((take.identity.species, take.action) in world.HELD_OUT[take.framing] for take in takes)
    unseen = [world.still_take(i, "unseen") for i in range(14)]
    assert all((take.identity.species, take.action) in world.HELD_OUT[take.framing] for take in unseen)


def test_pictures_are_rendered_once_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_PART", 3)
    images = pictures.stills(tmp_path, "train", 7, 32)
    assert images.shape == (7, 32, 32, 3) and images.dtype == np.uint8
    for i in (0, 2, 3, 6):
        assert (images[i] == pictures.draw_still(world.still_take(i), 32)).all()
    monkeypatch.setattr(pictures, "draw_still", None)
    assert (pictures.stills(tmp_path, "train", 7, 32) == images).all()
    assert [path.name for path in tmp_path.iterdir()] == ["stills_train_7_32.npy"]


def test_a_later_moment_is_another_phase_of_the_same_take():
    take = world.still_take(6)
    assert (pictures.draw_moment(take, 0, 48) == pictures.draw_still(take, 48)).all()
    assert (pictures.draw_moment(take, 0.25, 48) != pictures.draw_still(take, 48)).any()


def test_bytes_and_floats_are_the_same_picture():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    pixels = pictures.to_unit(images)
    assert pixels.shape == (2, 3, 8, 8) and pixels.is_contiguous(memory_format=torch.channels_last)
    assert pixels.max() <= 1 and (pictures.to_bytes(pixels) == images).all()
    assert pictures.sheet([images, images]).shape == (16, 16, 3)


# Autoencoder


def test_widened_with_zeros_it_gives_the_same_pictures():
    narrow = noised(sd_autoencoder.NarrowTAESD())
    full = narrow.widened()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latent = narrow.encode(pixels)
        assert latent.shape == (2, 16, 4, 4)
        torch.testing.assert_close(full.taesd_encoder(pixels), latent, rtol=0, atol=1e-5)
        torch.testing.assert_close(full.taesd_decoder(latent), narrow.decode(latent), rtol=0, atol=1e-5)


def test_windows_lie_on_the_latent_grid_and_nearer_the_middle():
    found = autoencoding.corners(np.random.default_rng(0), 4000, 128, 64)
    assert found.shape == (4000, 2) and (found % 8 == 0).all() and found.min() == 0 and found.max() == 64
    counts = [(found == value).mean() for value in (0, 32, 64)]
    assert counts[1] > 4 * max(counts[0], counts[2])


def test_the_reconstruction_loss_is_by_hand():
    target = torch.zeros(1, 1, 2, 2)
    output = torch.tensor([[[[0.5, 0.0], [0.0, 0.0]]]])
    edges = (0.5 + 0) / 2 + (0.5 + 0) / 2
    assert autoencoding.reconstruction_loss(output, target).item() == pytest.approx(
        0.5 / 4 + 2 * 0.25 / 4 + 0.5 * edges
    )


def test_decibels():
    assert autoencoding.decibels(np.array([0.001, 0.001])) == pytest.approx(30)


def test_the_noise_reaches_the_decoder_alone():
    autoencoder, seen = noised(sd_autoencoder.NarrowTAESD()), []
    pixels, noise = torch.rand(2, 3, 16, 16), torch.ones(2, 16, 2, 2)
    autoencoder.taesd_decoder.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    autoencoder(pixels, noise)
    torch.testing.assert_close(seen[0], autoencoder.encode(pixels) + noise)


# UNet


def test_explicit_attention_is_attention():
    q, k, v = torch.randn(3, 2, 12, 64, generator=torch.Generator().manual_seed(0))
    heads = [part.view(2, 12, 2, 32).transpose(1, 2) for part in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 12, 64)
    torch.testing.assert_close(sd_unet.explicit_attention(None, q, k, v, 2), expected)


def test_the_schedule_is_the_one_that_comfyui_samples_with(pack_root):
    """ComfyUI's sigma is sqrt((1 - a) / a)."""
    import comfy.model_sampling

    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
    alphas = sd_unet.schedule().alphas_cumprod
    torch.testing.assert_close(((1 - alphas) / alphas).sqrt(), sigmas, rtol=1e-4, atol=1e-5)


def test_the_loss_is_min_snr_of_predicted_noise(monkeypatch):
    denoiser = sd_unet.Denoiser(min_snr=5.0)
    clean, noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    moments, seen = torch.tensor([0, 400, 999]), []
    monkeypatch.setattr(denoiser, "predict", lambda noisy, *_: seen.append(noisy) or torch.zeros_like(noisy))
    loss = denoiser(clean, noise, moments, None)
    alpha = sd_unet.schedule().alphas_cumprod[moments].double()
    snr = alpha / (1 - alpha)
    expected = (noise.double().square().mean((1, 2, 3)) * (snr.clamp(max=5) / snr)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for i, a in enumerate(alpha):
        mixed = math.sqrt(a) * clean[i] + math.sqrt(1 - a) * noise[i]
        torch.testing.assert_close(seen[0][i], mixed, rtol=1e-4, atol=1e-5)


def test_feed_forwards_whose_gates_have_closed_start_anew_and_learn():
    denoiser, dead = noised(sd_unet.Denoiser(min_snr=5.0)), "middle_block.1.transformer_blocks.0.ff"
    layer = denoiser.unet.get_submodule(dead)
    with torch.no_grad():
        layer.net[0].proj.weight.zero_()
        layer.net[0].proj.bias.chunk(2)[1].fill_(-40)  # of the gates
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 2, 16, 4, 4, generator=generator)
    batch = clean, noise, torch.tensor([100, 800]), text_encoder.tokens(["a bear waving", ""])
    denoiser(*batch).backward()
    assert layer.net[2].weight.grad.abs().max() == 0
    before = denoiser(*batch).item()
    assert sd_unet.revive(denoiser, *batch) == [dead]
    assert denoiser(*batch).item() == pytest.approx(before, abs=1e-6), "it goes on as it was"
    denoiser(*batch).backward()
    assert layer.net[2].weight.grad.abs().max() > 0
    assert sd_unet.revive(noised(denoiser), *batch) == []


def test_first_and_last_layer_and_feed_forwards_are_left_to_adamw():
    names = [name for name, _ in sd_unet.Denoiser(5.0).named_parameters()]
    left = [name for name in names if any(part in name for part in sd_unet.OUTER)]
    forwards = [name for name in names if ".transformer_blocks.0.ff.net." in name]
    assert len(forwards) == 7 * 4
    assert sorted(left) == sorted(forwards + ["unet.input_blocks.0.0.weight", "unet.input_blocks.0.0.bias",
                                              "unet.out.0.weight", "unet.out.0.bias", "unet.out.2.weight",
                                              "unet.out.2.bias"])


def test_an_untrained_unet_predicts_nothing_and_guidance_leaves_noise():
    denoiser = sd_unet.Denoiser(5.0).eval()
    with torch.no_grad():
        found = sd_unet.sample(denoiser, ["a cat", "a frog"], 4, seed=1, steps=2)
    assert found.shape == (2, 16, 4, 4) and torch.isfinite(found).all()


# Captions


def test_a_word_begins_anew_as_another():
    text = text_encoder.make_text_encoder().eval()
    read = [text(text_encoder.tokens([f"a {what} bear"])).last_hidden_state for what in ("red", "blue")]
    text_encoder.renew(text, {"red": "blue"})
    assert not torch.equal(*read)
    assert torch.equal(text(text_encoder.tokens(["a red bear"])).last_hidden_state, read[1])

def test_captions_are_sometimes_empty_and_sometimes_have_a_free_word():
    rng, take = np.random.default_rng(0), world.still_take(6)
    texts = [text_encoder.training_text(take, rng, 0.1) for _ in range(400)]
    assert 0.05 < np.mean([not text for text in texts]) < 0.15
    free = set(tokenizer.FREE_WORDS)
    assert 0.02 < np.mean([bool(free & set(text.split())) for text in texts]) < 0.09
    ids = text_encoder.tokens(texts)
    assert ids.shape == (400, tokenizer.MAX_TOKENS)
    assert not (ids == tokenizer.WORDS.index(tokenizer.UNKNOWN)).any(), "a caption has a word that the theatre lacks"


# The whole way


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of two steps of every stage, and the exported file."""
    folder = tmp_path_factory.mktemp("puppets_sd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd_autoencoder, "SHOWN", 2)
        patch.setattr(sd_autoencoder, "CHECKED", 14)
        patch.setattr(sd_unet, "SHOWN", 2)
        assert puppets_sd.train_autoencoder(folder, TINY, math.inf)
        assert puppets_sd.train_unet(folder, TINY, math.inf)
        assert puppets_sd.train_decoder(folder, TINY, math.inf)
        path = folder / "puppets_sd.safetensors"
        puppets_sd.export(folder, TINY, path)
    return folder, path


def test_stages_leave_sheets_and_losses(trained):
    folder, _ = trained
    for name in ("autoencoder", "decoder", "unet"):
        assert list((folder / f"{name}_sheets").iterdir())
        assert [row["step"] for row in csv.DictReader(open(folder / f"{name}_losses.csv"))] == ["2"]
    rows = list(csv.DictReader(open(folder / "autoencoder_losses.csv")))
    assert "dB full figures" in rows[-1]["figures"]


def test_the_exported_file_is_what_was_trained(trained):
    folder, path = trained
    theatre.register()
    assert path.stat().st_size <= half_files.LIMIT
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)[:3]
    assert isinstance(model.model.model_config, theatre.PuppetsSD)
    denoiser = sd_unet.Denoiser(5.0)
    assert runner.trained(denoiser, folder, "unet")
    for ours, theirs in (
        (denoiser.unet, model.model.diffusion_model), (denoiser.text, clip.cond_stage_model.clip_l.transformer),
    ):
        loaded = {name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()}
        for name, value in ours.state_dict().items():
            if "position_ids" not in name:
                torch.testing.assert_close(
                    loaded[name.removeprefix("text_model.")].float(), value, rtol=0, atol=2e-3, msg=name
                )
    pixels = pictures.to_unit(np.array(pictures.stills(folder, "train", 14, 32)[:1]))
    narrow = sd_autoencoder.trained(folder, CPU)
    with torch.no_grad():
        expected = narrow.encode(pixels)
    torch.testing.assert_close(vae.encode(pixels.movedim(1, -1)), expected, rtol=0, atol=2e-2)  # fp16 weights


def test_the_decoder_goes_on_and_the_encoder_stays(trained):
    folder, _ = trained
    before, after = (load_file(folder / name / "average.safetensors") for name in ("autoencoder", "decoder"))
    assert all(torch.equal(before[key], after[key]) == (not key.startswith("taesd_decoder")) for key in before)
    found = sd_autoencoder.trained(folder, CPU).state_dict()
    assert all(torch.equal(found[key], after[key]) for key in after)


@pytest.mark.parametrize("reads", [0, 1])
def test_a_later_stage_goes_on_with_the_average_and_the_text_stays_if_told(trained, monkeypatch, tmp_path, reads):
    folder = shutil.copytree(trained[0], tmp_path / "stages")
    monkeypatch.setattr(sd_unet, "SHOWN", 2)
    with pytest.raises(SystemExit, match="stage 2"):
        puppets_sd.train_unet(folder, dataclasses.replace(TINY, unet_stage=3), math.inf)
    decays, run = [], runner.run
    monkeypatch.setattr(runner, "run", lambda stage, *rest: decays.append(stage.matrix_decay) or run(stage, *rest))
    words = {"unet_text": reads, "unet_words": "waving=pointing" if reads else ""}
    assert puppets_sd.train_unet(folder, dataclasses.replace(TINY, unet_stage=2, unet_steps=1, **words), math.inf)
    assert decays == [TINY.unet_decay] != [0]
    before, after = (load_file(folder / name / "average.safetensors") for name in ("unet", "unet2"))
    for key in before:
        change = (after[key] - before[key]).abs().max()
        if "token_embedding" in key and reads:
            waving, pointing, bear = (tokenizer.WORDS.index(word) for word in ("waving", "pointing", "bear"))
            torch.testing.assert_close(after[key][waving], before[key][pointing], rtol=0, atol=0.01)
            torch.testing.assert_close(after[key][bear], before[key][bear], rtol=0, atol=0.01)
        else:
            assert change == 0 if key.startswith("text.") and not reads else change < 0.05, key
    assert any((after[key] != before[key]).any() for key in before if key.startswith("text.") == bool(reads))


def test_latents_are_kept(trained):
    folder, _ = trained
    data = sd_unet.latents(folder, np.zeros((14, 32, 32, 3)))
    assert data.shape == (14, 16, 4, 4) and data.dtype == np.float16 and data.std() > 0


def test_nothing_is_exported_before_training(tmp_path):
    with pytest.raises(SystemExit, match="unet"):
        puppets_sd.export(tmp_path, TINY, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="autoencoder"):
        sd_autoencoder.trained(tmp_path, CPU)


def test_the_preview_map_is_linear_in_the_latents():
    autoencoder = sd_autoencoder.NarrowTAESD().eval()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    assert puppets_sd.latent_rgb(autoencoder, images).shape == (17, 3)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_value_that_fp16_cannot_hold_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="head.bias is not finite"):
        half_files.save_half(tmp_path / "bad.safetensors", {"head.bias": torch.tensor([value])}, {})
    assert not list(tmp_path.iterdir())
