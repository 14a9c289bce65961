"""Ray: one actor a device, on a real cluster of several nodes of this machine, one of which is killed in the middle."""

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, Cli
from tests.test_workers import alone, begin
from tests.workers import QKV, bits, leftovers

pytest.importorskip("ray")
NODES, ACTORS = 4, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors, and nodes of one each. Sockets need a short folder."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    said = {
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on the loopback address alone
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        small: dict[str, Any] = {"object_store_memory": 78_643_200}
        health = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 200,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 5,
        }
        head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, "_system_config": health, **small}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES):
                made.add_node(num_cpus=1, **small)
            ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()  # type: ignore[no-untyped-call]
            shutil.rmtree(folder, ignore_errors=True)


def kill(cluster: Any, node: Any) -> None:
    """Let a machine die: its daemons and its workers, at one instant."""
    roots = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    processes = roots + [child for root in roots for child in root.children(recursive=True)]
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


def when_committed(directory: Path, count: int) -> None:
    """Wait until so many partials are stored."""
    deadline = time.monotonic() + 120
    while len(list((directory / "partials").glob("*"))) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_actors(cluster: Any, cli: Cli, tmp_path: Path) -> None:
    """By one actor and by four, of which one loses its node: the bits are those of one process."""
    words = begin(cli, "cqs", "--causal", shares=8)
    one = cli("run", *QKV, "out", *words, "--executor", "ray", "--workers", 1)
    assert one.returncode == 0, one.stderr
    expected = alone(cli, words)
    assert bits(tmp_path) == expected
    assert leftovers(tmp_path) == []
    begin(cli, "cqs", "--causal", out="four", shares=8)

    def kill_a_node() -> None:
        when_committed(tmp_path / "four.run", 3)
        kill(cluster, cluster.worker_nodes.copy().pop())

    killer = threading.Thread(target=kill_a_node)
    killer.start()
    four = cli("run", *QKV, "four", *words, "--executor", "ray", "--workers", ACTORS)
    killer.join()
    assert four.returncode == 0, four.stderr
    assert bits(tmp_path, "four") == expected
    assert leftovers(tmp_path, "four") == []
