"""Check that a change of the code does not change any number.

    python tests/referee.py record CHECKOUT FILE [--only NAME ...]     # run all cases, write their digests to FILE
    python tests/referee.py compare CHECKOUT FILE [--only NAME ...]    # run them again, compare with FILE

Each case runs the scripts of CHECKOUT as a user does, on tiny data, on the CPU. It collects a digest for every tensor
that is written and for every number that is logged or printed. `compare` exits with 1 if anything differs. `--only`
selects the cases with NAME in their names.

`record` also writes FILE without its ending + "_files": the data, weights for the evaluations, and checkpoints of
interrupted runs, which `compare` resumes with the new code. Digests depend on the machine and on library versions:
record and compare on the same machine. One side takes some minutes on two cores.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# ---- cases ----

VIT, RESNET, TIMM = "--arch vit_nano --patch_size 16", "--arch resnet18", "--arch timm:resnet10t"
SMALL = (
    "--out_dim 64 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --batch_size_per_gpu 8 "
    "--epochs 2 --warmup_epochs 1 --num_workers 0 --device cpu --saveckp_freq 0 --tensorboard off "
    "--momentum_teacher 0.9 "
)
FP32, BF16, FP16 = "--use_fp16 false", "--use_fp16 true --amp_dtype bf16", "--use_fp16 true --amp_dtype fp16"
FAST, SGD, LARS = "--augmentation fast", "--optimizer sgd", "--optimizer lars"
ACCUMULATE, HALF = "--grad_accum_steps 2 --batch_size_per_gpu 4", "--batch_size_per_gpu 4"
FEW = "--data_path @/images/val/0 --batch_size_per_gpu 3 --epochs 1"  # convolutions in fp16 are slow on a CPU

# At crops of 32/16 in bf16, ResNet-18 was seen to give other numbers in each run, and gradients that are not finite.
LARGER = "--global_crops_size 64 --local_crops_size 32"

# name: (processes, flags). Where a flag is given twice, the last one counts.
TRAINING = {
    "vit fp32": (1, f"{VIT} {FP32}"),
    "vit fp16 accumulate": (1, f"{VIT} {FP16} {ACCUMULATE}"),
    "vit fast bf16 2 processes": (2, f"{VIT} {BF16} {FAST} {HALF}"),
    "vit sgd fast accumulate 2 processes": (2, f"{VIT} {FP32} {SGD} {FAST} --grad_accum_steps 2 {HALF}"),
    "vit_tiny lars bf16": (1, f"--arch vit_tiny --patch_size 8 {BF16} {LARS} --batch_size_per_gpu 16"),
    "resnet sgd 2 processes": (2, f"{RESNET} {FP32} {SGD} {HALF}"),
    "resnet lars fast bf16 accumulate": (1, f"{RESNET} {BF16} {LARS} {FAST} {ACCUMULATE} {LARGER}"),
    "resnet fast fp16": (1, f"{RESNET} {FP16} {FAST} {FEW}"),
    "timm bf16 accumulate": (1, f"{TIMM} {BF16} {ACCUMULATE} {LARGER}"),
    "timm lars fast 2 processes": (2, f"{TIMM} {FP32} {LARS} {FAST} {HALF}"),
    "timm sgd": (1, f"{TIMM} {FP32} {SGD}"),
    "timm fp16 accumulate": (1, f"{TIMM} {FP16} {FEW} --grad_accum_steps 2"),
    "head with bn": (1, f"{VIT} --use_bn_in_head true --norm_last_layer false --local_crops_number 0 --clip_grad 0"),
    "gray": (1, f"{VIT} {FP32} --in_chans 1 --compute_stats true --data_path @/gray"),
    "grad checkpointing": (1, f"{VIT} {FP32} --grad_checkpointing true --drop_path_rate 0.3"),
    "init_from": (1, f"{VIT} {FP32} --init_from @/weights.pth --global_crops_size 48 --num_workers 2"),
    "recipe and knn": (1, "--config @/recipe.yaml --knn_every 1 --knn_data @/images"),
    "shards": (1, f"{VIT} {FP32} --data_path @/shards"),
}
# Runs that are interrupted and resumed. Their digests must be from the run of the same name above.
RESUMED = {
    "vit fp16 accumulate": signal.SIGKILL,
    "vit fast bf16 2 processes": signal.SIGTERM,
    "timm sgd": signal.SIGTERM,
}
WEIGHTS = {"vit fp32": "weights.pth", "resnet sgd 2 processes": "resnet.pth"}  # what the evaluations use
MAY_DIFFER = {"shards": "the order of images within shards may change"}

VIT_WEIGHTS = f"{VIT} --device cpu --pretrained_weights @/weights.pth"
UNTRAINED = "--device cpu --pretrained_weights random"
RESNET_WEIGHTS = f"{RESNET} --device cpu --pretrained_weights @/resnet.pth"
LABELED = "--data_path @/images --num_workers 0 --image_size 32"
KNN, LINEAR = f"eval_knn.py {LABELED} --nb_knn 3 5 10 20 50", f"eval_linear.py {LABELED} --epochs 2 --lr 0.1"
RETRIEVAL = "eval_image_retrieval.py --data_path @ --dataset roxford5k --num_workers 0"
COPIES = "eval_copy_detection.py --data_path @/copydays --num_workers 0 --imsize 64"
WHITENING = "--whitening_path @/images/train/0 --distractors_path @/images/train/1"
ATTENTION = "visualize_attention.py --image_path @/copydays/strong --image_size 64 80 --threshold 0.6"
VIDEO = "eval_video_segmentation.py --data_path @/davis --n_last_frames 2"

# name: (processes, script and flags, pattern of the printed result lines or None). % is the folder for output.
EVALUATIONS = {
    "knn": (1, f"{KNN} {VIT_WEIGHTS} --dump_features %", "classifier result"),
    "knn 2 processes": (2, f"{KNN} {RESNET_WEIGHTS} --temperature 0.2 --dump_features %", "classifier result"),
    "knn untrained on sample": (1, f"{KNN} {VIT} {UNTRAINED} --data_path sample --dump_features %", "classifier"),
    "linear": (1, f"{LINEAR} {VIT_WEIGHTS} --output_dir %", None),
    "linear pooled": (1, f"{LINEAR} {VIT_WEIGHTS} --n_last_blocks 1 --avgpool_patchtokens true --output_dir %", None),
    "linear 2 processes": (2, f"{LINEAR} {RESNET_WEIGHTS} --checkpoint_key student --output_dir %", None),
    "video": (1, f"{VIDEO} {VIT_WEIGHTS} --output_dir %", None),
    "retrieval": (1, f"{RETRIEVAL} {VIT_WEIGHTS} --imsize 96", "mAP"),
    "retrieval multiscale": (1, f"{RETRIEVAL} {RESNET_WEIGHTS} --imsize 96 --multiscale true", "mAP"),
    "copies": (1, f"{COPIES} {VIT_WEIGHTS}", "mAP"),
    "copies whitened": (1, f"{COPIES} {VIT_WEIGHTS} {WHITENING}", "mAP"),
    "attention": (1, f"{ATTENTION} {VIT_WEIGHTS} --output_dir %", None),
    "export pth": (1, f"export.py --to backbone {VIT_WEIGHTS} --output %/weights.pth", None),
    "export safetensors": (1, f"export.py --to backbone {RESNET_WEIGHTS} --output %/weights.safetensors", None),
    "export timm": (1, f"export.py --to timm {VIT_WEIGHTS} --image_size 48 --output %/weights.safetensors", None),
    "export hf": (1, f"export.py --to hf {VIT_WEIGHTS} --image_size 32 64 --output %/hf", None),
    "export onnx": (1, f"export.py --to onnx {VIT_WEIGHTS} --image_size 48 --output %/weights.onnx", None),
    "export onnx resnet": (1, f"export.py --to onnx {RESNET_WEIGHTS} --image_size 32 --output %/weights.onnx", None),
}


# ---- data ----


def picture(seed, mode="RGB"):
    """A reproducible picture of waves, a rectangle and noise; one of five is large."""
    rng = np.random.RandomState(seed)
    height, width = rng.randint(48, 110, 2) * (4 if seed % 5 == 0 else 1)
    y, x = np.mgrid[:height, :width] / 100
    waves = [np.sin(rng.uniform(2, 25) * x + rng.uniform(2, 25) * y + rng.uniform(6)) for _ in range(3)]
    pixels = 128 + rng.uniform(30, 80, 3) * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    top, left = rng.randint(0, 30, 2)
    pixels[top : top + 25, left : left + 30] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def write_data(root):
    """Labeled images, gray images, tar shards, a recipe, and small copies of the layouts of section 4 of the paper."""
    for part, label, number in ((p, c, i) for p, n in (("train", 12), ("val", 6)) for c in range(8) for i in range(n)):
        seed = 1000 * (part == "val") + 100 * label + number
        save(picture(seed), root / "images" / part / str(label) / f"{number:03}.{'png' if number % 3 else 'jpg'}")
    for number in range(40):
        save(picture(2000 + number, "L"), root / "gray" / f"{number:03}.png")
    (root / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(root / "shards" / f"{shard:04}.tar", "w") as tar:
            for path in sorted((root / "images" / "train" / f"{shard}").iterdir()):
                tar.add(path, f"{shard}{path.name}")
    words = f"{SMALL} {VIT} {FP32} --teacher_temp 0.07 --warmup_teacher_temp_epochs 2 --seed 3".split()
    lines = [f"{flag[2:]}: {value}\n" for flag, value in zip(words[::2], words[1::2], strict=True)]
    (root / "recipe.yaml").write_text("".join(lines) + "global_crops_scale: [0.3, 1.0]\nblur_radius: [0.1, 0.5]\n")
    write_evaluation_data(root)


def write_evaluation_data(root):
    retrieval, copies, davis = root / "roxford5k", root / "copydays", root / "davis"
    cfg = {"imlist": [], "qimlist": [], "gnd": []}
    for number in range(12):
        image = picture(4001 + 5 * number)
        width, height = image.size
        views = [image.crop((width // 6, 0, width, height)), ImageOps.mirror(image), image.rotate(30)]
        for name, view in zip("abcq", [*views, image], strict=True):
            cfg["qimlist" if name == "q" else "imlist"].append(f"{number}{name}")
            save(view, retrieval / "jpg" / f"{number}{name}.jpg")
        easy, hard, junk = ([3 * number + view] for view in range(3))
        cfg["gnd"].append({"bbx": [0.0, 1.0, 40.5, 40.0], "easy": easy, "hard": hard, "junk": junk})
        save(image, copies / "original" / f"2{number:03}00.png")
        save(image.resize((9, 9)), copies / "jpegqual" / "3" / f"2{number:03}00.jpg", quality=3)
        save(image.crop((0, 0, width // 3, height // 3)), copies / "crops" / "80" / f"2{number:03}00.png")
        save(views[number % 3], copies / "strong" / f"2{number:03}01.png")
    (retrieval / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(cfg, protocol=2))
    back, front = (np.array(picture(5001 + i).resize((80, 60))) for i in range(2))
    for t in range(4):
        labels = np.zeros((60, 80), dtype=np.uint8)
        labels[8:32, 6 + 4 * t : 34 + 4 * t], labels[38:56, 44 : 68 - 2 * t] = 1, 2
        frame, mask = Image.fromarray(np.where(labels[..., None] > 0, front, back)), Image.fromarray(labels)
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        save(frame, davis / "JPEGImages" / "480p" / "clip" / f"{t:05}.jpg", quality=95)
        save(mask, davis / "Annotations" / "480p" / "clip" / f"{t:05}.png")
    (davis / "ImageSets" / "2017").mkdir(parents=True)
    (davis / "ImageSets" / "2017" / "val.txt").write_text("clip\n")


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


# ---- runs ----


class Runner:
    """Runs the scripts of one checkout. `files` holds the data, `folder` is for what the scripts write."""

    def __init__(self, checkout, files, folder):
        self.checkout, self.files, self.folder = Path(checkout).resolve(), Path(files).resolve(), Path(folder)
        # One thread: the order of sums is fixed. The checkout is not modified: no bytecode is written.
        ones = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "HF_HUB_OFFLINE"), "1")
        self.environment = {**os.environ, **ones, "CUDA_VISIBLE_DEVICES": "", "DINO_CACHE": str(self.folder / "cache")}

    def run(self, words, output, processes=1, interrupt=None):
        """Run a script; returns what it printed. With `interrupt`, sends this signal after the first checkpoint."""
        script, *flags = words.replace("@", str(self.files)).replace("%", str(output)).split()
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split() * (processes > 1)
        command = [sys.executable, *launcher, str(self.checkout / script), *flags]
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "stdout", "w+") as out, open(output / "stderr", "w+") as err:
            process = subprocess.Popen(command, cwd=output, env=self.environment, stdout=out, stderr=err)
            if interrupt:
                while process.poll() is None and not (output / "checkpoint.pth").exists():
                    time.sleep(0.005)
                process.send_signal(interrupt)
            code = process.wait()
            out.seek(0), err.seek(0)
            printed, errors = out.read(), err.read()
        if code and not interrupt:
            raise RuntimeError(f"{' '.join(command)} exited with {code}:\n{errors[-1500:]}")
        return printed

    def train(self, name, output, interrupt=None):
        processes, flags = TRAINING[name]
        words = f"main_dino.py {SMALL} --data_path @/images/val {flags} --saveckp_iters 2 --output_dir %"
        self.run(words, output, processes, interrupt)
        return checkpoint_digests(output / "checkpoint.pth") | log_digests(output / "log.txt")

    def kept(self, name):
        return self.files / "interrupted" / name.replace(" ", "_")

    def interrupted(self, name, output):
        """Begin a training run and interrupt it within an epoch."""
        with contextlib.suppress(FileNotFoundError):  # there is no log.txt yet
            self.train(name, output, RESUMED[name])
        checkpoint = torch.load(output / "checkpoint.pth", weights_only=False)
        if not (checkpoint.get("step") or checkpoint.get("images_done")):  # older and newer versions
            raise RuntimeError(f"{name}: the run was not interrupted within an epoch, try again")

    def resume(self, name, output, recorded=False):
        """Resume an interrupted run of this checkout, or the `recorded` one."""
        if recorded:
            shutil.copytree(self.kept(name), output)
        else:
            self.interrupted(name, output)
        return self.train(name, output)

    def evaluate(self, name, output):
        processes, words, pattern = EVALUATIONS[name]
        printed = self.run(words, output, processes)
        digests = file_digests(output)
        if pattern:
            lines = [line for line in printed.splitlines() if re.search(pattern, line)]
            digests |= {f"printed/{i}": " ".join(re.findall(r"\d+(?:\.\d+)?", line)) for i, line in enumerate(lines)}
        if not digests:
            raise RuntimeError(f"{name}: no results were found in\n{printed}")
        return digests

    def case(self, name, function):
        """(digests or None, error or None, seconds) of a case."""
        start, output = time.monotonic(), self.folder / re.sub(r"\W", "_", name)
        try:
            return function(output), None, time.monotonic() - start
        except Exception as e:
            return None, f"{type(e).__name__}: {e}", time.monotonic() - start
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def write_weights(self, name, file):
        """Weights for the evaluations."""
        self.train(name, self.folder / file)
        checkpoint = torch.load(self.folder / file / "checkpoint.pth", weights_only=False)
        if file == "weights.pth":  # larger weights: else features of all images are nearly the same
            for state in (checkpoint["student"], checkpoint["teacher"]):
                state |= {key: 4 * value if value.ndim > 1 else value for key, value in state.items()}
        torch.save(checkpoint, self.files / file)


# ---- digests ----


def digest(value):
    """16 hexadecimal digits of a tensor or array; short values as text."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        content = f"{value.dtype} {tuple(value.shape)}".encode()
        content += value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]
    return repr(value)


