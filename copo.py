"""COPO, consistency-aware policy optimization (arXiv 2508.04138), as pure functions of tensors.

GRPO compares the G responses to one prompt with each other. When all of them are right, or all wrong, that local
advantage is zero and the whole group is wasted. COPO adds a second, global comparison, prompt against prompt, and
blends the two losses by how much the group's answers disagree (their entropy). This file holds all of that mathematics
and nothing else: no model, no tokenizer, no configuration object, no input or output outside main().

    python copo.py                                  one worked batch, every quantity in a table
    python copo.py --groups RUN/groups.jsonl        what each preset and blend would have made of a run's groups

Sources: "paper" is arXiv 2508.04138; "authors" is their code, hijih/copo-code, verl/trainer/ppo/core_algos.py.
Shapes: P prompts, G responses per prompt, B = P·G rows (row = prompt·G + response), T response tokens.
"""

import argparse
import json
import math
import sys

import torch

BLENDS = ("soft-zero", "soft", "soft-zero-group", "soft-forced", "zero", "zero-group", "forced", "global", "local")
ADVANTAGES = ("group", "batch", "ngrpo")
AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")

# Keys are train.py's flags. Every preset lists every key, so that reading one row tells the whole algorithm.
_COPO = {
    "blend": "soft-zero", "gamma": 5.0, "rho": 1.0, "advantage": "group", "scale_advantages": True,
    "global_coef": 1.0, "consistency_coef": False, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0,
    "aggregation": "seq-mean-token-mean", "kl_coef": 0.0, "dynamic_sampling": False,
    "overlong_factor": 0.0, "overlong_buffer": 0.2,
}  # fmt: skip
PRESETS = {
    "copo": _COPO,  # the authors' release script
    "copo-paper": {**_COPO, "blend": "soft", "gamma": 20.0, "rho": 1.5},  # the rule and values as the paper has them
    "grpo": {**_COPO, "blend": "local"},  # arXiv 2402.03300, without its KL term
    "dr-grpo": {**_COPO, "blend": "local", "scale_advantages": False, "aggregation": "seq-mean-token-sum-norm"},
    "dapo": {**_COPO, "blend": "local", "clip_high": 0.28, "aggregation": "token-mean", "dynamic_sampling": True,
             "overlong_factor": 1.0},
}  # fmt: skip


# ---------------------------------------------------------------------------------- rewards, entropy, advantages


def consistency_entropy(classes):
    """Entropy in bits of a group's answers: classes (P,G) integers, any labels -> H (P,) float64, 0 .. log2 G."""
    same = classes[:, :, None] == classes[:, None, :]  # (P,G,G)
    share = same.double().mean(dim=2)  # (P,G): p_ic of the class that response j belongs to
    # H_i = −Σ_c p_ic log2 p_ic = mean_j log2 1/p_i,c(j)        (paper, consistency entropy; authors: compute_entropy)
    return torch.log2(1 / share).mean(dim=1)


def _normalise(values, scale):
    """Each row of values (N,K) minus its mean, over its sample standard deviation if scale; float64.

    A row whose values are all equal, or that has one element, is exactly 0: rounding in the mean would otherwise be
    blown up by the division by 1e-6, and one element has no standard deviation (the authors' code gives NaN).
    """
    values = values.double()
    if values.numel() == 0:
        return values
    centred = values - values.mean(dim=1, keepdim=True)
    spread = values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)
    if scale:
        std = (centred.square().sum(dim=1, keepdim=True) / max(values.shape[1] - 1, 1)).sqrt()
        centred = centred / (std + 1e-6)
    return torch.where(spread <= 1e-9, 0.0, centred)


def local_advantages(rewards, kind="group", scale=True):
    """Advantage of each response over its peers: rewards (P,G) -> A^l (P,G) float64. scale=False: no std (Dr. GRPO)."""
    if kind == "group":
        # A^l_ij = (r_ij − mean_j r_ij) / (std_j r_ij + 1e-6)                      (GRPO, arXiv 2402.03300, 4.1.2)
        return _normalise(rewards, scale)
    if kind == "batch":
        # A^l_ij = (r_ij − mean r) / (std r + 1e-6) over the step's B rewards          (REINFORCE with a baseline)
        return _normalise(rewards.reshape(1, -1), scale).reshape(rewards.shape)
    if kind == "ngrpo":
        # as "group", over r_i1 .. r_iG and a virtual 1; all wrong: A^l_ij = −1/√(G+1)     (NGRPO, arXiv 2509.18851)
        virtual = torch.ones_like(rewards[:, :1])
        return _normalise(torch.cat([rewards, virtual], dim=1), scale)[:, :-1]
    raise ValueError(f"advantage is '{kind}'; it must be one of {', '.join(ADVANTAGES)}")


