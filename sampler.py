"""Prompts in, responses out: batched sampling with a key/value cache, in pure PyTorch.

    samples = sample(model, prompts, group_size=8, max_new_tokens=256, stop_ids=[2], seed=0, step=17)

Each prompt is run through the model once and its cache copied to its group, or shared by it; finished rows leave the
batch and waiting prompts take their place. The noise behind a token is a hash of (seed, step, data row, sample,
position) and of nothing else, so that neither batching nor the number of ranks changes what is drawn. Log-probs are
those of the distribution that was sampled from. Dropped: beams, penalties, and what generation_config.json says, except
for its stop ids.

Shapes: P prompts, G group size, B = P·G rows in prompt order (row i·G + j is sample j of prompt i), R response tokens,
V vocabulary, n rows in flight.
"""

import json
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from model import CACHE_BLOCK, KVCache, model_directory, shares_prompts

PREFILL_TOKENS = {"cpu": 1024, "cuda": 4096}  # padded prompt tokens in one forward pass: few fit a CPU's caches
STOP_CHECK = {"cpu": 1, "cuda": 8}  # tokens between two looks at the finished flags; a look makes a GPU run dry
MASK64 = 2**64 - 1


class Samples(NamedTuple):
    """All on the CPU, in prompt order. tokens (B,R) int64, 0 beyond each row's length; logprobs (B,R); lengths (B,),
    the stop token counted; finished (B,) bool: a stop token was sampled."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor


def _mix(x):
    """splitmix64's finaliser on a Python integer: every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def noise_key(*parts):
    """One signed 64-bit key of several non-negative integers (seed, step, data row, sample), in that order."""
    key = 0
    for part in parts:
        key = _mix((key + part + 1) * 0x9E3779B97F4A7C15 & MASK64)
    return key - 2**64 if key >= 2**63 else key


def uniform(keys, positions):
    """float64 in [0,1) for int64 keys (n,) and token positions (n,): _mix again, in tensors that wrap."""

    def shift(x, bits):  # logical: `>>` copies the sign bit, which the mask takes away
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = keys + (positions + 1) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    x = x ^ shift(x, 31)
    return shift(x, 11).double() * 2.0**-53


def filter_logits(logits, top_p, top_k):
    """−inf for all but the top_k largest (0: all), then for all but the fewest that hold top_p of the probability.

    Both keep every token that ties with the last one kept, so that the result does not hang on a sort's order."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, _ = logits.sort(-1, descending=True)
        p = ordered.softmax(-1, dtype=torch.float64)
        # A token stays if those before it hold less than top_p; the first one always does.
        last = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True).clamp_(min=1) - 1
        logits = logits.masked_fill(logits < ordered.gather(-1, last), -torch.inf)
    return logits


def _first_above(weights, target):
    """First index whose running sum of weights (n,m) exceeds target (n,), and what of target is left before it.

    Never an index of weight 0, however the sums are rounded; if the target lies past the end, the last positive one."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    sums_of_positive = sums.masked_fill(weights <= 0, -torch.inf)
    hit = (sums_of_positive > target[:, None]) | (sums_of_positive >= sums_of_positive.amax(-1, keepdim=True))
    index = hit.byte().argmax(-1, keepdim=True)
    before = sums.gather(-1, index) - weights.gather(-1, index)
    return index[:, 0], target - before[:, 0]


def draw(logits, noise, temperature=1.0, top_p=1.0, top_k=0):
    """Tokens and their log-probs from logits (n,V) and noise (n,) in [0,1): the inverse of the distribution function.

    Sums over blocks of the vocabulary first, then inside the one block that was hit. Overwrites logits.
    Temperature 0 takes the most likely token; its log-prob is then that of temperature 1."""
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        logits = filter_logits(logits.div_(temperature), top_p, top_k)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp()
    size = 1 << (weights.shape[1].bit_length() + 1) // 2  # about √V: as many blocks as entries in one
    blocks = F.pad(weights, (0, -weights.shape[1] % size)).view(len(weights), -1, size)
    sums = blocks.sum(-1)
    total = sums.sum(-1, dtype=torch.float64)
    if temperature != 0:
        # The first token whose running sum of weights exceeds noise · total: its block, then its place in the block.
        block, rest = _first_above(sums, noise * total)
        inside, _ = _first_above(blocks[torch.arange(len(blocks), device=block.device), block], rest)
        token = block * size + inside
    # log p_y = x_y − log Σ e^x, over what the filters left (x: logits less their maximum)
    logprob = logits.gather(-1, token[:, None])[:, 0] - total.log()
    return token, logprob.to(logits.dtype)


