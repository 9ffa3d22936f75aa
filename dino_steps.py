"""Training steps on crops in memory, to measure them: main_dino.py's, and DINO in its plainest form to compare with.

The plain form is the paper's pseudo code: explicit attention, a log-softmax for each pair of views, loops over
parameters, a host that reads the loss in each step, floats from the loader. It computes the same as main_dino.py. So do
the plain augmentation, k-NN classifier and label propagation as our fast ones.
"""

import contextlib
import importlib.util
import io
import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms
from torchvision.transforms import v2

import dino_backbones
import dino_cli
import dino_compile
import dino_crops
import main_dino
import utils
from vision_transformer import DINOHead

# ---- settings and crops ----


def flags_of(**settings):
    """main_dino.py's flags as a list of words."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def training_args(**flags):
    """main_dino.py's arguments for some of its flags, completed as for one process."""
    words = flags_of(**{"freeze_last_layer": 0, **flags})
    args = dino_cli.OneLineParser(parents=[main_dino.get_args_parser()]).parse_args(words)
    args.rank, args.world_size, args.gpu = 0, 1, 0
    args.images_per_step = args.batch_size_per_gpu * args.grad_accum_steps
    return args


def start(args):
    """(device, dtype of mixed precision or None, autocast, gradient scaler); seeds random numbers."""
    device = utils.pick_device(args.device)
    amp_dtype = dino_backbones.training_dtype(args, device)
    utils.fix_random_seeds(0)
    autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    return device, amp_dtype, autocast, torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)


def crop_sizes(args):
    return [args.global_crops_size] * 2 + [args.local_crops_size] * args.local_crops_number


