"""run_with_submitit.py without Slurm: real jobs on this machine, and the parameters that Slurm would get.

Tests with a real Slurm are in tests/slurm.
"""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import submitit
import torch
from conftest import ROOT, SMALL_RUN, arguments_of, assert_near, run_script

import dino_signals
import eval_knn
import eval_linear
import eval_logistic
import main_dino
import run_with_submitit
import utils
from run_with_submitit import Task
from utils import UserError

SAME = ["--use_fp16", "false", "--drop_path_rate", "0", "--optimizer", "sgd", "--lr", "0.05"]
TWO_PROCESSES = [*SMALL_RUN, *SAME, "--batch_size_per_gpu", 4, "--ngpus", 0, "--nodes", 1, "--tasks_per_node", 2]
LOCAL = ["run_with_submitit.py", *TWO_PROCESSES, "--cluster", "local"]


def parsed(*flags):
    return arguments_of(run_with_submitit, *flags)


def submit(*flags):
    run_with_submitit.main(parsed(*flags))


# ---- jobs on this machine ----


def losses(folder):
    return [float(loss) for loss in re.findall(r'"train_loss": ([\d.]+)', (folder / "log.txt").read_text())]


@pytest.mark.slow
def test_a_local_job_of_two_processes_resumes_after_a_signal_and_trains_as_without_submitit(tiny_root, tmp_path):
    """It is started in a folder with another utils.py. The reference is one process with the same global batch."""
    (tmp_path / "train").symlink_to(tiny_root / "train")
    if sys.version_info >= (3, 11):  # Python 3.10 imports from the current folder first
        (tmp_path / "utils.py").write_text("raise RuntimeError('not ours')")
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import time\nimport PIL.Image\ncropped = PIL.Image.Image.crop\n"
        "PIL.Image.Image.crop = lambda *args, **more: time.sleep(0.05) or cropped(*args, **more)\n"
    )
    flags = [ROOT / LOCAL[0], *LOCAL[1:], "--wait", "--data_path", "train", "--output_dir", "out/%j"]
    env, log = {**os.environ, "PYTHONPATH": str(slow)}, tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, *map(str, flags)]
        waiting = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=file, stderr=file)
    wait_for_text(log, "Epoch: [1/2]  [0/5]")
    job = re.search(r"submitted job (\d+)", log.read_text()).group(1)
    processes = subprocess.run(["pgrep", "-P", job], capture_output=True, text=True).stdout.split()
    assert len(processes) == 2
    for process in processes:
        os.kill(int(process), signal.SIGUSR2)
    assert waiting.wait(60) == 0, log.read_text()
    output, folder = log.read_text(), tmp_path / "out" / job
    assert re.search(r"stopped in epoch 1 after step \d", output)
    assert re.search(r"continuing in epoch 1 after step \d", output)
    assert "vit_nano/16 on 2 x CPU" in output
    assert f"its log is {folder}/{job}_0_log.out" in output
    alone = ["--data_path", tiny_root / "train", "--output_dir", tmp_path / "alone"]
    run_script("main_dino.py", *SMALL_RUN, *SAME, *alone, blocks=None)
    assert len(losses(folder)) == 2
    assert_near(losses(folder), losses(tmp_path / "alone"), 1e-5)


def wait_for_text(log, text, seconds=60):
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.2)


def test_wait_exits_with_the_exit_code_of_the_run(tmp_path, capsys):
    flags = [*TWO_PROCESSES, "--cluster", "local", "--wait", "--tasks_per_node", 1, "--data_path", tmp_path / "none"]
    with pytest.raises(SystemExit) as ended:
        submit(*flags, "--output_dir", tmp_path)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert "error (rank 0): --data_path" in out
    assert re.search(r"error: job \d+ ended with 2; its logs: .*_log\.out\n", err)
    assert "Traceback" not in out + err


