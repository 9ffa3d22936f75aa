"""run_with_submitit.py, and main_dino.py with srun, on a real Slurm cluster of two nodes simulated on this machine.

Each node has its own network, name and daemon (start_slurm.sh). Jobs that are interrupted are slowed down; all of them
compute the same run as the fixture `whole`.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, assert_near, assert_same, log_without_times, run_script

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

START = Path(__file__).with_name("start_slurm.sh")
# 20 steps of 8 images in 4 epochs.
RUN = [*SMALL_RUN, "--epochs", 4, "--use_fp16", "false", "--drop_path_rate", 0, "--optimizer", "sgd", "--lr", 0.05]
TWO_NODES = ["--ngpus", 0, "--nodes", 2, "--cpus_per_task", 2, "--mem_gb", 1, "--batch_size_per_gpu", 4]


# ---- the cluster ----


def why_not():
    if not (sys.platform == "linux" and Path("/etc/debian_version").exists() and shutil.which("apt-get")):
        return "it is not Debian"
    if os.geteuid() != 0:
        return "only root can create the nodes' networks"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "namespaces are not allowed"
    return None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A function that runs a command on the cluster and returns its output."""
    if why_not():
        pytest.skip(f"no Slurm cluster on this machine: {why_not()}")
    folder = Path("/tmp") / f"slurm-test-{os.getpid()}"  # short: the paths of sockets are limited
    env = {**os.environ, "SLURM_DIR": str(folder), "OWNER": str(os.getpid())}
    installed = subprocess.run([START, "install"], env=env, capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"can't install Slurm: {installed.stderr[-300:]}")
    try:
        log = tmp_path_factory.mktemp("slurm") / "log"
        with log.open("w") as file:  # not a pipe: the daemons would keep it open
            started = subprocess.run([START, "start"], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        assert started.returncode == 0, log.read_text()

        def run(*words, check=True, **more):
            words = [folder / "enter", "timeout", "120", *words]
            environment = {**os.environ, **more}
            done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
            if not check:
                return done
            assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            return done.stdout

        yield run
    finally:
        subprocess.run([START, "clean"], env=env, stdin=subprocess.DEVNULL, timeout=90, check=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """slow(seconds): an environment in which each crop of an image takes that long, also in jobs."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(
        "import os, time\nimport PIL.Image\ncropped = PIL.Image.Image.crop\n"
        "def slowly(*args, **more):\n    time.sleep(float(os.environ['SLOW']))\n    return cropped(*args, **more)\n"
        "if 'SLOW' in os.environ:\n    PIL.Image.Image.crop = slowly\n"
    )
    return lambda seconds: {"PYTHONPATH": str(folder), "SLOW": str(seconds)}


# ---- jobs ----


def submit(cluster, tiny_root, output, *flags, **env):
    """(ID of a training job, its log file)."""
    flags = [*RUN, *TWO_NODES, "--data_path", tiny_root / "train", "--output_dir", output, *flags]
    said = cluster(sys.executable, "run_with_submitit.py", *flags, **env)
    job, log = re.findall(r"submitted job (\d+); its log is (\S+)", said)[0]
    return job, Path(log)


def wait_until(happened, seconds, what):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.5)


def wait_for_text(log, text, seconds=60):
    wait_until(lambda: log.exists() and text in log.read_text(), seconds, f"{text!r} in {log}")


def wait_for_end(cluster, job, log, seconds):
    """Wait until a job has completed; if it does not, print its log."""
    try:
        wait_until(lambda: not cluster("squeue", "-h", "-j", job), seconds, f"end of job {job}")
        assert "JobState=COMPLETED" in cluster("scontrol", "show", "job", job)
    except AssertionError:
        print(log.read_text()[-6000:], cluster("scontrol", "show", "job", job, check=False).stdout)
        raise


def restarts(cluster, job):
    return int(re.search(r"Restarts=(\d+)", cluster("scontrol", "show", "job", job)).group(1))


def result(folder):
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    for name in ("output_dir", "rank", "gpu"):
        checkpoint["args"].pop(name)
    return checkpoint, log_without_times(folder)


@pytest.fixture(scope="module")
def whole(cluster, tiny_root, tmp_path_factory):
    """(folder of an undisturbed two-node run with an evaluation, its output, its description)."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--evaluate_after", "knn", "--wait", "--ngpus", 1, "--use_volta32", "--slurm_extra", "nice=1"]
    flags = [*RUN, *TWO_NODES, *flags, "--data_path", tiny_root / "train", "--output_dir", folder / "%j"]
    said = cluster(sys.executable, "run_with_submitit.py", *flags)
    job = re.search(r"submitted job (\d+)", said).group(1)
    return folder / job, said, cluster("scontrol", "show", "job", job)


@pytest.fixture(scope="module")
def twice_interrupted(cluster, tiny_root, slow, tmp_path_factory):
    """A job that is requeued by hand and then exceeds its time limit; other tests run in the meantime."""
    folder = tmp_path_factory.mktemp("twice_interrupted")
    job, log = submit(cluster, tiny_root, folder, "--timeout", 1, "--signal_delay", 15, "--ngpus", 1, **slow(0.16))
    wait_for_text(log, "Epoch: [0/4]  [0/5]")
    cluster("scontrol", "requeue", job)
    return folder, job, log


# As in docs/cluster.md.
BATCH = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --mem=1G --time=60 --requeue --signal=USR2@120 --open-mode=append
srun --kill-on-bad-exit=1 {command} && exit
code=$?
case $code in
  140) scontrol requeue $SLURM_JOB_ID ;;
  143) sleep 600 ;;
