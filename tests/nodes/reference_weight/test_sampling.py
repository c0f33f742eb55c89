"""Reference Weight in the models that take reference pictures, against one softmax with weights, written out."""

import comfy.ops
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_flux import FluxKVCache
from pack.nodes.reference_weight.nodes import UnderstudyReferenceWeight
from support import families, family_models, tiny_model

SHOWN = {family.name: family for family in families.FAMILIES if family.references}
EVERY = pytest.mark.parametrize("name", SHOWN)
FLUX, FLUX_2 = SHOWN["Flux.1"], SHOWN["Flux.2"]
EULER = comfy.samplers.sampler_object("euler")
TEXT = {"Flux.2": 512}  # ComfyUI pads its prompts
_MODELS = {}


def model(name):
    if name not in _MODELS:
        _MODELS[name] = family_models.build(SHOWN[name])
    return _MODELS[name]


def pictures(family, count=2, seed=21):
    return [torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


def prompt(family, count=2, seed=1, first=21, tokens=families.TOKENS):
    shown = {"reference_latents": pictures(family, count, first)} if count else {}
    return family_models.conditioning(family, seed, tokens, **shown)


def weighed(patcher, reference=0, strength=1.0, mask=None, start=0.0, end=1.0, blocks="all"):
    return UnderstudyReferenceWeight.execute(patcher, reference, strength, start, end, blocks, mask).result[0]


def sample(patcher, family, positive=None, negative=None, cfg=1.0, batch=1, sigmas=(0.7, 0.0), dtype=torch.float32):
    """A run from noise; of one step it is the model's estimate."""
    guider = comfy.samplers.CFGGuider(patcher)
    positive = prompt(family) if positive is None else positive
    guider.set_conds(positive, positive if negative is None else negative)
    guider.set_cfg(cfg)
    noise = torch.randn(batch, *family.latent, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros_like(noise), EULER, torch.tensor(sigmas), disable_pbar=True, seed=3
        ).to(dtype)


def rows_of(family, count=2, text=None):
    """Rows of text, picture and each reference, counted by hand: all pictures have the latent's size."""
    network = model(family.name).model.diffusion_model
    patch = getattr(network, "patch_size", 2)
    tokens = family.latent[-2] // patch * (family.latent[-1] // patch)
    return TEXT.get(family.name, families.TOKENS) if text is None else text, tokens, count * [tokens]


def defined(patcher, weights):
    """`patcher` with every joint attention as defined: weights [N, M] multiply what softmax adds up."""
    patched = patcher.clone()

    def attention(function, q, k, v, heads, *args, **kwargs):
        if len(weights) != q.shape[2]:
            return function(q, k, v, heads, *args, **kwargs)
        out = torch.zeros(q.shape, dtype=torch.float64)
        for n in range(q.shape[2]):
            score = torch.einsum("bhd,bhmd->bhm", q[:, :, n].double(), k.double()) / q.shape[-1] ** 0.5
            share = weights[n].double() * (score - score.amax(-1, keepdim=True)).exp()
            out[:, :, n] = torch.einsum("bhm,bhmd->bhd", share / share.sum(-1, keepdim=True), v.double())
        return out.transpose(1, 2).flatten(2).to(q.dtype)

    patched.model_options["transformer_options"]["optimized_attention_override"] = attention
    return patched


def matrix(family, weights_of_references, count=2, places=None, text=None):
    """[N, M]: 1, but each reference's columns weigh so much for every row but its own; `places` [P] is a mask."""
    text, tokens, references = rows_of(family, count, text)
    total = text + tokens + sum(references)
    result = torch.ones(total, total)
    start = text + tokens
    for weight, size in zip(weights_of_references, references, strict=True):
        own = slice(start, start + size)
        kept = result[own, own].clone()
        result[:, own] = weight
        if places is not None:
            result[text : text + tokens, own] = weight * places[:, None]
        result[own, own] = kept
        start += size
    return result


def close(first, second, tolerance=1e-4):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance * float(second.abs().max()))


@EVERY
def test_every_weight_is_that_of_one_softmax(name):
    family, plain = SHOWN[name], model(name)
    for chain, weights in (
        ([(2, 0.3)], (1.0, 0.3)), ([(0, 2.5)], (2.5, 2.5)), ([(1, 0.0), (2, 4.0)], (0.0, 4.0)),
        ([(0, 0.5), (1, 3.0)], (1.5, 0.5)),
    ):
        patched = plain
        for reference, strength in chain:
            patched = weighed(patched, reference, strength)
        close(sample(patched, family), sample(defined(plain, matrix(family, weights)), family))
    assert not torch.allclose(sample(weighed(plain, 2, 0.3), family), sample(plain, family), rtol=1e-3)


