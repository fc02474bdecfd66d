"""The arithmetic of a step of train.py: gradients, denominators, metrics and precision of its optimiser updates.

Guards against: losses averaged over micro-batches; token counts of a micro-batch in the denominator; results that move
with padding, budget or row order; a loss that cuts the end token or looks at token ids; log-probs at another
temperature than the sampler's; old log-probs taken after the weights have moved; advantages of other rows than their
own; metrics of the last micro-batch or update only; masters, optimiser state or gradients in bf16.
"""

import argparse
import math

import pytest
import tiny_runs
import torch

import copo
import model
import train

PROMPTS, GROUP, VOCABULARY = 5, 3, 14


class Optimizer:
    """Stands where AdamW does; keeps the gradients that a step would have used."""

    def __init__(self, parameters):
        self.parameters, self.param_groups, self.gradients = parameters, [{}, {}], None

    def step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}

    def zero_grad(self, set_to_none):
        for p in self.parameters.values():
            p.grad = None


def make_run(dtype=torch.float64, **changes):
    network = model.Transformer.from_config(tiny_runs.CONFIG | {"vocab_size": VOCABULARY}, dtype=dtype, seed=3)
    flags = vars(train.flags().parse_args([])) | train.AUTHORS | copo.PRESETS["copo"]
    flags |= {"device": "cpu", "max_new_tokens": 9, "temperature": 0.8, "max_grad_norm": 0.0, "lr": 1e-3,
              "old_logprobs": "recompute"}  # fmt: skip
    args = argparse.Namespace(**flags | {"minibatch_prompts": PROMPTS} | changes)
    run = train.Run(args, network, network, None, [0], [], [], {}, [], None)
    run.optimizer = Optimizer(dict(network.named_parameters()))
    run.clock = train.Clock("cpu")
    return run


def make_batch(run):
    """Ragged prompts and replies whose tokens hold the end and pad id anywhere; verdicts and classes of all kinds."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([[9, 1, 4], [2, 2, 7], [5, 9, 3], [1, 6, 8], [3, 4, 1]])
    tokens = torch.randint(0, VOCABULARY, (PROMPTS, GROUP, 9), generator=generator)
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 6, 1, 4, 2)]
    correct = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    classes = torch.tensor([[0, 1, 2], [0, 0, -1], [0, 1, 1], [0, 0, 0], [-1, 0, 0]])
    empty = torch.zeros(PROMPTS, GROUP, 9, dtype=next(run.model.parameters()).dtype)
    none = torch.zeros(PROMPTS, GROUP).bool()
    texts = [[""] * GROUP] * PROMPTS
    batch = train.Batch(
        list(range(PROMPTS)), prompts, tokens, empty, lengths, none, correct, classes, none, texts, texts
    )
    scored = train.score_rows(run.model, batch, range(PROMPTS * GROUP), run.args).view_as(empty)
    return batch._replace(logprobs=scored)


def old_of(batch):
    """Log-probs of a policy that has moved: far enough for both clips, in both directions."""
    noise = torch.randn(batch.logprobs.flatten(0, 1).shape, generator=torch.Generator().manual_seed(7))
    return batch.logprobs.flatten(0, 1) + 0.5 * noise.to(batch.logprobs)


def one_update(run, batch, rows=None, old=None, ref=None, place=()):
    """(gradients, metrics) of one update on these rows."""
    totals, signals = train.Totals(), train.compute_signals(batch, run.args)
    rows = list(range(PROMPTS * GROUP)) if rows is None else rows
    assert train.update(run, batch, rows, signals, old, ref, totals, place)
    return run.optimizer.gradients, totals.means()


def by_hand(run, batch, old=None, ref=None):
    """The loss and gradients by the formulas of design section 2, a row and a token at a time, without train.py."""
    args, signals = run.args, train.compute_signals(batch, run.args)
    total_tokens, total_rows = int(batch.lengths.sum()), PROMPTS * GROUP
    loss, entropy_sum, clipped = 0.0, 0.0, {"local": 0, "global": 0}
    for i in range(PROMPTS):
        for j in range(GROUP):
            reply = batch.tokens[i, j, : batch.lengths[i, j]].tolist()
            ids = torch.tensor([batch.prompts[i] + reply])
            logits = run.model.logits(run.model(ids))[0] / args.temperature
            logprobs = logits.log_softmax(-1)[len(batch.prompts[i]) - 1 : -1]
            entropy_sum -= float((logprobs.exp() * logprobs).detach().sum())
            row_loss = 0.0
            for t, token in enumerate(reply):
                logp = logprobs[t, token]
                ratio = (logp - (logp.detach() if old is None else old[i * GROUP + j, t])).exp()
                term = {}
                for name, advantage in (("local", signals.local_adv[i, j]), ("global", signals.global_adv[i])):
                    bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                    term[name] = -torch.minimum(ratio * advantage, bounded * advantage)
                    if advantage < 0 and args.dual_clip:
                        term[name] = torch.minimum(term[name], -args.dual_clip * advantage)
                    clipped[name] += bool(term[name] != -(ratio * advantage))
                w = signals.weight[i, j]
                row_loss = row_loss + w * term["local"] + args.global_coef * (1 - w) * term["global"]
                if ref is not None:
                    distance = ref[i * GROUP + j, t] - logp
                    row_loss = row_loss + args.kl_coef * (torch.expm1(distance) - distance)
            loss = loss + row_loss / {
                "seq-mean-token-mean": len(reply) * total_rows,
                "token-mean": total_tokens,
                "seq-mean-token-sum": total_rows,
                "seq-mean-token-sum-norm": total_rows * args.max_new_tokens,
            }[args.aggregation]
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad(True)
    expected = {"loss": float(loss.detach()), "token_entropy": entropy_sum / total_tokens}
    expected |= {f"clip_fraction_{name}": count / total_tokens for name, count in clipped.items()}
    return run.optimizer.gradients, expected


def distance(one, other):
    """max |Δ| over max |value|, the worst of all tensors."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max() / other[k].abs().max().clamp(min=1e-30)) for k in other)


