"""COPO, consistency-aware policy optimization (arXiv 2508.04138), as pure functions of tensors.

GRPO compares the G responses to one prompt with each other. When all of them are right, or all
wrong, this local advantage is zero and the group teaches nothing. COPO adds a global comparison,
prompt against prompt, and blends the two losses by how much the group's answers disagree (their
entropy). This file is that mathematics: no model, no tokenizer, no files.

    python copo.py        print one worked batch, every quantity in a table

Read from the top to the end of copo_loss: the pieces first, then the two functions that training
calls, compute_advantages once a step and copo_loss for every micro-batch.

Sources: "paper" is arXiv 2508.04138; "authors" is their code, hijih/copo-code, file
verl/trainer/ppo/core_algos.py.
Shapes: P prompts, G responses per prompt, B = P·G rows (row = prompt·G + response), T tokens.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

# ---------------------------------------------------------------------------- groups of responses


def consistency_entropy(classes):
    """Entropy of each group's answers in bits: classes (P,G), any labels -> H (P,), 0 .. log2 G.

    Responses without an answer share the label -1 and so are one class, like any other.
    """
    same = classes[:, :, None] == classes[:, None, :]  # (P,G,G)
    share = same.double().mean(dim=2)  # (P,G): p_ic of the class that response j belongs to
    # H_i = −Σ_c p_ic log2 p_ic = mean_j log2 1/p_i,c(j)         (paper; authors: compute_entropy)
    return torch.log2(1 / share).mean(dim=1)


def is_mixed(correct):
    """The groups that hold both verdicts: correct (P,G) bool -> (P,) bool."""
    # 0 < number of right responses < G                              (DAPO, arXiv 2503.14476, 3.2)
    return correct.any(dim=1) & ~correct.all(dim=1)


def overlong_penalty(lengths, max_new_tokens, buffer, factor):
    """Soft penalty on long responses, to add to the reward: lengths -> same shape, −factor .. 0.

    The penalty grows over the last `buffer` tokens before max_new_tokens (below 1: a share of
    max_new_tokens). ValueError if the buffer exceeds max_new_tokens or is not above 0.
    """
    buffer_tokens = buffer * max_new_tokens if buffer < 1 else buffer
    if not 0 < buffer_tokens <= max_new_tokens:
        raise ValueError(
            f"overlong buffer is {buffer}; it must be above 0 and at most {max_new_tokens} tokens"
        )
    # −factor · clip((len − (L_max − buffer)) / buffer, 0, 1)                          (DAPO, 3.4)
    excess = (lengths.double() - (max_new_tokens - buffer_tokens)) / buffer_tokens
    return -factor * excess.clamp(0, 1)


def permute_rewards(rewards, correct, seed, step):
    """The placebo: deal the step's (reward, verdict) pairs to its responses at random, both (P,G).

    The permutation depends on (seed, step) and P·G alone. Reward and verdict of a pair stay
    together; means over the step stay as they are. What is learnt in spite of it is not learnt from
    the rewards.
    """
    order = np.random.default_rng([seed, 3, step]).permutation(rewards.numel())
    order = torch.as_tensor(order, device=rewards.device)
    dealt_rewards = rewards.flatten()[order].view_as(rewards)
    dealt_correct = correct.flatten()[order].view_as(correct)
    return dealt_rewards, dealt_correct


# --------------------------------------------------------------- local advantages: within a group


def sample_variance(values):
    """Variance of each row, 0 for a row of one element: (N,K) -> (N,)."""
    centred = values - values.mean(dim=1, keepdim=True)
    return centred.square().sum(dim=1) / max(values.shape[1] - 1, 1)


def standardise(values, scale):
    """Each row minus its mean and, if scale, over its sample standard deviation: (N,K) -> (N,K).

    The result is float64. A row is exactly 0 if its values are all equal, to 1e-9, or if it has one
    element. Otherwise the division by 1e-6 would blow up the rounding of the mean; the authors'
    code gives NaN for one element.
    """
    values = values.double()
    if values.numel() == 0:
        return values
    centred = values - values.mean(dim=1, keepdim=True)
    spread = values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)
    if scale:
        std = sample_variance(values).sqrt()
        centred = centred / (std[:, None] + 1e-6)
    return torch.where(spread <= 1e-9, 0.0, centred)


def group_advantage(rewards, correct, scale):
    # A^l_ij = (r_ij − mean_j r_ij) / (std_j r_ij + 1e-6)          (GRPO, arXiv 2402.03300, 4.1.2)
    return standardise(rewards, scale)


def batch_advantage(rewards, correct, scale):
    # A^l_ij = (r_ij − mean r) / (std r + 1e-6), over all B rewards    (REINFORCE with a baseline)
    return standardise(rewards.reshape(1, -1), scale).reshape(rewards.shape)


def ngrpo_advantage(rewards, correct, scale):
    # As group, over r_i1 .. r_iG and a virtual reward of 1, so that
    # A^l_ij = −1/√(G+1) in a group that is all wrong                    (NGRPO, arXiv 2509.18851)
    virtual = torch.ones_like(rewards[:, :1])
    return standardise(torch.cat([rewards, virtual], dim=1), scale)[:, :-1]


def sign_advantage(rewards, correct, scale):
    # A^l_ij = 2 v_ij − 1                                                      (arXiv 2605.07689)
    return 2 * correct.double() - 1


def w_reinforce_advantage(rewards, correct, scale):
    # A^l_ij = 0.1 v_ij − (1 − v_ij): wrong responses weigh most   (W-REINFORCE, arXiv 2506.01347)
    verdicts = correct.double()
    return 0.1 * verdicts - (1 - verdicts)


def ebpo_advantage(rewards, correct, scale):
    rewards = rewards.double()
    group_means = rewards.mean(dim=1)
    # S = (s²/G) / (s²/G + τ²): s² the mean variance within a group, τ² the variance of the means
    within = sample_variance(rewards).mean() / rewards.shape[1]
    between = sample_variance(group_means[None, :])[0]
    total = within + between
    shrinkage = torch.where(total > 0, within / total, 0.0)
    # A^l_ij = r_ij − [(1 − S) mean_j r_ij + S mean r], then over its std in the step
    #                                    (EBPO, arXiv 2602.05165; s², τ² there: running statistics)
    baseline = (1 - shrinkage) * group_means + shrinkage * rewards.mean()
    return batch_advantage(rewards - baseline[:, None], correct, scale)


# Each function takes rewards (P,G), correct (P,G) and scale, and returns A^l (P,G). To add one,
# write it and enter it here: --advantage and the advantage lab read this table.
ADVANTAGES = {
    "group": group_advantage,
    "batch": batch_advantage,
    "ngrpo": ngrpo_advantage,
    "sign": sign_advantage,
    "w-reinforce": w_reinforce_advantage,
    "ebpo": ebpo_advantage,
}
# Those that look at the verdict alone: neither rewards nor scale change them.
VERDICT_ADVANTAGES = ("sign", "w-reinforce")


def local_advantages(rewards, kind="group", scale=True, correct=None):
    """Advantage of each response over its peers: rewards (P,G) -> A^l (P,G) float64.

    scale=False: no division by the standard deviation (Dr. GRPO). correct (P,G) bool: verdicts, for
    kinds that ask for them (default: the responses with a reward above 0).
    """
    advantage = choose(ADVANTAGES, kind, "advantage")
    correct = rewards > 0 if correct is None else correct
    return advantage(rewards, correct, scale)


# ------------------------------------------------------- global advantages: prompt against prompt


def global_rewards(correct, entropy, consistency_coef=False):
    """Reward of each prompt: verdicts (P,G), 0/1 or bool, and H (P,) -> R (P,) float64."""
    # R_i = mean_j v_ij                                            (authors: compute_score_global)
    accuracy = correct.double().mean(dim=1)
    group_size = correct.shape[1]
    if not consistency_coef or group_size == 1:  # one response agrees with itself; λ would be 0/0
        return accuracy
    # λ = (1 − 1/G) / log2 G: G different answers leave 1/G of R     (paper; authors: reward_coef)
    coefficient = (1 - 1 / group_size) / math.log2(group_size)
    # R_i = mean_j v_ij · (1 − λ H_i)
    return accuracy * (1 - coefficient * entropy.double())


def global_advantages(global_rewards, scale=True):
    """Advantage of each prompt over all prompts of the step: R (P,) -> A^g (P,) float64."""
    # A^g_i = (R_i − mean_i R_i) / (std_i R_i + 1e-6)                    (paper, global advantage)
    return standardise(global_rewards[None, :], scale)[0]


# -------------------------------------------------------------- the weight between the two losses


# Gates, verdicts (P,G) bool -> (P,G) bool: true where the local loss may count, false where only
# the global one does.


def every_response(correct):
    return torch.ones_like(correct)


def no_response(correct):
    return torch.zeros_like(correct)


def correct_response(correct):  # 1[response j is right]
    return correct


def solved_group(correct):  # 1[some response of the group is right]
    return correct.any(dim=1, keepdim=True).expand_as(correct)


def mixed_group(correct):  # 1[the group has both verdicts]
    return is_mixed(correct)[:, None].expand_as(correct)


class Blend(NamedTuple):
    """A rule for the weight w of the local loss: the gate, times σ(γ(H − ρ)) if uses_entropy.

    gate takes the verdicts (P,G) and returns a factor for each response (P,G). The authors test
    reward ≠ 0, or A^l ≠ 0, instead; with rewards of ±1, or with a penalty on length, that no longer
    asks which response is right.
    """

    uses_entropy: bool
    gate: Callable

    def has_local_term(self):
        return self.gate is not no_response

    def has_global_term(self):
        return self.uses_entropy or self.gate is not every_response


# To add a rule, enter it here: --blend and the advantage lab read this table.
BLENDS = {
    "soft-zero": Blend(uses_entropy=True, gate=correct_response),  # authors: soft-with-zero
    "soft": Blend(uses_entropy=True, gate=every_response),  # paper's equations; authors: only-soft
    "soft-zero-group": Blend(uses_entropy=True, gate=solved_group),  # ours
    "soft-forced": Blend(uses_entropy=True, gate=mixed_group),  # authors: soft-with-forced
    "zero": Blend(uses_entropy=False, gate=correct_response),  # authors: only-zero
    "zero-group": Blend(uses_entropy=False, gate=solved_group),  # ours
    "forced": Blend(uses_entropy=False, gate=mixed_group),  # authors: only-forced
    "global": Blend(uses_entropy=False, gate=no_response),  # authors: only-global
    "local": Blend(uses_entropy=False, gate=every_response),  # GRPO; authors: no-global
}


def local_weight(entropy, correct, local_adv, blend, gamma, rho):
    """Weight of the local loss, (P,G); the global loss gets 1 − w.

    entropy (P,), correct (P,G) bool; blend is a name of the table BLENDS; local_adv (P,G) gives
    only the dtype and the device.
    """
    rule = choose(BLENDS, blend, "blend")
    # without entropy: w_ij = gate_ij
    weight = rule.gate(correct).to(local_adv)
    if rule.uses_entropy:
        # with entropy: w_ij = gate_ij · σ(γ (H_i − ρ)): it counts where a group's answers disagree
        #                                                (paper, soft blending; authors: only-soft)
        trust = torch.sigmoid(gamma * (entropy.to(local_adv) - rho))
        weight = weight * trust[:, None]
    return weight


def effective_advantages(local_adv, global_adv, weight, global_coef=1.0):
    """Factor of a response's policy gradient at q = 1: (P,G), (P,), (P,G) -> (P,G)."""
    # A_ij = w_ij A^l_ij + coef (1 − w_ij) A^g_i
    return weight * local_adv + global_coef * (1 - weight) * global_adv[:, None]


