"""Train on a Slurm cluster: submit main_dino.py as a job that is requeued when its time is up, and resumes.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --data_path imagenet/train --output_dir runs/vits16
    python run_with_submitit.py --nodes 1 --ngpus 0 --tasks_per_node 2 --cluster local --wait \\
        --config recipes/demo.yaml --output_dir runs/demo                    # try it without Slurm or GPUs

Accepts all flags of main_dino.py and a few more. --output_dir gets what main_dino.py writes; --shared_dir gets the logs
(<job>_<rank>_log.out) and submitit's job files. ViT-S/16 after 100 epochs of ImageNet on two nodes of eight GPUs
reaches 69.3 % k-NN and 74.0 % linear, as with main_dino.py.
"""

import argparse
import contextlib
import importlib
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

import dino_cli
import main_dino
import utils
from dino_cli import at_least, positive
from utils import UserError

ROOT = os.path.dirname(os.path.abspath(__file__))

# ---- flags ----


def get_args_parser():
    """All flags, main_dino's among them, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("DINO on Slurm", add_help=False, parents=[main_dino.get_args_parser()])
    parser.set_defaults(output_dir="runs/%j", num_workers=10)  # not the cores of the machine that submits
    # fmt: off
    job = parser.add_argument_group("job", "%%j in --output_dir and --shared_dir is replaced by the job ID.")
    job.add_argument("--ngpus", default=8, type=at_least(0), metavar="N", help="""GPUs per node; there is one process
        per GPU. 0: train on CPUs; see --tasks_per_node.""")
    job.add_argument("--nodes", default=2, type=at_least(1), metavar="N", help="Number of nodes.")
    job.add_argument("--tasks_per_node", default=None, type=at_least(1), metavar="N",
        help="Processes per node with --ngpus 0. Default: 1.")
    job.add_argument("--timeout", default=2800, type=at_least(1), metavar="MINUTES", help="""Time limit of the job.
        Shorter jobs often start sooner and lose nothing: the run is requeued and resumes, up to 30 times.""")
    job.add_argument("--signal_delay", default=120, type=at_least(0), metavar="SECONDS",
        help="Save this long before the time limit. Raise it if a step and a checkpoint take minutes.")
    job.add_argument("--cpus_per_task", default=10, type=at_least(1), metavar="N",
        help="CPUs per process. Use at least --num_workers.")
    job.add_argument("--mem_gb", default=None, type=positive, metavar="GB",
        help="Memory per node. Default: 40 per process.")
    job.add_argument("--partition", default=None, metavar="NAME", help="Default: the cluster's default partition.")
    job.add_argument("--use_volta32", action="store_true", help="Use only nodes with the feature volta32gb.")
    job.add_argument("--comment", default="", metavar="TEXT", help="Comment that Slurm keeps with the job.")
    for name, text in (
        ("account", "Account to charge."), ("qos", "Quality of service."), ("exclude", "Nodes not to use."),
        ("nodelist", "Nodes to use."), ("constraint", "Features that the nodes must have."),
    ):
        job.add_argument(f"--slurm_{name}", default=None, metavar=name.upper(), help=text)
    job.add_argument("--slurm_extra", default=[], nargs="+", metavar="OPTION=VALUE",
        help="Any other options of sbatch, such as reservation=dino licenses=nfs.")
    job.add_argument("--shared_dir", default=None, metavar="DIR",
        help="Folder for logs and job files, visible from all nodes. Default: --output_dir.")
    job.add_argument("--cluster", default="slurm", choices=["slurm", "local", "debug"], help="""local: processes on
        this machine, restarted as Slurm would do; debug: one process, within this script.""")
    job.add_argument("--wait", action="store_true",
        help="Wait for the job, print its log, and exit with the exit code of the run.")
    job.add_argument("--evaluate_after", default=[], type=evaluations, metavar="knn,linear,logistic",
        help="Evaluate the teacher after training, with these scripts. Each is a separate job on one node.")
    job.add_argument("--evaluate_data", default=None, metavar="DIR",
        help="Folder with train and val for --evaluate_after. Default: the parent folder of --data_path.")
    # fmt: on
    return parser


def evaluations(text):
    """argparse type of --evaluate_after: names from `EVALUATIONS` with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in EVALUATIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(EVALUATIONS)}")
    return list(dict.fromkeys(names))


