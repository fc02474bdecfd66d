"""Make the demonstration's model directory, data/tiny: config.json and tokenizer, no weights.

    python data/make_tiny.py            # writes config.json and the tokenizer's files

A Qwen2-shaped model of 0.8 million parameters. Its config.json says `"random_init": true`: whoever
loads it draws the weights from a seed. Its tokens are bytes and the numbers of two digits.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "random_init": True,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "torch_dtype": "float32",
    "eos_token_id": 0,
    "pad_token_id": 0,
    "vocab_size": 351,
}
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """Byte-level BPE without merges: a token for each byte, and for a few longer pieces.

    Byte-level because transformers gives every Qwen2 directory Qwen's own splitting and decoding.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    # Sampled in one step each: the opening of every answer, and the numbers of two digits.
    pieces = ["\\boxed{"] + [str(number) for number in range(10, 100)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        unk_token=SPECIAL_TOKENS[0],
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    folder = Path(__file__).resolve().parent / "tiny"
    parser.add_argument("--out", type=Path, default=folder, help="directory (default: data/tiny)")
    args = parser.parse_args(argv)
    make_tokenizer().save_pretrained(args.out)
    config = json.dumps(CONFIG, indent=2) + "\n"
    (args.out / "config.json").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    main()
