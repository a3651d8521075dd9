"""The benchmark of the head: its arithmetic, its model of Partial FC, and that it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))  # The modules of a tool lie beside it and are no package.

import bench_head  # noqa: E402
import bench_head_compare as compare  # noqa: E402
import bench_head_figures as figures  # noqa: E402
import bench_head_gpu as gpu  # noqa: E402
import bench_head_measure as measure  # noqa: E402
import bench_head_peers as peers  # noqa: E402
import bench_head_rates as rates  # noqa: E402
import bench_head_report as report  # noqa: E402
import bench_head_scaling as scaling  # noqa: E402
import bench_head_variants as variants  # noqa: E402
import bench_head_verdicts as verdicts  # noqa: E402

from dist_dml.errors import RunError  # noqa: E402

CPU = torch.device("cpu")
SMALL = variants.Size(96, 8, 6)
FLOAT32 = variants.DEFAULTS["float32"].name
BF16 = variants.DEFAULTS["bfloat16"].name
CHUNKED = figures.CHUNKED


def comparison_of(times, gemm=(1e-9, 1e-9, 1e-9), exponential=(1e-30,) * 3):
    """A comparison by hand: C = 1000, D = 10, R = 5, three repetitions."""
    rate_times = {"float32": [*gemm], "bfloat16": [0.5 * g for g in gemm]}
    rate_times["exponentials"] = [*exponential]
    size = variants.Size(1000, 10, 5)
    work = {kind: {"best_shape": (1, 2, 3)} for kind in rate_times}
    runs = dict.fromkeys(times, "")
    return compare.Comparison(size, CPU, times, rate_times, work, True, runs=runs)


def problem(dtype=torch.float64, num_classes=40, dim=6, num_rows=5):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(num_rows, dim, generator=generator, dtype=dtype)
    weight = torch.randn(num_classes, dim, generator=generator, dtype=dtype)
    labels = torch.tensor([7, 0, 39, 7, 21])[:num_rows]
    # Rows near their classes, as in training, so that no probability meets the published clamp.
    rows = rows * 0.2 + weight[labels]
    return rows.requires_grad_(), nn.Parameter(weight), labels


def gradients(function, rows, weight, labels):
    return torch.autograd.grad(function(rows, weight, labels), [rows, weight])


def test_partial_fc_with_all_classes_is_the_dense_loss_of_cosines_with_a_margin():
    rows, weight, labels = problem()

    def dense(rows, weight, labels):
        cosines = F.cosine_similarity(rows[:, None], weight[None], dim=2)
        margin = peers.MARGIN * F.one_hot(labels, len(weight)).double()
        return F.cross_entropy(peers.SCALE * (cosines - margin), labels)

    def published(rows, weight, labels):
        return peers.partial_fc(rows, weight, labels, rate=1.0)

    want, got = dense(rows, weight, labels), published(rows, weight, labels)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert peers.cosface(rows, weight, labels).item() == pytest.approx(want.item(), rel=1e-12)
    got_gradients = gradients(published, rows, weight, labels)
    want_gradients = gradients(dense, rows, weight, labels)
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-10, atol=1e-13)


def test_a_sample_holds_the_labels_and_says_where():
    labels = torch.tensor([7, 0, 39, 7])
    index, places = peers.sampled_classes(labels, 40, 0.25)
    assert len(index) == 10
    assert torch.equal(index, index.unique())
    assert torch.equal(index[places], labels)
    # More labels than the budget exceed it.
    index, places = peers.sampled_classes(labels, 40, 0.05)
    assert index.tolist() == [0, 7, 39]
    assert places.tolist() == [1, 0, 2, 1]


def test_a_sampled_step_is_the_dense_one_over_its_sample_and_its_gradient_has_all_rows():
    rows, weight, labels = problem()
    torch.manual_seed(5)
    index, places = peers.sampled_classes(labels, len(weight), 0.25)
    inner = weight.detach()[index].requires_grad_()
    want = gradients(peers.cosface, rows, inner, places)
    torch.manual_seed(5)
    got = gradients(lambda *a: peers.partial_fc(*a, rate=0.25), rows, weight, labels)
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-13)
    assert got[1].shape == weight.shape
    torch.testing.assert_close(got[1][index], want[1], rtol=1e-10, atol=1e-13)
    outside = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, index, False)
    assert torch.count_nonzero(got[1][outside]) == 0


def test_ratios_are_taken_within_a_repetition_in_which_both_were_measured():
    spread = measure.paired([2.0, 9.0, None, 40.0], [1.0, None, 5.0, 10.0])
    assert (spread.low, spread.median, spread.high) == (2.5, 3.0, 3.5)
    assert measure.Spread.of([4.0]) == measure.Spread(4.0, 4.0, 4.0)


def test_everything_takes_turns_and_what_is_slow_sits_some_out():
    calls = []

    def taking(name, seconds):
        def measured():
            calls.append(name)
            return seconds

        return measured

    slow = 2.0 * measure.PATIENCE_SECONDS
    times = measure.take_turns({"a": taking("a", 1.0), "b": taking("b", slow)}, 4, "test")
    assert times == {"a": [1.0] * 4, "b": [slow, None, None, slow]}
    assert "".join(calls) == "ab" + "a" + "a" + "ba"
    very_slow = {"c": taking("c", 100.0 * measure.PATIENCE_SECONDS)}
    assert measure.take_turns(very_slow, 3, "test")["c"].count(None) == 2


def test_the_bound_is_eight_products_and_two_exponentials_a_logit():
    size = variants.Size(1000, 10, 5)
    assert rates.bound_seconds(size, 1e-3, 0.0) == pytest.approx(8 * 5 * 1000 * 10 * 1e-3)
    assert rates.bound_seconds(size, 0.0, 1e-3) == pytest.approx(2 * 5 * 1000 * 1e-3)
    measures, work = rates.rate_measures(SMALL, CPU, seconds=0.001)
    assert set(measures) == set(work) == set(compare.RATES)
    assert all(0 < function() < 1e-3 for function in measures.values())


def test_ratios_of_a_comparison_worked_by_hand():
    times = {
        peers.PLAIN: [4.0, 5.0, 6.0],
        CHUNKED: [3.0, None, 3.0],
        peers.SAMPLED: [2.0, 2.0, 2.0],
        FLOAT32: [1.0, 1.0, 2.0],
        BF16: [0.5, 0.5, 0.5],
    }
    found = comparison_of(times, gemm=(1e-6, 1e-6, 2e-6), exponential=(1e-6, 1e-6, 1e-6))
    # The sampled peer is faster and not exact, so it is no peer to be ahead of.
    assert found.fastest_peer() == CHUNKED
    assert found.over(CHUNKED, FLOAT32) == measure.Spread(2.25, 1.875, 2.625)
    # 8 R C D = 400,000 operations and 10,000 exponentials of a microsecond each.
    assert found.bounds("float32") == pytest.approx([0.41, 0.41, 0.81])
    assert found.bounds("bfloat16") == pytest.approx([0.21, 0.21, 0.41])
    assert found.over_bound(FLOAT32).median == pytest.approx(1 / 0.41)
    assert found.gemm_share(FLOAT32).median == pytest.approx(0.3)
    assert found.gemm_share(peers.SAMPLED).median == pytest.approx(0.015)


def test_a_verdict_compares_its_median_with_what_is_asked():
    def verdict(median, at_least=True, resolved=None):
        reached = None if median is None else measure.Spread(median, median - 0.5, median + 0.5)
        return verdicts.Verdict("w", "c", "a", 3.0, "x", at_least, reached, resolved, "n")

    assert verdict(3.0).holds is True
    assert verdict(2.9).holds is False
    assert verdict(2.9, at_least=False).holds is True
    assert verdict(None).holds is None
    assert verdict(3.2).line() == (
        "yes 3.20x (2.70 to 3.70)           asked >= 3x       | w | c | against a | n"
    )
    assert verdict(2.4, resolved=2.5).line().endswith("| n | and below 2.5x")
    assert "and below" not in verdict(2.6, resolved=2.5).line()
    assert verdict(None).line().startswith("-   not measured")


def test_the_cpu_rows_are_judged_from_what_was_measured():
    times = {
        peers.PLAIN: [4.0, 4.0, 4.0],
        peers.SAMPLED: [2.0, 2.0, 2.0],
        FLOAT32: [1.0, 1.0, 1.0],
        BF16: [1.0, 1.0, 1.0],
    }
    # The bounds are 0.8 s in float32 and 0.4 s in bfloat16.
    found = comparison_of(times, gemm=(2e-6, 2e-6, 2e-6))
    found.extra = {FLOAT32: 65 * 2**20, BF16: 2**20, peers.PLAIN: 2**30}
    sizes = (SMALL, SMALL)
    extra = (2**20, 4 * 2**20)
    grown = scaling.Scaling(FLOAT32, sizes, ([1.0, 1.0], [1.1, 1.1]), extra)
    uneven = scaling.Scaling(BF16, sizes, ([1.0, 1.0], [0.8, 0.8]), (2**20, 64 * 2**20))
    crew = scaling.Workers(FLOAT32, SMALL, 2, [1.0, 2.0], [1.1, 2.2])
    lines = verdicts.cpu_verdicts(found, [grown, uneven], [crew], True)
    judged = [(v.what.removeprefix("dist_dml, "), v.holds) for v in lines]
    assert judged == [
        ("float32 faster", True),
        ("IEEE float32 faster", None),
        ("bf16 tiles faster", False),
        ("bf16 tiles, cosface, exact, faster", None),
        ("bf16 tiles, exact, faster", True),
        ("float32, extra memory", False),
        ("IEEE float32, extra memory", None),
        ("bf16 tiles, extra memory", True),
        ("float32, time over the bound", True),
        ("IEEE float32, time over the bound", None),
        ("bf16 tiles, time over the bound", False),
        ("float32, time per class, largest over smallest", True),
        ("float32, extra memory, largest over smallest", True),
        ("bf16 tiles, time per class, largest over smallest", False),
        ("bf16 tiles, extra memory, largest over smallest", False),
        ("float32, 2 workers x 1 thread, time over that of one", True),
        ("bf16 tiles, 2 workers x 1 thread, time over that of one", None),
    ]
    nothing = verdicts.cpu_verdicts(None, [], [], True)
    assert [v.what for v in nothing][:2] == [v.what for v in lines][:2]
    assert all(v.holds is None and v.note for v in nothing)


def test_without_a_gpu_its_rows_are_there_and_not_measured():
    lines = [verdict.line() for verdict in gpu.gpu_verdicts([], [])]
    assert len(lines) == 8
    assert all("not measured" in line and line.endswith("no GPU at hand") for line in lines)


def test_gpu_rows_are_judged_from_what_was_measured():
    best = replace(variants.DEFAULTS["bfloat16"], backend="triton", sweep="recompute").name
    times = {peers.PUBLISHED: [3.0] * 3, peers.SAMPLED: [1.5] * 3, best: [1.0] * 3, BF16: [2.0] * 3}
    rate = 1.5 / (8.0 * gpu.LARGE.num_classes * 512 * 1024)
    found = replace(comparison_of(times, gemm=(rate,) * 3), size=gpu.LARGE)
    trained = gpu.Training(gpu.LARGEST[0], 9.0, 3.0, 2**30)
    failed = gpu.Training(gpu.LARGEST[1], 0.0, 0.0, 0, "out of memory")
    lines = gpu.gpu_verdicts([found], [trained, failed])
    assert [v.holds for v in lines] == [True, None, True, None, None, None, False, True]
    assert lines[0].reached is not None
    assert lines[0].reached.median == pytest.approx(0.75)
    assert (lines[3].note, trained.falls, failed.falls) == ("out of memory", True, False)


def test_training_on_one_batch_lowers_the_loss():
    trained = gpu.train(variants.DEFAULTS["float32"], SMALL, CPU, steps=5)
    assert trained.falls


@pytest.mark.parametrize("name", [peers.PLAIN, CHUNKED, peers.PUBLISHED, FLOAT32, BF16])
def test_errors_are_those_of_the_dtype_read_off_the_update(name):
    tolerance = 0.05 if name == BF16 else 1e-5
    errors = measure.errors_of(name, variants.Size(512, 32, 16), CPU)
    assert set(errors) == {"loss", "rows", "weights"}
    # The published clamp of probabilities at 1e-30 is not an error of rounding.
    limits = {"loss": 1.0} if name == peers.PUBLISHED else {}
    assert all(value < limits.get(key, tolerance) for key, value in errors.items()), errors


def test_every_variant_has_a_name_of_its_own():
    known = variants.every_variant()
    assert all(variant.name == name for name, variant in known.items())
    assert len(set(known.values())) == len(known)
    assert not set(known) & set(peers.PEERS)


def test_variants_of_a_kind_and_peers_share_weights_and_momentum():
    names = [peers.PLAIN, peers.PUBLISHED, FLOAT32, BF16, variants.COSFACE["float32"].name]
    heads, refused, _ = compare.shared_heads(names, SMALL, CPU)
    assert not refused
    assert set(heads) == set(names)
    rows, labels = variants.batch(SMALL, CPU)
    before = heads[FLOAT32].weight.detach().clone()
    for head in heads.values():
        measure.step_of(head, rows, labels)()
    assert len({head.weight.data_ptr() for head in heads.values()}) == 1
    (state,) = {head.state()["weight|momentum_buffer"].data_ptr() for head in heads.values()}
    assert state
    assert not torch.equal(before, heads[FLOAT32].weight)
    assert heads[FLOAT32].resident_bytes == 2 * 4 * SMALL.num_classes * SMALL.embedding_dim


def test_a_size_beyond_the_memory_is_refused_with_what_it_needs():
    huge = variants.Size(10**10, 128, 256)
    with pytest.raises(RunError, match=r"needs about [\d.]+ GiB and [\d.]+ GiB are free"):
        compare.compare([FLOAT32], huge, CPU, 2)


def test_rows_of_json_have_the_keys_of_all_benchmarks():
    found = comparison_of({peers.PLAIN: [4.0, 5.0, 6.0], FLOAT32: [1.0, None, 2.0]})
    found.extra, found.errors = {FLOAT32: 5}, {FLOAT32: {"loss": 1e-7, "rows": 2e-7}}
    where = report.machine(CPU)
    rows = json.loads(json.dumps(report.rows_of(found, where)))
    keys = {"name", "variant", "config", "seconds_median", "seconds_spread", "extra_bytes"}
    assert all(keys | {"error", "machine", "date"} <= set(row) for row in rows)
    assert [row["kind"] for row in rows] == ["peer", "project"]
    assert rows[1]["time_over"]["fastest_peer"]["median"] == pytest.approx((1 / 4 + 2 / 6) / 2)
    assert (rows[1]["config"]["repeats"], rows[1]["error"], rows[1]["extra_bytes"]) == (2, 2e-7, 5)
    table = report.table(found)
    assert f"| {FLOAT32} | 1500 (1250 to 1750) | 2 |" in table
    assert "fastest peer: F.linear + F.cross_entropy" in table


def test_a_busy_machine_is_told():
    quiet = report.machine(CPU) | {"load": 0.1, "cores": 2}
    assert report.load_warning(quiet) == ""
    assert "not to be trusted" in report.load_warning(quiet | {"load": 2.5})


def test_figures_are_drawn_from_comparisons(tmp_path):
    times = {name: [1.0, 2.0, 3.0] for name in figures.SHOWN}
    found = []
    for count in (1000, 10_000):
        one = replace(comparison_of(times), size=variants.Size(count, 10, 5))
        one.extra = {peers.PLAIN: count * 2**10, FLOAT32: 0}
        found.append(one)
    paths = figures.write_figures(found, found[:1], tmp_path / "figures")
    assert [path.name for path in paths] == ["head_time.png", "head_memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "--repeats=1: must be 2 or more"),
        (["--classes", "0"], "--classes=0: must be 1 or more"),
        (["--json", "/no/such/folder/x.json"], "its folder does not exist"),
        (["--parts", "main", "--only", "no such"], "no such variant; known: F.linear"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(arguments, message, capfd):
    try:
        status = bench_head.main(["--quick", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capfd.readouterr().err


def run_tool(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "bench_head.py"), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


@pytest.mark.slow
def test_a_quick_run_measures_every_part_and_writes_everything(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--quick", "--json", str(out), "--figures", str(tmp_path / "figures")]
    process = run_tool(*arguments, stderr=subprocess.PIPE, cwd=tmp_path)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    content = json.loads(out.read_text())
    assert {row["variant"] for row in content["rows"]} >= {*peers.PEERS, FLOAT32, BF16}
    main = [row for row in content["rows"] if row["config"]["num_classes"] == 20_000]
    assert all(row["extra_bytes"] is not None for row in main)
    plain = next(row for row in main if row["variant"] == peers.PLAIN)
    ours = next(row for row in main if row["variant"] == FLOAT32)
    # Three copies of the logits and a gradient of the weights' size; we may keep the logits once.
    assert plain["extra_bytes"] > 4 * 20_000 * (2 * 64 + 32)
    assert ours["extra_bytes"] < 4 * 20_000 * (64 + 32)
    assert ours["errors"]["weights"] < 1e-5
    verdict_names = [verdict["what"] for verdict in content["verdicts"]]
    assert len(verdict_names) == 25
    for line in content["verdicts"][:14]:
        assert line["holds"] is not None, line
    assert printed.count("not measured") >= 8 or torch.cuda.is_available()
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    # The largest size of the figures is the main one, which is not measured twice.
    assert len(main) == len({row["variant"] for row in main})
    assert "about" in errors
    assert "left" in errors


@pytest.mark.slow
def test_workers_end_when_the_benchmark_is_killed():
    process = run_tool("--quick", "--parts", "workers", "--repeats", "9", stderr=subprocess.DEVNULL)
    workers: list[int] = []
    ended = time.monotonic() + 60
    while len(workers) < 3 and time.monotonic() < ended:
        time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()]
    assert len(workers) == 3
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ended = time.monotonic() + 60
    while any(map(_lives, workers)) and time.monotonic() < ended:
        time.sleep(0.2)
    assert not any(map(_lives, workers))


def _lives(pid):
    """Whether a process exists and is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
