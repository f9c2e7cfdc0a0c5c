"""Loading and saving a Stable Diffusion folder: aegis_jax against PyTorch diffusers, time and peak memory.

  python -m benchmarks pipeline_io [--size small] [--dtype float16] [--rounds 5] [--folder DIR]

The folder has the shapes of SD 1.4 (UNet of 859,520,964 parameters, VAE, CLIP, a vocabulary of its size) and random
weights. Both sides load and save in the files' own dtype, from a warm page cache: every trial first reads the files
once. Both return before the weights are in memory (diffusers maps the files, ours reads them in a thread); therefore
`load` is given as returned and, comparably, with every byte of the weights read. Every UNet tensor is then multiplied
by 1.5; this is given too, because the weights of diffusers are still pages of the files until they are first written,
which training does. Then the pipeline is saved, as returned and, comparably, with all files on the disk (our own save
always ends there). The comparable figures are given in processor time as well (all threads), which other work disturbs
less. Memory is the process's resident high-water mark, mapped pages included, above what the imports left, in units of
the weights' size. Both sides must report the same bits of the loaded and of the saved weights.

diffusers loads by another, quicker way if accelerate is installed; whether it was is in the result.
"""

import hashlib
import json
import os
import pathlib
import shutil
import string
import sys
import tempfile
import time

from aegis_jax.plan import stable_diffusion as sd_configs
from benchmarks import trials

# Keys of the UNet whose bits both sides must agree on: a convolution, a dense layer, an attention key, a bias.
CHECKED = (
    "conv_in.weight",
    "down_blocks.0.resnets.0.conv1.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "up_blocks.1.resnets.0.time_emb_proj.weight",
    "conv_out.bias",
)
FACTOR = 1.5  # exact to 1 ulp in any order, so both sides give the same bits
TEXT = sd_configs.text_encoder() | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as SD 1.4's folder says
SMALL = {  # about 108 million parameters in the UNet, 130 in all
    "unet": {"block_out_channels": [128, 256, 448, 448], "cross_attention_dim": 256},
    "vae": {"block_out_channels": [64, 128, 128, 128]},
    "text_encoder": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4},
}
TINY = {  # for the tests
    "unet": {"block_out_channels": [32, 32, 32, 32], "cross_attention_dim": 32, "layers_per_block": 1},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 640,
    },
}  # fmt: skip
SIZES = {"full": {}, "small": SMALL, "tiny": TINY}


def make(folder: pathlib.Path, size: str, dtype: str, seed: int = 0) -> dict[str, int]:
    """Writes the folder; returns the number of parameters of each model."""
    import jax
    import numpy as np

    from aegis_jax.io.export import save_pipeline
    from aegis_jax.io.pipeline import MODELS, Pipeline
    from aegis_jax.io.tokenizer import Tokenizer
    from aegis_jax.models import model

    rng = np.random.default_rng(seed)

    def draw(leaf):
        weights = rng.standard_normal(leaf.shape, np.float32)
        weights *= 0.02
        return weights.astype(dtype)

    models, counts = {}, {}
    for name, config in (("unet", sd_configs.unet()), ("vae", sd_configs.VAE), ("text_encoder", TEXT)):
        abstract = model.abstract(MODELS[name], config | SIZES[size].get(name, {}))
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        models[name] = model.Model(abstract.config, abstract.graph, jax.tree.map(draw, abstract.params))
    with tempfile.TemporaryDirectory() as scratch:
        letters = "ab" if size == "tiny" else string.ascii_lowercase + string.digits
        tokenizer = _tokenizer(pathlib.Path(scratch), letters)
        pipeline = Pipeline(**models, tokenizer=Tokenizer(tokenizer), scheduler=sd_configs.SCHEDULER)
        save_pipeline(pipeline, folder, dtype=dtype)
    return counts


def _tokenizer(folder: pathlib.Path, letters: str) -> pathlib.Path:
    """A CLIP tokenizer of all words of three letters: with 36 letters 48,466 tokens, near CLIP's 49,408."""
    from aegis_jax.world import tokenizer

    tokenizer.write(folder, [a + b + c for a in letters for b in letters for c in letters])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    return folder


