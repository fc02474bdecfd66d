"""Log-probs of tokens under the distribution they were sampled from (exercise 7).

Shapes: N tokens, D hidden size, V vocabulary.
"""


def plain_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-prob of each target, in nats: hidden (N,D), weight (V,D), targets (N,) int64 -> (N,).

    The sampler draws from the softmax of logits over temperature, so this is the distribution that
    must be scored. Finite for every finite logit.
    """
    # z_nv = hidden_n · weight_v / temperature,   log p_n = z_n,target − log Σ_v e^z_nv
    logits = hidden @ weight.T / temperature
    return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
