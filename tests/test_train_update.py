"""The arithmetic of a step of train.py: gradients, denominators, metrics and precision of its
optimiser updates.

Guards against: losses averaged over micro-batches; token counts of a micro-batch in the
denominator; results that move with padding, budget or row order; a loss that cuts the end token or
looks at token ids; log-probs at another temperature than the sampler's; old log-probs taken after
the weights have moved; advantages of other rows than their own; metrics of the last micro-batch or
update only; masters, optimiser state or gradients in bf16."""

import argparse
import dataclasses
import math

import pytest
import tiny_runs
import torch

import copo
import model
import reward
import sampler
import train

PROMPTS, GROUP, VOCABULARY = 5, 3, 14


class Optimizer:
    """Stands where AdamW does; keeps the gradients that a step would have used."""

    def __init__(self, parameters):
        self.parameters, self.param_groups, self.gradients = parameters, [{}, {}], None

    def step(self):
        self.gradients = {
            name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None
        }

    def zero_grad(self, set_to_none):
        for p in self.parameters.values():
            p.grad = None


def make_run(dtype=torch.float64, **changes):
    network = model.Transformer.from_config(
        tiny_runs.CONFIG | {"vocab_size": VOCABULARY}, dtype=dtype, seed=3
    )
    flags = vars(train.build_parser().parse_args([])) | train.PAPER_SIZES
    flags |= dataclasses.asdict(copo.PRESETS["copo"])
    flags |= {
        "device": "cpu",
        "max_new_tokens": 9,
        "temperature": 0.8,
        "max_grad_norm": 0.0,
        "lr": 1e-3,
        "old_logprobs": "recompute",
        "micro_tokens": train.MICRO_TOKENS["cpu"],
    }
    args = argparse.Namespace(**flags | {"minibatch_prompts": PROMPTS} | changes)
    run = train.Run(
        args=args,
        algorithm=train.algorithm_of(args),
        directory=None,
        model=network,
        tokenizer=None,
        stop_ids=[0],
        problems=[],
        prompts=[],
        held_out=[],
        held_out_prompts=[],
        verifier=None,
        clock=train.Clock("cpu"),
    )
    run.optimizer = Optimizer(dict(network.named_parameters()))
    return run


def set_blend(run, blend):
    run.algorithm = dataclasses.replace(run.algorithm, blend=blend)


def advantages_of(run, rollout):
    return copo.compute_advantages(
        rollout.rewards,
        rollout.correct,
        rollout.classes,
        rollout.lengths,
        run.algorithm,
        run.args.max_new_tokens,
    )


def flat_logprobs(rollout):
    return rollout.logprobs.flatten(0, 1)


