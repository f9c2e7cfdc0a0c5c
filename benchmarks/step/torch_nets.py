"""Stable Diffusion's UNet and CLIP's text encoder in plain PyTorch, with diffusers' and transformers' parameter names.

Benchmark only. Machines with a GPU often have torch but not diffusers, and a baseline has to run on the same weights
everywhere; tests/benchmarks holds these two against diffusers' and transformers' own where those are installed.
Supported: SD 1.x layouts (2-D blocks with or without cross-attention, projections by 1x1 convolution). NCHW.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def attend(q, k, v, *, causal=False, explicit=False):
    """(B, N, L, d), (B, N, S, d) x 2 -> (B, N, L, d); `explicit` spells the products out, so that they are counted."""
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    return logits.softmax(-1) @ v


class Attention(nn.Module):
    explicit = False  # spell attention out: for counting arithmetic, not for timing

    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = attend(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)), explicit=self.explicit)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_width, heads)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    def __init__(self, width, context_width, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_width, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        tokens = h.permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return self.proj_out(tokens.unflatten(1, h.shape[2:]).permute(0, 3, 1, 2)) + x


class Resnet(nn.Module):
    def __init__(self, n_in, n_out, time_width, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, n_in, eps)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, n_out)
        self.norm2 = nn.GroupNorm(groups, n_out, eps)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.conv_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Resample(nn.Module):
    """A 3x3 convolution that halves the sides, or follows a doubling of them."""

    def __init__(self, width, *, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Stage(nn.Module):
    """One resolution, or the middle: resnets, each followed by a transformer where the block type has attention."""

    def __init__(self, widths_in, n_out, c, *, attention, down=False, up=False, middle=False):
        super().__init__()
        groups, time_width = c["norm_num_groups"], 4 * c["block_out_channels"][0]
        self.resnets = nn.ModuleList(Resnet(n_in, n_out, time_width, groups, c["norm_eps"]) for n_in in widths_in)
        if attention:
            count = len(widths_in) - middle
            self.attentions = nn.ModuleList(
                Transformer2D(n_out, c["cross_attention_dim"], c["attention_head_dim"], groups) for _ in range(count)
            )
        if down:
            self.downsamplers = nn.ModuleList([Resample(n_out, up=False)])
        if up:
            self.upsamplers = nn.ModuleList([Resample(n_out, up=True)])

    def layer(self, i, x, temb, context):
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class TimeEmbedding(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear_1 = nn.Linear(n_in, n_out)
        self.linear_2 = nn.Linear(n_out, n_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel for SD 1.x configs."""

    def __init__(self, c):
        super().__init__()
        widths, layers = c["block_out_channels"], c["layers_per_block"]
        n, inputs = len(widths), [widths[0], *widths[:-1]]
        self.width = widths[0]
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(
            Stage(
                [inputs[i]] + [widths[i]] * (layers - 1),
                widths[i],
                c,
                attention=c["down_block_types"][i].startswith("Cross"),
                down=i < n - 1,
            )
            for i in range(n)
        )
        self.mid_block = Stage([widths[-1]] * 2, widths[-1], c, attention=True, middle=True)
        self.up_blocks = nn.ModuleList()
        for j, i in enumerate(reversed(range(n))):
            skips = [widths[i]] * layers + [inputs[i]]
            hidden = [widths[min(i + 1, n - 1)]] + [widths[i]] * layers
            attention = c["up_block_types"][j].startswith("Cross")
            widths_in = [h + s for h, s in zip(hidden, skips)]
            self.up_blocks.append(Stage(widths_in, widths[i], c, attention=attention, up=i > 0))
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)

    def _time(self, t, dtype):
        half = self.width // 2
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * exponent.exp()
        return self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))

    def forward(self, x, t, context):
        """Noise (B, C, h, w) for x (B, C, h, w), t (B,), context (B, L, D)."""
        temb = self._time(t, x.dtype)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            for i in range(len(stage.resnets)):
                x = stage.layer(i, x, temb, context)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers[0](x)
                skips.append(x)
        mid = self.mid_block
        x = mid.resnets[1](mid.attentions[0](mid.resnets[0](x, temb), context), temb)
        for stage in self.up_blocks:
            for i in range(len(stage.resnets)):
                x = stage.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def flops(case, batch: int) -> dict[str, float]:
    """Arithmetic of one evaluation (per latent): forward, with gradient to the text, with gradient to the weights."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = UNet(case.unet)
        h, w, channels = case.latent_shape
        z, t = torch.empty(batch, channels, h, w), torch.zeros(batch)
        c = torch.empty(batch, case.text["max_position_embeddings"], case.unet["cross_attention_dim"])
    Attention.explicit = True
    try:
        found = {}
        for name, weights, text in (("F", False, False), ("F+B_text", False, True), ("F+B", True, False)):
            net.requires_grad_(weights)
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(weights or text):
                output = net(z, t, c.detach().requires_grad_(text))
                if weights or text:
                    output.sum().backward()
            found[name] = counter.get_total_flops() / batch
    finally:
        Attention.explicit = False
    return found


# --- text -----------------------------------------------------------------------------------------


class _SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = attend(split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)), causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class _TextLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c["hidden_size"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = _SelfAttention(width, c["num_attention_heads"])
        self.mlp = _MLP(width, c["intermediate_size"])

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """CLIP's text tower from token embeddings on; parameter names without transformers' prefix `text_model.`."""

    def __init__(self, c):
        super().__init__()
        assert c["hidden_act"] == "quick_gelu", "only CLIP-L's activation is built here"
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.embeddings.position_embedding = nn.Embedding(c["max_position_embeddings"], c["hidden_size"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_TextLayer(c) for _ in range(c["num_hidden_layers"]))
        self.final_layer_norm = nn.LayerNorm(c["hidden_size"])

    def embed(self, ids):
        return self.embeddings.token_embedding.weight[torch.as_tensor(ids, device=self.final_layer_norm.weight.device)]

    def forward(self, tokens):
        """Token embeddings (B, L, d) -> last hidden state after the final norm."""
        x = tokens + self.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)
