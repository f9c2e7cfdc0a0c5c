"""CLIPTextModel against transformers: outputs and gradients, float32 on the CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.models import clip
from aegis_jax.models import model as model_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.parity import compare, torch_weights  # noqa: E402

BOS, EOS = 98, 99
SD14 = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "projection_dim": 32,
    "attention_dropout": 0.1,
}
# name: (config, words in each prompt)
CASES = {
    "sd14": (SD14, [5, 0, 75]),
    "sd21": ({**SD14, "hidden_act": "gelu", "num_hidden_layers": 4, "num_attention_heads": 2}, [3]),
    "one_head_large_eps": ({**SD14, "num_attention_heads": 1, "layer_norm_eps": 1e-2}, [2, 9]),
    "head_per_four_channels": ({**SD14, "num_attention_heads": 8, "intermediate_size": 30}, [2]),
    "short_positions_relu": ({**SD14, "max_position_embeddings": 12, "hidden_act": "relu"}, [4]),
    "tanh_gelu_one_layer": (
        {**SD14, "hidden_act": "gelu_new", "num_hidden_layers": 1, "hidden_size": 24},
        [1, 2, 3],
    ),
    "silu": ({**SD14, "hidden_act": "silu", "num_hidden_layers": 2, "vocab_size": 300}, [8]),
}


def reference(config):
    torch.manual_seed(1)
    # Twice its usual initial weights, so that attention is far from uniform.
    config = {**config, "initializer_factor": 2.0}
    module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    return torch_weights.randomise(module, 1)


def body(module):
    """transformers 5 dropped the `text_model.` level that its files keep: put it back."""
    if hasattr(module, "text_model"):
        return module
    wrapper = torch.nn.Module()
    wrapper.text_model = module
    return wrapper


def prompts(config, words):
    """Ids (B, L): BOS, some words, EOS, then padding; SD 1.x pads with EOS, SD 2.x with 0."""
    length = config["max_position_embeddings"]
    pad = EOS if config["hidden_act"] == "quick_gelu" else 0
    generator = np.random.default_rng(3)
    rows = [[BOS, *generator.integers(1, 98, n), EOS] + [pad] * (length - n - 2) for n in words]
    return np.array(rows, np.int32)


def run_torch(module, ids):
    """(last hidden state, token embeddings before positions, kept for their gradient)."""
    kept = []
    table = body(module).text_model.embeddings.token_embedding
    handle = table.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), kept.append(out))[1])
    try:
        output = module(torch.from_numpy(ids).long()).last_hidden_state
    finally:
        handle.remove()
    return output, kept[0]


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    config, words = CASES[name]
    module = reference(config)
    ids = prompts(config, words)
    wanted, embeddings = run_torch(module, ids)
    weights = np.random.default_rng(2).standard_normal(wanted.shape, np.float32)
    (wanted * torch.from_numpy(weights)).sum().backward()

    graph, params = compare.ours(clip.CLIPTextModel, config, body(module))
    found_embeddings = clip.embed(graph, params, jnp.asarray(ids))
    np.testing.assert_array_equal(found_embeddings, embeddings.detach().numpy())
    found, (params_grad, tokens_grad) = compare.value_and_gradients(
        lambda params, tokens: clip.encode(graph, params, tokens),
        params,
        found_embeddings,
        weights=weights,
    )
    compare.assert_output(found, wanted.detach().numpy(), f"clip {name}")
    gradients = model_lib.flatten(params_grad) | {"token embeddings": tokens_grad}
    wanted_gradients = torch_weights.gradients(body(module)) | {"token embeddings": embeddings.grad.numpy()}
    # Ours enters after the table: its gradient is checked through the token embeddings.
    table = "text_model.embeddings.token_embedding.embedding"
    assert not np.any(gradients.pop(table)) and np.any(wanted_gradients.pop(table))
    compare.assert_gradients(gradients, wanted_gradients, f"clip {name}")


def test_23_layers_as_in_sd21():
    """Outputs only: the gradient's program would take longer to compile than all the others."""
    config = {**SD14, "hidden_act": "gelu", "num_hidden_layers": 23, "hidden_size": 16}
    module = reference(config)
    ids = prompts(config, [3, 20])
    wanted, _ = run_torch(module, ids)
    graph, params = compare.ours(clip.CLIPTextModel, config, body(module))
    found = compare.compiled(
        lambda params, ids: clip.encode(graph, params, clip.embed(graph, params, ids)), params, ids
    )
    compare.assert_output(found, wanted.detach().numpy(), "clip 23 layers")


def test_states_up_to_eos_do_not_see_what_follows():
    """The state at a prompt's real EOS position is that of the prompt alone, whatever pads it."""
    module = reference(SD14)
    ids = prompts(SD14, [5])
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids[:, :7]).long()).last_hidden_state.numpy()
    graph, params = compare.ours(clip.CLIPTextModel, SD14, body(module))
    padded_with_0 = np.where(np.arange(77) < 7, ids, 0)
    both = np.concatenate([ids, padded_with_0])
    for rows in (both, ids[:, :7]):
        states = compare.compiled(
            lambda params, ids: clip.encode(graph, params, clip.embed(graph, params, ids)),
            params,
            rows,
        )
        for row in states:
            np.testing.assert_allclose(row[:7], wanted[0], atol=1e-5)


def test_soft_tokens_enter_between_embedding_and_encoding():
    """Embeddings of no word at all go through as transformers treats a new word with that row."""
    module = reference(SD14)
    ids = prompts(SD14, [5])
    graph, params = compare.ours(clip.CLIPTextModel, SD14, body(module))
    soft = np.random.default_rng(0).standard_normal((2, 32), np.float32)
    tokens = clip.embed(graph, params, jnp.asarray(ids)).at[0, 1:3].set(soft)
    found = clip.encode(graph, params, tokens)
    with torch.no_grad():
        table = body(module).text_model.embeddings.token_embedding
        table.weight[[41, 42]] = torch.from_numpy(soft)
        ids[0, 1:3] = 41, 42
        assert not {41, 42} & set(ids[0, 3:].tolist())
        wanted = module(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    compare.assert_output(found, wanted, "clip soft tokens")


def test_vision_towers_encoder_is_not_causal():
    """`CLIPEncoder` without the mask against the encoder of transformers' CLIPVisionModel."""
    config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**config, image_size=4, patch_size=2, hidden_act="gelu")
    )
    encoder = torch_weights.randomise(getattr(vision, "vision_model", vision).encoder, 1)
    x = np.random.default_rng(0).standard_normal((2, 5, 16), np.float32)
    with torch.no_grad():
        wanted = encoder(inputs_embeds=torch.from_numpy(x)).last_hidden_state.numpy()
    graph, params = compare.ours(clip.CLIPEncoder, {**config, "hidden_act": "gelu"}, encoder)
    found = compare.compiled(lambda params, x: model_lib.bind(graph, params)(x, causal=False), params, x)
    compare.assert_output(found, wanted, "clip vision encoder")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "snake"},
        {"num_attention_heads": 5},
        {"use_attention_mask": True},
    ],
    ids=lambda change: "-".join(change),
)
def test_unsupported_options_are_refused_by_name(change):
    name = "heads" if "num_attention_heads" in change else list(change)[-1]
    with pytest.raises(AegisError, match=name):
        model_lib.abstract(clip.CLIPTextModel, {**SD14, **change})
