"""A fusion in real sampling runs of ComfyUI, beside forward hooks that do the same by hand."""

import contextlib

import comfy.model_base
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from pack.nodes.fusion_embedding import method, sampling
from pack.nodes.fusion_embedding.config import ApplyConfig
from pack.nodes.fusion_embedding.method import WHOLE, FusionError
from support import fusions, real_configurations, tiny_model
from support.fusion_runs import MODEL, NOISE, applied, denoised


@contextlib.contextmanager
def by_hand(model, weights, fused, pose):
    """The plain model with the embedding and the pose added by hooks on its layers; None leaves one out."""
    network = model.model.diffusion_model
    handles = []
    try:
        if fused is not None:
            added = method.class_embedding(weights, fused)
            handles.append(network.time_embed.register_forward_hook(lambda _m, _i, out: out + added))
        if pose is not None:
            residual = method.pose_residual(weights, pose.movedim(-1, 1))
            handles.append(network.input_blocks[0][0].register_forward_hook(lambda _m, _i, out: out + residual))
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference(model, weights, states, fused, pose, noise=NOISE):
    """What the published network estimates; None for what is left out."""
    tokens = method.appearance_tokens(weights, fusions.states() if states is None else states)
    tokens = torch.zeros_like(tokens) if states is None else tokens
    with by_hand(model, weights, torch.zeros(1, fusions.WIDTH) if fused is None else fused, pose):
        return denoised(model, [[tokens, {}]], noise=noise)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_cfg_is_the_published_guidance_row_by_row():
    """Both rows in one call of the model, and each has its own tokens, embedding and pose."""
    fusion = fusions.fusion(MODEL, unet=None, unet_kind="")
    patched, positive, negative = applied(fusion=fusion)
    calls = []
    handle = MODEL.model.diffusion_model.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    actual = denoised(patched, positive, negative, cfg=2.5)
    handle.remove()
    assert calls == [2]
    full = reference(MODEL, fusion.generator, fusions.states(), fusions.fused(), fusions.poses())
    none = reference(MODEL, fusion.generator, None, None, None)
    assert (full - none).abs().max() > 0.05
    close(actual, none + 2.5 * (full - none))
    close(denoised(patched, positive), full)
    close(denoised(patched, negative), none)


def test_three_branches_are_two():
    """ComfyUI's own three-branch guider at equal weights, with the source alone between, and the two of CFG."""
    fusion = fusions.fusion(MODEL, unet=None, unet_kind="")
    patched, positive, negative = applied(fusion=fusion)
    source = [[positive[0][0], negative[0][1]]]  # appearance, without embedding and pose
    middle = denoised(patched, source)
    w, (u, g) = 2.0, (denoised(patched, part) for part in (negative, positive))
    assert (middle - u).abs().max() > 0.01
    two = denoised(patched, positive, negative, cfg=w)
    close(u + w * (middle - u) + w * (g - middle), two)
    guider = Guider_DualCFG(patched)
    guider.set_conds(positive, source, negative)
    guider.set_cfg(w, w)
    close(denoised(patched, guider=guider), two)


def first_features(model, conditioning):
    """What the second block of the UNet reads: the first convolution, and what was added to it."""
    seen = []
    first = MODEL.model.diffusion_model.input_blocks[1][0]
    handle = first.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    try:
        denoised(model, conditioning)
    finally:
        handle.remove()
    return seen[-1]


def test_a_zeroed_pose_leaves_the_first_convolution_unchanged():
    patched, positive, negative = applied()
    plain = first_features(MODEL, tiny_model.conditioning(1))
    assert torch.equal(first_features(patched, negative), plain)
    assert torch.equal(first_features(patched, tiny_model.conditioning(1)), plain)
    residual = positive[0][1]["model_conds"][sampling.POSE].cond
    close(first_features(patched, positive), plain + residual)
    assert residual.abs().max() > 0.1


def test_the_negative_carries_zero_tokens_the_embedding_of_nothing_and_no_pose():
    fusion = fusions.fusion(MODEL)
    _, positive, negative = applied(fusion=fusion)
    (tokens, entry), = negative
    assert tokens.shape == positive[0][0].shape and not tokens.any()
    assert not entry["model_conds"][sampling.POSE].cond.any()
    expected = method.class_embedding(fusion.generator, torch.zeros(1, fusions.WIDTH))
    close(entry["model_conds"][sampling.EMBEDDING].cond, expected)


