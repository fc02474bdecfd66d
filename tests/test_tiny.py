"""data/tiny, the demonstration's model directory: a config.json and a tokenizer without weights.

Bugs these tests guard against: files that make_tiny.py no longer makes; a number of two digits, or
the opening of an answer, that takes several tokens; text that changes on its way through them.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "data"))
import make_tiny

DATA = Path(make_tiny.__file__).parent


def test_the_script_makes_the_files_again_byte_for_byte(tmp_path):
    make_tiny.main(["--out", str(tmp_path)])
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in (DATA / "tiny").iterdir()}
    assert "config.json" in made and not any(name.endswith(".safetensors") for name in made)


def test_the_config_asks_for_random_weights_and_has_a_row_for_every_token():
    config = json.loads((DATA / "tiny/config.json").read_text())
    assert config["random_init"] is True
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(DATA / "tiny"))


def test_tokens_are_bytes_two_digit_numbers_and_the_opening_of_an_answer():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny")
    for piece in ["\\boxed{", *map(str, range(10, 100))]:
        assert len(tokenizer.encode(piece, add_special_tokens=False)) == 1
    text = "Solve 7+28-4\n7+28=35\nγ \\boxed{31}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat == "<|user|>1+1<|assistant|>2<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>1+1<|assistant|>"