@EVERY
def test_one_is_the_plain_model_bit_for_bit_and_zero_is_without_the_picture(name):
    family, plain = SHOWN[name], model(name)
    before = dict(plain.model_options["transformer_options"]), dict(plain.wrappers)
    assert weighed(plain, 1, 1.0) is plain and weighed(plain, 0, 1.0, mask=torch.ones(1, 8, 8)) is plain
    outside = weighed(plain, 1, 3.0, start=0.9, end=0.95)  # a range without a step
    assert torch.equal(sample(outside, family), sample(plain, family))
    close(sample(weighed(plain, 0, 0.0), family), sample(plain, family, prompt(family, 0)))
    close(sample(weighed(plain, 2, 0.0), family), sample(plain, family, prompt(family, 1)))
    for nowhere in (torch.zeros(1, 4, 4), torch.zeros(4, 4)):
        close(sample(weighed(plain, 0, 1.0, nowhere), family), sample(plain, family, prompt(family, 0)))
    assert (dict(plain.model_options["transformer_options"]), dict(plain.wrappers)) == before


@EVERY
def test_a_mask_reaches_its_rows_and_the_text_only(name):
    family, plain = SHOWN[name], model(name)
    _, tokens, _ = rows_of(family)
    side = int(tokens**0.5)
    mask = torch.zeros(1, side, side)
    mask[:, : side // 2] = 1.0
    mask[:, -1, -1] = 0.25
    expected = defined(plain, matrix(family, (1.0, 1.0), places=mask.flatten()))
    close(sample(weighed(plain, 0, 1.0, mask), family), sample(expected, family))
    larger = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)  # in pixels, of any size
    close(sample(weighed(plain, 0, 1.0, larger), family), sample(expected, family))


def test_rows_outside_a_mask_do_not_change_with_the_picture():
    """In the first block, before what text rows saw has come back to the picture."""
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1.0

    def first_attention(first):
        patched = weighed(model("Flux.1"), 1, 2.0, mask).clone()
        outputs = []

        def patch(out, _options):
            outputs.append(out.clone())
            return out

        patched.set_model_attn1_output_patch(patch)
        sample(patched, FLUX, prompt(FLUX, 1, first=first))
        return outputs[0][0, families.TOKENS : families.TOKENS + 16]

    one, other = first_attention(21), first_attention(40)
    assert torch.equal(one[8:], other[8:]) and not torch.allclose(one[:8], other[:8], rtol=1e-2)


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
def test_both_halves_of_cfg_in_one_call_or_in_two(name):
    family = SHOWN[name]
    patched = weighed(weighed(model(name), 1, 0.4), 2, 2.0)
    negative, short = prompt(family, seed=2), prompt(family, seed=2, tokens=3)
    for other in (negative, short, prompt(family, 0, seed=2)):  # the last two in a call of their own
        whole = sample(patched, family, negative=other, cfg=2.0)
        shows = "reference_latents" in other[0][1]
        positive, alone = sample(patched, family), sample(patched if shows else model(name), family, other)
        close(whole, alone + 2.0 * (positive - alone))
    batch = sample(patched, family, batch=2)
    close(batch[:1], sample(patched, family))


def test_a_mask_for_each_of_a_batch():
    masks = torch.zeros(2, 4, 4)
    masks[0, :2], masks[1, 2:] = 1.0, 1.0
    options = {"batch": 2, "negative": prompt(FLUX, seed=2), "cfg": 2.0}
    batch = sample(weighed(model("Flux.1"), 0, 1.0, masks), FLUX, **options)
    for i in range(2):
        one = sample(weighed(model("Flux.1"), 0, 1.0, masks[i]), FLUX, **options)
        close(batch[i], one[i])
    with pytest.raises(ValueError, match="mask holds 2 masks and the batch is 3"):
        sample(weighed(model("Flux.1"), 0, 1.0, masks), FLUX, batch=3)


def test_a_text_mask_of_the_model_holds():
    """Qwen-Image masks padded texts: weights are added to its mask."""
    family = SHOWN["Qwen-Image"]
    padded = prompt(family)
    padded[0][1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]])
    weights = matrix(family, (0.3, 2.0))
    weights[:, 3:5] = 0.0
    patched = weighed(weighed(model("Qwen-Image"), 1, 0.3), 2, 2.0)
    close(sample(patched, family, padded), sample(defined(model("Qwen-Image"), weights), family, padded))


LOW = [(torch.bfloat16, None), (torch.float8_e4m3fn, torch.bfloat16)]


