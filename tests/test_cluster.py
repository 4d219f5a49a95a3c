"""A Ray cluster of several processes gives a local run's bytes and survives a dead worker."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.workers import open_workers
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.quantize.settings import Calibration
from lfmq.converter.run.convert import convert
from lfmq.converter.statistics.collect import collect
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import CheckpointError, ClusterError
from lfmq.tests.test_resume import content, windows

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a head node with two workers, in processes of their own."""
    folder = Path("/tmp") / f"lfmq-ray-{os.getpid()}"  # sockets want a short path
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [
        "ray", "start", "--head", "--port=0", "--num-cpus=2", "--num-gpus=0",
        "--include-dashboard=false", "--disable-usage-stats", "--block",
        "--object-store-memory=200000000", f"--temp-dir={folder}",
    ]  # fmt: skip
    with subprocess.Popen(
        [Path(sys.executable).parent / command[0], *command[1:]],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as head:  # fmt: skip
        address = folder / "ray_current_cluster"
        deadline = time.monotonic() + 60
        while not (address.is_file() and address.read_text()):
            assert time.monotonic() < deadline, "the cluster does not start"
            time.sleep(0.1)
        yield address.read_text().strip()
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def run(checkpoint, output, **options):
    recipe = load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    convert(checkpoint, recipe, plan, FORMATS, output, **options)
    return content(output)


def kill_a_worker(deadline, killed):
    """Kill one worker as soon as it works on a piece."""
    while time.monotonic() < deadline and not killed:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name().startswith("ray::_run_cac"):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.002)


def test_a_dead_worker_changes_no_byte(sample_folder, cluster, tmp_path):
    sample = open_checkpoint(sample_folder)
    expected = run(sample, tmp_path / "local")
    killed: list[int] = []
    hunter = threading.Thread(target=kill_a_worker, args=(time.monotonic() + 120, killed))
    hunter.start()
    found = run(sample, tmp_path / "cluster", execution=Execution(cluster=cluster))
    hunter.join()
    assert len(killed) == 1
    assert found == expected


def test_calibrated(make_checkpoint, cluster, tmp_path):
    checkpoint = open_checkpoint(make_checkpoint())
    expected = run(checkpoint, tmp_path / "local", calibration=Calibration(windows()))
    far = {"calibration": Calibration(windows()), "execution": Execution(cluster=cluster)}
    assert run(checkpoint, tmp_path / "far", **far) == expected
    near, _ = collect(checkpoint, windows(), execution=Execution(threads=1))
    there, _ = collect(checkpoint, windows(), execution=Execution(cluster=cluster))
    assert near.to_json() == there.to_json()


class Broken(Checkpoint):
    def read(self, name):
        raise CheckpointError("no such luck")


def test_an_error_of_a_worker_is_the_same_line(make_checkpoint, cluster, tmp_path):
    good = open_checkpoint(make_checkpoint())
    broken = Broken(good.folder, good.config, good.assets, good.stored)
    with pytest.raises(CheckpointError, match=r"^no such luck$"):
        run(broken, tmp_path / "out", execution=Execution(cluster=cluster))


def test_no_cluster_there():
    refused = r"^--cluster 127\.0\.0\.1:1: cannot be reached"
    with pytest.raises(ClusterError, match=refused), open_workers(1, "127.0.0.1:1"):
        pass
