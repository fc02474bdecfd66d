"""Prompts in, graded groups of responses out, on all ranks: batched sampling in pure PyTorch.

    samples = generate(model, prompts, group_size=8, max_new_tokens=256, stop_ids=[2], seed=0)
    rollout = generate_rollout(model, tokenizer, verifier, problems, prompts, 8, 256)

The model runs each prompt once, and its keys and values are copied to all rows of its group.
Finished rows leave the batch and waiting prompts take their places. The noise behind a token is a
hash of (seed, step, data row, sample, position), so neither batching nor the number of ranks
changes what is drawn. Log-probs are those of the distribution that was sampled from. Left out:
beams, penalties, and all of generation_config.json but its stop ids.

Shapes: P prompts, G group size, B = P·G rows in prompt order (row i·G + j is sample j of prompt i),
R response tokens, V vocabulary, H query heads, K key/value heads, E head size, n rows in flight.
"""

import json
import os
import sys
from collections import deque
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoTokenizer

from model import Transformer, causal_attention, model_directory

# What follows a problem unless --instruction says otherwise: what Qwen2.5 models were tuned with.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PREFILL_TOKENS = {"cpu": 1024, "cuda": 4096}  # padded prompt tokens of one forward pass, at most
SYNC_EVERY = {"cpu": 1, "cuda": 8}  # tokens between two looks at the finished rows: a GPU waits
CACHE_BLOCK = 128  # tokens by which the cache grows
MASK64 = 2**64 - 1


# ---------------------------------------------------------------------------- noise and tokens


