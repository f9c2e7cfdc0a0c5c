"""`aegis verify`: does PyTorch diffusers compute the same from a folder as we do?

The only place outside the tests that imports torch, and only when called.
"""

import contextlib
import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.sample import encode_text, sample
from aegis_jax.erasure.texts import check_text_width
from aegis_jax.errors import AegisError
from aegis_jax.io.folder import Folder
from aegis_jax.io.hub import expand
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models import unet
from aegis_jax.models.model import full_precision
from aegis_jax.models.unet_config import native_size

# float32 on both sides; the image has gone through dozens of network calls and 8-bit rounding.
OUTPUT_TOLERANCE = 1e-4  # of order-1 outputs
IMAGE_TOLERANCE = 2  # grey levels of 255, largest
GUIDANCE = 7.5


@dataclasses.dataclass(frozen=True)
class Difference:
    """One comparison: the largest absolute difference and what it may be at most."""

    what: str
    largest: float
    allowed: float
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found for `folder`."""

    folder: Path
    differences: tuple[Difference, ...]

    @property
    def agrees(self) -> bool:
        return all(d.largest <= d.allowed for d in self.differences)

    def text(self) -> str:
        """A small table and a verdict."""
        width = max(len(d.what) for d in self.differences)
        lines = [f"{'largest difference':<{width}}  {'found':>9}  {'allowed':>9}"]
        lines += [f"{d.what:<{width}}  {d.largest:9.2g}  {d.allowed:9.2g} {d.unit}".rstrip() for d in self.differences]
        verdict = "agree" if self.agrees else "DISAGREE"
        return "\n".join([*lines, f"aegis_jax and PyTorch diffusers {verdict} on {self.folder}"])


def verify(
    folder,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prompt: str = "a photo",
    steps: int = 25,
    seed: int = 0,
) -> Report:
    """Loads a diffusers folder here and in PyTorch diffusers (float32, CPU) and compares.

    Compared are the text embeddings, the UNet's output at the ends and in the middle of the
    schedule, and one guided image from the same noise, by DDIM. Where the folder names another
    sampler, which we do not have, that one draws twice in diffusers, with our UNet's outputs and
    with PyTorch's. folder: a diffusers folder, or a run folder; revision and variant as of
    `load_pipeline`. Needs the extra [torch]; raises `AegisError` without it, and for a folder that
    either side does not take.
    """
    with full_precision(jnp.float32):
        return _compared(expand(folder), revision, variant, prompt, steps, seed)


def _compared(folder: Path, revision, variant, prompt: str, steps: int, seed: int) -> Report:
    if not (folder / "model_index.json").exists() and (folder / "pipeline").is_dir():
        folder = folder / "pipeline"
    ours = load_pipeline(folder if str(folder) != "world" else "world", revision=revision, variant=variant)
    check_text_width(ours.unet.config, ours.text_encoder.params)
    torch, theirs, theirs_with_ddim = _load_torch(ours.source.folder, variant)
    _bound_prompts(theirs.tokenizer, ours.tokenizer.model_max_length)
    # One thing at a time: beyond the text encoder both sides get our embeddings.
    text_emb = encode_text(ours, [prompt])
    with _their_refusal(folder), torch.no_grad():
        their_emb = theirs.encode_prompt(prompt, "cpu", 1, False)[0].numpy()
    differences = [_compare("text embeddings", np.asarray(text_emb), their_emb)]
    shape = (1, *(native_size(ours.unet.config) or (64, 64)), ours.unet.config.get("in_channels", 4))
    z = np.random.default_rng(seed).standard_normal(shape, np.float32)
    apply = jax.jit(unet.apply, static_argnums=0)
    total = ours.scheduler.get("num_train_timesteps", 1000)
    for t in (1, total // 2, total - 1):
        mine = apply(ours.unet.graph, ours.unet.params, z, jnp.full((1,), t), text_emb)
        with _their_refusal(folder), torch.no_grad():
            reply = theirs.unet(_nchw(torch, z), t, torch.from_numpy(np.array(text_emb))).sample
        differences.append(_compare(f"UNet output, t = {t}", np.asarray(mine), reply.numpy().transpose(0, 2, 3, 1)))
    image = sample(ours, [prompt], steps=steps, guidance=GUIDANCE, latents=z)[0]
    with _their_refusal(folder):
        what = f"image, {steps} steps" + _without_the_end(theirs_with_ddim.scheduler, steps)
        differences.append(_compare_images(what, image, _draw(torch, theirs_with_ddim, prompt, z, steps, seed)))
        sampler = type(theirs.scheduler).__name__
        if sampler != "DDIMScheduler":
            wanted = _draw(torch, theirs, prompt, z, steps, seed)
            theirs.unet.forward = _forward_by(torch, ours.unet, apply)
            found = _draw(torch, theirs, prompt, z, steps, seed)
            differences.append(_compare_images(f"image, {steps} steps of {sampler}", found, wanted))
    return Report(folder, tuple(differences))


def _bound_prompts(tokenizer, length: int) -> None:
    """Gives diffusers' tokenizer our length where its own, which the files may not state, is beyond the text encoder's.

    diffusers fails there, so that there would be nothing to compare.
    """
    if tokenizer.model_max_length != length:
        warnings.warn(
            f"tokenizer_config.json: diffusers would take prompts of {tokenizer.model_max_length:.4g} tokens, which "
            f"the text encoder does not; compared are {length}, as we take",
            stacklevel=2,
        )
        tokenizer.model_max_length = length


def _without_the_end(ddim, steps: int) -> str:
    """Has diffusers' sampler leave out the timestep -1 that `ddim_timesteps` leaves out; says so if it has one."""
    set_timesteps = ddim.set_timesteps

    def without_the_end(*args, **more):
        set_timesteps(*args, **more)
        ddim.timesteps = ddim.timesteps[ddim.timesteps >= 0]

    set_timesteps(steps)
    if (ddim.timesteps >= 0).all():
        return ""
    ddim.set_timesteps = without_the_end
    return " (diffusers' without its extra one at t = -1)"


