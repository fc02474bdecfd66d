"""The sampler against transformers' generate, against exact distributions, and against itself under
other batching.

Guards against: ragged prompts that see padding, a cache row that goes to the wrong sample when rows
leave or join, a stop token dropped or not counted, several stop ids, a length limit off by one,
top-p and top-k that keep a token too many or too few, tokens of probability zero, log-probs of
another distribution than the one sampled from, noise that hangs on the batch, the order or the
number of rows in flight, finished rows that go on costing, prompts run once per sample, ids that no
tokenizer makes, a second BOS, and a stop string of several tokens."""

import collections
import contextlib
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import token_hashes
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import sampler
from model import Transformer
from sampler import (
    KVCache,
    Rollout,
    Samples,
    cache_bytes,
    cache_capacity,
    encode_prompt,
    generate,
    generate_rollout,
    load_model,
    load_tokenizer,
    noise_key,
    sample_token,
    stop_token_ids,
    uniform,
)

FAMILIES = {"qwen2": 0, "qwen3": 1, "llama": 2}


def tiny(kind="qwen2", vocab=53, dtype=torch.float32, spread=0.25, seed=0):
    config = {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 300,
        "initializer_range": spread,
        "tie_word_embeddings": kind != "llama",
        "rope_theta": 10000.0,
        "eos_token_id": 0,
    }
    return Transformer.from_config(config, dtype=dtype, seed=seed)


def ragged_prompts(lengths=(5, 17, 2, 9, 1, 30), vocab=53, seed=0):
    r = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=r).tolist() for n in lengths]


def padded(prompts, samples, group_size):
    """ids, prompt lengths, response lengths as response_logprobs() takes them."""
    rows = [
        prompts[b // group_size] + samples.tokens[b, :n].tolist()
        for b, n in enumerate(samples.lengths.tolist())
    ]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(group_size)
    return ids, lengths, samples.lengths


def assert_same(one, other):
    """Tokens, lengths and finished flags equal; log-probs up to float64 rounding."""
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.lengths, other.lengths) and torch.equal(one.finished, other.finished)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-10, rtol=0)