@pytest.mark.parametrize("blend", copo.BLENDS)
def test_update_is_the_formulas_for_any_budget_and_row_order(blend):
    run = make_run(blend=blend)
    batch = make_batch(run)
    old = old_of(batch)
    expected, numbers = by_hand(run, batch, old)
    seen = []
    for budget in (1, 37, 10**6):
        for order in (1, -1):
            run.args.micro_tokens = budget
            gradients, found = one_update(run, batch, list(range(PROMPTS * GROUP))[::order], old)
            assert distance(gradients, expected) < 1e-9, (budget, order)
            assert all(math.isclose(found[name], value, rel_tol=1e-9) for name, value in numbers.items()), budget
            seen.append(found)
    assert found["clip_fraction_local"] > 0.1 and found["clip_fraction_global"] > 0.1
    for found in seen:
        assert found.keys() == seen[0].keys()
        assert all(math.isclose(found[k], seen[0][k], rel_tol=1e-9, abs_tol=1e-12) for k in found)


@pytest.mark.parametrize("aggregation", copo.AGGREGATIONS)
@pytest.mark.parametrize("budget", [1, 37, 10**6])
def test_denominators_are_those_of_the_whole_update(aggregation, budget):
    """With a KL term, which is aggregated like the rest."""
    run = make_run(aggregation=aggregation, micro_tokens=budget, kl_coef=0.3)
    batch = make_batch(run)
    reference = batch.logprobs.flatten(0, 1) - 0.3
    expected, numbers = by_hand(run, batch, ref=reference)
    gradients, found = one_update(run, batch, ref=reference)
    assert distance(gradients, expected) < 1e-9
    assert math.isclose(found["loss"], numbers["loss"], rel_tol=1e-9)
    assert found["kl"] > 0


@pytest.mark.parametrize("blend", ["soft-zero", "local", "global"])
def test_float32_agrees_to_1e_5(blend):
    run = make_run(torch.float32, blend=blend)
    batch = make_batch(run)
    expected, _ = one_update(run, batch)
    for budget in (1, 37):
        run.args.micro_tokens = budget
        gradients, _ = one_update(run, batch)
        assert distance(gradients, expected) < 1e-5


@pytest.mark.parametrize("blend", copo.BLENDS)
def test_first_update_is_reinforce_with_the_effective_advantage(blend):
    run = make_run(blend=blend, global_coef=0.7, micro_tokens=20)
    batch = make_batch(run)
    gradients, found = one_update(run, batch)
    effective = train.compute_signals(batch, run.args).effective.flatten()
    objective = 0.0
    for row, (prompt, reply) in enumerate(train.pairs_of(batch, range(PROMPTS * GROUP))):
        logits = run.model.logits(run.model(torch.tensor([prompt + reply])))[0] / run.args.temperature
        chosen = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(reply) - 1), reply]
        objective = objective + effective[row] * chosen.mean() / (PROMPTS * GROUP)
    (-objective).backward()
    run.optimizer.step()
    assert distance(gradients, run.optimizer.gradients) < 1e-9
    assert found["approx_kl"] == 0 and found["clip_fraction_local"] == 0 and found["ratio"] == 1


def test_an_update_of_some_rows_uses_their_own_numbers():
    """Rows of two prompts out of five, in any order: the same as a batch that holds those two alone."""
    run = make_run(blend="local", advantage="group", micro_tokens=25)
    batch = make_batch(run)
    rows = [i * GROUP + j for i in (4, 1) for j in range(GROUP)]
    gradients, found = one_update(run, batch, rows)
    alone, numbers = one_update(run, batch.select([1, 4]), list(range(2 * GROUP)))
    assert distance(gradients, alone) < 1e-9
    assert math.isclose(found["loss"], numbers["loss"], rel_tol=1e-9)


