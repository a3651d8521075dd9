"""The benchmark over workers: its arithmetic, its counting of bytes, and that it runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))  # The modules of a tool lie beside it and are no package.

import bench_scaling as tool  # noqa: E402
import bench_scaling_links as links  # noqa: E402
import bench_scaling_predict as prediction  # noqa: E402
import bench_scaling_report as report  # noqa: E402
from bench_scaling_worker import Size  # noqa: E402

from dist_dml.estimate_embedder import EmbedderCost  # noqa: E402
from dist_dml.parallel.machine import find_machine  # noqa: E402


def asked(*given):
    return tool.parser().parse_args(["--out", "x", *map(str, given)])


def row_of(mode, workers, head, crowding=1.0, error=None):
    row = tool.point_of(mode, Size(workers, 100, 8, 8, 1, 16)) | {"error": error}
    told = {"head_seconds": head, "step_seconds": 2 * head, "crowding": crowding}
    told |= {"head_link_bytes": 1024.0, "step_link_bytes": 2048.0}
    counted = {"head_group": 1024, "head_socket": None, "step_group": 2048, "step_socket": 3072.0}
    return row | {
        "head_seconds_median": head,
        "head_seconds_spread": 0.001,
        "head_cpu_seconds_median": head / 2,
        "head_cpu_seconds_spread": 0.0,
        "seconds_median": 2 * head,
        "seconds_spread": 0.002,
        "cpu_seconds_median": head,
        "cpu_seconds_spread": 0.0,
        "predicted": told,
        "links": counted,
    }


def test_classes_and_rows_grow_as_the_mode_says():
    given = asked("--workers", 4, 1, "--classes", 1000, "--rows", 16)
    sizes = {
        mode: [(s.num_workers, s.num_classes, s.rows) for s in tool.sizes_of(given, mode)]
        for mode in tool.MODES
    }
    assert sizes == {
        "strong": [(1, 1000, 16), (4, 1000, 16)],
        "weak": [(1, 1000, 16), (4, 4000, 64)],
        "weak_classes": [(1, 1000, 16), (4, 4000, 16)],
    }


def test_rows_are_dealt_out_evenly_and_without_loss():
    counts = Size(3, 10, 8, 4, 1, 16).row_counts
    assert (sum(counts), max(counts) - min(counts)) == (8, 1)


def test_efficiency_is_the_ideal_over_the_measured_time():
    rows = [
        row_of("strong", 1, 0.100),
        row_of("strong", 2, 0.060),
        row_of("strong", 4, 0.060, crowding=2.0),  # Two cores: the ideal is theirs.
        row_of("weak", 1, 0.100),
        row_of("weak", 2, 0.250),  # Every worker meets the rows of all: 2 x is ideal.
        row_of("weak_classes", 2, 0.1),  # Nothing to compare with.
    ]
    found = report.efficiencies(rows)
    values = [found.get(row["key"]) for row in rows]
    assert values[:5] == pytest.approx([1.0, 0.1 / 2 / 0.06, 0.05 / 0.06, 1.0, 0.8])
    assert values[5] is None


def test_what_a_collective_brings_to_a_worker():
    assert links.moved_bytes("c10d::_allgather_base_", [400, 100], 4) == 300
    assert links.moved_bytes("c10d::_reduce_scatter_base_", [100, 400], 4) == 300
    assert links.moved_bytes("c10d::allreduce_", [400], 4) == 600
    assert links.moved_bytes("c10d::alltoall_base_", [400, 400], 4) == 300
    assert links.moved_bytes("c10d::allgather_", [100, 100, 100, 100, 100], 4) == 300
    assert links.moved_bytes("c10d::barrier", [4], 4) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the sockets' counters are Linux's")
def test_sockets_tell_what_they_have_received():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as receiver,
    ):
        before = links.socket_bytes()
        sender.sendall(bytes(12_345))
        left = 12_345
        while left:
            left -= len(receiver.recv(left))
        after = links.socket_bytes()
    assert before is not None
    assert after == before + 12_345


def test_the_worker_that_receives_most_counts():
    answers = [
        {
            "head": {"received": {"a": 10, "b": 5}, "socket": 20.0},
            "whole": {"received": {"a": 30}, "socket": 40.0},
        },
        {
            "head": {"received": {"a": 12, "b": 5}, "socket": 22.0},
            "whole": {"received": {"a": 28}, "socket": None},
        },
    ]
    found = tool.links_of(answers)
    assert (found["head_group"], found["head_socket"]) == (17, 22.0)
    assert (found["step_group"], found["step_socket"]) == (30, None)


def test_the_prediction_shares_the_cores():
    machine = find_machine("cpu")
    embedder = EmbedderCost(8, 1000, 1e6, 1e3, "", measured_seconds=1e-3)
    one, four = Size(1, 4000, 16, 8, 1, 16), Size(4, 4000, 16, 8, 1, 16)
    assert prediction.crowding(one, cores=2) == 1.0
    assert prediction.crowding(four, cores=2) == 2.0
    told = prediction.predict(one, machine, embedder)
    assert told["head_link_bytes"] == told["step_link_bytes"] == 0
    assert told["step_seconds"] == pytest.approx(told["head_seconds"] + 16e-3)
    # Rows and their gradient, labels, and three numbers a row there and back, of 12 of 16 rows.
    assert prediction.predict(four, machine, embedder)["head_link_bytes"] == pytest.approx(
        12 * (2 * 4 * 8 + 8 + 2 * 3 * 4)
    )


def test_the_table_marks_crowded_crews_and_hides_no_failure(tmp_path):
    rows = [
        row_of("strong", 1, 0.1),
        row_of("strong", 4, 0.06, crowding=2.0),
        row_of("weak", 2, 0.1, error="a worker ended with status 1"),
    ]
    text = report.table(rows)
    assert "| strong | 1 | 100 | 8 | 100.0 (1.0) | 50.0 (0.0) | 100.0 | 100% |" in text
    assert "| 60.0 (1.0)* |" in text
    assert "1.0, -, 1.0" in text
    assert "| weak | 2 | 100 | 8 | a worker ended with status 1 |" in text
    assert text.endswith("so does the prediction.")
    report.draw(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "word"), [([], "--out"), (["--out", "x", "--workers", "0"], "--workers")]
)
def test_a_mistake_is_refused_before_anything_is_measured(given, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(given)
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
def test_workers_are_measured_once_and_their_bytes_are_those_of_the_model(tmp_path):
    command = [sys.executable, str(TOOLS / "bench_scaling.py"), "--out", str(tmp_path)]
    command += ["--workers", "1", "2", "--modes", "strong", "--classes", "600", "--rows", "16"]
    command += ["--dim", "8", "--image", "16", "--repeats", "2"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 2
    one, two = json.loads((tmp_path / "scaling.json").read_text())
    assert one["links"]["head_group"] == one["links"]["step_group"] == 0
    assert two["links"]["head_group"] == two["predicted"]["head_link_bytes"]
    # The embedder's gradients come on top, and the sums of its batch norms.
    assert two["links"]["step_group"] > two["predicted"]["step_link_bytes"]
    if two["links"]["head_socket"] is not None:
        assert two["links"]["head_socket"] >= two["links"]["head_group"]
    assert all(row["seconds_median"] > row["head_seconds_median"] > 0 for row in (one, two))
    assert (tmp_path / "scaling.png").is_file()
