"""Write one HTML page about a training run, or about two side by side. It opens without a network connection.

    python report.py runs/vits16                        # writes runs/vits16/report.html
    python report.py runs/demo --data_path photos       # shows your own images, in class folders or in one folder
    python report.py runs/a runs/b --output a-and-b.html
    python report.py runs/seed0 runs/seed1 runs/seed2 --curves seeds.png  # only loss and k-NN accuracy, as a picture

Reads run.json, log.txt and checkpoint.pth, which main_dino.py writes to its --output_dir. Parts that are missing, as in
a run of the authors' code, are left out, and the page says so. Results come first: a verdict, loss and k-NN accuracy,
warnings. Then the attention of the last block (figure 1 of the paper), patch features as colors, nearest neighbors,
all other curves, and the settings.
"""

import argparse
import base64
import contextlib
import importlib.util
import io
import json
import math
import os
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import dino_backbones
import dino_checkpoints
import dino_cli
import dino_crops
import dino_data
import dino_features
import dino_images
import utils
from dino_cli import at_least
from utils import UserError

# ---- flags ----


def get_args_parser():
    """All flags, as a parser for `parents=[...]`."""
    parser = argparse.ArgumentParser("Report", add_help=False)
    # fmt: off
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR",
        help="The --output_dir of a run. Two runs are shown side by side.")
    parser.add_argument("--curves", default=None, metavar="FILE", help="""Write a picture (.png or .svg) of loss and
        k-NN accuracy instead of a page. Of any number of runs.""")
    parser.add_argument("--output", default=None, metavar="FILE",
        help="The page to write. Default: report.html in the folder of the (first) run.")
    parser.add_argument("--data_path", default=None, metavar="DIR", help="""Images to show: a folder of images or of
        class folders; if it has a val/, that one is used. Default: the run's own images if they are still there, else
        `sample`.""")
    parser.add_argument("--images", default=500, type=at_least(2), metavar="N",
        help="Number of images, evenly spread over the data set, to search for nearest neighbors. More take longer.")
    parser.add_argument("--num_workers", default=min(2, dino_cli.default_workers()), type=at_least(0), metavar="N",
        help="Processes that load images.")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
        help="auto uses a GPU if there is one.")
    # fmt: on
    return parser


def check_args(args):
    """Raise UserError for more runs than a page has room for, and for pages or pictures that can't be written."""
    if args.curves:
        for flag in ("output", "data_path"):
            if getattr(args, flag):
                raise UserError(f"--curves writes a picture, --{flag} is for a page. Remove one of them")
        if Path(args.curves).suffix.lower() not in (".png", ".svg"):
            raise UserError(f"--curves {args.curves} must end in .png or .svg")
        dino_cli.check_output_dir(Path(args.curves).parent, "--curves", [Path(args.curves).name])
    elif len(args.run_dir) > 2:
        raise UserError(f"{len(args.run_dir)} runs are too many for one page. Name one or two, or use --curves")
    elif importlib.util.find_spec("bokeh") is None:
        raise UserError("report.py needs Bokeh for its charts: pip install bokeh")


# ---- reading a run ----


FILES = ("log.txt", "run.json")


class Run(NamedTuple):
    name: str  # A or B
    folder: Path
    log: list  # one dict per epoch, in order
    info: dict  # run.json
    args: dict  # from the checkpoint, and the changed ones from run.json
    teacher: dict | None  # tensors
    source: str  # file of the checkpoint, or the reason why there is no teacher


def read_texts(folder):
    """(lines of log.txt as dicts, one per epoch, in order; content of run.json). Raises UserError without a folder."""
    if not folder.is_dir():
        raise UserError(f"RUN_DIR {folder} is not a folder. Name the --output_dir of a run")
    try:
        log, info = ((folder / f).read_text(errors="replace") if (folder / f).exists() else "" for f in FILES)
    except OSError as e:
        raise UserError(f"can't read {e.filename}: {e.strerror}") from e
    lines = [parse(line) for line in log.splitlines()]
    epochs = {line["epoch"]: line for line in lines if type(line.get("epoch")) is int and 0 <= line["epoch"] < 1e9}
    return [epochs[epoch] for epoch in sorted(epochs)], parse(info)


