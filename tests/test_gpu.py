"""The program on a pretended GPU (pretended_gpu.py), held against the CPU and against budgets.

A real GPU is fast only where the host seldom waits for it, where few shapes occur and where
attention takes an efficient kernel. Each test says what happened before it was there.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import gpu_check
import pytest
import torch
from pretended_gpu import PretendedTensor, pretended_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import Transformer
from sampler import Decoder, KVCache, cache_bytes, cache_capacity, generate

TINY = Path(__file__).parent.parent / "data" / "tiny" / "config.json"
CPU_AND_GPU_AGREE = {"atol": 1e-4, "rtol": 1e-4}


def tiny(dtype=torch.float32, device="cpu", family="qwen2", layers=2):
    config = json.loads(TINY.read_text())
    config |= {"num_hidden_layers": layers, "model_type": family, "architectures": []}
    return Transformer.from_config(config, dtype, device, seed=0)


def ragged_prompts(count=8, longest=70):
    r = random.Random(0)
    return [[r.randrange(351) for _ in range(r.randrange(5, longest))] for _ in range(count)]


def sample_both(dtype=torch.float32, group_size=8, limit=60, family="qwen2", **options):
    """The CPU's samples, the pretended GPU's, its counts, and the (rows, keys) of its passes."""
    options = {"stop_ids": [3, 4, 5], "seed": 1} | options
    expected = generate(tiny(dtype, family=family), ragged_prompts(), group_size, limit, **options)
    passes, decode_pass = [], Decoder.decode_pass

    def watched(self, num_rows, num_keys):
        passes.append((num_rows, num_keys))
        decode_pass(self, num_rows, num_keys)

    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "decode_pass", watched)
        model = tiny(dtype, "cuda", family)
        gpu.reset()
        samples = generate(model, ragged_prompts(), group_size, limit, **options)
    return expected, samples, gpu, passes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_rows": 24},
        {"max_rows": 24, "dtype": torch.float64},
        {"family": "qwen3", "top_p": 0.9, "top_k": 40},
        {"family": "llama", "temperature": 0, "max_rows": 40},
    ],
    ids=str,
)
def test_samples_are_the_cpus_and_the_host_seldom_waits(options):
    """At ce7ac25 the first decoded token raised on every GPU: a view of a result whose layout the
    kernel had chosen. And each token was a new shape, for which cuDNN builds a plan (0.4 s)."""
    expected, samples, gpu, passes = sample_both(**options)
    assert torch.equal(samples.tokens, expected.tokens)
    assert torch.equal(samples.lengths, expected.lengths)
    assert torch.equal(samples.finished, expected.finished)
    torch.testing.assert_close(samples.logprobs, expected.logprobs, **CPU_AND_GPU_AGREE)
    assert samples.tokens.device.type == samples.logprobs.device.type == "cpu"
    assert len(passes) >= 40 and (samples.lengths < 60).any() == ("temperature" not in options)

    shapes = {(q, k) for _, q, k in gpu.attentions if q[2] != k[2]}
    assert len(shapes) <= (12 if "max_rows" in options else 8), shapes
    max_rows = options.get("max_rows", 64)
    assert all(rows in (32, max_rows) and keys == 256 for rows, keys in passes)
    assert gpu.waits.total() <= 14 + 0.4 * len(passes), gpu.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_never_makes_the_whole_matrix(dtype):
    """PyTorch 2.13 takes the math kernel for grouped heads in float32: 14 GiB for a prompt of
    3,072 tokens. And it copies masks whose strides are not multiples of 16, in every layer."""
    *_, gpu, _ = sample_both(dtype)
    kinds = {kernel for kernel, _, _ in gpu.attentions}
    assert kinds == ({"flash", "efficient"} if dtype == torch.bfloat16 else {"efficient"})
    assert gpu.padded_masks == 0


def test_a_decoded_token_takes_few_kernels():
    """Eager decoding is bound by launches: ce7ac25 had 88 kernels outside the layers."""

    def kernels(layers):
        taken = []
        with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
            decode_pass = Decoder.decode_pass

            def watched(self, *shape):
                before = gpu.kernels.total()
                decode_pass(self, *shape)
                taken.append(gpu.kernels.total() - before)

            patch.setattr(Decoder, "decode_pass", watched)
            model = tiny(torch.bfloat16, "cuda", layers=layers)
            generate(model, [[1, 2, 3]] * 4, 2, 9, stop_ids=[3, 4])
        assert len(set(taken)) == 1 and len(taken) >= 8
        return taken[0]

    a_layer = (kernels(4) - kernels(2)) / 2
    outside = kernels(2) - 2 * a_layer
    assert a_layer <= 23 and outside <= 40, (a_layer, outside)


def test_a_decode_pass_could_be_captured(monkeypatch):
    """A CUDA graph replays kernels on the same memory: a pass must not wait for the device, nor
    leave anything in a new tensor, and must depend on its two sizes only."""
    decode_pass, checked = Decoder.decode_pass, []

    def tensors(decoder):
        named = {name: value for name, value in vars(decoder).items()}
        named |= {f"layer {i}": layer for i, layer in enumerate(decoder.cache.layers)}
        return {name: x for name, x in named.items() if isinstance(x, PretendedTensor)}

    def watched(self, *shape):
        before, waits = tensors(self), gpu.waits.total()
        addresses = {name: x.numbers.data_ptr() for name, x in before.items()}
        decode_pass(self, *shape)
        after = tensors(self)
        assert gpu.waits.total() == waits, gpu.report()
        assert all(after[name] is before[name] for name in after) and len(after) == len(before)
        assert addresses == {name: x.numbers.data_ptr() for name, x in after.items()}
        checked.append(len(before))

    monkeypatch.setattr(Decoder, "decode_pass", watched)
    with pretended_gpu() as gpu:
        generate(tiny(device="cuda"), ragged_prompts(), 4, 30, stop_ids=[3], max_rows=16)
    assert len(checked) > 29 and min(checked) >= 8


def test_the_cache_is_bounded_by_its_formula(monkeypatch):
    """It grew in blocks and copied itself: 27 GiB of live memory reserved 60, and finished rows
    went on growing, up to 396 tokens where the limit was 208."""
    made, init = [], KVCache.__init__

    def watched(self, *args, **options):
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(KVCache, "__init__", watched)
    with pretended_gpu():
        model = tiny(torch.bfloat16, "cuda")
        for limit in (10, 27, 15):
            prompts = ragged_prompts(3, longest=30 + limit)
            generate(model, prompts, 4, limit, max_rows=7, cache_tokens=300, stop_ids=[3])
    expected = cache_bytes(model.config, 7, cache_capacity(300, "cuda"), torch.bfloat16)
    assert cache_capacity(300, "cuda") == 512 and len(made) == 3
    for cache in made:
        assert sum(layer.numbers.nbytes for layer in cache.layers) == expected


def responses():
    """Right-padded rows as response_logprobs takes them: ids, prompt and response lengths."""
    prompts = ragged_prompts(4, 20)
    prompt_lengths, lengths = torch.tensor([len(p) for p in prompts]), torch.tensor([5, 9, 2, 7])
    ids = torch.zeros(4, int((prompt_lengths + lengths).max()), dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids, prompt_lengths, lengths


def packed(ids, prompt_lengths, lengths):
    """The same rows as packed_logprobs takes them; nothing is shared."""
    rows = [row[: p + n - 1] for row, p, n in zip(ids, prompt_lengths, lengths)]
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)[:-1]
    positions = [torch.arange(len(row)) for row in rows]
    packing = train.pack_rows([start + position for start, position in zip(starts, positions)])
    predictors, targets = [], []
    for start, row, p, n in zip(starts, ids, prompt_lengths, lengths):
        predictors.append(start + torch.arange(p - 1, p + n - 1))
        targets.append(row[p : p + n])
    lists = (rows, positions, predictors, targets)
    line, positions, predictors, targets = map(torch.cat, lists)
    return line, positions, packing, predictors, targets


@pytest.mark.parametrize("way", ["response_logprobs", "packed_logprobs"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scoring_and_its_gradient_are_the_cpus(way, checkpointing):
    """Rows were gathered by masks and counts that the host had to read, layer by layer."""
    inputs = responses() if way == "response_logprobs" else packed(*responses())

    def score(device):
        model = tiny(device=device)
        for block in model.model.layers:
            block.activation_checkpointing = checkpointing
        if device == "cuda":
            gpu.reset()
        logprobs, entropy = getattr(model, way)(*(train.to_device(x, device) for x in inputs), 0.8)
        logprobs.sum().backward()
        names = ("embed_tokens.weight", "layers.0.self_attn.k_proj.bias", "norm.weight")
        grads = [model.model.get_parameter(name).grad for name in names]
        return [x.detach().cpu() for x in (logprobs, entropy, *grads)]

    expected = score("cpu")
    with pretended_gpu() as gpu:
        found = score("cuda")
    for ours, theirs in zip(found, expected):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert gpu.waits.total() <= 11, gpu.report()
    within = [line for line in gpu.waits if line.startswith(("model.py", "elsewhere"))]
    assert len(within) <= (2 if way == "response_logprobs" else 0), within
    assert {kernel for kernel, _, _ in gpu.attentions} == {"efficient"}


def test_layers_sort_no_indices():
    """Every layer sorted the places of the tokens again, to sum their gradients in one order."""
    sorting = {"embedding_dense_backward", "index_put", "_index_put_impl", "sort", "argsort"}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    inputs = packed(*responses())
    found = []
    for layers in (1, 3):
        counts = Counter()
        model = tiny(layers=layers)
        with Count():
            model.packed_logprobs(*inputs)[0].sum().backward()
        assert counts["_embedding_bag_forward_only"] == layers
        found.append({name: counts[name] for name in sorting if counts[name]})
    # Those of the embedding, and of the tokens that predict.
    assert found == [{"embedding_dense_backward": 2}] * 2


GRADE = """
from reward import Grade

