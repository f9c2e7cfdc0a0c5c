"""`aegis verify`: does PyTorch diffusers compute the same from a folder as we do?

The only place outside the tests that imports torch, and only when called.
"""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.sample import encode_text, sample
from aegis_jax.errors import AegisError
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


def verify(folder, *, prompt: str = "a photo", steps: int = 25, seed: int = 0) -> Report:
    """Loads a diffusers folder here and in PyTorch diffusers (float32, CPU) and compares.

    Compared are the text embeddings, the UNet's output at the ends and in the middle of the
    schedule, and one guided image from the same noise. folder: a diffusers folder, or a run folder.
    Needs the extra [torch]; raises `AegisError` without it.
    """
    with full_precision(jnp.float32):
        return _compared(expand(folder), prompt, steps, seed)


def _compared(folder: Path, prompt: str, steps: int, seed: int) -> Report:
    if not (folder / "model_index.json").exists() and (folder / "pipeline").is_dir():
        folder = folder / "pipeline"
    ours = load_pipeline(folder if str(folder) != "world" else "world")
    torch, theirs = _load_torch(ours.source.folder.path)
    # One thing at a time: beyond the text encoder both sides get our embeddings.
    text_emb = encode_text(ours, [prompt])
    with torch.no_grad():
        ids = torch.from_numpy(np.array(ours.tokenizer.ids([prompt]))).long()
        their_emb = theirs.text_encoder(ids)[0].numpy()
    differences = [_compare("text embeddings", np.asarray(text_emb), their_emb)]
    shape = (1, *(native_size(ours.unet.config) or (64, 64)), ours.unet.config.get("in_channels", 4))
    z = np.random.default_rng(seed).standard_normal(shape, np.float32)
    apply = jax.jit(unet.apply, static_argnums=0)
    total = ours.scheduler.get("num_train_timesteps", 1000)
    for t in (1, total // 2, total - 1):
        mine = apply(ours.unet.graph, ours.unet.params, z, jnp.full((1,), t), text_emb)
        with torch.no_grad():
            reply = theirs.unet(_nchw(torch, z), t, torch.from_numpy(np.array(text_emb))).sample
        differences.append(_compare(f"UNet output, t = {t}", np.asarray(mine), reply.numpy().transpose(0, 2, 3, 1)))
    image = sample(ours, [prompt], steps=steps, guidance=GUIDANCE, latents=z)[0]
    with _their_refusal(folder):
        reply = theirs(
            prompt, num_inference_steps=steps, guidance_scale=GUIDANCE,
            height=shape[1] * theirs.vae_scale_factor, width=shape[2] * theirs.vae_scale_factor,
            latents=_nchw(torch, z), output_type="np",
        ).images[0]  # fmt: skip
    gap = np.abs(image.astype(np.float32) - (reply * 255).round())
    differences.append(Difference(f"image, {steps} steps", float(gap.max()), IMAGE_TOLERANCE, "of 255"))
    return Report(folder, tuple(differences))


def _compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Relative to the outputs' own size where that is beyond order 1."""
    scale = max(1.0, float(np.abs(theirs).max()))
    return Difference(what, float(np.abs(ours - theirs).max()), OUTPUT_TOLERANCE * scale)


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


def _load_torch(folder: Path):
    """torch and the folder as a diffusers pipeline with a DDIM scheduler, on the CPU."""
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
    with _their_refusal(folder):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, local_files_only=True
        ).to(dtype=torch.float32)
    # From the file, not from pipeline.scheduler.config, in which diffusers mends values such as steps_offset 0.
    pipeline.scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return torch, pipeline