# ---------------------------------------------------------------------- losses of a token, and KL


def clamped_difference(logprobs, old_logprobs):
    """logprobs − old_logprobs within ±20, where exp() of it is finite in float32: (B,T)."""
    return (logprobs - old_logprobs).clamp(-20, 20)


def token_log_ratio(logprobs, old_logprobs, mask):
    # log q_bt = clamp(logp_bt − old_logp_bt, ±20)                                     (PPO, GRPO)
    return clamped_difference(logprobs, old_logprobs)


def sequence_log_ratio(logprobs, old_logprobs, mask):
    # log q_bt = clamp(1/|o_b| Σ_t (logp_bt − old_logp_bt), ±20), one for all tokens of row b
    #                                                                    (GSPO, arXiv 2507.18071)
    difference = torch.where(mask, logprobs - old_logprobs, 0.0)
    lengths = mask.sum(dim=1, keepdim=True)
    log_ratio = difference.sum(dim=1, keepdim=True) / lengths.clamp(min=1)
    return log_ratio.clamp(-20, 20).expand_as(logprobs)


# Each function takes logprobs, old_logprobs, mask (B,T) and returns log q (B,T). To add one, enter
# it here: --ratio and the lab read this table.
RATIOS = {"token": token_log_ratio, "sequence": sequence_log_ratio}