def read_run(name, folder):
    """Read a Run from its folder. Raises UserError if there is no such folder, or nothing of a run in it."""
    folder = Path(folder) if Path(folder).name else Path(folder).resolve()  # the page shows a name, not `.`
    log, info = read_texts(folder)
    checkpoint, teacher = None, None
    try:
        checkpoint, source = dino_checkpoints.load_newest(str(folder / "checkpoint.pth"))
        if checkpoint is None:
            raise UserError(f"there is no checkpoint.pth in {folder}")
        teacher, source = dino_checkpoints.pick_state_dict(checkpoint, "teacher", source)
    except UserError as e:
        source = str(e)
        utils.log(f"note: the page will have no pictures: {source}")
    if not (log or info or teacher):
        raise UserError(f"RUN_DIR {folder} has no readable log.txt, run.json or checkpoint.pth. Name another folder")
    args = utils.plain_args(as_dict(checkpoint).get("args")) | as_dict(info.get("changed"))
    return Run(name, folder, log, info, args, teacher, source)


def parse(text):
    """The JSON object in a text; {} for anything else."""
    try:
        return as_dict(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def as_dict(value):
    return value if isinstance(value, dict) else {}


def columns(log, *keys):
    """{"epoch": [...], key: [...]} for the epochs in which the first key has a finite number.

    Other keys are NaN where they have none, and are left out if they have none in any epoch.
    """
    log = [line for line in log if is_number(line.get(keys[0]))]
    kept = [key for key in keys if any(is_number(line.get(key)) for line in log)]
    values = {key: [float(line[key]) if is_number(line.get(key)) else math.nan for line in log] for key in kept}
    return {"epoch": [line["epoch"] for line in log], **values}


def last_of(run, key):
    """The last finite number of that name in a run's log, in a list; an empty one if there is none."""
    return columns(run.log, key).get(key, [])[-1:]


def is_number(value):
    return isinstance(value, int | float) and abs(value) < 1e300


# ---- text and tables ----


def names_of(runs):
    """The names of the runs' folders, with the parents that tell them apart."""
    folders = [run.folder.resolve() for run in runs]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(common)) for folder in folders]


def verdict(run):
    """How far the run is and what has come of it, in a few sentences."""
    if not run.log:
        return "log.txt is missing or has no epochs."
    last, total = run.log[-1], run.args.get("epochs")
    words = [f"{last['epoch'] + 1} of {total} epochs." if is_number(total) else f"{last['epoch'] + 1} epochs."]
    measured = columns(run.log, "knn_top1")
    if measured["epoch"]:
        best, at = max(zip(measured["knn_top1"], measured["epoch"], strict=True))
        start = "start weights" if run.args.get("init_from") else "untrained"
        known = {start: last_of(run, "knn_start"), "raw pixels": last_of(run, "knn_raw_pixels")}
        known = ", ".join(f"{name} {value:.1f}" for name, values in known.items() for value in values)
        known = f" ({known})" if known else ""
        words.append(f"k-NN accuracy {measured['knn_top1'][-1]:.1f} %{known}, best {best:.1f} % in epoch {at}.")
    loss, entropy, kl, ln_k = (last.get(f"train_{key}") for key in ("loss", "entropy", "kl", "ln_k"))
    split = ""
    if all(map(is_number, (entropy, kl, ln_k))) and ln_k > 0:
        split = f" = entropy {entropy:.3f} ({100 * entropy / ln_k:.0f} % of ln K) + KL {kl:.3f}"
    words.append(f"Loss {loss:.3f}{split}." if is_number(loss) else "The last epoch has no finite loss.")
    number = sum(len(warnings_of(line)) for line in run.log)
    return " ".join([*words, f"{number or 'No'} warning{'s' * (number != 1)}."])


def warnings_of(line):
    return line["warnings"] if isinstance(line.get("warnings"), list) else []


def describe(value):
    """A value of run.json as text on one line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def table(title, header, rows, note="", kind="text"):
    """An HTML table with a title. Cells are text, or HTML in a table of kind "tiles"."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    rows = [[cell if kind == "tiles" else escape(cell) for cell in row] for row in rows]
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    paragraph = f"<p>{note}</p>" if note else ""
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
    wide = ' class="wide"' * (len(header) > 2)
    return f"<section{wide}><h3>{escape(title)}</h3>{paragraph}{scroll}{table}</div></section>"


