"""Guided DDIM from any step to any other, with a part of the picture known, in PyTorch, by diffusers' own scheduler.

As docs/attacks.md shows it for pictures of attacks that go on from a picture.
"""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline


def load(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(pipe, prompt, z, *, steps, guidance, first=0, last=None, known=None):
    """z (1, C, h, w) at step `first` -> at step `last`. known: (mask, z_0, noise) of the same rank."""
    pipe.scheduler.set_timesteps(steps)
    said, empty = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt="")
    for i, t in enumerate(pipe.scheduler.timesteps[:last]):
        if i < first:
            continue
        with_it, without = (pipe.unet(z, t, encoder_hidden_states=text).sample for text in (said, empty))
        z = pipe.scheduler.step(without + guidance * (with_it - without), t, z).prev_sample
        if known is not None:
            mask, z_0, noise = known
            later = pipe.scheduler.timesteps[i + 1 : i + 2]
            z = mask * (pipe.scheduler.add_noise(z_0, noise, later) if len(later) else z_0) + (1 - mask) * z
    return z


@torch.no_grad()
def image(pipe, z):
    """(H, W, 3) from 0 to 255, unrounded."""
    drawn = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
    return (drawn[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255