def clipped_loss(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip):
    """PPO's clipped loss of each token: (B,T), (B,T), advantages (B,) or (B,T) -> (B,T).

    clip_low and clip_high are ε below and above 1; dual_clip is c, 0 for none.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.to(logprobs)
    # q = exp(clamp(logp − old_logp, ±20))
    ratio = clamped_difference(logprobs, old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    # ℓ(A) = −min(q·A, clip(q, 1−ε_low, 1+ε_high)·A)    (PPO, 1707.06347, eq. 7; two ε: DAPO, 3.1)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if dual_clip:
        # where A < 0: ℓ = min(ℓ, −c·A), since q is unbounded there  (dual clip, arXiv 1912.09729)
        bounded = torch.minimum(loss, -dual_clip * advantages)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss


def k3(distance):
    """Unbiased estimate of KL(π‖ref), never negative: d = ref − logp (B,T) -> (B,T).

    Exact for small d too, in float32.
    """
    # k3 = e^d − 1 − d                                                               (GRPO, eq. 4)
    return torch.expm1(distance) - distance  # expm1 is exact for small d, where e^d − 1 is not


def k2(distance):
    """Biased estimate of KL(π‖ref) whose gradient, on policy, is unbiased: d (B,T) -> (B,T)."""
    # k2 = d²/2                                   (J. Schulman, Approximating KL divergence, 2020)
    return distance.square() / 2


# To add an estimator, enter it here: --kl-estimator reads this table.
KL_ESTIMATORS = {"k3": k3, "k2": k2}

AGGREGATIONS = (
    "seq-mean-token-mean",
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def aggregate(token_loss, mask, mode, max_tokens=None, num_tokens=None, num_sequences=None):
    """Loss of an optimiser update from its token losses: token_loss (B,T), mask (B,T) -> scalar.

    This micro-batch's numerator over the whole update's denominator: num_tokens and num_sequences
    count the update on all ranks, so that shares of micro-batches and ranks are summed, never
    averaged. Counts left out are those of this tensor. max_tokens is the response limit of the run.

    mask is bool or 0/1; what stands outside it, NaN included, counts for nothing. A row without a
    token is no sequence; a micro-batch without one gives 0, and so does such an update. ValueError
    if mode is none of AGGREGATIONS.
    """
    mask = mask.bool()
    token_loss = torch.where(mask, token_loss, 0.0)  # not a product: NaN · 0 is NaN
    lengths = mask.sum(dim=1)
    if num_tokens is None:
        num_tokens = lengths.sum()
    if num_sequences is None:
        num_sequences = (lengths > 0).sum()
    like = {"dtype": token_loss.dtype, "device": token_loss.device}
    num_tokens = torch.as_tensor(num_tokens, **like).clamp(min=1)
    num_sequences = torch.as_tensor(num_sequences, **like).clamp(min=1)
    if mode == "seq-mean-token-mean":
        # L = 1/N Σ_b 1/|o_b| Σ_t ℓ_bt                                         (GRPO, eq. 3; COPO)
        sequence_means = token_loss.sum(dim=1) / lengths.clamp(min=1)
        return sequence_means.sum() / num_sequences
    if mode == "token-mean":
        # L = 1/Σ_b|o_b| Σ_b Σ_t ℓ_bt                                                  (DAPO, 3.3)
        return token_loss.sum() / num_tokens
    if mode == "seq-mean-token-sum":
        # L = 1/N Σ_b Σ_t ℓ_bt                                                         (REINFORCE)
        return token_loss.sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        if not max_tokens:
            raise ValueError(f"aggregation {mode} needs max_tokens, the response limit of the run")
        # L = 1/N Σ_b 1/L_max Σ_t ℓ_bt                                      (Dr. GRPO, 2503.20783)
        # The authors leave out 1/N and divide by the padded length.
        return token_loss.sum() / (num_sequences * max_tokens)
    raise ValueError(f"aggregation is '{mode}'; it must be one of {', '.join(AGGREGATIONS)}")


# ---------------------------------------------------------------------------- the whole algorithm


def choose(table, name, what):
    """Look a name up in one of the tables above. An unknown name raises ValueError."""
    if name not in table:
        raise ValueError(f"{what} is '{name}'; it must be one of {', '.join(table)}")
    return table[name]


def option(default, help, *, choices=None, interval=None):
    """A field of Algorithm, and so a flag of train.py; interval "(0, 1]": above 0, at most 1."""
    return field(default=default, metadata={"help": help, "choices": choices, "interval": interval})


@dataclass(frozen=True)
class Algorithm:
    """What makes one algorithm differ from another; the defaults are COPO. Each field is a flag."""

    blend: str = option("soft-zero", "rule for w, the weight of the local loss", choices=BLENDS)
    gamma: float = option(5.0, "γ, steepness of w in the entropy, per bit", interval="[0, inf)")
    rho: float = option(1.0, "ρ, entropy at which w is one half, in bits", interval="(-inf, inf)")
    advantage: str = option("group", "rule for A^l, the local advantage", choices=ADVANTAGES)
    scale_advantages: bool = option(True, "divide advantages by their standard deviation")
    global_coef: float = option(
        1.0, "factor of the global loss (0 = disabled)", interval="[0, inf)"
    )
    consistency_coef: bool = option(False, "lower the global reward of groups that disagree")
    ratio: str = option("token", "q of each token, or one q per response (GSPO)", choices=RATIOS)
    clip_low: float = option(0.2, "ε below 1", interval="(0, 1]")
    clip_high: float = option(0.2, "ε above 1", interval="(0, inf)")
    dual_clip: float = option(
        3.0, "c, bound on the loss where A < 0, above 1 (0 = disabled)", interval="[0, inf)"
    )
    aggregation: str = option(
        "seq-mean-token-mean", "from token losses to one number", choices=AGGREGATIONS
    )
    kl_coef: float = option(
        0.0, "β of the KL to the initial model, in the loss (0 = disabled)", interval="[0, inf)"
    )
    kl_estimator: str = option("k3", "estimator of the KL", choices=KL_ESTIMATORS)
    dynamic_sampling: bool = option(False, "replace groups that are all right or all wrong")
    overlong_factor: float = option(
        0.0, "size of the penalty on length (0 = disabled)", interval="[0, inf)"
    )
    overlong_buffer: float = option(
        0.2,
        "tokens over which the penalty grows; below 1: a share of the limit",
        interval="(0, inf)",
    )


PRESETS = {
    # the authors' release script
    "copo": Algorithm(),
    # the bare equations, with the values that the paper is reported to find best
    "copo-paper": Algorithm(blend="soft", gamma=20.0, rho=1.5),
    # ours: the paper's rule as its public reviews seem to describe it
    "copo-group": Algorithm(blend="soft-zero-group"),
    # GRPO in mixed groups, the global advantage where all verdicts are equal
    "copo-forced": Algorithm(blend="forced"),
    # arXiv 2402.03300, without its KL term
    "grpo": Algorithm(blend="local"),
    # arXiv 2503.20783
    "dr-grpo": Algorithm(
        blend="local", scale_advantages=False, aggregation="seq-mean-token-sum-norm"
    ),
    # arXiv 2503.14476
    "dapo": Algorithm(
        blend="local",
        clip_high=0.28,
        aggregation="token-mean",
        dynamic_sampling=True,
        overlong_factor=1.0,
    ),
}


def check_algorithm(algorithm):
    """Refuse fields that cannot work together: ValueError, one line that names their flags."""
    name = algorithm.advantage
    if name not in VERDICT_ADVANTAGES:
        return
    if algorithm.overlong_factor:
        raise ValueError(
            f"--advantage {name} looks at verdicts alone: --overlong-factor must be 0, not "
            f"{algorithm.overlong_factor:g}"
        )
    if not algorithm.scale_advantages:
        raise ValueError(
            f"--advantage {name} is never divided by a standard deviation: use --scale-advantages"
        )


class RowAdvantages(NamedTuple):
    """What copo_loss needs of each row of a micro-batch, all (B,)."""

    local_adv: torch.Tensor
    global_adv: torch.Tensor
    weight: torch.Tensor


class Advantages(NamedTuple):
    """What all updates of a step share, float64: computed once, before the first of them."""

    rewards: torch.Tensor  # (P,G), with the penalty on length
    entropy: torch.Tensor  # (P,) H, in bits
    global_rewards: torch.Tensor  # (P,) R
    local_adv: torch.Tensor  # (P,G) A^l
    global_adv: torch.Tensor  # (P,) A^g
    weight: torch.Tensor  # (P,G) w
    effective: torch.Tensor  # (P,G) A = w A^l + coef (1 − w) A^g

    def rows(self, index):
        """The rows `index` (B,) of the step, numbered prompt·G + response."""
        group_size = self.local_adv.shape[1]
        return RowAdvantages(
            self.local_adv.flatten()[index],
            self.global_adv.repeat_interleave(group_size)[index],
            self.weight.flatten()[index],
        )


def compute_advantages(rewards, correct, classes, lengths, algorithm, max_new_tokens):
    """Advantages and weights of a whole step, over the prompts of all ranks -> Advantages.

    rewards (P,G) as graded, correct (P,G) bool, classes (P,G) answer classes, lengths (P,G) in
    tokens. Only the penalty on length uses lengths and max_new_tokens; both may be None without it.
    """
    rewards = rewards.double()
    if algorithm.overlong_factor:
        rewards = rewards + overlong_penalty(
            lengths, max_new_tokens, algorithm.overlong_buffer, algorithm.overlong_factor
        )
    entropy = consistency_entropy(classes)
    scale = algorithm.scale_advantages
    local_adv = local_advantages(rewards, algorithm.advantage, scale, correct)
    prompt_rewards = global_rewards(correct, entropy, algorithm.consistency_coef)
    global_adv = global_advantages(prompt_rewards, scale)
    weight = local_weight(
        entropy, correct, local_adv, algorithm.blend, algorithm.gamma, algorithm.rho
    )
    effective = effective_advantages(local_adv, global_adv, weight, algorithm.global_coef)
    return Advantages(rewards, entropy, prompt_rewards, local_adv, global_adv, weight, effective)


def copo_loss(
    logprobs,
    old_logprobs,
    mask,
    advantages,
    algorithm,
    *,
    max_tokens=None,
    num_tokens=None,
    num_sequences=None,
    ref_logprobs=None,
):
    """COPO's loss for one micro-batch -> (loss, {metric: (sum, count)}).

    logprobs, old_logprobs, mask, ref_logprobs (B,T); advantages: the RowAdvantages of these B rows.
    Only logprobs gets a gradient. max_tokens and the two counts are those of aggregate(). Add the
    metrics' sums and counts over all micro-batches and ranks, then divide.
    """
    if algorithm.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {algorithm.kl_coef} but there are no reference log-probs")
    mask = mask.bool()
    # Beyond a response's end may be anything, NaN included: zero it before the first subtraction.
    logprobs = torch.where(mask, logprobs, 0.0)
    old_logprobs = torch.where(mask, old_logprobs.detach().to(logprobs), 0.0)
    local_adv = advantages.local_adv.detach().to(logprobs)[:, None]
    global_adv = advantages.global_adv.detach().to(logprobs)[:, None]
    weight = advantages.weight.detach().to(logprobs)[:, None]
    global_weight = algorithm.global_coef * (1 - weight)
    clips = (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip)
    log_ratio = choose(RATIOS, algorithm.ratio, "ratio")(logprobs, old_logprobs, mask)
    zero = torch.zeros_like(log_ratio)  # clipped_loss subtracts old log-probs: log q has none left
    local_loss = clipped_loss(log_ratio, zero, local_adv, *clips)
    global_loss = clipped_loss(log_ratio, zero, global_adv, *clips)
    # ℓ_COPO = w·ℓ(A^l) + coef·(1 − w)·ℓ(A^g)                               (authors: policy_loss)
    # The losses are blended, not the advantages: each is clipped by its own advantage's sign.
    token_loss = weight * local_loss + global_weight * global_loss
    if ref_logprobs is not None:
        ref_logprobs = torch.where(mask, ref_logprobs.detach().to(logprobs), 0.0)
        estimator = choose(KL_ESTIMATORS, algorithm.kl_estimator, "KL estimator")
        # ℓ = ℓ_COPO + β·k(d), d = clamp(ref − logp, ±20)                            (GRPO, eq. 3)
        kl = estimator(clamped_difference(ref_logprobs, logprobs))
        token_loss = token_loss + algorithm.kl_coef * kl
    loss = aggregate(token_loss, mask, algorithm.aggregation, max_tokens, num_tokens, num_sequences)
    with torch.no_grad():
        ratio = log_ratio.exp()
        # KL(old ‖ new), of the update itself: between the tokens' distributions, whatever q is
        token_kl = k3(clamped_difference(logprobs, old_logprobs))
        metrics = {
            "ratio": sum_and_count(ratio, mask),
            "approx_kl": sum_and_count(token_kl, mask),
            # A token is clipped if its loss differs from −q·A: its gradient is then zero.
            "clip_fraction_local": sum_and_count(local_loss != -(ratio * local_adv), mask),
            "clip_fraction_global": sum_and_count(global_loss != -(ratio * global_adv), mask),
            "local_share": local_share(weight * local_adv, global_weight * global_adv, mask),
        }
        if ref_logprobs is not None:
            metrics["kl"] = sum_and_count(kl, mask)
    return loss, metrics


def sum_and_count(values, mask):
    """Sum of values (B,T) where mask, and their number, in float64."""
    total = torch.where(mask, values.double(), 0.0).sum()
    return total, mask.sum().double()


def local_share(local_term, global_term, mask):
    """The local loss's share of the gradient: two (B,1) and mask (B,T) -> (sum, count)."""
    size = local_term.abs() + global_term.abs()
    # |w A^l| / (|w A^l| + |coef (1−w) A^g|); where both are 0 there is no gradient to share out
    share = torch.where(size > 0, local_term.abs() / size, 0.0)
    return sum_and_count(share, mask & (size > 0))