def test_the_callers_model_is_not_changed_and_applying_twice_adds_once():
    before = tiny_model.sample(MODEL, comfy.samplers.sampler_object("euler"))
    weights = {key: value.clone() for key, value in MODEL.model.state_dict().items()}
    options = repr(MODEL.model_options)
    once, positive, negative = applied(fusion=fusions.fusion(MODEL))
    for fusion in (fusions.fusion(MODEL), fusions.fusion(MODEL, unet=whole(), unet_kind=WHOLE)):
        patched, *_ = applied(once, fusion)
        denoised(patched, positive, negative, cfg=2.0)
    twice = sampling.with_fusion_patches(sampling.with_fusion_patches(MODEL))
    close(denoised(twice, positive), denoised(sampling.with_fusion_patches(MODEL), positive), 1e-7)
    assert all(torch.equal(value, weights[key]) for key, value in MODEL.model.state_dict().items())
    assert repr(MODEL.model_options) == options and not MODEL.patches and not MODEL.wrappers.get("apply_model")
    assert torch.equal(tiny_model.sample(MODEL, comfy.samplers.sampler_object("euler")), before)


def test_strength_is_off_at_nothing_and_goes_evenly():
    fusion = fusions.fusion(MODEL)
    model, positive, negative = applied(fusion=fusion, strength=0.0)
    assert model is MODEL and not positive[0][1]["model_conds"][sampling.POSE].cond.any()
    plain = denoised(MODEL, [[positive[0][0], {}]])
    assert torch.equal(denoised(model, positive), plain)
    assert torch.equal(denoised(sampling.with_fusion_patches(MODEL), positive), plain)
    half, full = (applied(fusion=fusion, strength=s)[1][0][1]["model_conds"] for s in (0.5, 1.0))
    for key in (sampling.POSE, sampling.EMBEDDING):
        close(2 * half[key].cond, full[key].cond)


def whole(seed=5):
    return {
        f"diffusion_model.{name}": 0.05 * torch.randn(value.shape, generator=fusions.generator(seed + i))
        for i, (name, value) in enumerate(MODEL.model.diffusion_model.state_dict().items())
    }


def diffusers_names(weights):
    """Whole weights under diffusers' names, projections as matrices."""
    import comfy.utils

    theirs = comfy.utils.unet_to_diffusers(MODEL.model.model_config.unet_config)
    names = {f"diffusion_model.{ours}": name for name, ours in theirs.items()}
    return {
        names[key]: value.reshape(value.shape[:2]) if value.ndim == 4 and "proj_" in key else value
        for key, value in weights.items()
    }


@pytest.mark.parametrize("rename", [lambda w: w, diffusers_names])
def test_a_whole_unet_stands_in_and_part_of_the_way_between(rename):
    other = fusions.model()
    other.model.diffusion_model.load_state_dict({k.removeprefix("diffusion_model."): v for k, v in whole().items()})
    for strength in (1.0, 0.25):
        fusion = fusions.fusion(MODEL, unet=rename(whole()), unet_kind=WHOLE)
        patched, positive, _ = applied(fusion=fusion, strength=strength)
        if strength != 1:
            mixed = {
                k: strength * v + (1 - strength) * MODEL.model.state_dict()[k] for k, v in whole().items()
            }
            other.model.load_state_dict(mixed, strict=False)
        expected = denoised(sampling.with_fusion_patches(other), positive)
        close(denoised(patched, positive), expected)
        assert (expected - denoised(sampling.with_fusion_patches(MODEL), positive)).abs().max() > 0.01


def test_a_lora_counts_after_a_whole_unet_only():
    import comfy.sd

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, fusions.lora(), 1.0, 0)[0]

    fusion = fusions.fusion(MODEL, unet=whole(), unet_kind=WHOLE)
    patched, positive, _ = applied(fusion=fusion)
    plain = denoised(patched, positive)
    assert torch.equal(denoised(applied(with_lora(MODEL), fusion)[0], positive), plain)
    assert not torch.equal(denoised(with_lora(patched), positive), plain)


def test_a_lora_is_as_load_lora_gives_it():
    import comfy.sd

    patched, positive, _ = applied(fusion=fusions.fusion(MODEL), strength=0.5)
    native, _ = comfy.sd.load_lora_for_models(sampling.with_fusion_patches(MODEL), None, fusions.lora(), 0.5, 0)
    actual = denoised(patched, positive)
    assert torch.equal(actual, denoised(native, positive))
    assert not torch.equal(actual, denoised(sampling.with_fusion_patches(MODEL), positive))


