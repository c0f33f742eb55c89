"""Learning an identifier through real tiny models of the host: gradients, triples, phases, resuming."""

import logging

import action_identifiers
import comfy.clip_model
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import pytest
import tiny_clip
import tiny_model
import torch
from pack.nodes.action_identifier import encoding, method, running, training
from pack.nodes.action_identifier.config import ActionTrainingConfig
from pack.nodes.action_identifier.text_encoder import TextEncoder
from pack.nodes.puppets import theatre
from pack.nodes.training import loop
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.session import session

SUBJECTS = ("a cat on a beach", "a (red:1.2) robot", "a dog <action> at night")
MODEL = tiny_model.as_loaded(action_identifiers.reading(tiny_model.picture()))
CLIP = tiny_clip.as_loaded(tiny_clip.clip())


def latents(count=3, seed=0, shape=(1, 4, 8, 8)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


def exemplars(contrasts=True, shape=(1, 4, 8, 8)):
    return training.Exemplars(
        latents(shape=shape), SUBJECTS, latents(seed=10, shape=shape) if contrasts else None
    )


class Kept(Checkpoints):
    """Checkpoints in memory."""

    def __init__(self, state=None):
        super().__init__("test", {})
        self.states = []
        self.state = state

    def save(self, state):
        self.states.append(state)

    def resume(self, name):
        return self.state


def action(**settings):
    return ActionTrainingConfig(**{"context_steps": 2, "initial_word": "dancing", **settings})


def config(**settings):
    return TrainingConfig(**{"steps": 3, "learning_rate": 1e-2, "checkpoint_every": 0, **settings})


def train(model=MODEL, clip=CLIP, given=None, settings=None, checkpoints=None, preview=None, **run):
    with torch.inference_mode():
        return training.train(
            model, clip, given or exemplars(), settings or action(), config(**run),
            checkpoints=checkpoints or Kept(), resume_from="none", preview=preview,
        )


@pytest.fixture(autouse=True)
def quickly_drawn(monkeypatch):
    monkeypatch.setattr(training, "_CONTRAST_STEPS", 2)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Gradients through the host's text encoders


def out_of_place(clip, tokens):
    """The host's CLIP from its own parts, without its additions in place."""
    encoder = clip.cond_stage_model.clip_l
    text = encoder.transformer.text_model
    embeds = encoder.process_tokens([[token for token, _ in section] for section in tokens["l"]], "cpu")[0]
    x = embeds + text.embeddings.position_embedding.weight.float()
    mask = torch.full((x.shape[1], x.shape[1]), -torch.finfo(x.dtype).max).triu_(1)
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, comfy.clip_model.optimized_attention_for_device(
            x.device, mask=True, small_input=True
        ))
        x = x + layer.mlp(layer.layer_norm2(x))
    return torch.cat(list(text.final_layer_norm(x).split(1)), dim=1)