def grade(response, reference, *, problem="", require_value=False, in_thought=False):
    return Grade(str(len(response) % 5), len(response) % 2 == 0, len(response) % 3 / 2)
"""
RUN = (
    "--steps 2 --sft-steps 3 --sft-batch 8 --kl-coef 0.01 --prompts-per-step 4 --group-size 3"
    " --minibatch-prompts 2 --max-new-tokens 12 --eval-problems 4 --eval-samples 2 --eval-every 1"
    " --dtype float64 --seed 5 --lr 1e-3"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One whole run on the CPU and one on the pretended GPU: ({device: directory}, host waits of
    each update, host waits of a whole step's update_policy)."""
    folder, updates, policies = tmp_path_factory.mktemp("gpu"), [], []
    (folder / "grade.py").write_text(GRADE)
    directories = {device: folder / device for device in ("cpu", "cuda")}

    def counted(function, counts):
        def watched(*args, **options):
            before = gpu.waits.copy()
            result = function(*args, **options)
            counts.append(gpu.waits - before)
            return result

        return watched

    for device, directory in directories.items():
        argv = [*RUN.split(), "--device", device, "--run-dir", str(directory)]
        argv += ["--reward", f"{folder}/grade.py:grade", "--micro-tokens", "90"]
        if device == "cpu":
            train.main(argv)
            continue
        with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_minibatch", counted(train.train_minibatch, updates))
            patch.setattr(train, "update_policy", counted(train.update_policy, policies))
            assert torch.backends.cuda.cudnn_sdp_enabled()
            train.main(argv)
            # It would plan for each shape of attention that it meets, 0.4 s each.
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    return directories, updates, policies