def check_args(args):
    """Raise UserError for flags that contradict each other, before anything is submitted."""
    if args.tasks_per_node is not None and args.ngpus:
        raise UserError(f"--ngpus {args.ngpus} starts one process per GPU. Remove --tasks_per_node")
    if args.ngpus == 0 and args.device not in ("auto", "cpu"):
        raise UserError(f"--ngpus 0 leaves no GPU for --device {args.device}. Raise --ngpus, or use --device cpu")
    if args.signal_delay >= 60 * args.timeout:
        raise UserError(
            f"--signal_delay {args.signal_delay} s leaves no time to train in --timeout {args.timeout} min. Lower it"
        )
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--cluster {args.cluster} has one node. Add --nodes 1")
    if args.cluster == "debug" and processes_per_node(args) > 1:
        raise UserError("--cluster debug runs one process. Add --ngpus 1, or --ngpus 0")
    if args.evaluate_data is not None and not args.evaluate_after:
        raise UserError(f"--evaluate_data {args.evaluate_data} has no effect without --evaluate_after")
    if args.evaluate_after and args.cluster == "local" and not args.wait:
        raise UserError("--evaluate_after on --cluster local has to wait for the training. Add --wait")
    for option in args.slurm_extra:
        if not re.fullmatch(r"[a-z][a-z-]*=.+", option):
            raise UserError(f"--slurm_extra {option} must have the form option=value, such as reservation=dino")
    main_dino.check_args(args)


# ---- job parameters ----


def processes_per_node(args):
    return args.ngpus or args.tasks_per_node or 1


def job_parameters(args, nodes, name="dino", after=None):
    """Keywords for submitit's executor.update_parameters. `after`: start only if the job with this ID succeeds."""
    processes = processes_per_node(args)
    features = ["volta32gb"] * args.use_volta32 + [args.slurm_constraint] * bool(args.slurm_constraint)
    extra = dict(option.split("=", 1) for option in args.slurm_extra)
    wanted = {
        "name": name,
        "nodes": nodes,
        "tasks_per_node": processes,
        "gpus_per_node": args.ngpus or None,
        "cpus_per_task": args.cpus_per_task,
        "mem_gb": args.mem_gb or 40 * processes,
        "timeout_min": args.timeout,
        "stderr_to_stdout": True,
        "slurm_signal_delay_s": args.signal_delay,
        "slurm_partition": args.partition,
        "slurm_comment": args.comment or None,
        "slurm_account": args.slurm_account,
        "slurm_qos": args.slurm_qos,
        "slurm_exclude": args.slurm_exclude,
        "slurm_nodelist": args.slurm_nodelist,
        "slurm_constraint": "&".join(features) or None,
        "slurm_dependency": f"afterok:{after}" if after else None,
        # An evaluation that can never start is removed from the queue; a preempted job is requeued.
        "slurm_additional_parameters": {**({"kill-on-invalid-dep": "yes"} if after else {}), "requeue": True, **extra},
        # Since Slurm 22.05 srun does not inherit the number of CPUs. If one process dies, end the others at once.
        "slurm_srun_args": [f"--cpus-per-task={args.cpus_per_task}", "--kill-on-bad-exit=1"],
        "slurm_setup": [f"export {name}={shlex.quote(value)}" for name, value in python_environment().items()],
    }
    return {name: value for name, value in wanted.items() if value is not None}


