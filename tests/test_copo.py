"""The mathematics of copo.py against numbers computed by hand, from the equations, not the code.

Bugs these tests guard against, most of them seen in public code of this kind: the population
standard deviation for the sample one; NaN for a group or a batch of one; rounding noise blown up to
an advantage of ±1 in a group of equal rewards; a gate that asks the reward and not the verdict;
advantages blended where losses should be; one clip side applied for both signs of the advantage; a
mask by multiplication, which lets NaN through; a loss averaged per micro-batch; an exp that
overflows; a KL gradient with the wrong sign; a response's ratio clamped token by token, or averaged
over its padding; presets that drift from the paper's values; a rule that is entered in its table
and not used; a placebo that keeps a part of the signal.
"""

import math
from collections import Counter
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import copo

steady = settings(derandomize=True, deadline=None, max_examples=60, database=None)
F64 = {"dtype": torch.float64}


def close(actual, expected, tol=1e-12):
    actual, expected = torch.as_tensor(actual, **F64), torch.as_tensor(expected, **F64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


# ---------------------------------------------------------------------------------------- entropy


def test_entropy_by_hand():
    classes = torch.tensor(
        [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 1], [-1, -1, -1, -1], [5, -1, 900, 5]]
    )
    # 3:1 is 2 − 0.75·log2 3 = 0.8112781244591328; 2:1:1 is 1.5 bits
    close(copo.consistency_entropy(classes), [0.0, 2.0, 1.0, 0.8112781244591328, 0.0, 1.5])
    assert copo.consistency_entropy(classes).dtype == torch.float64
    # never answering is consistent, exactly
    assert copo.consistency_entropy(classes)[4].item() == 0.0
    close(copo.consistency_entropy(torch.tensor([[7]])), [0.0])


@steady
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=9))
def test_entropy_depends_on_the_partition_only(labels):
    shares = [n / len(labels) for n in Counter(labels).values()]
    renamed = [1000 - 37 * label for label in reversed(labels)]
    for row in (labels, renamed):
        expected = -sum(p * math.log2(p) for p in shares)
        close(copo.consistency_entropy(torch.tensor([row])), [expected], 1e-12)


# ------------------------------------------------------------------------------- local advantages


def test_group_advantage_uses_the_sample_standard_deviation():
    # 1 1 0 0: std with n−1 is √(1/3), with n it would be 1/2. 1 0 0 0: mean 1/4, std √(3/4/3) = ½.
    half = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    advantages = copo.local_advantages(torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]]))
    close(advantages, [[half, half, -half, -half], [0.75 / 0.500001] + [-0.25 / 0.500001] * 3])
    assert advantages.dtype == torch.float64
    verdicts = torch.tensor([[1, 1, 0, 0]]).bool()
    close(copo.local_advantages(verdicts, scale=False), [[0.5, 0.5, -0.5, -0.5]])


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_are_exactly_zero(scale):
    rewards = torch.full((3, 7), 0.1, **F64)  # the mean of seven 0.1 is not 0.1
    rewards[1] += torch.linspace(0, 9e-10, 7, **F64)
    rewards[2, 0] += 1e-7
    advantages = copo.local_advantages(rewards, scale=scale)
    assert (advantages[:2] == 0).all()
    assert (advantages[2] != 0).all()
    assert (copo.local_advantages(torch.tensor([[1.0], [0.0]]), scale=scale) == 0).all()  # G = 1
    assert (copo.local_advantages(torch.ones(2, 3), "batch", scale) == 0).all()
    assert (copo.local_advantages(torch.ones(1, 1), "batch", scale) == 0).all()


def test_batch_advantage_is_over_the_whole_step():
    # Eight rewards, three of them 1: mean 3/8, sample variance (3·(5/8)² + 5·(3/8)²)/7 = 15/56
    rewards = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0]])
    std = math.sqrt(15 / 56) + 1e-6
    right, wrong = 0.625 / std, -0.375 / std
    close(copo.local_advantages(rewards, "batch"), [[right] * 3 + [wrong], [wrong] * 4])
    unscaled = copo.local_advantages(rewards, "batch", scale=False)
    close(unscaled, [[0.625] * 3 + [-0.375], [-0.375] * 4])


@pytest.mark.parametrize("group_size", [1, 2, 6, 8])
def test_ngrpo_all_wrong(group_size):
    expected = -1 / math.sqrt(group_size + 1)
    advantages = copo.local_advantages(torch.zeros(1, group_size), "ngrpo")
    close(advantages, [[expected] * group_size], 1e-5)
    assert (copo.local_advantages(torch.ones(1, group_size), "ngrpo") == 0).all()


def test_ngrpo_mixed():
    # 1 0 0 and a virtual 1: mean 1/2, sample std √(1/3), as in the group 1 1 0 0; the virtual
    # response gets no row
    half = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    close(copo.local_advantages(torch.tensor([[1.0, 0, 0]]), "ngrpo"), [[half, -half, -half]])


VERDICT_KINDS = {"sign": (1, -1), "w-reinforce": (0.1, -1)}


@pytest.mark.parametrize(("kind", "values"), VERDICT_KINDS.items())
@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_the_verdict_alone(kind, values, scale):
    """Groups mixed, all right, all wrong; rewards that say the opposite change nothing."""
    correct = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    right, wrong = values
    expected = [[right, wrong, wrong], [right] * 3, [wrong] * 3]
    advantages = copo.local_advantages(-7.0 * correct, kind, scale, correct)
    close(advantages, expected, 0)
    assert advantages.dtype == torch.float64
    one = copo.local_advantages(torch.zeros(1, 1), kind, scale, torch.tensor([[True]]))
    close(one, [[right]], 0)
    assert set(VERDICT_KINDS) == set(copo.VERDICT_ADVANTAGES)


