"""Random small models that transformers made: the same log-probabilities, routes and gradients.

    pytest -m parity tests/interop/hugging_face/test_parity.py -n 0

YaRN's original context is 16 tokens here, and rows are 48 long: an error of either mscale, or of a
frequency, appears at late positions.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.data.tokens import TokenArray
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.assemble import arrays_by_name
from moe_jax.interop.hugging_face import load_model, save
from moe_jax.model.abstract import graph_of
from moe_jax.model.parameters import role_of
from moe_jax.runs.sliding import sliding_bits_per_byte
from tests.interop import folder as small
from tests.interop.hugging_face.test_save import MODELS, TOKENIZER, random_states

pytestmark = pytest.mark.parity

LENGTH = 48
TOLERANCE = 1e-4
"""Of log-probabilities in float32: sums of a few hundred products round in another order."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
SHARED = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "bos_token_id": 261,
    "eos_token_id": 260,
    "pad_token_id": None,
    "attn_implementation": "eager",
    "experts_implementation": "eager",  # torch's grouped product wants multiples of 16 bytes
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
}
GROUPED = {"n_group": 4, "topk_group": 2}


def mscales(mscale, all_dim):
    return {"rope_parameters": {**YARN, "mscale": mscale, "mscale_all_dim": all_dim}}


CASES = {
    "llama": ("Llama", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "head_dim": 8,
            "num_experts": 6,
            "mlp_only_layers": [0],
            "rope_parameters": YARN,
        },
    ),
    "qwen3_moe, normalised": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "head_dim": 8,
            "num_experts": 6,
            "norm_topk_prob": True,
            "rope_parameters": PLAIN,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "head_dim": 8, "rope_parameters": YARN}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "rope_parameters": YARN}),
    "glm4_moe": (
        "Glm4Moe",
        {
            **EXPERTS,
            **GROUPED,
            "n_routed_experts": 8,
            "use_qk_norm": True,
            "partial_rotary_factor": 1.0,
            "rope_parameters": {**YARN, "partial_rotary_factor": 1.0},
            "head_dim": 8,
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, **mscales(0.707, 0.707), "routed_scaling_factor": 1.0},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            **GROUPED,
            **mscales(0.5, 1.2),
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **GROUPED, **mscales(1.0, 1.0)}),
    "deepseek_v3, not interleaved": (
        "DeepseekV3",
        {
            **LATENT,
            **GROUPED,
            **mscales(1.3, 0.4),
            "rope_interleave": False,
            "norm_topk_prob": False,
        },
    ),
}
SPARSE = [case for case in CASES if case not in ("llama", "qwen3")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """case -> (transformers' model, ours), each made once."""
    import torch
    import transformers

    cache = {}

    def make(case):
        if case not in cache:
            name, fields = CASES[case]
            config = getattr(transformers, f"{name}Config")(**(SHARED | fields))
            torch.manual_seed(0)
            theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            with torch.no_grad():
                for key, tensor in theirs.state_dict().items():
                    if key.endswith("e_score_correction_bias"):
                        tensor.normal_(std=0.1)  # 0 would not show whether it is read
                    elif key.endswith("norm.weight") or "layernorm" in key:
                        tensor.uniform_(0.5, 1.5)
            folder = tmp_path_factory.mktemp("made")
            small.write_tokenizer(folder / "tokenizer.json")
            theirs.save_pretrained(folder, max_shard_size="60KB")
            cache[case] = theirs, load_model(folder)
        return cache[case]

    return make


def ours_of(loaded):
    return nnx.merge(graph_of(loaded.config), loaded.parameters, loaded.router)


def random_ids(rows, length=LENGTH):
    return np.random.default_rng(1).integers(0, 260, (rows, length))


def their_logs(model, ids, **inputs):
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(ids), **inputs).logits, -1).numpy()


def our_logs(loaded, ids, segments=None):
    segments = jnp.ones_like(ids) if segments is None else jnp.asarray(segments)
    run = nnx.jit(lambda model, ids, segments: jax.nn.log_softmax(model(ids, segments)))
    return np.asarray(run(ours_of(loaded), jnp.asarray(ids), segments))