def test_gradients_to_the_tokens_are_those_of_the_formulas():
    weight = torch.randn(1, 2 * 77, 16)
    made = tiny_clip.clip()
    vectors = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(2))
    gradients = []
    for clip, encode in (
        (CLIP, None), (made, lambda tokens: out_of_place(made, tokens)),
    ):
        encoder = TextEncoder(clip)
        tokens = vectors.clone().requires_grad_()
        with session(MODEL, (1, 4, 8, 8), config(), beside=[encoder.patcher]):
            prompt = encoding.Prompt(clip.tokenize, "a <a> cat", {"<a>": {"l": 2}})
            filled = [prompt.filled({"<a>": {"l": tokens[layer]}}) for layer in range(2)]
            joined = {"l": filled[0]["l"] + filled[1]["l"]}
            encoded = encoder.encode(joined)[0] if encode is None else encode(joined)
            (encoded * weight).sum().backward()
        gradients.append(tokens.grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_text_encoder_is_left_as_it_was():
    before = list(CLIP.cond_stage_model.parameters())
    train()
    assert all(a is b for a, b in zip(before, CLIP.cond_stage_model.parameters(), strict=True))
    assert all(parameter.is_inference() for parameter in before)
    assert not any(module._forward_pre_hooks for module in CLIP.cond_stage_model.modules())
    assert not any(module._forward_hooks for module in MODEL.model.modules())
    assert comfy.model_management.in_training is False
    assert "patches" not in MODEL.model_options["transformer_options"] and not MODEL.wrappers


class T5Model(comfy.sd1_clip.SDClipModel):
    """The kind of encoder that Wan has, three sizes smaller, with the theatre's words."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        size = {"d_ff": 32, "d_kv": 8, "d_model": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 200,
                "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5", "pad_token_id": 0}
        super().__init__(
            device=device, layer="last", textmodel_json_config=size, dtype=dtype, enable_attention_masks=True,
            zero_out_masked=True, model_class=comfy.text_encoders.t5.T5, special_tokens=theatre.SPECIAL_TOKENS,
            model_options={},
        )


class T5(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, {}, clip_model=T5Model)


def test_a_t5_has_gradients_too_as_finite_differences_say():
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(theatre.PuppetsTokenizer, T5))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.cond_stage_model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) / 4
        parameter.data = (value + ("norm" in name)).to(parameter.dtype)
    clip = tiny_clip.as_loaded(clip)
    encoder = TextEncoder(clip)
    weight = torch.randn(1, theatre.tokenizer.MAX_TOKENS, 16, generator=generator)
    direction = torch.randn(1, 16, generator=generator)
    vector = torch.randn(1, 16, generator=generator)

    def value(moved):
        prompt = encoding.Prompt(clip.tokenize, "a <a> cat", {"<a>": {"l": 1}})
        return (encoder.encode(prompt.filled({"<a>": {"l": moved}}))[0] * weight).sum()

    with session(MODEL, (1, 4, 8, 8), config(), beside=[encoder.patcher]):
        token = vector.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(token), token)
        with torch.no_grad():
            slope = (value(vector + 1e-2 * direction) - value(vector - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2)
    assert abs(float(slope)) > 1e-2


# Triples


def learner_of(denoiser, encoder, run):
    return training._Learner(denoiser, encoder, exemplars(), action(), run)


@pytest.mark.parametrize("merge", ["union", "intersection"])
def test_three_gradients_of_one_pass_are_those_of_three_passes(merge):
    """And the step's gradient is the anchor's, where numpy's comparison of the three lets it act."""
    run = config()
    encoder = TextEncoder(CLIP)
    patched = running.apply(MODEL, 1.0)
    places = action_identifiers.places(MODEL)
    with session(patched, (3, 4, 8, 8), run, beside=[encoder.patcher]) as denoiser:
        learner = learner_of(denoiser, encoder, run)
        learner.action = action(merge=merge)
        contrasts = learner.contrasts(None)
        tokens = learner.first_tokens(len(places))
        objective, masks = learner.objective(tokens, contrasts)
        sizes = []
        handle = denoiser.network.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
        loss = objective(0, torch.Generator().manual_seed(5))
        loss.backward()
        handle.remove()
        assert sizes == [3], "a step costs one pass of three"

        generator = torch.Generator().manual_seed(5)
        order = torch.randperm(3, generator=generator).tolist()
        anchor, other = order[:2]
        state = generator.get_state()
        found = []
        for who, picture in (
            (anchor, learner.latents[anchor]), (other, learner.latents[other]), (anchor, contrasts[anchor])
        ):
            generator.set_state(state)
            text = SUBJECTS[who] if "<action>" in SUBJECTS[who] else f"{SUBJECTS[who]} <action>"
            prompt = encoding.Prompt(CLIP.tokenize, text, {"<action>": {"l": 1}})
            copy = {"l": tokens["l"].detach().clone().requires_grad_()}
            contexts = learner.contexts(prompt, "<action>", copy)
            error = learner.errors([picture], [who], [contexts], generator)
            assert len(found) or float(error.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
            found.append(torch.autograd.grad(error.sum(), copy["l"])[0])
    g, same_action, same_context = found
    low = (g - same_action).abs()
    high = (g - same_context).abs()
    free = low <= low.sort(-1).values[..., 9:10]  # 0.6 of 16 channels: the tenth value
    of_it = high > high.sort(-1).values[..., 9:10]
    expected = free | of_it if merge == "union" else free & of_it
    assert torch.equal(masks()["l"], expected)
    assert expected.any() and not expected.all()
    torch.testing.assert_close(tokens["l"].grad, g * expected, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(g, same_context, rtol=0.1, atol=1e-6)


def test_a_step_leaves_masked_channels_and_their_moments_bit_identical():
    kept = Kept()
    train(checkpoints=kept, steps=4, checkpoint_every=1)
    for before, after in zip(kept.states, kept.states[1:], strict=False):
        held, mean, square = (
            before.tensors[f"{key}.l"] == after.tensors[f"{key}.l"] for key in ("parameter", "exp_avg", "exp_avg_sq")
        )
        assert held.any() and not held.all()
        assert torch.equal(held, mean) and torch.equal(held, square)


def test_what_is_not_finite_anywhere_in_a_triple_stops_the_run():
    given = exemplars()
    given.contrasts[1][..., 0, 0] = float("nan")
    kept = Kept()
    with pytest.raises(loop.TrainingDiverged, match="at step"):
        train(given=given, checkpoints=kept, steps=40)
    assert kept.states == []


def test_a_gradient_that_is_not_finite_stops_the_run_though_no_loss_says_so_and_the_mask_hides_it():
    """The contrast's alone, at a root of zero."""
    token = torch.nn.Parameter(torch.zeros(1, 1, 8))

    def errors(_triple, copies, _generator):
        own = copies["l"].flatten(1)
        return torch.stack([own[0].sum(), (2 * own[1]).sum(), own[2].sqrt().sum()])

    objective = method.TripleObjective(errors, {"l": token}, 3, 0.6, "intersection")
    value = objective(0, torch.Generator().manual_seed(0))
    assert not torch.isfinite(value.detach())


def test_surroundings_that_cannot_be_learnt_say_what_to_change():
    given = exemplars(contrasts=False)
    given.latents[0][..., 0, 0] = float("inf")
    with pytest.raises(loop.TrainingDiverged, match="surroundings .* connect contrast_images"):
        train(given=given)


def test_contrasts_of_a_checkpoint_lie_where_the_pictures_do():
    run = config()
    encoder = TextEncoder(CLIP)
    with session(running.apply(MODEL, 1.0), (3, 4, 8, 8), run, beside=[encoder.patcher]) as denoiser:
        learner = training._Learner(denoiser, encoder, exemplars(contrasts=False), action(), run)
        kept = {f"contrast.{i}": latent.double() for i, latent in enumerate(latents())}
        found = learner.contrasts(loop.State(3, [0.0] * 3, kept))
    assert all(latent.dtype == torch.float32 for latent in found)


def test_an_action_s_prompt_is_refused_by_a_training_that_reads_plain_ones():
    sealed = action_identifiers.prompt(CLIP, [action_identifiers.identifier(MODEL)])
    with session(MODEL, (1, 4, 8, 8), config()) as denoiser:
        conditions = denoiser.prepare(sealed, latents(1)[0])
        with pytest.raises(ValueError, match="use CLIP Text Encode for a plain prompt"):
            denoiser.denoise(latents(1)[0], denoiser.sigmas[:1], [conditions])


# The whole way


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.1", "SDXL", "flow", "Wan"])
def test_every_kind_of_model_learns(kind):
    shape = (1, 16, 1, 4, 4) if kind == "Wan" else (1, 4, 8, 8)
    model = {
        "SDXL": tiny_model.xl, "flow": lambda: tiny_model.picture(flow=True), "Wan": tiny_model.wan,
    }.get(kind, tiny_model.picture)()
    model = tiny_model.as_loaded(action_identifiers.reading(model) if kind != "Wan" else model)
    encoders = kind if kind in tiny_clip.WIDTHS else "SD 1.5"
    clip = tiny_clip.as_loaded(tiny_clip.clip(encoders))
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    found, loss_map = train(model, clip, exemplars(shape=shape), steps=2)
    places = action_identifiers.places(model)
    first = encoding.word_vectors(clip, "dancing")
    assert found.places == places and len(loss_map["loss"]) == 2
    for name, width in tiny_clip.WIDTHS[encoders].items():
        tokens = found.tokens[name]
        assert tokens.shape == (len(places), len(first[name]), width) and tokens.dtype == torch.float32
        assert (tokens != first[name]).flatten(1).any(1).all(), "a layer learnt nothing"
    assert same(before, dict(model.model.named_parameters()))
    sealed = action_identifiers.prompt(clip, [found])
    assert torch.isfinite(sealed[0][1]["model_conds"][running.KEY].contexts).all()


def test_it_learns_with_and_without_triples():
    for settings in (action(), action(triples=False), action(triples=False, layer_wise=False)):
        found, loss_map = train(settings=settings, steps=30, learning_rate=0.1)
        first, last = (torch.tensor(loss_map["loss"][part]).mean() for part in (slice(0, 10), slice(20, 30)))
        assert last < first
        assert len(found.tokens["l"]) == (4 if settings.layer_wise else 1)
        assert bool(found.places) == settings.layer_wise


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (2, 2), (9, len(SUBJECTS))])
def test_without_triples_a_step_is_one_pass_of_a_batch(asked, taken, monkeypatch):
    sizes, original = [], training.DenoisingObjective.loss_at

    def loss_at(self, clean, conditions, noise, level):
        assert len(set(level.tolist())) == len(level), "each picture has its own noise level"
        sizes.append(len(clean))
        return original(self, clean, conditions, noise, level)

    monkeypatch.setattr(training.DenoisingObjective, "loss_at", loss_at)
    train(settings=action(triples=False), steps=2, batch_size=asked)
    assert sizes == [taken] * 2


def test_noise_levels_are_weighed_if_asked():
    plain, weighed = (train(steps=3, min_snr_gamma=gamma) for gamma in (0.0, 0.1))
    assert not same(plain[0].tokens, weighed[0].tokens)
    assert all(loss < before for before, loss in zip(plain[1]["loss"], weighed[1]["loss"], strict=True))


def test_gradient_checkpointing_learns_the_same():
    plain, recomputed = (train(gradient_checkpointing=on)[0].tokens["l"] for on in (False, True))
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_the_same_seed_learns_the_same_and_another_does_not():
    one, other, third = (train(given=exemplars(contrasts=False), seed=seed)[0].tokens for seed in (1, 1, 2))
    assert same(one, other) and not same(one, third)


def test_contexts_are_learnt_and_contrasts_drawn_with_another_action():
    run = config()
    encoder = TextEncoder(CLIP)
    with session(running.apply(MODEL, 1.0), (3, 4, 8, 8), run, beside=[encoder.patcher]) as denoiser:
        learner = training._Learner(denoiser, encoder, exemplars(contrasts=False), action(), run)
        contexts = learner._learn_contexts()
        drawn = learner.contrasts(None)
    means = [encoding.word_vectors(CLIP, text)["l"].mean(0) for text in (
        "a cat on a beach dancing", "a (red:1.2) robot dancing", "a dog dancing at night"
    )]
    for context, mean in zip(contexts, means, strict=True):
        moved = (context["l"][0, 0] - mean).abs()
        # Two steps of Adam of 5e-3 each, the decay beside them.
        assert 1e-3 < moved.max() < 1.2e-2
    assert [latent.shape for latent in drawn] == [(1, 4, 8, 8)] * 3
    assert all(torch.isfinite(latent).all() for latent in drawn) and not torch.equal(drawn[0], drawn[1])


def test_the_log_says_which_phase_it_is(caplog):
    with caplog.at_level(logging.INFO):
        train(given=exemplars(contrasts=False))
    ours = [record.getMessage() for record in caplog.records if "[Understudy]" in record.getMessage()]
    phases = [line.removeprefix("[Understudy] ").split(" step")[0] for line in ours]
    drawn = [f"drawing contrast {i} of 3" for i in (1, 2, 3)]
    # Two steps a context, three of the action.
    assert phases == 6 * ["contexts: optimiser"] + drawn + 3 * ["action: optimiser"]


def test_a_resumed_run_equals_the_whole_one_and_draws_no_contrast_again(monkeypatch):
    given = exemplars(contrasts=False)
    whole, losses = train(given=given, steps=5)
    kept = Kept()
    train(given=given, steps=4, checkpoints=kept, checkpoint_every=3)
    assert {f"contrast.{i}" for i in range(3)} <= kept.states[0].tensors.keys()
    monkeypatch.setattr(training._Learner, "_learn_contexts", lambda self: pytest.fail("drawn again"))
    resumed, again = train(given=given, steps=5, checkpoints=Kept(kept.states[0]))
    assert same(resumed.tokens, whole.tokens) and losses == again


@pytest.mark.parametrize("stop", range(1, 40, 6))
def test_a_cancelled_run_leaves_the_host_as_it_was_in_every_phase(stop, monkeypatch):
    """The button is pressed at the host's nth look at it: in contexts, contrasts or tokens."""
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        if looks == stop:
            raise comfy.model_management.InterruptProcessingException

    before = list(CLIP.cond_stage_model.parameters())
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", look)
    kept = Kept()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(given=exemplars(contrasts=False), steps=60, checkpoints=kept)
    assert comfy.model_management.in_training is False and looks == stop
    assert all(a is b for a, b in zip(before, CLIP.cond_stage_model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in CLIP.cond_stage_model.modules())
    assert len(kept.states) <= 1


def test_previews_read_the_tokens_and_change_nothing():
    seen = []

    def preview(denoiser, clip, actions):
        positive = running.seal(*encoding.encode(clip, "a <action> cat", actions), actions)
        seen.append(training.picture_training.draw(
            denoiser, positive, clip.encode_from_tokens_scheduled(clip.tokenize("")), (1, 4, 8, 8), 0, 2
        ))

    watched, _ = train(steps=4, preview=preview, preview_every=2, learning_rate=5e-2)
    alone, _ = train(steps=4, learning_rate=5e-2)
    assert same(watched.tokens, alone.tokens)
    assert len(seen) == 2 and not torch.equal(*seen)


def test_the_base_is_the_fingerprint_that_apply_compares():
    found, _ = train(steps=1)
    assert found.base == running.apply(MODEL, 1.0).get_attachment(running.KEY).base
    assert (found.placeholder, found.initial_word) == ("<action>", "dancing")