def _draw(torch, theirs, prompt: str, z: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """A diffusers pipeline's guided image from the noise z (1, h, w, C): (H, W, 3), whole grey levels."""
    image = theirs(
        prompt, num_inference_steps=steps, guidance_scale=GUIDANCE,
        height=z.shape[1] * theirs.vae_scale_factor, width=z.shape[2] * theirs.vae_scale_factor,
        latents=_nchw(torch, z), output_type="np",
        generator=torch.Generator().manual_seed(seed),  # of samplers that add noise
    ).images[0]  # fmt: skip
    return (image * 255).round()


def _forward_by(torch, model, apply):
    """What a diffusers pipeline calls as its UNet's `forward`, computed by our UNet."""

    def forward(sample, timestep, encoder_hidden_states, **_):
        z = jnp.asarray(sample.numpy().transpose(0, 2, 3, 1))
        t = jnp.full(len(z), float(timestep))  # some samplers stop between whole timesteps
        output = apply(model.graph, model.params, z, t, jnp.asarray(encoder_hidden_states.numpy()))
        return (_nchw(torch, np.asarray(output)),)

    return forward


def _compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Relative to the outputs' own size where that is beyond order 1."""
    scale = max(1.0, float(np.abs(theirs).max()))
    return Difference(what, float(np.abs(ours - theirs).max()), OUTPUT_TOLERANCE * scale)


def _compare_images(what: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    gap = np.abs(ours.astype(np.float32) - theirs)
    return Difference(what, float(gap.max()), IMAGE_TOLERANCE, "of 255")


def _nchw(torch, z: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(z.transpose(0, 3, 1, 2)))


@contextlib.contextmanager
def _their_refusal(folder: Path):
    """One line of whatever diffusers or transformers raise for a folder that they do not take."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise AegisError(f"PyTorch diffusers does not take {folder}: {type(error).__name__}: {reason:.300}") from error


def _load_torch(folder: Folder, variant: str | None):
    """torch and the folder as a diffusers pipeline on the CPU, with its own sampler and with DDIM."""
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        import diffusers
        import torch
    except ImportError as error:
        raise AegisError(
            f"aegis verify needs PyTorch ({error.name} is missing): pip install 'aegis_jax[torch]'"
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    left_out = dict.fromkeys({"safety_checker", *folder.absent})
    with _their_refusal(folder.path), warnings.catch_warnings():
        # The constructor says so where it turns clip_sample off or steps_offset to 1, as we do.
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder.path, variant=variant, local_files_only=True, **left_out
        ).to(dtype=torch.float32)
        ddim = diffusers.DDIMScheduler.from_pretrained(folder.path, subfolder="scheduler", local_files_only=True)
        with_ddim = diffusers.StableDiffusionPipeline(
            **(pipeline.components | {"scheduler": ddim}), requires_safety_checker=False
        )
    for each in (pipeline, with_ddim):
        each.set_progress_bar_config(disable=True)
    return torch, pipeline, with_ddim