def worst(case, ours, theirs):
    """Prints the largest difference, and that of the last quarter of the positions."""
    error = np.abs(ours - theirs)
    late = error[:, error.shape[1] * 3 // 4 :].max()
    print(f"{case}: largest difference {error.max():.1e}, at late positions {late:.1e}")
    assert np.ptp(theirs) > 3  # the model has opinions
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_at_all_positions(made, case):
    theirs, loaded = made(case)
    ids = random_ids(2)
    ours = our_logs(loaded, ids)
    worst(case, ours, their_logs(theirs, ids))
    # One by one as in a batch.
    worst(f"{case}, one row", our_logs(loaded, ids[1:]), ours[1:])


@pytest.mark.parametrize("case", CASES)
def test_padding_and_packed_documents(made, case):
    """A row of two documents and padding is each document by itself, as transformers has it."""
    theirs, loaded = made(case)
    ids = random_ids(1)
    segments = np.repeat([1, 2, 0], [30, 14, 4])[None]
    ours = our_logs(loaded, ids, segments)
    worst(f"{case}, first", ours[:, :30], their_logs(theirs, ids[:, :30]))
    worst(f"{case}, second", ours[:, 30:44], their_logs(theirs, ids[:, 30:44]))


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding(made, case):
    """The prompt at once and then token by token, past the original context."""
    theirs, loaded = made(case)
    ids = random_ids(2)
    model = ours_of(loaded)

    @jax.jit
    def step(tokens, start, caches):
        hidden, caches = model.extend(tokens, start, caches)
        return jax.nn.log_softmax(model.logits(hidden)), caches

    logs, caches = step(jnp.asarray(ids[:, :10]), jnp.asarray(0), model.empty_caches(2, LENGTH))
    found = [logs]
    for place in range(10, LENGTH):
        logs, caches = step(jnp.asarray(ids[:, place : place + 1]), jnp.asarray(place), caches)
        found.append(logs)
    worst(case, np.concatenate(found, axis=1), their_logs(theirs, ids))


@pytest.mark.parametrize("case", SPARSE)
def test_router_choices(made, case):
    import torch

    theirs, loaded = made(case)
    ids = random_ids(2)
    chosen = []
    hooks = []
    for layer in theirs.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            take = lambda _, __, out: chosen.append(np.sort(out[2].numpy(), -1))  # noqa: E731
            hooks.append(gate.register_forward_hook(take))
    with torch.no_grad():
        theirs(torch.tensor(ids))
    for hook in hooks:
        hook.remove()
    run = nnx.jit(lambda model, ids: model.hidden(ids, jnp.ones_like(ids))[1].experts)
    ours = np.sort(np.asarray(run(ours_of(loaded), jnp.asarray(ids))), -1)
    for layer, of_theirs in enumerate(chosen):
        np.testing.assert_array_equal(ours[layer].reshape(of_theirs.shape), of_theirs)
    assert len(chosen) == len(ours) > 0


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_fine_tuning_step(made, case, tmp_path):
    """The gradient of the mean cross-entropy, written as a model by `save`, is theirs by name."""
    import torch
    from safetensors.numpy import load_file

    theirs, loaded = made(case)
    ids = random_ids(2)
    theirs = copy.deepcopy(theirs)
    theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()

    def loss(parameters):
        model = nnx.merge(graph_of(loaded.config), parameters, loaded.router)
        logs = jax.nn.log_softmax(model(jnp.asarray(ids), jnp.ones_like(ids)))
        return -jnp.take_along_axis(logs[:, :-1], ids[:, 1:, None], -1).mean()

    ours = jax.jit(jax.grad(loss))(loaded.parameters)
    # As a model, so that the names and orders of the table are those of the gradients, too.
    save(tmp_path, loaded.config, ours, loaded.router, loaded.tokenizer)
    found = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in theirs.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.copy_(gradient)
    gradients = tmp_path / "theirs"
    # `save` writes pairs side by side.
    interleaved = getattr(theirs.config, "rope_interleave", True)
    theirs.save_pretrained(gradients)
    expected = load_file(gradients / "model.safetensors")
    for name, gradient in expected.items():
        if name.endswith("e_score_correction_bias"):
            continue
        if not interleaved and ("q_b_proj" in name or "kv_a_proj" in name):
            continue
        scale = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=3e-4, err_msg=name)
    assert set(expected) <= set(found)