def test_ebpo_by_hand():
    """Groups 1 0 and 0 0: means ½ and 0, variances ½ and 0, so s² = ¼ and s²/G = ⅛; τ² = ⅛ too.
    S = ½, mean r = ¼: baselines ½·½ + ½·¼ = ⅜ and ⅛. Residuals ⅝ −⅜, −⅛ −⅛; their squares sum to
    36/64, so their sample std is √(36/64/3) = √3/4."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    residuals = torch.tensor([[0.625, -0.375], [-0.125, -0.125]], **F64)
    close(copo.local_advantages(rewards, "ebpo", scale=False), residuals)
    scaled = copo.local_advantages(rewards, "ebpo")
    close(scaled, residuals / (math.sqrt(3) / 4 + 1e-6))
    assert scaled.dtype == torch.float64
    # Three of three groups count, and rewards of any size: 0 2, 1 3, 8 8 have means 1 2 8, so τ² is
    # (64/9 + 25/9 + 169/9)/3 · 3/2 = 43/3; variances 2 2 0, so s²/G = 4/3/2 = 2/3 and S = 2/45.
    rewards = torch.tensor([[0.0, 2], [1, 3], [8, 8]])
    baselines = [43 / 45 * mean + 2 / 45 * 11 / 3 for mean in (1, 2, 8)]
    expected = rewards.double() - torch.tensor(baselines, **F64)[:, None]
    close(copo.local_advantages(rewards, "ebpo", scale=False), expected)


@pytest.mark.parametrize("scale", [True, False])
def test_ebpo_at_its_corners(scale):
    def ebpo(rewards):
        return copo.local_advantages(torch.tensor(rewards, **F64), "ebpo", scale)

    # τ² = 0, one prompt or equal means: S = 1, the baseline is the mean of the step
    step = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    close(ebpo([[1.0, 0, 0]]), copo.local_advantages(step[:1], "batch", scale))
    close(ebpo(step.tolist()), copo.local_advantages(step, "batch", scale))
    # s² = 0, no group is mixed: S = 0, each group is its own baseline, and nothing is learnt
    assert (ebpo([[0.1] * 7, [0.7] * 7]) == 0).all()
    # both 0: S = 0
    assert (ebpo([[0.1] * 7] * 3) == 0).all()
    assert (ebpo([[1.0]]) == 0).all() and (ebpo([[1.0], [0.0]]) == 0).all()
    assert copo.local_advantages(torch.zeros(0, 2), "ebpo", scale).shape == (0, 2)


def test_ebpo_feeds_all_wrong_groups():
    """Where groups are noisy, an all-wrong group lies below its shrunk baseline; GRPO gives 0."""
    correct = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    advantages = copo.local_advantages(correct, "ebpo")
    assert (advantages[2] < -0.1).all() and (advantages[3] > 0.1).all()
    assert (copo.local_advantages(correct)[2:] == 0).all()


def test_rewards_are_never_overwritten():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]], **F64)
    for kind in copo.ADVANTAGES:
        copo.local_advantages(rewards, kind)
    copo.global_rewards(rewards, torch.zeros(2, **F64), True)
    copo.global_advantages(rewards[:, 0])
    close(rewards, [[1.0, 0.0], [0.0, 0.0]])


def test_unknown_names_are_refused_by_name():
    one = torch.ones(1, 2, **F64)
    with pytest.raises(ValueError, match="advantage is 'groups'"):
        copo.local_advantages(one, "groups")
    with pytest.raises(ValueError, match="blend is 'soft_zero'"):
        copo.local_weight(one[:, 0], one.bool(), one, "soft_zero", 5.0, 1.0)
    with pytest.raises(ValueError, match="aggregation is 'mean'"):
        copo.aggregate(one, one, "mean")
    with pytest.raises(ValueError, match="ratio is 'word'"):
        copo_loss(one, one, one, one[0], one[0], one[0], ratio="word")
    with pytest.raises(ValueError, match="KL estimator is 'k1'"):
        copo_loss(one, one, one, one[0], one[0], one[0], ref_logprobs=one, kl_estimator="k1")


# ----------------------------------------------------------------------------------------- global


def test_global_rewards_and_the_consistency_coefficient():
    verdicts = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    entropy = torch.tensor([0.0, 2.0, 1.0, 2.0], **F64)
    close(copo.global_rewards(verdicts, entropy), [1.0, 0.25, 0.5, 0.0])
    # λ = (1 − 1/4)/log2 4 = 3/8: factors 1, 1 − 6/8 = 1/4 (that is 1/G), 1 − 3/8 = 5/8
    close(copo.global_rewards(verdicts, entropy, True), [1.0, 0.0625, 0.3125, 0.0])
    # G = 6: λ = (5/6)/log2 6 = 0.32237...
    six = torch.tensor([[1, 0, 0, 0, 0, 0]])
    expected = (1 - (5 / 6) / 2.584962500721156) / 6
    close(copo.global_rewards(six, torch.tensor([1.0]), True), [expected])
    # G = 1: log2 1 = 0
    close(copo.global_rewards(torch.tensor([[1], [0]]), torch.zeros(2), True), [1.0, 0.0])


def test_global_advantages_by_hand():
    # 1, 1/2, 0: mean 1/2, sample std 1/2 (with n it would be 0.408)
    prompt_rewards = torch.tensor([1.0, 0.5, 0.0])
    close(copo.global_advantages(prompt_rewards), [0.5 / 0.500001, 0.0, -0.5 / 0.500001])
    close(copo.global_advantages(prompt_rewards, scale=False), [0.5, 0.0, -0.5])
    for equal in ([0.3], [0.1] * 7, [0.0, 0.0], []):
        advantages = copo.global_advantages(torch.tensor(equal, **F64))
        assert advantages.shape == (len(equal),) and (advantages == 0).all()


# ----------------------------------------------------------------------------------------- blends

S0, S1, S2 = 0.0066928509242848554, 0.5, 0.9933071490757153  # σ(5(H−1)) at H = 0, 1, 2


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        # groups: all right, H = 0; all wrong, H = 2; mixed, H = 1: right right wrong wrong
        ("soft", [[S0] * 4, [S2] * 4, [S1] * 4]),
        ("soft-zero", [[S0] * 4, [0] * 4, [S1, S1, 0, 0]]),
        ("soft-zero-group", [[S0] * 4, [0] * 4, [S1] * 4]),
        ("soft-forced", [[0] * 4, [0] * 4, [S1] * 4]),
        ("zero", [[1] * 4, [0] * 4, [1, 1, 0, 0]]),
        ("zero-group", [[1] * 4, [0] * 4, [1] * 4]),
        ("forced", [[0] * 4, [0] * 4, [1] * 4]),
        ("global", [[0] * 4, [0] * 4, [0] * 4]),
        ("local", [[1] * 4, [1] * 4, [1] * 4]),
    ],
)
def test_every_blend(blend, expected):
    classes = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
    correct = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    entropy = copo.consistency_entropy(classes)
    # Rewards with a penalty, so that A^l is nowhere 0 and no reward is 0: gates must look at the
    # verdict all the same
    local_adv = copo.local_advantages(correct.double() - torch.linspace(0.1, 0.4, 4, **F64))
    close(copo.local_weight(entropy, correct, local_adv, blend, 5.0, 1.0), expected)


def test_all_nine_blends_are_tested():
    marks = next(m for m in test_every_blend.pytestmark if m.name == "parametrize")
    assert sorted(case[0] for case in marks.args[1]) == sorted(copo.BLENDS)


def test_weight_uses_gamma_and_rho():
    entropy, shape = torch.tensor([0.5, 2.5], **F64), torch.zeros(2, 1, **F64)
    # σ(20·(0.5−1.5)) and σ(20·(2.5−1.5))
    weight = copo.local_weight(entropy, shape.bool(), shape, "soft", 20.0, 1.5)
    close(weight, [[2.061153618190204e-09], [0.9999999979388463]], 1e-15)


def test_effective_advantages():
    local_adv = torch.tensor([[2.0, -1.0], [4.0, 0.0]], **F64)
    weight = torch.tensor([[0.25, 0.5], [1.0, 0.0]], **F64)
    global_adv = torch.tensor([1.0, -3.0], **F64)
    effective = copo.effective_advantages(local_adv, global_adv, weight, 1.0)
    close(effective, [[1.25, 0.0], [4.0, -3.0]])
    effective = copo.effective_advantages(local_adv, global_adv, weight, 0.1)
    close(effective, [[0.575, -0.45], [4.0, -0.3]])


def test_mixed_groups():
    correct = torch.tensor([[1, 1], [0, 0], [1, 0]]).bool()
    assert copo.is_mixed(correct).tolist() == [False, False, True]
    assert copo.is_mixed(torch.tensor([[True], [False]])).tolist() == [False, False]


# ------------------------------------------------------------------------------- two consequences


def test_per_response_gate_pushes_wrong_answers_above_right_ones():
    """G = 6, five right; the batch has R mean .255 and std .346. Right / wrong: GRPO +.41/−2.04,
    soft-zero +1.48/+1.67, soft-zero-group +1.48/+1.12."""
    classes = torch.tensor([[0, 0, 0, 0, 0, 1]])
    correct = classes == 0
    entropy, local_adv = copo.consistency_entropy(classes), copo.local_advantages(correct)
    close(entropy, [0.6500224216483541])
    global_adv = (copo.global_rewards(correct, entropy) - 0.255) / 0.346
    expected = {
        "local": (0.41, -2.04),
        "soft-zero": (1.48, 1.67),
        "soft-zero-group": (1.48, 1.12),
    }
    for blend, (right, wrong) in expected.items():
        weight = copo.local_weight(entropy, correct, local_adv, blend, 5.0, 1.0)
        advantages = copo.effective_advantages(local_adv, global_adv, weight)[0]
        close(advantages, [right] * 5 + [wrong], 0.005)


def test_soft_starves_a_diverse_all_wrong_group_and_the_zero_gate_feeds_it():
    """Six different wrong answers: H = log2 6, w = σ(5·1.585) = .9996, A^l = 0: 0.04 % of A^g."""
    classes = torch.arange(6)[None]
    correct = torch.zeros(1, 6).bool()
    entropy, local_adv = copo.consistency_entropy(classes), copo.local_advantages(correct)
    global_adv = torch.tensor([(0 - 0.255) / 0.346], **F64)
    left = {}
    for blend in ("local", "soft", "soft-zero", "soft-zero-group"):
        weight = copo.local_weight(entropy, correct, local_adv, blend, 5.0, 1.0)
        effective = copo.effective_advantages(local_adv, global_adv, weight)
        left[blend] = (effective / global_adv)[0, 0].item()
    assert left["local"] == 0
    assert left["soft"] == pytest.approx(1 / (1 + math.exp(5 * (math.log2(6) - 1))), rel=1e-9)
    assert left["soft"] < 4e-4
    assert left["soft-zero"] == left["soft-zero-group"] == 1


# ------------------------------------------------------------------------------- the clipped loss

# ε_low 0.2, ε_high 0.3, c 3: ratio, advantage, loss, derivative by logp (−q·A, or 0 where clipped)
CLIP_CASES = [
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.25, 2.0, -2.5, -2.5),  # between the two ε: not clipped upwards
    (1.5, 2.0, -2.6, 0.0),  # A > 0 above: clipped at 1.3
    (0.5, 2.0, -1.0, -1.0),  # A > 0 below: not clipped, a good token may recover
    (0.5, -2.0, 1.6, 0.0),  # A < 0 below: clipped at 0.8
    (0.9, -2.0, 1.8, 1.8),
    (1.5, -2.0, 3.0, 3.0),  # A < 0 above: not clipped by PPO
    (2.9, -2.0, 5.8, 5.8),
    (4.0, -2.0, 6.0, 0.0),  # A < 0 far above: dual clip at 3·|A|
    (4.0, 2.0, -2.6, 0.0),
    (4.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CLIP_CASES)
def test_clip_on_every_side(ratio, advantage, loss, slope):
    old = torch.tensor([[-1.7]], **F64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    result = copo.clipped_loss(logprobs, old, torch.tensor([advantage], **F64), 0.2, 0.3, 3.0)
    close(result, [[loss]])
    result.sum().backward()
    close(logprobs.grad, [[slope]])


def test_dual_clip_can_be_off():
    old = torch.zeros(1, 1, **F64)
    logprobs = torch.full((1, 1), math.log(4.0), **F64)
    close(copo.clipped_loss(logprobs, old, torch.tensor([-2.0]), 0.2, 0.2, 0), [[8.0]])


def test_one_advantage_per_row_not_per_column():
    zeros, advantages = torch.zeros(2, 2, **F64), torch.tensor([1.0, 3.0], **F64)
    close(copo.clipped_loss(zeros, zeros, advantages, 0.2, 0.2, 3.0), [[-1, -1], [-3, -3]])
    per_token = copo.clipped_loss(zeros, zeros, advantages.expand(2, 2), 0.2, 0.2, 3.0)
    close(per_token, [[-1, -3], [-1, -3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_extreme_log_ratios_stay_finite(distance, advantage, dtype):
    logprobs = torch.full((1, 3), -1.0 + distance, dtype=dtype, requires_grad=True)
    old = torch.full((1, 3), -1.0, dtype=dtype)
    adv = torch.tensor([advantage], **F64)
    rows = (old, torch.ones(1, 3), adv, -adv, torch.tensor([0.3], **F64))
    loss, metrics = copo_loss(logprobs, *rows, ref_logprobs=old, kl_coef=0.1, dual_clip=0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(total) and math.isfinite(count) for total, count in metrics.values())
    # q = e^±20, by hand: the term with A < 0 keeps q above 1, the other is clipped at 1.2; below 1
    # the reverse at 0.8
    q, large, small = math.exp(math.copysign(20, distance)), 0.7, 0.3
    positive, negative = (small, large) if advantage > 0 else (large, small)
    clipped = 1.5 * (-positive * min(q, 1.2) + negative * max(q, 0.8))
    gap = math.copysign(20, -distance)
    assert loss.item() == pytest.approx(clipped + 0.1 * (math.expm1(gap) - gap), rel=1e-6)


# ------------------------------------------------------------------------------------ aggregation

LOSSES = torch.tensor([[1.0, 2.0, 3.0, 9.0], [5.0, 9.0, 9.0, 9.0], [2.0, 4.0, 9.0, 9.0]], **F64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
AGGREGATES = {
    "seq-mean-token-mean": (2 + 5 + 3) / 3,
    "token-mean": 17 / 6,
    "seq-mean-token-sum": (6 + 5 + 6) / 3,
    "seq-mean-token-sum-norm": (6 + 5 + 6) / 3 / 8,
}


@pytest.mark.parametrize("mode", copo.AGGREGATIONS)
def test_aggregation_by_hand(mode):
    close(copo.aggregate(LOSSES, MASK, mode, max_tokens=8), AGGREGATES[mode])
    # masks of any type
    close(copo.aggregate(LOSSES, MASK.int(), mode, max_tokens=8), AGGREGATES[mode])
    # Counts of a larger update: 12 tokens in 5 sequences
    scale = 6 / 12 if mode == "token-mean" else 3 / 5
    share = copo.aggregate(LOSSES, MASK, mode, max_tokens=8, num_tokens=12, num_sequences=5)
    close(share, AGGREGATES[mode] * scale)


@pytest.mark.parametrize("mode", copo.AGGREGATIONS)
def test_shares_of_micro_batches_sum_to_the_whole(mode):
    counts = {"max_tokens": 8, "num_tokens": MASK.sum(), "num_sequences": 3}
    shares = []
    for rows in ([2], [], [0, 1]):
        shares.append(copo.aggregate(LOSSES[rows], MASK[rows], mode, **counts))
    close(sum(shares), AGGREGATES[mode])
    # Rows of padding (an empty micro-batch on a rank with nothing left) add exactly nothing, and
    # are no sequences
    losses = torch.cat([LOSSES, torch.full((2, 4), math.nan, **F64)])
    mask = torch.cat([MASK, torch.zeros(2, 4).bool()])
    close(copo.aggregate(losses, mask, mode, max_tokens=8), AGGREGATES[mode])
    empty = torch.full((2, 4), math.nan, requires_grad=True, **F64)
    nothing = copo.aggregate(empty, torch.zeros(2, 4), mode, max_tokens=8)
    nothing.backward()
    assert nothing == 0 and (empty.grad == 0).all()


def test_sum_norm_needs_the_fixed_length():
    with pytest.raises(ValueError, match="needs max_tokens"):
        copo.aggregate(LOSSES, MASK, "seq-mean-token-sum-norm")


# --------------------------------------------------------------------------------- the whole loss


def copo_loss(logprobs, old, mask, local_adv, global_adv, weight, **options):
    """copo.copo_loss with the algorithm's fields, those of copo unless given, as keywords."""
    names = {field.name for field in fields(copo.Algorithm)} & options.keys()
    algorithm = copo.Algorithm(**{name: options.pop(name) for name in names})
    rows = copo.RowAdvantages(local_adv, global_adv, weight)
    return copo.copo_loss(logprobs, old, mask, rows, algorithm, **options)


