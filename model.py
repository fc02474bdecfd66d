"""A decoder-only transformer from scratch that reads and writes Hugging Face directories.

The families Qwen2, Qwen3 and Llama are implemented: their mathematics, parameter names and files. A
directory goes in, is trained, and comes out for transformers or vLLM to load. All other options are
left out, and a field of config.json that would change the mathematics is refused by name.

    model = Transformer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", torch.bfloat16, "cuda")
    logprobs, entropy = model.response_logprobs(ids, prompt_lengths, response_lengths)
    model.save_pretrained("runs/x/model")

Shapes: B rows, T tokens of a row, R response tokens, D hidden size, H query heads, K key/value
heads, E head size, V vocabulary, N tokens of all rows. Rows are padded on the right, so causality
hides the padding and training needs no mask. Lengths say which tokens count, never token ids (the
pad token may be the end token).
"""

import json
import math
import shutil
import warnings
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.checkpoint import checkpoint


class Family(NamedTuple):
    """What differs between model types: mathematics, and what a missing field means."""

    qkv_bias: bool  # the projections of q, k and v have biases
    qk_norm: bool  # each query and key is normalised
    window_has_switch: bool  # a window size counts only if use_sliding_window says so
    default_kv_heads: int | None  # None: as many as query heads
    default_head_dim: int | None  # None: hidden size over query heads


FAMILIES = {  # by model_type
    "qwen2": Family(True, False, True, 32, None),
    "qwen3": Family(False, True, True, 32, 128),
    "llama": Family(False, False, False, None, None),
}
# Fields of config.json that change what a model computes, and the one value implemented here. A
# field that is null or missing always passes.
SUPPORTED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": None,
    "quantization_config": None,
    "embedding_multiplier": None,
    "residual_multiplier": None,
    "attention_multiplier": None,
    "logits_scaling": None,
}
LLAMA3_FIELDS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
SHARD_BYTES = 4 * 2**30  # of one safetensors file at most
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}  # numbers of token_logprobs' chunk, by device
READABLE = (".safetensors", ".index.json")
UNREADABLE = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
WEIGHT_FILES = READABLE + UNREADABLE
# What an export has beside config.json and weights
OTHER_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)


# ---------------------------------------------------------------------------- config.json


@dataclass(frozen=True)
class Config:
    """The config.json fields that the forward pass uses.

    `raw` is the whole file, written back unchanged on save."""

    raw: dict
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rope_llama3: dict | None  # Llama 3's four scaling numbers, None for plain rotary embeddings

    @classmethod
    def parse(cls, raw):
        """From the dict of a config.json. ValueError names a missing or unsupported field."""
        given = {name: value for name, value in raw.items() if value is not None}
        family = given.get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"config.json: model_type {family!r} is not supported (only {', '.join(FAMILIES)})"
            )
        _refuse_unsupported(given, family)
        values = _defaults(given, family) | given | _parse_rope(raw)
        values["raw"] = raw
        names = [field.name for field in fields(cls)]
        missing = sorted(set(names) - values.keys())
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing")
        return cls(**{name: values[name] for name in names})


def _refuse_unsupported(given, family):
    supported = dict(SUPPORTED)
    supported["attention_bias"] = FAMILIES[family].qkv_bias
    if not FAMILIES[family].window_has_switch:
        supported["sliding_window"] = None
    faults = [name for name, value in supported.items() if given.get(name, value) != value]
    if set(given.get("layer_types", [])) - {"full_attention"}:
        faults.append("layer_types")
    if not all("CausalLM" in name for name in given.get("architectures", [])):
        faults.append("architectures")
    if faults:
        name = faults[0]
        raise ValueError(f"config.json: {name} {given[name]!r} is not implemented")


def _defaults(given, family):
    """What transformers takes for a field that is not there."""
    heads = given.get("num_attention_heads", 1)
    head_dim = given.get("hidden_size", 0) // heads
    return {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": FAMILIES[family].default_kv_heads or heads,
        "head_dim": FAMILIES[family].default_head_dim or head_dim,
    }