def flatten(value, name):
    """{path: digest} of all values in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: found for part, inner in items for key, found in flatten(inner, f"{name}/{part}").items()}
    return {name: digest(value)}


def checkpoint_digests(path):
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    parts = ("student", "teacher", "optimizer", "dino_loss", "fp16_scaler", "state_dict", "epoch", "best_acc")
    return flatten({part: checkpoint[part] for part in parts if part in checkpoint}, path.name.split(".")[0])


def log_digests(path):
    """Numbers of log.txt, without times and memory."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not re.search("_per_s|_wait|_mb|time|warnings", k)} for line in lines]
    return flatten(lines, "log")


def onnx_output(path):
    """The output for a fixed input, to 6 decimals."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    values = np.random.RandomState(0).standard_normal([2, *images.shape[1:]]).astype(np.float32)
    return np.round(session.run(None, {images.name: values})[0], 6)


def file_digests(output):
    """Digests of all files that an evaluation or an export has written, apart from texts and matplotlib's pages."""
    from safetensors.torch import load_file

    readers = {
        ".pth": torch.load,
        ".safetensors": load_file,
        ".onnx": onnx_output,
        ".png": lambda p: np.array(Image.open(p)),
    }
    readers[".json"] = lambda p: json.loads(p.read_text())
    found = {}
    for path in sorted(output.rglob("*")):
        if path.name == "log.txt":
            found |= log_digests(path)
        elif path.name == "checkpoint.pth.tar":
            found |= checkpoint_digests(path)
        elif path.suffix in readers and path.name != "overview.png":
            found |= flatten(readers[path.suffix](path), str(path.relative_to(output)))
    return found