def tempered(parameters):
    """Norms of about 1 and smaller matrices, so that rounding stays small in every block."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0.3 + (1 if role_of(path) == "norm" else 0), parameters
    )


IN_TRANSFORMERS = [name for name in MODELS if name != "deepseek"]


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_transformers_loads_what_save_writes(family, tmp_path):
    """Every tensor by its name, the same log-probabilities, and the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = MODELS[family]
    parameters, router = random_states(config, 3)
    parameters = tempered(parameters)
    save(tmp_path, config, parameters, router, TOKENIZER, shard_bytes=20_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not report["missing_keys"], report
    unexpected = {name for name in report["unexpected_keys"] if int(name.split(".")[2]) < 3}
    assert not unexpected  # but for multi-token prediction, which transformers loads by itself
    loaded = load_model(tmp_path)
    ids = random_ids(2) % TOKENIZER.vocabulary
    worst(family, our_logs(loaded, ids), their_logs(theirs.eval(), ids))
    text = "def f(x):  # naïve 🙂\n    return x"
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert their_tokenizer(text)["input_ids"] == [TOKENIZER.bos, *TOKENIZER.encode(text)]
    assert their_tokenizer.decode(TOKENIZER.encode(text)) == text
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id) == (256, 257)
    assert arrays_by_name(loaded.parameters).keys() == arrays_by_name(parameters).keys()


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_multi_token_prediction(family, tmp_path):
    """The logits of every module, from a folder that `save` wrote."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    config = MODELS[family]
    parameters, router = random_states(config, 3)
    save(tmp_path, config, tempered(parameters), router, TOKENIZER)
    main = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    # transformers finds the modules by the number of layers of the published models alone.
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\..*"]
    modules = MtpModel.from_pretrained(main).eval()
    loaded = load_model(tmp_path)
    ids = random_ids(2, LENGTH + config.mtp_depth) % TOKENIZER.vocabulary

    @nnx.jit
    def predicted(model, ids):
        ones = jnp.ones_like(ids)
        hidden, _ = model.hidden(ids[:, :LENGTH], ones[:, :LENGTH])
        found = model.mtp.predictions(model, hidden, ids, ones)
        return [jax.nn.log_softmax(logits) for _, logits, _ in found]

    ours = predicted(ours_of(loaded), jnp.asarray(ids))
    assert len(ours) == config.mtp_depth
    with torch.no_grad():
        hidden = main.model(torch.tensor(ids[:, :LENGTH])).last_hidden_state
        cache = MtpCache(config=main.config.get_mtp_config())
        for depth, of_ours in enumerate(ours, 1):
            places = torch.arange(depth, depth + LENGTH)[None]
            hidden = modules.forward_layer(
                depth - 1, hidden, places, cache, input_ids=torch.tensor(ids[:, depth:][:, :LENGTH])
            )
            theirs = torch.log_softmax(modules._project_to_logits(hidden), -1).numpy()
            worst(f"{family}, depth {depth}", np.asarray(of_ours), theirs)


def test_bits_per_byte_are_those_of_transformers(made):
    """experiments/evaluate.py on two documents, against the same windows by transformers."""
    theirs, loaded = made("olmoe")
    tokenizer = loaded.tokenizer
    texts = ("the tin in the thin inn, and the other", "def f(x): return x")
    rows = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in texts]
    size = sum(map(len, texts))
    text = TokenArray(np.concatenate(rows), np.array([0, len(rows[0])]), size, tokenizer)
    context = 12
    stride = 5
    nats = 0.0
    for start, row in zip(text.starts, rows, strict=True):
        for target in range(1, len(row)):
            last = -(-(start + target) // stride) * stride
            first = max(0, last - context - start)
            logs = their_logs(theirs, np.array([row[first:target]]))
            nats -= logs[0, -1, row[target]]
    ours = sliding_bits_per_byte(Teacher(*loaded), text, context=context, stride=stride)
    print(f"bits per byte: {ours:.6f}, and by transformers {nats / np.log(2) / size:.6f}")
    np.testing.assert_allclose(ours, nats / np.log(2) / size, rtol=1e-5)
