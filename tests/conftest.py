"""Shared by all tests: reference numbers and their inputs, small data sets, real runs."""

import contextlib
import fcntl
import functools
import importlib
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tests run in parallel
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `pytest` alone does not add it
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dino_cli
import dino_sample

ROOT = Path(__file__).resolve().parent.parent
# A folder beside the checkout with goldens/ and data/. Tests that need it are skipped if there is none.
SHARED = Path(os.environ.get("DINO_TEST_DATA", ROOT.parent / "shared"))
# The mark is for tests that always compile. Tests of all recipes or documents skip the commands with --compile.
CAN_COMPILE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)
compiles = pytest.mark.skipif(not CAN_COMPILE, reason="--compile needs torch 2.5")
torch.set_num_threads(1)
dino_sample.SAMPLE_TRAIN, dino_sample.SAMPLE_VAL = 60, 15  # a quarter of the sample data set, whose images take seconds


# ---- reference numbers ----


def shared(part):
    """The path of reference data. Skips the test if this machine does not have it."""
    path = SHARED / part
    if not path.exists():
        pytest.skip(f"no {part} in {SHARED} (set DINO_TEST_DATA)")
    return path


def array(name, shape, scale=1.0):
    """The reference input of this name: normal float32 numbers, seeded by the name."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return (state.standard_normal(shape) * scale).astype(np.float32)


def tensor(name, shape, scale=1.0):
    return torch.from_numpy(array(f"open/{name}", shape, scale))


def fill(module, tag):
    """Set a module's weights to the reference weights of this tag."""
    state = module.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            filled = torch.from_numpy(array(f"{tag}/{key}", tuple(value.shape), 0.05))
            if key.endswith("weight_g"):
                filled = torch.ones_like(filled)
            elif key.endswith("running_var"):
                filled = 1 + filled.abs()
            elif key.endswith("weight") and filled.ndim == 1:
                filled = filled + 1
            state[key] = filled
    module.load_state_dict(state)
    return module


def assert_near(got, want, tolerance, what=""):
    """Assert equal shapes, and a relative error of at most `tolerance` in the L2 norm."""
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{what}: {got.shape} for {want.shape}"
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same random numbers in each test, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# ---- real data ----


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory):
    """The sample data set, built once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "dino-cache"
    os.environ["DINO_CACHE"] = str(cache)
    with open(base.parent / "dino-cache.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # otherwise each process would build it
        return Path(dino_sample.sample_dataset())


@pytest.fixture(scope="session")
def tiny_root(sample_root, tmp_path_factory):
    """A subset of the sample data: 4 classes with 10 training and 5 validation images each."""
    root = tmp_path_factory.mktemp("tiny")
    for part, number in (("train", 10), ("val", 5)):
        for name in ("astronaut", "brick", "coffee", "text"):
            (root / part / name).mkdir(parents=True)
            for source in sorted((sample_root / part / name).iterdir())[:number]:
                (root / part / name / source.name).symlink_to(source)
    return root


# ---- real runs ----


def arguments_of(script, *flags):
    """The parsed arguments of a script (a module) for these flags."""
    parser = dino_cli.OneLineParser(parents=[script.get_args_parser()])
    return dino_cli.parse_args(parser, [str(flag) for flag in flags])


def ending(monkeypatch, capsys, script, *flags):
    """Run a script (a module) in this process; it must end with an error line. Returns (exit code, that line)."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    main = getattr(script, "main", None) or script.train_dino
    with pytest.raises(SystemExit) as ended:
        dino_cli.run(main, script.get_args_parser(), "")
    line = capsys.readouterr().err.strip()
    line = line[max(line.find("error: "), 0) :]  # a progress bar may precede it
    assert "\n" not in line
    assert line.startswith("error: ") or ended.value.code == 130  # Ctrl-C
    return ended.value.code, line


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(script or its name, *words) -> the error line of a script that exits with code 2."""

    def run(script, *words):
        capsys.readouterr()
        script = importlib.import_module(script) if isinstance(script, str) else script
        code, line = ending(monkeypatch, capsys, script, *words)
        assert code == 2, line
        return line

    return run


@pytest.fixture
def offline(monkeypatch):
    """Downloads of weights fail with their URL as the message."""

    def refuse(url, **_):
        raise OSError(url)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


FORKS = multiprocessing.get_context("forkserver")


@functools.cache
def start_forks():
    """Start the server process that FORKS forks from. It has imported everything that takes seconds to import."""
    before = dict(os.environ)
    folders = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    FORKS.set_forkserver_preload(["conftest", "main_dino"])
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def use_small_networks(blocks):
    """Heads with 64 hidden units, not 2,048, and fewer blocks in vit_nano. Returns a function that undoes it.

    Else these are most of a small run's compute and files.
    """
    import dino_ablations
    import vision_transformer as vits

    init, nano, sizes = vits.DINOHead.__init__, vits.vit_nano, dino_ablations.head
    before = init.__defaults__
    init.__defaults__ = tuple(64 if default == 2048 else default for default in before)
    vits.vit_nano = functools.partial(nano, depth=blocks)
    dino_ablations.head = lambda args: {k: 64 if v == 2048 else v for k, v in sizes(args).items()}

    def undo():
        init.__defaults__, vits.vit_nano, dino_ablations.head = before, nano, sizes

    return undo


@pytest.fixture(scope="module")
def small_networks():
    """For runs in this process. Two blocks, so that one of them has drop path."""
    undo = use_small_networks(blocks=2)
    yield
    undo()


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def become(words, environment, screens, blocks):
    """Turn a forked process into a fresh `python <words>`, with stdout and stderr in the two files `screens`.

    If `screens` is the name of a terminal, the process is controlled by it.
    """
    if isinstance(screens, str):
        os.setsid()
        terminal = os.open(screens, os.O_RDWR)
        for number in range(3):
            os.dup2(terminal, number)
    else:
        for number, screen in enumerate(screens, start=1):
            with open(screen, "wb") as file:
                os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # Loader processes start as on this platform by default. A forked process inherits its server's start method.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    folders = (ROOT, ROOT / "tests")
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent in folders:
            del sys.modules[name]
    kind = words[0] if words[0] in ("-c", "-m") else None
    sys.argv = [kind, *words[2:]] if kind else list(words)
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    first = [str(ROOT) if kind else os.path.dirname(os.path.abspath(words[0])), *filter(None, given)]
    sys.path[:] = first + [path for path in sys.path if path and Path(path) not in folders]
    if blocks:
        use_small_networks(blocks)
    if kind == "-c":
        exec(words[1], {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def run_script(*words, processes=1, timeout=300, env=None, check=True, blocks=4, fresh=False):
    """Run `python <words>` in the checkout. Returns the completed process, with its output as text.

    It is forked from a warm process unless it has to be `fresh`. There main_dino.py trains small heads, and a vit_nano
    with this number of `blocks` (None: networks of their usual size). With several `processes`, each has the
    environment that torchrun would set. Their outputs are joined in the order of ranks, and the exit code is the first
    one that is not 0.
    """
    words = [str(word) for word in words]
    environment = {**os.environ, **(env or {})}
    if not fresh:
        done = run_forked(words, environment, processes, timeout, blocks if words[0] == "main_dino.py" else None)
    else:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if check:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{said}"
    return done


def run_forked(words, environment, number, timeout, blocks):
    start_forks()
    together = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        screens = [[Path(folder, f"{kind}{rank}") for rank in range(number)] for kind in ("out", "err")]
        processes = []
        for rank, screen in enumerate(zip(*screens, strict=True)):
            place = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
            processes.append(FORKS.Process(target=become, args=(words, {**environment, **place}, screen, blocks)))
            processes[-1].start()
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(until - time.monotonic(), 0.01))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        out, err = ("".join(path.read_bytes().decode() for path in kind if path.exists()) for kind in screens)
    if None in codes:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), out, err)


class CtrlC(io.StringIO):
    """Standard output that raises KeyboardInterrupt when the run prints a text."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, text):
        if self.text in text:
            raise KeyboardInterrupt
        return super().write(text)


