"""From prompts to images: text encoding, the guided DDIM loop, decoding.

The same arithmetic as a diffusers StableDiffusionPipeline built with
`DDIMScheduler.from_config` of the folder's scheduler config, with eta 0 and the same latents.
Shapes: n images, B batch, h w latent size, C channels, L tokens, D text width, H W pixels.
"""

import math
import numbers
import operator
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion import conditioning, predict
from aegis_jax.diffusion import schedule as schedule_lib
from aegis_jax.diffusion.conditioning import Conditioning, check_loaded, prompt_list
from aegis_jax.diffusion.schedule import Schedule
from aegis_jax.diffusion.threads import cores, side_by_side
from aegis_jax.errors import AegisError
from aegis_jax.models import unet_config, vae

# Self-attention over all latent pixels dominates memory, so the batch shrinks as the image grows:
# 2 images of 64x64 latents at a time, 64 of 8x8. On a CPU less, because several calls run side by side.
LATENT_PIXELS_PER_CALL = 8192
LATENT_PIXELS_PER_CPU_CALL = 1024
MOST_IMAGES_PER_CALL = 64
MOST_PIXELS = 2**16  # of a side; XLA cannot even describe arrays that are much larger


@partial(jax.jit, static_argnums=0)
def _denoise(graph, params, schedule, cond, uncond, latents, timesteps, stride, span, guidance):
    """DDIM over timesteps[span[0]:span[1]]; numbers are traced, so one program serves any count."""

    def step(i, z):
        t = timesteps[i]
        if uncond is None:
            output = predict.output(graph, params, z, t, cond)
        else:
            pair = conditioning.join(uncond, cond)
            output = predict.output(graph, params, jnp.concatenate([z, z]), t, pair)
            output = schedule_lib.guide(*jnp.split(output, 2), guidance)
        return schedule_lib.output_step(schedule, output, z, t, t - stride)

    return jax.lax.fori_loop(span[0], span[1], step, latents)