def chi_square_p(counts, probabilities):
    """p-value of Pearson's test; the rarest tokens are pooled until every cell expects five or
    more."""
    n = counts.sum()
    order = probabilities.argsort()
    small = (probabilities[order].cumsum(0) * n < 5).sum() + 1
    cells = [(counts[order[:small]].sum(), probabilities[order[:small]].sum())]
    cells += [(counts[i], probabilities[i]) for i in order[small:]]
    x = sum((c - n * p) ** 2 / (n * p) for c, p in cells if p > 0)
    return float(
        torch.special.gammaincc(
            torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), x.double() / 2
        )
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_equals_generate(tmp_path, kind):
    """Every prompt alone through generate; ours ragged, in one batch and through three rows; pad =
    an end token = 0."""
    model = tiny(kind, seed=FAMILIES[kind])
    model.save_pretrained(tmp_path / "m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    prompts = ragged_prompts()
    free = generate(model, prompts, 1, 40, temperature=0)
    met = {t: int((free.tokens == t).any(1).sum()) for t in free.tokens.unique().tolist()}
    stops = [
        0,
        *[t for t, rows in met.items() if 0 < rows < 3 and t][:2],
    ]  # two that end some replies and not others
    for max_rows in (0, 3):
        samples = generate(model, prompts, 1, 40, temperature=0, stop_ids=stops, max_rows=max_rows)
        for b, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            options = dict(do_sample=False, max_new_tokens=40, eos_token_id=stops, pad_token_id=0)
            out = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[
                0, len(prompt) :
            ].tolist()
            assert samples.tokens[b, : samples.lengths[b]].tolist() == out
            assert bool(samples.finished[b]) == (out[-1] in stops)
            assert samples.tokens[b, samples.lengths[b] :].eq(0).all()
    assert 0 < samples.finished.sum() < len(prompts)  # both endings occurred
    # Greedy log-probs are those of temperature 1.
    logprobs, _ = model.response_logprobs(*padded(prompts, samples, 1))
    torch.testing.assert_close(samples.logprobs, logprobs.detach(), atol=1e-5, rtol=0)


def kept_tokens(p, top_p, top_k):
    """The tokens that top-k, then top-p leave, by the definition: sort, take, add up."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: top_k or len(p)]
    total, held, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if held >= top_p * total:
            break
        kept.append(i)
        held += p[i]
    return kept


@pytest.mark.parametrize(
    "temperature,top_p,top_k", [(1, 1, 0), (0.7, 1, 0), (1, 0.8, 0), (1.4, 1, 7), (1, 0.6, 20)]
)
def test_frequencies_pass_a_chi_square_test(tmp_path, temperature, top_p, top_k):
    """First and second tokens of many samples against transformers' probabilities, filtered by the
    definition."""
    model = tiny("qwen3", spread=0.25)
    model.save_pretrained(tmp_path / "m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    prompt, count = [7, 3, 11], 6000
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=3)
    samples = generate(model, [prompt, [1, 2]], count, 2, **options)
    first, second = samples.tokens[:count].unbind(1)
    likeliest = int(first.mode().values)
    for context, drawn in (([], first), ([likeliest], second[first == likeliest])):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + context])).logits[0, -1].double()
        p = (logits / temperature).softmax(-1)
        kept = kept_tokens(p.tolist(), top_p, top_k)
        assert 3 < len(kept) <= 53
        mask = torch.zeros(53, dtype=torch.bool)
        mask[kept] = True
        p = torch.where(mask, p, 0) / p[mask].sum()
        counts = torch.bincount(drawn, minlength=53)
        assert counts[~mask].sum() == 0
        assert chi_square_p(counts, p) > 1e-3
        # The log-probs are those of the filtered distribution, renormalised.
        returned = (
            samples.logprobs[:count, 1][first == likeliest]
            if context
            else samples.logprobs[:count, 0]
        )
        torch.testing.assert_close(returned.double(), p[drawn].log(), atol=1e-5, rtol=0)


def test_the_chi_square_test_can_fail():
    counts = torch.tensor([400, 300, 300])
    assert chi_square_p(counts, torch.tensor([0.4, 0.3, 0.3])) > 0.99
    assert chi_square_p(counts, torch.tensor([1 / 3] * 3)) < 1e-3


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_what_training_recomputes(dtype, limit, temperature):
    model = tiny("llama", dtype=dtype)
    prompts = ragged_prompts()
    samples = generate(
        model, prompts, 4, 25, temperature=temperature, stop_ids=[0, 5, 9], max_rows=9
    )
    logprobs, _ = model.response_logprobs(*padded(prompts, samples, 4), temperature)
    assert samples.logprobs.dtype == dtype and 3 < samples.finished.sum() < 24
    torch.testing.assert_close(samples.logprobs, logprobs.detach(), atol=limit, rtol=0)


def test_bf16_samples_and_scores_nearly_alike():
    model = tiny("qwen2", dtype=torch.bfloat16, spread=0.1)
    prompts = ragged_prompts()
    samples = generate(model, prompts, 4, 25, max_rows=9)
    logprobs, _ = model.response_logprobs(*padded(prompts, samples, 4))
    assert samples.logprobs.dtype == logprobs.dtype == torch.float32
    assert (samples.logprobs - logprobs).abs().mean() < 0.02


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 30}])
def test_float64_tokens_do_not_depend_on_batching(monkeypatch, options):
    model = tiny("qwen2", dtype=torch.float64)
    prompts = ragged_prompts()
    options = dict(stop_ids=[0, 4, 8], seed=5, step=2) | options
    whole = generate(model, prompts, 5, 30, **options)
    assert len(set(whole.lengths.tolist())) > 8
    for max_rows in (1, 3, 7, 11):
        assert_same(generate(model, prompts, 5, 30, max_rows=max_rows, **options), whole)
    # Any order and any part of the prompts, given their data rows; fewer samples are the first of
    # more.
    order = [4, 0, 3]
    part = generate(model, [prompts[i] for i in order], 3, 30, rows=order, **options)
    picked = torch.tensor([i * 5 + j for i in order for j in range(3)])
    width = part.tokens.shape[1]
    assert_same(part, Samples(*(x[picked, :width] if x.ndim == 2 else x[picked] for x in whole)))
    # Prefills of other sizes, and finished rows that linger as they do on a GPU.
    monkeypatch.setitem(sampler.PREFILL_TOKENS, "cpu", 20)
    assert_same(generate(model, prompts, 5, 30, **options), whole)
    monkeypatch.setitem(sampler.SYNC_EVERY, "cpu", 7)
    assert_same(generate(model, prompts, 5, 30, max_rows=12, **options), whole)


def test_float64_tokens_are_those_of_earlier_samplers():
    """Families, temperatures, top-p with top-k, ragged prompts and limits, refilled rows; see
    token_hashes.py."""
    expected = json.loads(Path(__file__).with_name("token_hashes.json").read_text())
    drawn = token_hashes.draw_all(Transformer, generate, torch.float64)
    assert drawn.keys() == expected.keys() and len(drawn) == 48
    for name, (*tokens, logprobs) in drawn.items():
        assert tokens == expected[name][:3], name
        assert logprobs == pytest.approx(expected[name][3], abs=1e-8), name


def test_float32_tokens_hardly_depend_on_batching():
    model = tiny("qwen2")
    prompts = ragged_prompts()
    whole = generate(model, prompts, 8, 50)
    other = generate(model, prompts, 8, 50, max_rows=5)
    assert (whole.tokens != other.tokens).sum() <= 1e-3 * whole.tokens.numel()


def test_noise_depends_on_seed_step_data_row_and_sample():
    model = tiny(dtype=torch.float64)
    prompts = [[3, 1, 4]] * 2
    base = generate(model, prompts, 3, 20, seed=1, step=1, rows=[10, 11])
    assert (
        len({tuple(row) for row in base.tokens.tolist()}) == 6
    )  # same prompt, six different replies
    for change in ({"seed": 2}, {"step": 2}, {"rows": [12, 13]}):
        other = generate(
            model, prompts, 3, 20, **({"seed": 1, "step": 1, "rows": [10, 11]} | change)
        )
        assert (other.tokens == base.tokens).float().mean() < 0.5
    swapped = generate(model, prompts, 3, 20, seed=1, step=1, rows=[11, 10])
    assert torch.equal(swapped.tokens, base.tokens.roll(3, 0))


def test_uniform_is_splitmix64():
    """The published first outputs for seed 1234567, cut to 53 bits."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    noise = uniform(torch.full((4,), 1234567), torch.arange(4))
    assert noise.tolist() == [(x >> 11) / 2**53 for x in expected]


def test_noise_is_uniform_and_uncorrelated():
    steps, rows = torch.arange(3)[:, None, None], torch.arange(20)[:, None]
    keys = noise_key(0, steps, rows, torch.arange(8)).flatten()
    assert len(set(keys.tolist())) == 480
    noise = uniform(keys[:, None].expand(-1, 200), torch.arange(200).expand(480, -1))
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise.float(), 50, 0, 1)
    assert chi_square_p(counts, torch.full((50,), 0.02)) > 1e-3
    z = (noise - 0.5) * 12**0.5
    # Neighbouring positions, samples, rows and steps: correlations of about 1/√n and no more.
    for a, b in ((z[:, 1:], z[:, :-1]), (z[1:], z[:-1]), (z[8:], z[:-8]), (z[160:], z[:-160])):
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("vocab", [1, 2, 31, 512, 1000, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_token_inverts_the_distribution_function(vocab, dtype):
    r = torch.Generator().manual_seed(vocab)
    logits = torch.randn(200, vocab, generator=r, dtype=dtype) * 3
    noise = torch.rand(200, generator=r, dtype=torch.float64)
    token, logprob = sample_token(logits.clone(), noise, 0.8)
    p = (logits.double() / 0.8).softmax(-1)
    cdf = p.cumsum(-1)
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    row = torch.arange(200)
    assert (cdf[row, token] > noise - slack).all() and (
        (cdf - p)[row, token] <= noise + slack
    ).all()
    torch.testing.assert_close(logprob.double(), p[row, token].log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_token_never_takes_a_token_of_probability_zero(dtype):
    """Noise at the very ends, zeros everywhere a sum can end: first, last, whole blocks, around the
    only token."""
    noise = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    r = torch.Generator().manual_seed(0)
    for vocab in (5, 40, 300, 1025):
        for keep in (1, 2, 3, vocab // 2 + 1):
            for _ in range(20):
                allowed = torch.randperm(vocab, generator=r)[:keep]
                logits = torch.full((4, vocab), -torch.inf, dtype=dtype)
                logits[:, allowed] = torch.randn(keep, generator=r, dtype=dtype) * 20
                token, logprob = sample_token(logits, noise.clone())
                assert torch.isin(token, allowed).all() and logprob.isfinite().all()


def test_sample_token_survives_extreme_logits():
    """exp(1e4) is infinite: without the maximum taken off, log-probs were NaN."""
    logits = torch.tensor([[1e4, 1e4, -1e4], [-1e4, -2e4, -3e4]])
    token, logprob = sample_token(logits.clone(), torch.tensor([0.7, 0.7], dtype=torch.float64))
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logprob, torch.tensor([0.5, 1.0]).log())
    token, logprob = sample_token(logits.clone(), torch.zeros(2, dtype=torch.float64), 0)
    assert token.tolist() == [0, 0] and logprob.isfinite().all()


def test_top_p_and_top_k_at_their_edges():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(2000, 1)
    noise = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    def seen(**options):
        return collections.Counter(sample_token(logits.clone(), noise, **options)[0].tolist())

    assert seen() == {0: 1000, 1: 500, 2: 250, 3: 250}
    assert seen(top_k=1) == {0: 2000} and seen(top_p=1e-9) == {0: 2000}
    assert seen(top_p=0.49) == {0: 2000}  # held by the first: nothing more is needed
    assert set(seen(top_p=0.51)) == {0, 1} and set(seen(top_k=2)) == {0, 1}
    assert set(seen(top_k=3)) == set(seen(top_p=0.8)) == {0, 1, 2, 3}  # ties stay together
    assert set(seen(top_k=99)) == {0, 1, 2, 3}
    # top-k first, and top-p on what it leaves: the first of two now holds 2/3.
    assert seen(top_k=2, top_p=0.6) == {0: 2000}


def test_limits_stops_and_flags():
    model = tiny()
    prompts = ragged_prompts((4, 8))
    limits = [1, 7, 30, 2, 30, 13]
    samples = generate(model, prompts, 3, limits)
    assert samples.lengths.tolist() == limits and not samples.finished.any()
    assert samples.tokens.shape == samples.logprobs.shape == (6, 30)
    # Stop at a token that row 2 drew somewhere inside: it is counted, kept as the last one, and
    # nothing follows.
    stop = int(samples.tokens[2, 11])
    at = samples.tokens[2].tolist().index(stop)
    stopped = generate(model, prompts, 3, limits, stop_ids=[stop])
    assert stopped.lengths[2] == at + 1 and stopped.tokens[2, at] == stop and stopped.finished[2]
    assert torch.equal(stopped.tokens[2, : at + 1], samples.tokens[2, : at + 1])
    assert stopped.tokens[2, at + 1 :].eq(0).all() and stopped.logprobs[2, at + 1 :].eq(0).all()
    # A stop token on the last allowed position counts as finished.
    exact = generate(model, prompts, 3, [1, 7, at + 1, 2, 30, 13], stop_ids=[stop])
    assert exact.lengths[2] == at + 1 and exact.finished[2]


def test_only_usable_ids_are_sampled():
    model = tiny(spread=0.05)  # nearly uniform: every id would come
    model.usable_vocab = 20
    samples = generate(model, [[1, 2, 3]], 200, 5)
    assert set(samples.tokens.flatten().tolist()) == set(range(20))
    assert generate(model, [[1]], 1, 9, temperature=0).tokens.max() < 20


def test_prompts_run_once_and_finished_rows_cost_nothing(monkeypatch):
    model, shapes = tiny(), []
    forward = Transformer.forward

    def counting(self, ids, **options):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, **options)

    monkeypatch.setattr(Transformer, "forward", counting)
    prompts = ragged_prompts((6, 2, 4))
    limits = [1, 9, 4, 17, 3, 3, 8, 20, 2, 5, 6, 7]
    seen = []
    generate(model, prompts, 4, limits, on_tokens=seen.append)
    assert shapes[0] == (3, 6) and all(width == 1 for _, width in shapes[1:])
    # The first token comes from the prefill; every other one costs its own row in one pass and no
    # more.
    assert sum(rows for rows, _ in shapes[1:]) == sum(limits) - len(limits)
    assert sum(seen) == sum(limits) and len(seen) > 5
    shapes.clear()
    generate(model, prompts, 4, limits, max_rows=4)
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert len(prefills) == 3 and max(rows for rows, _ in shapes) <= 4
    assert sum(rows for rows, width in shapes if width == 1) == sum(limits) - len(limits)


def test_waiting_prompts_take_the_places_of_finished_rows(monkeypatch):
    """Eight rows in flight, one of them long: the others are refilled while it runs, rather than
    after it."""
    model, passes = tiny(), []
    forward = Transformer.forward

    def counting(self, ids, **options):
        passes.append(tuple(ids.shape))
        return forward(self, ids, **options)

    monkeypatch.setattr(Transformer, "forward", counting)
    limits = [100] + [5] * 63
    generate(model, ragged_prompts([3] * 32), 2, limits, max_rows=8)
    assert sum(width == 1 for _, width in passes) == 99


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_cache_in_pieces_equals_one_pass(kind):
    """Ragged prompts to several rows each, then token by token, with rows that move and rows whose
    place another had before."""
    model = tiny(kind, dtype=torch.float64)
    ids = torch.tensor(ragged_prompts([40] * 4))
    whole = model(ids)
    cache = KVCache(model.config, 6, 64, torch.float64, "cpu")
    for layer in cache.layers:
        layer.fill_(1e3)  # what a row held before must never be seen

    def close(hidden, rows, positions):
        torch.testing.assert_close(hidden, whole[rows, positions], atol=1e-10, rtol=0)

    hidden = model(ids[:2, :11], attention=cache.prompt_attention(0, torch.tensor([1, 0, 1])))
    close(hidden, torch.tensor([[0], [1]]), torch.arange(11))
    model(ids[2:, :7], attention=cache.prompt_attention(3, torch.tensor([1, 0])))
    rows = torch.tensor([1, 0, 1, 3, 2])
    position = torch.tensor([11, 5, 9, 7, 3])  # shorter than their prompts: the rest is overwritten

    def step(num_keys):
        attention = cache.token_attention(position, num_keys)
        token = ids[rows, position][:, None]
        close(model(token, position[:, None], attention=attention)[:, 0], rows, position)

    for num_keys in (12, 13, 32):
        step(num_keys)
        position += 1
    cache.move_rows(torch.tensor([4, 3]), torch.tensor([0, 1]), 15)
    rows, position = rows[[4, 3, 2]], position[[4, 3, 2]]
    for _ in range(20):
        step(64)
        position += 1


def test_a_rollout_allocates_one_cache_of_the_size_that_its_formula_says(monkeypatch):
    """With cache_tokens ten rollouts take ten times the same, whatever their prompts: a GPU's
    allocator then needs no more than for the first."""
    made, moves, init, move_rows = [], [], KVCache.__init__, KVCache.move_rows

    def watched_init(self, *args, **options):
        init(self, *args, **options)
        made.append((self, [layer.data_ptr() for layer in self.layers]))

    def watched_move(self, source, target, num_keys):
        moves.append(len(source))
        move_rows(self, source, target, num_keys)

    monkeypatch.setattr(KVCache, "__init__", watched_init)
    monkeypatch.setattr(KVCache, "move_rows", watched_move)
    model = tiny()
    limits = [3, 40, 7, 25, 5, 9, 30, 2, 19, 60]
    for seed in range(10):
        lengths = [1 + (seed * 7 + i * 3) % 30 for i in range(5)]
        prompts = ragged_prompts(lengths, seed=seed)
        generate(model, prompts, 2, limits, seed=seed, max_rows=6, cache_tokens=130)
        cache, addresses = made[-1]
        assert [layer.data_ptr() for layer in cache.layers] == addresses  # nothing grew
        sizes = {tuple(layer.shape) for layer in cache.layers}
        assert sizes == {(2, 6, 2, 144, 4)}  # 130 in steps of 16
        held = sum(layer.nbytes for layer in cache.layers)
        assert held == cache_bytes(model.config, 6, cache_capacity(130, "cpu"), torch.float32)
        assert held == 2 * 2 * 6 * 2 * 144 * 4 * 4  # layers, k and v, rows, heads, tokens, E, bytes
    assert len(made) == 10 and len(moves) > 10
    # Without cache_tokens: what the prompts of this call need.
    generate(model, ragged_prompts([5, 40]), 1, [50, 3])
    assert made[-1][0].layers[0].shape == (2, 2, 2, 64, 4)


def test_no_row_is_written_beyond_its_limit(monkeypatch):
    """Finished rows stay in flight until the next look, and must neither advance nor grow."""
    monkeypatch.setitem(sampler.SYNC_EVERY, "cpu", 8)
    monkeypatch.setitem(sampler.ROW_STEP, "cpu", 16)
    positions, attention = [], KVCache.token_attention

    def watched(self, position, num_keys):
        assert num_keys % 16 == 0 and int(position.max()) < num_keys
        positions.append(position.tolist())
        return attention(self, position, num_keys)

    monkeypatch.setattr(KVCache, "token_attention", watched)
    prompts, limits = ragged_prompts([3, 3, 3]), [30, 4, 4, 4, 4, 4]
    generate(tiny(), prompts, 2, limits, max_rows=6)
    assert {len(row) for row in positions} == {6}
    # At most the position of each row's last token: 3 + its limit − 1. Idle rows stay at 0.
    assert max(map(max, positions)) == 3 + 30 - 1
    assert all(sorted(row)[-2] <= 6 for row in positions) and len(positions) >= 29
    assert sorted(positions[-1])[:5] == [0] * 5


def test_a_callback_can_end_the_sampling():
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny(), [[1, 2]], 2, 5, on_tokens=stop)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"prompts": []}, "nothing to sample"),
        ({"prompts": [[1], []]}, "empty"),
        ({"max_new_tokens": 0}, "positive"),
        ({"max_new_tokens": [3, 3]}, "each of the 4 rows"),
        ({"max_new_tokens": 299}, "301 tokens exceed the model's positions"),
        ({"rows": [1]}, "1 data rows for 2 prompts"),
    ],
)
def test_refusals(change, message):
    options = {"prompts": [[1, 2], [3]], "group_size": 2, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **options)