def splitmix64(x):
    """splitmix64's finaliser: every bit of a 64-bit integer reaches every bit of the result."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def noise_key(*parts):
    """One signed 64-bit key of several non-negative integers: seed, step, data row, sample."""
    key = 0
    for part in parts:
        key = splitmix64((key + part + 1) * 0x9E3779B97F4A7C15 & MASK64)
    return key - 2**64 if key >= 2**63 else key


def uniform(keys, positions):
    """float64 noise in [0,1) for int64 keys and token positions, which broadcast.

    splitmix64 again, in tensors whose products wrap."""

    def shift(x, bits):  # logical: `>>` copies the sign bit, which the mask takes away
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = keys + (positions + 1) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    x = x ^ shift(x, 31)
    return shift(x, 11).double() * 2.0**-53


def filter_logits(logits, top_p, top_k):
    """−inf for all but the top_k largest (0: all), then for all but the fewest that hold top_p.

    Both keep every token that ties with the last one kept, so no sort order decides."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, _ = logits.sort(-1, descending=True)
        p = ordered.softmax(-1, dtype=torch.float64)
        # A token stays if those before it hold less than top_p. The first one always stays.
        kept = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True)
        smallest = ordered.gather(-1, kept.clamp_(min=1) - 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits


def _first_above(weights, target):
    """First index whose running sum of weights (n,m) exceeds target (n,), and what of target is
    left before it.

    Never an index of weight 0, however the sums are rounded. If the target lies past the end, the
    last index of a positive weight."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    positive = sums.masked_fill(weights <= 0, -torch.inf)
    hit = (positive > target[:, None]) | (positive >= positive.amax(-1, keepdim=True))
    index = hit.byte().argmax(-1, keepdim=True)
    before = sums.gather(-1, index) - weights.gather(-1, index)
    return index[:, 0], target - before[:, 0]


def sample_token(logits, noise, temperature=1.0, top_p=1.0, top_k=0):
    """Tokens and their log-probs from logits (n,V) and noise (n,) in [0,1), by the inverse of the
    distribution function. Overwrites logits.

    Temperature 0 takes the most likely token; its log-prob is then that of temperature 1."""
    if temperature > 0:
        logits = filter_logits(logits.div_(temperature), top_p, top_k)
    else:
        token = logits.argmax(-1)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp()
    # Sums over blocks of the vocabulary first: about √V blocks, with about √V tokens in each.
    vocab = weights.shape[1]
    size = 1 << (vocab.bit_length() + 1) // 2
    blocks = F.pad(weights, (0, -vocab % size)).view(len(weights), -1, size)
    sums = blocks.sum(-1)
    total = sums.sum(-1, dtype=torch.float64)
    if temperature > 0:
        # The first token whose running sum of weights exceeds noise · total: its block, then its
        # place in the block.
        block, rest = _first_above(sums, noise * total)
        row = torch.arange(len(blocks), device=block.device)
        inside, _ = _first_above(blocks[row, block], rest)
        token = block * size + inside
    # log p_y = x_y − log Σ e^x, over what the filters left (x: logits less their maximum)
    logprob = logits.gather(-1, token[:, None])[:, 0] - total.log()
    return token, logprob.to(logits.dtype)


# ---------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of `rows` rows, filled from index 0 without gaps.

    lengths (rows,) says how many tokens each row holds; `longest` is an upper bound that the host
    knows, so that nothing is read back from a device. The cache grows as rows get longer. No
    gradients."""

    def __init__(self, config, rows, capacity=0, dtype=torch.float32, device="cpu"):
        shape = (2, rows, config.num_key_value_heads, capacity, config.head_dim)  # keys, values
        layers = range(config.num_hidden_layers)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0

    def forward(self, model, ids, lengths=None):
        """Run ids (B,T), which follow what the first B rows hold -> hidden (B,T,D).

        lengths (B,): how many tokens of each row are real (all, if not given)."""
        rows, tokens = ids.shape
        start = self.longest
        self.longest += tokens
        self.reserve(self.longest)
        device = self.lengths.device
        self.row = torch.arange(rows, device=device)[:, None]
        self.column = self.lengths[:rows, None] + torch.arange(tokens, device=device)
        self.lengths[:rows] += tokens if lengths is None else lengths
        self.mask = None  # on an empty cache causality is mask enough
        if start:
            # A query sees the keys up to its own position: 0 there and −inf beyond.
            hidden = torch.arange(self.longest, device=device) > self.column[:, :, None]
            self.mask = torch.zeros(hidden.shape, dtype=self.layers[0].dtype, device=device)
            self.mask.masked_fill_(hidden, -torch.inf)
        return model(ids, positions=self.column, attention=self.attend)

    def attend(self, layer, q, k, v):
        """Store k and v (B,T,K,E) at the positions of forward(), and attend: q (B,T,H,E) -> like
        q."""
        keys, values = self.layers[layer]
        if self.mask is None:
            keys[: len(k), :, : self.longest] = k.transpose(1, 2)
            values[: len(v), :, : self.longest] = v.transpose(1, 2)
            return causal_attention(q, k, v)
        keys[self.row, :, self.column] = k
        values[self.row, :, self.column] = v
        keys = keys[: len(q), :, : self.longest]
        values = values[: len(q), :, : self.longest]
        # The query heads of one key/value head stand in line as if they were its queries, so that
        # the cache is never repeated: (B,T,H,E) -> (B,K,H/K·T,E).
        group = q.shape[2] // keys.shape[1]
        folded = q.transpose(1, 2).reshape(len(q), keys.shape[1], -1, q.shape[-1])
        mask = self.mask[:, None].repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        return out.reshape(len(q), q.shape[2], -1, q.shape[-1]).transpose(1, 2)

    def copy_rows(self, source, source_rows, target_rows):
        """Copy rows of `source` (this cache or another) into rows of this one."""
        self.longest = max(self.longest, source.longest)
        self.reserve(self.longest)
        for ours, theirs in zip(self.layers, source.layers):
            ours[:, target_rows, :, : source.longest] = theirs[:, source_rows, :, : source.longest]
        self.lengths[target_rows] = source.lengths[source_rows]

    def reserve(self, capacity):
        """Make room for at least `capacity` tokens a row, in blocks."""
        capacity = -(-capacity // CACHE_BLOCK) * CACHE_BLOCK
        for i, old in enumerate(self.layers):  # layer by layer: only one is ever held twice
            if old.shape[3] < capacity:
                self.layers[i] = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
                self.layers[i][:, :, :, : old.shape[3]] = old


# ---------------------------------------------------------------------------- generate


class Samples(NamedTuple):
    """All on the CPU, in prompt order."""

    tokens: torch.Tensor  # (B,R) int64, 0 beyond each row's length
    logprobs: torch.Tensor  # (B,R), 0 beyond each row's length
    lengths: torch.Tensor  # (B,), the stop token counted
    finished: torch.Tensor  # (B,) bool: a stop token was sampled


class Work(NamedTuple):
    """A part of a group: samples first … first + count − 1 of a prompt."""

    prompt: int
    first: int
    count: int


def build_queue(prompts, max_rows, group_size):
    """The work, longest prompts first, so that a prefill pads little.

    A group larger than max_rows is cut into parts, each of which runs its prompt again."""
    size = min(group_size, max_rows)
    queue = deque()
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        for first in range(0, group_size, size):
            queue.append(Work(i, first, min(size, group_size - first)))
    return queue


def next_prefill_batch(queue, prompts, free_rows, token_budget):
    """Pop the work that fits into the free rows and the prefill token budget (at least one)."""
    batch = []
    while queue and queue[0].count <= free_rows:
        longest = len(prompts[batch[0].prompt]) if batch else 0  # the queue is sorted by length
        if (len(batch) + 1) * longest > token_budget:
            break
        batch.append(queue.popleft())
        free_rows -= batch[-1].count
    return batch


class Decoder:
    """The rows in flight, rows 0…n−1 of the cache, and the responses of all B rows so far."""

    def __init__(self, model, max_rows, limits, keys, stop_ids, sampling):
        weight = model.model.embed_tokens.weight
        self.model = model
        self.sampling = sampling  # keyword arguments of sample_token
        self.device = device = weight.device
        self.cache = KVCache(model.config, max_rows, dtype=weight.dtype, device=device)
        # One column more than a response can need: finished rows write there until they leave.
        self.width = max(limits)
        shape = (len(limits), self.width + 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, dtype=wide, device=device)
        self.lengths = torch.zeros(len(limits), dtype=torch.long, device=device)
        self.finished = torch.zeros(len(limits), dtype=torch.bool, device=device)
        self.limits = torch.tensor(limits, device=device)
        self.keys = torch.tensor(keys, device=device)
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        # Of each row in flight: its row in the output, its last token, and whether it is done.
        self.row = torch.zeros(0, dtype=torch.long, device=device)
        self.token = torch.zeros(0, dtype=torch.long, device=device)
        self.done = torch.zeros(0, dtype=torch.bool, device=device)

    def prefill(self, prompts, source, row):
        """Run prompts, and put row[i] of the output in flight behind prompt source[i]."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        embedding = self.model.model.embed_tokens.weight
        shape = (len(prompts), ids.shape[1])
        cache = KVCache(self.model.config, *shape, embedding.dtype, self.device)
        hidden = cache.forward(self.model, ids.to(self.device), lengths)
        ends = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]

        source = torch.tensor(source, device=self.device)
        row = torch.tensor(row, device=self.device)
        places = torch.arange(len(row), device=self.device) + len(self.row)
        self.cache.copy_rows(cache, source, places)
        undone = torch.zeros(len(row), dtype=torch.bool, device=self.device)
        token, done = self.record(self.model.logits(ends)[source], row, undone)
        self.row = torch.cat([self.row, row])
        self.token = torch.cat([self.token, token])
        self.done = torch.cat([self.done, done])

    def decode(self):
        """Draw the next token of every row in flight."""
        hidden = self.cache.forward(self.model, self.token[:, None])
        logits = self.model.logits(hidden[:, 0])
        self.token, self.done = self.record(logits, self.row, self.done)

    def record(self, logits, row, done):
        """Draw and store a token of each output row (n,) -> the tokens and the new done flags."""
        position = self.lengths[row]  # within the response: the noise depends on it
        noise = uniform(self.keys[row], position)
        token, logprob = sample_token(logits, noise, **self.sampling)
        column = position.masked_fill(done, self.width)
        self.tokens[row, column] = token
        self.logprobs[row, column] = logprob
        self.finished[row] |= (token[:, None] == self.stops).any(1) & ~done
        self.lengths[row] += ~done
        return token, self.finished[row] | (self.lengths[row] >= self.limits[row])

    def compact(self):
        """Move the last rows in flight into the places of those that are done."""
        num_kept = int((~self.done).sum())
        if num_kept == len(self.done):
            return
        kept = torch.arange(num_kept, device=self.device)
        holes = self.done[:num_kept].nonzero()[:, 0]
        movers = (~self.done[num_kept:]).nonzero()[:, 0] + num_kept
        kept[holes] = movers
        self.cache.copy_rows(self.cache, movers, holes)
        self.cache.longest = int(self.cache.lengths[:num_kept].max()) if num_kept else 0
        self.row = self.row[kept]
        self.token = self.token[kept]
        self.done = self.done[kept]

    def samples(self):
        if not torch.isfinite(self.logprobs).all():
            raise ValueError("log-probs are not finite: the model's weights hold NaN or infinity")
        width = int(self.lengths.max())
        # Clones: a view would keep, and send to other ranks, the columns that were not needed.
        tokens = self.tokens[:, :width].clone().cpu()
        logprobs = self.logprobs[:, :width].clone().cpu()
        return Samples(tokens, logprobs, self.lengths.cpu(), self.finished.cpu())


def _check_request(model, prompts, group_size, limits, rows):
    """ValueError if generate() cannot do what it is asked for."""
    total_rows = len(prompts) * group_size
    if total_rows == 0:
        raise ValueError(f"nothing to sample: {len(prompts)} prompts, group size {group_size}")
    if not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to predict its first token from")
    if len(limits) != total_rows or min(limits) < 1:
        raise ValueError(
            f"max_new_tokens must be positive: one number, or one for each of the {total_rows} rows"
        )
    total = max(len(prompts[b // group_size]) + limit for b, limit in enumerate(limits))
    allowed = model.config.max_position_embeddings
    if total > allowed:
        raise ValueError(
            f"prompt and response of {total} tokens exceed the model's positions ({allowed})"
        )
    if len(rows) != len(prompts):
        raise ValueError(f"rows names {len(rows)} data rows for {len(prompts)} prompts")


@torch.no_grad()
def generate(
    model,
    prompts,
    group_size,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    stop_ids=(),
    seed=0,
    step=0,
    rows=None,
    max_rows=0,
    on_tokens=None,
    clock=nullcontext,
):
    """Draw group_size responses to each prompt (a list of token ids) -> Samples.

    max_new_tokens: one limit, or one for each of the B rows. rows: the data row of each prompt, on
    which its noise depends (0, 1, 2, … unless given). max_rows: rows in flight, at most (0: all).
    on_tokens(count) is told now and then how many tokens came since the last call; what it raises
    ends the sampling. clock("prefill") is entered around the passes over prompts."""
    total_rows = len(prompts) * group_size
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * total_rows
    rows = range(len(prompts)) if rows is None else rows
    _check_request(model, prompts, group_size, limits, rows)
    keys = [noise_key(seed, step, row, j) for row in rows for j in range(group_size)]
    max_rows = min(max_rows or total_rows, total_rows)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    decoder = Decoder(model, max_rows, limits, keys, stop_ids, sampling)
    device = decoder.device.type
    queue = build_queue(prompts, max_rows, group_size)
    ticks = reported = 0
    while queue or len(decoder.row):
        # A prefill holds up all rows in flight. It waits until a quarter of them are free.
        free = max_rows - len(decoder.row)
        if queue and free >= max(max_rows // 4, queue[0].count):
            while batch := next_prefill_batch(queue, prompts, free, PREFILL_TOKENS[device]):
                source = []
                row = []
                for i, work in enumerate(batch):
                    source += [i] * work.count
                    first = work.prompt * group_size + work.first
                    row += range(first, first + work.count)
                with clock("prefill"):
                    decoder.prefill([prompts[work.prompt] for work in batch], source, row)
                free -= len(row)
        else:
            decoder.decode()
        ticks += 1
        if ticks % SYNC_EVERY[device] == 0:
            decoder.compact()
            if on_tokens is not None:
                count = int(decoder.lengths.sum())
                on_tokens(count - reported)
                reported = count
    return decoder.samples()


# ---------------------------------------------------------------------------- tokenizer and model


def load_tokenizer(path_or_id):
    """The tokenizer of a model directory or Hub id."""
    return AutoTokenizer.from_pretrained(path_or_id)


def encode_prompt(tokenizer, problem, system=None, instruction=""):
    """Token ids of a problem, ready for the reply.

    Problem and instruction stand on lines of their own, in the chat template where there is one
    (with `system` if given), otherwise as plain text that ends with a newline."""
    text = "\n".join(part for part in (problem, instruction) if part)
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template wrote the BOS already.
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if system:
        text = f"{system}\n{text}"
    ids = tokenizer(text + "\n")["input_ids"]
    # A tokenizer that closes every text with its end token would start the reply after the end.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def stop_token_ids(path_or_id, tokenizer, extra=()):
    """Sorted ids that end a response: eos of generation_config.json (one or a list), of
    config.json, of the tokenizer, and the strings in `extra`, each of which must be one token."""
    stops = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = model_directory(path_or_id) / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        stops.update(eos if isinstance(eos, list) else [eos])
    for text in extra:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"stop string {text!r} is {len(ids)} tokens, not one")
        stops.update(ids)
    return sorted(stops - {None})


def load_model(path_or_id, dtype_name, device, stop=(), seed=0):
    """Model, tokenizer and stop ids of a directory or Hub id. ValueError, in one line, if any of
    them cannot be read.

    seed: of the weights, where config.json says "random_init" and there are none."""
    try:
        tokenizer = load_tokenizer(path_or_id)
        dtype = getattr(torch, dtype_name)
        model = Transformer.from_pretrained(path_or_id, dtype, device, seed)
        stop_ids = stop_token_ids(path_or_id, tokenizer, stop)
    except Exception as error:  # tokenizers and safetensors have exceptions of their own
        place = "" if Path(path_or_id).is_dir() else "no such directory, and as a Hub id: "
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load --model {path_or_id}: {place}{reason}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"--model {path_or_id}: {len(tokenizer)} tokens, but embeddings for"
            f" {model.config.vocab_size}"
        )
    model.num_tokens = len(tokenizer)  # ids beyond it have rows in the matrix but mean nothing
    return model, tokenizer, stop_ids


# ---------------------------------------------------------------------------- ranks
# One process for each GPU under torchrun, otherwise just one process.


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came, and this is a place where the run may stop."""


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device, timeout):
    """Meet the other processes that torchrun started, if it did.

    timeout: seconds that a rank waits for another before it gives up."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Python objects and offloaded shards are exchanged on the CPU also where there are GPUs.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout)
    store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts (PyTorch 2.13), with the addresses of dead
        # ranks in it. On one machine all ranks count restarts alike; on several they may not.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        store = dist.PrefixStore(f"start {restarts}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)


def shutdown_distributed():
    """End this process, if it is one of several, once its peers need nothing more from it.

    os._exit, because the interpreter's own ending may abort (SIGABRT, PyTorch 2.13): a gloo thread
    that lets go of a tensor at that moment cannot get the interpreter's lock."""
    several = world_size() > 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def all_gather(value):
    """Every rank's value, in the order of ranks, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_all_ranks(work):
    """Run work() on every rank; if one rank fails, raise its message on all.

    A ValueError or OSError becomes a ValueError everywhere, an Interrupted an Interrupted."""
    result = failure = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = (ValueError, str(error))
    except Interrupted as error:
        failure = (Interrupted, str(error))
    failures = [each for each in all_gather(failure) if each]
    for kind in (ValueError, Interrupted):  # an error is told even where another rank was stopped
        for failed, message in failures:
            if failed is kind:
                raise kind(message)
    return result


def map_over_ranks(items, work):
    """Deal items to the ranks in turn; work(share) returns a list with one result an item -> the
    results of all ranks, in the order of the items, on every rank.

    A rank without items does no work. Errors end it on all ranks, as in on_all_ranks."""
    ranks = world_size()
    share = items[rank() :: ranks]
    parts = all_gather(on_all_ranks(lambda: work(share) if share else []))
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


def print0(text):
    """Print on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def exit_with_error(script, message):
    """One line on stderr, from rank 0, and exit code 2: how every bad flag or file ends."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------- rollout


class Rollout(NamedTuple):
    """Graded groups of responses, on the CPU. The first dimension of every field is the prompt."""

    problems: list  # reward.Problem
    prompts: list  # token ids
    tokens: torch.Tensor  # (P,G,R)
    logprobs: torch.Tensor  # (P,G,R), as the sampler saw them
    lengths: torch.Tensor  # (P,G)
    finished: torch.Tensor  # (P,G) bool
    correct: torch.Tensor  # (P,G) bool
    rewards: torch.Tensor  # (P,G) float64
    classes: torch.Tensor  # (P,G) answer class, −1 where there is no answer
    failed: list  # P lists of G: "" if graded, else what the grading died of
    texts: list  # P lists of G
    answers: list  # P lists of G, None where there is no answer

    def select(self, kept):
        """The rollout of some of its prompts, in the order given."""
        parts = []
        for part in self:
            parts.append([part[i] for i in kept] if isinstance(part, list) else part[kept])
        return Rollout(*parts)

    def join(self, other):
        """This rollout and then the other; shorter responses are padded with 0."""
        parts = []
        for ours, theirs in zip(self, other):
            parts.append(ours + theirs if isinstance(ours, list) else _stack([*ours, *theirs]))
        return Rollout(*parts)


def _stack(groups):
    """P tensors (G,) or (G,R), R of each its own -> (P,G) or (P,G,R), padded with 0."""
    if groups[0].ndim == 1:
        return torch.stack(groups)
    width = max(group.shape[1] for group in groups)
    return torch.stack([F.pad(group, (0, width - group.shape[1])) for group in groups])


def generate_rollout(
    model,
    tokenizer,
    verifier,
    problems,
    prompts,
    group_size,
    max_new_tokens,
    *,
    rows=None,
    clock=nullcontext,
    **options,
):
    """Sample and grade group_size responses to each prompt, dealt over all ranks -> Rollout, the
    same on every rank.

    rows: what the noise of each prompt depends on (default: its problem's data row). options:
    further ones of generate(). clock: phases "decode", "prefill" and "verify"."""
    rows = [problem.row for problem in problems] if rows is None else rows
    allowed = model.config.max_position_embeddings
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + max_new_tokens > allowed:
            raise ValueError(
                f"data row {problem.row}: {len(prompt)} prompt tokens and {max_new_tokens} new"
                f" ones exceed the model's {allowed} positions"
            )

    def run_share(share):
        """Indices of prompts -> for each: its Samples and texts, and the Group of its grades."""
        share_prompts = [prompts[i] for i in share]
        share_rows = [rows[i] for i in share]
        with clock("decode"):
            samples = generate(
                model,
                share_prompts,
                group_size,
                max_new_tokens,
                rows=share_rows,
                clock=clock,
                **options,
            )
        with clock("verify"):
            texts = decode_groups(tokenizer, samples, group_size)
            asked = [problems[i] for i in share]
            grades = verifier.grade_groups(
                texts,
                [problem.answer for problem in asked],
                problems=[problem.problem for problem in asked],
                require_value=[problem.require_value for problem in asked],
            )
        return list(zip(split_groups(samples, group_size), texts, grades))

    groups = map_over_ranks(list(range(len(prompts))), run_share)
    samples, texts, grades = zip(*groups)
    return Rollout(
        problems=list(problems),
        prompts=list(prompts),
        tokens=_stack([group.tokens for group in samples]),
        logprobs=_stack([group.logprobs for group in samples]),
        lengths=_stack([group.lengths for group in samples]),
        finished=_stack([group.finished for group in samples]),
        correct=torch.tensor([group.correct for group in grades]),
        rewards=torch.tensor([group.rewards for group in grades], dtype=torch.float64),
        classes=torch.tensor([group.classes for group in grades]),
        failed=[group.failed for group in grades],
        texts=list(texts),
        answers=[group.answers for group in grades],
    )


def decode_groups(tokenizer, samples, group_size):
    """Samples as P lists of G texts."""
    replies = []
    for tokens, length in zip(samples.tokens.tolist(), samples.lengths.tolist()):
        replies.append(tokens[:length])
    texts = tokenizer.batch_decode(
        replies, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [texts[i : i + group_size] for i in range(0, len(texts), group_size)]


def split_groups(samples, group_size):
    """Samples of P prompts -> P Samples of G rows, each as wide as its longest response.

    Clones: a view would send the tensor of all prompts to other ranks."""
    groups = []
    for i in range(0, len(samples.lengths), group_size):
        rows = slice(i, i + group_size)
        width = int(samples.lengths[rows].max())
        groups.append(
            Samples(
                samples.tokens[rows, :width].clone(),
                samples.logprobs[rows, :width].clone(),
                samples.lengths[rows].clone(),
                samples.finished[rows].clone(),
            )
        )
    return groups
