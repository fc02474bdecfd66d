"""A decoder-only transformer from scratch that reads and writes Hugging Face directories: Qwen2, Qwen3 and Llama.

Kept: exactly the mathematics, the parameter names and the files of those three families, so that a directory goes in,
is trained, and comes out for transformers or vLLM to load. Dropped: every option they do not use; a config field that
would change the mathematics and is not implemented is refused by name, never ignored.

    model = Transformer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", dtype=torch.bfloat16, device="cuda")
    hidden = model(ids)                                    # (B,T) -> (B,T,D), after the final norm
    logprobs, entropy = model.score(ids, prompt_lengths, response_lengths, temperature=1.0)
    model.save_pretrained("runs/x/model")

Shapes: B rows, T tokens, S keys in the cache, D hidden size, H query heads, K key/value heads, E head size,
V vocabulary, N tokens of all rows together. Rows are padded on the right, so causality alone hides the padding and
training needs no mask; masks of the loss come from lengths, never from token ids (pad may be the end token).
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
QKV_BIAS = {"qwen2": True, "qwen3": False, "llama": False}
# Fields of config.json that change what the model computes, with the only value implemented here (null always passes).
ONLY = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": None,
    "attention_multiplier": None,
    "embedding_multiplier": None,
    "residual_multiplier": None,
    "quantization_config": None,
    "num_experts": None,
    "num_local_experts": None,
}
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
LLAMA3_FIELDS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Config:
    """What of config.json the mathematics needs; `raw` is the file itself, written back unchanged."""

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
    initializer_range: float
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_llama3: dict | None  # Llama 3's four scaling numbers, None for plain rope

    @classmethod
    def parse(cls, raw):
        """From the dict of a config.json; ValueError names the first field that is missing or not implemented."""

        def need(name, default=None):
            value = raw.get(name)
            value = default if value is None else value
            if value is None:
                raise ValueError(f"config.json: {name} is missing")
            return value

        model_type = raw.get("model_type")
        if model_type not in QKV_BIAS:
            raise ValueError(f"config.json: model_type {model_type!r} is not supported (qwen2, qwen3 and llama are)")
        # Qwen2 has its q/k/v biases whether the field is there or not; the other two have none here.
        only = ONLY | {"attention_bias": QKV_BIAS[model_type]}
        if model_type == "llama":
            only["sliding_window"] = None  # the Qwen families keep a size here that use_sliding_window switches on
        for name, value in only.items():
            if raw.get(name) is not None and raw[name] != value:
                raise ValueError(f"config.json: {name} {raw[name]!r} is not implemented (only {value!r})")
        for kind in raw.get("layer_types") or []:
            if kind != "full_attention":
                raise ValueError(f"config.json: layer_types {kind!r} is not implemented (only 'full_attention')")
        for name in raw.get("architectures") or []:
            if not name.endswith("ForCausalLM"):
                raise ValueError(f"config.json: architectures {name!r} is not a causal language model")

        heads = need("num_attention_heads")
        kv_heads = need("num_key_value_heads", heads if model_type == "llama" else None)
        if heads % kv_heads:
            raise ValueError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads")
        theta, llama3 = _parse_rope(raw)
        return cls(
            raw=raw,
            model_type=model_type,
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=need("head_dim", 128 if model_type == "qwen3" else need("hidden_size") // heads),
            rms_norm_eps=need("rms_norm_eps", 1e-6),
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=need("initializer_range", 0.02),
            qkv_bias=QKV_BIAS[model_type],
            qk_norm=model_type == "qwen3",
            rope_theta=theta,
            rope_llama3=llama3,
        )


def model_directory(path_or_id):
    """The directory itself, or the local copy of a Hub id (downloaded on first use; only files that are read here)."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    return Path(snapshot_download(str(path_or_id), ignore_patterns=["*/*", "*.bin", "*.pth", "*.gguf", "*.h5"]))


def _parse_rope(raw):
    """(theta, Llama 3 scaling or None) from transformers 5's rope_parameters or the older rope_theta + rope_scaling."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: {name} of rope_type {kind!r} is not implemented (only 'default' and 'llama3')")
    for key, value in rope.items():
        known = key in ROPE_FIELDS or key in LLAMA3_FIELDS
        if value is not None and (not known or (key == "partial_rotary_factor" and value != 1)):
            raise ValueError(f"config.json: {name}.{key} {value!r} is not implemented")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    # Where the pre-training length stands, in transformers' order of precedence.
    length = "original_max_position_embeddings"
    scaling = {key: rope.get(key) for key in LLAMA3_FIELDS}
    scaling[length] = raw.get(length) or scaling[length] or raw.get("max_position_embeddings")
    for key, value in scaling.items():
        if value is None:
            raise ValueError(f"config.json: {name}.{key} is missing")
    return theta, scaling


def rope_frequencies(config, device):
    """(E/2,) float32 angles per position: θ^(−2i/E), slowed where Llama 3 stretches its context."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_llama3 is None:
        return frequency
    # Llama 3.1: waves shorter than L/high stay, longer than L/low turn `factor` times slower, a linear blend between.
    factor, low, high, length = (
        config.rope_llama3[key]
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = length * frequency / (2 * math.pi)  # full turns within the pre-training length
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def rotate(x, cos, sin):
    """Rotary embedding of x (B,heads,T,E) by cos, sin (B,1,T,E/2); coordinate i is paired with i + E/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight, the statistics in float32 at least, rounded to x's dtype before the weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Causal attention whose query heads share key/value heads (GQA); Qwen3 also normalises each query and key."""

    def __init__(self, config):
        super().__init__()
        size, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.q_proj = nn.Linear(size, config.num_attention_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, size, bias=False)
        self.q_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None, layer=None):
        """x (B,T,D) -> (B,T,D). With a cache its `layer` takes the new keys and values, then all are read."""
        split = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        if cache is None or cache.mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            # The query heads of one key/value head stand in line as if they were its queries: (B,H,T,E) ->
            # (B,K,H/K·T,E). The cache is then read once per key/value head and never repeated.
            folded = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
            out = F.scaled_dot_product_attention(folded, k, v, attn_mask=cache.mask).view(q.shape)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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
    """One pre-norm layer; plain tensors in and out, so that sharding and checkpointing can wrap it from outside."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, layer=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The modules that Hugging Face calls `model`: embeddings, layers, final norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class KVCache:
    """Keys and values of every row, filled from index 0 without gaps; lengths (rows,) says how many each row holds.

    forward() appends to rows 0..B-1 and leaves the others alone. Capacity grows by blocks of tokens as rows get longer.
    `longest` is an upper bound of lengths that the host knows, so that nothing has to be read back from a device.
    """

    GROW = 128  # tokens; large enough that copying on growth costs little, small enough to waste little

    def __init__(self, config, rows, capacity=0, dtype=torch.float32, device="cpu"):
        shape = (2, rows, config.num_key_value_heads, capacity, config.head_dim)  # 2: keys, values
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0
        self.mask = None

    def begin(self, rows, tokens, group):
        """Makes room for `tokens` more in the first rows; returns their positions (rows,tokens) and sets the mask."""
        self.rows, start, end = rows, self.longest, self.longest + tokens
        if end > self.layers[0].shape[3]:
            self._grow(-(-end // self.GROW) * self.GROW)
        self.positions = self.lengths[:rows, None] + torch.arange(tokens, device=self.lengths.device)
        # On an empty cache causality is mask enough. Otherwise a query sees the keys up to its own position: 0 there
        # and −inf beyond, once for each of the `group` query heads that share a key/value head.
        self.mask = None
        if start:
            hidden = torch.arange(end, device=self.lengths.device) > self.positions[:, :, None]
            mask = torch.zeros(hidden.shape, dtype=self.layers[0].dtype, device=hidden.device)
            self.mask = mask.masked_fill_(hidden, -torch.inf)[:, None].repeat(1, 1, group, 1)
        return self.positions

    def write(self, layer, k, v):
        """Stores k, v (B,K,T,E) at the positions of begin(); returns the keys and values to attend to."""
        kept, rows, end = self.layers[layer], self.rows, self.longest + k.shape[2]
        if self.mask is None:
            kept[0, :rows, :, :end], kept[1, :rows, :, :end] = k, v
            return k, v
        row = torch.arange(rows, device=k.device)[:, None]
        kept[0][row, :, self.positions], kept[1][row, :, self.positions] = k.transpose(1, 2), v.transpose(1, 2)
        return kept[0, :rows, :, :end], kept[1, :rows, :, :end]

    def finish(self, lengths):
        """Counts the tokens just appended: `lengths` (rows,) of them are real, later writes go over the rest."""
        self.lengths[: self.rows] += lengths
        self.longest += self.positions.shape[1]

    def copy_rows(self, source, source_rows, target_rows):
        """Copies rows of `source` (this cache or another) into rows of this one, such as a prompt to its group."""
        end = source.longest
        if end > self.layers[0].shape[3]:
            self._grow(end)
        for ours, theirs in zip(self.layers, source.layers):
            ours[:, target_rows, :, :end] = theirs[:, source_rows, :, :end]
        self.lengths[target_rows] = source.lengths[source_rows]
        self.longest = max(self.longest, end)

    def _grow(self, capacity):
        for index, old in enumerate(self.layers):  # layer by layer: only one of them is ever held twice
            self.layers[index] = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            self.layers[index][:, :, :, : old.shape[3]] = old


class Transformer(nn.Module):
    """The causal language model. Its state dict is the Hugging Face checkpoint, name for name."""

    def __init__(self, config, source=None, source_dtype=torch.float32):
        super().__init__()
        self.config = config
        self.source = source  # directory the weights came from, whose other files save_pretrained copies
        self.source_dtype = source_dtype
        self.num_tokens = config.vocab_size  # usable ids; lower it to len(tokenizer) where embeddings are padded
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions=None, cache=None, lengths=None):
        """ids (B,T) -> hidden (B,T,D) after the final norm; the logits are apart, since few positions need them.

        Without a cache: rows padded on the right. With one: ids follow on what its first B rows hold, and `lengths`
        (B,) says how many of the T are real (all, if not given)."""
        if cache is not None:
            group = self.config.num_attention_heads // self.config.num_key_value_heads
            positions = cache.begin(*ids.shape, group)
        elif positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)
        # Angles in float32 whatever the model's dtype: bf16 cannot tell position 257 from 258.
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = positions[:, None, :, None].to(wide) * rope_frequencies(self.config, ids.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin) if cache is None else block(x, cos, sin, cache, layer)
        if cache is not None:
            cache.finish(ids.shape[1] if lengths is None else lengths)
        return self.model.norm(x)

    def head_weight(self):
        """(num_tokens,D): the output matrix, rows of ids that no tokenizer makes left out."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight[: self.num_tokens]

    def logits(self, hidden):
        """hidden (...,D) -> logits (...,num_tokens), float32 at least: before temperature and softmax, not after."""
        logits = F.linear(hidden, self.head_weight())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def score(self, ids, prompt_lengths, response_lengths, temperature=1.0, width=None):
        """Log-probs and entropy (nats) of response tokens: ids (B,T), lengths (B,) -> both (B,R), 0 beyond each row.

        R is the longest response unless `width` sets it. Body and head run in this one method, so that sharded weights
        are only used inside it; the body is called without its hooks, which a sharding wrapper puts around this one."""
        width = int(response_lengths.max()) if width is None else width
        hidden = self.forward(ids)
        row, step = (torch.arange(width, device=ids.device) < response_lengths[:, None]).nonzero(as_tuple=True)
        # Response token t of a row is predicted at the position before it: prompt length − 1 + t.
        before = row * ids.shape[1] + prompt_lengths[row] - 1 + step
        picked = hidden.flatten(0, 1).index_select(0, before)
        logprobs, entropy = token_logprobs(picked, self.head_weight(), ids.flatten()[before + 1], temperature)
        empty = logprobs.new_zeros(ids.shape[0], width)
        return empty.index_put((row, step), logprobs), empty.index_put((row, step), entropy)

    @classmethod
    def from_config(cls, config, dtype=torch.float32, device="cpu", seed=0):
        """A model of random weights as Hugging Face draws them: normal(0, initializer_range), biases 0, norms 1."""
        model = cls(Config.parse(config), source_dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                continue
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=model.config.initializer_range, generator=generator)
        return model.to(dtype=dtype, device=device)

    @classmethod
    def from_pretrained(cls, path_or_id, dtype=torch.float32, device="cpu"):
        """The model in a directory (or of a Hub id) of config.json and safetensors; every key must match, both ways."""
        source = model_directory(path_or_id)
        config = Config.parse(json.loads((source / "config.json").read_text()))
        with torch.device("meta"):
            model = cls(config, source=source)
        weights = {}
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a safe_open handle is no dict)
                    weights[name] = shard.get_tensor(name)
        if not weights:
            raise ValueError(f"{source}: no *.safetensors file (other weight formats are not read)")
        if config.tie_word_embeddings and "lm_head.weight" in weights:
            # A head of its own beside "tied" would be lost silently: some exporter wrote one, and it must agree.
            head, embedding = weights.pop("lm_head.weight"), weights.get("model.embed_tokens.weight")
            if embedding is None or not torch.equal(head, embedding):
                raise ValueError(f"{source}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        wanted = model.state_dict()
        faults = {
            "missing": wanted.keys() - weights.keys(),
            "surplus": weights.keys() - wanted.keys(),
            "of another shape": {k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape},
        }
        if any(faults.values()):
            lists = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in faults.items() if names)
            raise ValueError(f"{source}: weights do not fit config.json; {lists}")
        model.source_dtype = weights["model.embed_tokens.weight"].dtype
        # Copies even where nothing changes: a tensor of a mapped file would change with the file.
        weights = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_()

    def save_pretrained(self, path, dtype=None, state_dict=None):
        """Writes a directory that transformers loads: the source's other files, config.json in its form, the weights.

        dtype: the source's unless given. state_dict: full tensors gathered elsewhere (sharded training)."""
        path, dtype = Path(path), dtype or self.source_dtype
        path.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.source.iterdir()) if self.source is not None else []:
            if file.is_file() and not file.name.endswith(WEIGHT_FILES) and file.parent != path:
                shutil.copyfile(file, path / file.name)
        raw = dict(self.config.raw)
        for name in ("dtype", "torch_dtype"):  # transformers 5 and 4
            if name in raw:
                raw[name] = str(dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        state = self.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / τ)[target] and its entropy, a chunk of rows at a time; backward makes each chunk again."""

    @staticmethod
    def _scaled(hidden, weight, temperature):
        """One chunk of logits / τ in float32 at least, in memory of its own."""
        logits = hidden @ weight.T
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = torch.empty(3, len(hidden), dtype=wide, device=hidden.device)
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = _TokenLogprobs._scaled(hidden[part], weight, temperature)
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
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32 at least: in bf16 the later chunks would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            # ∂ log p_y / ∂ logit_v = (1[v = y] − p_v) / τ, times the incoming gradient
            scale = grad[part, None] / ctx.temperature
            d = _TokenLogprobs._scaled(hidden[part], weight, ctx.temperature)
            d.sub_(lse[part, None]).exp_().mul_(-scale)
            d.scatter_add_(-1, targets[part, None], scale)
            d = d.to(hidden.dtype)
            grad_hidden[part] = d @ weight
            if grad_weight.dtype == d.dtype:
                grad_weight.addmm_(d.T, hidden[part])
            else:
                grad_weight += d.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None):
    """Log-prob of each target and entropy, in nats: hidden (N,D), weight (V,D), targets (N,) -> two (N,), float32 up.

    Never holds (N,V): `chunk` rows of logits at a time, 2^24 numbers unless given. The entropy has no gradient."""
    chunk = chunk or max(16, 2**24 // weight.shape[0])
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)
