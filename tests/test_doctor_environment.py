"""What the doctor says of versions, hidden packages, traps, GPUs, FAISS, compilers, networks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

from dist_dml.doctor import devices, environment, kernels, network, versions
from dist_dml.doctor.devices import DriverGpu, Gpu
from dist_dml.doctor.environment import TRAPS
from dist_dml.doctor.findings import Finding
from dist_dml.doctor.network import Interface
from dist_dml.parallel.world import Ranks

ROOT = Path(__file__).resolve().parents[1]


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in found}


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    )
    assert {name: pins[name] for name in versions.TESTED} == versions.TESTED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {re.split(r"[\[<>=!~; ]", text)[0].lower() for text in project["dependencies"]}
    assert needed <= set(versions.TESTED)
    assert needed.isdisjoint(versions.OPTIONAL)


def compared(**changed: str | None) -> dict[str, str]:
    found = versions.TESTED | {name.replace("_", "-"): value for name, value in changed.items()}
    return levels(list(versions.compare(found, tracks=True)))


def test_other_minor_versions_and_missing_packages_are_told() -> None:
    assert compared() == {"as tested": "ok"}
    assert compared(ray="2.60.7", torch="2.13.0+cu130") == {"as tested": "ok"}
    assert compared(torch="2.14.0")["torch"] == "note"
    assert compared(torch="2.12.1")["torch"] == "problem"
    assert compared(pyarrow="24.1")["pyarrow"] == "warning"
    assert compared(timm=None)["timm"] == "problem"
    assert compared(deepspeed=None)["not installed"] == "note"
    assert compared(mlflow=None)["mlflow"] == "warning"


def test_packages_that_ask_for_another_version_are_a_problem() -> None:
    found = {"torch": "2.14.0+cpu", "pyarrow": "25.0.1"}
    wants = {
        "torchvision": ["numpy", "torch (==2.13.0)"],
        "mlflow": ["pyarrow<26,>=4", "torch<2; extra == 'old'", "nonsense =="],
    }
    (wrong,) = versions.conflicts(wants, found)
    assert wrong.level == "problem"
    assert wrong.measured == "torchvision needs torch==2.13.0, and 2.14.0+cpu is installed"
    (fine,) = versions.conflicts(wants, found | {"torch": "2.13.0+cpu"})
    assert fine.level == "ok"


def test_hosts_with_different_versions_are_named() -> None:
    (found,) = versions.differing({"a": {"torch": "2.13.0"}, "b": {"torch": "2.12.0"}, "c": {}})
    assert found.level == "problem"
    assert found.measured == "2.13.0 on a, 2.12.0 on b, not installed on c"
    assert levels(list(versions.differing({"a": {"x": "1"}, "b": {"x": "1"}}))) == {
        "everywhere": "ok"
    }
    assert list(versions.differing({"a": {}})) == []


HARMFUL = {
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "NCCL_DEBUG": "INFO",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "GOMP_CPU_AFFINITY": "0-1",
    "MLFLOW_TRACKING_URI": "http://ann:s3cret@host",
    "PYTHONHOME": "/usr",
    "LD_PRELOAD": "/lib/x.so",
}
HARMLESS = {"TORCH_DISTRIBUTED_DEBUG": "OFF", "NCCL_DEBUG": "WARN"}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_each_trap_is_found_where_it_does_harm_and_only_there(trap: environment.Trap) -> None:
    (found,) = environment.traps({trap.name: HARMFUL.get(trap.name, "1")})
    assert (found.name, found.level) == (trap.name, trap.level)
    assert found.remedy
    assert "s3cret" not in found.measured
    default = "1" if trap.name == "TORCH_NCCL_ASYNC_ERROR_HANDLING" else ""
    harmless = HARMLESS.get(trap.name, default)
    assert [f.level for f in environment.traps({trap.name: harmless})] == ["ok"]


def test_files_that_hide_packages_are_found(tmp_path: Path) -> None:
    assert list(environment.shadows([tmp_path, tmp_path / "absent"], ["webdataset"])) == []
    (tmp_path / "webdataset").mkdir()  # Without __init__.py it gives way.
    (tmp_path / "my_module.py").write_text("")
    assert list(environment.shadows([tmp_path], ["webdataset"])) == []
    (tmp_path / "webdataset" / "__init__.py").write_text("")
    (tmp_path / "random.py").write_text("")
    (found,) = environment.shadows([tmp_path], ["webdataset"])
    assert found.level == "problem"
    assert found.measured.startswith(f"random, webdataset in {tmp_path}")


def test_a_package_in_two_places_is_told() -> None:
    (found,) = environment.twice({"torch": ["/a", "/b"], "numpy": ["/a", "/a"]})
    assert found.level == "warning"
    assert "/a and in /b" in found.measured


SMI = "0, NVIDIA H200, 580.159.03, 143771, Disabled, 0, Enabled\n"
H200 = Gpu(0, "NVIDIA H200", 140 * 2**30, 139 * 2**30, (9, 0), True, True)


def of_gpus(
    smi: str, visible: list[Gpu], built: str | None = "13.0", hidden: str | None = None, **more: int
) -> dict[str, Finding]:
    ranks = Ranks(0, more.get("workers", 1), 0, more.get("workers", 1))
    found = devices.compare(devices.parse_driver(smi), visible, built, hidden, ranks)
    return {finding.name: finding for finding in found}


def test_a_gpu_is_described_from_the_driver_and_from_pytorch() -> None:
    found = of_gpus(SMI, [H200])
    assert levels(list(found.values())) == {"GPU 0": "ok"}
    for text in ("NVIDIA H200", "580.159.03", "9.0", "bfloat16", "139 GiB free of 140 GiB"):
        assert text in found["GPU 0"].measured


@pytest.mark.parametrize(
    ("built", "hidden", "says"),
    [
        (None, None, "built without CUDA"),
        ("13.0", "", "hidden by CUDA_VISIBLE_DEVICES=''"),
        ("13.0", None, "PyTorch for CUDA 13.0 sees none"),
    ],
)
def test_gpus_that_pytorch_does_not_see_are_a_problem(
    built: str | None, hidden: str | None, says: str
) -> None:
    found = of_gpus(SMI, [], built, hidden)["GPUs"]
    assert found.level == "problem"
    assert says in found.measured
    assert of_gpus("", [], built, hidden)["GPUs"].level == "ok"


def test_what_is_wrong_with_a_gpu_is_told() -> None:
    taken = Gpu(0, "NVIDIA H200", 140 * 2**30, 90 * 2**30, (9, 0), True, True)
    old = Gpu(0, "Tesla V100", 32 * 2**30, 32 * 2**30, (7, 0), False, True)
    foreign = Gpu(1, "NVIDIA H200", 140 * 2**30, 140 * 2**30, (9, 0), True, False)
    assert of_gpus(SMI, [taken])["GPU 0"].level == "warning"
    assert of_gpus(SMI, [old])["GPU 0"].level == "note"
    assert of_gpus(SMI, [foreign])["GPU 1"].level == "problem"
    assert of_gpus(SMI, [old, H200])["kinds of GPUs"].level == "note"
    assert of_gpus(SMI, [H200], workers=2)["GPUs for workers"].level == "problem"
    bad = "0, NVIDIA H200, 580.1, 143771, Enabled, 4, Disabled\n1, X, 580.1, 1, [N/A], [N/A], [N/A]"
    found = levels(list(of_gpus(bad, [H200]).values()))
    assert found["GPU 0 MIG"] == "note"
    assert found["GPU 0 memory"] == "problem"
    assert found["persistence mode"] == "note"
    assert "GPU 1 memory" not in found


def test_kernels_fit_by_major_version_or_by_ptx() -> None:
    assert devices.has_kernels(["sm_80", "compute_90"], (12, 0))
    assert devices.has_kernels(["sm_90a"], (9, 0))
    assert not devices.has_kernels(["sm_86"], (8, 0))
    assert not devices.has_kernels(["sm_80", "sm_90"], (12, 0))


def test_a_device_that_computes_wrongly_is_found() -> None:
    assert devices.smoke(torch.device("cpu")).level == "ok"
    assert devices.smoke(torch.device("cpu"), wrong_by=0.02).level == "problem"
    assert devices.smoke(torch.device("cpu"), wrong_by=float("nan")).level == "problem"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_of_this_machine_are_described() -> None:
    driver: list[DriverGpu] = devices.ask_driver()
    found = list(devices.compare(driver, devices.visible_gpus(), torch.version.cuda, None, Ranks()))
    assert "GPU 0" in levels(found)
    assert {finding.level for finding in devices.smoke_findings()} == {"ok"}


def test_two_packages_that_bring_faiss_are_a_problem() -> None:
    none = dict.fromkeys(versions.FAISS)
    both: dict[str, str | None] = none | {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}
    (found,) = kernels.faiss_packages(both)
    assert found.level == "problem"
    assert "pip uninstall -y faiss-cpu faiss-gpu" in found.remedy
    assert levels(list(kernels.faiss_packages(none | {"faiss-cpu": "1.15.1"}))) == {
        "FAISS packages": "ok"
    }


def test_a_faiss_without_the_processors_instructions_is_slow() -> None:
    flags = frozenset({"avx2", "avx512f"})
    assert kernels.faiss_build("1", ["OPTIMIZE", "GENERIC"], "", None, flags).level == "warning"
    assert kernels.faiss_build("1", ["GENERIC"], "NONE", None, flags).level == "warning"
    assert kernels.faiss_build("1", ["GENERIC"], "AVX512", None, flags).level == "ok"
    found = kernels.faiss_build("1", ["OPTIMIZE", "AVX2"], "", 2, flags)
    assert found.measured == "1, AVX2, 2 GPU(s)"
    assert kernels.processor(frozenset()).level == "skipped"
    assert kernels.processor(frozenset({"sse2"})).level == "warning"


def test_neighbours_that_are_wrong_are_found() -> None:
    class Wrong:
        METRIC_INNER_PRODUCT = 0

        @staticmethod
        def knn(queries, gallery, k, metric):
            scores = torch.from_numpy(queries @ gallery.T)
            return scores.topk(k).values.numpy()[:, ::-1], None

    assert kernels.neighbours(Wrong()).level == "problem"


def test_a_compiler_that_cannot_build_is_told_with_its_words(tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    found = kernels.compiles([str(old)], tmp_path)
    assert found.level == "warning"
    assert "unrecognized option" in found.measured
    assert kernels.compiles([str(tmp_path / "absent")], tmp_path).level == "warning"


LO = Interface("lo", ("127.0.0.1", "::1"), True, 0)
ETH = Interface("eth0", ("10.0.0.5",), True, 25_000)
DOCKER = Interface("docker0", ("172.17.0.1",), True, 0)
ALL = [LO, ETH, DOCKER]


@pytest.mark.parametrize(
    ("addresses", "several", "alone", "level"),
    [
        (["10.0.0.5"], True, False, "ok"),
        (["127.0.1.1"], True, False, "problem"),
        (["127.0.1.1"], False, False, "ok"),
        (["172.17.0.1"], True, False, "problem"),
        (["10.9.9.9"], True, False, "warning"),
        ([], True, False, "problem"),
        ([], False, False, "warning"),
        ([], False, True, "note"),
    ],
)
def test_the_hosts_own_name_must_be_an_address_that_others_reach(
    addresses: list[str], several: bool, alone: bool, level: str
) -> None:
    found = network.own_name("me", addresses, ALL, several, alone, {})
    assert found.level == level
    chosen = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert network.own_name("me", addresses, ALL, several, alone, chosen).level == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "several", "level"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True, "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", True, "problem"),
        ("GLOO_SOCKET_IFNAME", "lo", True, "problem"),
        ("GLOO_SOCKET_IFNAME", "lo", False, "ok"),
        ("NCCL_SOCKET_IFNAME", "eth", True, "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", True, "problem"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True, "ok"),
        ("NCCL_SOCKET_IFNAME", "^docker,eth", True, "problem"),
    ],
)
def test_variables_that_name_interfaces_name_ones_that_are_there(
    variable: str, value: str, several: bool, level: str
) -> None:
    assert network.chosen_interface(variable, value, ALL, several).level == level


def test_the_meeting_point_is_no_loopback_for_several_hosts() -> None:
    assert network.meeting_point("localhost", ["127.0.0.1"], True).level == "problem"
    assert network.meeting_point("localhost", ["127.0.0.1"], False).level == "ok"
    assert network.meeting_point("absent", [], False).level == "problem"
    assert network.resolve("no-such-host.invalid") == []


def test_adapters_that_are_down_or_switched_off_are_told(tmp_path: Path) -> None:
    for port, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        folder = tmp_path / f"sys/class/infiniband/mlx5_0/ports/{port}"
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
        (folder / "rate").write_text("200 Gb/sec (4X HDR)\n")
    found = list(network.adapters(tmp_path, {}, True))
    assert [finding.level for finding in found] == ["warning", "ok"]
    found = list(network.adapters(tmp_path, {"NCCL_IB_DISABLE": "1"}, False))
    assert [finding.level for finding in found] == ["warning"]
