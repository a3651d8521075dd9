"""A training on two hosts, by torchrun over gloo; and what happens when the link is cut."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launching import Finished, Launcher, plain_environment, steps_trained, training_processes
from two_hosts import Host, NoNamespaces, two_hosts

pytestmark = pytest.mark.slow

TIMEOUT = 15
"""Of `engine.timeout_seconds`, in the test that cuts the link."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as hosts:
            yield hosts
    except NoNamespaces as reason:
        pytest.skip(str(reason))


def start(
    launcher: Launcher, hosts: tuple[Host, Host], port: int, *arguments: str
) -> list[subprocess.Popen[str]]:
    """A worker on each host: the command of docs and cluster/README.md, given on both."""
    processes = []
    for rank, host in enumerate(hosts):
        command = launcher.command("torchrun", 1, [*launcher.settings, *arguments])
        at = command.index("--master-port")
        nodes = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", hosts[0].address]
        command[at : at + 2] = [*nodes, "--master-port", str(port)]
        environment = plain_environment() | {"GLOO_SOCKET_IFNAME": host.interface}
        processes.append(launcher.popen(host.command(command), environment))
    return processes


def ended(launcher: Launcher, processes: list[subprocess.Popen[str]], seconds: float) -> Finished:
    return launcher.wait(processes, time.monotonic() + seconds)


def test_two_hosts_train_as_one_with_two_workers_and_both_are_measured(
    launcher: Launcher, hosts: tuple[Host, Host]
) -> None:
    words = ["training.max_steps=12", "checkpoint.every_epochs=0", "schedule.name=constant"]
    alone = launcher.run("by hand", 2, "run.name=alone", *words)
    assert alone.exit_code == 0, alone.output
    # Longer, for a reading of the load every ten seconds; the first steps are the same.
    words[0] = "training.max_steps=100000"
    limits = ["training.max_seconds=25", "training.epochs=100000"]
    tracked = ["tracking.mlflow=true", "run.name=apart", *limits]
    apart = ended(launcher, start(launcher, hosts, 29611, *words, *tracked), 150)
    assert apart.exit_code == 0, apart.output
    ours, theirs = launcher.losses("apart"), launcher.losses("alone")
    first = [ours[step] for step in range(1, 4)]
    assert first == [theirs[step] for step in range(1, 4)]
    folder = launcher.root / "apart"
    assert "system/node_1/cpu_utilization" in (folder / "system-1.jsonl").read_text()
    assert not left_over(launcher.root)


def test_a_cut_link_ends_both_hosts_and_the_run_goes_on_when_it_is_mended(
    launcher: Launcher, hosts: tuple[Host, Host]
) -> None:
    words = ["training.epochs=400", "checkpoint.every_steps=20", "checkpoint.every_epochs=0"]
    words += ["schedule.name=constant", f"engine.timeout_seconds={TIMEOUT}"]
    processes = start(launcher, hosts, 29612, "run.name=cut", "training.max_steps=4000", *words)
    folder = launcher.root / "cut"
    deadline = time.monotonic() + 90
    while not list((folder / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.1)
    hosts[1].set_link("down")
    cut = time.monotonic()
    try:
        # Torchrun itself waits for its agents' last words; the workers end by the fault rules.
        while left_over(launcher.root):
            assert time.monotonic() < cut + 2 * TIMEOUT + 30, "a worker was left behind"
            time.sleep(0.2)
        lost = ended(launcher, processes, 90)
    finally:
        hosts[1].set_link("up")
    assert lost.exit_code != 0
    assert len(lost.error_lines) >= 2, lost.output  # Each host says what it saw.
    assert "Traceback" not in "\n".join(lost.error_lines)

    newest = max(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*[0-9]"))
    goal = newest + 40
    again = start(
        launcher,
        hosts,
        29613,
        "run.name=cut",
        "--resume",
        "auto",
        *words,
        f"training.max_steps={goal}",
    )
    done = ended(launcher, again, 120)
    assert done.exit_code == 0, done.output
    trained = steps_trained(folder)
    assert set(trained) == set(range(1, max(trained) + 1))
    assert all(trained[step] == 1 for step in range(1, newest + 1))
    assert max(trained) >= goal


def left_over(root: Path) -> list[psutil.Process]:
    """Trainings on either host; torchrun's own process is none."""
    # As it was when it was found: meanwhile it may have ended.
    return [
        p for p in training_processes(root) if "torchrun" not in " ".join(p.info["cmdline"][:3])
    ]
