"""Trains the measuring net on renders; writes eye.safetensors and eye.json (its own error) beside this file.

    python tests/experiments/measuring/train.py                  # to the end, resuming what is there
    python tests/experiments/measuring/train.py --minutes 4      # stop and save after 4 minutes; call again
    python tests/experiments/measuring/train.py --judge          # only measure the shipped eye again

One thread, CPU, bf16 autocast. Seeded by step: an interrupted run gives the same weights. Where a
checkpoint of the theatre is present, a second round shows pictures that have gone through its autoencoder.
State: `.cache/training/measuring`.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))
from host import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from experiments.measuring import data, eye, metrics  # noqa: E402
from pack.nodes.puppets.config import NAMED_ACTIONS, PART_NAMES  # noqa: E402

STATE = ROOT / ".cache" / "training" / "measuring"
CHECKPOINT = ROOT / "workflows" / "models" / "puppets_sd.safetensors"
SEED, PICTURES, BATCH, STEPS, RATE = 11, 12_000, 48, 1_000, 3e-3
# A second, shorter round once there is an autoencoder whose pictures the eye will have to read.
TUNE_STEPS, TUNE_RATE, ROUND_TRIPS, ROUND_TRIP_SHARE = 300, 1e-3, 1_500, 0.4
REJECT_SHARE = 0.2
JUDGED = {"validation": 512, "unseen": 512, "test": 512}


def batch(train: data.Renders, decoded: np.ndarray | None, step: int):
    """Damaged pictures [B, 3, 64, 64] and their truth; the last share of the batch is rejects."""
    rng = np.random.default_rng([SEED, step])
    chosen = rng.integers(0, len(train), BATCH)
    images = train.images[chosen].copy()
    if decoded is not None:
        through = rng.random(BATCH) < ROUND_TRIP_SHARE
        chosen[through] %= len(decoded)
        images[through] = decoded[chosen[through]]
    pictures = data.to_tensor(images)
    count = round(REJECT_SHARE * BATCH)
    kind = data.REJECT_KINDS[int(rng.integers(len(data.REJECT_KINDS)))]
    pictures[-count:] = data.rejects(pictures[-count:], rng, kind)
    # A quarter stays clean; damage on top of a reject keeps it one.
    clean = BATCH // 4
    pictures[clean:] = data.damaged(pictures[clean:], rng)
    labels = torch.from_numpy(train.labels[chosen]).clone()
    labels[-count:, 0] = len(eye.ANSWERS) - 1
    good = slice(0, BATCH - count)
    return (
        pictures.contiguous(memory_format=torch.channels_last),
        torch.from_numpy(train.parts[chosen[good]]).long(),
        torch.from_numpy(train.joints[chosen[good]]),
        labels,
        good,
    )


def loss_of(seen: dict[str, torch.Tensor], parts, joints, labels, good) -> torch.Tensor:
    """Everything but the action is asked of the pictures that show a puppet."""
    loss = F.cross_entropy(seen["action"], labels[:, 0], label_smoothing=0.05)
    for i, key in ((1, "species"), (2, "pattern"), (3, "headwear")):
        loss = loss + 0.5 * F.cross_entropy(seen[key][good], labels[good, i], label_smoothing=0.05)
    visible = joints[..., 2:]
    distance = F.smooth_l1_loss(seen["joints"][good], joints[..., :2], beta=0.02, reduction="none")
    loss = loss + 20 * (distance * visible).sum() / visible.sum()
    return loss + 1.5 * F.cross_entropy(seen["parts"][good].float(), parts)


def round_trips(images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] through the checkpoint's autoencoder, by the host's own code."""
    scripts.add_comfy_path(STATE / "host")
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(CHECKPOINT))
    prefix = "first_stage_model."
    vae = comfy.sd.VAE(sd={k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    out = []
    for start in range(0, len(images), 32):
        pictures = torch.from_numpy(images[start : start + 32]).float() / 255
        out.append((vae.decode(vae.encode(pictures)).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return np.concatenate(out)


def decoded_pictures() -> np.ndarray | None:
    """Training renders through the autoencoder, reduced to the eye's size; None without a checkpoint."""
    path = STATE / "round_trips.npy"
    if not path.exists():
        if not CHECKPOINT.exists():
            return None
        large = data.renders(STATE, "train", ROUND_TRIPS, 128)
        small = F.interpolate(
            data.to_tensor(round_trips(large.images)), size=(eye.SIZE, eye.SIZE), mode="area"
        )
        np.save(path, (small * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.load(path)


def rate(step: int, steps: int) -> float:
    """Warm-up, cosine to near zero, and once more for the second round."""
    tuning = step - steps
    share = tuning / TUNE_STEPS if tuning >= 0 else step / steps
    warm = min(1.0, (tuning + 1) / 30 if tuning >= 0 else (step + 1) / 60)
    return (TUNE_RATE if tuning >= 0 else RATE) * warm * max(0.5 * (1 + math.cos(math.pi * share)), 0.005)


def train(minutes: float, steps: int) -> bool:
    """True when every step is done."""
    torch.manual_seed(SEED)
    net = eye.Eye().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-3)
    path, done = STATE / "eye.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["done"]
    pictures = data.renders(STATE, "train", PICTURES, eye.SIZE)
    decoded = decoded_pictures()
    deadline, losses = time.monotonic() + 60 * minutes, []
    last = steps + (TUNE_STEPS if decoded is not None else 0)
    while done < last and time.monotonic() < deadline:
        optimiser.param_groups[0]["lr"] = rate(done, steps)
        images, *truth = batch(pictures, decoded if done >= steps else None, done)
        with torch.autocast("cpu", torch.bfloat16):
            seen = net(images)
        loss = loss_of({key: value.float() for key, value in seen.items()}, *truth)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {loss.item()} at step {done}; nothing was saved")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        done += 1
        losses.append(loss.item())
        if done % 50 == 0:
            print(f"step {done}/{last} loss {np.mean(losses):.3f}", flush=True)
            losses.clear()
    temporary = path.with_suffix(".part")
    torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict(), "done": done}, temporary)
    os.replace(temporary, path)
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()
    }
    save_file(weights, eye.WEIGHTS, {"steps": str(done), "round_trips": str(done > steps)})
    return done >= last


def figures_of(net: eye.Eye, images: np.ndarray, truth: data.Renders) -> dict:
    """The eye's error on pictures of known truth; joints in 128ths of the frame."""
    seen, size = eye.look(net, images), images.shape[1]
    known = truth.labels
    right = np.array([eye.ANSWERS.index(a) for a in seen.actions]) == known[:, 0]
    named = known[:, 0] < len(NAMED_ACTIONS)
    among = seen.action_scores[:, : len(NAMED_ACTIONS)].argmax(1) == known[:, 0]
    distance = metrics.joint_distances(seen.joints, truth.joints * np.array([size, size, 1])) * 128 / size
    overlap = {}
    for i, name in enumerate(PART_NAMES):
        both = ((seen.parts == i) & (truth.parts == i)).sum()
        overlap[name] = round(float(both / max(1, ((seen.parts == i) | (truth.parts == i)).sum())), 4)
    names = [
        ("species", seen.species, data.SPECIES, 1),
        ("pattern", seen.patterns, data.PATTERNS, 2),
        ("headwear", seen.headwear, data.HEADWEAR, 3),
    ]
    return {
        "pictures": len(truth),
        "action_accuracy": round(float(right.mean()), 4),
        "named_action_accuracy_12_way": round(float(among[named].mean()), 4),
        "rejected": round(float(np.mean([a == eye.REJECT for a in seen.actions])), 4),
        **{
            f"{key}_accuracy": round(
                float(np.mean([all_.index(s) == k for s, k in zip(said, known[:, column])])), 4
            )
            for key, said, all_, column in names
        },
        "joint_error_pixels_of_128": round(float(np.nanmean(distance)), 3),
        "joints_within_5_percent": round(
            float(np.nanmean(np.where(np.isnan(distance), np.nan, distance <= 6.4))), 4
        ),
        "mean_part_iou": round(float(np.mean(list(overlap.values()))), 4),
        "part_iou": overlap,
    }


def judge() -> dict:
    """The shipped eye's error on held-out renders of 128 pixels: clean, damaged, through the autoencoder."""
    net, figures = eye.load(), {}
    for split, count in JUDGED.items():
        truth = data.renders(STATE, split, count, 128)
        figures[split] = figures_of(net, truth.images, truth)
        if split == "validation":
            rng = np.random.default_rng(SEED)
            pictures = data.to_tensor(truth.images)
            spoilt = data.damaged(pictures, rng).permute(0, 2, 3, 1).numpy()
            figures["validation, damaged"] = figures_of(net, spoilt, truth)
            caught = {}
            for kind in data.REJECT_KINDS:
                bad = data.rejects(pictures[:256], rng, kind).permute(0, 2, 3, 1).numpy()
                caught[kind] = round(float(np.mean([a == eye.REJECT for a in eye.look(net, bad).actions])), 4)
            figures["rejects caught"] = caught
            if CHECKPOINT.exists():
                figures["validation, autoencoder"] = figures_of(net, round_trips(truth.images), truth)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--judge", action="store_true", help="only measure the shipped eye")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    STATE.mkdir(parents=True, exist_ok=True)
    if not arguments.judge and not train(arguments.minutes, arguments.steps):
        print("stopped early; call again to go on")
        return
    figures = judge()
    eye.FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(
        json.dumps(
            {key: {k: v for k, v in value.items() if k != "part_iou"} for key, value in figures.items()},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