# ---- the comparison ----


def all_cases(runner, only):
    """(case, name of the digests that it must give, function of the output folder) of the selected cases."""
    cases = [(name, name, partial(runner.train, name)) for name in TRAINING]
    for name in RESUMED:
        cases.append((f"resume: {name}", name, partial(runner.resume, name)))
        cases.append((f"resume recorded: {name}", name, partial(runner.resume, name, recorded=True)))
    cases += [(name, name, partial(runner.evaluate, name)) for name in EVALUATIONS]
    return [case for case in cases if not only or any(word in case[0] for word in only)]


def differences(expected, found):
    """A line per group of digests that differ: how many, and the first of them."""
    groups = {}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            groups.setdefault("/".join(key.split("/")[:2]), []).append(key)
    firsts = {group: (len(keys), keys[0]) for group, keys in groups.items()}
    return [
        f"{n} values in {group}, first {k}: {expected.get(k)} -> {found.get(k)}" for group, (n, k) in firsts.items()
    ]


def judge(name, result, expected):
    """Print the row of a case; returns whether it passes."""
    found, error, seconds = result
    lines = [error] if error else ["nothing was recorded"] if expected is None else differences(expected, found)
    verdict = "FAILED" if error else "DIFFERENT" if lines else "same"
    passes = not lines or (name in MAY_DIFFER and not error)
    print(f"{name:45} {verdict:10} {len(found or ()):5} values {seconds:6.1f} s", flush=True)
    for line in [*lines, *([f"accepted: {MAY_DIFFER[name]}"] if lines and passes else [])]:
        print(f"    {line}")
    return passes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("checkout", help="folder of the code")
    parser.add_argument("file", type=Path, help="JSON file of the digests")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only cases with NAME in their names")
    args = parser.parse_args()
    start, files = time.monotonic(), args.file.with_name(f"{args.file.stem}_files")
    with tempfile.TemporaryDirectory(prefix="referee-") as folder, ThreadPoolExecutor(2) as pool:
        runner = Runner(args.checkout, files, folder)
        if args.action == "record":
            shutil.rmtree(files, ignore_errors=True)
            write_data(files)
            jobs = [pool.submit(runner.write_weights, *what) for what in WEIGHTS.items()]
            jobs += [pool.submit(runner.interrupted, name, runner.kept(name)) for name in RESUMED]
            for job in jobs:
                job.result()
        recorded = json.loads(args.file.read_text()) if args.action == "compare" else {}
        started = [(*case[:2], pool.submit(runner.case, case[0], case[2])) for case in all_cases(runner, args.only)]
        passed = []
        for name, expected, future in started:
            result = future.result()
            if args.action == "record" and name == expected and result[0]:
                recorded[name] = result[0]
            passed.append(judge(name, result, recorded.get(expected)))
    if args.action == "record":
        args.file.write_text(json.dumps(recorded, indent=0))
    print(f"{sum(passed)} of {len(passed)} cases pass, {time.monotonic() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
