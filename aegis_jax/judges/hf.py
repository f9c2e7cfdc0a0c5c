"""`hf:FOLDER` and `hf:NAME/NAME`: any image classifier of Hugging Face transformers, in PyTorch.

The field's are of this kind: microsoft/resnet-50 for objects (`hf:microsoft/resnet-50`, ImageNet's labels) and a
ViT-base fine-tuned on WikiArt for styles. Pictures are prepared as the model's own preprocessor_config.json says.
"""

import importlib.metadata

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import hub
from aegis_jax.io.folder import read_json
from aegis_jax.judges import take
from aegis_jax.judges.judge import Judge, digest

_BATCH = 32


def load(what: str, options: dict[str, str]) -> Judge:
    """Options: top, how many of the largest labels count as shown (1); revision, of a hub id; device, PyTorch's (cpu).

    A model of several labels at once (problem_type multi_label_classification) shows each from 0.5 on.
    """
    values = take(options, top=int, revision=str, device=str)
    torch, transformers = _imported()
    if not what:
        raise AegisError("say which: hf:FOLDER, or a hub id, hf:NAME/NAME")
    folder = hub.locate_model(what, revision=values.get("revision"))
    network, processor = _opened(transformers, folder)
    network = _on(network.eval(), values.get("device", "cpu"))
    several = network.config.problem_type == "multi_label_classification"
    labels = _labels(network.config)
    if len(labels) == 1 and not several:
        raise AegisError(
            f"{folder} has one label, {labels[0]!r}, and says of no picture that it is without it: wanted two, or in "
            'its config.json "problem_type": "multi_label_classification" for one that is shown from 0.5 on'
        )

    @torch.no_grad()
    def logits(images: np.ndarray):
        for i in range(0, len(images), _BATCH):
            part = list(images[i : i + _BATCH])
            pixels = processor(images=part, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
            yield network(pixel_values=pixels.to(network.device, network.dtype)).logits.float()

    def compute(images: np.ndarray) -> np.ndarray:
        squash = torch.sigmoid if several else lambda scores: scores.softmax(-1)
        return torch.cat([squash(scores) for scores in logits(images)]).cpu().numpy()

    def features(images: np.ndarray) -> np.ndarray:
        kept = []
        head = _head(torch, network, len(labels), folder)
        with head.register_forward_pre_hook(lambda _, x: kept.append(x[0])):
            for _ in logits(images):
                pass
        return torch.cat(kept).float().cpu().numpy()

    return Judge(
        name="hf:" + what + ("?" + "&".join(f"{key}={text}" for key, text in options.items()) if options else ""),
        labels=labels,
        compute=compute,
        digest=digest(hub.model_weights(folder)),
        thresholds=dict.fromkeys(labels, 0.5) if several else None,
        groups=tuple((label,) for label in labels) if several else (),
        top=values.get("top", 1),
        features=features,
        about={
            "architecture": type(network).__name__,
            "processor": type(processor).__name__,
            "settings_sha256": digest(hub.model_settings(folder)),
        }
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    )


def _imported():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise AegisError(f"{error}: pip install 'aegis_jax[torch]'") from None
    return torch, transformers


def _opened(transformers, folder):
    """The network and its processor. Raises `AegisError` where the folder's is no image classifier."""
    config = read_json(folder / "config.json")
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        network, told = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="float32", output_loading_info=True
        )
        # With torchvision installed another backend would be taken, whose resizing differs a little.
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise AegisError(f"{folder} cannot be read as an image classifier ({reason})") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    absent = sorted(told["missing_keys"])
    if absent:
        raise AegisError(
            f"{folder} is no image classifier: a {config.get('architectures')} without {absent[0]!r}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
        )
    return network, processor


def _on(network, device: str):
    if device.partition(":")[0] == "meta":  # PyTorch has that one, but nothing is computed on it
        raise AegisError(f"option device={device!r}: PyTorch has none of that name that computes")
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a PyTorch without it
        raise AegisError(f"option device={device!r}: PyTorch has none ({' '.join(str(error).split())[:100]})") from None


def _labels(config) -> tuple[str, ...]:
    """Names by index; of names that occur more than once, as ImageNet's "crane", each has its index behind it."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names))


def _head(torch, network, count: int, folder):
    """The last layer, whose input are the features."""
    found = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m.out_features == count]
    if not found:
        raise AegisError(f"{folder}: a {type(network).__name__} has no last dense layer, so it gives no features")
    return found[-1]