class Ours:
    """aegis_jax behind the calls that a trial makes."""

    def __init__(self):
        import jax
        import jax.numpy as jnp
        from transformers import CLIPTokenizer  # noqa: F401  imported lazily, this would else be counted as loading

        from aegis_jax.io import export, pipeline

        jax.block_until_ready(jnp.zeros(3) + 1)  # the backend is up
        self.jax, self.export, self.io = jax, export, pipeline

    def load(self, folder, dtype):
        pipeline = self.io.load_pipeline(folder, dtype=dtype)
        pipeline.tokenizer.tokens("a")  # read at first use; diffusers reads it at once
        return pipeline

    def arrays(self, pipeline):
        import numpy as np

        models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        return [np.asarray(leaf) for model in models for leaf in self.jax.tree.leaves(model.params)]

    def scale_unet(self, pipeline):
        """In place of the old tree, tensor by tensor, as memory allows one tensor only."""
        import numpy as np

        def walk(node):
            for name, child in node.items():
                if isinstance(child, dict):
                    walk(child)
                else:
                    scaled = np.asarray(child) * np.asarray(FACTOR, child.dtype)
                    node[name] = self.jax.device_put(scaled).block_until_ready()

        walk(pipeline.unet.params)

    def save(self, pipeline, folder):
        self.export.save_pipeline(pipeline, folder)

    def checked(self, pipeline):
        import numpy as np

        from aegis_jax.models import layout, model

        leaves = {layout.torch_key(p): (p, leaf) for p, leaf in model.flatten(pipeline.unet.params).items()}
        return [layout.to_torch(p, np.asarray(leaf)) for p, leaf in (leaves[key] for key in CHECKED)]


class Diffusers:
    """PyTorch diffusers behind the same calls."""

    def __init__(self):
        import diffusers
        import torch
        import transformers
        from diffusers import StableDiffusionPipeline

        # Bars cost time and say nothing here.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()
        # Imported lazily, these would else be counted as loading.
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

        self.torch, self.kind = torch, StableDiffusionPipeline

    def load(self, folder, dtype):
        return self.kind.from_pretrained(folder, dtype=getattr(self.torch, dtype), local_files_only=True)

    def arrays(self, pipeline):
        models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        return [parameter.detach().numpy() for model in models for parameter in model.parameters()]

    def scale_unet(self, pipeline):
        with self.torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter.mul_(FACTOR)

    def save(self, pipeline, folder):
        pipeline.save_pretrained(folder)

    def checked(self, pipeline):
        parameters = dict(pipeline.unet.named_parameters())
        return [parameters[key].detach().numpy() for key in CHECKED]


SIDES = {"aegis_jax": Ours, "diffusers": Diffusers}


def one(side: str, folder: pathlib.Path, scratch: pathlib.Path, dtype: str) -> dict:
    """One trial, in this process: load, read, change, save, save to the disk."""
    for file in sorted(folder.rglob("*.safetensors")):  # the page cache is warm
        with open(file, "rb") as handle:
            while handle.read(1 << 24):
                pass
    library, destination = SIDES[side](), scratch / "saved"
    memory = HighWater()
    began, began_cpu = time.perf_counter(), time.process_time()
    pipeline = library.load(folder, dtype)
    loaded = time.perf_counter()
    arrays = library.arrays(pipeline)
    touched = sum(float(array.sum(dtype="float32")) for array in arrays)
    read, read_cpu = time.perf_counter(), time.process_time()
    size = sum(array.nbytes for array in arrays)
    del arrays
    load_peak = memory.above()
    bits = _digest(library.checked(pipeline))
    scaling = time.perf_counter()
    library.scale_unet(pipeline)
    scaled = time.perf_counter()
    memory.restart()
    ready, ready_cpu = time.perf_counter(), time.process_time()
    library.save(pipeline, destination)
    saved = time.perf_counter()
    sync(destination)
    synced, synced_cpu = time.perf_counter(), time.process_time()
    save_peak = memory.above()
    result = {
        "load_s": loaded - began,
        "load_and_read_s": read - began,
        "load_and_read_cpu_s": read_cpu - began_cpu,
        "scale_s": scaled - scaling,
        "save_s": saved - ready,
        "save_to_disk_s": synced - ready,
        "save_to_disk_cpu_s": synced_cpu - ready_cpu,
        "load_peak": load_peak / size,
        "save_peak": save_peak / size,
        "weights_bytes": size,
        "touched": str(touched),
        "bits": [bits, _saved_digest(destination)],
    }
    shutil.rmtree(destination)
    return result