def global_rewards(rewards, entropy, consistency_coef=False):
    """Reward of each prompt: its verdicts v (P,G), 0/1 or bool, without penalties, and H (P,) -> R (P,) float64."""
    # R_i = mean_j v_ij                                             (authors: compute_score_global)
    accuracy = rewards.double().mean(dim=1)
    group_size = rewards.shape[1]
    if not consistency_coef or group_size == 1:  # one response agrees with itself, and λ would be 0/0
        return accuracy
    # λ = (1 − 1/G) / log2 G, so that G different answers leave 1/G of R   (paper, global reward; authors: reward_coef)
    coefficient = (1 - 1 / group_size) / math.log2(group_size)
    # R_i = mean_j v_ij · (1 − λ H_i)
    return accuracy * (1 - coefficient * entropy.double())


def global_advantages(global_rewards, scale=True):
    """Advantage of each prompt over the other prompts of the step, on all ranks: R (P,) -> A^g (P,) float64."""
    # A^g_i = (R_i − mean_i R_i) / (std_i R_i + 1e-6)                              (paper, global advantage)
    return _normalise(global_rewards[None, :], scale)[0]


def local_weight(entropy, correct, local_adv, blend, gamma, rho):
    """Weight w of the local loss; 1 − w goes to the global loss.

    entropy (P,), correct (P,G) bool, local_adv (P,G) (gives the shape and type only) -> w (P,G).
    Gates ask for the verdict. The authors ask whether a reward, or A^l, is 0: with rewards of ±1 or with a penalty
    for length that question has another answer, and the gate is silently gone.
    """
    if blend not in BLENDS:
        raise ValueError(f"blend is '{blend}'; it must be one of {', '.join(BLENDS)}")
    weight = torch.full_like(local_adv, blend != "global")  # 1 for "local", GRPO  (authors: no global; only global)
    if blend.startswith("soft"):
        # w_i = σ(γ (H_i − ρ)): trust the group where it disagrees       (paper, soft blending; authors: only soft)
        weight = weight * torch.sigmoid(gamma * (entropy.to(weight) - rho))[:, None]
    if blend in ("soft-zero", "zero"):
        # · 1[response j is right]                                      (authors: soft with zero, only zero)
        weight = weight * correct
    if blend in ("soft-zero-group", "zero-group"):
        # · 1[some response of the group is right]                      (ours: right and wrong keep their order)
        weight = weight * correct.any(dim=1, keepdim=True)
    if blend in ("soft-forced", "forced"):
        # · 1[the group has both verdicts]                              (authors: soft with forced, only forced)
        weight = weight * is_mixed(correct)[:, None]
    return weight


def effective_advantages(local_adv, global_adv, weight, global_coef=1.0):
    """What a response's log-probability is multiplied by at q = 1: (P,G), (P,), (P,G) -> (P,G)."""
    # A_ij = w_ij A^l_ij + coef (1 − w_ij) A^g_i         (the gradient of the blended losses at q = 1, before clipping)
    return weight * local_adv + global_coef * (1 - weight) * global_adv[:, None]


def is_mixed(correct):
    """The groups that dynamic sampling keeps: correct (P,G) -> (P,) bool."""
    # 0 < #right < G                                                                (DAPO, arXiv 2503.14476, 3.2)
    return correct.any(dim=1) & ~correct.all(dim=1)


def overlong_penalty(lengths, max_tokens, buffer, factor):
    """Soft penalty for length (DAPO, 3.4), to be added to the reward: lengths, any shape -> same shape, −factor .. 0.

    buffer: tokens before max_tokens over which the penalty grows; below 1 it is a fraction of max_tokens.
    """
    buffer_tokens = buffer * max_tokens if buffer < 1 else buffer
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"overlong buffer is {buffer}; it must be above 0 and at most {max_tokens} tokens")
    # −factor · clip((len − (L_max − buffer)) / buffer, 0, 1)
    excess = (lengths.double() - (max_tokens - buffer_tokens)) / buffer_tokens
    return -factor * excess.clamp(0, 1)


