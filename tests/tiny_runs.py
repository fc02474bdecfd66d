"""What the tests of train.py share: a model of two layers with fourteen tokens, problems that
guessing solves now and then, a checker without processes, and a way to run train.main in this
process and read what it left behind."""

import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

import model
import reward
import train

LETTERS = "0123456+=? \n"  # all that problems and replies are written with
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
    "torch_dtype": "float32",
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# seconds until a test gives up on another process: no bound of what it checks, however busy the
# cores
PATIENCE = 600
SAMPLES_EVERY = 2  # instead of train's, so that short runs have several entries in samples.txt
TIMES = ("seconds", "tokens_per_second", "peak_memory")  # metrics that no two runs share


def make_model(path):
    """A Hugging Face directory: random weights and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [byte_level.pre_tokenize_str(letter)[0][0] for letter in LETTERS]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(["<end>", "<stop>", *letters])}, [])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<end>",
        additional_special_tokens=["<stop>"],
    )
    tokenizer.save_pretrained(path)
    model.Transformer.from_config(CONFIG | {"vocab_size": len(tokenizer)}, seed=1).save_pretrained(
        path
    )


def make_data(path, rows):
    """Sums of two or three digits from 0 to 2; their answers are 0 to 6, which a reply hits by
    luck."""
    numbers = [(a, b, c) for a in range(3) for b in range(3) for c in (None, 0, 1, 2)]
    lines = []
    for i in rows:
        terms = [n for n in numbers[i % len(numbers)] if n is not None]
        answer = str(sum(terms))
        lines.append(
            {"problem": "+".join(map(str, terms)) + "=?", "answer": answer, "solution": answer}
        )
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


class Judge:
    """The checker in this process, on answers that cannot hang: as reward.Verifier, without its
    workers."""

    def __init__(self, *_, **__):
        pass

    def grade_groups(self, responses, references, **_):
        groups = zip(responses, references, strict=True)
        return [judged(tuple(texts), reference) for texts, reference in groups]

    def self_consistent(self, references):
        return [reward.score(f"\\boxed{{{each}}}", each) > 0 for each in references]

    def close(self):
        pass


@functools.cache
def judged(texts, reference):
    grades = [reward.grade(text, reference) for text in texts]
    labels = [reference if grade.correct else grade.answer for grade in grades]
    return reward.Group(
        answers=[grade.answer for grade in grades],
        correct=[grade.correct for grade in grades],
        rewards=[grade.reward for grade in grades],
        classes=reward.answer_classes(labels),
        failed=[""] * len(texts),
    )


class Runs:
    """Starts runs of train.main below one folder; those with equal flags are made once."""

    def __init__(self, folder):
        self.folder, self.count, self.cache = Path(folder), 0, {}
        make_model(self.folder / "model")
        make_data(self.folder / "train.jsonl", range(0, 24))
        make_data(self.folder / "test.jsonl", range(24, 28))
        self.base = {
            "model": self.folder / "model",
            "data": self.folder / "train.jsonl",
            "eval_data": self.folder / "test.jsonl",
            "instruction": "",
            "device": "cpu",
            "max_prompt_tokens": 16,
            "max_new_tokens": 6,
            "prompts_per_step": 4,
            "group_size": 4,
            "minibatch_prompts": 2,
            "steps": 2,
            "lr": 1e-2,
            "sft_steps": 0,
            "eval_every": 1,
            "eval_samples": 2,
            "save_every": 1,
            "verifier_workers": 1,
            "dtype": "float64",
        }

    def argv(self, changes=None, /, **more):
        """The base flags with changes (None: left out, True and False: --x and --no-x)."""
        words = []
        for name, value in (self.base | (changes or {}) | more).items():
            flag = train.flag(name)
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, list):
                words += [word for item in value for word in (flag, str(item))]
            elif value is not None:
                words += [flag, str(value)]
        return words

    def directory(self):
        self.count += 1
        return self.folder / f"run{self.count}"

    def new(self, **changes):
        """A run made for one test alone."""
        directory = self.directory()
        train.main(self.argv({"run_dir": directory, **changes}))
        return Path(directory)

    def shared(self, **changes):
        """A run that nobody may change."""
        key = json.dumps(changes, sort_keys=True, default=str)
        if key not in self.cache:
            self.cache[key] = self.new(**changes)
        return self.cache[key]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def ended(directory):
    """run.json's last word, None of a run that was killed: (how, after which step, why)."""
    run_info = json.loads((directory / "run.json").read_text())
    return tuple(run_info["ended"].values()) if "ended" in run_info else None


