"""Train on a Slurm cluster: main_dino.py as a job that goes back to the queue when its time is up, and then goes on.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --data_path imagenet/train --output_dir runs/vits16
    python run_with_submitit.py --nodes 1 --ngpus 0 --tasks_per_node 2 --cluster local --wait \\
        --config recipes/demo.yaml --output_dir runs/demo                    # try it out, without Slurm or GPUs

Takes all flags of main_dino.py and a few of its own. Writes what main_dino.py does into --output_dir, and the logs
(<job>_<rank>_log.out) and what the job needs to start again into --shared_dir. ViT-S/16, 100 epochs on two nodes of
eight GPUs: the 69.3 % k-NN and 74.0 % linear of main_dino.py.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

import dino_cli
import main_dino
import utils
from dino_cli import at_least, positive
from utils import UserError

ROOT = os.path.dirname(os.path.abspath(__file__))

# ---- arguments ----


def get_args_parser():
    """All flags, main_dino's among them, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("DINO on Slurm", add_help=False, parents=[main_dino.get_args_parser()])
    parser.set_defaults(output_dir="runs/%j")
    # fmt: off
    job = parser.add_argument_group("job", "%%j in --output_dir and --shared_dir stands for the number of the job.")
    job.add_argument("--ngpus", default=8, type=at_least(0), metavar="N", help="""GPUs to ask for on each node, with a
        process for each of them. 0: a cluster without; see --tasks_per_node.""")
    job.add_argument("--nodes", default=2, type=at_least(1), metavar="N", help="Nodes to ask for.")
    job.add_argument("--tasks_per_node", default=None, type=at_least(1), metavar="N",
        help="Processes on each node if --ngpus is 0; 1 unless given.")
    job.add_argument("--timeout", default=2800, type=at_least(1), metavar="MINUTES", help="""Time limit of the job.
        Shorter ones often start sooner, and nothing is lost: the run goes on in the next turn, up to 30 times.""")
    job.add_argument("--signal_delay", default=120, type=at_least(0), metavar="SECONDS",
        help="How long before the limit the run is told to save. More if a step and a checkpoint take minutes.")
    job.add_argument("--cpus_per_task", default=10, type=at_least(1), metavar="N",
        help="CPUs for each process; --num_workers of them prepare crops.")
    job.add_argument("--mem_gb", default=None, type=positive, metavar="GB",
        help="Main memory of each node; 40 for each process unless given.")
    job.add_argument("--partition", default=None, metavar="NAME", help="Partition; the cluster's default unless given.")
    job.add_argument("--use_volta32", action="store_true", help="Only nodes with the feature volta32gb.")
    job.add_argument("--comment", default=None, metavar="TEXT", help="Note that Slurm keeps with the job.")
    for name, text in (
        ("account", "Account that pays."), ("qos", "Quality of service."), ("exclude", "Nodes to keep away from."),
        ("nodelist", "Nodes to have."), ("constraint", "Features that the nodes must have."),
    ):
        job.add_argument(f"--slurm_{name}", default=None, metavar=name.upper(), help=text)
    job.add_argument("--slurm_extra", default=[], nargs="+", metavar="OPTION=VALUE",
        help="Any other options of sbatch, such as reservation=dino licenses=nfs.")
    job.add_argument("--shared_dir", default=None, metavar="DIR",
        help="Folder that all nodes see, for logs and job files; --output_dir unless given.")
    job.add_argument("--cluster", default="slurm", choices=["slurm", "local", "debug"], help="""local: processes on this
        machine, restarted as Slurm would; debug: one, within this one.""")
    job.add_argument("--wait", action="store_true",
        help="Stay, show the log, and end with the exit code of the run.")
    job.add_argument("--evaluate_after", default=None, choices=["knn"],
        help="Evaluate the teacher when training has ended, as a second job, on one node.")
    job.add_argument("--evaluate_data", default=None, metavar="DIR",
        help="Folder with train/ and val/ for that; the one that --data_path is in unless given.")
    # fmt: on
    return parser


