"""Gradients of an action's tokens: through ComfyUI's text encoders, and the three of a triple."""

import comfy.clip_model
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import pytest
import torch
from pack.nodes.action_identifier import encoding, sampling, training
from pack.nodes.puppets import theatre
from pack.nodes.training import loop
from pack.nodes.training.session import session
from support import action_identifiers, tiny_clip
from support.action_trainings import CLIP, MODEL, SUBJECTS, MemoryCheckpoints, action, config, exemplars, train

# Through ComfyUI's text encoders


def out_of_place(clip, tokens):
    """ComfyUI's CLIP from its own parts, without its additions in place."""
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
    other_clip = tiny_clip.clip()
    vectors = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(2))
    gradients = []
    for clip, encode in (
        (CLIP, None), (other_clip, lambda tokens: out_of_place(other_clip, tokens)),
    ):
        encoder = training.TextEncoder(clip)
        tokens = vectors.clone().requires_grad_()
        with session(MODEL, (1, 4, 8, 8), config(), other_models=[encoder.patcher]):
            prompt = encoding.Prompt(clip.tokenize, "a <a> cat", {"<a>": {"l": tokens}})
            filled = [prompt.at_layer({"<a>": {"l": tokens}}, layer) for layer in range(2)]
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
    encoder = training.TextEncoder(clip)
    weight = torch.randn(1, theatre.tokenizer.MAX_TOKENS, 16, generator=generator)
    direction = torch.randn(1, 16, generator=generator)
    vector = torch.randn(1, 16, generator=generator)

    def value(moved):
        tokens = {"<a>": {"l": moved[None]}}
        prompt = encoding.Prompt(clip.tokenize, "a <a> cat", tokens)
        return (encoder.encode(prompt.at_layer(tokens, 0))[0] * weight).sum()

    with session(MODEL, (1, 4, 8, 8), config(), other_models=[encoder.patcher]):
        token = vector.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(token), token)
        with torch.no_grad():
            slope = (value(vector + 1e-2 * direction) - value(vector - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2)
    assert abs(float(slope)) > 1e-2


# Triples


def trainer_of(denoiser, encoder, run):
    return training._ActionTrainer(denoiser, encoder, exemplars(), action(), run)


@pytest.mark.parametrize("merge", ["union", "intersection"])
def test_three_gradients_of_one_pass_are_those_of_three_passes(merge):
    """And the step's gradient is the mean of the anchor's and the other exemplar's, where numpy's comparison of the
    three lets it act.
    """
    run = config()
    encoder = training.TextEncoder(CLIP)
    patched = sampling.apply(MODEL, 1.0)
    places = action_identifiers.places(MODEL)
    with session(patched, (3, 4, 8, 8), run, other_models=[encoder.patcher]) as denoiser:
        trainer = trainer_of(denoiser, encoder, run)
        trainer.action = action(merge=merge)
        contrasts = trainer.contrasts(None)
        tokens = trainer.initial_tokens(len(places))
        objective, masks = trainer.objective(tokens, contrasts)
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
        actual, errors = [], []
        for exemplar_id, picture in (
            (anchor, trainer.latents[anchor]), (other, trainer.latents[other]), (anchor, contrasts[anchor])
        ):
            generator.set_state(state)
            subject = SUBJECTS[exemplar_id]
            text = subject if "<action>" in subject else f"{subject} <action>"
            prompt = encoding.Prompt(CLIP.tokenize, text, {"<action>": tokens})
            copy = {"l": tokens["l"].detach().clone().requires_grad_()}
            contexts = trainer.contexts(prompt, "<action>", copy)
            error = trainer.errors([picture], [exemplar_id], [contexts], generator)
            errors.append(float(error.detach()))
            actual.append(torch.autograd.grad(error.sum(), copy["l"])[0])
    assert sum(errors[:2]) / 2 == pytest.approx(float(loss.detach()), rel=1e-5)
    g, same_action, same_context = actual
    low = (g - same_action).abs()
    high = (g - same_context).abs()
    free = low <= low.sort(-1).values[..., 9:10]  # 0.6 of 16 channels: the tenth value
    of_it = high > high.sort(-1).values[..., 9:10]
    expected = free | of_it if merge == "union" else free & of_it
    assert torch.equal(masks()["l"], expected)
    assert expected.any() and not expected.all()
    torch.testing.assert_close(tokens["l"].grad, (g + same_action) / 2 * expected, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(g, same_action, rtol=0.1, atol=1e-6)
    assert not torch.allclose(g, same_context, rtol=0.1, atol=1e-6)


def test_a_step_leaves_masked_channels_and_their_moments_bit_identical():
    saved = MemoryCheckpoints()
    train(checkpoints=saved, steps=4, checkpoint_every=1)
    for before, after in zip(saved.states, saved.states[1:], strict=False):
        held, mean, square = (
            before.tensors[f"{key}.l"] == after.tensors[f"{key}.l"] for key in ("parameter", "exp_avg", "exp_avg_sq")
        )
        assert held.any() and not held.all()
        assert torch.equal(held, mean) and torch.equal(held, square)


def test_what_is_not_finite_anywhere_in_a_triple_stops_the_run():
    pictures = exemplars()
    pictures.contrasts[1][..., 0, 0] = float("nan")
    saved = MemoryCheckpoints()
    with pytest.raises(loop.TrainingDiverged, match="at step"):
        train(pictures=pictures, checkpoints=saved, steps=40)
    assert saved.states == []
