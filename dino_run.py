"""Keeps a run alive: resume, watch, save, stop, log. Changes none of its numbers.

`Run` is what main_dino.train_one_epoch calls at each step. `Bare` has the same calls without files, signals and checks,
for tests and benchmarks.
"""

import argparse
import contextlib
import json
import math
import os
import time

import torch
import torch.distributed as dist

import dino_checkpoints
import dino_cli
import dino_compile
import dino_features
import dino_files
import dino_health
import dino_signals
import utils
from dino_cli import at_least, between
from utils import Stopped, UserError, bool_flag

# ---- flags ----


def flags():
    """The flags of the run itself: output, saving, logs, machine. A parser for `parents=[...]`."""
    parser = argparse.ArgumentParser(add_help=False)
    # fmt: off
    run = parser.add_argument_group("output and resuming")
    dino_cli.add_config_flags(run)
    run.add_argument("--output_dir", default=".", metavar="DIR",
        help="Where checkpoints and logs go. If it contains a checkpoint.pth, the run resumes from it.")
    run.add_argument("--saveckp_freq", default=20, type=at_least(0), metavar="EPOCHS",
        help="Every N epochs, also keep the checkpoint as checkpointNNNN.pth. 0: never.")
    run.add_argument("--saveckp_iters", default=0, type=at_least(0), metavar="STEPS",
        help="Also save checkpoint.pth every N steps. 0: after epochs only.")
    run.add_argument("--save_every_minutes", default=15.0, type=at_least(0, float), metavar="MINUTES",
        help="Also save checkpoint.pth when this much time has passed since it was last saved. 0: never.")
    run.add_argument("--saveckp_epochs", default=1, type=at_least(1), metavar="EPOCHS", help="""Save checkpoint.pth
        after every N-th epoch, the last, and those with a copy. More than 1 saves time if epochs take seconds.""")
    run.add_argument("--allow_changed_args", default=False, type=bool_flag, metavar="BOOL",
        help="Resume although settings have changed that change the result, such as --epochs or --lr.")
    run.add_argument("--max_bad_steps", default=5, type=at_least(0), metavar="N", help="""Skip a step whose loss is not
        finite. End the run (exit code 3) after more than N such steps in a row.""")
    run.add_argument("--stop_on_collapse", default=False, type=bool_flag, metavar="BOOL",
        help="Save and end the run (exit code 4) when it looks collapsed. Without this it is a warning.")

    watch = parser.add_argument_group("watching")
    watch.add_argument("--knn_every", default=0, type=at_least(0), metavar="EPOCHS", help="""Every N epochs, and after
        the last, measure the k-NN accuracy of the teacher; the best one is kept as checkpoint_best.pth. 0: never.""")
    watch.add_argument("--knn_data", default=None, metavar="PATH", help="""Labeled images for --knn_every: a folder with
        train and val, or class folders. Default: every tenth image per class of --data_path is classified by the
        others.""")
    watch.add_argument("--knn_student", default=False, type=bool_flag, metavar="BOOL",
        help="Also measure the student, as in the paper's Figure 6: a teacher that is ahead of it keeps it learning.")
    watch.add_argument("--tensorboard", default="auto", choices=["auto", "on", "off"],
        help="Curves in output_dir/tensorboard. auto: if TensorBoard is installed.")
    watch.add_argument("--wandb", default="", metavar="PROJECT", help="Also log to this Weights & Biases project.")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="auto uses a GPU if there is one.")
    machine.add_argument("--seed", default=0, type=between(0, 2**63 - 1), metavar="N", help="""Seed of the
        weights, the order of the images, the crops and drop path. Results do not depend on --num_workers.""")
    machine.add_argument("--num_workers", default=dino_cli.default_workers(), type=at_least(0), metavar="N",
        help="Processes per GPU that load images. Default: the cores of this process, at most 10.")
    machine.add_argument("--compile", default=False, type=compile_mode, metavar="MODE", help="""true: torch.compile
        networks and loss. The first step takes minutes, the rest are faster; for long runs. reduce-overhead: with CUDA
        graphs, too, for networks so small that a GPU waits for the host to launch its kernels; for one process.""")
    machine.add_argument("--grad_checkpointing", default=False, type=bool_flag, metavar="BOOL", help="""Recompute a
        ViT's activations in the backward pass: a third more compute for a fraction of the memory.""")
    machine.add_argument("--dist_url", default="env://", metavar="URL", help="Rendezvous of several processes.")
    machine.add_argument("--local_rank", "--local-rank", default=0, type=int, metavar="N",
        help="Passed by some launchers; ignored.")
    # fmt: on
    return parser