def lines(directory, name):
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def assert_close(one, other, place):
    """Equal JSON values, numbers up to float64 rounding; what was measured may differ."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name in one:
            if not any(word in name for word in ("second", "memory")):
                assert_close(one[name], other[name], f"{place} {name}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other)):
            assert_close(a, b, f"{place} {i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-9, rel=1e-7), place
    else:
        assert one == other, place


def test_a_whole_run_is_the_cpus(runs):
    """Warm start, two steps with a KL term, evaluation, checkpoint and export, in float64."""
    cpu, gpu = (runs[0][device] for device in ("cpu", "cuda"))
    for name in ("metrics.jsonl", "groups.jsonl", "eval.jsonl"):
        ours, theirs = lines(gpu, name), lines(cpu, name)
        assert len(ours) >= 2
        assert_close(ours, theirs, name)
    metrics = lines(gpu, "metrics.jsonl")
    assert all(line["grad_norm"] > 0.01 and line["kl"] >= 0 for line in metrics)
    assert json.loads((gpu / "run.json").read_text())["flags"]["device"] == "cuda"
    exported, expected = (
        Transformer.from_pretrained(place / "model").state_dict() for place in (gpu, cpu)
    )
    for name in expected:
        torch.testing.assert_close(exported[name], expected[name], atol=1e-7, rtol=1e-6)


def test_updates_seldom_wait_for_the_gpu(runs):
    """At ce7ac25 a micro-batch made the host wait 17 times, so that the GPU ran dry in between."""
    _, updates, policies = runs
    assert len(updates) == 4 and len(policies) == 2
    for waits in updates:
        assert waits.total() <= 26, waits
    for waits in policies:
        assert waits.total() <= 2 * 26 + 20, waits


def test_two_devices_and_waits_are_noticed():
    """The pretended GPU itself: what a real one refuses, what makes the host wait, and what not."""
    on_cpu = torch.arange(4.0)
    with pretended_gpu() as gpu:
        x = torch.arange(4.0, device="cuda")
        assert (x.device.type, x.is_cuda, on_cpu.is_cuda) == ("cuda", True, False)
        with pytest.raises(RuntimeError, match="operands on cuda and on cpu"):
            x + on_cpu
        y = torch.where(x > 1, x * 2 + 1, 0.0)[:3].view(3, 1)
        y += 1
        z = on_cpu.pin_memory().to("cuda", non_blocking=True)
        assert gpu.waits.total() == 0 and gpu.kernels.total() >= 5
        for wait in (
            lambda: on_cpu.to("cuda"),
            lambda: x.cpu(),
            lambda: float(x[0]),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 2],
            lambda: bool((x == z).all()),
            lambda: torch.equal(x, z),
            lambda: x.repeat_interleave(x.long()),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: torch.cuda.synchronize(),
        ):
            gpu.reset()
            wait()
            assert gpu.waits.total() >= 1
            assert all(line.startswith("test_gpu.py:") for line in gpu.waits)
        assert y.tolist() == [[1.0], [1.0], [6.0]]
    assert not torch.cuda.is_available() and torch.tensor([1]).device.type == "cpu"


def test_attention_kernels_are_those_of_pytorch():
    """Grouped heads in float32, and float64, take the math kernel; layouts are the kernels'."""

    def attend(dtype, masked=False, heads=4, kv_heads=2, **options):
        with pretended_gpu() as gpu:
            q = torch.ones(2, heads, 6, 8, dtype=dtype, device="cuda")
            k = torch.ones(2, kv_heads, 6, 8, dtype=dtype, device="cuda")
            mask = torch.zeros(2, 1, 6, 6, dtype=dtype, device="cuda") if masked else None
            grouped = heads != kv_heads
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, k, attn_mask=mask, enable_gqa=grouped, **options
            )
            assert out.shape == q.shape and not out.is_contiguous()
            ((kernel, _, _),) = gpu.attentions
            return kernel, gpu.padded_masks

    assert attend(torch.bfloat16, is_causal=True) == ("flash", 0)
    assert attend(torch.bfloat16, masked=True, kv_heads=4) == ("efficient", 1)
    assert attend(torch.float32, is_causal=True) == ("math", 0)
    assert attend(torch.float32, kv_heads=4, is_causal=True) == ("efficient", 0)
    assert attend(torch.float64, kv_heads=4, is_causal=True) == ("math", 0)