def test_select_and_join_keep_prompts_with_their_responses():
    batch = make_batch(make_run())
    joined = batch.select([0, 1]).join(batch.select([3, 4])._replace(
        tokens=batch.tokens[3:, :, :8], logprobs=batch.logprobs[3:, :, :8]
    ))  # fmt: skip
    expected = batch.select([0, 1, 3, 4])
    assert joined.indices == [0, 1, 3, 4] and joined.prompts == [batch.prompts[i] for i in (0, 1, 3, 4)]
    for name in ("lengths", "correct", "classes", "finished"):
        assert torch.equal(getattr(joined, name), getattr(batch, name)[[0, 1, 3, 4]])
    assert train.pairs_of(joined, range(12)) == train.pairs_of(expected, range(12))


def test_equal_rewards_give_no_gradient_and_no_nan():
    run = make_run()
    batch = make_batch(run)._replace(correct=torch.zeros(PROMPTS, GROUP).bool())
    gradients, found = one_update(run, batch)
    assert all(float(g.abs().max()) == 0 for g in gradients.values())
    assert all(math.isfinite(value) for value in found.values())
    run.args.blend = "local"
    gradients, _ = one_update(run, make_batch(run).select([2, 3]), list(range(2 * GROUP)))  # one all wrong, one right
    assert all(float(g.abs().max()) == 0 for g in gradients.values())
    run.args.blend = "soft-zero"
    gradients, found = one_update(run, make_batch(run).select([0]), list(range(GROUP)))  # one prompt: no A^g
    assert all(torch.isfinite(g).all() for g in gradients.values()) and all(map(math.isfinite, found.values()))


def test_micro_batches_hold_their_budget_and_every_row():
    lengths = [3, 9, 1, 7, 7, 2, 12]
    for budget in (1, 9, 14, 30, 1000):
        parts = train.micro_batches(lengths, budget)
        assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
        for part in parts:
            assert len(part) == 1 or sum(lengths[row] for row in part) <= budget
    assert len(train.micro_batches(lengths, 1000)) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pieces_are_rows_of_one_prompt_that_fit_a_micro_batch(ranks, monkeypatch):
    monkeypatch.setattr(train, "world", lambda: ranks)
    prompts = [[1, 2, 3], [4] * 8, [1, 2, 3], [5]]
    pairs = [(list(prompt), [0] * n) for prompt in prompts for n in (4, 9, 1, 5, 2, 7)]
    for budget in (1, 14, 20, 10**6):
        parts, tokens = train.pieces(pairs, argparse.Namespace(micro_tokens=budget))
        assert sorted(row for part in parts for row in part) == list(range(24))
        for part, count in zip(parts, tokens, strict=True):
            assert all(pairs[row][0] == pairs[part[0]][0] for row in part)
            assert count == len(pairs[part[0]][0]) + sum(len(pairs[row][1]) for row in part)
            assert len(part) == 1 or (count <= budget and (ranks == 1 or len(part) <= 24 // (4 * ranks)))
    assert (len(parts) == 3) is (ranks == 1)  # alone and with room, each prompt has one piece


def test_an_update_runs_each_prompt_once_and_no_last_token(monkeypatch):
    run = make_run(micro_tokens=10**6)
    batch, ran = make_batch(run), []
    forward = model.Transformer.forward
    monkeypatch.setattr(model.Transformer, "forward", lambda *a, **k: ran.append(a[1].numel()) or forward(*a, **k))
    one_update(run, batch)
    assert sum(ran) == sum(map(len, batch.prompts)) + int(batch.lengths.sum()) - PROMPTS * GROUP


def watch_losses(monkeypatch):
    """Every call of copo_loss: (log-probs, old log-probs, mask, reference)."""
    calls, inner = [], copo.copo_loss

    def watched(logprobs, old, mask, **rest):
        calls.append((logprobs.detach().clone(), old.clone(), mask, rest))
        return inner(logprobs, old, mask, **rest)

    monkeypatch.setattr(copo, "copo_loss", watched)
    return calls


@pytest.mark.parametrize("source", ["recompute", "sampler"])
def test_old_logprobs_are_those_before_any_update(monkeypatch, source):
    run = make_run(minibatch_prompts=2, lr=0.05, old_logprobs=source)
    batch = make_batch(run)
    run.optimizer = train.make_optimizer(run.model, run.args)
    calls = watch_losses(monkeypatch)
    totals = train.train_on(run, batch, train.compute_signals(batch, run.args))
    assert len(calls) == 3 and run.state.updates == 3  # updates of 2, 2 and 1 prompts
    known = {round(float(x), 9) for x in batch.logprobs[batch.logprobs != 0]}
    for number, (logprobs, old, mask, _) in enumerate(calls):
        assert all(round(float(x), 9) in known for x in old[mask])
        moved = float((logprobs - old)[mask].abs().max())
        assert moved == 0 if number == 0 else moved > 0.01
    found = totals.means()
    # The sampler's log-probs are compared with the model's own only, not with themselves.
    compared = calls if source == "recompute" else calls[:1]
    assert totals.sums["sampler_difference"][1] == sum(mask.sum() for _, _, mask, _ in compared)
    assert found["sampler_difference_max"] < 1e-12
    assert found["approx_kl"] > 0


def test_metrics_are_over_all_updates_of_the_step(monkeypatch):
    """Each figure is recomputed from the calls of copo_loss, over all tokens; first and last from those updates."""
    run = make_run(minibatch_prompts=2, lr=0.05, micro_tokens=15)
    batch = make_batch(run)
    run.optimizer = train.make_optimizer(run.model, run.args)
    calls, norms, updates = watch_losses(monkeypatch), [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)) or norms[-1])
    one = train.update

    def counted(*everything):
        before = len(calls)
        result = one(*everything)
        updates.append(calls[before:])
        return result

    monkeypatch.setattr(train, "update", counted)
    totals = train.train_on(run, batch, train.compute_signals(batch, run.args))
    found = totals.means()
    assert all(len(part) > 1 for part in updates) and len(updates) == len(norms) == 3

    def mean(parts, f):
        values = torch.cat([f(*call)[call[2]] for part in parts for call in part])
        return float(values.mean())

    def kl(logprobs, old, mask, rest):
        return torch.expm1(logprobs - old) - (logprobs - old)

    def clipped(logprobs, old, mask, rest):
        ratio, advantage = (logprobs - old).exp(), rest["local_adv"][:, None]
        outside = ((ratio > 1.2) & (advantage > 0)) | (((ratio < 0.8) | (ratio > 3)) & (advantage < 0))
        return outside.double()

    assert math.isclose(found["approx_kl"], mean(updates, kl), rel_tol=1e-9)
    assert math.isclose(found["clip_fraction_local"], mean(updates, clipped), rel_tol=1e-9)
    assert found["clip_fraction_local_first"] == 0 == found["clip_fraction_global_first"]
    assert math.isclose(found["clip_fraction_local_last"], mean(updates[-1:], clipped), rel_tol=1e-9)
    assert found["clip_fraction_local_last"] != found["clip_fraction_local"]
    assert math.isclose(found["grad_norm"], sum(map(float, norms)) / 3, rel_tol=1e-12)
    assert found["grad_norm_max"] == max(map(float, norms))
    assert totals.sums["loss"][1] == 3 and totals.sums["token_entropy"][1] == batch.lengths.sum()


