"""Memory of each rank on CPU processes, measured and as train.py plans it.

    python tests/bench_ranks.py

A model of 96 million random parameters takes two steps on 1, 2 and 4 ranks. "masters", "gradients"
and "optimiser" are the bytes of the tensors that a rank holds between forward and backward passes,
"peak" is the largest resident set of a rank less that of a run whose model has next to no
parameters. Prints the table that stands in docs/ranks.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny_runs  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402

BIG = tiny_runs.CONFIG | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "vocab_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FLAGS = {
    "dtype": "float32",
    "steps": 2,
    "minibatch_prompts": 4,
    "eval_every": 0,
    "save_every": 0,
    "micro_tokens": 64,
}


def watch(argv, file):
    """A run that writes how many bytes its rank holds once gradients are there."""
    train.Verifier, inner = tiny_runs.Judge, train.optimizer_step

    def optimizer_step(run, *rest):
        held = {
            "masters": list(run.model.parameters()),
            "gradients": [p.grad for p in run.model.parameters()],
        }
        held["optimiser"] = [
            value for state in run.optimizer.state.values() for value in state.values()
        ]
        held = {
            name: [getattr(t, "_local_tensor", t) for t in tensors]
            for name, tensors in held.items()
        }
        sizes = {
            name: sum(t.numel() * t.element_size() for t in tensors)
            for name, tensors in held.items()
        }
        Path(f"{file}.{train.rank()}").write_text(json.dumps(sizes))
        return inner(run, *rest)

    train.optimizer_step = optimizer_step
    train.main(argv)


def measure(runs, ranks, flags):
    """(bytes of masters, gradients and optimiser on the fullest rank, the largest peak in GiB)."""
    directory, file = runs.directory(), runs.folder / "held"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = command if ranks > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, __file__, "--watch", str(file), *runs.argv(flags, run_dir=directory)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    held = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(ranks)]
    held = {name: max(one[name] for one in held) / 2**30 for name in held[0]}
    return held, max(
        line["peak_memory_gib"] for line in tiny_runs.lines(directory / "metrics.jsonl")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    ours, rest = parser.parse_known_args()
    if ours.watch:
        return watch(rest, ours.watch)
    with tempfile.TemporaryDirectory(prefix="copo-ranks-") as folder:
        runs = tiny_runs.Runs(folder)
        big = Path(folder) / "big"
        model.Transformer.from_config(BIG, seed=0).save_pretrained(big)
        for file in (Path(folder) / "model").glob("*token*"):
            (big / file.name).write_bytes(file.read_bytes())
        base = {ranks: measure(runs, ranks, FLAGS)[1] for ranks in (1, 2, 4)}
        print(
            "| ranks | flags | masters | gradients | optimiser | peak over the base | planned |\n|"
            + "---|" * 7
        )
        for ranks, more in [
            (1, {}),
            (2, {}),
            (4, {}),
            (1, {"dtype": "bfloat16"}),
            (4, {"dtype": "bfloat16"}),
            (2, {"activation_checkpointing": True}),
        ]:
            flags = {**FLAGS, "model": big, **more}
            held, peak = measure(runs, ranks, flags)
            args = train.parse_args(runs.argv(flags, run_dir=Path(folder) / "none"))
            plan = train.memory_plan(train.Config.parse(BIG), args, ranks)
            sizes = " | ".join(
                f"{held[name]:.3f}" for name in ("masters", "gradients", "optimiser")
            )
            named = " ".join(
                [train.flag(n) + ("" if v is True else f" {v}") for n, v in more.items()]
            )
            print(
                f"| {ranks} | {named} | {sizes} | {peak - base[ranks]:.2f} | {plan['total']:.2f} |",
                flush=True,
            )
    print(f"\nGiB, on the fullest rank; torch {torch.__version__}, CPU")


if __name__ == "__main__":
    main()