def facts(runs):
    """Tables of folder, machine, versions and settings, with one column per run."""
    names = [run.name for run in runs] if len(runs) > 1 else ["value"]
    found = [{"folder": str(run.folder)} for run in runs]
    for run, about in zip(runs, found, strict=True):
        for key in ("started", "command", "processes", "machine", "versions", "git"):
            parts = run.info.get(key, {})
            parts = parts if isinstance(parts, dict) else {key: parts}
            about |= {name.replace("_", " "): describe(value) for name, value in parts.items()}
    rows = [[key, *(about.get(key, "unknown") for about in found)] for key in found[0] | found[-1]]
    changed, title = [as_dict(run.info.get("changed")) for run in runs], "Settings that differ from the defaults"
    if not all("changed" in run.info for run in runs):  # a checkpoint does not say which settings are defaults
        changed, title = [run.args for run in runs], "Settings from the checkpoint (no run.json)"
    arguments = [[f, *(describe(r.args.get(f, "default")) for r in runs)] for f in sorted(set().union(*changed))]
    if len(runs) > 1:
        arguments = [[f"≠ {f}" if a != b else f, a, b] for f, a, b in arguments]
        arguments, title = sorted(arguments, key=lambda row: row[0][0] != "≠"), f"{title}; ≠: differs between the runs"
    return [table("Folder, machine, versions", ["", *names], rows), table(title, ["", *names], arguments)]


def warnings_table(run):
    """A table of the warnings, at most 100; a warning of several epochs is one row. "" if there are none."""
    epochs = {}
    for line in run.log:
        for warning in warnings_of(line):
            epochs.setdefault(str(warning), []).append(str(line["epoch"]))
    rows = [[" – ".join(dict.fromkeys((at[0], at[-1]))), warning] for warning, at in epochs.items()]
    rows = rows[:100] + [["…", f"and {len(rows) - 100} more"]] * (len(rows) > 100)
    return table(f"Warnings of {run.folder}", ["epochs", "warning"], rows) if rows else ""


# ---- charts ----

LOSS = ("train_loss", "train_entropy", "train_kl")
RESULTS = ("Loss", "k-NN accuracy")  # are drawn first, and large
KNN_NOTE = "top-1 in percent; in gray: before training (dashed), raw pixels (dotted); colored and dotted: the student"
# (title, note, keys in the log); the first key is drawn as a solid line, a second one dotted.
CHARTS = (
    ("Loss", "= entropy (dotted) + KL; dashed: ln K", LOSS),
    ("k-NN accuracy", KNN_NOTE, ("knn_top1", "knn_student_top1")),
    ("Largest prototype", "share of images", ("train_top_prototype",)),
    ("Spread of features", "dashed: 1 / √d, the ideal value", ("train_feature_std",)),
    ("Norm of gradients", "median; dotted: largest", ("train_grad_norm", "train_grad_norm_max")),
    ("Norm of the center", "levels off", ("train_center_norm",)),
    ("Learning rate", "", ("train_lr",)),
    ("Weight decay", "", ("train_wd",)),
    ("Teacher momentum", "1: the teacher is frozen", ("train_momentum",)),
    ("Throughput", "images per second", ("train_images_per_s",)),
    ("Waiting for data", "share of time", ("train_data_wait",)),
    ("Memory", "peak in MB", ("train_max_mem_mb",)),
)
BLUE, ORANGE, GRAY = "#3a86c8", "#e08a2e", "#8a8a8a"  # legible on white and on black


def draw_charts(runs):
    """({HTML of a caption: Bokeh figure} of the results, of the others, titles without numbers in the logs)."""
    results, others, missing = {}, {}, []
    for title, note, keys in CHARTS:
        tables = [columns(run.log, *keys) for run in runs]
        if any(data["epoch"] for data in tables):
            last = " / ".join(short(data[keys[0]][-1]) if data["epoch"] else "–" for data in tables)
            drawn = results if title in RESULTS else others
            drawn[f"<b>{title}</b> {note} <span>{last}</span>"] = draw_chart(runs, tables, keys)
        else:
            missing.append(title)
    return results, others, missing


