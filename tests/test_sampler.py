"""The sampler against transformers' generate, against exact distributions, and against itself under other batching.

Guards against: ragged prompts that see padding, a cache row that goes to the wrong sample when rows leave or join, a
stop token dropped or not counted, several stop ids, a length limit off by one, top-p and top-k that keep a token too
many or too few, tokens of probability zero, log-probs of another distribution than the one sampled from, noise that
hangs on the batch, the order or the number of rows in flight, finished rows that go on costing, prompts run once per
sample, ids that no tokenizer makes, a second BOS, and a stop string of several tokens.
"""

import collections
import json
import weakref

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import model as model_file
import sampler
from model import Transformer
from sampler import draw, encode_prompt, load_tokenizer, noise_key, rows_that_fit, sample, stop_token_ids, uniform

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
    """ids, prompt lengths, response lengths as score() takes them."""
    rows = [
        prompts[b // group_size] + samples.tokens[b, :n].tolist() for b, n in enumerate(samples.lengths.tolist())
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
    """p-value of Pearson's test; the rarest tokens are pooled until every cell expects five or more."""
    n = counts.sum()
    order = probabilities.argsort()
    small = (probabilities[order].cumsum(0) * n < 5).sum() + 1
    cells = [(counts[order[:small]].sum(), probabilities[order[:small]].sum())]
    cells += [(counts[i], probabilities[i]) for i in order[small:]]
    x = sum((c - n * p) ** 2 / (n * p) for c, p in cells if p > 0)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), x.double() / 2))


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_equals_generate(tmp_path, kind):
    """Every prompt alone through generate; ours ragged, in one batch and through three rows; pad = an end token = 0."""
    model = tiny(kind, seed=FAMILIES[kind])
    model.save_pretrained(tmp_path / "m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    prompts = ragged_prompts()
    free = sample(model, prompts, 1, 40, temperature=0)
    met = {t: int((free.tokens == t).any(1).sum()) for t in free.tokens.unique().tolist()}
    stops = [0, *[t for t, rows in met.items() if 0 < rows < 3 and t][:2]]  # two that end some replies and not others
    for max_rows in (0, 3):
        samples = sample(model, prompts, 1, 40, temperature=0, stop_ids=stops, max_rows=max_rows)
        for b, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            options = dict(do_sample=False, max_new_tokens=40, eos_token_id=stops, pad_token_id=0)
            out = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
            assert samples.tokens[b, : samples.lengths[b]].tolist() == out
            assert bool(samples.finished[b]) == (out[-1] in stops)
            assert samples.tokens[b, samples.lengths[b] :].eq(0).all()
    assert 0 < samples.finished.sum() < len(prompts)  # both endings occurred
    # Greedy log-probs are those of temperature 1.
    logprobs, _ = model.score(*padded(prompts, samples, 1))
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


@pytest.mark.parametrize("temperature,top_p,top_k", [(1, 1, 0), (0.7, 1, 0), (1, 0.8, 0), (1.4, 1, 7), (1, 0.6, 20)])
def test_frequencies_pass_a_chi_square_test(tmp_path, temperature, top_p, top_k):
    """First and second tokens of many samples against transformers' probabilities, filtered by the definition."""
    model = tiny("qwen3", spread=0.25)
    model.save_pretrained(tmp_path / "m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    prompt, count = [7, 3, 11], 6000
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=3)
    samples = sample(model, [prompt, [1, 2]], count, 2, **options)
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
        returned = samples.logprobs[:count, 1][first == likeliest] if context else samples.logprobs[:count, 0]
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
    samples = sample(model, prompts, 4, 25, temperature=temperature, stop_ids=[0, 5, 9], max_rows=9)
    logprobs, _ = model.score(*padded(prompts, samples, 4), temperature)
    assert samples.logprobs.dtype == dtype and 3 < samples.finished.sum() < 24
    torch.testing.assert_close(samples.logprobs, logprobs.detach(), atol=limit, rtol=0)


def test_bf16_samples_and_scores_nearly_alike():
    model = tiny("qwen2", dtype=torch.bfloat16, spread=0.1)
    prompts = ragged_prompts()
    samples = sample(model, prompts, 4, 25, max_rows=9)
    logprobs, _ = model.score(*padded(prompts, samples, 4))
    assert samples.logprobs.dtype == logprobs.dtype == torch.float32
    assert (samples.logprobs - logprobs).abs().mean() < 0.02


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 30}])
def test_float64_tokens_do_not_depend_on_batching(monkeypatch, options):
    model = tiny("qwen2", dtype=torch.float64)
    prompts = ragged_prompts()
    options = dict(stop_ids=[0, 4, 8], seed=5, step=2) | options
    whole = sample(model, prompts, 5, 30, **options)
    assert len(set(whole.lengths.tolist())) > 8
    for max_rows in (1, 3, 7, 11):
        assert_same(sample(model, prompts, 5, 30, max_rows=max_rows, **options), whole)
    # Any order and any part of the prompts, given their data rows; fewer samples are the first of more.
    order = [4, 0, 3]
    part = sample(model, [prompts[i] for i in order], 3, 30, rows=order, **options)
    picked = torch.tensor([i * 5 + j for i in order for j in range(3)])
    width = part.tokens.shape[1]
    assert_same(part, sampler.Samples(*(x[picked, :width] if x.ndim == 2 else x[picked] for x in whole)))
    # Prefills of other sizes, and finished rows that linger as they do on a GPU.
    monkeypatch.setitem(sampler.PREFILL_TOKENS, "cpu", 20)
    assert_same(sample(model, prompts, 5, 30, **options), whole)
    monkeypatch.setitem(sampler.STOP_CHECK, "cpu", 7)
    assert_same(sample(model, prompts, 5, 30, max_rows=12, **options), whole)
    # And prompts that are shared by their groups.
    monkeypatch.setitem(model_file.SHARE_PROMPTS_FROM, "cpu", 0)
    for max_rows in (3, 12, 0):
        assert_same(sample(model, prompts, 5, 30, max_rows=max_rows, **options), whole)