# ------------------------------------------------------------------------------- the worked batch

# One string a prompt, one letter a response: A is right, - is no answer.
ANSWERS = (
    "AAAAAA",
    "AAAAAb",
    "AAbbcd",
    "Abcdef",
    "bcdefg",
    "bbbccd",
    "bbbbbb",
    "------",
    "bbbb--",
)


def print_worked_batch():
    classes = torch.tensor([[ord(answer) for answer in row] for row in ANSWERS])  # any labels do
    correct = classes == ord("A")
    results = {}
    for name in ("grpo", "copo", "copo-paper", "copo-group"):
        results[name] = compute_advantages(correct, correct, classes, None, PRESETS[name], None)
    print_quantities(correct, results["copo"])
    print_effective_advantages(correct, results)
    equal = (~is_mixed(correct)).nonzero()[:, 0] + 1
    prompts = ", ".join(str(prompt) for prompt in equal.tolist())
    print(f"\nGRPO gets no gradient from prompts {prompts}: all right or all wrong, so A^l = 0.")


LEGEND = """\
One batch: 9 prompts, 6 responses each. Answer A is right, other letters are wrong, - is no answer.
Of two figures the first is for the right responses, the second for the wrong; w is that of copo.

prompt  rewards      answers           H      R          w               A^l          A^g"""