def rows_that_fit(config, dtype, prompt_tokens, max_new_tokens, memory, device="cpu"):
    """How many rows of the longest prompt and response sample() can hold in flight in `memory` bytes of cache.

    Counted: every row at its full length, even where its group shares the prompt, one layer twice (it is copied as it
    grows), and a prefill beside them. No fewer fit if prompts turn out shorter, and so are copied instead of shared."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    together, alone = (-(-n // CACHE_BLOCK) * CACHE_BLOCK for n in (prompt_tokens + max_new_tokens, max_new_tokens))
    apart = prompt_tokens + alone if shares_prompts(device, prompt_tokens) else 0
    row = token * max(together, apart)
    row += -(-row // config.num_hidden_layers)
    # A prefill holds a prompt for each row at most, and no more than its budget of tokens if there are many.
    few = memory // (row + token * prompt_tokens)
    many = (memory - token * max(PREFILL_TOKENS[device], prompt_tokens)) // row
    if max(few, many) < 1:
        needed = (row + token * prompt_tokens) / 2**30
        raise ValueError(f"a cache of {memory / 2**30:.3g} GiB holds no row: one of {prompt_tokens} prompt and"
                         f" {max_new_tokens} new tokens needs {needed:.3g} GiB")  # fmt: skip
    return max(few, many)


def _waiting(prompts, max_rows, group_size):
    """The work, longest prompts first so that a prefill pads little: (prompt, first sample, number of samples).

    A group larger than max_rows is cut into pieces, each of which runs its prompt again."""
    piece = min(group_size, max_rows)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return deque((i, j, min(piece, group_size - j)) for i in order for j in range(0, group_size, piece))


def _take(waiting, prompts, free, budget):
    """The next work off the list that fits into `free` rows and, past the first prompt, into a budget of tokens."""
    work = []
    while waiting and waiting[0][2] <= free:
        padded = (len(work) + 1) * len(prompts[work[0][0] if work else waiting[0][0]])
        if work and padded > budget:
            break
        work.append(waiting.popleft())
        free -= work[-1][2]
    return work


def _prefill(model, prompts):
    """Runs prompts (right-padded) through the model: a cache with one row each, and the hidden state of their ends."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
    weight = model.model.embed_tokens.weight
    ids, lengths = ids.to(weight.device), lengths.to(weight.device)
    cache = KVCache(model.config, len(prompts), ids.shape[1], weight.dtype, weight.device)
    hidden = model(ids, cache=cache, lengths=lengths)
    return cache, hidden[torch.arange(len(prompts), device=ids.device), lengths - 1]


def _drop_done(cache, done, count):
    """Moves the last rows in flight into the places of `count` finished ones; returns where each row that stays was."""
    done = done & (done.cumsum(0) <= count)
    kept = torch.arange(int((~done).sum()), device=done.device)
    holes = done[: len(kept)].nonzero()[:, 0]
    movers = (~done[len(kept) :]).nonzero()[:, 0] + len(kept)
    kept[holes] = movers
    cache.copy_rows(cache, movers, holes)
    cache.longest = int(cache.lengths[: len(kept)].max()) if len(kept) else 0
    return kept