def check_args(args):
    if args.tasks_per_node is not None and args.ngpus:
        raise UserError(f"--ngpus {args.ngpus} means a process for each GPU. Leave --tasks_per_node out")
    if args.ngpus == 0 and args.device not in ("auto", "cpu"):
        raise UserError(f"--ngpus 0 leaves no GPU for --device {args.device}. Ask for GPUs, or use --device cpu")
    if args.signal_delay >= 60 * args.timeout:
        raise UserError(f"--signal_delay {args.signal_delay} leaves no time to train in --timeout {args.timeout} min")
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--cluster {args.cluster} has one node only. Add --nodes 1")
    if args.cluster == "debug" and processes_per_node(args) > 1:
        raise UserError("--cluster debug runs one process. Add --ngpus 1, or --ngpus 0")
    if args.evaluate_data is not None and not args.evaluate_after:
        raise UserError("--evaluate_data has no effect without --evaluate_after knn")
    if args.evaluate_after and args.cluster == "local" and not args.wait:
        raise UserError("--evaluate_after on --cluster local needs somebody to wait for the training. Add --wait")
    for option in args.slurm_extra:
        if not re.fullmatch(r"[a-z][a-z-]*=.+", option):
            raise UserError(f"--slurm_extra {option} is not of the form option=value, such as reservation=dino")
    main_dino.check_args(args)


# ---- what to ask for ----


def processes_per_node(args):
    return args.ngpus or args.tasks_per_node or 1


def job_parameters(args, nodes, after=None):
    """What submitit asks the cluster for, by its names for it. `after` is the job that has to succeed before."""
    processes = processes_per_node(args)
    features = ["volta32gb"] * args.use_volta32 + [args.slurm_constraint] * bool(args.slurm_constraint)
    extra = dict(option.split("=", 1) for option in args.slurm_extra)
    wanted = {
        "name": "dino_knn" if after else "dino",
        "nodes": nodes,
        "tasks_per_node": processes,
        "gpus_per_node": args.ngpus or None,
        "cpus_per_task": args.cpus_per_task,
        "mem_gb": args.mem_gb or 40 * processes,
        "timeout_min": args.timeout,
        "stderr_to_stdout": True,
        "slurm_signal_delay_s": args.signal_delay,
        "slurm_partition": args.partition,
        "slurm_comment": args.comment,
        "slurm_account": args.slurm_account,
        "slurm_qos": args.slurm_qos,
        "slurm_exclude": args.slurm_exclude,
        "slurm_nodelist": args.slurm_nodelist,
        "slurm_constraint": "&".join(features) or None,
        "slurm_dependency": f"afterok:{after}" if after else None,
        # The evaluation is to vanish if it can't start any more, and the training may come back when it is preempted.
        "slurm_additional_parameters": {**({"kill-on-invalid-dep": "yes"} if after else {}), "requeue": True, **extra},
        # Since 22.05 srun does not take over the number of CPUs; and one dead process is to end the others at once.
        "slurm_srun_args": [f"--cpus-per-task={args.cpus_per_task}", "--kill-on-bad-exit=1"],
        "slurm_setup": [f"export {name}={shlex.quote(value)}" for name, value in python_environment().items()],
    }
    return {name: value for name, value in wanted.items() if value is not None}


def python_environment():
    """What lets a process that starts anywhere find our modules, and not take those in its folder for them."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH")))), "PYTHONSAFEPATH": "1"}


def training_args(args):
    """main_dino's part of the arguments."""
    names = vars(main_dino.get_args_parser().parse_args([]))
    device = args.device if args.ngpus else "cpu"
    return argparse.Namespace(**{**{name: getattr(args, name) for name in names}, "device": device})