def log_without_times(folder):
    """The lines of a run's log.txt, without times and memory, which differ from run to run."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_per_s", "_wait", "_mb"))} for line in lines]


# A training run that takes seconds: 2 + 2 crops of a few patches, batches of 8, K = 64.
# fmt: off
SMALL_RUN = [
    "--arch", "vit_nano", "--patch_size", "16", "--out_dim", "64", "--global_crops_size", "32",
    "--local_crops_size", "16", "--local_crops_number", "2", "--batch_size_per_gpu", "8", "--epochs", "2",
    "--warmup_epochs", "1", "--num_workers", "0", "--device", "cpu", "--saveckp_freq", "0",
    "--tensorboard", "off",
]
# fmt: on


# ---- small networks ----


def tiny_vit(seed=0, **changes):
    """A ViT of one block with random weights, except for `changes`."""
    import vision_transformer

    torch.manual_seed(seed)
    settings = {"img_size": [32], "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "qkv_bias": True}
    return vision_transformer.VisionTransformer(**{**settings, **changes})


def sharp_nano(side, seed=1):
    """A vit_nano/16 that attends to some patches much more than to others."""
    import dino_backbones

    torch.manual_seed(seed)
    model = dino_backbones.build_backbone("vit_nano", 16, side)[0].eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 6
    return model


def wide_nano(path, side):
    """Save weights of a vit_nano/8 that are larger than initial ones: the features of different images differ."""
    import vision_transformer

    torch.manual_seed(5)
    state = vision_transformer.vit_nano(patch_size=8, img_size=[side]).state_dict()
    wide = {key: 4 * value if key.endswith(("weight", "embed")) else value for key, value in state.items()}
    torch.save({**wide, "norm.weight": torch.rand(128), "norm.bias": torch.randn(128)}, path)
    return path


def area_under_curve(right, ranked):
    """Average precision of a ranking: the area under precision and recall, one trapezoid per positive, slowly."""
    area, hits = 0.0, 0
    for rank, number in enumerate(ranked):
        if number in right:
            left = hits / rank if rank else 1.0
            hits += 1
            area += (left + hits / (rank + 1)) / 2 / len(right)
    return area


def same_state(one, other):
    """Whether two modules or state dicts have the same tensors under the same names, in the same order."""
    one, other = (m.state_dict() if isinstance(m, torch.nn.Module) else m for m in (one, other))
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def assert_same(one, other):
    """Equal bit for bit, through nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert type(one) is type(other)
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@contextlib.contextmanager
def sizes_of_results():
    """A list of the sizes of all tensors that operations in the context return."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    with Watch():
        yield sizes
