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
import re
import sys
from collections import deque
from contextlib import nullcontext, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoTokenizer

from model import Transformer, causal_attention, model_directory, rotary_tables

# What follows a problem unless --instruction says otherwise: what Qwen2.5 models were tuned with.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PREFILL_TOKENS = {"cpu": 1024, "cuda": 4096}  # padded prompt tokens of one forward pass, at most
SYNC_EVERY = {"cpu": 1, "cuda": 8}  # tokens between two looks at the finished rows: a GPU waits
# Rows and keys of a decoding pass are rounded up to multiples of these, so that a GPU meets few
# shapes: each new one costs it a plan, or a graph.
ROW_STEP = {"cpu": 1, "cuda": 32}
KEY_STEP = {"cpu": 16, "cuda": 256}
# Where a chat template asks for the time
CURRENT_TIME = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64  # the increment of splitmix64, as a signed number


# ---------------------------------------------------------------------------- noise and tokens


def logical_shift(x, bits):
    """x >> bits of int64, with zeros from the left (`>>` copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x):
    """splitmix64's finaliser of int64: every bit reaches every bit. Products wrap."""
    x = (x ^ logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ logical_shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ logical_shift(x, 31)


def noise_key(*parts):
    """int64 keys of seed, step, data row and sample: numbers or tensors, which broadcast."""
    key = torch.zeros((), dtype=torch.long)
    for part in parts:
        key = splitmix64((key + part + 1) * GOLDEN_RATIO)
    return key


def uniform(keys, positions):
    """float64 noise in [0,1) of keys and token positions, which broadcast."""
    x = splitmix64(keys + (positions + 1) * GOLDEN_RATIO)
    return logical_shift(x, 11).double() * 2.0**-53


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


def sample_token(logits, noise, temperature=1.0, top_p=1.0, top_k=0):
    """Tokens and their log-probs from logits (n,V) and noise (n,) in [0,1), by the inverse of the
    distribution function.

    Temperature 0 takes the most likely token; its log-prob is then that of temperature 1.
    Overwrites logits."""
    if temperature > 0:
        logits = filter_logits(logits.div_(temperature), top_p, top_k)
    logits.sub_(logits.amax(-1, keepdim=True))
    sums = logits.exp().cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    if temperature > 0:
        # The first token whose running sum exceeds noise · total. That is below total, so a token
        # of probability 0 is never taken; the clamp is for logits that are not numbers.
        token = torch.searchsorted(sums, noise[:, None] * total, right=True)
        token = token.clamp_(max=logits.shape[1] - 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    # log p_y = x_y − log Σ e^x, over what the filters left (x: logits less their maximum)
    logprob = logits.gather(-1, token) - total.log()
    return token[:, 0], logprob[:, 0].to(logits.dtype)


# ---------------------------------------------------------------------------- the cache


def round_up(number, step):
    return -(-number // step) * step


def cache_capacity(tokens, device):
    """Tokens that a row of the cache has room for, where prompt and response have `tokens`."""
    return round_up(tokens, KEY_STEP[device])


def cache_bytes(config, rows, capacity, dtype):
    """Bytes of a KVCache of these sizes."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * capacity * numbers * dtype.itemsize


class KVCache:
    """Keys and values of `rows` rows of up to `capacity` tokens, allocated once. No gradients.

    A row's tokens stand at its front, in order. What lies behind them is never seen, but must be
    finite. The two methods that return an attention function are for Transformer.forward."""

    def __init__(self, config, rows, capacity, dtype, device):
        shape = (2, rows, config.num_key_value_heads, capacity, config.head_dim)  # keys, values
        layers = range(config.num_hidden_layers)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def prompt_attention(self, first, source):
        """Attention of whole prompts (P,T): row first + i of the cache gets the keys and values of
        prompt source[i]."""
        rows = slice(first, first + len(source))

        def attention(layer, q, k, v):
            pairs = torch.stack([k, v]).transpose(2, 3)  # (2,P,K,T,E)
            self.layers[layer][:, rows, :, : k.shape[1]] = pairs[:, source]
            return causal_attention(q, k, v)

        return attention

    def token_attention(self, position, num_keys):
        """Attention of one new token in each of the first n rows: it is stored at position (n,),
        and sees the keys up to there. num_keys: how many are read, the same for all rows."""
        row = torch.arange(len(position), device=position.device)
        hidden = torch.arange(num_keys, device=position.device) > position[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.layers[0].dtype, device=position.device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]  # (n,1,1,num_keys)

        def attention(layer, q, k, v):
            self.layers[layer][:, row, :, position] = torch.cat([k, v], 1)  # (n,2,K,E)
            keys, values = self.layers[layer][:, : len(q), :, :num_keys]
            # The query heads that share a key/value head stand in line as if they were its
            # queries, so no key is repeated: (n,1,H,E) -> (n,K,H/K,E).
            grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            return out.reshape(q.shape)  # not view: the kernel decides the layout

        return attention

    def move_rows(self, source, target, num_keys):
        """Copy the first num_keys tokens of rows source (m,) into rows target (m,)."""
        for layer in self.layers:
            layer[:, target, :, :num_keys] = layer[:, source, :, :num_keys]


# ---------------------------------------------------------------------------- generate


class Samples(NamedTuple):
    """All on the CPU, in prompt order."""

    tokens: torch.Tensor  # (B,R) int64, 0 beyond each row's length
    logprobs: torch.Tensor  # (B,R), 0 beyond each row's length
    lengths: torch.Tensor  # (B,), the stop token counted
    finished: torch.Tensor  # (B,) bool: a stop token was sampled


class Work(NamedTuple):
    """Some samples of one prompt, which still have to be drawn."""

    prompt: list  # token ids
    rows: range  # of the output


def build_queue(prompts, max_rows, group_size):
    """The work, longest prompts first, so that a prefill pads little.

    A group larger than max_rows is cut into parts, each of which runs its prompt again."""
    size = min(group_size, max_rows)
    queue = deque()
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        end = (i + 1) * group_size
        for first in range(i * group_size, end, size):
            queue.append(Work(prompts[i], range(first, min(first + size, end))))
    return queue


def next_prefill_batch(queue, free_rows, token_budget):
    """Pop the work that fits into the free rows and the prefill token budget (at least one)."""
    batch = []
    while queue and len(queue[0].rows) <= free_rows:
        # Padded tokens; the first prompt is the longest.
        if batch and (len(batch) + 1) * len(batch[0].prompt) > token_budget:
            break
        batch.append(queue.popleft())
        free_rows -= len(batch[-1].rows)
    return batch


class Decoder:
    """The rows in flight, and the responses so far of all B rows of the output.

    All tensors are allocated once and changed in place. Row i of `state` and of the cache belong
    together; the first num_rows are in flight, the others idle."""

    def __init__(self, model, max_rows, capacity, limits, keys, stop_ids, sampling):
        weight = model.model.embed_tokens.weight
        self.model = model
        self.sampling = sampling  # keyword arguments of sample_token
        self.device = weight.device
        self.limits = limits
        self.capacity = capacity
        self.cache = KVCache(model.config, max_rows, capacity, weight.dtype, self.device)
        positions = torch.arange(capacity, device=self.device)[:, None]
        tables = rotary_tables(model.config, positions, weight.dtype)
        self.rotary = torch.stack(tables, 1)  # (capacity,2,1,1,E)
        # One row and one column more than needed: idle rows write into that row, finished ones
        # behind their ends.
        shape = (len(limits) + 1, max(limits) + 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, dtype=wide, device=self.device)
        keys = F.pad(keys, (0, 1)).to(self.device)
        self.noise = uniform(keys[:, None], torch.arange(shape[1], device=self.device))
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)
        # Of each row: its row in the output, its last token and that token's position, tokens
        # drawn, most to draw, 1 while it goes on.
        idle = torch.tensor([len(limits), 0, 0, 0, 0, 0], device=self.device)
        self.idle = idle[:, None]
        self.state = self.idle.repeat(1, max_rows)  # (6,max_rows)
        self.num_rows = 0
        self.num_keys = 0  # tokens in the cache of the longest row, at most
        self.lengths = [0] * len(limits)  # tokens drawn for each row of the output, when last seen

    def prefill(self, batch):
        """Run the prompts of a batch of Work, and put their rows in flight."""
        source = []
        state = []
        for i, work in enumerate(batch):
            for row in work.rows:
                source.append(i)
                state.append([row, 0, len(work.prompt) - 1, 0, self.limits[row], 1])
        longest = max(len(work.prompt) for work in batch)
        padded = [work.prompt + [0] * (longest - len(work.prompt)) for work in batch]
        ids = torch.tensor(padded, device=self.device)
        source = torch.tensor(source, device=self.device)
        rows = slice(self.num_rows, self.num_rows + len(state))
        self.state[:, rows] = torch.tensor(state, device=self.device).T

        attention = self.cache.prompt_attention(self.num_rows, source)
        hidden = self.model(ids, attention=attention)
        position = self.state[2, rows]
        logits = self.model.logits(hidden[source, position])
        self.draw(rows, logits)
        self.num_rows += len(state)
        self.num_keys = max(self.num_keys, longest)

    def decode(self):
        """Draw the next token of every row in flight. Few shapes: rows and keys are rounded up."""
        self.num_keys += 1
        num_rows = round_up(self.num_rows, ROW_STEP[self.device.type])
        num_keys = round_up(self.num_keys, KEY_STEP[self.device.type])
        self.decode_pass(min(num_rows, self.state.shape[1]), min(num_keys, self.capacity))

    def decode_pass(self, num_rows, num_keys):
        """decode() of fixed shape. It reads nothing back from the device and leaves no new tensor,
        so that it could be captured in a CUDA graph."""
        _, token, position, *_ = self.state[:, :num_rows]
        rotary = self.rotary[position].unbind(1)
        attention = self.cache.token_attention(position, num_keys)
        hidden = self.model(token[:, None], rotary=rotary, attention=attention)
        self.draw(slice(num_rows), self.model.logits(hidden[:, 0]))

    def draw(self, rows, logits):
        """Draw and store one token of each of these rows (a slice). A row that is done stays where
        it is."""
        row, last, position, drawn, limit, live = self.state[:, rows]
        token, logprob = sample_token(logits, self.noise[row, drawn], **self.sampling)
        self.tokens[row, drawn] = token
        self.logprobs[row, drawn] = logprob
        last.copy_(token)
        position += live
        drawn += live
        stopped = (token[:, None] == self.stops).any(1)
        live *= (drawn < limit) & ~stopped

    def drop_finished(self):
        """Take finished rows out of flight; the last rows move into their places.

        -> how many tokens were drawn since the last call. On a GPU the host waits here."""
        before = sum(self.lengths)
        row, _, position, drawn, _, live = self.state[:, : self.num_rows].tolist()
        for i, count in zip(row, drawn):
            self.lengths[i] = count
        kept = [i for i, goes_on in enumerate(live) if goes_on]
        self.num_keys = max((position[i] for i in kept), default=0)
        movers = [i for i in kept if i >= len(kept)]
        holes = sorted(set(range(len(kept))) - set(kept))
        if movers:
            source, target = torch.tensor([movers, holes], device=self.device)
            self.cache.move_rows(source, target, self.num_keys)
            self.state[:, target] = self.state[:, source]
        self.state[:, len(kept) : self.num_rows] = self.idle
        self.num_rows = len(kept)
        return sum(self.lengths) - before

    def samples(self):
        lengths = torch.tensor(self.lengths)
        width = max(self.lengths)
        beyond = torch.arange(width) >= lengths[:, None]
        tokens = self.tokens[:-1, :width].cpu().masked_fill(beyond, 0)
        logprobs = self.logprobs[:-1, :width].cpu().masked_fill(beyond, 0)
        if not torch.isfinite(logprobs).all():
            raise ValueError("log-probs are not finite: the model's weights hold NaN or infinity")
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        return Samples(tokens, logprobs, lengths, torch.isin(last, self.stops.cpu()))


def _check_request(model, prompts, group_size, limits, rows):
    """ValueError if generate() cannot do what it is asked for -> tokens of the longest row."""
    total_rows = len(prompts) * group_size
    if total_rows == 0:
        raise ValueError(f"nothing to sample: {len(prompts)} prompts, group size {group_size}")
    if not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to predict its first token from")
    if len(limits) != total_rows or min(limits) < 1:
        raise ValueError(
            f"max_new_tokens must be positive: one number, or one for each of the {total_rows} rows"
        )
    if len(rows) != len(prompts):
        raise ValueError(f"rows names {len(rows)} data rows for {len(prompts)} prompts")
    lengths = [len(prompts[b // group_size]) + limit for b, limit in enumerate(limits)]
    longest = max(lengths)
    allowed = model.config.max_position_embeddings
    if longest > allowed:
        row = rows[lengths.index(longest) // group_size]
        raise ValueError(
            f"data row {row}: prompt and response of {longest} tokens exceed the model's positions "
            f"({allowed})"
        )
    return longest


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
    cache_tokens=0,
    on_tokens=None,
    clock=nullcontext,
):
    """Draw group_size responses to each prompt (a list of token ids) -> Samples.

    max_new_tokens: one limit, or one for each of the B rows. rows: the data row of each prompt, on
    which its noise depends (0, 1, 2, … unless given). max_rows: rows in flight, at most (0: all).
    cache_tokens: what the cache has room for in each row (0: what these prompts need); one number
    for many calls spares a GPU's allocator many sizes. on_tokens(count) is told now and then how
    many tokens came since the last call; what it raises ends the sampling. clock("prefill") is
    entered around the passes over prompts."""
    total_rows = len(prompts) * group_size
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * total_rows
    rows = list(range(len(prompts)) if rows is None else rows)
    longest = _check_request(model, prompts, group_size, limits, rows)
    max_rows = min(max_rows or total_rows, total_rows)
    device = model.model.embed_tokens.weight.device.type
    capacity = cache_capacity(max(longest, cache_tokens), device)
    keys = noise_key(seed, step, torch.tensor(rows)[:, None], torch.arange(group_size)).flatten()
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    decoder = Decoder(model, max_rows, capacity, limits, keys, stop_ids, sampling)
    queue = build_queue(prompts, max_rows, group_size)
    ticks = 0
    while queue or decoder.num_rows:
        # A prefill holds up all rows in flight. It waits until a quarter of them are free.
        free = max_rows - decoder.num_rows
        if queue and free >= max(max_rows // 4, len(queue[0].rows)):
            while batch := next_prefill_batch(queue, free, PREFILL_TOKENS[device]):
                with clock("prefill"):
                    decoder.prefill(batch)
                free = max_rows - decoder.num_rows
        else:
            decoder.decode()
        ticks += 1
        if ticks % SYNC_EVERY[device] == 0:
            count = decoder.drop_finished()
            if on_tokens is not None:
                on_tokens(count)
    return decoder.samples()


# ---------------------------------------------------------------------------- tokenizer and model


def load_tokenizer(path_or_id):
    """The tokenizer of a model directory or Hub id."""
    return AutoTokenizer.from_pretrained(path_or_id)


def fix_date(tokenizer, date):
    """Let the chat template print this moment (ISO 8601) where it would print the current time."""
    moment = datetime.fromisoformat(date)
    if tokenizer.chat_template:
        tokenizer.chat_template = CURRENT_TIME.sub(
            lambda call: json.dumps(moment.strftime(call[2])), tokenizer.get_chat_template()
        )


def encode_prompts(tokenizer, problems, *options):
    """The prompts of reward.Problems as lists of token ids; options: those of encode_prompt.

    ValueError, in one line, if they cannot be made or are all the same."""
    try:
        prompts = [encode_prompt(tokenizer, p.messages or p.problem, *options) for p in problems]
    except Exception as error:  # of jinja2, of the tokenizer, or whatever a template does
        raise ValueError(f"no prompts from this chat template or tokenizer: {error}") from error
    if len(set(map(tuple, prompts))) == 1 < len(prompts):
        raise ValueError("all prompts are the same: the tokenizer does not know their characters")
    return prompts


def encode_prompt(tokenizer, problem, system=None, instruction="", template_args=None):
    """Token ids of a problem, ready for the reply.

    problem: its text, or chat messages, which are used as they are. Text and instruction stand on
    lines of their own, in the chat template where there is one (with `system` if given), otherwise
    as plain text that ends with a newline. template_args: what else the template may ask for."""
    messages = problem
    if isinstance(problem, str):
        text = "\n".join(part for part in (problem, instruction) if part)
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
    if tokenizer.chat_template:
        text = render_template(tokenizer, messages, template_args or {})
        # The template wrote the BOS already.
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = "\n".join(message["content"] for message in messages if message["content"])
    ids = tokenizer(text + "\n")["input_ids"]
    # A tokenizer that closes every text with its end token would start the reply after the end.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def render_template(tokenizer, messages, template_args):
    """The chat template's text. ValueError if it lacks what system or user says.

    Contents go in as text, or, where they do not come out again, as lists of parts."""
    said = [message["content"] for message in messages if message["role"] != "assistant"]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for form in (messages, parts):
        text = tokenizer.apply_chat_template(
            form, add_generation_prompt=True, tokenize=False, **template_args
        )
        lost = [content for content in said if single_spaced(content) not in single_spaced(text)]
        if not lost and "'type': 'text'" not in text:  # parts as Python prints them
            return text
    raise ValueError(f"it leaves out {lost or said}")


def single_spaced(text):
    return " ".join(text.split())


def opens_thought(tokenizer, prompt):
    """True if a prompt ends in <think>: a reply that never closes it has no answer."""
    return tokenizer.decode(prompt[-16:]).rstrip().endswith("<think>")


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
    # The largest id counts, not the number of tokens: a vocabulary may have holes. Rows beyond it
    # mean nothing; tokens beyond the matrix do no harm as long as nothing uses them.
    largest = max(tokenizer.get_vocab().values())
    model.usable_vocab = min(largest + 1, model.config.vocab_size)
    if not stop_ids or max(stop_ids) >= model.usable_vocab:
        raise ValueError(
            f"--model {path_or_id}: end tokens {stop_ids}, of {model.usable_vocab} tokens: one can"
            " never be sampled, or there is none and --stop should name it"
        )
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
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device here")
        # cuDNN's attention takes 0.4 s to plan for each new shape, and decoding meets many.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Python objects and offloaded shards are exchanged on the CPU also where there are GPUs.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError:
        # Every rank says so, since rank 0 may be the one that is missing.
        print(
            f"rank {os.environ['RANK']}: the other ranks did not come within {timeout}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts (PyTorch 2.13), with the addresses of dead
        # ranks in it. On one machine all ranks count restarts alike; on several they may not.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
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
        failure = ValueError(str(error))
    except Interrupted as error:
        failure = error
    failures = [each for each in all_gather(failure) if each]
    if failures:  # an error is told even where another rank was stopped
        raise min(failures, key=lambda each: isinstance(each, Interrupted))
    return result


def map_over_ranks(items, work):
    """Deal items to the ranks in turn; work(share) returns a list with one result an item -> the
    results of all ranks, in the order of the items, on every rank.

    A rank without items does no work. Errors end it on all ranks, as in on_all_ranks."""
    ranks = world_size()
    share = items[rank() :: ranks]
    parts = all_gather(on_all_ranks(lambda: work(share) if share else []))
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


def replace_unprintable():
    """Let stdout print "?" for characters that it lacks."""
    with suppress(AttributeError, ValueError):  # it is of another kind, or closed
        sys.stdout.reconfigure(errors="replace")


def print0(text):
    """Print on rank 0 only. A stdout that is closed, or that nobody reads, is no error."""
    if rank() > 0:
        return
    try:
        print(text, flush=True)
    except ValueError:  # it is closed
        pass
    except OSError:
        # Its reader has gone. What is left to print would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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

    def run_share(share):
        """(problem, prompt, row) triples -> of each the Samples, the texts and their Group."""
        asked, share_prompts, share_rows = zip(*share)
        options.update(rows=share_rows, clock=clock)
        with clock("decode"):
            samples = generate(model, share_prompts, group_size, max_new_tokens, **options)
        with clock("verify"):
            texts = decode_groups(tokenizer, samples, group_size)
            groups = verifier.grade_groups(
                texts,
                [problem.answer for problem in asked],
                problems=[problem.problem for problem in asked],
                require_value=[problem.require_value for problem in asked],
                in_thought=[opens_thought(tokenizer, prompt) for prompt in share_prompts],
            )
        return list(zip(split_groups(samples, group_size), texts, groups))

    results = map_over_ranks(list(zip(problems, prompts, rows)), run_share)
    samples, texts, groups = zip(*results)
    return Rollout(
        list(problems),
        list(prompts),
        *map(_stack, zip(*samples)),  # tokens, log-probs, lengths, finished
        correct=torch.tensor([group.correct for group in groups]),
        rewards=torch.tensor([group.rewards for group in groups], dtype=torch.float64),
        classes=torch.tensor([group.classes for group in groups]),
        failed=[group.failed for group in groups],
        texts=list(texts),
        answers=[group.answers for group in groups],
    )


def decode_groups(tokenizer, samples, group_size):
    """Samples as P lists of G texts."""
    rows = zip(samples.tokens.tolist(), samples.lengths.tolist())
    replies = [tokens[:length] for tokens, length in rows]
    texts = tokenizer.batch_decode(
        replies, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [texts[i : i + group_size] for i in range(0, len(texts), group_size)]


def split_groups(samples, group_size):
    """Samples of P prompts -> P Samples of G rows."""
    parts = [part.unflatten(0, (-1, group_size)) for part in samples]
    # Clones: a view would send the tensors of all prompts to other ranks.
    return [Samples(*[group.clone() for group in groups]) for groups in zip(*parts)]
