"""Trains the measuring net on renders; writes eye.safetensors and eye.json (its own error) beside this file.

    python tests/experiments/measuring/train.py                  # to the end, resuming what is there
    python tests/experiments/measuring/train.py --minutes 4      # stop and save after 4 minutes; call again
    python tests/experiments/measuring/train.py --second-round   # after a change of the theatre's autoencoder
    python tests/experiments/measuring/train.py --judge          # only measure the shipped eye again

One thread, CPU, bf16 autocast where the processor has it. Seeded by step: an interrupted run gives the same
weights. A second round shows pictures that have gone through the theatre's autoencoder, and others that its UNet has
redrawn in part; `--second-round` runs that one alone, from the shipped eye.
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
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from experiments import sampling  # noqa: E402
from experiments.measuring import data, eye, metrics  # noqa: E402
from pack.nodes.puppets import captions  # noqa: E402
from pack.nodes.puppets.config import ACTION_TABLE, PART_NAMES  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

STATE = ROOT / ".cache" / "training" / "measuring"
CHECKPOINT = ROOT / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"
SEED, PICTURES, BATCH = 11, 12_000, 48
# (steps, learning rate) of the body and of the two closer looks, and of a second, shorter round once there is
# an autoencoder whose pictures the eye will have to read.
PLAN = {"head": (1_000, 3e-3), "shirt": (800, 3e-3), "body": (1_600, 3e-3)}
TUNE = {"head": (300, 1e-3), "shirt": (300, 1e-3), "body": (500, 1e-3)}
ROUND_TRIPS, ROUND_TRIP_SHARE = 1_024, 0.5  # the second half of them redrawn by the UNet
REDRAWN = (0.25, 0.35, 0.45)  # of the noise schedule: what the picture shows stays, how it is drawn does not
REJECT_SHARE = 0.2
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere it is emulated, and slow
JOINT_NOISE = 0.012  # of the frame, deviation: what the body net is off by, or a little more
JUDGED = {"validation": 512, "unseen": 512, "test": 512, "validation close-ups": 512}


class Lessons:
    """Batches of a net, each a function of its step, and their loss."""

    def __init__(self, train: data.Renders, decoded: np.ndarray | None):
        self.train, self.decoded = train, decoded

    def pictures(self, rng: np.random.Generator, second: bool) -> tuple[np.ndarray, torch.Tensor]:
        """Positions in the renders and their pictures [B, 3, 128, 128], some through the autoencoder."""
        chosen = rng.integers(0, len(self.train), BATCH)
        through = rng.random(BATCH) < ROUND_TRIP_SHARE
        images = self.train.images[chosen]
        if second and self.decoded is not None:
            chosen[through] %= len(self.decoded)
            images[through] = self.decoded[chosen[through]]
        return chosen, data.to_tensor(images)

    def loss(self, name: str, net: torch.nn.Module, step: int, second: bool) -> torch.Tensor:
        rng = np.random.default_rng([SEED, list(PLAN).index(name), step, second])
        chosen, pictures = self.pictures(rng, second)
        if name == "body":
            return self.body(net, rng, chosen, pictures)
        return self.closer(name, net, rng, chosen, pictures)

    def body(self, net, rng, chosen: np.ndarray, pictures: torch.Tensor) -> torch.Tensor:
        """The last share of the batch is rejects, of which only the answer "reject" is asked."""
        pictures = F.interpolate(pictures, size=(eye.SIZE, eye.SIZE), mode="area")
        count, clean = round(REJECT_SHARE * BATCH), BATCH // 4
        kind = data.REJECT_KINDS[int(rng.integers(len(data.REJECT_KINDS)))]
        pictures[-count:] = data.rejects(pictures[-count:], rng, kind)
        # A quarter stays clean; damage on top of a reject keeps it one.
        pictures[clean:] = data.damaged(pictures[clean:], rng)
        good = chosen[: BATCH - count]
        parts = torch.from_numpy(self.train.parts[good][:, ::2, ::2]).long()
        joints = torch.from_numpy(self.train.joints[good])
        action = torch.from_numpy(self.train.labels[chosen, 0])
        action[-count:] = len(eye.ANSWERS) - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            seen = net(pictures.contiguous(memory_format=torch.channels_last))
        visible = joints[..., 2:]
        distance = F.smooth_l1_loss(
            seen["joints"][: len(good)].float(), joints[..., :2], beta=0.02, reduction="none"
        )
        return (
            F.cross_entropy(seen["action"].float(), action, label_smoothing=0.05)
            + 20 * (distance * visible).sum() / visible.sum()
            + 1.5 * F.cross_entropy(seen["parts"][: len(good)].float(), parts)
        )

    def closer(self, name, net, rng, chosen: np.ndarray, pictures: torch.Tensor) -> torch.Tensor:
        joints = self.train.joints[chosen][..., :2]
        joints = torch.from_numpy(joints + rng.normal(0, JOINT_NOISE, joints.shape).astype(np.float32))
        labels = torch.from_numpy(self.train.labels[chosen])
        crops = (eye.head_crops if name == "head" else eye.shirt_crops)(pictures, joints)
        crops[BATCH // 4 :] = data.damaged(crops[BATCH // 4 :], rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            seen = net(crops.contiguous(memory_format=torch.channels_last)).float()
        if name == "shirt":
            return F.cross_entropy(seen, labels[:, 2], label_smoothing=0.05)
        species, headwear = seen.split((len(data.SPECIES), len(data.HEADWEAR)), 1)
        return F.cross_entropy(species, labels[:, 1], label_smoothing=0.05) + F.cross_entropy(
            headwear, labels[:, 3], label_smoothing=0.05
        )


def round_trips(images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] through the checkpoint's autoencoder, by the host's own code."""
    theatre = sampling.Theatre(CHECKPOINT, STATE)
    return np.concatenate([theatre.round_trip(images, i, i + 32) for i in range(0, len(images), 32)])