class HighWater:
    """The resident high-water mark above what this process had at the start."""

    def __init__(self):
        self.start = trials.memory("VmRSS")
        self.restart()

    def restart(self):
        trials.restart_high_water()

    def above(self) -> int:
        return trials.memory("VmHWM") - self.start


def sync(folder: pathlib.Path) -> None:
    """All files of a folder on the disk."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _saved_digest(folder: pathlib.Path) -> str:
    from safetensors import safe_open

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "np") as file:
        return _digest(file.get_tensor(key) for key in CHECKED)


ROWS = {
    "load_s": "load, as returned (s)",
    "load_and_read_s": "load, every byte read (s)",
    "load_and_read_cpu_s": "load, every byte read (processor s)",
    "scale_s": "first change of the UNet (s)",
    "save_s": "save, as returned (s)",
    "save_to_disk_s": "save, files on the disk (s)",
    "save_to_disk_cpu_s": "save, files on the disk (processor s)",
    "load_peak": "peak memory of load (x weights)",
    "save_peak": "peak memory of save (x weights)",
}


def compared(results: dict[str, list[dict]]) -> dict:
    """Figures and ratios; raises SystemExit if the sides' bits differ."""
    if len({json.dumps(result["bits"]) for results in results.values() for result in results}) > 1:
        raise SystemExit("the two sides do not hold the same weights: no times are given")
    return {
        "figures": {side: trials.figures(found) for side, found in results.items()},
        "ratios": {key: trials.ratio(results["aegis_jax"], results["diffusers"], key) for key in ROWS},
        "trials": results,
    }


def text(result: dict) -> str:
    ours, theirs = (result["figures"][side] for side in SIDES)
    rows = [
        [label, trials.shown(ours[key]), trials.shown(theirs[key]), trials.shown(result["ratios"][key])]
        for key, label in ROWS.items()
    ]
    accelerate = result["about"]["versions"]["accelerate"]
    note = f"accelerate {accelerate}" if accelerate else "WITHOUT accelerate: install it for diffusers' quick way"
    weights = ours["weights_bytes"]["median"] / 1e9
    return (
        trials.table(["median (10-90 %)", "aegis_jax", "diffusers", "aegis_jax / diffusers"], rows)
        + f"\n\n{weights:.2f} GB of weights ({result['dtype']}), warm page cache, diffusers {note}"
    )


def main(argv) -> None:
    parser = trials.parser(__doc__, "pipeline_io_cpu.json", rounds=5, sides=[*SIDES, "make"])
    parser.add_argument("--size", choices=SIZES, default="full", help="of the model (default: SD 1.4's)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the model here, and use it if it is there")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        if args.side == "make":
            return trials.report(parameters=make(args.folder, args.size, args.dtype))
        if args.side:
            return trials.report(**one(args.side, args.folder, scratch, args.dtype))
        result = {"about": trials.about(), "dtype": args.dtype, "size": args.size}
        options = [*argv, "--folder", args.folder or scratch / "model"]
        if not pathlib.Path(options[-1]).exists():  # by a process of its own, whose memory goes with it
            ((made,),) = trials.by_sides("pipeline_io", ["make"], options, 1).values()
            print(f"made {options[-1]}: {made['parameters']}", file=sys.stderr)
        result |= compared(trials.by_sides("pipeline_io", SIDES, options, args.rounds))
    print(text(result))
    trials.write(args.out, result)