def random_crops(args, batch_size):
    """Crops as our loader returns them: uint8 [B, 3, h, w]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, 3, size, size) for size in crop_sizes(args)]
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


# ---- our steps ----


class Batches:
    """A loader that returns the same crops `steps` times, and lets a watch tick when it is asked for the next."""

    def __init__(self, crops, steps, watch):
        self.crops, self.steps, self.watch = crops, steps, watch

    def __len__(self):
        return self.steps

    def __iter__(self):
        for i in range(self.steps + 1):
            if self.watch:
                self.watch.tick()
            if i < self.steps:
                yield self.crops, torch.arange(len(self.crops[0]))


class OurTraining:
    """What train_dino sets up for its arguments, and train_one_epoch on crops in memory.

    `wrap` is called with student and teacher and returns the two networks to train.
    """

    def __init__(self, args, wrap=lambda *networks: networks):
        self.args = args
        self.device, amp_dtype, self.autocast, scaler = start(args)
        with contextlib.redirect_stdout(io.StringIO()):  # a warning about large networks on CPUs
            student, teacher = wrap(*main_dino.build_student_and_teacher(args, self.device, amp_dtype))
        temperatures = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0}
        sizes = {"out_dim": args.out_dim, "ncrops": len(crop_sizes(args)), "nepochs": args.epochs}
        loss = main_dino.DINOLoss(**sizes, **temperatures).to(self.device)
        optimizer = utils.build_optimizer(args.optimizer, utils.get_params_groups(student), self.device)
        self.parts = main_dino.Parts(student, teacher, loss, optimizer, scaler)
        if args.compile:
            with contextlib.redirect_stdout(io.StringIO()):
                dino_compile.compile_training(self.parts, args, amp_dtype)

    def train(self, crops, steps, watch=None, lr=1e-5, run=None):
        """A run of steps with constant settings. Returns the means that main_dino.py logs."""
        constant = {"lr": lr, "weight_decay": 0.04, "momentum": 0.996}
        schedules = {name: [value] * steps * self.args.epochs for name, value in constant.items()}
        loader = Batches(crops, steps, watch)
        with contextlib.redirect_stdout(io.StringIO()):
            return main_dino.train_one_epoch(self.parts, loader, schedules, 0, self.args, self.autocast, run)


# ---- plain steps ----


def plain_loss(student_logits, teacher_logits, center):
    """Mean cross-entropy over all pairs of two different views; lists of logits [B, K], one per view."""
    terms = []
    for i, teacher in enumerate(teacher_logits):
        target = F.softmax((teacher - center) / 0.04, dim=-1)
        for j, student in enumerate(student_logits):
            if i != j:
                terms.append((-target * F.log_softmax(student / 0.1, dim=-1)).sum(dim=-1).mean())
    return sum(terms) / len(terms)


def plain_network(args, drop_path_rate=0.0):
    shape = (args.arch, args.patch_size, args.global_crops_size)
    backbone, width = dino_backbones.build_backbone(*shape, drop_path_rate)
    return utils.MultiCropWrapper(backbone, DINOHead(width, args.out_dim))


class PlainTraining:
    """Student, teacher and optimizer without fused kernels, as main_dino.py's arguments say."""

    def __init__(self, args):
        self.device, _, self.autocast, self.scaler = start(args)
        self.student, self.teacher = (plain_network(args, r).to(self.device) for r in (args.drop_path_rate, 0.0))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student), lr=1e-5, weight_decay=0.04)
        self.center = torch.zeros(1, args.out_dim, device=self.device)

    def step(self, crops):
        """One step on normalized crops. Returns the loss."""
        crops = [crop.to(self.device, non_blocking=True) for crop in crops]
        with self.autocast:
            teacher, student = self.teacher(crops[:2]), self.student(crops)
            loss = plain_loss(student.chunk(len(crops)), teacher.chunk(2), self.center)
        self.center = 0.9 * self.center + 0.1 * teacher.float().mean(dim=0, keepdim=True)
        if not math.isfinite(loss.item()):
            raise utils.UserError(f"the plain loss is {loss.item()}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = 3.0 / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:  # waits for the GPU, as the authors' code does
                    parameter.grad.mul_(factor)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(0.996).add_(0.004 * new)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()


def useful_flop(args, batch_size):
    """Operations of a step's matrix products and convolutions, counted without computing them.

    In the last block of a ViT only CLS counts, because the loss needs no other token. The plain step computes them all.
    """
    with torch.device("meta"):
        student, teacher = plain_network(args), plain_network(args)
        for network in (student, teacher) if dino_backbones.vit_factory(args.arch) else ():
            network.backbone.set_cls_only(True)
        for network in (student, teacher):  # the same products: torch 2.4 has no weight norm without numbers
            network.head.last_layer = torch.nn.Linear(network.head.last_layer.in_features, args.out_dim, bias=False)
        crops = [torch.empty(batch_size, 3, size, size) for size in crop_sizes(args)]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher(crops[:2])
        student(crops).sum().backward()
    return counter.get_total_flops()


# ---- plain loaders and evaluations ----


def plain_view(size, scale, blur, solarize=False):
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            blur,
            *[dino_crops.Solarization(0.2)] * solarize,
            transforms.ToTensor(),
            transforms.Normalize(utils.IMAGENET_MEAN, utils.IMAGENET_STD),
        ]
    )


class PlainAugmentation:
    """PIL image -> 2 global and `number` local crops, normalized floats, by torchvision's transforms of PIL images."""

    view = staticmethod(plain_view)

    def __init__(self, sizes=(224, 96), number=8):
        (size, small), scale, blur = sizes, (0.4, 1.0), dino_crops.GaussianBlur
        self.views = [self.view(size, scale, blur(1.0)), self.view(size, scale, blur(0.1), solarize=True)]
        self.views += [self.view(small, (0.05, 0.4), blur(0.5))] * number

    def __call__(self, image):
        image = image.convert("RGB")
        return [view(image) for view in self.views]


def v2_view(size, scale, blur, solarize=False):
    """`plain_view` on tensors, as the documentation of torchvision's v2 transforms advises for speed."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(2 * round(size / 20) + 1, (0.1, 2.0))], p=blur.p),
            *[v2.RandomSolarize(128, p=0.2)] * solarize,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(utils.IMAGENET_MEAN, utils.IMAGENET_STD),
        ]
    )


class V2Augmentation(PlainAugmentation):
    """The same with torchvision's v2 transforms on tensors. Their blur and jitter differ a little in the pixels."""

    view = staticmethod(v2_view)

    def __call__(self, image):
        image = v2.functional.pil_to_tensor(image.convert("RGB"))
        return [view(image) for view in self.views]