def print_quantities(correct, result):
    print(LEGEND)
    for i, answers in enumerate(ANSWERS):
        verdicts = " ".join(str(verdict) for verdict in correct[i].int().tolist())
        cells = [
            f"{i + 1:<8}{verdicts}",
            " ".join(answers),
            f"{result.entropy[i]:6.3f} {result.global_rewards[i]:6.3f}",
            right_and_wrong(result.weight[i], correct[i]),
            right_and_wrong(result.local_adv[i], correct[i]),
            f"{result.global_adv[i]:7.3f}",
        ]
        print("  ".join(cells))
    mean = result.global_rewards.mean()
    std = result.global_rewards.std()
    print(f"\nR over the prompts: mean {mean:.3f}, standard deviation {std:.3f}")


def print_effective_advantages(correct, results):
    print("\nEffective advantage w A^l + (1 - w) A^g of the right and of the wrong responses\n")
    print_table_row("prompt", results)
    for i in range(len(correct)):
        cells = [right_and_wrong(result.effective[i], correct[i]) for result in results.values()]
        print_table_row(i + 1, cells)
    num_wrong = int((~correct).sum())
    pushed_up = []
    idle = []
    for result in results.values():
        pushed = int((result.effective[~correct] > 0).sum())
        pushed_up.append(f"{pushed} of {num_wrong} {pushed / num_wrong:5.1%}")
        largest = result.effective.abs().amax(dim=1)
        idle.append(f"{int((largest < 0.01).sum())} of {len(correct)}")
    print_table_row("wrong pushed up", pushed_up)
    print_table_row("groups |A| < 0.01", idle)


def print_table_row(title, cells):
    print(f"{title:<19}" + "".join(f"{cell:>19}" for cell in cells))


def right_and_wrong(values, correct):
    """A table cell from a row of values (G,): a right and a wrong response's, "." for none."""
    cells = ""
    for chosen in (values[correct], values[~correct]):
        number = f"{chosen[0]:.3f}" if len(chosen) else "."
        cells += f"{number:>8}"
    return cells[1:]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print one worked batch, every quantity.")
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        print(
            f"copo.py: unrecognized arguments: {' '.join(unknown)} (a run's groups are read by "
            "python study/lab.py RUN/groups.jsonl)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    print_worked_batch()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
