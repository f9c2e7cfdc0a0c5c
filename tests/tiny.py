"""Tiny random Stable Diffusion pipelines, written by PyTorch diffusers: the tests' reference."""

import json
import pathlib

WORDS = (
    "a an the of in on and photo painting red blue green star circle heart square church dog cat "
    "striped plain dotted background sky"
).split()
# Entries of the configs of a pipeline with the fewest layers that still have cross-attention, for fast compilation.
FEWEST = {
    "unet": {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
    },
    "text": {"num_hidden_layers": 1},
}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols():
    """The 256 printable characters that stand for bytes in CLIP's BPE, in vocabulary order."""
    keep = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    chars = [chr(b) for b in keep]
    return chars + [chr(256 + n) for n in range(256 - len(keep))]


def vocabulary():
    """(vocab, merges) of a CLIP BPE: all bytes, all bytes at a word's end, WORDS as one token each.

    "!" has id 0 as in CLIP's own vocabulary, which is what SD 2.x pads with.
    """
    symbols = byte_symbols()
    pieces = symbols + [s + "</w>" for s in symbols]
    merges, seen = [], set(pieces)
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, joined = (parts[0], parts[1]), parts[0] + parts[1]
            if pair not in merges:
                merges.append(pair)
            if joined not in seen:
                seen.add(joined)
                pieces.append(joined)
            parts = [joined, *parts[2:]]
    pieces += [BOS, EOS]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def tiny_tokenizer(folder, *, pad="<|endoftext|>", max_length=77, form="slow"):
    """Writes a CLIP tokenizer folder.

    form: "slow" (vocab.json + merges.txt), "fast" (tokenizer.json) or "both".
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    if form in ("fast", "both"):
        from transformers import CLIPTokenizer

        CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=max_length).save_pretrained(folder)
    if form in ("slow", "both"):
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if form == "slow":
        # The layout of the SD 1.x and 2.x repositories, written by transformers 4.
        word = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        special = {
            "bos_token": {"content": BOS, **word},
            "eos_token": {"content": EOS, **word},
            "pad_token": pad,
            "unk_token": {"content": EOS, **word},
        }
        config = {
            "add_prefix_space": False,
            "bos_token": {"__type": "AddedToken", "content": BOS, **word},
            "do_lower_case": True,
            "eos_token": {"__type": "AddedToken", "content": EOS, **word},
            "errors": "replace",
            "model_max_length": max_length,
            "name_or_path": "tiny",
            "pad_token": pad,
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {"__type": "AddedToken", "content": EOS, **word},
        }
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def tiny_models(*, v_prediction=False, linear_projection=False, seed=0, unet=None, vae=None, text=None):
    """Random torch modules (unet, vae, text_encoder); the dicts override single config entries."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vocab, _ = vocabulary()
    torch.manual_seed(seed)
    unet_config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
        "use_linear_projection": linear_projection or v_prediction,
    }
    vae_config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 16,
    }
    text_config = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if v_prediction else "quick_gelu",
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": 0 if v_prediction else vocab[EOS],
    }
    models = (
        UNet2DConditionModel(**{**unet_config, **(unet or {})}),
        AutoencoderKL(**{**vae_config, **(vae or {})}),
        CLIPTextModel(CLIPTextConfig(**{**text_config, **(text or {})})),
    )
    with torch.no_grad():  # norms and biases start at 1 and 0, where a swap of two tensors would not show
        for model in models:
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return tuple(model.eval() for model in models)


def responsive(pipeline):
    """An untrained pipeline of ours whose predictions differ visibly from prompt to prompt.

    As drawn they do by a thousandth, so that a loss, a difference of two, keeps three digits fewer than float32 has.
    """
    import dataclasses

    from aegis_jax.models.model import flatten, unflatten

    params = {path: 30 * x if ".attn2.to_v." in path else x for path, x in flatten(pipeline.unet.params).items()}
    return dataclasses.replace(pipeline, unet=dataclasses.replace(pipeline.unet, params=unflatten(params)))