def make_rollout(run):
    """Ragged prompts and replies whose tokens hold the end and pad id anywhere; verdicts and
    classes of all kinds."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([[9, 1, 4], [2, 2, 7], [5, 9, 3], [1, 6, 8], [3, 4, 1]])
    tokens = torch.randint(0, VOCABULARY, (PROMPTS, GROUP, 9), generator=generator)
    prompts = [
        torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 6, 1, 4, 2)
    ]
    correct = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    classes = torch.tensor([[0, 1, 2], [0, 0, -1], [0, 1, 1], [0, 0, 0], [-1, 0, 0]])
    empty = torch.zeros(PROMPTS, GROUP, 9, dtype=next(run.model.parameters()).dtype)
    none = torch.zeros(PROMPTS, GROUP).bool()
    texts = [[""] * GROUP] * PROMPTS
    problems = [reward.Problem(row, "", "", None, False) for row in range(PROMPTS)]
    rollout = sampler.Rollout(
        problems=problems,
        prompts=prompts,
        tokens=tokens,
        logprobs=empty,
        lengths=lengths,
        finished=none,
        correct=correct,
        rewards=correct.double(),
        classes=classes,
        failed=texts,
        texts=texts,
        answers=texts,
    )
    logprobs = train.compute_logprobs(run, run.model, rollout, range(PROMPTS * GROUP))
    return rollout._replace(logprobs=logprobs.view_as(empty))


def test_a_micro_batch_without_a_response_leaves_row_0_as_it_is(monkeypatch):
    """A rank with fewer micro-batches than another ends with empty ones, which name row 0."""
    run = make_run()
    rollout = make_rollout(run)
    rows = list(range(PROMPTS * GROUP))
    before = train.compute_logprobs(run, run.model, rollout, rows)
    assert before[0, 0] != 0
    micro_batches = train.micro_batches

    def with_an_empty_one(*arguments):
        yield from micro_batches(*arguments)
        yield train.collate([], {}, "cpu"), True

    monkeypatch.setattr(train, "micro_batches", with_an_empty_one)
    assert torch.equal(train.compute_logprobs(run, run.model, rollout, rows), before)


def old_of(rollout):
    """Log-probs of a policy that has moved: far enough for both clips, in both directions."""
    logprobs = flat_logprobs(rollout)
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(7))
    return logprobs + 0.5 * noise.to(logprobs)


def one_update(run, rollout, rows=None, old=None, ref=None):
    """(gradients, metrics) of one update on these rows."""
    rows = list(range(PROMPTS * GROUP)) if rows is None else rows
    advantages = advantages_of(run, rollout)
    applied, sums = train.train_minibatch(run, rollout, rows, advantages, old, ref)
    assert applied
    return run.optimizer.gradients, sums.means()


def by_hand(run, rollout, old=None, ref=None):
    """The loss and gradients by the formulas of design section 2, a row and a token at a time,
    without train.py."""
    args = argparse.Namespace(**vars(run.args) | dataclasses.asdict(run.algorithm))
    advantages = advantages_of(run, rollout)
    total_tokens, total_rows = int(rollout.lengths.sum()), PROMPTS * GROUP
    loss, entropy_sum, clipped = 0.0, 0.0, {"local": 0, "global": 0}
    for i in range(PROMPTS):
        for j in range(GROUP):
            reply = rollout.tokens[i, j, : rollout.lengths[i, j]].tolist()
            ids = torch.tensor([rollout.prompts[i] + reply])
            logits = run.model.logits(run.model(ids))[0] / args.temperature
            logprobs = logits.log_softmax(-1)[len(rollout.prompts[i]) - 1 : -1]
            entropy_sum -= float((logprobs.exp() * logprobs).detach().sum())
            row_loss = 0.0
            for t, token in enumerate(reply):
                logp = logprobs[t, token]
                ratio = (logp - (logp.detach() if old is None else old[i * GROUP + j, t])).exp()
                term = {}
                for name, advantage in (
                    ("local", advantages.local_adv[i, j]),
                    ("global", advantages.global_adv[i]),
                ):
                    bounded = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                    term[name] = -torch.minimum(ratio * advantage, bounded * advantage)
                    if advantage < 0 and args.dual_clip:
                        term[name] = torch.minimum(term[name], -args.dual_clip * advantage)
                    clipped[name] += bool(term[name] != -(ratio * advantage))
                w = advantages.weight[i, j]
                row_loss = (
                    row_loss + w * term["local"] + args.global_coef * (1 - w) * term["global"]
                )
                if ref is not None:
                    distance = ref[i * GROUP + j, t] - logp
                    row_loss = row_loss + args.kl_coef * (torch.expm1(distance) - distance)
            loss = (
                loss
                + row_loss
                / {
                    "seq-mean-token-mean": len(reply) * total_rows,
                    "token-mean": total_tokens,
                    "seq-mean-token-sum": total_rows,
                    "seq-mean-token-sum-norm": total_rows * args.max_new_tokens,
                }[args.aggregation]
            )
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad(True)
    expected = {"loss": float(loss.detach()), "token_entropy": entropy_sum / total_tokens}
    expected |= {f"clip_fraction_{name}": count / total_tokens for name, count in clipped.items()}
    return run.optimizer.gradients, expected


def distance(one, other):
    """max |Δ| over max |value|, the worst of all tensors."""
    assert one.keys() == other.keys()
    return max(
        float((one[k] - other[k]).abs().max() / other[k].abs().max().clamp(min=1e-30))
        for k in other
    )


@pytest.mark.parametrize("blend", copo.BLENDS)
def test_update_is_the_formulas_for_any_budget_and_row_order(blend):
    run = make_run(blend=blend)
    rollout = make_rollout(run)
    old = old_of(rollout)
    expected, numbers = by_hand(run, rollout, old)
    seen = []
    for budget in (1, 37, 10**6):
        for order in (1, -1):
            run.args.micro_tokens = budget
            gradients, found = one_update(run, rollout, list(range(PROMPTS * GROUP))[::order], old)
            assert distance(gradients, expected) < 1e-9, (budget, order)
            assert all(
                math.isclose(found[name], value, rel_tol=1e-9) for name, value in numbers.items()
            ), budget
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
    rollout = make_rollout(run)
    reference = flat_logprobs(rollout) - 0.3
    expected, numbers = by_hand(run, rollout, ref=reference)
    gradients, found = one_update(run, rollout, ref=reference)
    assert distance(gradients, expected) < 1e-9
    assert math.isclose(found["loss"], numbers["loss"], rel_tol=1e-9)
    assert found["kl"] > 0


@pytest.mark.parametrize("blend", ["soft-zero", "local", "global"])
def test_float32_agrees_to_1e_5(blend):
    run = make_run(torch.float32, blend=blend)
    rollout = make_rollout(run)
    expected, _ = one_update(run, rollout)
    for budget in (1, 37):
        run.args.micro_tokens = budget
        gradients, _ = one_update(run, rollout)
        assert distance(gradients, expected) < 1e-5


@pytest.mark.parametrize("blend", copo.BLENDS)
def test_first_update_is_reinforce_with_the_effective_advantage(blend):
    run = make_run(blend=blend, global_coef=0.7, micro_tokens=20)
    rollout = make_rollout(run)
    gradients, found = one_update(run, rollout)
    effective = advantages_of(run, rollout).effective.flatten()
    objective = 0.0
    pairs = train.prompt_response_pairs(rollout, range(PROMPTS * GROUP))
    for row, (prompt, reply) in pairs.items():
        logits = (
            run.model.logits(run.model(torch.tensor([prompt + reply])))[0] / run.args.temperature
        )
        chosen = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(reply) - 1), reply]
        objective = objective + effective[row] * chosen.mean() / (PROMPTS * GROUP)
    (-objective).backward()
    run.optimizer.step()
    assert distance(gradients, run.optimizer.gradients) < 1e-9
    assert found["approx_kl"] == 0 and found["clip_fraction_local"] == 0 and found["ratio"] == 1


def test_an_update_of_some_rows_uses_their_own_numbers():
    """Rows of two prompts out of five, in any order: the same as a rollout that holds those two
    alone."""
    run = make_run(blend="local", advantage="group", micro_tokens=25)
    rollout = make_rollout(run)
    rows = [i * GROUP + j for i in (4, 1) for j in range(GROUP)]
    gradients, found = one_update(run, rollout, rows)
    alone, numbers = one_update(run, rollout.select([1, 4]), list(range(2 * GROUP)))
    assert distance(gradients, alone) < 1e-9
    assert math.isclose(found["loss"], numbers["loss"], rel_tol=1e-9)


def test_select_and_join_keep_prompts_with_their_responses():
    rollout = make_rollout(make_run())
    joined = rollout.select([0, 1]).join(
        rollout.select([3, 4])._replace(
            tokens=rollout.tokens[3:, :, :8], logprobs=rollout.logprobs[3:, :, :8]
        )
    )
    expected = rollout.select([0, 1, 3, 4])
    assert [problem.row for problem in joined.problems] == [0, 1, 3, 4]
    assert joined.prompts == [rollout.prompts[i] for i in (0, 1, 3, 4)]
    for name in ("lengths", "correct", "rewards", "classes", "finished"):
        assert torch.equal(getattr(joined, name), getattr(rollout, name)[[0, 1, 3, 4]])
    assert train.prompt_response_pairs(joined, range(12)) == train.prompt_response_pairs(
        expected, range(12)
    )


def test_equal_rewards_give_no_gradient_and_no_nan():
    run = make_run()
    nothing = torch.zeros(PROMPTS, GROUP)
    rollout = make_rollout(run)._replace(correct=nothing.bool(), rewards=nothing.double())
    gradients, found = one_update(run, rollout)
    assert all(float(g.abs().max()) == 0 for g in gradients.values())
    assert all(math.isfinite(value) for value in found.values())
    set_blend(run, "local")
    # one all wrong, one right
    gradients, _ = one_update(run, make_rollout(run).select([2, 3]), list(range(2 * GROUP)))
    assert all(float(g.abs().max()) == 0 for g in gradients.values())
    set_blend(run, "soft-zero")
    # one prompt: no A^g
    gradients, found = one_update(run, make_rollout(run).select([0]), list(range(GROUP)))
    assert all(torch.isfinite(g).all() for g in gradients.values()) and all(
        map(math.isfinite, found.values())
    )


def test_micro_batches_hold_their_budget_and_every_row():
    lengths = [3, 9, 1, 7, 7, 2, 12]
    chunks = [train.Chunk([row], length) for row, length in enumerate(lengths)]
    for budget in (1, 9, 14, 30, 1000):
        parts = train.split_by_token_budget(chunks, budget)
        rows = [chunk.rows[0] for part in parts for chunk in part]
        assert sorted(rows) == list(range(len(lengths)))
        for part in parts:
            assert len(part) == 1 or sum(chunk.tokens for chunk in part) <= budget
    assert len(train.split_by_token_budget(chunks, 1000)) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_chunks_are_rows_of_one_prompt_that_fit_a_micro_batch(ranks):
    prompts = [[1, 2, 3], [4] * 8, [1, 2, 3], [5]]
    pairs = [(list(prompt), [0] * n) for prompt in prompts for n in (4, 9, 1, 5, 2, 7)]
    for budget in (1, 14, 20, 10**6):
        chunks = train.chunks_by_prompt(dict(enumerate(pairs)), budget, ranks)
        assert sorted(row for chunk in chunks for row in chunk.rows) == list(range(24))
        for chunk in chunks:
            prompt = pairs[chunk.rows[0]][0]
            assert all(pairs[row][0] == prompt for row in chunk.rows)
            assert chunk.tokens == len(prompt) + sum(len(pairs[row][1]) for row in chunk.rows)
            fits = chunk.tokens <= budget and (ranks == 1 or len(chunk.rows) <= 24 // (4 * ranks))
            assert len(chunk.rows) == 1 or fits
    assert (len(chunks) == 3) is (ranks == 1)  # alone and with room, each prompt has one chunk


def test_an_update_runs_each_prompt_once_and_no_last_token(monkeypatch):
    run = make_run(micro_tokens=10**6)
    rollout, ran = make_rollout(run), []
    forward = model.Transformer.forward
    monkeypatch.setattr(
        model.Transformer, "forward", lambda *a, **k: ran.append(a[1].numel()) or forward(*a, **k)
    )
    one_update(run, rollout)
    assert sum(ran) == sum(map(len, rollout.prompts)) + int(rollout.lengths.sum()) - PROMPTS * GROUP


def watch_losses(monkeypatch):
    """Every call of copo_loss: (log-probs, old log-probs, mask, the rows' advantages)."""
    calls, inner = [], copo.copo_loss

    def watched(logprobs, old, mask, advantages, *rest, **more):
        calls.append((logprobs.detach().clone(), old.clone(), mask, advantages))
        return inner(logprobs, old, mask, advantages, *rest, **more)

    monkeypatch.setattr(copo, "copo_loss", watched)
    return calls


def watch_sums(monkeypatch):
    """What the last MetricSums held that was asked for its means: name -> (sum, count)."""
    sums, inner = {}, train.MetricSums.means

    def means(self):
        sums.clear()
        sums.update(self)
        return inner(self)

    monkeypatch.setattr(train.MetricSums, "means", means)
    return sums


@pytest.mark.parametrize("source", ["recompute", "sampler"])
def test_old_logprobs_are_those_before_any_update(monkeypatch, source):
    run = make_run(minibatch_prompts=2, lr=0.05, old_logprobs=source)
    rollout = make_rollout(run)
    run.optimizer = train.make_optimizer(run.model, run.args)
    calls = watch_losses(monkeypatch)
    sums = watch_sums(monkeypatch)
    found = train.update_policy(run, rollout, advantages_of(run, rollout))
    assert len(calls) == 3 and run.state.updates == 3  # updates of 2, 2 and 1 prompts
    known = {round(float(x), 9) for x in rollout.logprobs[rollout.logprobs != 0]}
    for number, (logprobs, old, mask, _) in enumerate(calls):
        assert all(round(float(x), 9) in known for x in old[mask])
        moved = float((logprobs - old)[mask].abs().max())
        assert moved == 0 if number == 0 else moved > 0.01
    # The sampler's log-probs are compared with the model's own only, not with themselves.
    compared = calls if source == "recompute" else calls[:1]
    assert sums["sampler_difference"][1] == sum(mask.sum() for _, _, mask, _ in compared)
    assert found["sampler_difference_max"] < 1e-12
    assert found["approx_kl"] > 0


def test_metrics_are_over_all_updates_of_the_step(monkeypatch):
    """Each figure is recomputed from the calls of copo_loss, over all tokens; first and last from
    those updates."""
    run = make_run(minibatch_prompts=2, lr=0.05, micro_tokens=15)
    rollout = make_rollout(run)
    run.optimizer = train.make_optimizer(run.model, run.args)
    calls, norms, updates = watch_losses(monkeypatch), [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)) or norms[-1]
    )
    one = train.train_minibatch

    def counted(*everything):
        before = len(calls)
        result = one(*everything)
        updates.append(calls[before:])
        return result

    monkeypatch.setattr(train, "train_minibatch", counted)
    sums = watch_sums(monkeypatch)
    found = train.update_policy(run, rollout, advantages_of(run, rollout))
    assert all(len(part) > 1 for part in updates) and len(updates) == len(norms) == 3

    def mean(parts, f):
        values = torch.cat([f(*call)[call[2]] for part in parts for call in part])
        return float(values.mean())

    def kl(logprobs, old, mask, advantages):
        return torch.expm1(logprobs - old) - (logprobs - old)

    def clipped(logprobs, old, mask, advantages):
        ratio, advantage = (logprobs - old).exp(), advantages.local_adv[:, None]
        outside = ((ratio > 1.2) & (advantage > 0)) | (
            ((ratio < 0.8) | (ratio > 3)) & (advantage < 0)
        )
        return outside.double()

    assert math.isclose(found["approx_kl"], mean(updates, kl), rel_tol=1e-9)
    assert math.isclose(found["clip_fraction_local"], mean(updates, clipped), rel_tol=1e-9)
    assert found["clip_fraction_local_first"] == 0 == found["clip_fraction_global_first"]
    assert math.isclose(
        found["clip_fraction_local_last"], mean(updates[-1:], clipped), rel_tol=1e-9
    )
    assert found["clip_fraction_local_last"] != found["clip_fraction_local"]
    assert math.isclose(found["grad_norm"], sum(map(float, norms)) / 3, rel_tol=1e-12)
    assert found["grad_norm_max"] == max(map(float, norms))
    assert sums["loss"][1] == 3 and sums["token_entropy"][1] == rollout.lengths.sum()


