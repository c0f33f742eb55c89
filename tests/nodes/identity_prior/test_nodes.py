"""The nodes of an edit: prompts that say where the subject is, and the path that they hand on."""

import pytest
import torch
from pack.nodes import subject_tokens
from pack.nodes.identity_prior.nodes import (
    UnderstudyEncodeIdentity,
    UnderstudyIdentityMaskBlend,
    UnderstudyInvertImage,
)
from pack.nodes.puppets import tokenizer
from support.identity_edits import EDIT, MODEL, SHAPE, grid, latent, prompt, sample
from support.identity_trainings import ROBOT


def test_a_prompt_remembers_the_subject_s_tokens(loaded):
    clip = loaded[1]
    text = "a red {subject} waving on a beach"
    conditioning = UnderstudyEncodeIdentity.execute(clip, ROBOT, text).result[0]
    plain = clip.encode_from_tokens_scheduled(clip.tokenize("a red sks robot waving on a beach"))
    assert torch.equal(conditioning[0][0], plain[0][0])
    positions = subject_tokens.tagged_positions(conditioning)
    ids = [token for token, _ in clip.tokenize("a red sks robot waving on a beach")["l"][0]]
    assert [tokenizer.WORDS[ids[i]] for i in positions] == ["sks", "robot"]
    with pytest.raises(ValueError, match="does not name the subject"):
        UnderstudyEncodeIdentity.execute(clip, ROBOT, "a robot waving")


def test_the_nodes_hand_on_what_belongs_together(caplog):
    sigmas = grid(MODEL, 4)
    with torch.inference_mode():
        with caplog.at_level("INFO"):
            output = UnderstudyInvertImage.execute(MODEL, prompt(), latent(), sigmas, "ddim", 1, 0.5, smoothing=0.0)
        inversion, noise, mask = output.result
        patched = UnderstudyIdentityMaskBlend.execute(MODEL, inversion, EDIT, 0.3, 1, 0.0, 1.0).result[0]
    assert mask.shape == (1, 64, 64) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert noise.generate_noise(latent()).shape == SHAPE
    assert torch.isfinite(sample(patched, inversion=inversion)).all()
    assert inversion.method == "ddim"
    (summary,) = output.ui["text"]
    assert summary == "inverted over 4 steps by ddim; the path takes 0.0 MB on cpu"
    assert f"[Understudy] Invert Image: {summary}" in caplog.messages