def lightly_augmentation(sizes, number):
    """The same with lightly's transform, which has other defaults for color jitter."""
    from lightly.transforms import DINOTransform

    names = ("global_crop_size", "local_crop_size")
    return DINOTransform(**dict(zip(names, sizes, strict=True)), n_local_views=number)


def open_and(augment):
    """`augment` for what a data set has in memory: bytes of a JPEG file, or uint8 [H, W, 3]."""
    takes_pixels = isinstance(augment, main_dino.DataAugmentationDINO)  # the others take PIL images

    def augment_content(content):
        if isinstance(content, bytes):
            return augment(Image.open(io.BytesIO(content)))
        return augment(content if takes_pixels else Image.fromarray(content))

    return augment_content


def augmentations(kinds, sizes, number):
    """{name: function that makes an augmentation}: plain, torchvision v2, lightly if installed, ours of these `kinds`.

    `sizes` are the sides of global and local crops, `number` is that of local crops.
    """
    makers = {
        "plain": partial(PlainAugmentation, sizes, number),
        "torchvision v2": partial(V2Augmentation, sizes, number),
    }
    if importlib.util.find_spec("lightly"):
        makers["lightly"] = partial(lightly_augmentation, sizes, number)
    how = {"global_crops_size": sizes[0], "local_crops_size": sizes[1], "as_uint8": True}
    ours = partial(main_dino.DataAugmentationDINO, (0.4, 1.0), (0.05, 0.4), number, **how)
    return makers | {f"this, --augmentation {kind}": partial(ours, augmentation=kind) for kind in kinds}


def plain_epoch(folder, output_dir, arch, patch_size, batch_size):
    """One epoch of plain steps on plain crops from two loader processes, and a checkpoint."""
    dataset = datasets.ImageFolder(folder, PlainAugmentation())
    training = PlainTraining(training_args(arch=arch, patch_size=patch_size, device="cpu", use_fp16=False))
    for crops, _ in DataLoader(dataset, int(batch_size), shuffle=True, num_workers=2, drop_last=True):
        print(training.step(crops))
    parts = {name: getattr(training, name).state_dict() for name in ("student", "teacher", "optimizer")}
    torch.save(parts, os.path.join(output_dir, "checkpoint.pth"))


def plain_knn(train_features, train_labels, test_features, test_labels, ks, T):
    """{k: top-1 accuracy in percent}, with one search per k, over 100 chunks of the test features."""
    found, classes = {}, int(train_labels.max()) + 1
    for k in ks:
        right = 0
        for chunk, target in zip(test_features.chunk(100), test_labels.chunk(100), strict=True):
            similarity, nearest = (chunk @ train_features.T).topk(k)
            labels = train_labels[nearest][..., None]  # [n, k, 1]
            one_hot = chunk.new_zeros(*nearest.shape, classes).scatter_(2, labels, 1)  # [n, k, C]
            votes = (one_hot * (similarity / T).exp()[..., None]).sum(dim=1)
            right += (votes.argmax(dim=1) == target).sum().item()
        found[k] = 100.0 * right / len(test_labels)
    return found


def plain_propagation(target, sources, labels, mask, topk):
    """Labels [N, C] for the features [h, w, D] of a frame, from n frames [n, h, w, D] and labels [n, h, w, C].

    With whole matrices: `mask` [N, N] (source, target) is 1 where labels may come from, else 0.
    """
    target, sources, labels = target.flatten(0, 1), sources.flatten(1, 2), labels.flatten(0, 2)
    affinity = (sources @ target.T).div(0.1).exp() * mask  # [n, N, N]
    affinity = affinity.flatten(0, 1)
    affinity = affinity * (affinity >= affinity.topk(topk, dim=0).values[-1])
    return (affinity / affinity.sum(dim=0)).T @ labels
