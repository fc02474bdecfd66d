"""Which sampled tokens count (exercise 6).

Shapes: B responses, R tokens of the longest.
"""

import torch


def response_lengths(tokens, stop_ids):
    """Length of each response, its stop token counted: tokens (B,R), stop_ids a list -> (B,) int64.

    The first stop token of a row ends its response; without one the response fills the row. What
    follows is padding. Many models pad with their stop token, so only the first one counts.
    """
    is_stop = torch.isin(tokens, torch.tensor(stop_ids, device=tokens.device))
    # |o_b| = number of tokens that have no stop token before them
    stops_before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return (stops_before == 0).sum(dim=1)


def response_mask(lengths, width):
    """True for the tokens to train, the stop token among them: (B,), R -> (B,R) bool."""
    # m_bt = 1[t < |o_b|], t counted from 0
    return torch.arange(width, device=lengths.device) < lengths[:, None]
