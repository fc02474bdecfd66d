"""Hashes of what the sampler draws in float64, in many settings: a later sampler must draw the
same.

    python tests/token_hashes.py /path/to/checkout > tests/token_hashes.json

The file was made with the checkout at ce7ac25, whose sampler calls generate() `sample`.
tests/test_sampler.py compares the sampler of today with it. A hash covers tokens, lengths and
finished flags; log-probs, which rounding may move, are kept as their sum.
"""

import hashlib
import json
import random
import sys
from itertools import product

GROUP_SIZE = 5
FAMILIES = ("qwen2", "qwen3", "llama")
PROMPT_LENGTHS = (5, 17, 2, 9, 1, 30, 140, 64)
DATA_ROWS = [9, 3, 2, 7, 11, 0, 1, 30]
STOP_IDS = [0, 4, 8, 77]
SETTINGS = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0": {"temperature": 0},
    "top-p 0.9, top-k 40": {"top_p": 0.9, "top_k": 40},
}
# (rows in flight, limits): all 40 rows at once, or refilled while others are in flight
SHAPES = ((0, "limit 60"), (0, "ragged limits"), (6, "ragged limits"), (17, "limit 60"))


def config(family):
    """A tiny model of the family, with weights large enough that its distributions differ."""
    return {
        "model_type": family,
        "vocab_size": 353,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 600,
        "initializer_range": 0.25,
        "tie_word_embeddings": family != "llama",
        "rope_theta": 10000.0,
        "eos_token_id": 0,
    }


def draw_all(transformer, generate, dtype):
    """{setting: (hash, sum of lengths, finished rows, sum of log-probs)} for every setting."""
    r = random.Random(1)
    prompts = [[r.randrange(353) for _ in range(length)] for length in PROMPT_LENGTHS]
    ragged = [r.randint(1, 90) for _ in range(len(prompts) * GROUP_SIZE)]
    limits = {"limit 60": 60, "ragged limits": ragged}
    results = {}
    for family in FAMILIES:
        model = transformer.from_config(config(family), dtype=dtype, seed=3)
        for setting, (max_rows, limit) in product(SETTINGS, SHAPES):
            options = {"stop_ids": STOP_IDS, "seed": 5, "step": 2, "rows": DATA_ROWS}
            options |= SETTINGS[setting] | {"max_rows": max_rows}
            samples = generate(model, prompts, GROUP_SIZE, limits[limit], **options)
            digest = hashlib.sha256()
            for part in (samples.tokens, samples.lengths, samples.finished):
                digest.update(part.numpy().tobytes())
            name = f"{family}, {setting}, {max_rows} rows, {limit}"
            results[name] = [
                digest.hexdigest()[:16],
                int(samples.lengths.sum()),
                int(samples.finished.sum()),
                float(samples.logprobs.sum()),
            ]
    return results


def main():
    sys.path.insert(0, sys.argv[1])
    import torch

    import model
    import sampler

    torch.set_num_threads(1)
    generate = getattr(sampler, "generate", None) or sampler.sample
    results = draw_all(model.Transformer, generate, torch.float64)
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