def compile_mode(text):
    """argparse type of --compile: an on/off flag, or `reduce-overhead`."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        return text if text == "reduce-overhead" else bool_flag(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be {compile_mode.range}")


compile_mode.range = "true, false or reduce-overhead"


def check_flags(args):
    """Raise UserError for flags of the run that can't work, before any work is done."""
    dino_compile.check_flags(args)
    for flag in ("knn_data", "knn_student"):
        if getattr(args, flag) and not args.knn_every:
            value = getattr(args, flag)
            raise UserError(f"--{flag} {value} has no effect without --knn_every. Set it, or remove --{flag}")


def prepare(args):
    """Create the output folder. Raises UserError if a run can't write there, or can't send the curves it is to send."""
    dino_cli.check_output_dir(args.output_dir, files=("checkpoint.pth", "log.txt", "run.json", ".lock"))
    dino_health.check_curves(args)


def has_begun(output_dir):
    """Whether a folder contains a run to resume."""
    path = os.path.join(output_dir, "checkpoint.pth")
    return any(map(os.path.isfile, (path, dino_checkpoints.previous_checkpoint(path))))


# ---- steps ----


class TrainingLog(utils.MetricLogger):
    """The console line of training: at most 120 columns. All other numbers go to log.txt and the curves."""

    def __init__(self, args):
        super().__init__()
        self.images_per_step, self.ln_k = args.images_per_step, math.log(args.out_dim)
        for name in ("loss", "lr", "wd", "entropy", "kl", *dino_health.NUMBERS):
            self.add_meter(name, utils.SmoothedValue())

    def __str__(self):
        loss, entropy, kl = (self.meters[name].avg for name in ("loss", "entropy", "kl"))
        if math.isnan(loss):  # no step so far had a finite loss
            return "loss: none yet"
        return f"loss: {loss:.3f} = {entropy:.3f} + {kl:.3f}{self.delimiter}lr: {self.lr.value:.1e}"

    def timing(self):
        speed = self.images_per_step / max(self.step_time.avg, 1e-9)
        wait = [f"wait {self.waiting:.0%}"] if self.waiting > 0.05 else []
        return [f"{speed:.4g} img/s", f"{utils.peak_memory_mb():.0f} MB", *wait]


class Bare:
    """The calls of a Run without its files, signals and checks."""

    def __init__(self, args, steps_per_epoch):
        self.args, self.steps_per_epoch = args, steps_per_epoch
        self.images_done = 0  # in this epoch
        self.metrics = TrainingLog(args)

    def steps(self, data_loader, epoch):
        """Yield (step of the whole run, crops) for each batch that is left of the epoch, and log progress."""
        done, self.steps_made = self.images_done // self.args.images_per_step, 0
        batches = self.metrics.log_every(data_loader, 10, f"Epoch: [{epoch}/{self.args.epochs}]", start=done)
        for step, (crops, *about) in enumerate(batches, start=epoch * self.steps_per_epoch + done):
            self.received(*about)
            yield step, crops
            self.images_done += self.args.images_per_step
            self.steps_made += 1

    def received(self, *about):
        """Called with what came with a batch: indices of the images, and records of unreadable ones."""

    def vote(self, loss):
        """Called before the last backward pass of a step, with the loss of this process."""

    def skips(self, step):
        """Whether this step has to be left out."""
        return False

    def end_step(self, step, parts, loss, entropy, gradient_norms):
        group = parts.optimizer.param_groups[0]
        # The loss is the teacher's entropy plus the KL divergence of the student from it (section 5.3).
        self.metrics.update(loss=loss, lr=group["lr"], wd=group["weight_decay"], entropy=entropy, kl=loss - entropy)

    def means(self):
        """Means of the logged values over the epoch and over all processes."""
        self.metrics.synchronize_between_processes()
        means = {name: meter.global_avg for name, meter in self.metrics.meters.items() if meter.count}
        utils.log("Averaged stats:", "  ".join(f"{name}: {value:.6g}" for name, value in means.items()))
        return {**means, "ln_k": self.metrics.ln_k, **self.metrics.pace(self.args.images_per_step)}