def test_a_batch_of_poses_makes_the_pictures_that_each_makes_alone():
    """One source in three poses, with equal noise: a sequence."""
    pose, noise = fusions.poses(3), NOISE.expand(3, -1, -1, -1).clone()
    patched, positive, negative = applied(pose=pose)
    together = denoised(patched, positive, negative, noise=noise, cfg=2.0)
    for i in range(3):
        alone = denoised(*applied(pose=pose[i : i + 1]), cfg=2.0)
        close(together[i : i + 1], alone)
    assert (together[0] - together[1]).abs().max() > 1e-3
    sources = applied(states=fusions.states(3), fused=fusions.fused(3))[1][0]
    assert sources[0].shape[0] == sources[1]["model_conds"][sampling.EMBEDDING].cond.shape[0] == 3


def test_an_area_takes_its_part_of_the_pose():
    patched, positive, _ = applied(pose=fusions.poses(seed=3))
    (tokens, entry), = positive
    area = [[tokens, {**entry, "area": (4, 8, 4, 0), "strength": 1.0}]]  # height, width, y, x in latent places
    full = first_features(patched, positive)
    actual = first_features(patched, area)
    assert actual.shape[-2:] == (4, 8)
    close(actual[..., 1:, :], full[..., 5:, :])  # beside the border of the convolution


@pytest.mark.parametrize("side", [48, 96])
def test_an_area_does_not_hide_a_pose_of_another_size(side):
    patched, positive, _ = applied(pose=fusions.poses(1, side, side))
    (tokens, entry), = positive
    with pytest.raises(FusionError, match="scale the pose to 64 x 64 pixels"):
        denoised(patched, [[tokens, {**entry, "area": (4, 8, 4, 0), "strength": 1.0}]])


def test_nothing_of_many_pictures_takes_the_memory_of_one():
    _, positive, negative = applied(pose=fusions.poses(3), states=fusions.states(3), fused=fusions.fused(3))
    for tensor, filled in (
        (negative[0][0], positive[0][0]),
        *((conditioning[0][1]["model_conds"][sampling.POSE].cond for conditioning in (negative, positive)),),
    ):
        assert tensor.shape == filled.shape
        assert tensor.untyped_storage().nbytes() * 3 == filled.untyped_storage().nbytes()


@pytest.mark.parametrize(("arguments", "words"), [
    ({"pose": fusions.poses(2), "states": fusions.states(3)}, "numbers of pictures differ"),
    ({"pose": fusions.poses(2), "fused": fusions.fused(3)}, "fusion_embed 3"),
    ({"states": fusions.states(hidden=7)}, "tokens of 7 numbers and this fusion takes 16"),
    ({"fused": fusions.fused(width=5)}, "fusion_embed has 5 numbers and this fusion takes 12"),
    ({"pose": torch.zeros(1, 64, 64, 3)}, "shows no person"),
])
def test_what_does_not_fit_is_refused_before_sampling(arguments, words):
    with pytest.raises(FusionError, match=words):
        applied(**arguments)


def test_a_pose_of_another_size_and_a_batch_of_another_length_name_the_fix():
    patched, positive, negative = applied(pose=fusions.poses(1, 64, 96))
    with pytest.raises(FusionError, match="scale the pose to 64 x 64 pixels"):
        denoised(patched, positive, negative, cfg=2.0)
    patched, positive, negative = applied(pose=fusions.poses(2))
    with pytest.raises(FusionError, match="for 2 pictures and the latent has 1"):
        denoised(patched, positive, negative, cfg=2.0)


def test_a_pose_may_have_alpha():
    rgb = fusions.poses()
    alpha = torch.cat([rgb, torch.ones(1, 64, 64, 1)], dim=-1)
    actual = [applied(pose=pose)[1][0][1]["model_conds"][sampling.POSE].cond for pose in (rgb, alpha)]
    assert torch.equal(*actual)


def layer(name, *shape):
    return {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}