@pytest.mark.parametrize("tokens", [families.TOKENS, 3], ids=["one call", "two calls"])
@pytest.mark.parametrize(("dtype", "compute"), [(torch.float32, None), *LOW], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("name", "weights"), [("Flux.1", (2.0,)), ("Qwen-Image", (0.0, 2.0, 2.0))])
def test_both_halves_of_cfg_at_any_number_and_precision(name, weights, dtype, compute, tokens):
    """The first of three is off, the others count twice and in a part of the picture; so in both halves."""
    family, count, mask = SHOWN[name], len(weights), torch.zeros(1, 4, 4)
    mask[:, :2] = 1.0
    plain = family_models.build(family, dtype=dtype, compute=compute, operations=compute and comfy.ops.manual_cast)
    patched = weighed(plain, 0, 2.0, mask) if count == 1 else weighed(weighed(plain, 1, 0.0), 0, 2.0, mask)

    def half(prompt, text):
        return sample(defined(plain, matrix(family, weights, count, mask.flatten(), text)), family, prompt)

    # The 8 bits of bf16 leave half a percent of the largest number; half the weight changes five times as much.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    texts = prompt(family, count), prompt(family, count, seed=2, tokens=tokens)
    positive, negative = half(texts[0], families.TOKENS), half(texts[1], tokens)
    close(sample(patched, family, *texts, cfg=2.0), negative + 2.0 * (positive - negative), tolerance)


@pytest.mark.parametrize(("dtype", "compute"), LOW, ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Qwen-Image", "Krea 2"])
def test_half_and_quarter_precision(name, dtype, compute):
    family = SHOWN[name]
    plain = family_models.build(family, dtype=dtype, compute=compute, operations=compute and comfy.ops.manual_cast)
    patched = weighed(weighed(plain, 1, 0.4), 2, 2.0)
    result = sample(patched, family)
    close(result, sample(defined(plain, matrix(family, (0.4, 2.0))), family), 3e-2)  # Krea 2 errs most
    assert (result - sample(plain, family)).abs().max() > 0.01 * result.abs().max()


@pytest.mark.parametrize("before", [True, False])
def test_comfyui_s_cache_of_reference_rows(before):
    """With it later steps have the references as columns alone. It is for Flux.2: Flux.1 fails with it as it is."""
    def cached(patcher):
        return FluxKVCache.execute(patcher).result[0]

    plain, steps = model("Flux.2"), (1.0, 0.7, 0.3, 0.0)

    def both(strength):
        patched = weighed(cached(plain), 0, strength) if before else cached(weighed(plain, 0, strength))
        return sample(patched, FLUX_2, sigmas=steps)

    with_cache = sample(cached(plain), FLUX_2, sigmas=steps)
    assert torch.equal(both(1.0), with_cache)
    close(both(0.0), sample(plain, FLUX_2, prompt(FLUX_2, 0), sigmas=steps), 1e-3)
    assert not torch.allclose(both(0.5), with_cache, rtol=1e-2)


def test_blocks_count_through_both_kinds():
    plain = model("Flux.1")  # one block of two streams, one of one
    every, first, second = (sample(weighed(plain, 0, 0.0, blocks=blocks), FLUX) for blocks in ("all", "0", "1"))
    both = sample(weighed(weighed(plain, 0, 0.0, blocks="0"), 0, 0.0, blocks="1"), FLUX)
    close(both, every)
    assert not torch.allclose(first, every, rtol=1e-3) and not torch.allclose(first, second, rtol=1e-3)
    with pytest.raises(ValueError, match="has 0 to 1"):
        weighed(plain, 0, 0.5, blocks="2")


def test_what_cannot_be_weighed_is_refused_before_sampling():
    plain = model("Flux.1")
    with pytest.raises(ValueError, match="shows no reference picture.*Reference Latent"):
        sample(weighed(plain, 0, 0.5), FLUX, prompt(FLUX, 0))
    with pytest.raises(ValueError, match="reference is 3 and the prompt shows 2"):
        sample(weighed(plain, 3, 0.5), FLUX)
    for patcher, message in (
        (tiny_model.picture(), "model is SD 1.5.*Train Identity Prior"),
        (tiny_model.wan(), "model is Wan 2.1.*Apply Video Identity has a strength"),
        (family_models.build(next(f for f in families.FAMILIES if f.name == "Flux.1 Fill")), "model is Flux.1 Fill"),
    ):
        with pytest.raises(ValueError, match=message):
            weighed(patcher, 0, 1.0)
    area = prompt(FLUX)
    area[0][1].update({"area": (4, 4, 0, 0), "strength": 1.0, "set_area_to_bounds": False})
    with pytest.raises(ValueError, match="mask cannot follow a conditioning with an area"):
        sample(weighed(plain, 0, 0.5, torch.ones(1, 4, 4) * 0.5), FLUX, area)
    for mask in (torch.ones(1, 1, 4, 4), torch.full((1, 4, 4), float("nan"))):
        with pytest.raises(ValueError, match="mask"):
            weighed(plain, 0, 1.0, mask)


def test_another_attention_before_or_after_is_still_called():
    calls = []

    def counting(function, *args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    for order in ("before", "after"):
        patched = model("Flux.1") if order == "before" else weighed(model("Flux.1"), 1, 0.5, blocks="1")
        patched = patched.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = counting
        patched = weighed(patched, 1, 0.5, blocks="1") if order == "before" else patched
        sample(patched, FLUX)
    assert len(calls) == 2  # the block that is not weighed, in each order