def short(number):
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def draw_chart(runs, tables, keys):
    """A Bokeh figure of the same curves for each run, the first in blue and the second in orange."""
    from bokeh.models import HoverTool

    positive = all(value > 0 for data in tables for key in data if key != "epoch" for value in data[key])
    scale = "log" if keys[0] == "train_grad_norm" and positive else "linear"
    plot = empty_figure(runs, scale, height=300 if keys[0] in ("train_loss", "knn_top1") else 180)
    for run, data, color in zip(runs, tables, (BLUE, ORANGE), strict=False):
        names = {key: key.removeprefix("train_").replace("_", " ") for key in data if key != "epoch"}
        if not names:
            continue
        if len(runs) == 1 and tuple(names) == LOSS:
            plot.varea_stack(LOSS[1:], x="epoch", source=data, color=(BLUE, ORANGE), alpha=0.45)
        line = plot.line("epoch", keys[0], source=data, color=color, line_width=2)
        for key in list(names)[1:2]:
            plot.line("epoch", key, source=data, color=color, line_width=2, line_dash="dotted")
        if len(data["epoch"]) <= 40:
            plot.scatter("epoch", keys[0], source=data, color=color, size=4)
        for level, dash in levels_of(run, keys[0]):
            plot.line([run.log[0]["epoch"], run.log[-1]["epoch"]], level, color=GRAY, line_dash=dash)
        values = ", ".join(f"{name} <b>@{key}{{%.4g}}</b>" for key, name in names.items())
        tip = f'<div class="tip">{run.name * (len(runs) > 1)} epoch @epoch: {values}</div>'
        formatters = {f"@{key}": "printf" for key in names}
        plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tip, formatters=formatters))
    return plot


def levels_of(run, key):
    """Numbers to compare a logged one with, such as a bound, drawn as lines: [(number, "dashed" or "dotted")]."""
    if key == "train_feature_std":
        return [(width**-0.5, "dashed") for width in last_of(run, "train_feature_dim") if width > 0]
    names = {"train_loss": {"train_ln_k": "dashed"}, "knn_top1": {"knn_start": "dashed", "knn_raw_pixels": "dotted"}}
    return [(level, dash) for name, dash in names.get(key, {}).items() for level in last_of(run, name)]


def empty_figure(runs, scale, height):
    from bokeh.models import BasicTicker, PrintfTickFormatter
    from bokeh.plotting import figure

    epochs = [line["epoch"] for run in runs for line in run.log]
    look = {"height": height, "sizing_mode": "stretch_width", "toolbar_location": None, "tools": "", "min_border": 4}
    plot = figure(x_range=(min(epochs) - 0.4, max(epochs) + 0.4), y_axis_type=scale, **look)
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.axis.minor_tick_line_color = plot.xgrid.grid_line_color = None
    plot.axis.major_label_text_font = "system-ui, sans-serif"
    plot.xaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=5)
    plot.yaxis.formatter = PrintfTickFormatter(format="%.5g")
    return plot


