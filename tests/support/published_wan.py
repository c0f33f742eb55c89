"""The published video identity method in plain PyTorch, from the paper's formulas: no cache, no ComfyUI, no pack.

Every token of the video and of the reference passes every block in every call. Attention is one softmax over
[video; image] rows under a mask that keeps the image from seeing the video; with `loops`, one query and one head at
a time. Rotary positions are complex numbers. Weights come from a state dict under their published names.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu, layer_norm, linear, silu


class Wan:
    """A Wan 2.1 T2V transformer. weights: the diffusion model's state dict; adapter: the published keys, or none."""

    def __init__(self, weights, heads, freq_dim, adapter=None, loops=False, dtype=torch.float64):
        self.w = {key: tensor.to(dtype) for key, tensor in weights.items()}
        self.a = {key: tensor.to(dtype) for key, tensor in (adapter or {}).items()}
        self.heads, self.freq_dim, self.loops, self.dtype = heads, freq_dim, loops, dtype
        self.width = self.w["patch_embedding.weight"].shape[0]
        self.depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        self.attended = []

    def __call__(self, x, timestep, context, reference=None):
        """Velocity of x [B, C, T, H, W] at timestep [B], context [B, L, C'], reference [1 or B, C, 1, h, w]."""
        batch = x.shape[0]
        video, grid = self.patches(x)
        frames, rows, columns = grid
        positions = [(t, h, w) for t in range(frames) for h in range(rows) for w in range(columns)]
        text = gelu(self.dense("text_embedding.0", context.to(self.dtype)), approximate="tanh")
        text = self.dense("text_embedding.2", text)
        time, modulation = self.time(timestep)
        count = video.shape[1]
        image = image_modulation = None
        if reference is not None:
            image, (_, image_rows, image_columns) = self.patches(reference.expand(batch, -1, -1, -1, -1))
            positions += self.image_positions(rows, columns, image_rows, image_columns)
            _, image_modulation = self.time(torch.zeros(batch))
        turn = self.rotations(positions)
        for i in range(self.depth):
            video, image = self.block(f"blocks.{i}", video, image, modulation, image_modulation, text, turn, count)
        shift, scale = (self.w["head.modulation"] + time[:, None]).chunk(2, dim=1)
        out = self.dense("head.head", layer_norm(video, (self.width,), eps=1e-6) * (1 + scale) + shift)
        channels = out.shape[-1] // 4
        out = out.reshape(batch, frames, rows, columns, 1, 2, 2, channels)
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, channels, frames, 2 * rows, 2 * columns)

    def image_positions(self, rows, columns, image_rows, image_columns):
        """The positions (t, h, w) of the reference's tokens, for a video of so many rows and columns."""
        return [(-1, rows + h, columns + w) for h in range(image_rows) for w in range(image_columns)]

    def patches(self, x):
        b, c, t, h, w = x.shape
        cut = x.to(self.dtype).reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        weight = self.w["patch_embedding.weight"].reshape(self.width, -1)
        tokens = linear(cut.reshape(b, t * h * w // 4, c * 4), weight, self.w["patch_embedding.bias"])
        return tokens, (t, h // 2, w // 2)

    def time(self, timestep):
        half = self.freq_dim // 2
        angle = timestep.to(self.dtype)[:, None] * 10000 ** (-torch.arange(half, dtype=self.dtype) / half)
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)
        time = self.dense("time_embedding.2", silu(self.dense("time_embedding.0", wave)))
        return time, self.dense("time_projection.1", silu(time)).reshape(-1, 6, self.width)

    def rotations(self, positions):
        """exp(i p / 10000^(2j/d)) for each token and pair of channels, the axes' shares as Wan divides them."""
        width = self.width // self.heads
        third = 2 * (width // 6)
        table = []
        for position in positions:
            angles = []
            for p, share in zip(position, (width - 2 * third, third, third), strict=True):
                angles += [p / 10000 ** (2 * j / share) for j in range(share // 2)]
            table.append([complex(math.cos(angle), math.sin(angle)) for angle in angles])
        return torch.tensor(table, dtype=torch.complex128)

    def rotate(self, x, turn):
        b, n, _ = x.shape
        pairs = torch.view_as_complex(x.double().reshape(b, n, self.heads, -1, 2))
        return torch.view_as_real(pairs * turn[None, :, None]).reshape(b, n, -1).to(self.dtype)

    def block(self, name, video, image, modulation, image_modulation, text, turn, count):
        base = self.w[f"{name}.modulation"]
        m = (base + modulation).chunk(6, dim=1)
        y = layer_norm(video, (self.width,), eps=1e-6) * (1 + m[1]) + m[0]
        q, k, v = self.project(f"{name}.self_attn", y, turn[:count], image=False)
        if image is None:
            out = self.attention(q, k, v, q.shape[1])
        else:
            n = (base + image_modulation).chunk(6, dim=1)
            z = layer_norm(image, (self.width,), eps=1e-6) * (1 + n[1]) + n[0]
            others = self.project(f"{name}.self_attn", z, turn[count:], image=True)
            self.attended.append((others[1], others[2]))
            out = self.attention(*(torch.cat(pair, 1) for pair in zip((q, k, v), others, strict=True)), count)
            image = image + n[2] * self.dense(f"{name}.self_attn.o", out[:, count:])
            image = image + n[5] * self.feed(name, layer_norm(image, (self.width,), eps=1e-6) * (1 + n[4]) + n[3])
        video = video + m[2] * self.dense(f"{name}.self_attn.o", out[:, :count])
        y = layer_norm(video, (self.width,), self.w[f"{name}.norm3.weight"], self.w[f"{name}.norm3.bias"], 1e-6)
        cross = f"{name}.cross_attn"
        q = self.rms(f"{cross}.norm_q", self.dense(f"{cross}.q", y))
        k = self.rms(f"{cross}.norm_k", self.dense(f"{cross}.k", text))
        video = video + self.dense(f"{cross}.o", self.softmax(q, k, self.dense(f"{cross}.v", text)))
        video = video + m[5] * self.feed(name, layer_norm(video, (self.width,), eps=1e-6) * (1 + m[4]) + m[3])
        return video, image

    def project(self, name, x, turn, image):
        def one(projection):
            y = self.dense(f"{name}.{projection}", x)
            if image:
                down, up = (self.a[f"{name}.{projection}_loras.{part}.weight"] for part in ("down", "up"))
                y = y + x @ down.T @ up.T
            return y

        q, k = (self.rotate(self.rms(f"{name}.norm_{p}", one(p)), turn) for p in ("q", "k"))
        return q, k, one("v")

    def attention(self, q, k, v, count):
        """Rows up to `count` see every key, the later ones only each other."""
        allowed = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
        allowed[count:, :count] = False
        return self.softmax(q, k, v, allowed)

    def softmax(self, q, k, v, allowed=None):
        b, n, _ = q.shape
        q, k, v = (x.reshape(b, x.shape[1], self.heads, -1) for x in (q, k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        out = torch.zeros_like(q)
        if self.loops:
            for row in range(b):
                for head in range(self.heads):
                    for token in range(n):
                        score = (k[row, :, head] @ q[row, token, head]) * scale
                        if allowed is not None:
                            score = score[allowed[token]]
                        share = (score - score.max()).exp()
                        values = v[row, :, head] if allowed is None else v[row, allowed[token], head]
                        out[row, token, head] = (share[:, None] * values).sum(0) / share.sum()
            return out.reshape(b, n, -1)
        score = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
        if allowed is not None:
            score = score.masked_fill(~allowed, -math.inf)
        return torch.einsum("bhnm,bmhd->bnhd", score.softmax(-1), v).reshape(b, n, -1)

    def feed(self, name, x):
        return self.dense(f"{name}.ffn.2", gelu(self.dense(f"{name}.ffn.0", x), approximate="tanh"))

    def dense(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def rms(self, name, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.w[f"{name}.weight"]