def metrics(directory):
    """metrics.jsonl without what depends on the machine."""
    found = lines(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in found]


def evaluations(directory):
    return [
        {k: v for k, v in line.items() if not k.startswith(TIMES)}
        for line in lines(directory / "eval.jsonl")
    ]


def weights(directory):
    return model.Transformer.from_pretrained(directory / "model", dtype=torch.float64).state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def saved(checkpoint, scratch):
    """All that a checkpoint holds, as flat name -> value; the run files' lengths apart, which
    depend on times."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint, scratch)
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("files")

    def flat(prefix, value):
        if isinstance(value, dict):
            return {
                k: v
                for name, part in value.items()
                for k, v in flat(f"{prefix}/{name}", part).items()
            }
        return {prefix: value}

    return flat("", torch.load(scratch, weights_only=False)) | flat("state", state)


def difference(one, other):
    """Why two finished runs are not the same run, or None: weights, optimiser, state, metrics,
    every file."""
    if metrics(one) != metrics(other):
        return "metrics.jsonl"
    if evaluations(one) != evaluations(other):
        return "eval.jsonl"
    for name in ("groups.jsonl", "samples.txt"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return name
    if not same_weights(one, other):
        return "exported weights"
    last = [sorted((place / "checkpoints").glob("step-*"))[-1] for place in (one, other)]
    ours, theirs = (saved(path, one / "scratch.pt") for path in last)
    (one / "scratch.pt").unlink()
    if ours.keys() != theirs.keys():
        return f"names in the checkpoint: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name]
        if not same:
            return f"{name} in the checkpoint"
    return None


# What in train.py leaves a trace or takes long: (module, name of the function).
EVENTS = (
    (train, "sample_groups"),
    (train, "optimizer_step"),
    (train, "delete_directory"),
    (train.dcp, "save"),
    (train, "run_evaluation"),
    (train.os, "replace"),
    (train, "export"),
    (train, "log_step"),
)


def watch_events(act):
    """Calls act(name) before and after everything in train.py that leaves a trace, half-written
    lines included."""

    def wrap(module, name):
        inner = getattr(module, name)

        def wrapped(*args, **kwargs):
            act(f"before {name}")
            result = inner(*args, **kwargs)
            act(f"after {name}")
            return result

        setattr(module, name, wrapped)

    def append(path, lines):
        text = "".join(line + "\n" for line in lines)
        for part in (text[: len(text) * 2 // 3], text[len(text) * 2 // 3 :]):
            with open(path, "a", encoding="utf-8") as file:
                file.write(part)
            act(f"in {path.name}")

    train.append = append
    for module, name in EVENTS:
        wrap(module, name)


def start(function, *args):
    """A process forked from one that has imported everything already, which takes five seconds of a
    slow core."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "torch.distributed.checkpoint.format_utils", "torch.distributed.fsdp"]
    )
    process = context.Process(target=function, args=args)
    process.start()
    return process


def on_ranks(ranks, log, function, *args, code=0):
    """function(*args) on several ranks that are forked, with the variables that torchrun would set:
    what they print."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [
        start(one_rank, rank, ranks, store.port, log, function, args) for rank in range(ranks)
    ]
    until = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in started) and time.monotonic() < until:
        if any(process.exitcode not in (None, code) for process in started):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    output = Path(log).read_text()
    assert codes == [code] * ranks, f"exit codes {codes}\n{output[-3000:]}"
    return output


def one_rank(rank, ranks, port, log, function, args):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*args)


def child(argv, event, count):
    """A run in a process of its own that kills itself at the count-th event of that name ("": of
    any)."""
    seen = []

    def act(name):
        seen.append(name)
        if sum(event in one for one in seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_events(act)
    quiet_child(argv)


def quiet_child(argv):
    train.Verifier = Judge
    train.SAMPLES_EVERY = SAMPLES_EVERY
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which ignores it
    train.main(argv)