def redrawn(images: np.ndarray, captions_: list[str]) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3], noised in part and drawn again by the UNet with their own captions."""
    theatre, found = sampling.Theatre(CHECKPOINT, STATE), []
    sampler = theatre.sampler("dpmpp_2m")
    for i in range(0, len(images), 32):
        part, texts = images[i : i + 32], captions_[i : i + 32]
        latents = theatre.sample(
            sampler, theatre.prompts(texts), range(i, i + len(part)), theatre.encode(part),
            denoise=REDRAWN[i // 32 % len(REDRAWN)], steps=6,
        )
        found.append(theatre.decode(latents))
    return np.concatenate(found)


def decoded_pictures(train: data.Renders) -> np.ndarray | None:
    """The first training renders through the autoencoder, half of them redrawn; None without a checkpoint."""
    path = STATE / f"decoded_{sampling.sha256(CHECKPOINT)[:12]}.npy" if CHECKPOINT.exists() else None
    if path is not None and not path.exists():
        half = ROUND_TRIPS // 2
        texts = [captions.caption(data.take(i, "eye")) for i in range(half, ROUND_TRIPS)]
        kept = [round_trips(train.images[:half]), redrawn(train.images[half:ROUND_TRIPS], texts)]
        np.save(path, np.concatenate(kept))
    return np.load(path) if path else None


def fit(name: str, net: torch.nn.Module, lessons: Lessons, second: bool, deadline: float) -> bool:
    """Train one net for its first or second round, from where it was; True when every step is done."""
    steps, rate = (TUNE if second else PLAN)[name]
    net.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-3)
    path, done, losses = STATE / f"{name}{'_second' if second else ''}.pt", 0, []
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["done"]
    while done < steps and time.monotonic() < deadline:
        warm, left = min(1.0, (done + 1) / 50), 0.5 * (1 + math.cos(math.pi * done / steps))
        optimiser.param_groups[0]["lr"] = rate * warm * max(left, 0.005)
        loss = lessons.loss(name, net, done, second)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: loss {loss.item()} at step {done}; nothing was saved")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        done += 1
        losses.append(loss.item())
        if done % 50 == 0 or done == steps:
            print(f"{name} {done}/{steps} loss {np.mean(losses):.3f}", flush=True)
            losses.clear()
            temporary = path.with_suffix(".part")
            torch.save(
                {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "done": done}, temporary
            )
            os.replace(temporary, path)
    return done >= steps


def save(net: eye.Eye, rounds: int) -> None:
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()
    }
    save_file(weights, eye.WEIGHTS, {"rounds": str(rounds)})


def train(minutes: float, second_only: bool) -> bool:
    """True when every net is trained; writes the weights after either round."""
    deadline = time.monotonic() + 60 * minutes
    torch.manual_seed(SEED)
    net = eye.load().requires_grad_(True) if second_only else eye.Eye()
    lessons = Lessons(data.renders(STATE, "eye", PICTURES, eye.FULL), None)
    if not second_only:
        if not all(fit(name, getattr(net, name), lessons, False, deadline) for name in PLAN):
            return False
        save(net, 1)
    lessons.decoded = decoded_pictures(lessons.train)
    if lessons.decoded is None:
        return True
    if not all(fit(name, getattr(net, name), lessons, True, deadline) for name in TUNE):
        return False
    save(net, 2)
    return True


def figures_of(net: eye.Eye, images: np.ndarray, truth: data.Renders) -> dict:
    """The eye's error on pictures of known truth; joints in 128ths of the frame."""
    seen, size = eye.look(net, images), images.shape[1]
    known = truth.labels
    right = np.array([eye.ANSWERS.index(a) for a in seen.actions]) == known[:, 0]
    words = sum(facts.named for facts in ACTION_TABLE.values())  # the named actions come first
    named = known[:, 0] < words
    among = seen.action_scores[:, :words].argmax(1) == known[:, 0]
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
        "named_action_accuracy_among_named": round(float(among[named].mean()), 4),
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
    parser.add_argument("--second-round", action="store_true", help="only the second round, from the shipped eye")
    parser.add_argument("--judge", action="store_true", help="only measure the shipped eye")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    STATE.mkdir(parents=True, exist_ok=True)
    if not arguments.judge and not train(arguments.minutes, arguments.second_round):
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
