"""The transformer against transformers itself, and the log-prob function against plain log_softmax.

Guards against: rope halves swapped or scaled wrongly (Llama 3), θ read from the wrong place of
config.json, a norm in the wrong precision, GQA heads paired wrongly, padding that leaks into real
positions, a cache that appends at the wrong place, directories that transformers reads differently,
a separate head lost under "tied", a weight missing or ignored, a config field ignored that changes
the mathematics, masks made from token ids (pad = eos = 0), an end token left out of scoring,
probability given to ids that no tokenizer makes, random weights in place of missing ones, shared
prompts that see another reply, and log-probs that hold (N,V) or lose gradient in bf16."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model as model_file
from model import Config, Packing, Transformer, read_weights, token_logprobs

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
CASES = [(kind, tied, seed) for kind in FAMILIES for tied in (True, False) for seed in range(2)]


def random_config(kind, tied, seed):
    """A tiny config of that family, every size drawn at random; weights large enough that a mistake
    is seen."""
    r = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=r))]

    kv_heads, group, head = pick(1, 2, 3), pick(1, 2, 3), pick(4, 8, 16)
    config = {
        "model_type": kind,
        "architectures": [FAMILIES[kind] + "ForCausalLM"],
        "vocab_size": pick(61, 97, 128),
        "hidden_size": kv_heads * group * head,
        "intermediate_size": pick(24, 40),
        "num_hidden_layers": pick(2, 3),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": pick(1e-5, 1e-6),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": None,
        "rope_theta": pick(500.0, 10000.0, 1e6),
    }
    if kind == "qwen2":
        config |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    if kind == "qwen3":
        config |= {"head_dim": pick(8, 16), "attention_bias": False, "use_sliding_window": False}
    if kind == "llama":
        config |= {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    return config


def oracle(config, seed=0):
    """The same architecture in transformers, random weights with norms and biases that are not 1
    and 0."""
    torch.manual_seed(seed)
    kind = FAMILIES[config["model_type"]]
    model = getattr(transformers, kind + "ForCausalLM")(
        getattr(transformers, kind + "Config").from_dict(dict(config))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith(".bias"):
            parameter.data.normal_(std=0.3)
    return model.eval()


def write(directory, config, model, shards=1):
    """A model directory: this config.json word for word, the weights in one file or several,
    another file beside."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = model.lm_head.weight.detach()
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, where = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(
            {name: state[name] for name in names[i::shards]},
            directory / file,
            metadata={"format": "pt"},
        )
        where |= dict.fromkeys(names[i::shards], file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return directory


def ours_logits(model, ids):
    with torch.no_grad():
        return model.logits(model(ids))


def theirs_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def random_ids(config, *shape, seed=0):
    return torch.randint(config["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind,tied,seed", CASES)
def test_logits_and_saved_directory_equal_transformers(tmp_path, kind, tied, seed):
    config = random_config(kind, tied, seed)
    reference = oracle(config, seed)
    ids = random_ids(config, 3, 150)
    model = Transformer.from_pretrained(
        write(tmp_path / "a", config, reference, shards=1 + 2 * seed)
    )
    expected = theirs_logits(reference, ids)
    assert expected.std() > 0.3  # a flat output would agree with anything
    torch.testing.assert_close(ours_logits(model, ids), expected, atol=1e-4, rtol=0)

    # Out again, and in through transformers: the same weights and config, so identical logits.
    model.save_pretrained(tmp_path / "b")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(theirs_logits(saved, ids), expected)
    assert ("lm_head.weight" in load_file(tmp_path / "b" / "model.safetensors")) == (not tied)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"eos_token_id": [0, 3]}'
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_5_config_is_read_and_written_back_in_its_form(tmp_path, kind):
    config = random_config(kind, True, 3)
    config["rope_theta"] = 300.0
    if kind == "llama":
        config["rope_scaling"]["factor"] = 4.0
    reference = oracle(config)
    reference.save_pretrained(tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (
        "rope_parameters" in raw and "rope_theta" not in raw
    )  # else this test no longer tests the new form
    model = Transformer.from_pretrained(tmp_path / "a")
    ids = random_ids(config, 2, 90)
    torch.testing.assert_close(
        ours_logits(model, ids), theirs_logits(reference, ids), atol=1e-4, rtol=0
    )
    model.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == raw | {"dtype": "bfloat16"}


def test_old_rope_scaling_spelling_and_untouched_theta_default():
    config = random_config("llama", True, 0)
    base = Transformer.from_config(config)
    spelled = config | {"rope_scaling": LLAMA3 | {"type": "llama3"}}
    ids = random_ids(config, 1, 60)
    assert torch.equal(ours_logits(base, ids), ours_logits(Transformer.from_config(spelled), ids))
    plain = config | {"rope_scaling": None, "rope_theta": None}
    assert Transformer.from_config(plain).config.rope_theta == 10000.0
    # The scaling does something: without it the same weights give another answer.
    assert (
        ours_logits(Transformer.from_config(plain), ids) - ours_logits(base, ids)
    ).abs().max() > 0.01


def test_files_of_the_source_travel_and_nothing_else_changes(tmp_path):
    config = random_config("qwen2", False, 1) | {
        "torch_dtype": "bfloat16",
        "a_field_of_theirs": [1, 2],
    }
    source = write(tmp_path / "a", config, oracle(config).bfloat16(), shards=2)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    model = Transformer.from_pretrained(source)  # float32 in memory
    assert model.model.embed_tokens.weight.dtype == torch.float32
    model.save_pretrained(source / "out")
    files = sorted(
        str(p.relative_to(source / "out")) for p in (source / "out").rglob("*") if p.is_file()
    )
    assert files == [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((source / "out" / "config.json").read_text()) == config
    weights = load_file(source / "out" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {
        torch.bfloat16
    }  # the source's, although float32 was trained
    assert all(torch.equal(weights[k].float(), v) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    with pytest.raises(ValueError, match="where the model came from"):
        model.save_pretrained(source / ".")


def test_saving_and_loading_after_a_change_keeps_the_change(tmp_path):
    """Loaded tensors must not be windows into the file, nor saved ones copies of the source's
    weights."""
    config = random_config("llama", True, 1)
    source = write(tmp_path / "a", config, oracle(config))
    model = Transformer.from_pretrained(source)
    before = (source / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.norm.weight += 1
    gathered = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", weights=gathered.items())
    assert (source / "model.safetensors").read_bytes() == before
    again = Transformer.from_pretrained(tmp_path / "b")
    assert all(torch.equal(v, gathered[k]) for k, v in again.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())


def test_large_models_are_written_in_files_of_limited_size(tmp_path, monkeypatch):
    """Tensors are taken one by one, no more of them than a file holds; transformers reads the files
    by their index."""
    config = random_config("qwen2", True, 3)
    source = write(tmp_path / "a", config, oracle(config))
    model, held = Transformer.from_pretrained(source), []
    largest = max(tensor.numel() for tensor in model.state_dict().values()) * 4
    monkeypatch.setattr(model_file, "SHARD_BYTES", largest)

    def save(part, *rest, **more):
        held.append(part)
        save_file(part, *rest, **more)

    monkeypatch.setattr(model_file, "save_file", save)
    model.save_pretrained(
        tmp_path / "b", weights=((name, tensor * 2) for name, tensor in model.state_dict().items())
    )
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert (
        len(files) == len(held) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    )
    assert all(sum(tensor.numel() for tensor in part.values()) * 4 <= largest for part in held)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32
    ).state_dict()
    for again in (Transformer.from_pretrained(tmp_path / "b").state_dict(), theirs):
        assert all(
            torch.equal(again[name], tensor * 2) for name, tensor in model.state_dict().items()
        )


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_that_do_not_fit_are_listed(tmp_path, shards):
    config = random_config("qwen3", False, 0) | {"num_hidden_layers": 2}
    reference = oracle(config)
    source = write(tmp_path / "a", config, reference, shards)
    file = sorted(source.glob("*.safetensors"))[0]
    state = load_file(file)
    lost = "model.embed_tokens.weight" if "model.embed_tokens.weight" in state else sorted(state)[0]
    tensor = state.pop(lost)
    save_file(state | {"model.layers.0.extra.weight": tensor.clone()}, file)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(source)
    assert f"missing: {lost}" in str(error.value) and "surplus: model.layers.0.extra.weight" in str(
        error.value
    )
    state[lost] = torch.zeros(5, 7)
    save_file(state, file)
    with pytest.raises(ValueError, match=f"of another shape: {lost}"):
        Transformer.from_pretrained(source)
    file.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        Transformer.from_pretrained(source)


def test_a_head_in_a_tied_file_must_be_the_embedding(tmp_path):
    config = random_config("qwen2", True, 0)
    source = write(tmp_path / "a", config, oracle(config))
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors")
    Transformer.from_pretrained(source).save_pretrained(tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")
    state["lm_head.weight"][3, 2] += 1e-3
    save_file(state, source / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings is true, but lm_head.weight is not the embedding"
    ):
        Transformer.from_pretrained(source)


REFUSED = [
    ("qwen2", {"model_type": "mistral"}, "model_type 'mistral'"),
    ("qwen2", {"model_type": None}, "model_type None"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"sliding_window": 64}, "sliding_window 64"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias True"),
    ("qwen3", {"attention_bias": True}, "attention_bias True"),
    ("qwen2", {"attention_bias": False}, "attention_bias False"),
    ("llama", {"mlp_bias": True}, "mlp_bias True"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ("llama", {"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
    (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling of rope_type 'yarn'",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling of rope_type 'linear'",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling lacks one of factor",
    ),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic"}},
        "rope_parameters of rope_type 'dynamic'",
    ),
    (
        "qwen3",
        {"rope_parameters": {"partial_rotary_factor": 0.25}},
        "rope_parameters.partial_rotary_factor 0.25",
    ),
    (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1}}},
        "rope_parameters.full_attention",
    ),
    ("qwen2", {"hidden_size": None}, "hidden_size missing"),
    ("llama", {"max_position_embeddings": None}, "max_position_embeddings missing"),
]


@pytest.mark.parametrize("kind,change,message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_is_not_implemented_is_refused_by_name(kind, change, message):
    with pytest.raises(ValueError) as error:
        Transformer.from_config(random_config(kind, True, 0) | change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_harmless_fields_are_accepted():
    config = random_config("qwen2", True, 0)
    config |= {
        "attention_dropout": 0.0,
        "use_cache": True,
        "layer_types": ["full_attention"] * 2,
        "rope_scaling": None,
    }
    config |= {
        "transformers_version": "9.9",
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }
    Transformer.from_config(config)


@pytest.mark.parametrize("kind", FAMILIES)
def test_fields_left_out_mean_what_transformers_takes_them_for(kind):
    config = random_config(kind, True, 0)
    for name in (
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_theta",
    ):
        config.pop(name, None)
    theirs = getattr(transformers, FAMILIES[kind] + "Config").from_dict(dict(config))
    ours = Config.parse(config)
    head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.head_dim, ours.num_key_value_heads) == (head, theirs.num_key_value_heads)
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (
        theirs.rms_norm_eps,
        theirs.tie_word_embeddings,
    )
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_random_weights_depend_on_the_seed_alone():
    config = random_config("qwen2", True, 0)
    one, same, other = (
        Transformer.from_config(config, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert one["model.layers.0.self_attn.q_proj.weight"].std() == pytest.approx(0.2, rel=0.15)
    assert (
        one["model.norm.weight"].eq(1).all()
        and one["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    )


def random_init_directory(path, config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"random_init": True}))
    return path


def test_random_init_draws_the_weights_of_a_directory_without_any(tmp_path):
    """From the seed, the same numbers as from_config, in any dtype; the export is an ordinary
    directory."""
    config = random_config("qwen2", False, 0)
    source = random_init_directory(tmp_path / "a", config)
    (source / "tokenizer.json").write_text("{}")
    for seed in (0, 7):
        expected = Transformer.from_config(config, seed=seed).state_dict()
        for drawn in (
            read_weights(source, seed),
            Transformer.from_pretrained(source, seed=seed).state_dict(),
        ):
            assert drawn.keys() == expected.keys()
            assert all(torch.equal(drawn[name], expected[name]) for name in expected)
        wide = Transformer.from_pretrained(source, torch.float64, seed=seed)
        assert torch.equal(wide.lm_head.weight, expected["lm_head.weight"].double())
    assert not torch.equal(wide.lm_head.weight.float(), read_weights(source)["lm_head.weight"])
    wide.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config
    assert wide.source_dtype == torch.float32 and (tmp_path / "b" / "tokenizer.json").is_file()
    again = Transformer.from_pretrained(tmp_path / "b", seed=3).state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [False, None, "true", 1])
def test_weights_may_be_missing_only_where_random_init_is_true(tmp_path, value):
    """A broken download must not become a random model."""
    source = random_init_directory(tmp_path / "a", random_config("qwen2", True, 0))
    raw = json.loads((source / "config.json").read_text()) | {"random_init": value}
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"no file model\.safetensors"):
        Transformer.from_pretrained(source)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_random_init_does_not_hide_a_broken_download(tmp_path, file):
    source = random_init_directory(tmp_path / "a", random_config("qwen2", True, 0))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / file).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file model"):
        Transformer.from_pretrained(source)


def test_weights_that_are_there_are_read_whatever_random_init_says(tmp_path):
    config = random_config("qwen2", True, 0) | {"random_init": True}
    source = write(tmp_path / "a", config, oracle(config, seed=5))
    one, other = (Transformer.from_pretrained(source, seed=seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["model.norm.weight"], read_weights(source)["model.norm.weight"])


def test_a_model_on_meta_has_config_and_shapes_only(tmp_path):
    config = random_config("qwen2", True, 0)
    source = write(tmp_path / "a", config, oracle(config).bfloat16())
    model = Transformer.from_pretrained(source, torch.float32, "meta")
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert model.source == source and model.source_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FAMILIES)
def test_bf16_is_close_to_transformers_bf16(tmp_path, kind):
    config = random_config(kind, False, 5) | {
        "initializer_range": 0.1,
        "max_position_embeddings": 600,
    }
    reference = oracle(config).bfloat16()
    model = Transformer.from_pretrained(
        write(tmp_path / "a", config, reference), dtype=torch.bfloat16
    )
    ids = random_ids(config, 2, 500)
    theirs = theirs_logits(reference, ids).float()
    exact = theirs_logits(reference.float(), ids)
    ours = ours_logits(model, ids)
    assert ours.dtype == torch.float32
    # A norm in bf16 would show as a larger error than theirs; so few roundings are independent that
    # 2 occurs by chance.
    assert (ours - exact).square().mean() < 4 * (theirs - exact).square().mean()


@pytest.mark.parametrize("kind", FAMILIES)
def test_rope_keeps_its_precision_in_bf16(kind):
    """The keys of the first layer at positions beyond 256, where bf16 no longer tells one position
    from the next."""
    config = random_config(kind, True, 5) | {"max_position_embeddings": 600}
    narrow = Transformer.from_config(config, dtype=torch.bfloat16)
    wide = Transformer.from_config(config)
    wide.load_state_dict(narrow.state_dict())
    keys = []

    def first_layer(layer, q, k, v):
        if layer == 0:
            keys.append(k.detach().float())
        return model_file.causal_attention(q, k, v)

    for model in (narrow, wide):
        model(random_ids(config, 1, 500), attention=first_layer)
    torch.testing.assert_close(keys[0], keys[1], atol=0.02 * float(keys[1].abs().max()), rtol=0)


def responses(config, rows=4, longest=9, seed=0):
    """Right-padded rows full of zeros: 0 is pad, the end token and an ordinary token inside
    prompts, all at once."""
    r = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 7, (rows,), generator=r)
    lengths = torch.randint(1, longest + 1, (rows,), generator=r)
    lengths[1] = 0  # a row without a response, as an empty micro-batch has
    ids = torch.randint(0, 3, (rows, int((prompts + lengths).max())), generator=r)
    for row, (p, n) in enumerate(zip(prompts.tolist(), lengths.tolist())):
        ids[row, p + n :] = 0
        ids[row, p + n - 1] = 0
    return ids, prompts, lengths


@pytest.mark.parametrize("temperature,usable_vocab", [(1.0, None), (0.7, None), (1.3, 40)])
def test_response_logprobs_against_a_full_log_softmax(tmp_path, temperature, usable_vocab):
    config = random_config("qwen2", True, 6)
    reference = oracle(config)
    model = Transformer.from_pretrained(write(tmp_path / "a", config, reference))
    model.usable_vocab = usable_vocab or model.usable_vocab
    ids, prompts, lengths = responses(config)
    logprobs, entropy = model.response_logprobs(ids, prompts, lengths, temperature)
    assert (
        logprobs.shape == entropy.shape == (4, int(lengths.max()))
        and logprobs.dtype == torch.float32
    )
    for row, (p, n) in enumerate(zip(prompts.tolist(), lengths.tolist())):
        # The oracle sees this row alone, unpadded, and in another library.
        logits = (
            theirs_logits(reference, ids[row : row + 1, : p + n])[0, :, :usable_vocab] / temperature
        )
        log_p = logits.log_softmax(-1)[p - 1 : p + n - 1]
        expected = log_p.gather(-1, ids[row, p : p + n, None])[:, 0]
        torch.testing.assert_close(logprobs[row, :n], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            entropy[row, :n], -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0
        )
        assert logprobs[row, n:].eq(0).all() and entropy[row, n:].eq(0).all()


def test_response_logprobs_ignores_padding_and_trains_the_end_token():
    config = random_config("qwen3", False, 7)
    model = Transformer.from_config(config, dtype=torch.float64)
    ids, prompts, lengths = responses(config)

    def gradients(ids):
        model.zero_grad()
        logprobs, _ = model.response_logprobs(ids, prompts, lengths)
        logprobs.sum().backward()
        return logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    values, grads = gradients(ids)
    noisy = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    for row, end in enumerate((prompts + lengths).tolist()):
        noisy[row, end:] = 41  # padding of another length, and not zero
    more_values, more_grads = gradients(noisy)
    torch.testing.assert_close(more_values, values, atol=1e-12, rtol=0)
    for name in grads:
        torch.testing.assert_close(more_grads[name], grads[name], atol=1e-10, rtol=0)
    # The last token of each response is the end token (0): it has a log-prob and so a gradient.
    for row, n in enumerate(lengths.tolist()):
        assert n == 0 or values[row, n - 1] < -0.1


def pack(rows, prompt_lengths, response_lengths, owners):
    """packed_logprobs' arguments, token by token: a prompt stands where its owner's row has it.

    -> (its arguments, the (row, step) of each of the M tokens)"""
    line, positions, owned, pad_index = [], [], {}, torch.zeros(rows.shape, dtype=torch.long)
    places, predictors, targets, steps = {}, [], [], []

    def add(token, position):
        line.append(int(token))
        positions.append(position)
        return len(line) - 1

    for row, owner in enumerate(owners.tolist()):
        if row == owner:
            owned[row] = [add(rows[row, t], t) for t in range(prompt_lengths[row])]
    for row, owner in enumerate(owners.tolist()):
        start, length = int(prompt_lengths[row]), int(response_lengths[row])
        indices = list(owned[owner])
        indices += [add(rows[row, t], t) for t in range(start, start + length - 1)]
        pad_index[row, : len(indices)] = torch.tensor(indices)
        for t, index in enumerate(indices):
            places.setdefault(index, []).append(row * rows.shape[1] + t)
        for step in range(length):
            predictors.append(indices[start - 1 + step])
            targets.append(int(rows[row, start + step]))
            steps.append((row, step))
    places = [places[index] for index in range(len(line))]
    unpad_index = torch.tensor([own[-1] for own in places])  # any of them will do
    sum_index = torch.tensor([place for own in places for place in own])
    sum_starts = torch.tensor([0, *(len(own) for own in places)]).cumsum(0)[:-1]
    packing = Packing(pad_index, unpad_index, sum_index, sum_starts)
    predictions = [torch.tensor(x, dtype=torch.long) for x in (predictors, targets)]
    return (torch.tensor(line), torch.tensor(positions), packing, *predictions), steps


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_a_shared_prompt_is_run_once_and_changes_nothing(
    kind, activation_checkpointing, monkeypatch
):
    """Rows of three prompts in no order, an owner behind its rows, one without a reply, one that
    nobody shares."""
    model = Transformer.from_config(random_config(kind, False, 7), dtype=torch.float64)
    for block in model.model.layers:
        block.activation_checkpointing = activation_checkpointing
    r, owners = torch.Generator().manual_seed(1), torch.tensor([3, 1, 3, 3, 4, 1])
    prompts = {1: 5, 3: 2, 4: 1}
    texts = {owner: torch.randint(0, 40, (n,), generator=r) for owner, n in prompts.items()}
    lengths = torch.tensor([4, 0, 1, 6, 3, 2])
    ids = torch.full((6, 9), 33)
    for row, (owner, n) in enumerate(zip(owners.tolist(), lengths.tolist())):
        start = prompts[owner]
        ids[row, :start] = texts[owner]
        ids[row, start : start + n] = torch.randint(0, 40, (n,), generator=r)
    prompt_lengths = torch.tensor([prompts[owner] for owner in owners.tolist()])
    outer, ran, forward = (
        torch.randn(6, 6, dtype=torch.float64, generator=r),
        [],
        Transformer.forward,
    )
    monkeypatch.setattr(
        Transformer, "forward", lambda *a, **k: ran.append(a[1].numel()) or forward(*a, **k)
    )

    def padded():
        return model.response_logprobs(ids, prompt_lengths, lengths, 0.8)

    def packed():
        indices, steps = pack(ids, prompt_lengths, lengths, owners)
        places = torch.tensor(steps).unbind(1)
        zeros = torch.zeros(6, 6, dtype=torch.float64)
        return [zeros.index_put(places, x) for x in model.packed_logprobs(*indices, 0.8)]

    def gradients(score):
        model.zero_grad()
        logprobs, entropy = score()
        (logprobs * outer).sum().backward()
        return logprobs.detach(), entropy, {n: p.grad.clone() for n, p in model.named_parameters()}

    apart, together = gradients(padded), gradients(packed)
    for one, other in zip(apart[:2], together[:2]):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(other, one, atol=1e-12, rtol=0)
    for name, grad in apart[2].items():
        assert (together[2][name] - grad).abs().max() <= 1e-12 * grad.abs().max(), name
    # Of the replies all but their last tokens, and each prompt once.
    replies = int((lengths - 1).clamp(min=0).sum())
    assert ran == [ids.numel(), sum(prompts.values()) + replies]


def test_an_empty_micro_batch_has_zero_gradients():
    """Ranks with fewer micro-batches run empty ones: the same graph, so the same collectives, and
    gradients of 0."""
    model = Transformer.from_config(random_config("llama", True, 0))
    none, zero = torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    packing = Packing(zero[None], zero, zero, zero)
    logprobs, entropy = model.packed_logprobs(zero, zero, packing, none, none)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 7, 32, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_values_and_gradients(chunk, temperature):
    r = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 12, dtype=torch.float64, generator=r).requires_grad_()
    weight = torch.randn(50, 12, dtype=torch.float64, generator=r).requires_grad_()
    targets = torch.randint(50, (23,), generator=r)
    outer = torch.randn(23, dtype=torch.float64, generator=r)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk)
    ours = torch.autograd.grad((logprobs * outer).sum(), (hidden, weight))
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    plain = log_p.gather(-1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((plain * outer).sum(), (hidden, weight))
    torch.testing.assert_close(logprobs, plain, atol=1e-9, rtol=0)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-9, rtol=0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert not entropy.requires_grad


def test_token_logprobs_survive_extreme_logits():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_token_logprobs_in_bf16_sum_the_weight_gradient_in_float32():
    """4,096 chunks of one token each push the same weight row by the same small amount: in bf16
    most would be lost."""
    n = 4096
    hidden = torch.full((n, 1), 1.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long), chunk=1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, torch.full((n,), math.log(0.5)), atol=1e-6, rtol=0)
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.tolist() == [[n / 2], [-n / 2]]


def test_token_logprobs_keep_nothing_of_size_n_by_v():
    """Saved tensors by count, and peak memory of forward and backward in a process of its own."""
    saved = []
    hidden, weight = (
        torch.randn(640, 4, requires_grad=True),
        torch.randn(3000, 4, requires_grad=True),
    )
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        token_logprobs(hidden, weight, torch.zeros(640, dtype=torch.long), chunk=16)
    assert max(saved) <= weight.numel()
    code = """
import sys, torch
from model import token_logprobs
def peak():
    lines = [line.split() for line in open("/proc/self/status")]
    return next(int(line[1]) for line in lines if line[0] == "VmHWM:") / 1024
torch.set_num_threads(1)
def run(n, v):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long), 0.9)
    logprobs.sum().backward()
run(64, 1000)
before = peak()
run(4096, 50000)
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 250, "MB; the logits of all tokens would be 781"


def test_unusable_ids_get_no_probability_and_no_gradient():
    config = random_config("qwen2", False, 2)
    model = Transformer.from_config(config)
    model.usable_vocab = 45
    assert model.logits(torch.zeros(2, 3, model.config.hidden_size)).shape == (2, 3, 45)
    logprobs, entropy = model.response_logprobs(
        random_ids(config, 2, 9) % 45, torch.tensor([4, 2]), torch.tensor([5, 3])
    )
    logprobs.sum().backward()
    head = model.lm_head.weight.grad
    assert (
        head.shape[0] == config["vocab_size"]
        and head[45:].eq(0).all()
        and head[:45].abs().sum() > 0
    )
    assert entropy.max() <= math.log(45)