WRONG = {
    "context": (lambda w: w | layer("appearance.second", 20, 9), "gives 20 channels and the model takes 16"),
    "time": (lambda w: w | layer("embedding.second", 60, 12), "embedding.second.weight gives 60"),
    "channels": (lambda w: w | layer("pose.conv_out", 30, 10, 3, 3), "pose.conv_out.weight gives 30"),
    "reduction": (lambda w: {k: v for k, v in w.items() if "blocks.4" not in k and "blocks.5" not in k}
                  | layer("pose.conv_out", 64, 8, 3, 3), "one cell of 4 pixels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_fusion_of_another_model_is_refused_by_key(case):
    change, words = WRONG[case]
    with pytest.raises(FusionError, match=words):
        applied(fusion=fusions.fusion(MODEL, generator=change(fusions.weights(MODEL))))


@pytest.mark.parametrize(("unet", "kind", "words"), [
    ({k.replace("down_blocks_0", "down_blocks_7"): v for k, v in fusions.lora().items()}, "lora", "no such"),
    ({k: torch.zeros(2, 31) if "down.w" in k else v for k, v in fusions.lora().items()}, "lora", "lora_down.*31"),
    ({k: torch.zeros(3) if "down.w" in k else v for k, v in fusions.lora().items()}, "lora", r"lora_down.*\(3,\)"),
    (whole() | {"diffusion_model.out.2.weight": torch.zeros(4, 9, 3, 3)}, WHOLE, r"out.2.weight.*\(4, 9, 3, 3\)"),
    (whole() | {"diffusion_model.label_emb.0.0.weight": torch.zeros(4, 9)}, WHOLE, "label_emb.*no such weight"),
])
def test_a_unet_of_another_model_is_refused_by_key(unet, kind, words):
    options = repr(MODEL.model_options)
    with pytest.raises(FusionError, match=words):
        applied(fusion=fusions.fusion(MODEL, unet=unet, unet_kind=kind))
    assert not MODEL.patches and repr(MODEL.model_options) == options


def test_missing_parts_name_the_node_that_makes_them():
    with pytest.raises(FusionError, match="Train Fusion Generator"):
        applied(fusion=method.Fusion(fusions.combiner()))
    with pytest.raises(FusionError, match="Combine Fusion"), torch.inference_mode():
        sampling.apply(MODEL, fusions.fusion(MODEL), fusions.states(), None, fusions.poses(), ApplyConfig())
    with pytest.raises(FusionError, match="a WanModel, and a fusion needs a UNet"):
        sampling.with_fusion_patches(tiny_model.video())


def test_stage_2_alone_works_without_an_embedding():
    fusion = fusions.fusion(MODEL, combiner=None, generator=fusions.weights(MODEL, embedding=None), unet=None,
                            unet_kind="")
    with torch.inference_mode():
        patched, positive, negative = sampling.apply(
            MODEL, fusion, fusions.states(), None, fusions.poses(), ApplyConfig()
        )
    tokens = method.appearance_tokens(fusion.generator, fusions.states())
    with by_hand(MODEL, fusion.generator, None, fusions.poses()):
        full = denoised(MODEL, [[tokens, {}]])
    close(denoised(patched, positive), full)
    close(denoised(patched, negative), denoised(MODEL, [[torch.zeros_like(tokens), {}]]))


def test_sdxl_keeps_its_own_class_embedding():
    model = fusions.lively(tiny_model.xl())
    fusion = fusions.fusion(model, unet=None, unet_kind="")
    patched, positive, negative = applied(model, fusion)
    assert positive[0][1]["pooled_output"].shape == (1, 24) and not positive[0][1]["pooled_output"].any()
    actual = denoised(patched, positive, negative, cfg=2.0)
    parts = []
    for fused, pose, tokens in (
        (torch.zeros(1, fusions.WIDTH), None, torch.zeros_like(positive[0][0])),
        (fusions.fused(), fusions.poses(), positive[0][0]),
    ):
        with by_hand(model, fusion.generator, fused, pose):
            parts.append(denoised(model, [[tokens, {"pooled_output": torch.zeros(1, 24)}]]))
    close(actual, parts[0] + 2.0 * (parts[1] - parts[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = fusions.model(dtype=dtype, compute=torch.float32)
    patched, positive, negative = applied(model, fusions.fusion(model))
    assert torch.isfinite(denoised(patched, positive, negative, cfg=2.0)).all()
    model = fusions.model(dtype=torch.bfloat16)
    patched, positive, negative = applied(model, fusions.fusion(model, unet=None, unet_kind=""))
    actual = denoised(patched, positive, negative, cfg=2.0)
    patched, positive, negative = applied()
    expected = denoised(patched, positive, negative, cfg=2.0)
    assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("name", "context"), [("SD 1.5", 768), ("SD 2.1", 1024), ("SDXL", 2048)])
def test_widths_of_the_real_models(name, context):
    class Model:
        model = real_configurations.build(name)

        def get_model_object(self, _name):
            return self.model.diffusion_model

    sizes = sampling.model_sizes(Model(), 1024, 768)
    assert (sizes.context, sizes.time, sizes.channels) == (context, 1280, 320)
    pooled = sampling._pooled(Model())
    assert (pooled["pooled_output"].shape[1] if pooled else None) == (1280 if name == "SDXL" else None)
