"""A tiny random CLIPModel with tokenizer and preprocessor, written by transformers: the tests' reference."""

import json
import pathlib

from tests.tiny import BOS, EOS, tiny_tokenizer, vocabulary

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 40}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def tiny_clip(folder, *, eos=None, preprocessor=PREPROCESSOR, **vision):
    """Writes the folder and returns transformers' model. eos: the text config's; vision: entries of the other's."""
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocab, _ = vocabulary()
    text = {
        "vocab_size": len(vocab), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": 16, "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS] if eos is None else eos,
    }  # fmt: skip
    seen = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "initializer_factor": 3.0,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text | {"initializer_factor": 3.0}, vision_config=seen | vision,
                                 projection_dim=20)).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms, biases and the class embedding would not show a swap
                offset = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))
    folder = pathlib.Path(folder)
    tiny_tokenizer(folder, max_length=16)
    model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model