esac
exit $code
"""


def submit_batch(cluster, tiny_root, folder, **env):
    flags = [*RUN, "--batch_size_per_gpu", 4, "--data_path", tiny_root / "train", "--output_dir", folder]
    script, log = folder / "job.sh", folder / "job.out"
    script.write_text(BATCH.format(command=" ".join(map(str, (sys.executable, ROOT / "main_dino.py", *flags)))))
    return re.search(r"\d+", cluster("sbatch", f"--output={log}", script, **env)).group(), log


# ---- tests ----


def test_a_job_on_two_nodes_trains_as_one_process_does(whole, tiny_root, tmp_path):
    folder, said, shown = whole
    alone = ["--data_path", tiny_root / "train", "--output_dir", tmp_path]
    run_script("main_dino.py", *RUN, *alone, blocks=None)
    one, two = (re.findall(r'"train_loss": ([\d.]+)', (f / "log.txt").read_text()) for f in (tmp_path, folder))
    assert len(one) == 4
    assert_near([float(loss) for loss in two], [float(loss) for loss in one], 1e-5)
    assert "hostname=n1" in said
    assert "hostname=n2" in next(folder.glob("*_1_log.out")).read_text()
    assert "Features=volta32gb" in shown
    assert "gres:gpu:1" in shown
    assert "Nice=1" in shown
    assert "CPUs/Task=2" in shown


def test_the_evaluation_follows_in_the_same_folder(whole):
    folder, said, _ = whole
    assert f"tensors from {folder}/checkpoint.pth [teacher]" in said
    assert "20-NN classifier result: Top1:" in said
    assert len(list(folder.glob("*_submission.sh"))) == 2


def test_an_error_ends_the_job_with_its_exit_code_and_cancels_the_evaluation(cluster, twice_interrupted, tmp_path):
    flags = [*RUN, *TWO_NODES, "--data_path", tmp_path / "none", "--output_dir", tmp_path, "--wait"]
    done = cluster(sys.executable, "run_with_submitit.py", *flags, "--evaluate_after", "knn", check=False)
    job, after = re.findall(r"submitted job (\d+)", done.stdout)
    assert done.returncode == 2
    assert "error (rank 0): --data_path" in done.stdout
    assert f"error: job {job} ended with 2; its logs: {tmp_path}/{job}_*_log.out" in done.stderr
    wait_until(lambda: not cluster("squeue", "-h", "-j", after), 30, "end of the evaluation")


def test_a_job_of_sbatch_that_is_interrupted_resumes_bit_identically(
    cluster, twice_interrupted, whole, tiny_root, slow, tmp_path
):
    job, log = submit_batch(cluster, tiny_root, tmp_path, **slow(0.08))
    wait_for_text(log, "Epoch: [0/4]  [4/5]")
    cluster("scancel", "--signal=USR2", job)
    wait_for_end(cluster, job, log, 90)
    said = log.read_text()
    assert "stopped in epoch" in said
    assert re.search(r"continuing in epoch \d after step \d", said)
    assert restarts(cluster, job) == 1
    assert_same(result(tmp_path), result(whole[0]))


def test_a_job_that_is_requeued_and_whose_time_is_up_resumes_bit_identically(cluster, twice_interrupted, whole):
    folder, job, log = twice_interrupted
    wait_for_end(cluster, job, log, 180)
    said = log.read_text()
    assert "saved; waiting for Slurm to end or requeue the job" in said
    assert re.search(r"continuing in epoch 0 after step \d", said)
    assert "this job is timed-out" in said
    assert restarts(cluster, job) >= 2
    assert_same(result(folder), result(whole[0]))