def evaluation_args(args, job_id):
    """Arguments of eval_knn.py for what the training job leaves behind."""
    import eval_knn

    named = args.data_path == "sample" or args.data_path.startswith("torchvision:")
    folder = args.data_path if named else os.path.dirname(os.path.abspath(args.data_path))
    flags = {
        **{name: getattr(args, name) for name in ("arch", "patch_size", "num_workers", "exif")},
        "image_size": args.global_crops_size,
        "pretrained_weights": os.path.join(args.output_dir.replace("%j", job_id), "checkpoint.pth"),
        "data_path": args.evaluate_data or folder,
        "device": training_args(args).device,
    }
    return eval_knn.get_args_parser().parse_args([f"--{name}={value}" for name, value in flags.items()])


# ---- in the job ----

MOST_PATIENCE = 600  # seconds


class Task:
    """What every process of a job calls: `main(args)`, with the others of the job as the distributed run.

    Its `checkpoint` is what submitit asks for when time is up or the job is preempted, once the run has saved: the same
    again. Pickled on the way; it takes along nothing but the arguments.
    """

    def __init__(self, main, args):
        self.main, self.args = main, args

    def checkpoint(self):
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def __call__(self):
        import submitit

        job = submitit.JobEnvironment()
        if job.cluster == "debug":  # the training before, in this process, has left it deaf to signals
            signal.signal(signal.SIGTERM, utils.terminate)
        meet_others(job)
        values = {k: v.replace("%j", job.job_id) if isinstance(v, str) else v for k, v in vars(self.args).items()}
        try:
            self.main(argparse.Namespace(**values))
        except UserError as e:
            print(f"error (rank {job.global_rank}): {e}", file=sys.stderr, flush=True)
            leave(job, e.exit_code)
        except SystemExit as stop:
            if job.cluster == "slurm":
                await_verdict(job.global_rank, stop.code)
            leave(job, stop.code)
        if job.cluster == "slurm":  # the run is done, and a process that is shutting down would die of it
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if dist.is_initialized():
            dist.destroy_process_group()


def meet_others(job):
    """Tell utils.init_distributed_mode which process this is, and where rank 0 waits: at a port of the first node.

    Not at a file in the shared folder: one that a killed run has left behind would stop the run that goes on from it,
    and network file systems may not lock. Here nothing stays behind, and after a requeue to other nodes the first of
    those is asked for.
    """
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(job.global_rank), str(job.num_tasks)
    os.environ["LOCAL_RANK"] = str(job.local_rank)
    os.environ["MASTER_ADDR"] = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
    os.environ["MASTER_PORT"] = str(20000 + int(re.sub(r"\D", "", job.job_id)) % 20000)


def await_verdict(rank, code):
    """After a signal, once the run has saved: stay until Slurm ends the process, for ten minutes at most.

    SIGTERM alone may mean that the job is cancelled, requeued or preempted, and a job that ends in the time that it is
    left before it is preempted counts as failed and does not come back. So it is for Slurm to end it; or for SIGUSR2,
    which submitit answers with a requeue, by rank 0. The other ranks must not end before that is done.
    """
    asked_to_end, warned = 128 + signal.SIGTERM, 128 + signal.SIGUSR2
    if code == asked_to_end or (code == warned and rank > 0):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("saved; waiting for Slurm to end or requeue the job", flush=True)
        time.sleep(MOST_PATIENCE)


def leave(job, code):
    """End this process with the exit code, and note the code where --wait looks for it; a requeue is none (-1, 144)."""
    if 0 < code < 144:
        utils.write_whole(code_file(job, job.global_rank), lambda file: file.write(str(code).encode()))
    sys.exit(code)


def code_file(job, rank):
    return str(job.paths.folder / f"{job.job_id}_{rank}_exit")


# ---- submission ----


def build_executor(folder, args):
    try:
        import submitit
    except ImportError as e:
        raise UserError("this needs submitit. Get it by: pip install submitit") from e
    for command in ("sbatch", "srun") if args.cluster == "slurm" else ():
        if shutil.which(command) is None:
            raise UserError(f"there is no {command} here. Go to a machine of the cluster, or try --cluster local")
    return submitit.AutoExecutor(folder, cluster=args.cluster, slurm_max_num_timeout=30)


