"""What the files and classes of models say of them."""

import comfy.sd
import pytest
import safetensors.torch
from pack.nodes.inputs.families import sign_of_few_steps
from pack.nodes.training import doctor
from support import family_models, family_relatives, tiny_model


@pytest.mark.parametrize(("name", "distilled"), [
    ("z_image_turbo_bf16.safetensors", True), ("dreamshaperXL_v2TurboDpmppSDE.safetensors", True),
    ("sdxl_lightning_4step.safetensors", True), ("Hyper-SD15-8steps.safetensors", True), ("sd15_lcm.ckpt", True),
    ("hidream_i1_fast_fp8.safetensors", True), ("flux-2-klein-4b-fp8.safetensors", True),
    ("ltx-2-19b-distilled-fp8.safetensors", True), ("qwen_image_distill_full_bf16.safetensors", True),
    ("FLUX1-Schnell-fp8.safetensors", True), ("sdxl-dmd2.safetensors", True), ("wan_8-steps.safetensors", True),
    ("flux-2-klein-base-4b.safetensors", False), ("sd_xl_base_1.0.safetensors", False),
    ("hidream_i1_full_fp8.safetensors", False), ("breakfast_photos.safetensors", False),
    ("hyperrealistic_v3.safetensors", False), ("mine_12000steps.safetensors", False), ("flux1-dev.sft", False),
    ("footsteps.safetensors", False), ("sd3.5_large.safetensors", False), ("lcmodel.safetensors", False),
])
def test_a_file_for_few_steps_is_known_by_its_name(name, distilled):
    model = tiny_model.picture()
    model.cached_patcher_init = (print, (f"/models/turbo lightning/{name}",))  # a folder says nothing
    assert bool(sign_of_few_steps(model)) == distilled


def test_comfyui_s_loader_tells_the_file_and_training_is_warned(tmp_path):
    weights = tiny_model.wan(dim=128, num_heads=1, freq_dim=256).model.diffusion_model.state_dict()
    file = tmp_path / "wan2.1_turbo.safetensors"
    config = '{"transformer": {"text_dim": %d}}' % tiny_model.CONTEXT
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, file, {"config": config})
    model = comfy.sd.load_diffusion_model(str(file))
    for patcher in (model, model.clone()):
        (line,) = doctor.lines(doctor.examine([], [], model=patcher))
        assert "model is distilled, since its file is called wan2.1_turbo.safetensors" in line
        assert "train on the base model" in line
    assert not doctor.lines(doctor.examine([], [], model=tiny_model.video()))


def test_families_for_few_steps_are_known_without_a_file():
    named = {family.name: family for family in family_relatives.EVERY}
    for name in ("Flux.1 schnell", "Hunyuan Video 1.5 SR"):
        assert sign_of_few_steps(family_models.build(named[name])) == f"{name} needs few steps"
    plain = family_models.build(named["Flux.1"])
    assert sign_of_few_steps(plain) == ""
    plain.model.model_config.unet_config["meanflow"] = True
    assert "how far a step goes" in sign_of_few_steps(plain)