@pytest.mark.usefixtures("small_networks")
def test_debug_trains_and_evaluates_in_this_process(tiny_root, tmp_path, capsys, monkeypatch):
    flags = [*SMALL_RUN, "--epochs", 1, "--ngpus", 0, "--nodes", 1, "--cluster", "debug"]
    flags += ["--evaluate_after", "logistic,knn"]
    before, handlers, evaluate = dict(os.environ), [], eval_knn.main
    monkeypatch.setattr(
        eval_knn, "main", lambda args: handlers.append(signal.getsignal(signal.SIGTERM)) or evaluate(args)
    )
    signal.signal(signal.SIGTERM, utils.terminate)  # as a script does
    try:
        submit(*flags, "--data_path", tiny_root / "train", "--output_dir", tmp_path / "%j")
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
    output = capsys.readouterr().out
    job = re.search(r"submitted job (DEBUG_\d+)", output).group(1)
    assert f"tensors from {tmp_path}/{job}/checkpoint.pth [teacher]" in output
    assert output.index("Logistic regression with --l2 0.1: Top1: ") < output.index("20-NN classifier result")
    assert torch.load(tmp_path / job / "checkpoint.pth", weights_only=True)["args"]["world_size"] == 1
    assert dict(os.environ) == before
    assert handlers == [utils.terminate]  # the training has ended with SIGTERM ignored


# ---- parameters for Slurm ----

