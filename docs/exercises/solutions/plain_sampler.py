"""A sampler without a cache (exercise 10)."""

import torch

from sampler import noise_key, sample_token, uniform


@torch.no_grad()
def generate_plain(
    model, prompts, group_size, max_new_tokens, temperature=1.0, stop_ids=(), seed=0, step=0
):
    """Draw group_size responses to each prompt, token by token, the whole sequence run each time.

    prompts: P lists of token ids. Returns two lists of P·G lists, prompt by prompt: the token ids
    of each response, its stop token included, and their log-probs. model(ids) takes ids (1,T) to
    hidden states (1,T,D), model.logits(hidden) takes those to logits. Draw with
    sample_token(logits (1,V), noise (1,), temperature) and this noise:
        noise_key(seed, step, i, j)    a key, for response j to prompt i
        uniform(keys, positions)       noise in [0,1), for tensors of one key and one position;
                                       the first token of a response has position 0
    """
    device = model.head_weight().device
    responses = []
    response_logprobs = []
    for i, prompt in enumerate(prompts):
        for j in range(group_size):
            key = torch.tensor([noise_key(seed, step, i, j)], device=device)
            tokens = []
            logprobs = []
            while len(tokens) < max_new_tokens:
                ids = torch.tensor([prompt + tokens], device=device)
                logits = model.logits(model(ids)[:, -1])
                noise = uniform(key, torch.tensor([len(tokens)], device=device))
                token, logprob = sample_token(logits, noise, temperature)
                tokens.append(token.item())
                logprobs.append(logprob.item())
                if tokens[-1] in stop_ids:
                    break
            responses.append(tokens)
            response_logprobs.append(logprobs)
    return responses, response_logprobs