def test_float32_tokens_hardly_depend_on_batching():
    model = tiny("qwen2")
    prompts = ragged_prompts()
    whole = sample(model, prompts, 8, 50)
    other = sample(model, prompts, 8, 50, max_rows=5)
    assert (whole.tokens != other.tokens).sum() <= 1e-3 * whole.tokens.numel()


def test_noise_depends_on_seed_step_data_row_and_sample():
    model = tiny(dtype=torch.float64)
    prompts = [[3, 1, 4]] * 2
    base = sample(model, prompts, 3, 20, seed=1, step=1, rows=[10, 11])
    assert len({tuple(row) for row in base.tokens.tolist()}) == 6  # same prompt, six different replies
    for change in ({"seed": 2}, {"step": 2}, {"rows": [12, 13]}):
        other = sample(model, prompts, 3, 20, **({"seed": 1, "step": 1, "rows": [10, 11]} | change))
        assert (other.tokens == base.tokens).float().mean() < 0.5
    swapped = sample(model, prompts, 3, 20, seed=1, step=1, rows=[11, 10])
    assert torch.equal(swapped.tokens, base.tokens.roll(3, 0))


def test_uniform_is_splitmix64():
    """The published first outputs for seed 1234567, cut to 53 bits."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    noise = uniform(torch.full((4,), 1234567), torch.arange(4))
    assert noise.tolist() == [(x >> 11) / 2**53 for x in expected]


def test_noise_is_uniform_and_uncorrelated():
    keys = torch.tensor([noise_key(0, step, row, j) for step in range(3) for row in range(20) for j in range(8)])
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
def test_draw_inverts_the_distribution_function(vocab, dtype):
    r = torch.Generator().manual_seed(vocab)
    logits = torch.randn(200, vocab, generator=r, dtype=dtype) * 3
    noise = torch.rand(200, generator=r, dtype=torch.float64)
    token, logprob = draw(logits.clone(), noise, 0.8)
    p = (logits.double() / 0.8).softmax(-1)
    cdf = p.cumsum(-1)
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    row = torch.arange(200)
    assert (cdf[row, token] > noise - slack).all() and ((cdf - p)[row, token] <= noise + slack).all()
    torch.testing.assert_close(logprob.double(), p[row, token].log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_never_takes_a_token_of_probability_zero(dtype):
    """Noise at the very ends, zeros everywhere a sum can end: first, last, whole blocks, around the only token."""
    noise = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    r = torch.Generator().manual_seed(0)
    for vocab in (5, 40, 300, 1025):
        for keep in (1, 2, 3, vocab // 2 + 1):
            for _ in range(20):
                allowed = torch.randperm(vocab, generator=r)[:keep]
                logits = torch.full((4, vocab), -torch.inf, dtype=dtype)
                logits[:, allowed] = torch.randn(keep, generator=r, dtype=dtype) * 20
                token, logprob = draw(logits, noise.clone())
                assert torch.isin(token, allowed).all() and logprob.isfinite().all()


def test_top_p_and_top_k_at_their_edges():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(2000, 1)
    noise = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    def seen(**options):
        return collections.Counter(draw(logits.clone(), noise, **options)[0].tolist())

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
    samples = sample(model, prompts, 3, limits)
    assert samples.lengths.tolist() == limits and not samples.finished.any()
    assert samples.tokens.shape == samples.logprobs.shape == (6, 30)
    # Stop at a token that row 2 drew somewhere inside: it is counted, kept as the last one, and nothing follows.
    stop = int(samples.tokens[2, 11])
    at = samples.tokens[2].tolist().index(stop)
    stopped = sample(model, prompts, 3, limits, stop_ids=[stop])
    assert stopped.lengths[2] == at + 1 and stopped.tokens[2, at] == stop and stopped.finished[2]
    assert torch.equal(stopped.tokens[2, : at + 1], samples.tokens[2, : at + 1])
    assert stopped.tokens[2, at + 1 :].eq(0).all() and stopped.logprobs[2, at + 1 :].eq(0).all()
    # A stop token on the last allowed position counts as finished.
    exact = sample(model, prompts, 3, [1, 7, at + 1, 2, 30, 13], stop_ids=[stop])
    assert exact.lengths[2] == at + 1 and exact.finished[2]


def test_only_usable_ids_are_sampled():
    model = tiny(spread=0.05)  # nearly uniform: every id would come
    model.num_tokens = 20
    samples = sample(model, [[1, 2, 3]], 200, 5)
    assert set(samples.tokens.flatten().tolist()) == set(range(20))
    assert sample(model, [[1]], 1, 9, temperature=0).tokens.max() < 20


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
    sample(model, prompts, 4, limits, on_tokens=seen.append)
    assert shapes[0] == (3, 6) and all(width == 1 for _, width in shapes[1:])
    # The first token comes from the prefill; every other one costs its own row in one pass and no more.
    assert sum(rows for rows, _ in shapes[1:]) == sum(limits) - len(limits)
    assert sum(seen) == sum(limits) and len(seen) > 5
    shapes.clear()
    sample(model, prompts, 4, limits, max_rows=4)
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert len(prefills) == 3 and max(rows for rows, _ in shapes) <= 4
    assert sum(rows for rows, width in shapes if width == 1) == sum(limits) - len(limits)


def test_waiting_prompts_take_the_places_of_finished_rows(monkeypatch):
    """Eight rows in flight, one of them long: the others are refilled while it runs, rather than after it."""
    model, passes = tiny(), []
    forward = Transformer.forward

    def counting(self, ids, **options):
        passes.append(tuple(ids.shape))
        return forward(self, ids, **options)

    monkeypatch.setattr(Transformer, "forward", counting)
    limits = [100] + [5] * 63
    sample(model, ragged_prompts([3] * 32), 2, limits, max_rows=8)
    assert sum(width == 1 for _, width in passes) == 99


@pytest.mark.parametrize("share_from,limit", [(96, 120), (0, 90)])
def test_the_cache_stays_within_its_memory(monkeypatch, share_from, limit):
    """Bytes of all living caches, whenever one is made or grows; without the bound they are more than it allows."""
    monkeypatch.setitem(model_file.SHARE_PROMPTS_FROM, "cpu", share_from)
    model, seen, living = tiny(), [], weakref.WeakSet()
    init, reserve, append = sampler.KVCache.__init__, sampler.KVCache.reserve, sampler.KVCache.append

    def held():
        return sum(layer.nbytes for cache in living for layer in cache.layers)

    def watched_init(self, *args, **options):
        init(self, *args, **options)
        living.add(self)
        seen.append(held())

    def watched_reserve(self, capacity):
        before, old = held(), self.layers[0].nbytes
        reserve(self, capacity)
        seen.append(held() + (old if held() > before else 0))  # the last layer to grow, before its old copy goes

    def watched_append(self, other):
        old = self.layers[-1].nbytes
        append(self, other)
        seen.append(held() + old)

    monkeypatch.setattr(sampler.KVCache, "append", watched_append)
    monkeypatch.setattr(sampler.KVCache, "__init__", watched_init)
    monkeypatch.setattr(sampler.KVCache, "reserve", watched_reserve)
    prompts, limits = ragged_prompts([30] * 12), [limit + b % 7 for b in range(48)]
    whole = sample(model, prompts, 4, limits)
    peak = max(seen)
    for memory in (peak // 2, peak // 9):
        seen.clear()
        bounded = sample(model, prompts, 4, limits, max_memory=memory)
        assert torch.equal(bounded.lengths, whole.lengths) and memory * 0.4 < max(seen) <= memory < peak


def test_a_prompt_is_held_once_for_its_group(monkeypatch):
    """Numbers in the cache at its fullest: 3 prompts of 250 tokens, and 24 rows of 20 in blocks of 128."""
    fullest, attend = [0], sampler.KVCache.attend

    def watched(self, layer, q):
        fullest.append(sum(part.numel() for cache in (self, self.prompts) for part in cache.layers))
        return attend(self, layer, q)

    monkeypatch.setattr(sampler.KVCache, "attend", watched)
    sample(tiny(), ragged_prompts([250, 240, 230]), 8, 20)
    token = 2 * 2 * 2 * 4  # layers, keys and values, heads, their size
    assert max(fullest) == token * (3 * 250 + 24 * 128)


@pytest.mark.parametrize(
    "device,new,tokens,gib", [("cpu", 98, 30 + 128, "3.18"), ("cpu", 120, 256, "4.94"), ("cuda", 120, 256, "4.94")]
)
@pytest.mark.parametrize("budget", [40, 4096])
def test_rows_that_fit(monkeypatch, budget, device, new, tokens, gib):
    """By hand: 2 layers of 2 heads of 4 float32 keys and values are 128 bytes a token. A shared prompt of 30 is held as
    it is, a response, or both together, in blocks of 128; the larger of the two counts, for shorter ones are copied."""
    monkeypatch.setitem(sampler.PREFILL_TOKENS, device, budget)
    monkeypatch.setitem(model_file.SHARE_PROMPTS_FROM, "cpu", 30)
    config, row = tiny().config, 128 * tokens * 3 // 2  # one of the two layers twice
    one = row + 128 * 30
    assert rows_that_fit(config, torch.float32, 30, new, one, device) == 1
    assert rows_that_fit(config, torch.float32, 30, new, 10 * row + 128 * min(budget, 300), device) == 10
    assert rows_that_fit(config, torch.float32, 30, new, 10 * row + 128 * min(budget, 300) - 1, device) == 9
    assert rows_that_fit(config, torch.bfloat16, 30, new, one, device) == 2
    with pytest.raises(ValueError, match=rf"holds no row: one of 30 prompt and {new} new tokens needs {gib}e-05 GiB"):
        rows_that_fit(config, torch.float32, 30, new, one - 1, device)
    if device == "cuda":
        return
    with pytest.raises(ValueError, match="holds no row"):
        sample(tiny(), [[1] * 30], 2, new, max_memory=one - 1)
    assert sample(tiny(), [[1] * 30], 2, new, max_memory=one).lengths.tolist() == [new, new]


def test_a_callback_can_end_the_sampling():
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(tiny(), [[1, 2]], 2, 5, on_tokens=stop)


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
        sample(tiny(), **options)


def test_weights_that_are_not_numbers_are_noticed():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        sample(model, [[1, 2]], 2, 3)


WORDS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "add", "1", "2", "box", "it", "\n"]
TEMPLATE = (
    "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_directory(path, template, end=False):
    """A word tokenizer that puts <s> before every text (and </s> after it, if asked), as Llama's does."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="it"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    special = [("<s>", 0), ("</s>", 1)]
    words.post_processor = processors.TemplateProcessing("<s> $A </s>" if end else "<s> $A", special_tokens=special)
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
    text = "<s> <|im_start|> system \n box it <|im_end|> <|im_start|> user \n add 1 2 \n box 1 <|im_end|>"
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