# ---------------------------------------------------------------------------------- the loss


def clipped_loss(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip):
    """PPO's clipped loss per token: (B,T), (B,T), advantages (B,) or (B,T) -> (B,T). dual_clip 0: off."""
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).to(logprobs)
    # q = exp(clamp(logp − old_logp, ±20))
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    # ℓ(A) = −min(q·A, clip(q, 1−ε_low, 1+ε_high)·A)             (PPO, arXiv 1707.06347, eq. 7; two ε: DAPO, 3.1)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        # where A < 0: ℓ = min(ℓ, −c·A), since q is unbounded there                   (dual clip, arXiv 1912.09729)
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def aggregate(token_loss, mask, mode, max_tokens=None, num_tokens=None, num_sequences=None):
    """Loss of an optimiser update from its token losses: token_loss (B,T), mask (B,T) -> scalar.

    This micro-batch's numerator over the update's denominator: num_tokens and num_sequences count the whole update on
    all ranks, so the shares of micro-batches and ranks are summed, never averaged. Counts left out are those of this
    tensor; rows without a token (an empty micro-batch) are no sequences. max_tokens is the response limit of the run.
    """
    mask = mask.bool()
    token_loss = torch.where(mask, token_loss, 0.0)  # not a product: NaN · 0 is NaN
    lengths = mask.sum(dim=1)
    num_tokens = lengths.sum() if num_tokens is None else num_tokens
    num_sequences = (lengths > 0).sum() if num_sequences is None else num_sequences
    num_tokens, num_sequences = (torch.as_tensor(n).to(token_loss).clamp(min=1) for n in (num_tokens, num_sequences))
    if mode == "seq-mean-token-mean":
        # L = 1/N Σ_b 1/|o_b| Σ_t ℓ_bt                                                   (GRPO, eq. 3; COPO)
        return (token_loss.sum(dim=1) / lengths.clamp(min=1)).sum() / num_sequences
    if mode == "token-mean":
        # L = 1/Σ_b|o_b| Σ_b Σ_t ℓ_bt                                                    (DAPO, 3.3)
        return token_loss.sum() / num_tokens
    if mode == "seq-mean-token-sum":
        # L = 1/N Σ_b Σ_t ℓ_bt                                                           (REINFORCE)
        return token_loss.sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        if not max_tokens:
            raise ValueError("aggregation seq-mean-token-sum-norm needs max_tokens, the response limit of the run")
        # L = 1/N Σ_b 1/L_max Σ_t ℓ_bt        (Dr. GRPO, arXiv 2503.20783; the authors leave out 1/N, take the padded T)
        return token_loss.sum() / (num_sequences * max_tokens)
    raise ValueError(f"aggregation is '{mode}'; it must be one of {', '.join(AGGREGATIONS)}")


def _sum_and_count(values, mask):
    """Sum of values (B,T) where mask, and how many; float64, so that the order of micro-batches does not show."""
    return torch.where(mask, values.double(), 0.0).sum(), mask.sum().double()