def write_curves(folders, output):
    """A picture of loss and, if measured, k-NN accuracy by epoch, one color per run. Raises UserError without a log."""
    from matplotlib.figure import Figure

    runs = [Run("", Path(folder).resolve(), *read_texts(Path(folder)), {}, None, "") for folder in folders]
    for run in runs:
        if not columns(run.log, "train_loss")["epoch"]:
            raise UserError(f"RUN_DIR {run.folder} has no log.txt with a loss. Name another folder")
    labels = names_of(runs) if len(runs) > 1 else [runs[0].folder.name]
    # matplotlib would read $ as a formula, and leave out labels that start with _.
    labels = [label.replace("$", r"\$") if label[0] != "_" else f" {label}" for label in labels]
    drawn = {"train_loss": "loss", "knn_top1": "k-NN top-1 (%)"}
    drawn = {key: label for key, label in drawn.items() if any(columns(run.log, key)["epoch"] for run in runs)}
    figure = Figure(figsize=(3.6 * len(drawn), 2.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for run, name in zip(runs, labels, strict=True):
            data = columns(run.log, key)
            axes.plot([epoch + 1 for epoch in data["epoch"]], data.get(key, []), marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # no parts of epochs
        axes.spines[["top", "right"]].set_visible(False)
    for key, name, style in (("knn_raw_pixels", "raw pixels", "dotted"), ("knn_start", "before training", "dashed")):
        if levels := [level for run in runs for level in last_of(run, key)]:  # nearly the same for all seeds
            axes.axhline(levels[-1], color=GRAY, linestyle=style, label=name)
    axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format=Path(output).suffix[1:].lower(), dpi=110)
    utils.write_whole(output, lambda file: file.write(content.getvalue()))


# ---- pictures ----

SHOWN, NEIGHBORS, TILE = 8, 6, 112  # rows of pictures, neighbors per row, pixels


class Sample(NamedTuple):
    """Image `number` of a set; `inputs` says how a network sees it."""

    images: object
    number: int
    inputs: utils.Inputs = utils.RGB

    @property
    def name(self):
        return utils.printable(self.images.name(self.number))

    @property
    def label(self):
        """The name of its class; None without classes."""
        targets = self.images.targets
        return None if targets is None else self.images.classes[targets[self.number]]

    def load(self):
        return dino_images.decode(self.images.open(self.number), self.inputs)

    def photo(self, size):
        """The image for people, uint8 [3, size, size]."""
        return dino_crops.eval_transform(size)(dino_images.shown(self.load()))


def images_of_runs(runs, number, inputs):
    """At most `number` Samples of a run's training data if they are on this machine, else of `sample`.

    Raises UserError if `sample` can't replace them, because they have another number of channels.
    """
    for run in runs:
        path = run.args.get("data_path")
        if isinstance(path, str) and not path.startswith("torchvision:"):  # no download
            with contextlib.suppress(UserError):
                return choose_images(path, number, inputs)
    if inputs.in_chans not in (1, 3):
        raise UserError("the images of the run are not on this machine. Name others with --data_path")
    print("note: the images of the run are not on this machine; the page shows --data_path sample")
    return choose_images("sample", number, inputs)


def choose_images(data_path, number, inputs=utils.RGB):
    """At most `number` Samples, evenly spread over the images of data_path, or of its val part. Raises UserError."""
    path = dino_data.find_part(data_path, "val") or dino_data.find_data(data_path)
    images = dino_data.find_images(path, "val", in_chans=inputs.in_chans)
    samples = evenly([Sample(images, i, inputs) for i in range(len(images))], number)
    found = [sample for sample in samples if readable(sample)]
    if not found:
        raise UserError(f"none of the {len(samples)} images chosen from {data_path} can be read. Name others")
    return found


def readable(sample):
    try:
        sample.load()
    except dino_images.BadImage as e:
        utils.log(f"warning: {e}. The page leaves it out")
        return False
    return True


def evenly(items, number):
    return [items[i * len(items) // number] for i in range(number)] if number < len(items) else list(items)


def pictures(run, samples, args, device):
    """HTML sections about the teacher: attention, patch features, neighbors; or the reason why there are none."""
    try:
        model, size = build_teacher(run, device)
    except UserError as e:
        return [f"<p>No pictures: {escape(str(e))}.</p>"]
    neighbors = neighbors_section(model, samples, size, args)
    if not dino_backbones.is_vit(model):
        return ["<p>No attention and no patch features: the network is not one of our ViTs.</p>", neighbors]
    return [attention_section(model, evenly(samples, SHOWN), size, device), neighbors]


def build_teacher(run, device):
    """(teacher, side of its training crops). Raises UserError if there is none, or if it has diverged."""
    if run.teacher is None:
        raise UserError(run.source)
    arch, patch_size, size = (run.args.get(key) for key in ("arch", "patch_size", "global_crops_size"))
    if not isinstance(arch, str):
        raise UserError(f"{run.source} does not name its network (arch)")
    patch_size, size = patch_size or 16, size or 224
    model, _ = dino_backbones.build_backbone(arch, patch_size, size, in_chans=utils.inputs_of(run.args).in_chans)
    state = dino_checkpoints.backbone_state(run.teacher)
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{run.source} has weights that are not finite: the run has diverged")
    dino_backbones.resize_model_grid(model, state)
    dino_backbones.load_backbone_state(model, state, run.source, arch, size)
    return dino_backbones.prepare_for_evaluation(model, device), size


def attention_section(model, samples, size, device):
    """One row per image: the image, principal components of its patch tokens as colors, attention of CLS."""
    from matplotlib import colormaps

    patch_size = model.patch_embed.patch_size
    size = max(2 * size // patch_size, 1) * patch_size  # twice the training size, for finer maps
    transform = dino_crops.eval_transform(size, samples[0].inputs)
    images = [transform(sample.load()) for sample in samples]
    maps, tokens = [], []
    for image in images:  # one by one: large images have many tokens
        batch = utils.normalize(image[None].to(device))
        maps.append(dino_features.cls_attention(model, batch)[0].float().cpu())  # [heads, h, w]
        tokens.append(model.get_intermediate_layers(batch)[0][0, 1:].float().cpu())  # [h · w, D]
    dino_features.check_finite_features(*maps, *tokens)
    colors = (
        dino_features.main_components(torch.stack(tokens)).unflatten(1, maps[0].shape[1:]).mul(255).byte()
    )  # [N, h, w, 3]
    header, rows = ["image", "patches", "mean", *(f"head {i}" for i in range(len(maps[0])))], []
    for sample, color, heads in zip(samples, colors, maps, strict=True):
        masses = [(mass - mass.min()).numpy() for mass in (heads.mean(0), *heads)]
        heat = [colormaps["viridis"](mass / max(mass.max(), 1e-12), bytes=True)[..., :3] for mass in masses]
        of = f" of {'/'.join(Path(sample.name).parts[-2:])}"
        tiles = zip(header[1:], (color.numpy(), *heat), strict=True)
        rows.append(
            [
                photo(sample.photo(size), of),
                *(embed(Image.fromarray(pixels), what + of, "PNG") for what, pixels in tiles),
            ]
        )
    note = (
        f"Images of {size} pixels, twice the size in training. Patches: the first three principal components of the "
        "last block's patch tokens, over all these images, as red, green and blue; similar colors are similar "
        "features. Mean, heads: attention of CLS to each patch in the last block, each map scaled to its range."
    )
    return table("Attention and patch features", header, rows, note, "tiles")


def neighbors_section(model, samples, size, args):
    """One row per query image: the images with the most similar features, best first."""
    inputs, chosen = samples[0].inputs, samples[0].images.take([sample.number for sample in samples])
    images = dino_data.EvalImages(chosen, dino_crops.eval_transform(size, inputs), inputs=inputs)
    loader = DataLoader(images, batch_size=64, num_workers=args.num_workers)
    features = F.normalize(dino_features.extract_features(model, loader, use_cuda=False), dim=1)
    dino_features.check_finite_features(features)
    similarity = (features @ features.T).fill_diagonal_(-math.inf)  # not its own neighbor
    best, nearest = (found.tolist() for found in similarity.topk(min(NEIGHBORS, len(samples) - 1), dim=1))
    rows = []
    for i in evenly(range(len(samples)), SHOWN):
        found = zip(nearest[i], best[i], strict=True)
        rows.append([tile(samples[i]), *(tile(samples[j], value, samples[i].label) for j, value in found)])
    note = f"The nearest of {len(samples)} images to the image on the left, with the cosine similarity of features."
    if samples[0].label is not None:
        hits = sum(samples[i].label == samples[js[0]].label for i, js in enumerate(nearest))
        share = 100 * hits / len(samples)
        note += f" For {share:.0f} % of all images the nearest one has the same class; ≠: another class."
    return table("Nearest neighbors", ["image", *map(str, range(1, len(rows[0])))], rows, note, "tiles")


def tile(sample, similarity=None, wanted=None):
    """A small image, its similarity, its class or file name, and a mark if it has another class than `wanted`."""
    image = sample.photo(TILE)
    name = escape(sample.label or Path(sample.name).name)
    if similarity is None:
        return f"{photo(image, name)}<small>{name}</small>"
    name = f"<em>≠ {name}</em>" if sample.label != wanted else name
    return f"{photo(image, '')}<small>{similarity:.3f}<br>{name}</small>"


def photo(image, alt):
    """An image, uint8 [3, H, W], as an <img>."""
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    return embed(image.resize((TILE, TILE), Image.Resampling.BICUBIC), alt, "JPEG")


def embed(image, alt, kind):
    """A PIL image as an <img> with the file in it; browsers enlarge PNGs without blur (see the style sheet)."""
    file = io.BytesIO()
    image.save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/{kind.lower()};base64,{data}">'


# ---- the page ----

# The Content-Security-Policy lets a browser refuse anything that is not in the page. Bokeh reads colors from the --bk
# variables.
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { --ink: #1c1c1c; --quiet: #646464; --line: #dcdcdc; --paper: #fff; --mark: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --quiet: #a0a0a0; --line: #3a3a3a; --paper: #161616; --mark: #ff8a80; } }
:root { --bk-major-label-text-color: var(--quiet); --bk-axis-line-color: var(--line);
  --bk-major-tick-line-color: var(--line); --bk-grid-line-color: var(--line); }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 1.8rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: .6rem 0 .2rem; }
figcaption span { float: right; margin-left: .8rem; font-variant-numeric: tabular-nums; }
p { max-width: 50rem; margin: .2rem 0 .6rem; }
small, figcaption, th, section p, em, td:first-child { color: var(--quiet); font-style: normal; }
figcaption b { color: var(--ink); }
small, figcaption, section p { font-size: .82rem; }
em { color: var(--mark); }
.grid { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); }
.grid > *, figure { min-width: 0; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; font-weight: 400; }
.text td { border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.text td:first-child { white-space: nowrap; }
.text td + td { min-width: 8rem; }
.tiles td { padding: 0 4px 4px 0; width: 7rem; min-width: 4.2rem; line-height: 1.2; overflow-wrap: anywhere; }
img { display: block; width: 100%; }
.PNG { image-rendering: pixelated; }
summary { font-size: 1.15rem; margin-top: 1.8rem; cursor: pointer; }
@media (max-width: 40rem) { .wide h3::after { content: " – scroll sideways for more →"; font-weight: 400; } }
</style>
$bokeh
</head><body><main>
$body
</main>
<script>matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload())</script>
$script
</body></html>
""")


def build_page(runs, sections):
    """The HTML of the page, results first; `sections` are the pictures of each run."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    two, names = len(runs) > 1, list(map(escape, names_of(runs)))
    title = " and ".join(names)
    parts = [f"<h1>{title}</h1>"]
    for run in runs:
        where = f"{f'{run.name}: ' * two}{run.folder}, started {describe(run.info.get('started'))}"
        parts.append(f"<p><b>{escape(verdict(run))}</b><br><small>{escape(where)}</small></p>")
    results, others, missing = draw_charts(runs)
    drawn = results | others
    script, charts = components(list(drawn.values())) if drawn else ("", [])
    charts = [f"<figure><figcaption>{c}</figcaption>{chart}</figure>" for c, chart in zip(drawn, charts, strict=True)]
    colors = f" Blue is A ({names[0]}), orange B ({names[1]})." if two else ""
    parts += ['<div class="grid pair">', *charts[: len(results)], f"</div><p><small>{colors}</small></p>"]
    parts += [*map(warnings_table, runs), '<h2>What the network sees</h2><div class="grid pair">']
    for run, name, of_run in zip(runs, names, sections, strict=True):
        parts += [f"<div><h3>{run.name}: {name}</h3>", *of_run, "</div>"] if two else of_run
    note = "By epoch, from 0. Next to each title: the last value."
    note += f" Not in log.txt: {', '.join(missing)}." if missing else ""
    parts += [f'</div><h2>Other curves</h2><p>{note}</p><div class="grid">', *charts[len(results) :], "</div>"]
    settings = f'<div class="grid pair">{"".join(facts(runs))}</div>'
    parts.append(f"<details><summary>Settings, machine, versions</summary>{settings}</details>")
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if drawn else ""
    return PAGE.substitute(title=title, bokeh=bokeh, script=script, body="\n".join(parts))


# ---- the report ----


def main(args):
    """Write the page or the picture as `args` say (see get_args_parser). Raises UserError."""
    check_args(args)
    if args.curves:
        write_curves(args.run_dir, args.curves)
        return print(args.curves)
    runs = [read_run(name, folder) for name, folder in zip("AB", args.run_dir, strict=False)]
    output = Path(args.output or runs[0].folder / "report.html")
    dino_cli.check_output_dir(output.parent, "--output", [output.name])
    device = utils.pick_device(args.device)
    samples = []
    if args.data_path or any(run.teacher for run in runs):
        inputs = [utils.inputs_of(run.args) for run in runs]
        if inputs[0] != inputs[-1]:
            kinds = "; ".join(one.describe() for one in inputs)
            raise UserError(f"the two runs have different kinds of images ({kinds}). Write one page for each")
        named = args.data_path and choose_images(args.data_path, args.images, inputs[0])
        samples = named or images_of_runs(runs, args.images, inputs[0])
    page = build_page(runs, [pictures(run, samples, args, device) for run in runs])
    utils.write_whole(output, lambda file: file.write(page.encode(errors="backslashreplace")))
    print(f"{output}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    dino_cli.run(main, get_args_parser(), __doc__)