@torch.no_grad()
def sample(
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
    max_memory=0,
    on_tokens=None,
    clock=nullcontext,
):
    """`group_size` responses to each prompt (a list of token ids) -> Samples, at most `max_rows` in flight (0: all),
    and no more than have room in `max_memory` bytes of cache (0: any number).

    max_new_tokens: one limit, or one for each of the B rows. rows: the data row of each prompt, which keys its noise.
    on_tokens(count) is told now and then how many tokens came since the last call; what it raises ends the sampling.
    clock("prefill") is entered around the passes over prompts."""
    total_rows = len(prompts) * group_size
    limits = [max_new_tokens] * total_rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    rows = range(len(prompts)) if rows is None else rows
    if total_rows == 0:
        raise ValueError(f"nothing to sample: {len(prompts)} prompts, group size {group_size}")
    if not all(prompts):
        raise ValueError("a prompt is empty: there is nothing to predict its first token from")
    if len(limits) != total_rows or min(limits) < 1:
        raise ValueError(f"max_new_tokens must be positive: one number, or one for each of the {total_rows} rows")
    total = max(len(prompts[b // group_size]) + limit for b, limit in enumerate(limits))
    if total > model.config.max_position_embeddings:
        allowed = model.config.max_position_embeddings
        raise ValueError(f"prompt and response of {total} tokens exceed the model's positions ({allowed})")
    if len(rows) != len(prompts):
        raise ValueError(f"rows names {len(rows)} data rows for {len(prompts)} prompts")

    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    max_rows, width, longest = min(max_rows or total_rows, total_rows), max(limits), max(map(len, prompts))
    share = shares_prompts(device.type, longest)
    if max_memory:
        max_rows = min(max_rows, rows_that_fit(model.config, dtype, longest, width, max_memory, device.type))
    # One column more than a response can need: finished rows write there until they leave the batch.
    tokens = torch.zeros(total_rows, width + 1, dtype=torch.long, device=device)
    logprobs = torch.zeros(total_rows, width + 1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    lengths = torch.zeros(total_rows, dtype=torch.long, device=device)
    finished = torch.zeros(total_rows, dtype=torch.bool, device=device)
    limits = torch.tensor(limits, device=device)
    keys = torch.tensor([noise_key(seed, step, row, j) for row in rows for j in range(group_size)], device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)

    def record(logits, row, done):
        """Draws and stores a token for each of the output rows `row` (n,); returns the tokens and new done flags."""
        position = lengths[row]  # within the response: what the noise is keyed by
        token, logprob = draw(logits, uniform(keys[row], position), temperature, top_p, top_k)
        column = position.masked_fill(done, width)
        tokens[row, column], logprobs[row, column] = token, logprob
        finished[row] |= (token[:, None] == stops).any(1) & ~done
        lengths[row] += ~done
        return token, finished[row] | (lengths[row] >= limits[row])

    cache = KVCache(model.config, max_rows, dtype=dtype, device=device)
    waiting = _waiting(prompts, max_rows, group_size)
    # Rows 0..n-1 of the cache are in flight: their rows in the output, last tokens, and whether they are done.
    row = token = torch.zeros(0, dtype=torch.long, device=device)
    done = torch.zeros(0, dtype=torch.bool, device=device)
    ticks = reported = 0
    with model.packed():
        while waiting or len(row):
            # A prefill holds up all rows in flight: it waits until a quarter of them stand free, and fills them all.
            if waiting and max_rows - len(row) >= max(max_rows // 4, waiting[0][2]):
                while work := _take(waiting, prompts, max_rows - len(row), PREFILL_TOKENS[device.type]):
                    with clock("prefill"):
                        prefilled, hidden = _prefill(model, [prompts[i] for i, _, _ in work])
                    pairs = [(k, i * group_size + j + m) for k, (i, j, count) in enumerate(work) for m in range(count)]
                    origin, new = torch.tensor(pairs, device=device).unbind(1)
                    cache.follow(prefilled, origin, len(row), share)
                    undone = torch.zeros(len(new), dtype=torch.bool, device=device)
                    new_token, new_done = record(model.logits(hidden)[origin], new, undone)
                    row, token, done = torch.cat([row, new]), torch.cat([token, new_token]), torch.cat([done, new_done])
            else:
                hidden = model(token[:, None], cache=cache)
                token, done = record(model.logits(hidden[:, 0]), row, done)
            ticks += 1
            if ticks % STOP_CHECK[device.type] == 0:
                # Of many rows eight at a time: oneDNN compiles a product for each number of rows that it meets.
                count = int(done.sum())
                if count := count - count % 8 if len(row) > 24 else count:
                    kept = _drop_done(cache, done, count)
                    row, token, done = row[kept], token[kept], done[kept]
                if on_tokens is not None:
                    count = int(lengths.sum())
                    on_tokens(count - reported)
                    reported = count
    if not torch.isfinite(logprobs).all():
        raise ValueError("log-probs are not finite: the model's weights hold NaN or infinity")
    width = int(lengths.max())
    # Clones: a view would keep, and send to other ranks, the columns that were not needed.
    return Samples(tokens[:, :width].clone().cpu(), logprobs[:, :width].clone().cpu(), lengths.cpu(), finished.cpu())


def load_tokenizer(path_or_id):
    """The tokenizer of a model directory or Hub id."""
    return AutoTokenizer.from_pretrained(path_or_id)


def encode_prompt(tokenizer, problem, system=None, instruction=""):
    """Token ids of a problem, ready for the reply: problem and instruction on lines of their own, through the chat
    template where there is one (with `system` if given), otherwise as plain text that ends with a newline."""
    text = "\n".join(part for part in (problem, instruction) if part)
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the BOS already
    ids = tokenizer("\n".join(part for part in (system, text) if part) + "\n")["input_ids"]
    # A tokenizer that closes every text with its end token would have the reply start after the end.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def stop_token_ids(path_or_id, tokenizer, extra=()):
    """Sorted ids that end a response: eos of generation_config.json (one or a list), of config.json, of the tokenizer,
    and the strings in `extra`, each of which must be one token."""
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