def test_groups_are_dealt_to_updates_by_seed_and_step(monkeypatch):
    run = make_run(minibatch_prompts=2)
    batch, dealt = make_batch(run), []
    monkeypatch.setattr(train, "update", lambda run, batch, rows, *rest: dealt.append(rows))
    monkeypatch.setattr(train, "score_rows", lambda *_: None)

    def deal(seed, step):
        dealt.clear()
        run.args.seed, run.state.step = seed, step
        train.train_on(run, batch, None)
        assert [len(rows) for rows in dealt] == [6, 6, 3]
        assert sorted(row for rows in dealt for row in rows) == list(range(15))
        assert all(rows[k] + 1 == rows[k + 1] for rows in dealt for k in range(len(rows)) if k % GROUP < GROUP - 1)
        return [list(rows) for rows in dealt]

    first = deal(0, 0)
    assert deal(0, 0) == first
    assert len({str(deal(seed, step)) for seed in range(3) for step in range(3)}) > 6


def test_learning_rate_rises_over_updates_then_stays():
    run = make_run(warmup_updates=4, lr=0.1, minibatch_prompts=2)
    batch, rates = make_batch(run), []
    run.optimizer.step = lambda: rates.append(run.optimizer.param_groups[0]["lr"])
    for _ in range(2):
        train.train_on(run, batch, train.compute_signals(batch, run.args))
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_weight_decay_spares_norms_and_biases():
    run = make_run(weight_decay=0.1)
    optimizer = train.make_optimizer(run.model, run.args)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in run.model.named_parameters():
        assert decayed[id(p)] == (0.0 if "norm" in name or "bias" in name else 0.1), name


def test_gradients_are_clipped_to_the_norm_but_logged_as_they_were():
    run = make_run(max_grad_norm=0.01)
    gradients, found = one_update(run, make_batch(run))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert norm == pytest.approx(0.01, rel=1e-3) and found["grad_norm"] > 0.05