def test_weights_that_are_not_numbers_are_noticed():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [[1, 2]], 2, 3)


WORDS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "system",
    "user",
    "assistant",
    "add",
    "1",
    "2",
    "box",
    "it",
    "\n",
]
TEMPLATE = (
    "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_directory(path, template, end=False):
    """A word tokenizer that puts <s> before every text (and </s> after it, if asked), as Llama's
    does."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="it"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    special = [("<s>", 0), ("</s>", 1)]
    words.post_processor = processors.TemplateProcessing(
        "<s> $A </s>" if end else "<s> $A", special_tokens=special
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return load_tokenizer(path)


def test_prompt_through_the_chat_template(tmp_path):
    tokenizer = tokenizer_directory(tmp_path, TEMPLATE)
    ids = encode_prompt(tokenizer, "add 1 2", "box it", "box 1")
    text = "<s> <|im_start|> system \n box it <|im_end|>"
    text += " <|im_start|> user \n add 1 2 \n box 1 <|im_end|>"
    text += " <|im_start|> assistant \n"
    assert ids == [WORDS.index(word) for word in text.split(" ")]
    assert ids.count(0) == 1  # one BOS: the template's
    without = encode_prompt(tokenizer, "add 1 2", None, "")
    assert "system" not in [WORDS[i] for i in without] and without[-3:] == ids[-3:]


@pytest.mark.parametrize("end", [False, True])
def test_prompt_without_a_template(tmp_path, end):
    tokenizer = tokenizer_directory(tmp_path, None, end)
    ids = encode_prompt(tokenizer, "add 1 2", None, "box it")
    assert [WORDS[i] for i in ids] == ["<s>", "add", "1", "2", "\n", "box", "it", "\n"]
    ids = encode_prompt(tokenizer, "add 1 2", "user", "")
    assert [WORDS[i] for i in ids] == ["<s>", "user", "\n", "add", "1", "2", "\n"]


def test_stop_ids_are_the_union_of_all_places(tmp_path):
    tokenizer = tokenizer_directory(tmp_path, None)
    assert stop_token_ids(tmp_path, tokenizer) == [1]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    assert stop_token_ids(tmp_path, tokenizer) == [1, 3, 5]
    assert stop_token_ids(tmp_path, tokenizer, ["<|im_start|>", "box"]) == [1, 2, 3, 5, 10]
    with pytest.raises(ValueError, match="'add 1' is 2 tokens"):
        stop_token_ids(tmp_path, tokenizer, ["add 1"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert stop_token_ids(tmp_path, tokenizer) == [1, 5]


def random_init_directory(path, vocab=20):
    """A model without weights, whose tokenizer knows fewer words than it has embeddings."""
    tokenizer_directory(path, None)
    config = tiny(vocab=vocab).config.raw | {"random_init": True, "eos_token_id": 3}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_load_model(tmp_path):
    model, tokenizer, stop_ids = load_model(
        random_init_directory(tmp_path), "float64", "cpu", ["<|im_start|>"], seed=4
    )
    expected = Transformer.from_config(model.config.raw, seed=4).double()
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)
    assert model.usable_vocab == len(tokenizer) == 14 < 20 and stop_ids == [1, 2, 3]


@pytest.mark.parametrize(
    "file,text,message",
    [
        ("config.json", "{", "cannot load --model .*not a valid JSON"),
        ("config.json", '{"model_type": "gpt2"}', "cannot load --model .*: .* 'gpt2'"),
        ("tokenizer.json", "broken", "cannot load --model"),
    ],
)
def test_load_model_says_in_one_line_what_is_wrong(tmp_path, file, text, message):
    directory = random_init_directory(tmp_path)
    (directory / file).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_model(directory, "float32", "cpu")
    assert "\n" not in str(error.value)


def test_load_model_refuses_what_does_not_fit_together(tmp_path):
    with pytest.raises(ValueError, match="no such directory, and as a Hub id"):
        load_model("nobody/nothing", "float32", "cpu")


class Problem(NamedTuple):
    problem: str
    answer: str
    row: int
    require_value: bool = False


class LengthGrader:
    """In place of reward.Verifier: a response of even length is correct; its reward is a float."""

    def grade_groups(self, responses, references, *, problems, require_value, in_thought):
        assert in_thought == [False] * len(references)
        groups = []
        asked = zip(responses, references, problems, require_value)
        for texts, reference, problem, value in asked:
            answers = [f"{reference} {problem} {value} {len(text)}" for text in texts]
            lengths = [len(text.split()) for text in texts]
            group = types.SimpleNamespace(
                answers=answers,
                correct=[length % 2 == 0 for length in lengths],
                rewards=[length / 7 for length in lengths],
                classes=[length - 1 for length in lengths],
                failed=["time" if length == 9 else "" for length in lengths],
            )
            groups.append(group)
        return groups


def small_rollout(directory, **options):
    """Five problems of different lengths, three responses each, by a model in float64."""
    tokenizer = tokenizer_directory(directory, None)
    model = tiny("qwen3", vocab=len(tokenizer), dtype=torch.float64)
    prompts = ragged_prompts((4, 9, 2, 3, 6), vocab=len(tokenizer))
    problems = [Problem(f"p{i}", f"a{i}", 10 + i, i == 2) for i in range(5)]
    options = {"stop_ids": [1, 4], "seed": 2, "step": 3, "temperature": 1.1} | options
    rollout = generate_rollout(
        model, tokenizer, LengthGrader(), problems, prompts, 3, 12, **options
    )
    return model, tokenizer, rollout


def test_generate_rollout(tmp_path):
    """Samples, texts and grades of a prompt stay together, and come as generate() drew them."""
    phases = []

    @contextlib.contextmanager
    def clock(phase):
        phases.append(phase)
        yield

    model, tokenizer, rollout = small_rollout(tmp_path, clock=clock)
    assert phases == ["decode", "prefill", "verify"]
    options = {"stop_ids": [1, 4], "seed": 2, "step": 3, "rows": [10, 11, 12, 13, 14]}
    samples = generate(model, rollout.prompts, 3, 12, 1.1, **options)
    assert rollout.tokens.shape == rollout.logprobs.shape == (5, 3, samples.tokens.shape[1])
    for field in Samples._fields:
        assert torch.equal(getattr(rollout, field).flatten(0, 1), getattr(samples, field)), field
    assert rollout.rewards.dtype == torch.float64 and rollout.correct.dtype == torch.bool
    for i in range(5):
        for j in range(3):
            text, length = rollout.texts[i][j], int(rollout.lengths[i, j])
            tokens = rollout.tokens[i, j, :length].tolist()
            assert text == tokenizer.decode(tokens, skip_special_tokens=True)
            count = len(text.split())
            assert rollout.correct[i, j] == (count % 2 == 0) and rollout.classes[i, j] == count - 1
            assert rollout.rewards[i, j] == count / 7
            assert rollout.answers[i][j] == f"a{i} p{i} {i == 2} {len(text)}"
            assert rollout.failed[i][j] == ("time" if count == 9 else "")
    # Other noise rows than the data's; and a prompt that does not fit, by its data row.
    _, _, other = small_rollout(tmp_path, rows=[10, 11, 12, 13, 99])
    assert torch.equal(other.tokens[:4, :, :5], rollout.tokens[:4, :, :5])
    assert not torch.equal(other.tokens[4, :, :5], rollout.tokens[4, :, :5])
    problems = [Problem("", "", 33)]
    with pytest.raises(ValueError, match="data row 33: prompt and response of 301 tokens exceed"):
        generate_rollout(model, tokenizer, LengthGrader(), problems, [[1, 2]], 2, 299)


def test_rollouts_are_selected_and_joined(tmp_path):
    """Every field takes part; a narrower rollout is padded with zeros on either side."""
    _, _, rollout = small_rollout(tmp_path)
    picked = rollout.select([3, 0])
    for name, part, whole in zip(rollout._fields, picked, rollout):
        for new, old in enumerate([3, 0]):
            same = part[new] == whole[old]
            assert same.all() if isinstance(same, torch.Tensor) else same, name
        assert len(part) == 2
    width = int(rollout.lengths.max())
    narrow = rollout.select([4])._replace(
        tokens=rollout.tokens[[4], :, :3], logprobs=rollout.logprobs[[4], :, :3]
    )
    for one, other in ((picked, narrow), (narrow, picked)):
        joined = one.join(other)
        first = len(one.prompts)
        assert all(len(part) == 3 for part in joined)
        for name, part, a, b in zip(joined._fields, joined, one, other):
            if name in ("tokens", "logprobs"):
                assert part.shape == (3, 3, width)
                assert torch.equal(part[:first, :, : a.shape[2]], a)
                assert torch.equal(part[first:, :, : b.shape[2]], b)
                padding = part[:first, :, 3:] if one is narrow else part[first:, :, 3:]
                assert padding.eq(0).all()
            elif isinstance(part, list):
                assert part == a + b
            else:
                assert torch.equal(part, torch.cat([a, b]))


RANK_JOB = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import sampler, test_sampler
from sampler import Interrupted
me = None

def attempt(work, items=range(7)):
    try:
        return sampler.map_over_ranks(list(items), work)
    except (ValueError, Interrupted) as error:
        return [type(error).__name__, str(error)]

def only(ranks, error):
    def work(share):
        if me in ranks:
            raise error
        return share
    return work

def both(share):
    raise [Interrupted("signal"), ValueError("weights are gone"), Interrupted("")][me]

sampler.init_distributed("cpu", 60)
me = sampler.rank()
shares = []
results = {{
    "doubled": attempt(lambda share: shares.append(share) or [2 * item for item in share]),
    "few": attempt(lambda share: [item + 1 for item in share], [5]),
    "none": attempt(lambda share: 1 / 0, []),
    "value": attempt(only([1], ValueError("no weights"))),
    "file": attempt(only([2], FileNotFoundError(2, "no file", "x"))),
    "interrupted": attempt(only([0, 2], Interrupted("SIGTERM"))),
    "both": attempt(both),
    "gathered": sampler.all_gather(("rank", me)),
}}
_, _, rollout = test_sampler.small_rollout({folder!r} + str(me))
torch.save([me, sampler.world_size(), shares, results, tuple(rollout)], {folder!r} + f"{{me}}.pt")
sampler.print0("printed once")
sampler.shutdown_distributed()
print("not reached")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What three processes that meet over gloo make of RANK_JOB: (their results, their output)."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = RANK_JOB.format(tests=str(Path(__file__).parent), folder=f"{folder}/")
    children = []
    for rank in range(3):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"PYTHONPATH": Path(__file__).parent.parent, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-c", code]
        children.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    output = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(3)], output


def test_work_is_dealt_over_ranks_and_comes_back_in_order(ranks):
    for me, (rank, size, shares, results, _) in enumerate(ranks[0]):
        assert (rank, size) == (me, 3) and shares == [list(range(me, 7, 3))]
        assert results["doubled"] == [0, 2, 4, 6, 8, 10, 12]
        # Fewer items than ranks, and none: a rank without a share does no work.
        assert results["few"] == [6] and results["none"] == []
        assert results["gathered"] == [("rank", r) for r in range(3)]


def test_an_error_on_one_rank_is_raised_on_all(ranks):
    """Ranks that did not fail would otherwise wait for the others until the time-out."""
    for _, _, _, results, _ in ranks[0]:
        assert results["value"] == ["ValueError", "no weights"]
        assert results["file"] == ["ValueError", "[Errno 2] no file: 'x'"]
        assert results["interrupted"] == ["Interrupted", "SIGTERM"]
        assert results["both"] == ["ValueError", "weights are gone"]


def test_a_rollout_is_the_same_on_any_number_of_ranks(ranks, tmp_path):
    _, _, alone = small_rollout(tmp_path)
    for _, _, _, _, rollout in ranks[0]:
        for name, part, expected in zip(Rollout._fields, rollout, alone):
            if name == "logprobs":
                torch.testing.assert_close(part, expected, atol=1e-10, rtol=0)
            elif isinstance(part, list):
                assert part == expected, name
            else:
                assert torch.equal(part, expected) and part.dtype == expected.dtype, name


def test_rank_0_prints_and_the_end_is_clean(ranks):
    assert ranks[1] == ["printed once\n", "", ""]


def test_one_process_is_rank_0_of_1():
    assert (sampler.rank(), sampler.world_size()) == (0, 1)
    assert sampler.all_gather("x") == ["x"]
    assert sampler.map_over_ranks([3, 4], lambda share: [-x for x in share]) == [-3, -4]
    with pytest.raises(sampler.Interrupted):
        sampler.map_over_ranks([3], lambda share: (_ for _ in ()).throw(sampler.Interrupted()))


def test_exit_with_error_is_one_line_and_code_2(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        sampler.exit_with_error("eval.py", "a message\nof two lines")
    assert end.value.code == 2 and capsys.readouterr().err == "eval.py: a message of two lines\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        sampler.exit_with_error("eval.py", "a message")
    assert capsys.readouterr().err == ""