def test_groups_are_dealt_to_updates_by_seed_and_step(monkeypatch):
    run = make_run(minibatch_prompts=2)
    rollout, dealt = make_rollout(run), []

    def watched(run, rollout, rows, *_):
        dealt.append(rows)
        return False, None

    monkeypatch.setattr(train, "train_minibatch", watched)
    monkeypatch.setattr(train, "compute_logprobs", lambda *_: None)

    def deal(seed, step):
        dealt.clear()
        run.args.seed, run.state.step = seed, step
        train.update_policy(run, rollout, advantages_of(run, rollout))
        assert [len(rows) for rows in dealt] == [6, 6, 3]
        assert sorted(row for rows in dealt for row in rows) == list(range(15))
        assert all(
            rows[k] + 1 == rows[k + 1]
            for rows in dealt
            for k in range(len(rows))
            if k % GROUP < GROUP - 1
        )
        return [list(rows) for rows in dealt]

    first = deal(0, 0)
    assert deal(0, 0) == first
    assert len({str(deal(seed, step)) for seed in range(3) for step in range(3)}) > 6


def test_learning_rate_rises_over_updates_then_stays():
    run = make_run(warmup_updates=4, lr=0.1, minibatch_prompts=2)
    rollout, rates = make_rollout(run), []
    run.optimizer.step = lambda: rates.append(run.optimizer.param_groups[0]["lr"])
    for _ in range(2):
        train.update_policy(run, rollout, advantages_of(run, rollout))
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_weight_decay_spares_norms_and_biases():
    run = make_run(weight_decay=0.1)
    optimizer = train.make_optimizer(run.model, run.args)
    decayed = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, p in run.model.named_parameters():
        assert decayed[id(p)] == (0.0 if "norm" in name or "bias" in name else 0.1), name


def test_gradients_are_clipped_to_the_norm_but_logged_as_they_were():
    run = make_run(max_grad_norm=0.01)
    gradients, found = one_update(run, make_rollout(run))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert norm == pytest.approx(0.01, rel=1e-3) and found["grad_norm"] > 0.05