class Run(Bare):
    """A run with its folder. A context manager: locks the folder, catches signals, and undoes both.

    Resumes from --output_dir on entry; `first_epoch` is where to continue. Exit codes: 3 loss or weights not finite,
    4 collapsed, 5 last checkpoint not saved, 128 + N after signal N.
    """

    def __init__(self, args, parts, data_loader, parser, amp_dtype=None):
        super().__init__(args, len(data_loader))
        self.parts, self.data_loader, self.parser, self.amp_dtype = parts, data_loader, parser, amp_dtype
        args.images = len(data_loader.dataset)
        args.image_names = dino_files.digest_of_names(data_loader.dataset.images)
        what = (args.images, args.image_names), "the training images (number, digest of names)"
        utils.check_same_everywhere(*what, "--data_path must have the same ones for all")
        self.path = os.path.join(args.output_dir, "checkpoint.pth")
        self.bad_steps, self.collapsed, self.unsaved, self.stats = 0, False, {}, {}
        buffers = [*parts.student.buffers(), *parts.teacher.buffers()]  # statistics of batch norms
        buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        self.buffers = [(same, [b.clone() for b in same]) for same in buffers]  # and what they were before the step

    def __enter__(self):
        args, images = self.args, self.data_loader.dataset.images
        self.began = self.saved_at = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(dino_checkpoints.lock_output_dir(args.output_dir))
            self.neighbors = (
                dino_features.OnlineKnn(args, images, self.parts.dino_loss.center.device) if args.knn_every else None
            )
            utils.log(dino_health.describe_start(args, self.parser, self.device, self.amp_dtype, self.steps_per_epoch))
            progress = self.resume()
            self.curves = stack.enter_context(contextlib.closing(dino_health.Curves(args)))
            self.monitor = dino_health.HealthMonitor(args, self.steps_per_epoch, self.curves, progress["health"])
            if utils.plain_args(progress["args"]).get("knn_data") != args.knn_data:
                self.monitor.forget_best()  # it was measured on other images
            self.bad_images = dino_files.recheck_bad_images(progress["health"], images, utils.inputs_of(args))
            if self.first_epoch < args.epochs:  # else run.json stays as it is, of the command that trained
                dino_health.write_environment(args, self.parser)
            self.monitor.check_settings()
            self.stop = stack.enter_context(dino_signals.StopRequest())
            self.open = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace):
        self.open.__exit__(kind, error, trace)
        if isinstance(error, Stopped):
            utils.gather_objects(None)  # nobody exits before rank 0 has saved: a launcher would end it too
            self.stop.leave(error.signal)

    @property
    def device(self):
        return self.parts.dino_loss.center.device

    def resume(self):
        """Load the checkpoint in the output folder, if there is one; returns what it says of the run's progress."""
        args, images = self.args, self.data_loader.dataset.images
        progress = {"epoch": 0, "step": 0, "images_done": None, "meters": [], "args": {}, "health": {}}
        scaler = self.parts.fp16_scaler if self.parts.fp16_scaler.is_enabled() else None
        objects = {**self.parts._asdict(), "fp16_scaler": scaler}
        self.loaded = dino_checkpoints.restart_from_checkpoint(self.path, progress, args, **objects)
        self.keep_previous = self.loaded in (None, self.path)  # a damaged checkpoint.pth must not replace the good one
        self.first_epoch, self.images_done = dino_checkpoints.position(progress, args, self.loaded)
        utils.check_same_everywhere((self.first_epoch, self.images_done), f"the position in {self.path}")
        if self.images_done and progress["images_done"] is None and images.sharded:
            utils.log(
                f"{self.loaded} is of an older version, with another order of shards: resuming at the epoch's start"
            )
            self.images_done = 0
        steps_done = min(math.ceil(self.images_done / args.images_per_step), self.steps_per_epoch)  # no image twice
        self.images_done = steps_done * args.images_per_step
        if steps_done:
            self.metrics.restore(progress["meters"])
        if args.init_from and not self.loaded:
            self.start_center()
        if self.loaded and args.init_from:
            utils.log(f"note: --init_from {args.init_from} is not used by a run that resumes")
        if self.loaded and self.first_epoch < args.epochs:
            utils.log(f"continuing in epoch {self.first_epoch} after step {steps_done}")
        if self.first_epoch >= args.epochs:
            utils.log(f"{self.loaded} has all of --epochs {args.epochs}: nothing to do")
        return progress

    def start_center(self):
        """Load the center from the checkpoint of --init_from, if the teacher's projection head is from there, too."""
        if self.args.init_from in ("published", "timm"):
            return
        source = dino_checkpoints.find_weights(self.args.init_from, "--init_from")
        file, loss = dino_checkpoints.load_checkpoint(source), self.parts.dino_loss
        center = file["dino_loss"].get("center") if isinstance(file.get("dino_loss"), dict) else None
        if not isinstance(center, torch.Tensor) or center.shape != loss.center.shape:
            return
        (head, _), prototypes = dino_checkpoints.pick_state_dict(file, "teacher", source), "head.last_layer.weight_v"
        if prototypes in head and torch.equal(head[prototypes], self.parts.teacher.state_dict()[prototypes].cpu()):
            loss.center.copy_(center)
            utils.log("loaded the center of the loss from there, too")

    # ---- one epoch ----

    def begin_epoch(self, epoch):
        self.epoch = epoch
        self.data_loader.sampler.set_epoch(epoch, self.images_done)
        if self.neighbors and not self.loaded and epoch == 0:
            self.measure_neighbors("before the first step")

    def steps(self, data_loader, epoch):
        try:
            yield from super().steps(self.stop.watch(data_loader), epoch)
        except Stopped:  # while it waited for a batch
            self.save(self.epoch, self.images_done, self.metrics.totals())
            self.report_stop(self.images_done, self.stop.signal)
            raise

    def received(self, indices, unreadable):
        self.indices = indices
        for buffers, before in self.buffers:
            torch._foreach_copy_(before, buffers)  # one call: each copy on its own would cost a GPU's host milliseconds
        new = {image.name: image.reason for image in unreadable if image.name not in self.bad_images}
        for name, reason in new.items():
            utils.say(f"warning: can't read the image {utils.printable(name)}: {reason}. Another image replaces it")
        self.bad_images.update(new)
        if new:
            self.check_bad_images()

    def vote(self, loss):
        """Let all processes agree on [any loss not finite, largest signal, save, collapsed].

        One small all-reduce, on its way to the host while the backward pass runs: nobody waits for it.
        """
        requests = (self.stop.signal, self.wants_saving(), self.args.stop_on_collapse and bool(self.monitor.collapse))
        flags = torch.stack([(~loss.isfinite()).float(), *(loss.new_full((), float(request)) for request in requests)])
        if utils.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.loss, self.verdict = loss, utils.HostCopy(flags)

    def wants_saving(self):
        minutes, every = (time.monotonic() - self.saved_at) / 60, self.args.saveckp_iters
        by_time = 0 < self.args.save_every_minutes <= minutes
        steps_done = self.images_done // self.args.images_per_step + 1
        return by_time or bool(every and (self.epoch * self.steps_per_epoch + steps_done) % every == 0)

    def skips(self, step):
        """Whether the loss is not finite on some rank. Then all ranks leave the step out, as if it had not been.

        Raises UserError (exit code 3) after more than --max_bad_steps of them in a row.
        """
        bad, self.signal, self.save_now, self.collapsed = self.verdict.read()
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if bad:
            for buffers, before in self.buffers:
                torch._foreach_copy_(buffers, before)
            self.report_bad_step(step)
            self.save_now = False
            self.save_or_stop()
        return bool(bad)

    def end_step(self, step, parts, loss, entropy, gradient_norms):
        super().end_step(step, parts, loss, entropy, gradient_norms)
        if self.metrics.due:
            self.look(step, parts, gradient_norms)
        self.save_or_stop()

    def look(self, step, parts, gradient_norms):
        """Fetch the numbers of a step that is logged, in one transfer, and check them."""
        meters, features = self.metrics.meters, parts.teacher.features
        numbers = dino_health.step_numbers(features, parts.dino_loss, gradient_norms)
        norms = [dino_health.norms_of_weights(network) for network in (parts.student, parts.teacher)]
        values, *norms = utils.read_together(meters.values(), torch.stack(list(numbers.values())), *norms)
        # Under fp16, gradients overflow until the scaler has found its scale.
        self.metrics.update(**{name: v for name, v in zip(numbers, values, strict=True) if math.isfinite(v)})
        if utils.is_main_process():
            numbers = {name: meter.value for name, meter in meters.items()}
            self.curves.add(step, numbers)
            about = {"feature_dim": features.shape[1], "images": len(features) // 2}
            self.monitor.check_step(step, {**numbers, **about}, *norms)

    def save_or_stop(self):
        """What all processes have agreed on for the end of this step."""
        if not (self.signal or self.save_now or self.collapsed):
            return
        done = self.images_done + self.args.images_per_step  # this step included
        self.save(self.epoch, done, self.metrics.totals())
        self.report_stop(done, self.signal)
        if self.signal:
            raise Stopped(int(self.signal))

    def report_stop(self, done, number):
        """Say where the run stops on signal `number`; raise UserError if it stops for another reason."""
        where = f"stopped in epoch {self.epoch} after step {done // self.args.images_per_step}"
        collapse, unsaved = utils.gather_objects((self.monitor.collapse, self.unsaved.get(self.path)))[0]
        if self.collapsed:
            raise UserError(f"{where}, {'not saved' if unsaved else 'saved'}: {collapse}", exit_code=4)
        if number and unsaved:
            raise UserError(f"{where}, not saved: {unsaved}. Make room and run again", exit_code=5)
        if number:
            utils.log(f"{where}. Run the same command to resume")

    def report_bad_step(self, step):
        """Log a step that is left out. After too many, write bad_step.json and end the run."""
        losses = utils.gather_objects(self.loss.item())
        bad_ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        ranks = f" (rank {', '.join(map(str, bad_ranks))})" if len(losses) > 1 else ""
        step -= self.epoch * self.steps_per_epoch  # as on the console
        what = f"the loss is {losses[bad_ranks[0]]} in epoch {self.epoch}, step {step}{ranks}"
        utils.log(f"warning: {what}: this step is skipped ({self.bad_steps} in a row)")
        if self.bad_steps <= self.args.max_bad_steps:
            return
        student, loss, scale = self.parts.student, self.parts.dino_loss, self.parts.fp16_scaler.get_scale()
        grads = ((name, p.grad) for name, p in student.named_parameters() if p.grad is not None)
        found = {  # as text: NaN and infinity are not JSON
            "step": step,
            "epoch": self.epoch,
            "loss": str(self.loss.item()),
            "loss_terms_of_last_pass": [[str(term) for term in view] for view in loss.cross_entropy.tolist()],
            "gradient_norms": {name: str(grad.norm().item() / scale) for name, grad in grads},
            "images": [self.data_loader.dataset.images.name(i) for i in self.indices.tolist()],
        }
        everyones = utils.gather_objects(found)
        if utils.is_main_process():
            self.write("bad_step.json", json.dumps(everyones, indent=1))
        raise UserError(
            f"{what}, after {self.bad_steps - 1} such steps in a row; bad_step.json has details. The checkpoints are "
            "from before. Lower --lr or --clip_grad, or try --use_fp16 false",
            exit_code=3,
        )

    def means(self):
        self.totals = self.metrics.totals()  # of this process, which a checkpoint keeps for each
        feature_dim = next(self.parts.teacher.head.parameters()).shape[1]
        return {**super().means(), "feature_dim": feature_dim}

    def end_epoch(self, epoch, means):
        """k-NN if it is due, one line in log.txt, the checkpoint."""
        self.stats = {f"train_{name}": value for name, value in means.items()} | {"epoch": epoch}
        if self.neighbors and self.neighbors.due(epoch):
            if self.steps_made:  # so that a run killed during the evaluation resumes with it
                self.save(epoch, self.images_done, self.totals)
            self.measure_neighbors(f"after epoch {epoch}, before its k-NN accuracy")
        best = self.monitor.check_epoch(self.stats)
        self.share_bad_images()
        if self.bad_images:
            self.stats["bad_images"] = len(self.bad_images)
        self.log_epoch(self.stats)
        copies = [os.path.join(self.args.output_dir, "checkpoint_best.pth")] if best else []
        if self.args.saveckp_freq and epoch % self.args.saveckp_freq == 0:
            copies.append(os.path.join(self.args.output_dir, f"checkpoint{epoch:04}.pth"))
        if copies or (epoch + 1) % self.args.saveckp_epochs == 0 or epoch + 1 == self.args.epochs:
            self.save(epoch + 1, 0, [], copies)
        self.images_done, self.metrics = 0, TrainingLog(self.args)

    def measure_neighbors(self, when):
        """k-NN accuracy of the teacher, or before the first step, the accuracies to compare it with."""
        backbone = self.parts.teacher.backbone
        try:
            if not self.stats:
                self.monitor.baselines = self.neighbors.baselines(backbone, self.stop)
                utils.log(f"{when}: {dino_health.describe_baselines(self.monitor.baselines, self.args)}")
                return
            found = self.neighbors.accuracies(backbone, self.stop)
            if found and self.args.knn_student:
                student = getattr(self.parts.student, "module", self.parts.student)  # without DDP
                student = self.neighbors.accuracies(student.backbone, self.stop, "student")
                found |= {key.replace("knn_", "knn_student_"): value for key, value in student.items()}
        except Stopped:
            utils.log(f"stopped {when}. Run the same command to resume")
            raise
        if found:
            self.stats |= {**found, **self.monitor.baselines}
            top1, top5 = dino_health.describe_knn(self.stats, self.args), found["knn_top5"]
            k, what = dino_features.NEIGHBORS, self.neighbors.what
            student = f"; student: top-1 {found['knn_student_top1']:.2f} %" if "knn_student_top1" in found else ""
            utils.log(f"{k}-NN of the teacher, {what}: top-1 {top1}, top-5 {top5:.2f} %{student}")

    # ---- files ----

    def save(self, epoch, images_done, meters, copies=()):
        """Write checkpoint.pth and `copies` on rank 0. A full disk is a warning; earlier files stay."""
        if not torch.stack([p.isfinite().all() for p in self.parts.student.parameters()]).all():
            raise UserError(
                "the weights are no longer finite: the gradient of a step was not. The checkpoints are from before. "
                "Lower --lr or --clip_grad, or try --use_fp16 false",
                exit_code=3,
            )
        self.share_bad_images()
        health = {**self.monitor.state_dict(), "bad_images": self.bad_images}
        progress = {"epoch": epoch, "images_done": images_done, "meters": meters, "health": health}
        self.saved_at = time.monotonic()
        if not utils.is_main_process():
            return
        state = dino_checkpoints.run_state(self.parts, self.args, progress)
        for path in (*copies, self.path):  # in this order: a run killed in between resumes before the copies
            try:
                dino_checkpoints.save(path, state, keep_previous=path == self.path and self.keep_previous)
            except OSError as e:
                self.unsaved[path] = f"{path} could not be written ({e.strerror or e})"
                again = " and tries again at the next save" if path == self.path else ""
                utils.say(f"warning: {self.unsaved[path]}. The run continues{again}")
            else:
                self.unsaved.pop(path, None)
                self.keep_previous = self.keep_previous or path == self.path

    def write(self, name, text):
        """Write a text file in the output folder. A full disk is a warning."""
        path = os.path.join(self.args.output_dir, name)
        try:
            utils.write_whole(path, lambda file: file.write(text.encode(errors="replace")))
        except OSError as e:
            utils.say(f"warning: {path} could not be written ({e.strerror})")

    def log_epoch(self, stats):
        """Append a line to log.txt on rank 0."""
        if not utils.is_main_process():
            return
        if self.monitor.warnings:
            stats["warnings"], self.monitor.warnings = self.monitor.warnings, []
        try:
            if self.epoch == self.first_epoch:
                dino_checkpoints.drop_log_lines(self.args.output_dir, self.epoch, lambda line: "train_ln_k" in line)
            utils.write_log_line(self.args.output_dir, stats)
        except OSError as e:
            utils.say(
                f"warning: {self.args.output_dir}/log.txt could not be written ({e.strerror}): {json.dumps(stats)}"
            )

    def share_bad_images(self):
        """Let all processes know the images that any of them could not read. All of them have to call it."""
        known = len(self.bad_images)
        for found in utils.gather_objects(self.bad_images):
            self.bad_images.update(found)
        if self.bad_images and utils.is_main_process():
            self.write_bad_images()
        if len(self.bad_images) > known:
            self.check_bad_images()

    def write_bad_images(self):
        lines = (f"{utils.printable(name)}\t{' '.join(why.split())}\n" for name, why in sorted(self.bad_images.items()))
        self.write("bad_images.txt", "".join(lines))

    def check_bad_images(self):
        """Raise UserError if more images are unreadable than --max_bad_images allows."""
        bad, images = self.bad_images, len(self.data_loader.dataset)
        if len(bad) > math.ceil(self.args.max_bad_images * images):
            self.write_bad_images()
            raise UserError(
                f"{len(bad)} of {images} images can't be read, more than --max_bad_images {self.args.max_bad_images} "
                f"allows: {utils.summarize(sorted(bad))}. Repair or remove the images listed in "
                f"{os.path.join(self.args.output_dir, 'bad_images.txt')}, or allow more"
            )

    # ---- the end ----

    def finish(self):
        """Write backbone.pth, and say what the run has come to.

        Raises UserError (exit codes 4 and 5) for what the launcher has to know.
        """
        if utils.is_main_process():
            self.write_backbone()
        # Nobody exits before rank 0 has written: a launcher would end it too.
        unsaved, collapse = utils.gather_objects((list(self.unsaved.values()), self.monitor.collapse))[0]
        if unsaved:
            raise UserError(f"a checkpoint is lost: {', '.join(unsaved)}. Make room for the next run", exit_code=5)
        if collapse and self.args.stop_on_collapse:
            raise UserError(f"all epochs are done and saved, but: {collapse}", exit_code=4)
        path = self.path if os.path.isfile(self.path) else self.loaded
        utils.log(dino_health.describe_end(self.args, self.stats, path, time.monotonic() - self.began))

    def write_backbone(self):
        """Write the teacher's backbone without all that only training needs. A full disk is a warning."""
        try:
            path = dino_checkpoints.write_backbone(self.args.output_dir, self.parts.teacher.backbone, self.args)
        except OSError as e:
            utils.say(f"warning: {dino_checkpoints.BACKBONE} could not be written ({e.strerror or e})")
        else:
            size = os.path.getsize(path) / 1e6
            utils.say(f"the teacher's backbone alone, {size:.1f} MB, is in {path}; its settings are in backbone.json")