def copo_loss(
    logprobs, old_logprobs, mask, local_adv, global_adv, weight, *,
    global_coef=1.0, clip_low=0.2, clip_high=0.2, dual_clip=3.0, aggregation="seq-mean-token-mean",
    max_tokens=None, num_tokens=None, num_sequences=None, ref_logprobs=None, kl_coef=0.0,
):  # fmt: skip
    """COPO's loss for one micro-batch, and its metrics as name -> (sum, count), to be summed before they are divided.

    logprobs, old_logprobs, mask, ref_logprobs (B,T); local_adv, global_adv, weight (B,). Only logprobs gets a gradient.
    """
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef} but there are no reference log-probs")
    mask = mask.bool()
    # What lies beyond a response's end may be anything, NaN included: it must be gone before the first subtraction.
    logprobs, old_logprobs = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs.detach().to(logprobs)))
    local_adv, global_adv, weight = (x.detach().to(logprobs)[:, None] for x in (local_adv, global_adv, weight))
    local_loss = clipped_loss(logprobs, old_logprobs, local_adv, clip_low, clip_high, dual_clip)
    global_loss = clipped_loss(logprobs, old_logprobs, global_adv, clip_low, clip_high, dual_clip)
    # ℓ_COPO = w·ℓ(A^l) + coef·(1 − w)·ℓ(A^g): losses are blended, since each is clipped by its own advantage's sign
    token_loss = weight * local_loss + global_coef * (1 - weight) * global_loss      # (authors: policy_loss)
    if ref_logprobs is not None:
        # k3 = expm1(d) − d, d = clamp(ref − logp, ±20)                 (GRPO, eq. 4; expm1 keeps small d exact)
        distance = (torch.where(mask, ref_logprobs.detach().to(logprobs), 0.0) - logprobs).clamp(-20, 20)
        kl = torch.expm1(distance) - distance
        token_loss = token_loss + kl_coef * kl
    loss = aggregate(token_loss, mask, aggregation, max_tokens, num_tokens, num_sequences)

    with torch.no_grad():
        log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
        ratio = log_ratio.exp()
        local_size, global_size = (weight * local_adv).abs(), (global_coef * (1 - weight) * global_adv).abs()
        total = local_size + global_size
        per_token = {
            "ratio": ratio,
            # KL(old ‖ new) ≈ (q − 1) − log q                                           (k3 of the update itself)
            "approx_kl": torch.expm1(log_ratio) - log_ratio,
            # Clipped is what no longer follows q·A, by either clip: those tokens give this term no gradient.
            "clip_fraction_local": (local_loss != -(ratio * local_adv)).double(),
            "clip_fraction_global": (global_loss != -(ratio * global_adv)).double(),
        }
        if ref_logprobs is not None:
            per_token["kl"] = kl
        metrics = {name: _sum_and_count(value, mask) for name, value in per_token.items()}
        # |w A^l| / (|w A^l| + |coef (1−w) A^g|); where both are 0 there is no gradient to share out
        share = torch.where(total > 0, local_size / total, 0.0).expand_as(logprobs)
        metrics["local_share"] = _sum_and_count(share, mask & (total > 0))
    return loss, metrics


# ---------------------------------------------------------------------------------- the worked batch


def _right_and_wrong(values, correct):
    """One table cell from a row of values (G,): what its right and what its wrong responses get, "." for none."""
    parts = [f"{values[side][0]:.3f}" if side.any() else "." for side in (correct, ~correct)]
    return " ".join(f"{part:>7}" for part in parts)


def print_worked_batch():
    answers = ("AAAAAA", "AAAAAb", "AAbbcd", "Abcdef", "bcdefg", "bbbccd", "bbbbbb", "------", "bbbb--")
    classes = torch.tensor([[ord(answer) for answer in row] for row in answers])  # (P,G); any labels will do
    correct = classes == ord("A")
    entropy, local_adv = consistency_entropy(classes), local_advantages(correct)
    prompt_rewards = global_rewards(correct, entropy)
    global_adv = global_advantages(prompt_rewards)
    rules = {name: PRESETS[name] for name in ("grpo", "copo", "copo-paper")}
    rules["soft-zero-group"] = {**PRESETS["copo"], "blend": "soft-zero-group"}
    weights = {n: local_weight(entropy, correct, local_adv, r["blend"], r["gamma"], r["rho"]) for n, r in rules.items()}
    effective = {n: effective_advantages(local_adv, global_adv, w, rules[n]["global_coef"]) for n, w in weights.items()}

    print("One batch: 9 prompts, 6 responses each. Answer A is right, other letters are wrong, - is no answer.")
    print("Of two figures the first is for the right responses, the second for the wrong; w is that of copo.\n")
    print("prompt  rewards      answers           H      R          w               A^l          A^g")
    for i, row in enumerate(answers):
        marks = " ".join(str(int(right)) for right in correct[i])
        numbers = f"{entropy[i]:6.3f} {prompt_rewards[i]:6.3f}  {_right_and_wrong(weights['copo'][i], correct[i])}"
        advantages = f"{_right_and_wrong(local_adv[i], correct[i])}  {global_adv[i]:7.3f}"
        print(f"{i + 1:<8}{marks}  {' '.join(row)}  {numbers}  {advantages}")
    print(f"\nR over the prompts: mean {prompt_rewards.mean():.3f}, standard deviation {prompt_rewards.std():.3f}")

    print("\nEffective advantage w A^l + (1 - w) A^g of the right and of the wrong responses\n")
    print(f"{'prompt':<19}" + "".join(f"{name:>19}" for name in effective))
    for i in range(len(answers)):
        print(f"{i + 1:<19}" + "".join(f"    {_right_and_wrong(a[i], correct[i])}" for a in effective.values()))
    wrong = int((~correct).sum())
    pushed = [int((a[~correct] > 0).sum()) for a in effective.values()]
    idle = [int((a.abs().amax(dim=1) < 0.01).sum()) for a in effective.values()]
    print(f"{'wrong pushed up':<19}" + "".join(f"{f'{n} of {wrong} {n / wrong:5.1%}':>19}" for n in pushed))
    print(f"{'groups |A| < 0.01':<19}" + "".join(f"{f'{n} of {len(answers)}':>19}" for n in idle))
    wasted = [str(i + 1) for i, mixed in enumerate(is_mixed(correct)) if not mixed]
    print(f"\nGRPO wastes the groups of prompts {', '.join(wasted)}: all right or all wrong, so A^l = 0.")


