"""A decoder-only transformer from scratch that reads and writes Hugging Face directories: Qwen2, Qwen3 and Llama.

Kept: the mathematics, parameter names and files of those families, so that a directory goes in, is trained, and comes
out for transformers or vLLM to load. Dropped: all other options; a field of config.json that would change the
mathematics is refused by name, never ignored.

    model = Transformer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", dtype=torch.bfloat16, device="cuda")
    logprobs, entropy = model.score(ids, prompt_lengths, response_lengths, temperature=1.0)
    model.save_pretrained("runs/x/model")

Shapes: B rows, T tokens, R response tokens, S keys in the cache, D hidden size, H query heads, K key/value heads,
E head size, V vocabulary, N tokens of all rows. Rows are padded on the right: causality alone hides the padding, and
training needs no mask. What counts is told by lengths, never by token ids (pad may be the end token). To be scored, the
rows' tokens are laid in one line without padding, a prompt that several rows share once; only attention sees rows.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

QKV_BIAS = {"qwen2": True, "qwen3": False, "llama": False}  # the model types, and whether q, k and v have biases
# Fields of config.json that change what a model computes, with the only value implemented here (null always passes).
ONLY = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "partial_rotary_factor": 1}
ONLY |= {"attention_dropout": 0, "hidden_dropout": 0, "is_causal": True, "use_bidirectional_attention": False}
ONLY |= dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "quantization_config"))
ONLY |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"))
LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SHARD_BYTES = 4 * 2**30  # of one safetensors file at most
CACHE_BLOCK = 128  # tokens
WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")


@dataclass(frozen=True)
class Config:
    """What of config.json the mathematics needs; `raw` is the file itself, written back in its own form."""

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
    rope_llama3: dict | None  # Llama 3's four scaling numbers, None for plain rope

    @classmethod
    def parse(cls, raw):
        """From the dict of a config.json; ValueError names the first field that is missing or not implemented."""

        given = {name: value for name, value in raw.items() if value is not None}
        kind = given.get("model_type")
        if kind not in QKV_BIAS:
            raise ValueError(f"config.json: model_type {kind!r} is not supported (only qwen2, qwen3 and llama)")
        # Qwen2 has its biases whatever the field says; Qwen keeps a window size that use_sliding_window switches on.
        only = ONLY | {"attention_bias": QKV_BIAS[kind]} | ({"sliding_window": None} if kind == "llama" else {})
        faults = [name for name, value in only.items() if given.get(name, value) != value]
        faults += ["layer_types"] if set(given.get("layer_types", [])) - {"full_attention"} else []
        faults += ["architectures"] if not all("CausalLM" in name for name in given.get("architectures", [])) else []
        if faults:
            raise ValueError(f"config.json: {faults[0]} {given[faults[0]]!r} is not implemented")
        # What transformers takes for a field that is not there.
        size, heads = given.get("hidden_size", 0), given.get("num_attention_heads", 1)
        defaults = {"num_key_value_heads": heads if kind == "llama" else 32, "tie_word_embeddings": False}
        defaults |= {"head_dim": 128 if kind == "qwen3" else size // heads, "rms_norm_eps": 1e-6}
        given = defaults | given | _parse_rope(raw) | {"raw": raw}
        names = {field.name for field in fields(cls)}
        if names - given.keys():
            raise ValueError(f"config.json: {', '.join(sorted(names - given.keys()))} missing")
        return cls(**{name: given[name] for name in names})


def _parse_rope(raw):
    """rope_theta and rope_llama3 from transformers 5's rope_parameters, or from older rope_theta and rope_scaling."""
    where = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = {name: value for name, value in (raw.get(where) or {}).items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: {where} of rope_type {kind!r} is not implemented")
    for name in rope.keys() - {"rope_type", "type", "rope_theta", *LLAMA3_FIELDS}:
        if (name, rope[name]) != ("partial_rotary_factor", 1):
            raise ValueError(f"config.json: {where}.{name} {rope[name]!r} is not implemented")
    length = "original_max_position_embeddings"  # may stand in three places; this is transformers' order
    rope[length] = raw.get(length) or rope.get(length) or raw.get("max_position_embeddings")
    llama3 = {name: rope.get(name) for name in LLAMA3_FIELDS} if kind == "llama3" else None
    if llama3 and None in llama3.values():
        raise ValueError(f"config.json: {where} lacks one of {', '.join(LLAMA3_FIELDS)}")
    return {"rope_theta": float(rope.get("rope_theta") or raw.get("rope_theta") or 10000), "rope_llama3": llama3}


def model_directory(path_or_id):
    """The directory itself, or the local copy of a Hub id (downloaded on first use; only files that are read here)."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    unread = [f"*{suffix}" for suffix in WEIGHT_FILES[2:]]
    return Path(snapshot_download(str(path_or_id), ignore_patterns=[*unread, "original/*", "onnx/*"]))


def read_weights(source):
    """The tensors of a directory's safetensors files by name: pages of the files, which take no memory until read."""
    index = source / "model.safetensors.index.json"
    files, weights = {"model.safetensors"}, {}
    if index.is_file() and not (source / "model.safetensors").is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    for file in sorted(files):
        if not (source / file).is_file():
            raise ValueError(f"{source}: no file {file} (weights are read from safetensors only)")
        weights |= load_file(source / file)
    return weights


def rope_frequencies(config, device):
    """(E/2,) float32 angles per position: θ^(−2i/E), slowed where Llama 3 stretches its context."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_llama3 is None:
        return frequency
    # Llama 3.1: waves shorter than L/high stay, longer than L/low turn `factor` times slower, a linear blend between.
    factor, low, high, length = (config.rope_llama3[name] for name in LLAMA3_FIELDS)
    turns = length * frequency / (2 * math.pi)  # full turns within the pre-training length
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


# What the CPU is, for choices that change speed and rounding only. MKL, which nn.Linear calls in float32, is fast on
# Intel's; elsewhere oneDNN's product, which torch itself calls from compiled code, is two to three times as fast.
# Without units for bf16 a product of bf16 numbers is four times as fast in float32, in which it is summed anyway.
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
INTEL, WIDEN = "GenuineIntel" in CPU, "bf16" not in CPU
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # None where torch was built without it
# The CPU's attention with the log of each query's Σ e^score, which F.scaled_dot_product_attention keeps to itself: what
# it takes to attend to a prompt and to what follows it apart. That pays from so many tokens of the longest prompt (tiny
# models' rollouts took 1.1 to 1.2 of the time with 32 and 0.8 to 0.9 with 128), and is done on no other device.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SHARE_PROMPTS_FROM = {"cpu": 96}
# oneDNN keeps a compiled product for each shape it has met, 1,024 unless told: 200 are as fast, in 0.2 GiB less.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")


def widened(x):
    """Whether products of x are made in float32 and rounded once."""
    return WIDEN and x.device.type == "cpu" and x.dtype == torch.bfloat16


def product(x, weight, bias=None):
    """x Wᵀ + b: x (...,D), weight (F,D) -> (...,F)."""
    if widened(x):  # the weight may be in float32 already
        return product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel()
    if ONEDNN and fits and (weight.is_mkldnn or not INTEL):
        return ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return product(grad, weight.T), product(rows.T, x.flatten(0, -2).T), grad_bias


class Linear(nn.Linear):
    def forward(self, x):
        if widened(x) or (ONEDNN and not INTEL and x.device.type == "cpu" and x.dtype == torch.float32):
            return _Product.apply(x, self.weight, self.bias)
        return super().forward(x)  # which in bf16 calls oneDNN by itself


def shares_prompts(device, prompt_tokens):
    """Whether the rows of a prompt share its part of the cache: the type of the device, the longest prompt."""
    return prompt_tokens >= SHARE_PROMPTS_FROM.get(device, math.inf)


def rotate(x, cos, sin):
    """Rotary embedding of x (B,T,heads,E), in which coordinate i is paired with i + E/2: cos (B,T,1,E) holds the
    cosines twice, and sin (B,T,1,E) the sines, negative in the first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def gather(x, index):
    """x[index] of x (N,...); F.embedding's gradient is the quick one, and adds up in the same order every time."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


class Attention(nn.Module):
    """Causal attention whose query heads share key/value heads (GQA); Qwen3 also normalises each query and key."""

    def __init__(self, config):
        super().__init__()
        size, head, bias = config.hidden_size, config.head_dim, QKV_BIAS[config.model_type]
        self.head_dim = head
        self.q_proj = Linear(size, config.num_attention_heads * head, bias=bias)
        self.k_proj = Linear(size, config.num_key_value_heads * head, bias=bias)
        self.v_proj = Linear(size, config.num_key_value_heads * head, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head, size, bias=False)
        norms = [nn.RMSNorm(head, config.rms_norm_eps) if config.model_type == "qwen3" else nn.Identity() for _ in "qk"]
        self.q_norm, self.k_norm = norms

    def projections(self):
        return self.q_proj, self.k_proj, self.v_proj

    def project(self, x):  # packed() puts one product in the place of these three
        return [linear(x) for linear in self.projections()]

    def forward(self, x, cos, sin, cache=None, layer=None, spread=None):
        """x (B,T,D) -> (B,T,D). With a cache its `layer` takes the new keys and values, then all are read.

        spread: x is then one line of N tokens (1,N,D), put into B rows of T places for attention alone. Two indices:
        (B,T), the token that stands at each place; (1,N), the place, of all B·T, that has each token's result."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.project(x))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if spread is not None:
            q, k, v = (gather(part.flatten(0, 1), spread[0]) for part in (q, k, v))
        if cache is not None:
            cache.write(layer, torch.stack([k, v], 2))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is None or cache.mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            out = cache.attend(layer, q)
        out = out.transpose(1, 2).flatten(2)
        return self.o_proj(out if spread is None else gather(out.flatten(0, 1), spread[1]))


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def projections(self):
        return self.gate_proj, self.up_proj

    def project(self, x):
        return [linear(x) for linear in self.projections()]

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer; plain tensors in and out, so that sharding can wrap it from outside."""

    def __init__(self, config):
        super().__init__()
        self.recompute = False  # whether backward makes the layer's activations again instead of keeping them
        # RMSNorm: x / sqrt(mean(x²) + ε) · weight, in float32 at least whatever the dtype of x (bf16 would lose it)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, layer=None, spread=None):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, cache, layer, spread, use_reentrant=False)
        return self.compute(x, cos, sin, cache, layer, spread)

    def compute(self, x, cos, sin, cache=None, layer=None, spread=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer, spread)
        return x + self.mlp(self.post_attention_layernorm(x))


class KVCache:
    """Keys and values of every row, filled from index 0 without gaps; lengths (rows,) says how many each row holds.

    forward() appends to rows 0..B-1 and leaves the others alone; the cache grows as rows get longer. `longest` is an
    upper bound of lengths that the host knows, so that nothing has to be read back from a device. No gradients.

    Rows that follow() a prompt may share it: it then stays in a cache of its own, `prompts`, whose row owner (rows,) is
    theirs, and attention reads it once for all of them. Otherwise each of them gets a copy."""

    def __init__(self, config, rows, capacity=0, dtype=torch.float32, device="cpu"):
        shape = (2, rows, config.num_key_value_heads, capacity, config.head_dim)  # 2: keys, values
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0
        self.prompts, self.owner = None, torch.zeros_like(self.lengths)
        self.seated = 0  # the first rows that seat() has placed, 0 once any of them may follow another prompt

    def begin(self, rows, tokens, lengths):
        """Makes room for `tokens` more in the first rows, of which `lengths` (rows,) are real; sets positions, mask."""
        start, self.longest = self.longest, self.longest + tokens
        self.reserve(self.longest)
        device = self.lengths.device
        self.row = torch.arange(rows, device=device)[:, None]
        self.column = self.positions = self.lengths[:rows, None] + torch.arange(tokens, device=device)
        self.lengths[:rows] += lengths
        # On an empty cache causality is mask enough. Otherwise a query sees the keys up to its own position: 0 there
        # and −inf beyond, once for each query head that shares a key/value head.
        self.mask = None
        if start or self.prompts:
            hidden = torch.arange(self.longest, device=device) > self.column[:, :, None]
            self.mask = self.minus_infinity(hidden[:, None]).repeat(1, 1, self.group, 1)
        if self.prompts:
            if self.seated != rows:
                self.seat(rows)
            self.positions = self.positions + self.prompts.lengths[self.owner[:rows], None]

    def minus_infinity(self, hidden):
        """0, and −inf where hidden."""
        return hidden.new_zeros(hidden.shape, dtype=self.layers[0].dtype).masked_fill_(hidden, -torch.inf)

    def seat(self, rows):
        """Puts the rows of one prompt side by side: P prompts of `wide` seats each, place (rows,) the seat of each row,
        sitter (P·wide,) the row in each seat (the first where there is none)."""
        self.drop_prompts(rows, least=(len(self.prompts.lengths) + 1) // 2)
        count = self.owner[:rows].bincount(minlength=len(self.prompts.lengths))
        owner, order = self.owner[:rows].sort(stable=True)
        rank = torch.arange(rows) - (count.cumsum(0) - count)[owner]  # among those of the same prompt
        self.wide = int(count.max())
        self.place = torch.empty_like(order).scatter_(0, order, owner * self.wide + rank)
        self.sitter = order.new_zeros(len(count) * self.wide).scatter_(0, self.place, self.row[:, 0])
        hidden = torch.arange(self.prompts.longest) >= self.prompts.lengths[:, None]
        self.prompts.mask = self.minus_infinity(hidden)[:, None, None]
        self.seated = rows

    @torch.no_grad()
    def write(self, layer, pairs):
        """Stores keys and values (B,T,2,K,E) at the positions of begin()."""
        if self.mask is None:
            self.layers[layer][:, : len(pairs), :, : self.longest] = pairs.permute(2, 0, 3, 1, 4)
        else:
            self.layers[layer][:, self.row, :, self.column] = pairs

    def attend(self, layer, q):
        """Attention of q (B,H,T,E), of the tokens written last, to all that their rows hold and follow -> like q."""
        keys, values = self.layers[layer][:, : len(q), :, : self.longest]
        # The query heads of one key/value head stand in line as if they were its queries: (B,H,T,E) -> (B,K,H/K·T,E).
        # The cache is then read once per key/value head and never repeated.
        folded = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
        if not self.prompts:
            return F.scaled_dot_product_attention(folded, keys, values, attn_mask=self.mask).view(q.shape)
        own, own_sum = FLASH(folded, keys, values, attn_mask=self.mask)
        # And so do those of all rows of one prompt: (P,K,wide·H/K·T,E).
        together = folded.index_select(0, self.sitter).unflatten(0, (-1, self.wide)).transpose(1, 2).flatten(2, 3)
        keys, values = self.prompts.layers[layer][:, :, :, : self.prompts.longest]
        parts = FLASH(together, keys, values, attn_mask=self.prompts.mask)
        parts = (part.unflatten(2, (self.wide, -1)).transpose(1, 2).flatten(0, 1) for part in parts)
        prompt, prompt_sum = (part.index_select(0, self.place) for part in parts)
        # One softmax of the two by their logs of Σ e^score, which tell what share of the whole sum each one has.
        share = (own_sum - prompt_sum).sigmoid_()[..., None]
        return torch.lerp(prompt.to(share.dtype), own.to(share.dtype), share).to(q.dtype).view(q.shape)

    def follow(self, prompts, owner, first, share):
        """Lets row first + i begin after row owner[i] of `prompts`, a cache that becomes part of this one. share: as
        shares_prompts() says, the same throughout."""
        rows = torch.arange(len(owner), device=owner.device) + first
        if not share:
            return self.copy_rows(prompts, owner, rows)
        if first:
            self.drop_prompts(first, least=1)
            self.prompts.append(prompts)
        else:
            self.prompts = prompts
        self.owner[rows] = owner + len(self.prompts.lengths) - len(prompts.lengths)
        self.lengths[rows] = self.seated = 0

    def drop_prompts(self, rows, least):
        """Leaves out the prompts that the first rows no longer follow, if there are so many."""
        kept, owner = self.owner[:rows].unique(return_inverse=True)
        if len(self.prompts.lengths) - len(kept) >= least:
            self.owner[:rows], self.prompts.lengths = owner, self.prompts.lengths[kept]
            for i, layer in enumerate(self.prompts.layers):
                self.prompts.layers[i] = layer[:, kept]

    def append(self, other):
        """Takes in another cache's rows behind its own."""
        rows, self.longest = len(self.lengths), max(self.longest, other.longest)
        self.lengths = torch.cat([self.lengths, other.lengths])
        for i, (ours, theirs) in enumerate(zip(self.layers, other.layers)):
            self.layers[i] = ours.new_zeros(2, len(self.lengths), ours.shape[2], self.longest, ours.shape[4])
            self.layers[i][:, :rows, :, : ours.shape[3]] = ours
            self.layers[i][:, rows:, :, : theirs.shape[3]] = theirs

    def copy_rows(self, source, source_rows, target_rows):
        """Copies rows of `source` (this cache or another) into rows of this one, such as a prompt to its group."""
        self.longest = max(self.longest, source.longest)
        self.reserve(self.longest)
        for ours, theirs in zip(self.layers, source.layers):
            ours[:, target_rows, :, : source.longest] = theirs[:, source_rows, :, : source.longest]
        self.lengths[target_rows] = source.lengths[source_rows]
        self.owner[target_rows] = source.owner[source_rows]
        self.seated = 0

    def reserve(self, capacity):
        """Room for `capacity` tokens a row at least, in blocks: growth then costs little and wastes little."""
        for i, old in enumerate(self.layers):  # layer by layer: only one of them is ever held twice
            if old.shape[3] < capacity:
                self.layers[i] = old.new_zeros(*old.shape[:3], -(-capacity // CACHE_BLOCK) * CACHE_BLOCK, old.shape[4])
                self.layers[i][:, :, :, : old.shape[3]] = old


class Transformer(nn.Module):
    """The causal language model. Its state dict is the Hugging Face checkpoint, name for name."""

    def __init__(self, config, source=None, source_dtype=torch.float32):
        super().__init__()
        self.config = config
        self.source = source  # directory the weights came from, whose other files save_pretrained copies
        self.source_dtype = source_dtype
        self.num_tokens = config.vocab_size  # usable ids; lower it to len(tokenizer) where embeddings are padded
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions=None, cache=None, lengths=None, spread=None):
        """ids (B,T) -> hidden (B,T,D) after the final norm; the logits are apart, since few positions need them.

        Without a cache: rows padded on the right, or a line of tokens that `spread` puts into rows (Attention). With
        one: ids follow on what its first B rows hold, and `lengths` (B,) says how many are real (all, if not given)."""
        if cache is not None:
            cache.begin(*ids.shape, ids.shape[1] if lengths is None else lengths)
            positions = cache.positions
        elif positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)
        # Angles in float32 whatever the model's dtype: bf16 cannot tell position 257 from 258.
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = positions[:, :, None, None].to(wide) * rope_frequencies(self.config, ids.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin, cache, layer, spread)
        return self.model.norm(x)

    def head_weight(self):
        """(num_tokens,D): the output matrix, rows of ids that no tokenizer makes left out."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        # Slicing costs its gradient a copy of the whole matrix, so only where there is something to leave out.
        return head.weight if self.num_tokens == len(head.weight) else head.weight[: self.num_tokens]

    def logits(self, hidden):
        """hidden (...,D) -> logits (...,num_tokens), float32 at least: before temperature and softmax, not after."""
        logits = product(hidden, self.head_weight())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def score(self, ids, prompt_lengths, response_lengths, temperature=1.0, width=None, owner=None):
        """Log-probs and entropy (nats) of response tokens: ids (B,T), lengths (B,) -> both (B,R), 0 beyond each row.

        owner (B,): the row whose prompt is this row's too, and is run once for both (its own, if not given); an owner
        owns itself. R is the longest response unless `width` sets it. Body and head run in this one method, so that
        sharding hooks around it see all uses of the weights (hence forward() and not self(), which would run them
        again)."""
        width = int(response_lengths.max()) if width is None else width
        rows, column = torch.arange(len(ids), device=ids.device)[:, None], torch.arange(ids.shape[1], device=ids.device)
        owner = rows[:, 0] if owner is None else owner
        # What is run, N tokens without padding: each prompt once, and of the replies all that predict another token.
        in_prompt, ends = column < prompt_lengths[:, None], (prompt_lengths + response_lengths)[:, None]
        needed = torch.where(in_prompt, owner[:, None] == rows, column < ends - 1)
        tokens = needed.flatten().nonzero()[:, 0]
        # Where each place of the padded rows finds its token among the N (padding: anywhere).
        place = (needed.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
        place = torch.where(in_prompt, place[owner], place)
        positions = column.expand(ids.shape).flatten()[tokens]
        hidden = self.forward(ids.flatten()[tokens][None], positions[None], spread=(place, tokens[None]))
        row, step = (torch.arange(width, device=ids.device) < response_lengths[:, None]).nonzero(as_tuple=True)
        # Response token t of a row is predicted at the position before it: prompt length − 1 + t.
        before = prompt_lengths[row] - 1 + step
        picked = gather(hidden[0], place[row, before])
        logprobs, entropy = token_logprobs(picked, self.head_weight(), ids[row, before + 1], temperature)
        empty = logprobs.new_zeros(ids.shape[0], width)
        return empty.index_put((row, step), logprobs), empty.index_put((row, step), entropy)

    @contextmanager
    def packed(self):
        """For sampling: on a CPU each matrix once more in a layout that few rows read twice as fast.

        Matrices of the same input become one. Until the end the layers use these copies: no gradients, and no change
        of the weights."""
        weight, blocks = self.model.norm.weight, self.model.layers
        parts = [part for block in blocks for part in (block.self_attn, block.mlp)]
        outputs = [linear for block in blocks for linear in (block.self_attn.o_proj, block.mlp.down_proj)]

        def pack(matrix):
            matrix = matrix.float() if widened(matrix) else matrix
            if ONEDNN and (not INTEL or matrix.numel() > 2**18):  # MKL is quicker to start
                return torch.ops.mkldnn._reorder_linear_weight(matrix, batch_size=32)  # about how many rows
            return matrix.T.contiguous().T  # each column in one piece, which MKL need not turn round

        def fused(linears):
            matrix = pack(torch.cat([linear.weight for linear in linears]))
            bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
            sizes = [linear.out_features for linear in linears]
            return lambda x: product(x, matrix, bias).split(sizes, -1)

        try:
            if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
                for part in parts:
                    part.project = fused(part.projections())
                for linear in outputs:
                    linear.forward = partial(product, weight=pack(linear.weight))
                head = pack(self.head_weight())
                self.head_weight = lambda: head
            yield
        finally:
            vars(self).pop("head_weight", None)
            for part in parts:
                vars(part).pop("project", None)
            for linear in outputs:
                vars(linear).pop("forward", None)

    @classmethod
    def from_config(cls, config, dtype=torch.float32, device="cpu", seed=0):
        """A model of random weights as Hugging Face draws them: normal(0, initializer_range), biases 0, norms 1."""
        model = cls(Config.parse(config), source_dtype=dtype)
        generator, std = torch.Generator().manual_seed(seed), config.get("initializer_range") or 0.02
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        return model.to(dtype=dtype, device=device)

    @classmethod
    def from_pretrained(cls, path_or_id, dtype=torch.float32, device="cpu"):
        """The model of a directory or Hub id (config.json and safetensors); every weight must match, both ways."""
        source = model_directory(path_or_id)
        config = Config.parse(json.loads((source / "config.json").read_text()))
        weights = read_weights(source)
        # Some exporters write a shared matrix twice. A head of its own beside "tied" would be lost silently.
        if config.tie_word_embeddings and "lm_head.weight" in weights:
            head, embedding = weights.pop("lm_head.weight"), weights.get("model.embed_tokens.weight")
            if embedding is None or not torch.equal(head, embedding):
                raise ValueError(f"{source}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        with torch.device("meta"):
            model = cls(config, source)
        wanted, shared = model.state_dict(), model.state_dict().keys() & weights.keys()
        faults = {"missing": wanted.keys() - shared, "surplus": weights.keys() - shared}
        faults["of another shape"] = {name for name in shared if wanted[name].shape != weights[name].shape}
        if any(faults.values()):
            lists = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in faults.items() if names)
            raise ValueError(f"{source}: the weights do not fit config.json; {lists}")
        model.source_dtype = weights["model.embed_tokens.weight"].dtype
        # Copied even where nothing changes: the loaded tensors are the file's own pages and would change with it.
        model.load_state_dict({k: tensor.to(device, dtype, copy=True) for k, tensor in weights.items()}, assign=True)
        return model

    def save_pretrained(self, path, dtype=None, weights=None):
        """Writes a directory that transformers loads: the source's other files, config.json in its form, the weights.

        dtype: the source's unless given. weights: the (name, whole tensor) pairs of state_dict(), in its order, when
        they are gathered elsewhere (sharded training); they are taken one by one and held until a file is full."""
        path, dtype = Path(path).resolve(), dtype or self.source_dtype
        source = self.source and Path(self.source).resolve()
        if path == source:
            raise ValueError(f"{path} is where the model came from; save it elsewhere")
        path.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.rglob("*")) if source else []:
            name = file.relative_to(source)
            hidden = any(part.startswith(".") for part in name.parts)  # .git, .cache
            if file.is_file() and not (hidden or path in file.parents or name.name.endswith(WEIGHT_FILES)):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, path / name)
        names = {"dtype", "torch_dtype"} & self.config.raw.keys()  # transformers 5 and 4
        raw = self.config.raw | dict.fromkeys(names, str(dtype).removeprefix("torch."))
        (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        shards, size = [[]], 0  # which names go into which file
        for name, tensor in self.state_dict().items():
            size += tensor.numel() * dtype.itemsize
            if shards[-1] and size > SHARD_BYTES:
                shards, size = [*shards, []], tensor.numel() * dtype.itemsize
            shards[-1].append(name)
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weights, files = iter(weights or self.state_dict().items()), files if len(shards) > 1 else ["model.safetensors"]
        for file, names in zip(files, shards):
            part = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in islice(weights, len(names))}
            save_file(part, path / file, metadata={"format": "pt"})
        if len(files) > 1:
            total = sum(tensor.numel() for tensor in self.state_dict().values()) * dtype.itemsize
            places = {name: file for file, names in zip(files, shards) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / τ)[target] and its entropy, a chunk of rows at a time; backward makes each chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = torch.empty(3, len(hidden), dtype=wide, device=hidden.device)
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = product(hidden[part], weight).to(wide).div_(temperature)
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
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        # A slab of the vocabulary for all rows, as large as forward's chunk: each row of grad_weight is then made once,
        # in one sum over the tokens, and only the small grad_hidden adds up (in float32 at least).
        width = max(1, ctx.chunk * len(weight) // max(1, len(hidden)))
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight)
        scale = grad[:, None] / ctx.temperature
        for i in range(0, len(weight), width):
            part = weight[i : i + width]
            # ∂ log p_y / ∂ logit_v = (1[v = y] − p_v) / τ, times the incoming gradient
            d = product(hidden, part).to(lse.dtype).div_(ctx.temperature).sub_(lse[:, None]).exp_().mul_(-scale)
            place = targets[:, None] - i
            inside = (place >= 0) & (place < len(part))
            d = d.scatter_add_(-1, place.clamp_(0, len(part) - 1), scale * inside).to(hidden.dtype)
            grad_hidden += product(d, part.T)
            grad_weight[i : i + width] = product(d.T, hidden.T)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None):
    """Log-prob of each target and entropy, in nats: hidden (N,D), weight (V,D), targets (N,) -> two (N,), float32 up.

    Never holds (N,V): `chunk` rows of logits at a time, 2^24 numbers unless given. The entropy has no gradient."""
    chunk = chunk or max(16, 2**24 // weight.shape[0])
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)