def sample_latents(
    unet_graph,
    unet_params: dict,
    schedule: Schedule,
    cond: Conditioning,
    uncond: Conditioning | None,
    z_T: jax.Array,
    timesteps: np.ndarray | jax.Array,
    guidance: float | jax.Array,
    *,
    first: int | jax.Array = 0,
    last: int | jax.Array | None = None,
) -> jax.Array:
    """Guided DDIM from z_T (n, h, w, C) over `timesteps` (steps,) to z_0 (n, h, w, C).

    cond and uncond have n rows; uncond None means one network call without guidance, otherwise both
    run stacked in one call. Only steps first..last-1 are done where these are given (traced numbers
    are welcome): with last < steps the result is z at timesteps[last]. May be called under jit;
    not differentiable in reverse, the loop's length is traced.
    """
    steps, total = timesteps.shape[0], schedule.alphas_cumprod.shape[0]
    padded = jnp.pad(jnp.asarray(timesteps, jnp.int32), (0, total - steps))
    span = jnp.stack([jnp.int32(first), jnp.int32(steps if last is None else last)])
    return _denoise(
        unet_graph, unet_params, schedule, cond, uncond, jnp.asarray(z_T, jnp.float32), padded,
        jnp.int32(total // steps), span, jnp.float32(guidance),
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _epsilon(graph, params, schedule, latents, t, cond):
    return predict.predict(graph, params, schedule, latents, t, cond)


@partial(jax.jit, static_argnums=0)
def _decode(graph, params, latents, scaling_factor):
    images = vae.decode(graph, params, latents / scaling_factor)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)


def encode_text(pipeline, prompts: str | list[str]) -> jax.Array:
    """The text encoder's last hidden state for each prompt, (n, L, D)."""
    return conditioning.encode(pipeline, prompts).embedding


def predict_noise(pipeline, latents, t, text_emb) -> jax.Array:
    """The UNet's noise prediction for latents z_t, (n, h, w, C): always epsilon, v is converted.

    latents (n, h, w, C); t (n,) or one number; text_emb (n, L, D) or a `Conditioning` of n rows.
    AegisError for what is no pipeline, wrong shapes or a t off the schedule.
    """
    check_loaded(pipeline)
    schedule = schedule_lib.make_schedule(pipeline.scheduler)
    latents = _checked_latents(pipeline, latents, None)
    cond = text_emb if isinstance(text_emb, Conditioning) else Conditioning(_as_float(text_emb, "text_emb"))
    _check_text(pipeline, cond.embedding, len(latents))
    t = np.asarray(t)
    total = schedule.alphas_cumprod.shape[0]
    if t.shape not in ((), (len(latents),)):
        raise AegisError(f"t has shape {t.shape}, wanted () or ({len(latents)},), one per latent")
    if not jnp.issubdtype(t.dtype, jnp.number) or not np.all((t == np.floor(t)) & (t >= 0) & (t < total)):
        raise AegisError(f"t = {t.tolist()}, wanted whole numbers from 0 to {total - 1}")
    t = jnp.broadcast_to(jnp.asarray(t, jnp.int32), (len(latents),))
    model = pipeline.unet
    return _epsilon(model.graph, model.params, schedule, latents, t, cond)


def decode(pipeline, latents) -> jax.Array:
    """Latents in the UNet's scale (n, h, w, C) -> float32 images in [0, 1], (n, H, W, 3). AegisError as above."""
    check_loaded(pipeline)
    config = pipeline.vae.config
    latents = _as_float(latents, "latents")
    channels = config.get("latent_channels", 4)
    if latents.ndim != 4 or latents.shape[-1] != channels or 0 in latents.shape:
        raise AegisError(f"latents have shape {latents.shape}, wanted (n, h, w, {channels})")
    scaling_factor = jnp.float32(config.get("scaling_factor", 0.18215))
    return _decode(pipeline.vae.graph, pipeline.vae.params, latents, scaling_factor)


def to_uint8(images) -> np.ndarray:
    """Images in [0, 1] -> uint8, rounded to the nearest level (halves to even) as in diffusers.

    AegisError for values that are not finite.
    """
    images = np.asarray(images)
    if not np.isfinite(images).all():
        raise AegisError("the images are not finite: lower the guidance, or look at the model's weights")
    return (images * 255).round().astype(np.uint8)


def sample(
    pipeline,
    prompts: str | list[str],
    *,
    seed: int | list[int] = 0,
    steps: int = 25,
    guidance: float = 7.5,
    negative_prompt: str | list[str] = "",
    latents=None,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    progress=None,
) -> np.ndarray:
    """One image per prompt by deterministic DDIM: uint8 (n, H, W, 3).

    seed: a list has one for each prompt, and an image is then what its prompt and seed give alone, wherever they stand
    (up to rounding: another batch may differ by a grey level). With one number for all, image i starts from noise drawn
    from (seed, i), so that images of one prompt differ; image 0 is that of the list [seed]. Seeds count modulo 2**32.
    guidance: classifier-free guidance scale; at 1 or less there is none and the negative prompt has
    no effect. latents: explicit unit-variance start (n, h, w, C) instead of seed and size. height and width: in pixels,
    by default the UNet's own size. batch: images per network call, by
    default as many as `LATENT_PIXELS_PER_CALL` allows (`LATENT_PIXELS_PER_CPU_CALL` on a CPU, where
    calls run side by side). progress(done, total) is called after every denoising step; without it
    the steps run as one program.
    """
    check_loaded(pipeline)
    prompts = prompt_list(prompts, "prompts")
    n = len(prompts)
    timesteps, guidance = plan(pipeline, steps, guidance)
    start = _start(pipeline, n, seed, latents, height, width)
    negative_prompt = "" if negative_prompt is None else negative_prompt  # None: as diffusers reads it
    cond, uncond = _text_pair(pipeline, prompts, negative_prompt if guidance > 1 else None)
    return generate(pipeline, cond, uncond, start, timesteps, guidance, batch=batch, progress=progress)


def plan(pipeline, steps, guidance) -> tuple[np.ndarray, float]:
    """What `sample` goes by: (timesteps, guidance). AegisError for settings, or a VAE, that cannot be."""
    channels, wanted = pipeline.unet.config.get("out_channels", 4), pipeline.vae.config.get("latent_channels", 4)
    if channels != wanted:
        raise AegisError(
            f"the UNet's latents have {channels} channels (out_channels), the VAE's {wanted} (latent_channels): "
            "they do not belong together"
        )
    colours = pipeline.vae.config.get("out_channels", 3)
    if colours != 3:
        raise AegisError(
            f"vae/config.json: out_channels = {colours}, wanted 3, those of a picture; take a model of colour pictures"
        )
    scheduler = schedule_lib.make_schedule(pipeline.scheduler)
    timesteps = schedule_lib.ddim_timesteps(pipeline.scheduler, steps)
    if scheduler.prediction_type == "epsilon" and scheduler.alphas_cumprod[timesteps[0]] <= 0:
        raise AegisError(
            f"scheduler_config.json: rescale_betas_zero_snr leaves pure noise at timestep "
            f"{timesteps[0]}, where an epsilon prediction says nothing; use prediction_type "
            "v_prediction or timestep_spacing leading"
        )
    return timesteps, _checked_guidance(guidance)


def pixels_per_latent(pipeline) -> int:
    """By how much the VAE enlarges either side."""
    return 2 ** (len(pipeline.vae.config.get("block_out_channels", [64])) - 1)


def latent_shape(pipeline, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """(h, w, C) for images of that many pixels; sizes that are None are those which the UNet's config.json states."""
    check_loaded(pipeline)
    channels = _channels(pipeline.unet.config)
    factor = pixels_per_latent(pipeline)
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and not (isinstance(pixels, numbers.Integral) and pixels > 0 and pixels % factor == 0):
            raise AegisError(f"{name} = {pixels!r}, wanted a multiple of {factor} pixels, what the VAE scales by")
    native = unet_config.native_size(pipeline.unet.config)
    if native is None and None in (height, width):
        raise AegisError("unet/config.json: sample_size is missing; pass height and width, or latents, to say the size")
    h, w = (own if pixels is None else int(pixels) // factor for pixels, own in zip((height, width), native or (0, 0)))
    if max(h, w) * factor > MOST_PIXELS:
        raise AegisError(f"width x height are {w * factor} x {h * factor} pixels, wanted at most {MOST_PIXELS} a side")
    return h, w, channels


def _channels(config) -> int:
    channels = config.get("in_channels", 4)
    if channels != config.get("out_channels", 4):
        raise AegisError(
            f"unet/config.json: in_channels = {channels} differs from out_channels = "
            f"{config.get('out_channels', 4)}; such a UNet needs more than a prompt to sample from"
        )
    return channels


def generate(
    pipeline, cond, uncond, z_T, timesteps: np.ndarray, guidance: float, *, batch: int | None = None, progress=None
) -> np.ndarray:
    """`sample` from encoded prompts on: cond and uncond of n rows, z_T (n, h, w, C) -> uint8 (n, H, W, 3).

    uncond None: no guidance. timesteps (steps,); batch and progress as in `sample`.
    """
    n, unet_model, scheduler = len(z_T), pipeline.unet, schedule_lib.make_schedule(pipeline.scheduler)
    on_cpu = jax.default_backend() == "cpu"
    batch = _batch_size(batch, z_T.shape, LATENT_PIXELS_PER_CPU_CALL if on_cpu else LATENT_PIXELS_PER_CALL)
    calls = math.ceil(n / batch)
    # The last batch is filled up with repeats of its last image: one shape, one compilation.
    rows = [np.minimum(np.arange(call * batch, (call + 1) * batch), n - 1) for call in range(calls)]
    report = progress and _Counter(progress, calls * len(timesteps))

    def loop(rows, z, **span):
        pair = jax.tree.map(lambda x: x[rows], (cond, uncond))
        return sample_latents(unet_model.graph, unet_model.params, scheduler, *pair, z, timesteps, guidance, **span)

    def call(rows):
        z = z_T[rows]
        if report is None:
            return jax.block_until_ready(loop(rows, z))
        for k in range(len(timesteps)):
            z = jax.block_until_ready(loop(rows, z, first=k, last=k + 1))
            report()
        return z

    loop(rows[0], z_T[rows[0]], last=0)  # no step: compiles, before several threads would each do so
    latents = jnp.concatenate(side_by_side(call, rows, cores() if on_cpu else 1))
    parts = [to_uint8(decode(pipeline, latents[i : i + batch])) for i in range(0, calls * batch, batch)]
    return np.concatenate(parts)[:n]


class _Counter:
    """Steps done over all calls, told to `progress(done, total)` from whichever thread did the step."""

    def __init__(self, progress, total: int):
        self.progress, self.total, self.done, self.lock = progress, total, 0, threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            self.done += 1
            self.progress(self.done, self.total)


def _text_pair(pipeline, prompts, negative_prompt):
    """cond and uncond, n rows each; uncond is None without a negative prompt."""
    n = len(prompts)
    cond = conditioning.encode(pipeline, prompts)
    _check_text(pipeline, cond.embedding, n)
    if negative_prompt is None:
        return cond, None
    if isinstance(negative_prompt, str):
        return cond, conditioning.per_latent(conditioning.encode(pipeline, negative_prompt), n)
    negative = prompt_list(negative_prompt, "negative_prompt")
    if len(negative) != n:
        raise AegisError(f"negative_prompt has {len(negative)} texts for {n} prompts, wanted one text or {n}")
    return cond, conditioning.encode(pipeline, negative)


@partial(jax.jit, static_argnums=2)
def _noise(keys, numbers, shape):
    """Normal draws (n, *shape), each from its key and number alone; in float32, whatever JAX's default is."""
    draw = lambda key, number: jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)  # noqa: E731
    return jax.vmap(draw)(keys, numbers)


def _start(pipeline, n, seed, latents, height=None, width=None):
    """z_T (n, h, w, C), unit variance."""
    _channels(pipeline.unet.config)
    if latents is not None:
        if (height, width) != (None, None):
            raise AegisError("height and width do not go with latents: their shape says the size")
        return _checked_latents(pipeline, latents, n)
    shape = latent_shape(pipeline, height, width)
    each = isinstance(seed, (list, tuple)) or np.ndim(seed) == 1
    if each and len(seed) != n:
        raise AegisError(f"seed has {len(seed)} numbers for {n} prompts, wanted one number or {n}")
    try:
        seeds = [operator.index(one) for one in (seed if each else [seed])]
    except TypeError:
        raise AegisError(f"seed = {seed!r}, wanted a whole number, or a list of one for each prompt") from None
    return noise_of(seeds, shape) if each else noise_of(seeds * n, shape, np.arange(n, dtype=np.int32))


def noise_of(seeds: list[int], shape: tuple[int, ...], numbers=None) -> jax.Array:
    """The start noise that `sample` takes for a list of seeds, (n, *shape): each image's of its own seed alone.

    Seeds count modulo 2**32. numbers: (n,) int32, with one seed for all images, each image's place among them.
    """
    # The generator is named: others (JAX_DEFAULT_PRNG_IMPL) may draw by the place in a batch.
    keys = jnp.stack([jax.random.key(np.uint32(one % 2**32), impl="threefry2x32") for one in seeds])
    return _noise(keys, np.zeros(len(seeds), np.int32) if numbers is None else numbers, shape)


def _batch_size(batch, start_shape, pixels: int) -> int:
    n, height, width, _ = start_shape
    if batch is None:
        fits = max(1, pixels // (height * width))
        return min(n, fits, MOST_IMAGES_PER_CALL)
    if isinstance(batch, bool) or not isinstance(batch, numbers.Integral) or batch < 1:
        raise AegisError(f"batch = {batch!r}, wanted a whole number of at least 1")
    return min(n, int(batch))


def _as_float(array, name) -> jax.Array:
    try:
        return jnp.asarray(array, jnp.float32)
    except (TypeError, ValueError):
        raise AegisError(f"{name} is not an array of numbers") from None


def _checked_guidance(guidance) -> float:
    try:
        value = float(guidance)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= float(jnp.finfo(jnp.float32).max):
        raise AegisError(f"guidance = {guidance!r}, wanted a finite float32 number")
    return value


def _checked_latents(pipeline, latents, n) -> jax.Array:
    latents = _as_float(latents, "latents")
    channels = pipeline.unet.config.get("in_channels", 4)
    wanted = f"({'n' if n is None else n}, h, w, {channels})"
    fits = latents.ndim == 4 and latents.shape[-1] == channels and 0 not in latents.shape
    if not fits or (n is not None and len(latents) != n):
        raise AegisError(f"latents have shape {latents.shape}, wanted {wanted}: channels come last")
    return latents


def text_widths(config: dict) -> set[int]:
    """Of the text that a UNet's attention takes, by its config.json; of a list only the entries that are in use."""
    c = unet_config.check(config)
    down, up, middle = c["down_block_types"], c["up_block_types"][::-1], str(c["mid_block_type"])
    blocks = [*enumerate(down), *enumerate(up), (len(down) - 1, middle)]
    used = [stage for stage, kind in blocks if "CrossAttn" in kind and c["transformer_layers_per_block"][stage]]
    return {c["cross_attention_dim"][stage] for stage in used}


def _check_text(pipeline, text_emb: jax.Array, n) -> None:
    config = pipeline.unet.config
    if text_emb.ndim != 3 or text_emb.shape[0] != n or text_widths(config) - {text_emb.shape[2]}:
        width = config.get("cross_attention_dim", 1280)
        raise AegisError(
            f"text embedding has shape {text_emb.shape}, wanted ({n}, L, {width}): one per latent, "
            "as wide as the UNet's cross_attention_dim"
        )