def python_environment():
    """Environment variables with which a job finds our modules, and not modules of the same name where it starts."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH")))), "PYTHONSAFEPATH": "1"}


def training_args(args):
    """The settings of main_dino.py alone; with --ngpus 0 on the CPU."""
    names = vars(main_dino.get_args_parser().parse_args([]))
    device = args.device if args.ngpus else "cpu"
    return argparse.Namespace(**{**{name: getattr(args, name) for name in names}, "device": device})


EVALUATIONS = ("knn", "linear", "logistic")


def evaluation(name, args, job_id):
    """The Task of a script of --evaluate_after, for the checkpoint of the training job.

    For linear classification several learning rates are tried, since the best one differs from network to network.
    """
    script = importlib.import_module(f"eval_{name}")
    named = args.data_path == "sample" or args.data_path.startswith("torchvision:")
    folder = args.data_path if named else os.path.dirname(os.path.abspath(args.data_path))
    flags = {
        **{name: getattr(args, name) for name in ("arch", "patch_size", "num_workers", "exif")},
        "image_size": args.global_crops_size,
        "pretrained_weights": os.path.join(args.output_dir.replace("%j", job_id), "checkpoint.pth"),
        "data_path": args.evaluate_data or folder,
        "device": training_args(args).device,
    }
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    if name == "linear":
        words += ["--output_dir", os.path.join(os.path.dirname(flags["pretrained_weights"]), "linear")]
        words += ["--lr", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3"]
        words += ["--n_last_blocks", "1", "--avgpool_patchtokens", "true"] if args.arch == "vit_base" else []
    return Task(script.main, script.get_args_parser().parse_args(words))


# ---- inside the job ----

WAIT_FOR_SLURM = 600  # seconds


class Task:
    """The callable that submitit pickles and every process of a job runs: `main(args)` as one distributed run.

    When time is up or the job is preempted, the run saves; then submitit calls `checkpoint` and requeues its result.
    """

    def __init__(self, main, args):
        self.main, self.args = main, args

    def checkpoint(self):
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def __call__(self):
        import submitit

        job = submitit.JobEnvironment()
        if job.cluster == "debug":  # the training in this process has ended with SIGTERM ignored
            signal.signal(signal.SIGTERM, utils.terminate)
        set_rank(job)
        values = {k: v.replace("%j", job.job_id) if isinstance(v, str) else v for k, v in vars(self.args).items()}
        try:
            self.main(argparse.Namespace(**values))
        except UserError as e:
            print(f"error (rank {job.global_rank}): {e}", file=sys.stderr, flush=True)
            leave(job, e.exit_code)
        except SystemExit as stop:
            if job.cluster == "slurm":
                wait_for_slurm(job.global_rank, stop.code)
            leave(job, stop.code)
        if job.cluster == "slurm":  # the run is done: a signal would kill the process while it shuts down
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        utils.leave_processes()


def set_rank(job):
    """Set the variables that utils.init_distributed_mode reads: ranks, and the address of rank 0 on the first node.

    The rendezvous is a port, not a file in the shared folder: a file that a killed run has left would stop the resumed
    run, and network file systems may not support locks. After a requeue to other nodes, the address is a new one.
    """
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(job.global_rank), str(job.num_tasks)
    os.environ["LOCAL_RANK"] = str(job.local_rank)
    os.environ["MASTER_ADDR"] = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
    os.environ["MASTER_PORT"] = str(20000 + int(re.sub(r"\D", "", job.job_id)) % 20000)


def wait_for_slurm(rank, code):
    """After a signal and the save that it caused, wait for Slurm to end this process, for ten minutes at most.

    SIGTERM alone can mean that the job is canceled, requeued or preempted. A job that ends by itself before it is
    preempted counts as failed and is not requeued. So Slurm has to end it, or SIGUSR2, on which submitit requeues the
    job from rank 0; the other ranks must not end before that.
    """
    terminated, time_is_up = 128 + signal.SIGTERM, 128 + signal.SIGUSR2
    if code == terminated or (code == time_is_up and rank > 0):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("saved; waiting for Slurm to end or requeue the job", flush=True)
        time.sleep(WAIT_FOR_SLURM)


def leave(job, code):
    """Exit with `code`, and save it for --wait. A requeue (-1, 144) is no exit code of the run and is not saved."""
    if 0 < code < 144:
        utils.write_whole(code_file(job, job.global_rank), lambda file: file.write(str(code).encode()))
    sys.exit(code)


def code_file(job, rank):
    return str(job.paths.folder / f"{job.job_id}_{rank}_exit")


# ---- submission ----


def build_executor(folder, args):
    """submitit's executor for --cluster. Raises UserError if submitit or Slurm's commands are missing."""
    try:
        import submitit
    except ImportError as e:
        raise UserError("run_with_submitit.py needs submitit: pip install submitit") from e
    for command in ("sbatch", "srun") if args.cluster == "slurm" else ():
        if shutil.which(command) is None:
            raise UserError(f"there is no command {command}. Run on a machine of the cluster, or use --cluster local")
    return submitit.AutoExecutor(folder, cluster=args.cluster, slurm_max_num_timeout=30)


def submit(executor, task, parameters):
    """Submit a task and return the job. If Slurm rejects it, remove its files and raise UserError."""
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
        raise UserError(f"Slurm rejected the job: {' '.join(str(e).split())}") from e
    print(f"submitted job {job.job_id}; its log is {job.paths.stdout}", flush=True)
    return job


def fixed_part(path):
    """The longest parent of a path (or the path itself) without %j: it can be created before the job has an ID."""
    parts = Path(path).parts
    variable = [i for i, part in enumerate(parts) if "%j" in part]
    return Path(*parts[: variable[0]]) if variable else Path(path)


# ---- waiting ----


def follow(job, cluster, pause=2.0):
    """Print the log of rank 0 until the job ends. Returns its exit code."""
    if cluster == "debug":
        job.results()  # runs the job
        return 0
    shown, ended = 0, False
    while not ended:
        ended = has_ended(job, cluster)  # before the log is read, so that its last lines are printed too
        if job.paths.stdout.exists():
            with job.paths.stdout.open(errors="replace") as log:
                log.seek(shown)
                print(log.read(), end="", flush=True)
                shown = log.tell()
        if not ended:
            time.sleep(pause)
    return exit_code(job)


def has_ended(job, cluster):
    """Whether a job is neither running nor in the queue. A requeued job has not ended."""
    if cluster == "local":
        return job.done()
    if all(path.exists() for path in result_files(job)):
        return True
    # squeue, not sacct as in submitit: some clusters have no accounting.
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={job.job_id}"], capture_output=True, text=True)
    return "Invalid job id" in asked.stderr or (asked.returncode == 0 and not asked.stdout.strip())


def result_files(job):
    return [job.task(rank).paths.result_pickle for rank in range(job.num_tasks)]


def exit_code(job):
    """Exit code of a job that has ended: 0 if all processes succeeded, else a saved code, else 1.

    Processes that lost the connection to another one save 1. Any other code tells more and is preferred.
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


# ---- training and evaluation ----


def main(args):
    """Submit the training as `args` say (see get_args_parser), and the evaluation. Raises UserError."""
    check_args(args)
    args.output_dir = os.path.abspath(args.output_dir)
    folder = os.path.abspath(args.shared_dir or args.output_dir)
    executor = build_executor(folder, args)
    for flag, path in (("--output_dir", args.output_dir), ("--shared_dir", folder)):
        dino_cli.check_output_dir(fixed_part(path), flag)
    waits = args.wait or args.cluster == "debug"

    job = submit(executor, Task(main_dino.train_dino, training_args(args)), job_parameters(args, args.nodes))
    jobs = [job]
    for name in args.evaluate_after:
        if args.cluster != "slurm":
            exit_if_failed(jobs.pop(), args.cluster)
        executor = build_executor(folder.replace("%j", job.job_id), args)  # its log is next to the training's
        parameters = job_parameters(args, 1, f"dino_{name}", after=job.job_id)
        jobs.append(submit(executor, evaluation(name, args, job.job_id), parameters))
    for job in jobs if waits else ():
        exit_if_failed(job, args.cluster)


def exit_if_failed(job, cluster):
    """Follow a job. If it fails, exit with its exit code."""
    code = follow(job, cluster)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