def random_rows(seed, rows=6, tokens=5, spread=0.5):
    """Log-probs, old ones, a mask with rows of every length, both advantages, weights; float64."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(rows, tokens, generator=generator, **F64)
    logprobs = old + spread * torch.randn(rows, tokens, generator=generator, **F64)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    local_adv, global_adv = torch.randn(2, rows, generator=generator, **F64)
    return logprobs, old, mask, local_adv, global_adv, torch.rand(rows, generator=generator, **F64)


def test_losses_are_blended_not_advantages():
    """q = 1.5, A^l = 1 (clipped at 1.2), A^g = −1 (not clipped), w = 1/2: ½·(−1.2) + ½·1.5 = 0.15,
    slope ½·1.5. Blending advantages first would give 0."""
    old = torch.zeros(1, 1, **F64)
    logprobs = torch.full((1, 1), math.log(1.5), requires_grad=True, **F64)
    one = torch.ones(1, **F64)
    loss, _ = copo_loss(logprobs, old, old == 0, one, -one, one / 2)
    loss.backward()
    close(loss.item(), 0.15)
    close(logprobs.grad, [[0.75]])
    loss, _ = copo_loss(logprobs, old, old == 0, one, -one, one / 2, global_coef=0.1)
    close(loss.item(), -0.6 + 0.075)


@pytest.mark.parametrize("ratio", copo.RATIOS)
@pytest.mark.parametrize("mode", copo.AGGREGATIONS)
def test_on_policy_gradient_is_reinforce_with_the_blended_advantage(mode, ratio):
    """At q = 1 one q per response has the gradient of one per token, whatever the aggregation."""
    logprobs, _, mask, local_adv, global_adv, weight = random_rows(0)
    coef = 0.7
    leaf = logprobs.clone().requires_grad_()
    options = {"aggregation": mode, "max_tokens": 5, "global_coef": coef, "ratio": ratio}
    copo_loss(leaf, logprobs, mask, local_adv, global_adv, weight, **options)[0].backward()
    blended = weight * local_adv + coef * (1 - weight) * global_adv
    per_token = {  # what a token's −A·logp is divided by
        "seq-mean-token-mean": 6 * mask.sum(1, keepdim=True),
        "token-mean": mask.sum(),
        "seq-mean-token-sum": torch.tensor(6),
        "seq-mean-token-sum-norm": torch.tensor(6 * 5),
    }[mode]
    close(leaf.grad, -blended[:, None] * mask / per_token)


@pytest.mark.parametrize("ratio", copo.RATIOS)
@pytest.mark.parametrize("mode", copo.AGGREGATIONS)
def test_gradient_by_finite_differences(mode, ratio):
    logprobs, old, mask, local_adv, global_adv, weight = random_rows(3)
    ref = old - 0.3

    rows = (old, mask, local_adv, global_adv, weight)
    options = {"aggregation": mode, "max_tokens": 5, "dual_clip": 1.5, "global_coef": 0.5}
    options["ratio"] = ratio

    def loss(values):
        return copo_loss(values, *rows, ref_logprobs=ref, kl_coef=0.2, **options)[0]

    leaf = logprobs.clone().requires_grad_()
    loss(leaf).backward()
    step = 1e-6
    for row, token in mask.nonzero().tolist():
        bump = torch.zeros_like(logprobs)
        bump[row, token] = step
        slope = (loss(logprobs + bump) - loss(logprobs - bump)) / (2 * step)
        assert leaf.grad[row, token].item() == pytest.approx(slope.item(), abs=1e-8)
    assert (leaf.grad[~mask] == 0).all()


def test_old_reference_and_weights_get_no_gradient():
    rows = random_rows(1)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in rows]
    loss, metrics = copo_loss(*leaves, ref_logprobs=leaves[1], kl_coef=0.1)
    loss.backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])
    assert not any(value.requires_grad for pair in metrics.values() for value in pair)


@pytest.mark.parametrize("ratio", copo.RATIOS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_leaks_from_masked_positions(garbage, ratio):
    logprobs, old, mask, *rest = random_rows(2)
    options = {"kl_coef": 0.3, "ratio": ratio}
    clean_leaf = torch.where(mask, logprobs, 0.0).requires_grad_()
    ref = old + 0.1
    clean, clean_metrics = copo_loss(clean_leaf, old, mask, *rest, ref_logprobs=ref, **options)
    clean.backward()
    # the policy's, the old and the reference log-probs, one after the other and together
    for poisoned in range(3):
        tensors = [logprobs, old, ref]
        tensors[poisoned:] = [torch.where(mask, x, garbage) for x in tensors[poisoned:]]
        leaf = tensors[0].clone().requires_grad_()
        loss, metrics = copo_loss(leaf, tensors[1], mask, *rest, ref_logprobs=tensors[2], **options)
        loss.backward()
        assert torch.equal(loss, clean) and torch.equal(leaf.grad, clean_leaf.grad)
        assert metrics == clean_metrics


def test_k3_by_hand():
    """d = ref − logp: e^d − 1 − d is 0.0258.. at +0.22 and 0.0225.. at −0.22; at 1e-9 it is d²/2,
    which exp(d) − 1 would lose to rounding. Its slope by logp is 1 − e^d."""
    distance = torch.tensor([[0.22, -0.22, 0.0, 1e-9]], **F64)
    logprobs = torch.full((1, 4), -1.0, **F64).requires_grad_()
    zero = torch.zeros(1, **F64)
    args = (logprobs.detach(), torch.ones(1, 4), zero, zero, zero)
    ref = -1.0 + distance
    options = {"kl_coef": 0.5, "aggregation": "token-mean"}
    loss, metrics = copo_loss(logprobs, *args, ref_logprobs=ref, **options)
    expected = [0.02607673058738085, 0.022518797962, 0.0, 0.0]
    close(loss.item(), 0.5 * sum(expected) / 4, 1e-12)
    close(metrics["kl"][0], sum(expected), 1e-11)
    loss.backward()
    close(logprobs.grad, 0.5 * (1 - distance.exp()) / 4)
    # β = 0 with a reference: a metric, no loss. β > 0 without one is a mistake.
    assert copo_loss(logprobs, *args, ref_logprobs=ref)[0] == 0
    with pytest.raises(ValueError, match=r"kl_coef is 0\.5"):
        copo_loss(logprobs, *args, kl_coef=0.5)


def test_k2_by_hand():
    """d²/2, and its slope by logp is −d: the gradient of KL(π‖ref) on samples of π."""
    distance = torch.tensor([[0.22, -0.22, 0.0, 3.0]], **F64)
    logprobs = torch.full((1, 4), -1.0, **F64).requires_grad_()
    zero = torch.zeros(1, **F64)
    rows = (logprobs.detach(), torch.ones(1, 4), zero, zero, zero)
    options = {"kl_coef": 0.5, "kl_estimator": "k2", "aggregation": "token-mean"}
    loss, metrics = copo_loss(logprobs, *rows, ref_logprobs=-1.0 + distance, **options)
    expected = [0.0242, 0.0242, 0.0, 4.5]
    close(loss.item(), 0.5 * sum(expected) / 4)
    close(metrics["kl"][0], sum(expected))
    loss.backward()
    close(logprobs.grad, 0.5 * -distance / 4)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_kl_estimators_by_expectation(name):
    """Exact means over a policy of three tokens: k3 has the value of KL(π‖ref), k2 its gradient."""
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True, **F64)
    logp = logits.log_softmax(0)
    ref = torch.tensor([0.1, 0.4, 0.2], **F64).log_softmax(0)
    exact = (logp.exp() * (logp - ref)).sum()
    estimate = (logp.exp().detach() * copo.KL_ESTIMATORS[name](ref - logp)).sum()
    if name == "k3":
        close(estimate.item(), exact.item())
    else:
        gradient = torch.autograd.grad(estimate, logits, retain_graph=True)[0]
        close(gradient, torch.autograd.grad(exact, logits)[0])


def test_k3_is_exact_for_tiny_distances():
    # float32, d = 0.01: k3 = d²/2 + d³/6 + … = 5.016708e-5; exp(d) − 1 − d is off by a thousandth
    zero = torch.zeros(1)
    args = (torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), zero, zero, zero)
    _, metrics = copo_loss(*args, ref_logprobs=torch.full((1, 1), 0.01))
    assert metrics["kl"][0].item() == pytest.approx(5.016708e-5, rel=1e-4)


def test_metrics_by_hand():
    """Two rows of two tokens, one token masked. Ratios 1.5, 0.5 | 4. A^l = 1, −1; A^g = −2, 3;
    w = 0.75, 0. Row 0: A^l > 0 clips at 1.5 only, A^g < 0 at 0.5 only. Row 1: A^l < 0 meets the
    dual clip, A^g > 0 is clipped."""
    logprobs = torch.tensor([[1.5, 0.5], [4.0, 1.0]], **F64).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    adv = torch.tensor([[1.0, -1.0], [-2.0, 3.0], [0.75, 0.0]], **F64)
    _, metrics = copo_loss(logprobs, torch.zeros(2, 2, **F64), mask, *adv)
    clips = {"clip_fraction_local", "clip_fraction_global"}
    assert set(metrics) == {"ratio", "approx_kl", "local_share"} | clips
    means = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert means["clip_fraction_local"] == (2.0, 3.0)
    assert means["clip_fraction_global"] == (2.0, 3.0)
    assert means["ratio"] == pytest.approx((6.0, 3.0))
    # q − 1 − log q: 0.5 − 0.405465, −0.5 + 0.693147, 3 − 1.386294
    assert means["approx_kl"] == pytest.approx((0.0945348919 + 0.1931471806 + 1.6137056389, 3.0))
    # row 0: 0.75 / (0.75 + 0.25·2) = 0.6 on two tokens; row 1: 0 / 3 on one
    assert means["local_share"] == pytest.approx((1.2, 3.0))


def test_local_share_leaves_out_tokens_without_any_gradient():
    zeros, mask = torch.zeros(2, 3, **F64), torch.tensor([[1, 1, 1], [1, 1, 0]])
    adv = torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.5, 0.5]], **F64)
    _, metrics = copo_loss(zeros, zeros, mask, *adv)
    close(torch.stack(metrics["local_share"]), [2 * 2 / 3, 2.0])
    _, metrics = copo_loss(zeros, zeros, mask, *adv, global_coef=4.0)
    close(torch.stack(metrics["local_share"]), [2 * 1 / 3, 2.0])


@pytest.mark.parametrize("ratio", copo.RATIOS)
@pytest.mark.parametrize("mode", copo.AGGREGATIONS)
def test_micro_batches_padding_and_row_order_change_nothing(mode, ratio):
    rows = random_rows(5)
    ref = rows[1] - 0.2
    options = {"aggregation": mode, "max_tokens": 9, "kl_coef": 0.1, "ratio": ratio}
    leaf = rows[0].clone().requires_grad_()
    loss, metrics = copo_loss(leaf, *rows[1:], ref_logprobs=ref, **options)
    loss.backward()
    split_leaf = rows[0].clone().requires_grad_()
    counts = {"num_tokens": int(rows[2].sum()), "num_sequences": 6}
    total, sums = 0.0, {}
    for part in ([4, 0], [5], [], [1, 3, 2]):
        wide = []
        for tensor in (split_leaf, rows[1], rows[2], ref):
            wide.append(torch.nn.functional.pad(tensor[part], (0, 3)))
        narrow = [x[part] for x in rows[3:]]
        part_options = {"ref_logprobs": wide[3], **options, **counts}
        share, part_metrics = copo_loss(*wide[:3], *narrow, **part_options)
        share.backward()
        total += share.item()
        for name, pair in part_metrics.items():
            sums[name] = sums.get(name, 0) + torch.stack(pair)
    close(total, loss.item())
    close(split_leaf.grad, leaf.grad)
    for name, pair in metrics.items():
        close(sums[name], torch.stack(pair))


@steady
@given(
    st.sampled_from([(1, 1), (1, 4), (3, 1), (2, 2), (3, 3), (4, 2)]),
    st.lists(st.tuples(st.booleans(), st.integers(-1, 2)), min_size=9, max_size=9),
    st.sampled_from(list(copo.BLENDS)),
    st.sampled_from(list(copo.ADVANTAGES)),
    st.sampled_from(list(copo.RATIOS)),
    st.booleans(),
    st.sampled_from([-1e4, -0.5, 0.0, 0.5, 1e4]),
)
def test_no_batch_gives_nan(shape, responses, blend, kind, ratio, flag, distance):
    """Any verdicts and answers, one prompt or one response included, give finite numbers only."""
    responses = responses[: shape[0] * shape[1]]
    correct = torch.tensor([verdict for verdict, _ in responses]).reshape(shape)
    classes = torch.tensor([label for _, label in responses]).reshape(shape)
    entropy = copo.consistency_entropy(classes)
    local_adv = copo.local_advantages(correct, kind, scale=flag)
    prompt_rewards = copo.global_rewards(correct, entropy, consistency_coef=flag)
    global_adv = copo.global_advantages(prompt_rewards, scale=flag)
    weight = copo.local_weight(entropy, correct, local_adv, blend, 5.0, 1.0)
    assert ((weight >= 0) & (weight <= 1)).all()
    old = torch.full((correct.numel(), 2), -1.0)
    logprobs = (old + distance).requires_grad_()
    rows = global_adv[:, None].expand_as(local_adv)
    args = (x.reshape(-1) for x in (local_adv, rows, weight))
    loss, metrics = copo_loss(logprobs, old, torch.ones_like(old), *args, ratio=ratio)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(value) for pair in metrics.values() for value in pair)
    if kind == "group":
        assert (local_adv[~copo.is_mixed(correct)] == 0).all()


# ------------------------------------------------------------------------- one q for each response


def test_sequence_ratio_by_hand():
    """logp − old: .5 −.1 (masked: NaN) and −.4. Means .2 and −.4, so q is e^.2 = 1.2214 for both
    tokens of row 0 and e^−.4 = .6703. A^l = 2, 1 and A^g = −1, −3; w = ½; ε .2; c 3."""
    logprobs = torch.tensor([[-0.5, -1.1, math.nan], [-1.4, 0.0, 0.0]], **F64).requires_grad_()
    old = torch.full((2, 3), -1.0, **F64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    adv = torch.tensor([[2.0, 1.0], [-1.0, -3.0], [0.5, 0.5]], **F64)
    loss, metrics = copo_loss(logprobs, old, mask, *adv, ratio="sequence")
    q = (math.exp(0.2), math.exp(-0.4))
    # row 0: ½(−1.2·2 + 1.2214·1), the local loss clipped; row 1: ½(−.6703·1 + .8·3), the global one
    close(loss.item(), ((-2.4 + q[0]) / 2 + (-q[1] + 2.4) / 2) / 2)
    loss.backward()
    # Row 0 has q/2 in its sequence mean, and each of its two tokens half of dq; row 1 −q/2.
    close(logprobs.grad, [[q[0] / 8, q[0] / 8, 0], [-q[1] / 4, 0, 0]])
    means = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert means["ratio"] == pytest.approx((2 * q[0] + q[1], 3.0))
    assert means["clip_fraction_local"] == (2.0, 3.0)
    assert means["clip_fraction_global"] == (1.0, 3.0)
    # approx_kl stays one of tokens: q − 1 − log q at log q = .5, −.1, −.4
    token_kl = [math.expm1(d) - d for d in (0.5, -0.1, -0.4)]
    assert means["approx_kl"] == pytest.approx((sum(token_kl), 3.0))


def test_sequence_ratio_is_clamped_after_the_mean():
    """Differences 50 and −20 have the mean 15: a clamp of each token first would make it 0. The
    mean of 50 and 10 is 30, clamped to 20, and −50 to −20."""
    logprobs = torch.tensor([[50.0, -20.0], [50.0, 10.0], [-50.0, -50.0]], **F64)
    mask = torch.ones(3, 2).bool()
    zeros = torch.zeros_like(logprobs)
    log_ratio = copo.sequence_log_ratio(logprobs, zeros, mask)
    close(log_ratio, [[15, 15], [20, 20], [-20, -20]])
    mask[0, 1] = False
    mask[2] = False  # a row without a token
    log_ratio = copo.sequence_log_ratio(logprobs, zeros, mask)
    close(log_ratio, [[20, 20], [20, 20], [0, 0]])


def test_sequence_ratio_of_one_token_is_the_token_ratio():
    logprobs, old, _, *adv = random_rows(8, tokens=1)
    mask = torch.ones_like(old)
    token, token_metrics = copo_loss(logprobs, old, mask, *adv)
    sequence, sequence_metrics = copo_loss(logprobs, old, mask, *adv, ratio="sequence")
    close(sequence, token)
    for name, pair in token_metrics.items():
        close(torch.stack(sequence_metrics[name]), torch.stack(pair))


def test_the_kl_to_the_reference_stays_one_of_tokens():
    logprobs, old, mask, *_ = random_rows(9)
    zeros = torch.zeros(6, **F64)
    options = {"ref_logprobs": old - 0.3, "kl_coef": 0.5}
    token, _ = copo_loss(logprobs, old, mask, zeros, zeros, zeros, **options)
    sequence, _ = copo_loss(logprobs, old, mask, zeros, zeros, zeros, ratio="sequence", **options)
    assert token.item() != 0
    close(sequence, token)


# ------------------------------------------------------------------------------------ the placebo


def test_placebo_is_uniform_over_permutations():
    """Four responses, 24 orders, 4,800 steps: χ² with 23 degrees of freedom is below 49.7 in 99.9 %
    of fair deals. Rewards tell the responses apart; a verdict stays with its reward."""
    rewards = torch.tensor([[0.0, 1.0], [2.0, 3.0]], **F64)
    correct = torch.tensor([[True, False], [False, True]])
    counts = Counter()
    for step in range(4800):
        dealt_rewards, dealt_correct = copo.permute_rewards(rewards, correct, 11, step)
        order = tuple(dealt_rewards.flatten().int().tolist())
        counts[order] += 1
        assert sorted(order) == [0, 1, 2, 3]
        assert dealt_correct.flatten().tolist() == [number in (0, 3) for number in order]
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7
    close(rewards, [[0, 1], [2, 3]])  # the step's own are left alone


def test_placebo_keeps_the_steps_means_and_follows_seed_and_step():
    generator = torch.Generator().manual_seed(3)
    correct = torch.rand(40, 6, generator=generator) < 0.3
    rewards = correct.double() - 0.1 * torch.rand(40, 6, generator=generator, **F64)
    dealt = {}
    for seed, step in ((0, 1), (0, 2), (1, 1), (2, 0)):
        dealt_rewards, dealt_correct = copo.permute_rewards(rewards, correct, seed, step)
        assert dealt_rewards.shape == dealt_correct.shape == (40, 6)
        assert dealt_rewards.dtype == torch.float64 and dealt_correct.dtype == torch.bool
        close(dealt_rewards.mean(), rewards.mean())
        assert dealt_correct.sum() == correct.sum()
        assert torch.equal(dealt_rewards.flatten().sort()[0], rewards.flatten().sort()[0])
        # responses change places across groups, not only within them
        assert not torch.equal(dealt_correct.sum(dim=1), correct.sum(dim=1))
        dealt[seed, step] = tuple(dealt_rewards.flatten().tolist())
    assert len(set(dealt.values())) == 4
    again, _ = copo.permute_rewards(rewards, correct, 0, 1)
    assert tuple(again.flatten().tolist()) == dealt[0, 1]


def test_placebo_moves_with_the_size_of_the_step_only():
    """Other rewards are dealt in the same order: the permutation never looks at them."""
    first = torch.arange(12.0).view(3, 4)
    second = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    dealt_first, _ = copo.permute_rewards(first, first > 5, 4, 2)
    dealt_second, _ = copo.permute_rewards(second, second > 0.5, 4, 2)
    assert torch.equal(second.flatten()[dealt_first.flatten().long()], dealt_second.flatten())
    one, verdict = copo.permute_rewards(torch.ones(1, 1), torch.ones(1, 1).bool(), 0, 0)
    assert one.item() == 1 and verdict.item() is True


# -------------------------------------------------------------------------------- the whole step


def test_compute_advantages_by_hand():
    """G = 2, four tokens at most, a penalty over the last two. R: 1, 1/2, 0, so A^g 1, 0, −1."""
    correct = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    rewards = correct.double()
    classes = torch.tensor([[0, 0], [0, 1], [1, 1]])
    lengths = torch.tensor([[2, 4], [1, 2], [3, 3]])
    algorithm = copo.Algorithm(overlong_factor=0.5, overlong_buffer=2, global_coef=0.5)
    result = copo.compute_advantages(rewards, correct, classes, lengths, algorithm, 4)
    assert all(tensor.dtype == torch.float64 for tensor in result)
    close(rewards, [[1, 1], [1, 0], [0, 0]])  # never overwritten
    close(result.rewards, [[1, 0.5], [1, 0], [-0.25, -0.25]])
    close(result.entropy, [0, 1, 0])
    close(result.global_rewards, [1, 0.5, 0])  # of the verdicts, without the penalty
    half = math.sqrt(0.5)
    close(result.local_adv, [[half, -half], [half, -half], [0, 0]], 1e-5)
    close(result.global_adv, [1, 0, -1], 1e-5)
    close(result.weight, [[S0, S0], [S1, 0], [0, 0]])
    first = 0.5 * (1 - S0)
    expected = [[S0 * half + first, -S0 * half + first], [half / 2, 0], [-0.5, -0.5]]
    close(result.effective, expected, 1e-5)


def test_compute_advantages_follows_every_field():
    """Each field that governs advantages or weights is handed to the function that it is for."""
    correct = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    rewards = torch.tensor([[1.0, 0.9, 0.2], [0.7, 0.1, 0.0], [0.3, 0.0, 0.0]], **F64)  # graded
    classes = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 1, 2]])

    def computed(**changes):
        algorithm = copo.Algorithm(**changes)
        return copo.compute_advantages(rewards, correct, classes, None, algorithm, None)

    entropy = copo.consistency_entropy(classes)
    weights = (entropy, correct, rewards)
    close(computed(advantage="ngrpo").local_adv, copo.local_advantages(rewards, "ngrpo"))
    unscaled = computed(scale_advantages=False)
    close(unscaled.local_adv, copo.local_advantages(rewards, scale=False))
    close(unscaled.global_adv, copo.global_advantages(unscaled.global_rewards, scale=False))
    consistent = computed(consistency_coef=True).global_rewards
    close(consistent, copo.global_rewards(correct, entropy, True))
    close(computed(blend="soft").weight, copo.local_weight(*weights, "soft", 5.0, 1.0))
    close(computed(gamma=9.0).weight, copo.local_weight(*weights, "soft-zero", 9.0, 1.0))
    close(computed(rho=0.5).weight, copo.local_weight(*weights, "soft-zero", 5.0, 0.5))


def test_rows_are_numbered_prompt_by_prompt():
    correct = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()
    classes = torch.tensor([[0, 1, 2], [0, 0, 1]])
    algorithm = copo.PRESETS["copo"]
    result = copo.compute_advantages(correct, correct, classes, None, algorithm, None)
    rows = result.rows(torch.tensor([4, 0, 5]))
    close(rows.local_adv, result.local_adv[[1, 0, 1], [1, 0, 2]])
    close(rows.global_adv, result.global_adv[[1, 0, 1]])
    close(rows.weight, result.weight[[1, 0, 1], [1, 0, 2]])


def test_rules_added_from_outside_reach_the_loss_and_its_gradient(monkeypatch):
    """A blend, an advantage and a KL estimator, entered in their tables, train as built-in ones."""
    half = copo.Blend(uses_entropy=False, gate=lambda correct: torch.full(correct.shape, 0.5))
    monkeypatch.setitem(copo.BLENDS, "half", half)
    monkeypatch.setitem(copo.ADVANTAGES, "mine", lambda rewards, correct, scale: 2.0 * correct - 1)
    monkeypatch.setitem(copo.KL_ESTIMATORS, "k1", lambda distance: -distance)
    monkeypatch.setitem(copo.RATIOS, "one", lambda logprobs, old, mask: logprobs - old)
    fields = {"blend": "half", "advantage": "mine", "ratio": "one", "kl_estimator": "k1"}
    algorithm = copo.Algorithm(**fields, kl_coef=0.25)
    correct = torch.tensor([[1, 1], [0, 0], [1, 0]]).bool()
    rewards = torch.tensor([[0.5, 0.5], [0.3, 0.0], [0.9, 0.0]], **F64)
    classes = torch.tensor([[0, 0], [1, 2], [0, 1]])
    result = copo.compute_advantages(rewards, correct, classes, None, algorithm, None)
    close(result.local_adv, [[1, 1], [-1, -1], [1, -1]])  # of the verdicts alone
    close(result.weight, [[0.5] * 2] * 3)
    close(result.effective, [[1, 1], [-1, -1], [0.5, -0.5]], 1e-5)  # A^g is 1, −1, 0
    old = torch.full((6, 3), -1.0, **F64)
    logprobs = old.clone().requires_grad_()
    rows = result.rows(torch.arange(6))
    loss, metrics = copo.copo_loss(logprobs, old, old < 0, rows, algorithm, ref_logprobs=old - 0.1)
    loss.backward()
    # Six sequences of three tokens: REINFORCE with the effective advantage, and β for each token
    expected = (-result.effective.reshape(6, 1) + 0.25) / 18
    close(logprobs.grad, expected.expand(6, 3))
    close(metrics["kl"][0], 18 * 0.1)


def test_every_field_of_an_algorithm_can_be_a_flag():
    """train.py makes its flags of these; choices are the tables themselves, so additions show."""
    tables = {}
    for field in fields(copo.Algorithm):
        assert field.type in (str, float, bool) and type(field.default) is field.type
        assert field.metadata["help"]
        if field.type is str:
            tables[field.name] = field.metadata["choices"]
            assert field.default in field.metadata["choices"]
        if field.type is float:
            low, high = map(float, field.metadata["interval"][1:-1].split(","))
            assert low <= field.default <= high
    assert tables["blend"] is copo.BLENDS
    assert tables["advantage"] is copo.ADVANTAGES
    assert tables["ratio"] is copo.RATIOS
    assert tables["kl_estimator"] is copo.KL_ESTIMATORS
    assert tables["aggregation"] is copo.AGGREGATIONS


# ------------------------------------------------------------------------------- penalty, presets


def test_overlong_penalty_by_hand():
    # limit 100, buffer 20: nothing up to 80, half at 90, all of it at 100 and beyond
    lengths = torch.tensor([[1, 80, 85], [90, 100, 130]])
    close(copo.overlong_penalty(lengths, 100, 20, 1.0), [[0, 0, -0.25], [-0.5, -1, -1]])
    close(copo.overlong_penalty(lengths, 100, 0.2, 0.5), [[0, 0, -0.125], [-0.25, -0.5, -0.5]])
    close(copo.overlong_penalty(torch.tensor([0, 50, 100]), 100, 100, 1.0), [0, -0.5, -1])
    # one token, not the whole limit
    close(copo.overlong_penalty(torch.tensor([99, 100]), 100, 1, 1.0), [0, -1])
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match=f"overlong buffer is {buffer}"):
            copo.overlong_penalty(lengths, 100, buffer, 1.0)


def test_presets_are_the_papers_and_complete():
    copo_preset = {
        "blend": "soft-zero",
        "gamma": 5.0,
        "rho": 1.0,
        "advantage": "group",
        "scale_advantages": True,
        "global_coef": 1.0,
        "consistency_coef": False,
        "ratio": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "aggregation": "seq-mean-token-mean",
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "dynamic_sampling": False,
        "overlong_factor": 0.0,
        "overlong_buffer": 0.2,
    }
    differences = {
        "copo": {},
        "copo-paper": {"blend": "soft", "gamma": 20.0, "rho": 1.5},
        "copo-group": {"blend": "soft-zero-group"},
        "copo-forced": {"blend": "forced"},
        "grpo": {"blend": "local"},
        "dr-grpo": {
            "blend": "local",
            "scale_advantages": False,
            "aggregation": "seq-mean-token-sum-norm",
        },
        "dapo": {
            "blend": "local",
            "clip_high": 0.28,
            "aggregation": "token-mean",
            "dynamic_sampling": True,
            "overlong_factor": 1.0,
        },
    }
    assert list(differences) == list(copo.PRESETS)
    for name, algorithm in copo.PRESETS.items():
        assert asdict(algorithm) == copo_preset | differences[name]
        assert algorithm.blend in copo.BLENDS and algorithm.advantage in copo.ADVANTAGES
        assert algorithm.aggregation in copo.AGGREGATIONS
        assert algorithm.kl_estimator in copo.KL_ESTIMATORS and algorithm.ratio in copo.RATIOS
        copo.check_algorithm(algorithm)


def test_copo_forced_is_grpo_in_mixed_groups_and_global_in_the_others():
    """G = 2, R 1, ½, 0: A^g 1, 0, −1; A^l of the mixed group ±√½. Their answers' entropy is no
    matter."""
    correct = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    classes = torch.tensor([[0, 0], [0, 1], [1, 2]])
    forced = copo.PRESETS["copo-forced"]
    result = copo.compute_advantages(correct, correct, classes, None, forced, None)
    half = math.sqrt(0.5)
    close(result.weight, [[0, 0], [1, 1], [0, 0]])
    close(result.effective, [[1, 1], [half, -half], [-1, -1]], 1e-5)


def test_copo_group_by_hand():
    """As above; w of the mixed group is σ(5·(1 − 1)) = ½ for both responses, of the group that is
    all right σ(−5), of the all-wrong group 0 though its answers differ."""
    correct = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    classes = torch.tensor([[0, 0], [0, 1], [1, 2]])
    group = copo.PRESETS["copo-group"]
    result = copo.compute_advantages(correct, correct, classes, None, group, None)
    half = math.sqrt(0.5)
    close(result.weight, [[S0, S0], [0.5, 0.5], [0, 0]])
    close(result.effective, [[1 - S0, 1 - S0], [half / 2, -half / 2], [-1, -1]], 1e-5)


@pytest.mark.parametrize("name", copo.VERDICT_ADVANTAGES)
def test_what_the_verdict_alone_cannot_use_is_refused(name):
    copo.check_algorithm(copo.Algorithm(advantage=name))
    with pytest.raises(ValueError, match=f"--advantage {name} .*--overlong-factor .*not 0.5"):
        copo.check_algorithm(copo.Algorithm(advantage=name, overlong_factor=0.5))
    with pytest.raises(ValueError, match=f"--advantage {name} .*--scale-advantages") as error:
        copo.check_algorithm(copo.Algorithm(advantage=name, scale_advantages=False))
    assert "\n" not in str(error.value)
    for kind in copo.ADVANTAGES.keys() - set(copo.VERDICT_ADVANTAGES):
        algorithm = copo.Algorithm(advantage=kind, overlong_factor=0.5, scale_advantages=False)
        copo.check_algorithm(algorithm)


# --------------------------------------------------------------------------------- python copo.py


def test_main_prints_the_worked_batch(capsys):
    copo.main([])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 110 and "\x1b" not in text
    # R: 1, 5/6, 2/6, 1/6 and five 0: mean 14/54 = 0.259, sample std √(0.1535) = 0.392
    assert "mean 0.259, standard deviation 0.392" in text
    rows = {}
    for line in text.splitlines():
        if line[:1].isdigit():
            rows.setdefault(line.split()[0], []).append(line.split()[1:])
    # prompt 2, five of six right: H .650, R .833, w = σ(5(.650−1)) = .148 and 0, A^l .408/−2.041,
    # A^g (.833−.259)/.392
    numbers = ["0.650", "0.833", "0.148", "0.000", "0.408", "-2.041", "1.465"]
    assert rows["2"][0] == [*"111110", *"AAAAAb", *numbers]
    # grpo; copo: .148·.408 + .852·1.465 and 1.465; copo-paper: w = 4e-8; the group gate:
    # .148·(−2.041) + .852·1.465
    assert rows["2"][1] == ["0.408", "-2.041", "1.309", "1.465", "1.465", "1.465", "1.309", "0.946"]
    # prompt 5, six different wrong answers: nothing from GRPO, A^g = −.259/.392 from copo, next to
    # nothing from the paper's rule
    numbers = ["2.585", "0.000", ".", "0.000", ".", "0.000", "-0.662"]
    assert rows["5"][0] == [*"000000", *"bcdefg", *numbers]
    assert rows["5"][1] == [".", "0.000", ".", "-0.662", ".", "-0.000", ".", "-0.662"]
    # 40 wrong responses. copo lifts those of prompts 2 and 3 (1 + 4); copo-paper and the group gate
    # only prompt 2's
    pushed = next(line for line in text.splitlines() if line.startswith("wrong pushed up"))
    assert " ".join(pushed.split()[3:]) == "0 of 40 0.0% 5 of 40 12.5% 1 of 40 2.5% 1 of 40 2.5%"
    idle = next(line for line in text.splitlines() if line.startswith("groups |A| < 0.01"))
    assert " ".join(idle.split()[4:]) == "6 of 9 0 of 9 1 of 9 0 of 9"
    assert "GRPO gets no gradient from prompts 1, 5, 6, 7, 8, 9:" in text


def test_main_refuses_an_unknown_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        copo.main(["--nope"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--nope" in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--step", "2"], ["--plot", "lab.png", "--blend", "soft"]])
def test_main_names_the_command_of_the_advantage_lab(capsys, more):
    with pytest.raises(SystemExit) as stop:
        copo.main(["--groups", "runs/x/groups.jsonl", *more])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert "python study/lab.py RUN/groups.jsonl" in printed.err