# ---------------------------------------------------------------------------------- the advantage lab: saved groups

SAVED = ("correct", "reward", "class", "length", "weight", "local_adv")  # in groups.jsonl, a number for each response


def read_groups(path, only_step=None):
    """A run's groups.jsonl -> for each of its steps {name: (P,G) float64}. ValueError names the file and the line."""
    steps = {}
    with open(path, encoding="utf-8", errors="replace") as file:  # bytes that are no text fail with their line
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith("\n"):
                    break  # the run is writing it, or was killed while it did
                saved = json.loads(line)
                group = torch.tensor([saved[name] for name in SAVED], dtype=torch.float64)  # (6,G)
                group = torch.cat([group, torch.full_like(group[:1], saved["global_adv"])])
                if only_step in (None, saved["step"]):
                    steps.setdefault(saved["step"], []).append(group)
                    torch.stack(steps[saved["step"]][-2:])  # refuses groups of two sizes in a step
                if not group.isfinite().all():
                    raise ValueError("a number is not finite")
            except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path}:{number}: not a group: {type(error).__name__}: {error}") from error
    if not steps:
        raise ValueError(f"{path}: no groups" + (f" of step {only_step}" if only_step is not None else ""))
    return [dict(zip((*SAVED, "global_adv"), torch.stack(groups, dim=1))) for groups in steps.values()]


def lab_figures(steps, rule):
    """What a rule (a row of PRESETS; None: the run's, by the w, A^l and A^g it saved, coef 1) makes of saved groups.

    -> means over right and over wrong responses of w, A^l, A^g and A; shares of the gradient by kind of group, of wrong
    responses pushed up, and of groups without gradient. NaN where there is nothing to take a mean of."""
    parts = []
    for saved in steps:
        correct, global_adv = saved["correct"].bool(), saved["global_adv"][:, 0]
        local_adv, weight, coef, by_length = saved["local_adv"], saved["weight"], 1.0, False
        if rule:
            entropy = consistency_entropy(saved["class"])
            prompt_rewards = global_rewards(correct, entropy, rule["consistency_coef"])
            local_adv = local_advantages(saved["reward"], rule["advantage"], rule["scale_advantages"])
            global_adv = global_advantages(prompt_rewards, rule["scale_advantages"])
            weight = local_weight(entropy, correct, local_adv, rule["blend"], rule["gamma"], rule["rho"])
            coef, by_length = rule["global_coef"], rule["aggregation"] != "seq-mean-token-mean"
        effective = effective_advantages(local_adv, global_adv, weight, coef)
        # A response's share of Σ_t |A|: its length cancels where the mean over its tokens is taken first.
        size = effective.abs() * (saved["length"] if by_length else 1)
        of_group = torch.stack([global_adv, effective.abs().amax(dim=1) < 1e-9, correct.double().mean(dim=1)])
        of_group = of_group[:, :, None].expand(3, *correct.shape)
        parts.append(torch.cat([torch.stack([correct, weight, local_adv, effective, size]), of_group]).flatten(1))
    correct, weight, local_adv, effective, size, global_adv, idle, accuracy = torch.cat(parts, dim=1)
    figures, right = {}, correct == 1
    for name, values in (("w", weight), ("A^l", local_adv), ("A^g", global_adv), ("A", effective)):
        figures |= {f"{name} right": values[right].mean(), f"{name} wrong": values[~right].mean()}
    kinds = {"all wrong": accuracy == 0, "mixed": (accuracy > 0) & (accuracy < 1), "all right": accuracy == 1}
    figures |= {f"from {kind}": size[which].sum() / size.sum() for kind, which in kinds.items()}
    figures |= {"pushed up": (effective[~right] > 0).double().mean(), "idle": idle.mean()}
    return {name: value.item() for name, value in figures.items()}


