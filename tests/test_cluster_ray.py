"""The cluster files of `ray up`: by Ray's own reading of them, and by Amazon's of its fields."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster_files import CLUSTER, RAY_FILES, ROOT, extras, name_of


@pytest.mark.parametrize("path", RAY_FILES, ids=name_of)
def test_ray_takes_the_cluster_files(path: Path) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs ray")
    config = yaml.safe_load(path.read_text())
    prepared = util.prepare_config(config)
    util.validate_config(prepared)
    # Options that `ray start` knows.
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for commands_of in ("head_start_ray_commands", "worker_start_ray_commands"):
        begun = [line for line in config[commands_of] if "ray start" in line]
        assert len(begun) == 1
        options = re.findall(r"(--[a-z-]+)", begun[0].split("ray start")[1])
        assert set(options) <= known, set(options) - known
        assert "--disable-usage-stats" in options
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    for port in re.findall(r"-port=(\d+)", head):
        assert not 10002 <= int(port) <= 19999
    for line in [*config["initialization_commands"], *config["setup_commands"]]:
        assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0, line


@pytest.mark.parametrize("path", RAY_FILES, ids=name_of)
def test_ray_files_ship_the_code_the_token_and_nothing_else(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    mounts = dict(config["file_mounts"])
    home = f"/home/{config['auth']['ssh_user']}"
    assert mounts.pop(f"{home}/.ray/auth_token") == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in line for line in config["initialization_commands"])
    for remote, local in mounts.items():
        assert remote == f"{home}/checkout/{local}"
        assert (ROOT / local).exists()
        # Ray reads all below it for a checksum.
        assert local not in (".", "datasets", "runs")
    # What the installation reads.
    assert {"dist_dml", "configs", "pyproject.toml", "constraints.txt", "README.md"} <= {
        *mounts.values()
    }
    install = next(line for line in config["setup_commands"] if "pip install" in line)
    assert "-c constraints.txt" in install
    chosen = re.search(r"\.\[([\w,]+)\]", install)
    assert chosen
    assert {"tune"} <= set(chosen[1].split(",")) <= extras()
    if not shutil.which("rsync"):
        pytest.skip("what it excludes is not compared: no rsync")
    excluded = [f"--exclude={pattern}" for pattern in config["rsync_exclude"]]
    sent = subprocess.run(
        ["rsync", "-an", "--out-format=%n", *excluded, "dist_dml/", "/tmp/none/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    modules = {str(p.relative_to(ROOT / "dist_dml")) for p in (ROOT / "dist_dml").rglob("*.py")}
    assert modules <= set(sent)
    assert not any("__pycache__" in name for name in sent)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_keep_the_head_and_let_idle_spot_workers_go(name: str) -> None:
    config = yaml.safe_load((CLUSTER / "ray" / f"{name}.yaml").read_text())
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False
    types = dict(config["available_node_types"])
    head = json.dumps(types.pop(config["head_node_type"]))
    assert "spot" not in head.lower()
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert worker["max_workers"] <= config["max_workers"]
        assert '"spot"' in json.dumps(worker["node_config"]).lower()


def test_ec2_knows_every_field_of_the_aws_file() -> None:
    loaders = pytest.importorskip("botocore.loaders", reason="needs botocore")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    model = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2"))
    shape = model.operation_model("RunInstances").input_shape
    for node in yaml.safe_load((CLUSTER / "ray" / "aws.yaml").read_text())[
        "available_node_types"
    ].values():
        parameters = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        errors = ParamValidator().validate(parameters, shape)
        assert not errors.has_errors(), errors.generate_report()