def submit(executor, task, parameters):
    """The submitted job. Raises UserError, and takes its files away again, if Slurm does not accept it."""
    import submitit

    folder = fixed_part(executor.folder)
    before = set(folder.iterdir())
    executor.update_parameters(**parameters)
    try:
        with submitit.helpers.environment_variables(**python_environment()), contextlib.redirect_stderr(io.StringIO()):
            job = executor.submit(task)
    except submitit.core.utils.FailedJobError as e:
        for path in set(folder.iterdir()) - before:
            if re.fullmatch(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh", path.name):
                path.unlink()
        raise UserError(f"Slurm does not accept the job: {' '.join(str(e).split())}") from e
    print(f"submitted job {job.job_id}; its log is {job.paths.stdout}", flush=True)
    return job


def fixed_part(path):
    """The folder `path` up to where the number of the job comes in, if it does."""
    parts = Path(path).parts
    variable = [i for i, part in enumerate(parts) if "%j" in part]
    return Path(*parts[: variable[0]]) if variable else Path(path)


# ---- waiting ----


def follow(job, cluster, pause=2.0):
    """Print what rank 0 of a job writes until the job ends, and return its exit code."""
    if cluster == "debug":
        job.results()  # this runs it
        return 0
    shown, ended = 0, False
    while not ended:
        ended = has_ended(job, cluster)  # asked before the log is read, so that its last lines are shown too
        if job.paths.stdout.exists():
            with job.paths.stdout.open(errors="replace") as log:
                log.seek(shown)
                print(log.read(), end="", flush=True)
                shown = log.tell()
        if not ended:
            time.sleep(pause)
    return exit_code(job)


def has_ended(job, cluster):
    """Whether a job is neither running nor going to; a requeued one is."""
    if cluster == "local":
        return job.done()
    if all(path.exists() for path in result_files(job)):
        return True
    # Not by sacct, as submitit does it: there are clusters without accounting.
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={job.job_id}"], capture_output=True, text=True)
    return "Invalid job id" in asked.stderr or (asked.returncode == 0 and not asked.stdout.strip())


def result_files(job):
    return [job.task(rank).paths.result_pickle for rank in range(job.num_tasks)]


def exit_code(job):
    """0 if all processes of a job that has ended are done, else what one of them has noted, else 1.

    1 is what those note that have lost the connection to another: that one's code says more.
    """
    import submitit

    if all(path.exists() for path in result_files(job)):
        with contextlib.suppress(submitit.core.utils.UncompletedJobError):
            job.results()
            return 0
    noted = [Path(code_file(job, rank)) for rank in range(job.num_tasks)]
    code = max((int(path.read_text()) for path in noted if path.exists()), key=lambda code: code != 1, default=1)
    folder = job.paths.folder
    print(f"error: job {job.job_id} ended with {code}; its logs: {folder}/{job.job_id}_*_log.out", file=sys.stderr)
    return code


# ---- training, and what comes after ----


def main(args):
    check_args(args)
    args.output_dir = os.path.abspath(args.output_dir)
    folder = os.path.abspath(args.shared_dir or args.output_dir)
    executor = build_executor(folder, args)
    for flag, path in (("--output_dir", args.output_dir), ("--shared_dir", folder)):
        dino_cli.check_output_dir(fixed_part(path), flag)
    waits = args.wait or args.cluster == "debug"

    job = submit(executor, Task(main_dino.train_dino, training_args(args)), job_parameters(args, args.nodes))
    jobs = [job]
    if args.evaluate_after:
        import eval_knn

        if args.cluster != "slurm":
            end_unless_done(jobs.pop(), args.cluster)
        task = Task(eval_knn.main, evaluation_args(args, job.job_id))
        executor = build_executor(folder.replace("%j", job.job_id), args)  # its log lies beside the training's
        jobs.append(submit(executor, task, job_parameters(args, 1, after=job.job_id)))
    for job in jobs if waits else ():
        end_unless_done(job, args.cluster)


def end_unless_done(job, cluster):
    """Follow a job; if it fails, end with its exit code."""
    code = follow(job, cluster)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