def tiny_pipeline(
    folder,
    *,
    v_prediction=False,
    linear_projection=False,
    dtype="float32",
    sharded=False,
    variant=None,
    old_vae_names=False,
    text_prefix=True,
    position_ids=False,
    tokenizer="slow",
    safety_checker=False,
    scheduler=None,
    seed=0,
    unet=None,
    vae=None,
    text=None,
):
    """Writes a small random Stable Diffusion as a diffusers folder and returns its path.

    v_prediction: shaped like SD 2.1 (v-prediction, linear projections, gelu, "!" as padding).
    dtype: of the files. sharded: weights in several files of at most about 400 kB with an index.
    old_vae_names: query/key/value/proj_attn. text_prefix: CLIP keys begin with "text_model." as
    published files do. position_ids: CLIP's non-parameter buffer is in the file. tokenizer: "slow"
    (vocab.json + merges.txt), "fast" (tokenizer.json) or "both". scheduler, unet, vae, text: dicts
    that override single config entries.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = pathlib.Path(folder)
    models = tiny_models(
        v_prediction=v_prediction,
        linear_projection=linear_projection,
        seed=seed,
        unet=unet,
        vae=vae,
        text=text,
    )
    unet_model, vae_model, text_model = (torch.nn.Module.to(model, getattr(torch, dtype)) for model in models)
    scheduler_config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
    }
    tokenizer_folder = tiny_tokenizer(folder / "tokenizer", pad="!" if v_prediction else EOS, form=tokenizer)
    from transformers import CLIPTokenizer

    written = {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}
    checker, extractor = _safety_checker(getattr(torch, dtype)) if safety_checker else (None, None)
    StableDiffusionPipeline(
        unet=unet_model,
        vae=vae_model,
        text_encoder=text_model,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        scheduler=DDIMScheduler(**{**scheduler_config, **(scheduler or {})}),
        safety_checker=checker,
        feature_extractor=extractor,
        requires_safety_checker=safety_checker,
    ).save_pretrained(folder, max_shard_size="400kB" if sharded else "10GB", variant=variant)
    for path in tokenizer_folder.iterdir():  # save_pretrained rewrites them; keep the form that was asked for
        path.unlink()
    for name, content in written.items():
        (tokenizer_folder / name).write_bytes(content)
    rename_tensors(folder / "text_encoder", lambda key: _clip_name(key, text_prefix))
    if position_ids:
        name = ("text_model." if text_prefix else "") + "embeddings.position_ids"
        _add_position_ids(folder / "text_encoder", name, 77)
    if old_vae_names:
        rename_tensors(folder / "vae", _old_vae_name)
    return folder


def _safety_checker(dtype):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 8},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    return StableDiffusionSafetyChecker(config).to(dtype), CLIPImageProcessor()


def _clip_name(key, prefix):
    bare = key.removeprefix("text_model.")
    return "text_model." + bare if prefix else bare


def _old_vae_name(key):
    if ".attentions." not in key:
        return key
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in pairs.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def rename_tensors(folder, rename):
    """Passes the keys of a component folder's safetensors files and index through `rename`."""
    from safetensors.torch import load_file, save_file

    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors = load_file(path)
        if any(rename(key) != key for key in tensors):
            save_file({rename(key): value for key, value in tensors.items()}, path, {"format": "pt"})
    for path in pathlib.Path(folder).glob("*.index*.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {rename(key): name for key, name in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _add_position_ids(folder, name, length):
    import torch
    from safetensors.torch import load_file, save_file

    path = min(pathlib.Path(folder).glob("*.safetensors"))
    save_file({**load_file(path), name: torch.arange(length)[None]}, path, {"format": "pt"})
    for index_path in pathlib.Path(folder).glob("*.index*.json"):
        index = json.loads(index_path.read_text())
        index["weight_map"][name] = path.name
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