def print_lab(title, table):
    """{name: figures} as a table."""
    print(f"\n{title}\n\n{'':<16}" + "".join(f"{name:^14}" for name in ("w", "A^l", "A^g", "A")) +
          f"{'gradient from groups':^27}{'wrong':>8}{'groups':>8}\n{'':<16}" + f"{'right':>7}{'wrong':>7}" * 4 +
          f"{'all wrong':>10}{'mixed':>7}{'all right':>10}{'up':>8}{'idle':>8}")  # fmt: skip
    for name, figures in table.items():
        cells = [f"{value:7.2f}" for value in list(figures.values())[:8]]
        cells += [f"{value:{width}.1%}" for value, width in zip(list(figures.values())[8:], (10, 7, 10, 8, 8))]
        print(f"{name:<16}" + "".join(cells).replace("nan%", "   .").replace("nan", "  ."))


def plot_lab(path, table):
    """Bars: where the gradient comes from. Crosses: the share of wrong responses that is pushed up."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 9), layout="tight")
    axes = drawing.subplots()
    start = [0.0] * len(table)
    for kind, color in (("all wrong", "#d98880"), ("mixed", "#f7dc6f"), ("all right", "#7dcea0")):
        width = [figures[f"from {kind}"] for figures in table.values()]
        axes.barh(list(table), width, left=start, color=color, label=f"gradient from {kind} groups")
        start = [a + b for a, b in zip(start, width)]
    axes.plot([figures["pushed up"] for figures in table.values()], list(table), "kx", label="wrong pushed up")
    axes.invert_yaxis()
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    drawing.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print one worked batch, or what rules would make of a run's groups.")
    parser.add_argument("--groups", metavar="FILE", help="groups.jsonl of a run of train.py: the advantage lab")
    parser.add_argument("--step", type=int, help="this step of it only")
    parser.add_argument("--blend", choices=BLENDS, default="soft-zero", help="rule of the sweep over γ and ρ")
    parser.add_argument("--plot", metavar="PNG", help="draw the lab's tables (needs matplotlib)")
    args = parser.parse_args(argv)
    if not args.groups:
        return print_worked_batch()
    base, blends = PRESETS["copo"], [name for name in BLENDS if name not in ("soft-zero", "local")]  # copo and grpo
    rules = {"the run's own": None} | PRESETS | {name: {**base, "blend": name} for name in blends}
    rules |= {f"grpo, {kind}": {**PRESETS["grpo"], "advantage": kind} for kind in ADVANTAGES[1:]}
    grid = [(gamma, rho) for gamma in (1, 2, 5, 10, 20) for rho in (0.5, 1, 1.5, 2)]
    sweep = {f"γ {g:<3g} ρ {r:g}": {**base, "blend": args.blend, "gamma": g, "rho": r} for g, r in grid}
    try:
        steps = read_groups(args.groups, args.step)
        rules, sweep = ({name: lab_figures(steps, rule) for name, rule in part.items()} for part in (rules, sweep))
        if args.plot:
            plot_lab(args.plot, rules | sweep)
    except (OSError, ValueError, ImportError) as error:
        hint = "; pip install matplotlib, or leave --plot out" if isinstance(error, ImportError) else ""
        print(f"copo.py: {error}{hint}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.groups}: {sum(len(saved['correct']) for saved in steps)} groups of {len(steps)} steps")
    print_lab("Every preset, every other blend (else as copo) and advantage, on these groups and rewards", rules)
    print_lab(f"Blend {args.blend} over γ and ρ", sweep)


if __name__ == "__main__":
    main()