def _parse_rope(raw):
    """rope_theta and rope_llama3, from rope_parameters (transformers 5) or rope_scaling (older)."""
    section = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = {name: value for name, value in (raw.get(section) or {}).items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: {section} of rope_type {kind!r} is not implemented")
    for name in rope.keys() - {"rope_type", "type", "rope_theta", *LLAMA3_FIELDS}:
        if name != "partial_rotary_factor" or rope[name] != 1:
            raise ValueError(f"config.json: {section}.{name} {rope[name]!r} is not implemented")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000
    llama3 = None
    if kind == "llama3":
        # The original length may stand in three places; this is transformers' order.
        length = "original_max_position_embeddings"
        rope[length] = raw.get(length) or rope.get(length) or raw.get("max_position_embeddings")
        llama3 = {name: rope.get(name) for name in LLAMA3_FIELDS}
        if None in llama3.values():
            raise ValueError(f"config.json: {section} lacks one of {', '.join(LLAMA3_FIELDS)}")
    return {"rope_theta": float(theta), "rope_llama3": llama3}


# ---------------------------------------------------------------------------- transformer


def rope_frequencies(config, device):
    """(E/2,) float32 angles per position: θ^(−2i/E), slowed where Llama 3 stretches its context."""
    index = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (index / config.head_dim)
    if config.rope_llama3 is None:
        return frequency
    # Llama 3.1: waves shorter than L/high stay, those longer than L/low turn `factor` times slower,
    # and a linear blend lies between.
    factor, low, high, length = (config.rope_llama3[name] for name in LLAMA3_FIELDS)
    turns = length * frequency / (2 * math.pi)  # full turns within the pre-training length L
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def rotary_tables(config, positions, dtype):
    """Cosines and sines of the rotary angles: positions (B,T) -> two (B,T,1,E)."""
    # Angles in float32 whatever the model's dtype: bf16 cannot tell position 257 from 258.
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = rope_frequencies(config, positions.device)
    angles = positions[:, :, None, None].to(wide) * frequencies
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rotary_emb(x, cos, sin):
    """Rotate x (B,T,heads,E); coordinate i is paired with i + E/2.

    cos (B,T,1,E) holds the cosines twice, sin (B,T,1,E) the sines, negative in the first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def causal_attention(q, k, v):
    """q (B,T,H,E), k and v (B,T,K,E) -> (B,T,H,E). H/K query heads share a key/value head."""
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    # Not `!=`: torch.compile keeps that symbolic, and scaled_dot_product_attention wants a bool.
    grouped = len({q.shape[1], k.shape[1]}) > 1
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # PyTorch 2.13 has no float32 kernel for grouped heads on CUDA but the one that holds the
        # whole (B,H,T,T) matrix. So the keys and values are repeated.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


class _PadRows(torch.autograd.Function):
    """x (N,...) -> x[pad_index] (B,T,...). Its gradient sums, for each token, those of its places.

    Autograd would sort the places for that, in every layer. A Packing has them sorted once.
    """

    @staticmethod
    def forward(ctx, x, packing):
        ctx.packing = packing
        return x[packing.pad_index]

    @staticmethod
    def backward(ctx, gradient):
        places, starts = ctx.packing.sum_index, ctx.packing.sum_starts
        sums = F.embedding_bag(places, gradient.flatten(0, 1).flatten(1), starts, mode="sum")
        return sums.unflatten(1, gradient.shape[2:]), None


class Packing(NamedTuple):
    """How attention finds B padded rows in a line of N tokens, some of which are in several rows.

    A place is one of the B·T; S of them hold a token, the others padding.
    """

    pad_index: torch.Tensor  # (B,T) the token, 0…N−1, at each place
    unpad_index: torch.Tensor  # (N,) the place whose result each token takes
    sum_index: torch.Tensor  # (S,) the places of token 0, then those of token 1, and so on
    sum_starts: torch.Tensor  # (N,) where in sum_index each token's places start


class Attention(nn.Module):
    """Causal attention with grouped key/value heads. Qwen3 also normalises each query and key."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        family = FAMILIES[config.model_type]
        bias = family.qkv_bias
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, size, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if family.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attention=causal_attention, packing=None):
        """x (B,T,D) -> (B,T,D). attention: a function in place of causal_attention.

        packing: x is then one line of tokens (1,N,D), and only attention sees rows, which a
        Packing makes and undoes."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        heads = [q.shape[2], k.shape[2]]
        # Together, because few large kernels keep a GPU busier than many small ones.
        qk = apply_rotary_emb(torch.cat([q, k], 2), cos, sin)
        if packing is None:
            q, k = qk.split(heads, 2)
            out = attention(q, k, v)
        else:
            qkv = _PadRows.apply(torch.cat([qk, v], 2)[0], packing)  # (B,T,H+2K,E)
            q, k, v = qkv.split([*heads, v.shape[2]], 2)
            # Each place is taken at most once, so this gradient needs no sums in a fixed order.
            out = attention(q, k, v).flatten(0, 1).index_select(0, packing.unpad_index)[None]
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer. Plain tensors go in and out, so that FSDP can wrap it from outside."""

    def __init__(self, config):
        super().__init__()
        # True: backward computes the layer's activations again instead of keeping them.
        self.activation_checkpointing = False
        # RMSNorm: x / sqrt(mean(x²) + ε) · weight, in float32 at least (bf16 would lose it)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.compiled = None  # compute() as --compile makes it: for training, never for sampling

    def forward(self, x, cos, sin, attention, packing):
        compute = self.compute
        if self.compiled and packing is not None:
            compute = self.compiled
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(compute, x, cos, sin, attention, packing, use_reentrant=False)
        return compute(x, cos, sin, attention, packing)

    def compute(self, x, cos, sin, attention, packing):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention, packing)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The causal language model. Its state dict is the Hugging Face checkpoint, name for name."""

    def __init__(self, config, source=None, source_dtype=torch.float32):
        super().__init__()
        self.config = config
        self.source = source  # directory of the weights, whose other files save_pretrained copies
        self.source_dtype = source_dtype
        # The tokenizer's largest id + 1, set by load_model: lower where the embedding is padded.
        self.usable_vocab = config.vocab_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions=None, rotary=None, attention=None, packing=None):
        """ids (B,T) -> hidden states (B,T,D) after the final norm. logits() is apart, since few
        positions need it.

        positions (B,T): 0, 1, 2, … unless given. rotary: their rotary_tables, where the caller has
        them already. attention(layer, q, k, v): what takes causal_attention's place, such as one
        that reads a cache. packing: see Attention."""
        x = self.model.embed_tokens(ids)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = rotary or rotary_tables(self.config, positions, x.dtype)
        for layer, block in enumerate(self.model.layers):
            attend = partial(attention, layer) if attention else causal_attention
            x = block(x, cos, sin, attend, packing)
        return self.model.norm(x)

    def head_weight(self):
        """(usable_vocab,D): the output matrix without the rows of ids that no tokenizer makes."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if self.usable_vocab == len(head.weight):
            return head.weight  # the gradient of a slice would be a copy of the whole matrix
        return head.weight[: self.usable_vocab]

    def logits(self, hidden):
        """hidden (...,D) -> logits (...,usable_vocab), float32 at least, as softmax needs them."""
        logits = F.linear(hidden, self.head_weight())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def response_logprobs(self, ids, prompt_lengths, response_lengths, temperature=1.0):
        """Log-probs and entropy (nats) of response tokens: ids (B,T), lengths (B,) -> both (B,R).

        R is the longest response; beyond each row's response both are 0. Body and head run in this
        one call, so that FSDP's hooks around it see every use of the weights. (Hence forward() and
        not self(), which would run the hooks again.)"""
        hidden = self.forward(ids)
        width = int(response_lengths.max())
        column = torch.arange(width, device=ids.device)
        row, step = (column < response_lengths[:, None]).nonzero(as_tuple=True)
        # The position before a token predicts it: prompt length − 1 + step.
        before = prompt_lengths[row] - 1 + step
        picked = hidden[row, before]
        targets = ids[row, before + 1]
        logprobs, entropy = token_logprobs(picked, self.head_weight(), targets, temperature)
        empty = logprobs.new_zeros(len(ids), width)
        return empty.index_put((row, step), logprobs), empty.index_put((row, step), entropy)

    def packed_logprobs(self, ids, positions, packing, predictors, targets, temperature=1.0):
        """Log-probs and entropy (nats) of M tokens, without padding and with shared prompts run
        once: what training calls.

        ids, positions (N,): the tokens of a micro-batch in one line and their places in their rows.
        packing: the rows that attention sees.
        predictors (M,): the tokens, of the N, whose hidden states predict.
        targets (M,): the token ids that they predict.
        -> both (M,). One call for body and head, as in response_logprobs."""
        hidden = self.forward(ids[None], positions[None], packing=packing)[0]
        # Taken through F.embedding, whose gradient always sums in one order.
        picked = F.embedding(predictors, hidden)
        return token_logprobs(picked, self.head_weight(), targets, temperature)

    @classmethod
    def from_config(cls, config, dtype=torch.float32, device="cpu", seed=0):
        """Random weights as Hugging Face draws them: normal(0, initializer_range), biases 0, norms
        1."""
        model = cls(Config.parse(config), source_dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        std = config.get("initializer_range") or 0.02
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        return model.to(dtype=dtype, device=device)

    @classmethod
    def from_pretrained(cls, path_or_id, dtype=torch.float32, device="cpu", seed=0):
        """The model of a directory or Hub id. Every weight must match config.json, both ways.

        seed: of the weights, where config.json says "random_init" (see read_weights). On the device
        "meta" the weights are checked and then left out."""
        source = model_directory(path_or_id)
        config = Config.parse(json.loads((source / "config.json").read_text()))
        weights = read_weights(source, seed)
        # Some exporters write a shared matrix twice. Another head under "tied" would be lost.
        if config.tie_word_embeddings and "lm_head.weight" in weights:
            head = weights.pop("lm_head.weight")
            embedding = weights.get("model.embed_tokens.weight")
            if embedding is None or not torch.equal(head, embedding):
                raise ValueError(
                    f"{source}: tie_word_embeddings is true, but lm_head.weight is not the"
                    " embedding"
                )
        with torch.device("meta"):
            model = cls(config, source)
        _check_weights(source, model.state_dict(), weights)
        model.source_dtype = weights["model.embed_tokens.weight"].dtype
        # Copied even where nothing changes: the loaded tensors are the file's own pages, and would
        # change with it.
        copies = {name: w.to(device, dtype, copy=True) for name, w in weights.items()}
        model.load_state_dict(copies, assign=True)
        return model

    def load_checkpoint(self, directory, alone=True):
        """Take the weights of a checkpoint of train.py. alone: this is the only process."""
        # One process needs no process group, and no word about that.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load({"model": self.state_dict()}, checkpoint_id=directory, no_dist=alone)
        except (CheckpointException, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]  # the lines above are a traceback
            raise ValueError(f"cannot read the checkpoint {directory}: {reason}") from error

    def save_pretrained(self, path, dtype=None, weights=None):
        """Write a directory that transformers loads: config.json, weights and the source's other
        files.

        dtype: the source's unless given. weights: (name, whole tensor) pairs in the order of
        state_dict(), where sharded training gathers them elsewhere; they are taken one by one and
        held until a file is full."""
        path = Path(path).resolve()
        dtype = dtype or self.source_dtype
        if self.source and path == Path(self.source).resolve():
            raise ValueError(f"{path} is where the model came from; save it elsewhere")
        path.mkdir(parents=True, exist_ok=True)
        if self.source:
            _copy_other_files(Path(self.source), path)
        raw = dict(self.config.raw)
        raw.pop("random_init", None)  # the directory has weights now
        for name in {"dtype", "torch_dtype"} & raw.keys():  # transformers 5 and 4
            raw[name] = str(dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

        state = self.state_dict()
        planned = {
            name: torch.empty(w.shape, dtype=dtype, device="meta") for name, w in state.items()
        }
        split = split_torch_state_dict_into_shards(planned, max_shard_size=SHARD_BYTES)
        parts = {file: {} for file in split.filename_to_tensors}
        for name, tensor in weights or state.items():
            file = split.tensor_to_filename[name]
            parts[file][name] = tensor.detach().to("cpu", dtype).contiguous()
            if len(parts[file]) == len(split.filename_to_tensors[file]):
                save_file(parts.pop(file), path / file, metadata={"format": "pt"})
                shutil.copymode(path / "config.json", path / file)  # it was for the owner alone
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---------------------------------------------------------------------------- directories


def model_directory(path_or_id):
    """The directory itself, or the local copy of a Hub id, downloaded on first use."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    unread = [f"*{suffix}" for suffix in UNREADABLE]
    ignored = [*unread, "original/*", "onnx/*"]
    return Path(snapshot_download(str(path_or_id), ignore_patterns=ignored))


def read_weights(source, seed=0):
    """{name: tensor} of a directory's safetensors files: pages of the files, which take no memory
    until read.

    Where config.json says "random_init": true and no weights are there, they are drawn from the
    seed: float32, the same numbers as Transformer.from_config's."""
    source = Path(source)
    config = json.loads((source / "config.json").read_text())
    has_weights = any(file.name.endswith(WEIGHT_FILES) for file in source.iterdir())
    if config.get("random_init") is True and not has_weights:
        return Transformer.from_config(config, seed=seed).state_dict()
    files = {"model.safetensors"}
    index = source / "model.safetensors.index.json"
    if index.is_file() and not (source / "model.safetensors").is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    weights = {}
    for file in sorted(files):
        if not (source / file).is_file():
            raise ValueError(f"{source}: no file {file} (weights are read from safetensors only)")
        weights |= load_file(source / file)
    # Tables that older exporters kept, and a shared matrix that was written as the head alone.
    weights = {name: tensor for name, tensor in weights.items() if ".rotary_emb." not in name}
    if config.get("tie_word_embeddings") and "lm_head.weight" in weights:
        weights.setdefault("model.embed_tokens.weight", weights["lm_head.weight"])
    return weights


def _check_weights(source, wanted, weights):
    """ValueError lists all weights of a directory that are missing, surplus or of another shape."""
    shared = wanted.keys() & weights.keys()
    faults = {
        "missing": wanted.keys() - shared,
        "surplus": weights.keys() - shared,
        "of another shape": {name for name in shared if wanted[name].shape != weights[name].shape},
    }
    lists = [f"{what}: {', '.join(sorted(names))}" for what, names in faults.items() if names]
    if lists:
        raise ValueError(f"{source}: the weights do not fit config.json; {'; '.join(lists)}")


def _copy_other_files(source, target):
    """Copy the tokenizer's files and generation_config.json, and nothing else that lies there."""
    for pattern in OTHER_FILES:
        for file in filter(Path.is_file, source.glob(pattern)):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


# ---------------------------------------------------------------------------- log-probs


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / τ)[target] and its entropy, a chunk of rows at a time.

    Backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Three tensors and not views of one: FSDP warns of outputs that are views.
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        lse = torch.empty_like(logprobs)
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = F.linear(hidden[part], weight).to(wide).div_(temperature)
            top = logits.amax(-1, keepdim=True)
            logits.sub_(top)
            picked = logits.gather(-1, targets[part, None])[:, 0]
            p = logits.exp()
            total = p.sum(-1)
            # log p_y = x_y − log Σ e^x;   H = log Σ e^x − Σ p x   (x: logits less their maximum)
            logprobs[part] = picked - total.log()
            entropy[part] = total.log() - p.mul_(logits).sum(-1) / total
            lse[part] = total.log() + top[:, 0]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        # A slab of the vocabulary for all rows, as large as forward's chunk. Each row of
        # grad_weight is then computed once, in one sum over the tokens, and only the small
        # grad_hidden adds up (in float32 at least).
        width = max(1, ctx.chunk * len(weight) // max(1, len(hidden)))
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight)
        scale = grad[:, None] / ctx.temperature
        for i in range(0, len(weight), width):
            part = weight[i : i + width]
            # ∂ log p_y / ∂ logit_v = (1[v = y] − p_v) / τ, times the incoming gradient
            logits = F.linear(hidden, part).to(lse.dtype).div_(ctx.temperature)
            d = logits.sub_(lse[:, None]).exp_().mul_(-scale)
            place = targets[:, None] - i
            inside = (place >= 0) & (place < len(part))
            d.scatter_add_(-1, place.clamp_(0, len(part) - 1), scale * inside)
            d = d.to(hidden.dtype)
            grad_hidden += d @ part
            grad_weight[i : i + width] = d.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None):
    """Log-prob of each target and entropy, in nats: hidden (N,D), weight (V,D), targets (N,) -> two
    (N,), float32 at least.

    Never holds (N,V): only `chunk` rows of logits, by default CHUNK_LOGITS numbers. The entropy has
    no gradient."""
    chunk = chunk or max(16, CHUNK_LOGITS[hidden.device.type] // len(weight))
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)