SBATCH = """#!/bin/sh
echo "$1" >> "$FAKE/called"
cp "$1" "$FAKE/$(wc -l < "$FAKE/called").sh"
echo "Submitted batch job $((41 + $(wc -l < "$FAKE/called")))"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of a fake Slurm that accepts all jobs and runs none: their batch scripts are 1.sh, 2.sh, ..."""
    folder = tmp_path / "fake"
    folder.mkdir()
    install(folder, "sbatch", SBATCH)
    install(folder, "srun", "#!/bin/sh\n")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def install(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def options(script):
    """The options in a batch script, as a dict."""
    pairs = (
        line.removeprefix("#SBATCH --").partition("=") for line in script.read_text().splitlines() if "#SB" in line
    )
    return {name: value.strip("'") for name, _, value in pairs}


def test_the_defaults_ask_for_two_nodes_of_eight_gpus(fake, tmp_path):
    submit("--output_dir", tmp_path / "out")
    assert options(fake / "1.sh") == {
        "job-name": "dino", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "10",
        "mem": "320GB", "time": "2800", "signal": "USR2@120", "requeue": "", "open-mode": "append",
        "output": f"{tmp_path}/out/%j_0_log.out", "wckey": "submitit",
    }  # fmt: skip
    text = (fake / "1.sh").read_text()
    assert re.search(r"\nsrun .*--cpus-per-task=10 --kill-on-bad-exit=1 ", text)
    assert f"export PYTHONPATH={ROOT}" in text
    saved = submitit.core.utils.DelayedSubmission.load(tmp_path / "out" / "42_submitted.pkl")
    assert (saved._timeout_countdown, saved._timeout_min) == (30, 2800)
    assert saved.function.main is main_dino.train_dino
    assert vars(saved.function.args).keys() == vars(main_dino.get_args_parser().parse_args([])).keys()
    assert saved.function.args.output_dir == str(tmp_path / "out")
    assert saved.function.args.num_workers == 10  # for 10 CPUs per task, not for the machine that submits


def test_flags_are_passed_on_to_sbatch(fake, tmp_path):
    flags = ["--nodes", 3, "--ngpus", 4, "--timeout", 60, "--partition", "p", "--use_volta32", "--comment", "a b"]
    flags += ["--cpus_per_task", 6, "--mem_gb", 12.5, "--signal_delay", 300, "--slurm_account", "acc"]
    flags += ["--slurm_qos", "q", "--slurm_exclude", "n[1-2]", "--slurm_nodelist", "n9", "--slurm_constraint", "ib"]
    flags += ["--slurm_extra", "reservation=r", "mail-user=a=b"]
    submit(*flags, "--output_dir", tmp_path / "out", "--shared_dir", tmp_path / "jobs" / "%j")
    found = options(fake / "1.sh")
    expected = {
        "nodes": "3", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "60", "partition": "p", "comment": "a b",
        "constraint": "volta32gb&ib", "cpus-per-task": "6", "mem": "12800MB", "signal": "USR2@300", "account": "acc",
        "qos": "q", "exclude": "n[1-2]", "nodelist": "n9", "reservation": "r", "mail-user": "a=b",
        "output": f"{tmp_path}/jobs/%j/%j_0_log.out",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert (tmp_path / "jobs" / "42" / "42_submitted.pkl").exists()
    assert not list((tmp_path / "out").iterdir())


def test_no_comment_is_the_published_empty_text(fake, tmp_path):
    assert run_with_submitit.get_args_parser().parse_args([]).comment == ""
    submit("--output_dir", tmp_path / "out")
    assert "comment" not in options(fake / "1.sh")


def test_a_job_without_gpus_runs_on_the_cpu(fake, tmp_path):
    submit("--ngpus", 0, "--tasks_per_node", 3, "--output_dir", tmp_path)
    found = options(fake / "1.sh")
    assert (found["ntasks-per-node"], found["mem"], "gpus-per-node" in found) == ("3", "120GB", False)
    saved = submitit.core.utils.DelayedSubmission.load(tmp_path / "42_submitted.pkl")
    assert saved.function.args.device == "cpu"


def test_the_evaluation_starts_after_the_training_has_succeeded(fake, tmp_path):
    flags = ["--data_path", tmp_path / "imagenet" / "train", "--output_dir", tmp_path / "%j"]
    flags += ["--arch", "vit_base", "--patch_size", 8, "--global_crops_size", 192, "--num_workers", 3]
    submit(*flags, "--evaluate_after", "knn,linear,logistic")
    scripts = {"dino_knn": eval_knn, "dino_linear": eval_linear, "dino_logistic": eval_logistic}
    for number, (name, script) in enumerate(scripts.items(), start=2):
        found = options(fake / f"{number}.sh")
        assert (found["dependency"], found["kill-on-invalid-dep"], found["nodes"]) == ("afterok:42", "yes", "1")
        assert found["job-name"] == name
        assert found["gpus-per-node"] == "8"
        task = submitit.core.utils.DelayedSubmission.load(tmp_path / "42" / f"{41 + number}_submitted.pkl").function
        assert task.main is script.main
        if script is eval_linear:
            linear = task.args
    expected = {
        "arch": "vit_base", "patch_size": 8, "image_size": 192, "checkpoint_key": "teacher", "num_workers": 3,
        "data_path": str(tmp_path / "imagenet"), "pretrained_weights": str(tmp_path / "42" / "checkpoint.pth"),
        "device": "auto",
    }  # fmt: skip
    assert {name: getattr(task.args, name) for name in expected} == expected
    expected |= {"output_dir": str(tmp_path / "42" / "linear"), "n_last_blocks": 1, "avgpool_patchtokens": True}
    expected["lr"] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    assert {name: getattr(linear, name) for name in expected} == expected


def test_an_unknown_evaluation_is_one_line(refusal):
    line = refusal(run_with_submitit, "--evaluate_after", "knn,lineal")
    assert "argument --evaluate_after: 'lineal' is not one of knn, linear, logistic" in line


@pytest.mark.parametrize(("flags", "data"), [([], "sample"), (["--evaluate_data", "other"], "other")])
def test_the_evaluation_uses_the_named_data_or_the_sample(flags, data):
    args = parsed("--evaluate_after", "knn", *flags)
    assert run_with_submitit.evaluation("knn", args, "1").args.data_path == data


def test_a_job_that_slurm_rejects_is_a_user_error_and_leaves_no_files(fake, tmp_path, capfd):
    install(fake, "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("earlier")
    with pytest.raises(UserError, match=r"Slurm rejected the job: .*invalid partition"):
        submit("--output_dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]
    assert capfd.readouterr().err == ""


def test_a_missing_sbatch_or_submitit_is_named_before_anything_is_created(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no command sbatch.*--cluster local"):
        submit("--output_dir", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        submit("--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- wrong flags ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--signal_delay", 120, "--timeout", 2], "leaves no time to train in --timeout 2 min"),
        (["--tasks_per_node", 2], "--ngpus 8 starts one process per GPU"),
        (["--ngpus", 0, "--device", "cuda"], "--ngpus 0 leaves no GPU for --device cuda"),
        (["--cluster", "local"], "--cluster local has one node. Add --nodes 1"),
        (["--cluster", "debug", "--nodes", 1], "--cluster debug runs one process"),
        (["--evaluate_data", "x"], "--evaluate_data x has no effect without --evaluate_after"),
        (["--cluster", "local", "--nodes", 1, "--evaluate_after", "knn"], "Add --wait"),
        (["--slurm_extra", "reservation"], "--slurm_extra reservation must have the form"),
        (["--warmup_epochs", 200], "--warmup_epochs 200 is longer than the run"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, capsys):
    with pytest.raises((UserError, SystemExit)) as raised:
        submit(*flags)
    assert message in str(raised.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--signal_delay", 119, "--timeout", 2],
        ["--cluster", "debug", "--nodes", 1, "--ngpus", 1],
        ["--cluster", "local", "--nodes", 1, "--evaluate_after", "knn", "--wait"],
        ["--ngpus", 0, "--device", "cpu", "--tasks_per_node", 1],
    ],
)
def test_settings_at_the_limits_are_accepted(flags):
    run_with_submitit.check_args(parsed(*flags))


# ---- inside the job ----


def environment(tmp_path=None, **changed):
    """A stand-in for submitit.JobEnvironment."""
    values = {
        "job_id": "55326964", "global_rank": 5, "local_rank": 1, "num_tasks": 8, "num_nodes": 2,
        "hostnames": ["n3", "n4"], "cluster": "slurm", "paths": SimpleNamespace(folder=tmp_path),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "from the shell")
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.usefixtures("clean_environment")
def test_rank_0_is_on_the_first_node():
    run_with_submitit.set_rank(environment())
    assert utils.rank_from_environment("env://") == (5, 8, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n3", str(20000 + 55326964 % 20000))
    run_with_submitit.set_rank(environment(num_nodes=1, job_id="123_7"))
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "21237")


@pytest.mark.parametrize(
    ("rank", "code", "waits"),
    [(0, 143, True), (1, 143, True), (1, 140, True), (0, 140, False), (0, -1, False), (1, 138, False), (1, 130, False)],
)
def test_a_process_that_slurm_has_to_end_waits_for_it(monkeypatch, rank, code, waits):
    slept, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_with_submitit.time, "sleep", slept.append)
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        run_with_submitit.wait_for_slurm(rank, code)
        assert slept == [600] * waits
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == waits
    finally:
        signal.signal(signal.SIGTERM, before)


def ended_task(monkeypatch, tmp_path, main, **changed):
    """(exit code of a task that runs `main`, the code that it saved)."""
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: environment(tmp_path, **changed))
    with pytest.raises(SystemExit) as ended:
        Task(main, SimpleNamespace(output_dir="x"))()
    notes = [note.read_text() for note in tmp_path.glob("55326964_*_exit")]
    return ended.value.code, notes[0] if notes else None


@pytest.mark.usefixtures("clean_environment")
def test_a_user_error_is_one_line_and_its_exit_code_is_saved(monkeypatch, tmp_path, capsys):
    def main(args):
        raise UserError("the loss is nan", exit_code=3)

    assert ended_task(monkeypatch, tmp_path, main) == (3, "3")
    assert capsys.readouterr().err == "error (rank 5): the loss is nan\n"


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize(("code", "saved"), [(143, "143"), (-1, None), (144, None), (0, None)])
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_the_exit_code_is_saved_except_for_a_requeue(monkeypatch, tmp_path, code, saved, cluster):
    waits = []
    monkeypatch.setattr(run_with_submitit, "wait_for_slurm", lambda *seen: waits.append(seen))
    assert ended_task(monkeypatch, tmp_path, lambda _: sys.exit(code), cluster=cluster) == (code, saved)
    assert waits == [(5, code)] * (cluster == "slurm")


@pytest.mark.usefixtures("clean_environment")
def test_a_requeued_task_has_its_original_arguments(monkeypatch, tmp_path):
    seen = []

    def main(args):
        seen.append(args.output_dir)
        args.output_dir = args.rank = "changed"

    monkeypatch.setattr(submitit, "JobEnvironment", lambda: environment(tmp_path))
    task = Task(main, SimpleNamespace(output_dir="runs/%j", epochs=3))
    task()
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    again.result()
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN  # a signal would kill the process while it shuts down
    assert seen == ["runs/55326964"] * 2
    assert vars(again.function.args) == {"output_dir": "runs/%j", "epochs": 3}


def test_slurms_sigterm_does_not_hide_submitits_sigusr2():
    """Slurm may send SIGTERM first; submitit requeues the job in its handler of SIGUSR2."""
    came, before = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))
        with dino_signals.StopRequest() as stop:
            for number in before:
                os.kill(os.getpid(), number)
        with pytest.raises(SystemExit) as ended:
            stop.leave(stop.signal)
        assert ended.value.code == 128 + signal.SIGTERM
        assert came == [signal.SIGUSR2, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- waiting ----


@pytest.fixture
def job(tmp_path):
    """A job of two processes that is not in any queue."""
    return submitit.SlurmJob(tmp_path, "77", tasks=[0, 1])


def finish(job, *outcomes):
    for rank, outcome in enumerate(outcomes):
        submitit.core.utils.cloudpickle_dump((outcome, None), job.paths.folder / f"77_{rank}_result.pkl")


@pytest.mark.parametrize(
    ("outcomes", "saved", "code"),
    [
        (("success", "success"), [], 0),
        (("success", "success"), [3], 0),  # saved before a requeue
        (("success",), [], 1),
        ((), [], 1),
        ((), [3], 3),
        ((), [1, 3], 3),  # rank 0 has only lost the connection to rank 1
        (("error", "success"), [], 1),
        (("success", "error"), [5], 5),
    ],
)
def test_the_exit_code_of_a_job_is_one_that_a_process_saved(job, outcomes, saved, code, capsys):
    finish(job, *outcomes)
    for rank, value in enumerate(saved):
        (job.paths.folder / f"77_{rank}_exit").write_text(str(value))
    assert run_with_submitit.exit_code(job) == code
    said = capsys.readouterr().err
    assert said == (f"error: job 77 ended with {code}; its logs: {job.paths.folder}/77_*_log.out\n" if code else "")


@pytest.mark.parametrize(
    ("squeue", "ended"),
    [
        ("echo '77 main dino root R 1:00 2 n[1-2]'", False),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_job_has_ended_if_it_is_no_longer_in_the_queue(fake, job, squeue, ended):
    install(fake, "squeue", f"#!/bin/sh\n[ \"$*\" = '--noheader --jobs=77' ] || exit 3\n{squeue}\n")
    assert run_with_submitit.has_ended(job, "slurm") == ended
    finish(job, "success", "success")
    assert run_with_submitit.has_ended(job, "slurm")


def test_each_line_of_the_log_is_printed_once_including_the_last(monkeypatch, job, capsys):
    lines = iter(["first\n", "second\n", "last\n"])

    def has_ended(job, cluster):
        assert cluster == "slurm"
        line = next(lines)
        with job.paths.stdout.open("a") as log:
            log.write(line)
        return line == "last\n"

    monkeypatch.setattr(run_with_submitit, "has_ended", has_ended)
    finish(job, "success", "success")
    assert run_with_submitit.follow(job, "slurm", pause=0) == 0
    assert capsys.readouterr().out == "first\nsecond\nlast\n"
