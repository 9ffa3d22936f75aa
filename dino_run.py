"""Keeps a run alive: resume, watch, save, stop, log. Changes none of its numbers."""

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import dino_crops
import dino_data
import dino_features
import dino_health
import utils
from utils import UserError

# ---- signals ----


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGUSR1 and SIGUSR2, so that a run can finish its step and save before it ends.

    As a context manager; `signal` is the number of the first that came, 0 before. A second SIGINT interrupts at once;
    not within a second, because launchers pass on a Ctrl-C that the processes have had from the terminal already.
    """

    def __enter__(self):
        self.signal, self.noted, self.interrupted, self.before = 0, set(), None, {}
        self.children = set(multiprocessing.active_children())
        if threading.current_thread() is threading.main_thread():  # Python's signals are the main thread's
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
                number = getattr(signal, name, None)  # Windows has the first two
                if number is not None:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, error=None, *_):
        # A script's processes end together from here on, and launchers send SIGTERM to all behind the first that ends:
        # it must not change the exit code, by which a job's script knows whether to come back.
        agreed = error is None or issubclass(error, UserError)
        ending = agreed and self.before.get(signal.SIGTERM) is utils.terminate
        for number, handler in self.before.items():
            if ending and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.kill_loaders()

    def kill_loaders(self):
        """End the processes of loaders. Python would at its end, by the SIGTERM that they ignore, and wait for ever."""
        deaf = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if deaf else None  # torch's would raise an error
        for child in set(multiprocessing.active_children()) - self.children:
            child.kill()
            child.join()
        if deaf:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)

    def note(self, number, _):
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted is not None and now - self.interrupted > 1:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or now
        self.signal = self.signal or number
        self.noted.add(number)

    def leave(self, number):
        """End as signal `number` asks: by what handled it before us, as under submitit, or with code 128 + number.

        What handled others that have come here is called, too: Slurm may send SIGTERM first and SIGUSR2 behind it.
        """
        for each in sorted({number, *self.noted}):
            handler = self.before.get(each)
            if callable(handler) and handler not in (signal.default_int_handler, utils.terminate):
                self.__exit__()
                handler(each, None)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(128 + number)


# ---- steps ----


def agree(loss, *wishes):
    """What one process finds, all do: a HostCopy of [whether any loss is not finite, the largest of each wish].

    `loss` is a scalar on the device, `wishes` are numbers on the host. One small all-reduce, and nobody waits.
    """
    flags = torch.stack([(~loss.detach().isfinite()).float(), *(loss.new_full((), float(wish)) for wish in wishes)])
    if utils.get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return utils.HostCopy(flags)


def gradient_norms(student, scale):
    """L2 norm of each parameter's gradient by its name, as text: NaN and infinity are no JSON. `scale` is fp16's."""
    return {name: str(p.grad.norm().item() / scale) for name, p in student.named_parameters() if p.grad is not None}


def leave_out(bad_steps, loss, loss_terms, norms, dataset, indices, epoch, step, args):
    """Say that a step is left out; after too many, write what there is to know to bad_step.json and end the run."""
    losses = utils.gather_objects(loss.item())
    bad_ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
    value = losses[bad_ranks[0]]
    where = f"in epoch {epoch}, step {step}" + f" (rank {', '.join(map(str, bad_ranks))})" * (len(losses) > 1)
    utils.log(f"warning: the loss is {value} {where}: this step is left out ({bad_steps} in a row)")
    if bad_steps <= args.max_bad_steps:
        return
    found = {
        "step": step,
        "epoch": epoch,
        "loss": str(loss.item()),
        "loss_terms": [[[str(term) for term in view] for view in views] for views in loss_terms.tolist()],
        "gradient_norms": norms(),
        "images": [dataset.images.name(i) for i in indices.tolist()],
    }
    everyones, details = utils.gather_objects(found), "bad_step.json has details"
    if utils.is_main_process():
        text = json.dumps(everyones, indent=1)
        try:
            utils.write_whole(os.path.join(args.output_dir, "bad_step.json"), lambda file: file.write(text.encode()))
        except OSError as e:
            details = f"bad_step.json could not be written ({e.strerror})"
    raise UserError(
        f"the loss is {value} {where}, after {bad_steps - 1} such steps in a row; {details}. The checkpoints are from "
        "before; lower --lr or --clip_grad, or try --use_fp16 false",
        exit_code=3,
    )


# ---- k-NN during training ----


NEIGHBOURS, TEMPERATURE = 20, 0.07


class OnlineKnn:
    """Every so many epochs of a run, the accuracy with which the teacher's features classify labelled images.

    The images are those of `knn_data`, of train/ and val/ in it or, if it has class folders only, of those, where every
    tenth image of a class asks and the others answer; without it, those of the training folder, divided like that.
    Training takes no notice: it sees the images that it would see anyway, and no label. Raises UserError if there are
    none.
    """

    def __init__(self, args, images, device):
        self.args, self.device = args, device
        inputs = utils.inputs_of(args)
        transform = dino_crops.eval_transform(args.global_crops_size, inputs)
        if args.knn_data is None:
            self.sets = dino_data.split_every_tenth(images, transform, f"--data_path {args.data_path}", inputs)
        else:
            self.sets = dino_data.find_labelled(args.knn_data, transform, args.exif, "--knn_data", inputs)
        for dataset in self.sets[:2]:
            dataset.lenient = True  # what was trained for a week does not end here

    def due(self, epoch):
        """Whether the accuracy is wanted behind this epoch, counted from 0; behind the last one it always is."""
        return (epoch + 1) % self.args.knn_every == 0 or epoch + 1 == self.args.epochs

    def accuracies(self, backbone, stop=None):
        """{"knn_top1": …, "knn_top5": …} in per cent; the same on all ranks, all of which have to call it.

        Raises utils.Stopped if the StopRequest `stop` has a signal on any of them.
        """
        began, training = time.time(), backbone.training
        backbone.eval()
        how = (self.args.batch_size_per_gpu, self.args.num_workers, self.device)
        features = dino_features.labelled_features(backbone, self.sets, *how, stop=stop)
        backbone.train(training)
        found = None
        if features:
            top1, top5 = dino_features.knn_accuracies(*features, [NEIGHBOURS], TEMPERATURE)[NEIGHBOURS]
            found = {"knn_top1": top1, "knn_top5": top5}
        found = utils.gather_objects(found)[0]  # the others wait for rank 0 here
        utils.log(
            f"{NEIGHBOURS}-NN of the teacher, {len(self.sets[1])} images among {len(self.sets[0])}: "
            f"top-1 {found['knn_top1']:.2f} %, top-5 {found['knn_top5']:.2f} % ({time.time() - began:.0f} s)"
        )
        return found


# ---- the run ----


class RunKeeper:
    """Where in its epoch a run begins, when it has to be saved, and whether it is to stop.

    `state(epoch, step, meters)` gives what a checkpoint holds; the doctor is health.py's, the neighbours are an
    OnlineKnn or None. Without arguments one that does nothing.
    """

    def __init__(
        self,
        args=None,
        student=None,
        state=None,
        writer=None,
        stop=None,
        doctor=None,
        neighbours=None,
        first_step=0,
        meters=(),
        sittings=(),
    ):
        self.args, self.student, self.state, self.writer, self.stop = args, student, state, writer, stop
        self.doctor, self.neighbours = doctor, neighbours
        self.first_step, self.meters, self.sittings = first_step, meters, sittings
        self.saved_at, self.stopped_by, self.bad_steps, self.lanes = time.monotonic(), 0, 0, 1
        self.unlogged = []

    def look(self, step, metrics, student, teacher, dino_loss, gradient_norms):
        """Measure the run's health, on the steps that are logged; rank 0 warns of what it sees."""
        if self.args is None:
            return
        metrics.update(**dino_health.step_numbers(teacher.features, dino_loss, gradient_norms))
        if utils.is_main_process():
            numbers = {name: meter.value for name, meter in metrics.meters.items()}
            self.doctor.curves.add(step, numbers)
            about = {"feature_dim": teacher.features.shape[1], "images": len(teacher.features) // 2}
            self.doctor.check_step(step, {**numbers, **about}, student, teacher)

    def note_bad_images(self, wrong=()):
        """Take down what could not be read for a batch; UserError is raised when that is too much."""
        found = dict(text.split("\0", 1) for text in wrong if text)
        if self.args is None or found.keys() <= self.doctor.bad_images.keys():
            return
        for name in found.keys() - self.doctor.bad_images.keys():
            utils.say(f"warning: {found[name]}. Another is taken in its place")
        self.doctor.bad_images.update(found)
        self.check_bad_images()

    def check_bad_images(self):
        bad, images = self.doctor.bad_images, self.args.images
        if len(bad) > math.ceil(self.args.max_bad_images * images):
            self.write_bad_images()
            raise UserError(
                f"{len(bad)} of {images} images can't be read, which is more than --max_bad_images "
                f"{self.args.max_bad_images} allows: {utils.summarize(sorted(bad))}. Repair or remove what stands in "
                f"{os.path.join(self.args.output_dir, 'bad_images.txt')}, or allow more"
            )

    def share_bad_images(self):
        """Let all processes know what any of them could not read. All of them have to call it."""
        known = len(self.doctor.bad_images)
        for found in utils.gather_objects(self.doctor.bad_images):
            self.doctor.bad_images.update(found)
        if self.doctor.bad_images and utils.is_main_process():
            self.write_bad_images()
        if len(self.doctor.bad_images) > known:
            self.check_bad_images()

    def write_bad_images(self):
        """bad_images.txt: in each line a name (an odd one as Python writes it), a tab, and what is wrong with it."""
        lines = []
        for name, why in sorted(self.doctor.bad_images.items()):
            why = why.removeprefix(f"can't read the image {name}: ").removesuffix(". Repair or remove it")
            lines.append(f"{utils.printable(name)}\t{' '.join(why.split())}\n")
        text = "".join(lines)
        path = os.path.join(self.args.output_dir, "bad_images.txt")
        try:
            utils.write_whole(path, lambda file: file.write(text.encode(errors="replace")))
        except OSError as e:
            utils.log(f"warning: {path} could not be written ({e.strerror})")

    def evaluates(self, epoch):
        """Whether this epoch ends with a look at the neighbours."""
        return bool(self.neighbours and self.neighbours.due(epoch))

    def end_collapsed(self, epoch, done):
        what = utils.gather_objects(self.doctor.collapse)[0]
        self.writer.wait()
        utils.gather_objects(None)  # nobody ends before rank 0 has written
        saved = "not saved" if self.writer.failures else "saved"
        raise UserError(f"stopped in epoch {epoch} after step {done}, {saved}: {what}", exit_code=4)

    def wishes(self, step):
        """(signal to stop or 0, whether to save, whether the run has collapsed) after this step, as far as is known."""
        if self.args is None:
            return 0, False, False
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = self.args.save_every_minutes and minutes >= self.args.save_every_minutes
        by_step = self.args.saveckp_iters and (step + 1) % self.args.saveckp_iters == 0
        return self.stop.signal, bool(by_time or by_step), bool(self.args.stop_on_collapse and self.doctor.collapse)

    def check_weights(self):
        """Raise UserError (exit code 3) rather than save weights that no run can go on from."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.student.parameters()]).all():
            raise UserError(
                "the weights are no longer finite: a gradient was not, in a step whose loss was. The checkpoints are "
                "from before; lower --lr or --clip_grad, or try --use_fp16 false",
                exit_code=3,
            )

    def save(self, epoch, step, meters):
        self.check_weights()
        self.share_bad_images()
        share = utils.global_batch(vars(self.args)) // utils.get_world_size()
        now = (utils.get_world_size(), share)
        unknown = [(*now, self.first_step, self.lanes)] if self.first_step else []  # as the sampler took it
        sitting = (*now, step - self.first_step, self.lanes)
        self.writer.save(self.state(epoch, step, meters, [*(self.sittings or unknown), sitting]))
        self.saved_at = time.monotonic()

    def log_epoch(self, stats):
        """Add a line to log.txt on rank 0. What can't be written now is written with the next."""
        if not utils.is_main_process():
            return
        if self.doctor.warnings:
            stats["warnings"] = self.doctor.warnings
            self.doctor.warnings = []
        self.unlogged.append(stats)
        try:
            while self.unlogged:
                utils.write_log_line(self.args.output_dir, self.unlogged[0])
                self.unlogged.pop(0)
        except OSError as e:
            path = os.path.join(self.args.output_dir, "log.txt")
            utils.log(f"warning: {path} could not be written ({e.strerror}). The run goes on")

    def save_epoch(self, epoch, best=False):
        """Save behind a whole epoch, the best and some others under a name of its own too; the next starts afresh."""
        self.check_weights()
        copies = [os.path.join(self.args.output_dir, "checkpoint_best.pth")] * best
        if self.args.saveckp_freq and epoch % self.args.saveckp_freq == 0:
            copies.append(os.path.join(self.args.output_dir, f"checkpoint{epoch:04}.pth"))
        self.writer.save(self.state(epoch + 1), *copies)
        self.saved_at, self.first_step, self.meters, self.sittings = time.monotonic(), 0, (), ()


def describe_run(args, device, amp_dtype, steps):
    precision = str(amp_dtype).removeprefix("torch.") if amp_dtype else "float32"
    flags = "\n".join(f"{k}: {v}" for k, v in sorted(vars(args).items()))
    return (
        f"{flags}\n{args.arch} on {args.world_size} × {device.type} in {precision}: {args.images} images, "
        f"{steps} steps of {utils.global_batch(vars(args))} in each of {args.epochs} epochs"
    )