def test_the_script_for_a_real_gpu_is_in_order(tmp_path):
    """gpu_check.py will be run on borrowed minutes, when there is no time to mend it."""
    script, report = Path(__file__).with_name("gpu_check.py"), tmp_path / "report.json"
    command = [sys.executable, script, "--device", "cpu", "--quick", "--json", report]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = json.loads(report.read_text())["steps"]
    assert len(steps) == 10 and all(entry["ok"] for entry in steps.values())
    assert steps["resume"]["figures"]["killed"] and steps["samples"]["figures"]["tokens"] > 100


def test_a_failing_step_of_that_script_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    """Errors, time-outs and processes that die stand in the table, and the exit code is 1."""
    steps = {
        "error": lambda args: 1 / 0,
        "endless": lambda args: time.sleep(60),
        "dead": lambda args: os._exit(9),
        "fine": lambda args: {"figure": 1.25},
    }
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    command = ["gpu_check.py", "--device", "cpu", "--timeout", "1", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "report.json")])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    found = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert end.value.code == 1 and [found[name]["ok"] for name in steps] == [False] * 3 + [True]
    assert found["error"]["error"] == "ZeroDivisionError: division by zero"
    assert found["endless"]["error"] == "no end after 1 s"
    assert found["dead"]["error"] == "the process ended with code 9"
    assert found["fine"]["figures"] == {"figure": 1.25} and "fine" in capsys.readouterr().out
