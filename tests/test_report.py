"""report.py: what it reads, says and draws, against slow obvious ones, and the page in a real browser."""

import base64
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of, assert_near, ending, run_script
from matplotlib import colormaps
from PIL import Image

import dino_backbones
import dino_crops
import dino_images
import report
import utils

ATTACK = "</script><script>alert(1)</script>"
LN_K = math.log(64)


# ---- runs ----


def epoch_line(epoch, **more):
    """A line of log.txt with all that is logged."""
    return {
        "train_loss": 4.0 - epoch, "train_lr": 0.001, "train_wd": 0.04, "epoch": epoch, "train_entropy": 3.0 - epoch,
        "train_kl": 1.0, "train_ln_k": LN_K, "train_top_prototype": 0.25, "train_center_norm": 2.0,
        "train_feature_std": 0.06, "train_feature_dim": 192, "train_grad_norm": 0.1, "train_grad_norm_max": 2.0,
        "train_momentum": 0.996, "train_images_per_s": 800.0, "train_data_wait": 0.05, "train_max_mem_mb": 900.0,
        **more,
    }  # fmt: skip


LOG = [epoch_line(0, knn_top1=40.0), epoch_line(1, knn_top1=62.5), epoch_line(2, warnings=[ATTACK, "slow"])]
INFO = {
    "started": "2026-11-22T08:00:00",
    "command": f"python main_dino.py {ATTACK}",
    "changed": {"epochs": 3, "lr": 0.001},
    "machine": {"host": "here", "cores": 2, "gpus": []},
    "versions": {"python": "3.11", "torch": "2.14"},
    "git": {"commit": "0123abc", "changed_files": 2},
    "processes": 1,
}
ARGS = {"arch": "vit_nano", "patch_size": 16, "global_crops_size": 32, "epochs": 3}


def teacher(seed=1):
    """An untrained network that attends to some patches much more than to others."""
    torch.manual_seed(seed)
    model = dino_backbones.build_backbone("vit_nano", 16, 32)[0].eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 6
    return model


def make_run(folder, log=LOG, info=INFO, model=None, args=ARGS):
    """A folder as main_dino.py leaves it; None leaves a part out."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is not None:
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    if info is not None:
        (folder / "run.json").write_text(json.dumps(info, indent=1))
    if model is not None:
        state = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
        torch.save({"teacher": state, "args": args, "epoch": 3}, folder / "checkpoint.pth")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", model=teacher())


@pytest.fixture(scope="module")
def images(tiny_root, tmp_path_factory):
    """Six images in two class folders, one with a name that is an attack on the page."""
    root = tmp_path_factory.mktemp("images")
    for name, source in (("<script>alert(1)", "coffee"), ("brick", "brick")):
        (root / name).mkdir()
        for path in sorted((tiny_root / "val" / source).iterdir())[:3]:
            shutil.copy(path, root / name)
    return root


class Page(HTMLParser):
    """The elements, the text and the pictures of a page."""

    def __init__(self, path):
        super().__init__()
        self.html, self.tags, self.words = Path(path).read_text(), [], []
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.tags.append(("", {}))

    def pictures(self, kind):
        return {a["alt"]: picture_of(a) for tag, a in self.tags if tag == "img" and a["class"] == kind and a["alt"]}


def picture_of(attrs):
    return np.array(Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1]))))


def page_of(*flags, images=None, output=None):
    """The Page that main makes of these flags, in this process."""
    data = [] if images is None else ["--data_path", images]
    flags = [*flags, *data, "--num_workers", "0", "--device", "cpu", *([] if output is None else ["--output", output])]
    args = arguments_of(report, *flags)
    report.main(args)
    return Page(args.output or Path(args.run_dir[0]) / "report.html")


@pytest.fixture(scope="module")
def page(run_folder, images):
    return page_of(run_folder, images=images)


@pytest.fixture(scope="module")
def page_of_two(run_folder, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    log = [epoch_line(epoch, train_loss=5.0) for epoch in range(2)]
    other = make_run(folder / "b", log, {**INFO, "changed": {"epochs": 3, "seed": 7}}, teacher(2))
    return page_of(run_folder, other, images=images, output=folder / "two.html")


# ---- what a run has left ----


def test_lines_that_are_no_epoch_are_passed_over_and_the_later_of_two_counts(tmp_path):
    lines = [
        '{"epoch": 1, "train_loss": 2}',
        '{"epoch": 0}',
        "resumed",
        "{torn",
        "[1]",
        '{"epoch": 1, "train_loss": 3}',
    ]
    lines += [
        '{"epoch": "2"}',
        '{"epoch": true}',
        '{"epoch": -1}',
        '{"test_acc": 1}',
        "[" * 100_000,
        '{"epoch": 1e400}',
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    assert report.read_run("A", tmp_path).log == [{"epoch": 0}, {"epoch": 1, "train_loss": 3}]


def test_columns_hold_the_epochs_with_a_finite_first_number():
    log = [{"epoch": 0, "a": math.nan, "b": 1}, {"epoch": 1, "a": 2, "b": "x"}, {"epoch": 3, "a": 4, "b": 5, "c": None}]
    found = report.columns(log, "a", "b", "c")
    assert found["epoch"] == [1, 3]
    assert found["a"] == [2, 4]
    assert math.isnan(found["b"][0])
    assert found["b"][1] == 5
    assert "c" not in found


def test_arguments_are_the_checkpoints_with_what_was_changed_on_top(tmp_path):
    folder = make_run(tmp_path, info={"changed": {"epochs": 9}}, model=teacher())
    assert report.read_run("A", folder).args == {**ARGS, "epochs": 9}


def test_the_folder_one_is_in_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_run(tmp_path))
    assert report.read_run("A", ".").folder == tmp_path


def test_the_checkpoint_before_stands_in_for_a_damaged_one(tmp_path, images):
    folder = make_run(tmp_path, model=teacher())
    (folder / "checkpoint.pth").rename(folder / "checkpoint.prev.pth")
    (folder / "checkpoint.pth").write_bytes(b"torn")
    assert "Nearest neighbors" in page_of(folder, images=images).text


# ---- in words and tables ----


def test_the_summary_says_how_the_run_stands(page):
    assert "3 of 3 epochs are done. The loss of the last one is 2.000." in page.text
    assert f"The teacher's entropy is 1.000, {100 / LN_K:.0f} % of its highest, ln K = {LN_K:.3f}." in page.text
    assert "k-NN accuracy is 62.5 % at its best, in epoch 1; 62.5 % at last. Warnings: 2." in page.text


def test_the_best_accuracy_need_not_be_the_last():
    log = [epoch_line(0, knn_top1=50.0), epoch_line(4, knn_top1=61.0), epoch_line(8, knn_top1=55.5)]
    run = report.Run("A", Path("x"), log, {}, {}, None, "")
    assert "is 61.0 % at its best, in epoch 4; 55.5 % at last. Warnings: none." in report.summary(run)
    assert report.summary(run).startswith("9 epochs are done.")


def test_an_epoch_without_a_finite_loss_is_called_so():
    run = report.Run("A", Path("x"), [{"epoch": 0, "train_loss": math.nan}], {}, {}, None, "")
    assert "The last one has no finite loss." in report.summary(run)


def test_tables_say_what_was_run(page):
    assert "machine host here, cores 2, gpus none" in page.text
    assert "git commit 0123abc, changed files 2" in page.text
    assert "Arguments that differ from the defaults value epochs 3 lr 0.001" in page.text


def test_of_two_runs_arguments_that_differ_come_first_and_are_marked(page_of_two):
    assert "≠ lr 0.001 default ≠ seed default 7 epochs 3 3" in page_of_two.text


def test_the_same_warning_of_several_epochs_is_one_row():
    log = [epoch_line(2, warnings=["slow", "odd"]), epoch_line(3), epoch_line(5, warnings=["slow", 7])]
    run = report.Run("A", Path("x"), log, {}, {}, None, "")
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", report.warnings_table(run))
    assert rows == [("2 – 5", "slow"), ("2", "odd"), ("5", "7")]
    assert "Warnings: 4." in report.summary(run)


def test_of_very_many_warnings_the_first_hundred_are_shown():
    log = [epoch_line(epoch, warnings=[f"number {epoch}"]) for epoch in range(103)]
    html = report.warnings_table(report.Run("A", Path("x"), log, {}, {}, None, ""))
    assert "number 99<" in html
    assert "number 100<" not in html
    assert "and 3 more" in html


# ---- charts ----


def figures_of(*logs):
    runs = [report.Run(name, Path("x"), log, {}, {}, None, "") for name, log in zip("AB", logs, strict=False)]
    drawn, missing = report.draw_charts(runs)
    return {re.sub("</b>.*", "", caption)[3:]: figure for caption, figure in drawn.items()}, missing, list(drawn)


def glyphs(figure, kind):
    return [item for item in figure.renderers if type(item.glyph).__name__ == kind]


def test_entropy_and_kl_are_stacked_up_to_the_loss():
    figure = figures_of(LOG)[0]["Loss"]
    entropy, kl = glyphs(figure, "VArea")
    data = entropy.data_source.data
    tops = [list(area.glyph.y2.expr.fields) for area in (entropy, kl)]
    assert tops == [["train_entropy"], ["train_entropy", "train_kl"]]
    assert_near(np.add(data["train_entropy"], data["train_kl"]), data["train_loss"], 1e-12)
    assert glyphs(figure, "Line")[0].data_source.data["train_loss"] == [4.0, 3.0, 2.0]


def test_levels_are_ln_k_and_one_over_the_root_of_the_width():
    figures = figures_of(LOG)[0]
    for title, height in (("Loss", LN_K), ("Spread of features", 1 / math.sqrt(192))):
        (level,) = [line for line in glyphs(figures[title], "Line") if line.glyph.line_dash == [6]]
        heights = level.data_source.data.get("y", [level.glyph.y] * 2)
        assert_near(heights, [height, height], 1e-12)
    assert not [line for line in glyphs(figures["Memory"], "Line") if line.glyph.line_dash == [6]]


def test_the_value_under_the_pointer_names_every_curve_of_a_chart():
    figures, _, captions = figures_of(LOG, LOG[:2])
    tips = [tool.tooltips for tool in figures["Loss"].tools]
    assert "A epoch @epoch: loss <b>@train_loss{%.4g}</b>, entropy <b>@train_entropy{%.4g}</b>, kl" in tips[0]
    assert "B epoch @epoch: loss" in tips[1]
    assert "<span>2 / 3</span>" in captions[0]
    colors = [line.glyph.line_color for line in glyphs(figures["k-NN accuracy"], "Line")]
    assert colors == [report.BLUE, report.ORANGE]


def test_the_last_value_stands_beside_a_title():
    captions = figures_of(LOG, [{"epoch": 0, "train_loss": 5.4321}])[2]
    assert "<span>2 / 5.43</span>" in captions[0]
    assert "<span>62.5 / –</span>" in captions[1]
    assert [report.short(x) for x in (0.0136612, 5.5589, -2, 1210.4, 123456.7)] == [
        "0.0137",
        "5.56",
        "-2",
        "1210",
        "123457",
    ]


def test_all_charts_share_the_epochs_of_the_longer_run():
    figures = figures_of(LOG[:1], LOG)[0]
    assert {(figure.x_range.start, figure.x_range.end) for figure in figures.values()} == {(-0.4, 2.4)}


def test_gradients_are_on_a_log_scale_unless_one_is_zero():
    kinds = [
        type(figures_of([epoch_line(0, train_grad_norm=norm)])[0]["Norm of gradients"].yaxis[0]).__name__
        for norm in (0.1, 0.0)
    ]
    assert kinds == ["LogAxis", "LinearAxis"]
    assert type(figures_of(LOG)[0]["Learning rate"].yaxis[0]).__name__ == "LinearAxis"


def test_a_log_of_the_authors_release_has_its_three_curves_and_says_what_is_missing():
    log = [{"train_loss": 9.0, "train_lr": 0.1, "train_wd": 0.04, "epoch": epoch} for epoch in range(60)]
    figures, missing, _ = figures_of(log)
    assert list(figures) == ["Loss", "Learning rate", "Weight decay"]
    assert len(missing) == 9
    assert not glyphs(figures["Loss"], "VArea")
    assert not glyphs(figures["Loss"], "Scatter")  # sixty dots would hide the line


# ---- pictures ----


def test_images_come_evenly_from_val_from_class_folders_or_from_the_folder_itself(tiny_root, tmp_path):
    samples = report.choose_images(str(tiny_root), 8)
    every = sorted((tiny_root / "val").glob("*/*"))
    assert [Path(sample.name) for sample in samples] == [every[i] for i in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert [sample.label for sample in samples] == [Path(sample.name).parent.name for sample in samples]
    assert len(report.choose_images(str(tiny_root / "train"), 100)) == 40
    flat = report.choose_images(str(tiny_root / "train" / "text"), 100)
    assert len(flat) == 10
    assert {sample.label for sample in flat} == {None}


def test_main_components_are_those_of_a_singular_value_decomposition():
    torch.manual_seed(0)
    tokens = torch.randn(3, 40, 8) * torch.tensor([5, 4, 3, 1, 1, 1, 1, 1.0]) + 7
    flat = tokens.double().numpy().reshape(120, 8)
    flat = flat - flat.mean(0)
    axes = np.linalg.svd(flat, full_matrices=False)[2][:3]
    want = []
    for axis in axes:
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        found = flat @ axis
        low, high = np.percentile(found, [2, 98])
        want.append(np.clip((found - low) / (high - low), 0, 1))
    assert_near(report.main_components(tokens), np.stack(want, -1).reshape(3, 40, 3), 1e-6)


def test_attention_maps_have_a_pixel_a_patch_in_the_colors_of_viridis(page, images):
    maps = page.pictures("PNG")
    path = sorted((images / "brick").iterdir())[0]
    image = dino_crops.eval_transform(64)(dino_images.load_image(path))  # twice the size of training
    with torch.no_grad():
        attention = teacher().get_last_selfattention(utils.normalize(image[None]))[0, :, 0, 1:].double().numpy()
    heads = dict(
        zip(["mean", *(f"head {i}" for i in range(len(attention)))], [attention.mean(0), *attention], strict=True)
    )
    for name, mass in heads.items():
        scaled = (mass - mass.min()) / (mass.max() - mass.min())
        want = 255 * colormaps["viridis"](scaled.reshape(4, 4))[..., :3]
        got = maps[f"{name} of brick/{path.name}"]
        assert got.shape == (4, 4, 3)
        assert np.abs(got - want).max() <= 4, name
    assert len(maps) == 6 * (2 + len(attention))


def test_patch_colors_are_the_components_of_all_images_together(page, images):
    model, tokens, names = teacher(), [], []
    for path in sorted(images.glob("*/*")):
        image = dino_crops.eval_transform(64)(dino_images.load_image(path))
        tokens.append(model.get_intermediate_layers(utils.normalize(image[None]))[0][0, 1:].detach())
        names.append(f"patches of {path.parent.name}/{path.name}")
    want = 255 * report.main_components(torch.stack(tokens)).numpy().reshape(6, 4, 4, 3)
    for name, colors in zip(names, want, strict=True):
        assert np.abs(page.pictures("PNG")[name] - colors).max() <= 1, name


def test_neighbors_are_the_images_with_the_highest_cosine(page, images):
    paths = sorted(images.glob("*/*"))
    batch = torch.stack([dino_crops.eval_transform(32)(dino_images.load_image(path)) for path in paths])
    with torch.no_grad():
        features = teacher()(utils.normalize(batch)).double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosine = features @ features.T
    rows = re.findall(r"<tr>(<td><img class=\"JPEG\".*?)</tr>", page.html.split("Nearest neighbors")[-1])
    assert len(rows) == 6
    hits = 0
    for i, row in enumerate(rows):
        order = [j for j in np.argsort(-cosine[i]) if j != i]
        hits += paths[order[0]].parent == paths[i].parent
        want = [f"{cosine[i, j]:.3f}" for j in order]
        assert re.findall(r"<small>(-?\d\.\d+)<br>", row) == want
        marks = ["≠" in cell for cell in row.split("<td>")[2:]]
        assert marks == [paths[j].parent != paths[i].parent for j in order]
    assert f"For {100 * hits / 6:.0f} % of all of them the nearest is of the same class" in page.text


def test_images_without_classes_go_by_their_names(run_folder, images, tmp_path):
    page = page_of(run_folder, images=images / "brick", output=tmp_path / "out.html")
    assert "of the same class" not in page.text
    assert "≠" not in page.text.split("Nearest neighbors")[-1]
    assert sorted((images / "brick").iterdir())[0].name in page.text.split("Nearest neighbors")[-1]


def test_the_runs_own_data_are_taken_if_they_are_still_there(tmp_path, images, sample_root, monkeypatch):
    monkeypatch.setattr(dino_images, "PATIENCE", 0.0)
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in sorted(images.glob("*/*"))[:5]))
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for path in sorted(images.glob("*/*"))[:4]:
            shard.add(path.resolve(), path.name)
    shards, lost = tmp_path / "{0..0}.tar", tmp_path / "{0..1}.tar"
    for there, number in ((images, 6), (tmp_path / "list.txt", 5), (shards, 4), (lost, 20), (tmp_path / "gone", 20)):
        folder = make_run(tmp_path / "run", info=None, model=teacher(), args={**ARGS, "data_path": str(there)})
        assert f"The nearest of {number} images" in page_of(folder, "--images", 20).text


# ---- parts that are missing ----


def test_a_log_alone_makes_a_page_without_pictures(tmp_path):
    page = page_of(make_run(tmp_path, info=None))
    assert f"No pictures: there is no checkpoint.pth in {tmp_path}." in page.text
    assert "(no run.json)" in page.text
    assert "img" not in [tag for tag, _ in page.tags]


def test_a_checkpoint_alone_makes_a_page_without_curves(tmp_path, images):
    page = page_of(make_run(tmp_path, None, None, teacher()), images=images)
    assert "There is no log.txt with an epoch in it." in page.text
    assert "Not in log.txt: Loss, k-NN accuracy," in page.text
    assert "arch vit_nano" in page.text
    assert "Attention and patch features" in page.text
    assert len(page.html) < 500_000  # nor Bokeh


def test_a_convnet_has_neighbors_only(tmp_path, images):
    model = dino_backbones.build_backbone("squeezenet1_1", 16, 32)[0]
    page = page_of(make_run(tmp_path, model=model, args={**ARGS, "arch": "squeezenet1_1"}), images=images)
    assert "the network is none of our ViTs" in page.text
    assert "Nearest neighbors" in page.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": None}, "does not say which network it is"),
        ({"arch": "vit_nanoo"}, "unknown --arch vit_nanoo; did you mean vit_nano"),
        ({"patch_size": 8}, "patch_embed.proj.weight is [128, 3, 16, 16]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_in_the_page(tmp_path, images, change, reason):
    page = page_of(make_run(tmp_path, info=None, model=teacher(), args={**ARGS, **change}), images=images)
    assert reason in page.text.split("No pictures: ")[1]


def test_of_a_run_that_diverged_there_are_curves_but_no_pictures(tmp_path, images):
    model = teacher()
    model.norm.weight.data[3] = math.nan
    page = page_of(make_run(tmp_path, model=model), images=images)
    assert "has weights that are not finite: the run has diverged" in page.text
    assert "figure" in [tag for tag, _ in page.tags]


def test_odd_values_in_run_json_do_no_harm(tmp_path):
    page = page_of(make_run(tmp_path, info={"changed": [1], "machine": "a box", "git": None, "versions": [["x"], {}]}))
    assert "machine a box" in page.text
    assert "git unknown" in page.text


# ---- words of others ----


def test_what_others_wrote_stays_text(page):
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert len(scripts) == 4  # Bokeh and its level of logging, its data, and the change of light
    assert "alert(1)" not in "".join(re.findall(r"<script.*?</script>", page.html, re.S))
    assert f"python main_dino.py {ATTACK}" in page.text
    assert f"2 {ATTACK}" in page.text  # the warning of epoch 2
    assert "≠ <script>alert(1)" in page.text


def test_a_folder_may_have_any_name(tmp_path, images):
    other = make_run(tmp_path / "<b onclick=alert(1)>'\"&$body", model=teacher())
    page = page_of(other, other, images=images)
    assert "b" not in [tag for tag, attrs in page.tags if "onclick" in attrs]
    assert f"A: {other}" in page.text


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attrs in page.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:"), tag
    assert len(page.html) < 3_000_000


# ---- mistakes ----


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["nowhere"], "RUN_DIR nowhere is no folder"),
        (["{run}", "{run}", "{run}"], "3 runs don't fit beside one another"),
        (["{run}", "--images", "1"], "--images 1 must be at least 2"),
        (["{run}", "--num_workers", "-1"], "--num_workers -1 must be at least 0"),
        (["{run}", "--data_path", "nowhere"], "--data_path nowhere is no folder"),
        (["{run}", "--output", "{run}/log.txt/out.html"], "can't write to --output"),
        (["{run}", "--output", "{run}"], "where a file is to be written"),
        (["{empty}"], "has nothing of a run in it that can be read"),
        (["{folder_as_log}"], "can't read"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, run_folder, tmp_path, flags, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder_as_log" / "log.txt").mkdir(parents=True)
    places = {"run": run_folder, **{name: tmp_path / name for name in ("empty", "folder_as_log")}}
    code, said = ending(monkeypatch, capsys, report, *(flag.format(**places) for flag in flags))
    assert code == 2
    assert line in said


def test_without_bokeh_the_remedy_is_named(monkeypatch, capsys, run_folder):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bokeh" else find(name, *more))
    code, said = ending(monkeypatch, capsys, report, run_folder)
    assert (code, said.endswith("pip install bokeh")) == (2, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_the_page_of_before_stays(monkeypatch, capsys, tmp_path, images, workers):
    folder = make_run(tmp_path / "run", model=teacher())
    (folder / "report.html").write_text("before")
    (tmp_path / "images").mkdir()
    for i, path in enumerate(sorted((images / "brick").iterdir())):
        (tmp_path / "images" / f"{i}.png").write_bytes(path.read_bytes()[: 500 if i == 1 else None])
    flags = [folder, "--data_path", tmp_path / "images", "--device", "cpu", "--num_workers", workers]
    code, said = ending(monkeypatch, capsys, report, *flags)
    assert code == 2
    assert f"can't read the image {tmp_path / 'images' / '1.png'}" in said
    assert (folder / "report.html").read_text() == "before"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pth", "log.txt", "report.html", "run.json"]


# ---- end to end ----


@pytest.mark.slow
def test_a_run_of_main_dino_has_a_page_with_everything(tiny_root, tmp_path):
    data = tiny_root / "train"
    run_script("main_dino.py", *SMALL_RUN, "--data_path", data, "--output_dir", tmp_path / "run", "--use_fp16", "false")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    lines = [{**epoch_line(line["epoch"]), **line} for line in lines]  # whether or not it writes all of these
    make_run(tmp_path / "run", log=lines)
    done = run_script("report.py", tmp_path / "run", "--num_workers", 1, "--images", 30, "--device", "cpu")
    page = Page(tmp_path / "run" / "report.html")
    assert done.stdout.strip().splitlines()[-1].startswith(f"{tmp_path / 'run' / 'report.html'}: 1.")
    assert f"The loss of the last one is {lines[-1]['train_loss']:.3f}." in page.text
    assert "The nearest of 30 images" in page.text
    assert "Attention and patch features" in page.text


# ---- in a browser ----


class Chromium:
    """A headless Chromium, spoken to in its DevTools protocol through two pipes."""

    # fmt: off
    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
    )
    # fmt: on

    def __init__(self, program, profile):
        their_input, self.output = os.pipe()
        self.input, their_output = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{their_input} 4>&{their_output}', "-", program, *self.FLAGS]
            + [f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(their_input, their_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self.number, self.events, self.rest, self.session = 0, [], b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        while b"\0" not in self.rest:
            part = os.read(self.input, 2**16)
            assert part, "Chromium has ended"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width, scheme="light"):
        self.go("about:blank")  # else the page before would notice, and load itself again
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.go(Path(path).as_uri())
        assert self.until(f"({DEEP})('canvas').length >= document.querySelectorAll('figure').length")

    def go(self, url):
        self.events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in [event.get("method") for event in self.events]:
            self.events.append(self.read())

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def until(self, expression):
        """Whether an expression becomes true within some seconds."""
        wait = "for (let i = 0; i < 200 && !(EXPR); i++) await new Promise(done => setTimeout(done, 50))"
        return self.js(f"(async () => {{ {wait.replace('EXPR', expression)}; return Boolean({expression}) }})()")

    def params(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.input)
        os.close(self.output)


# Elements in the page and inside its web components.
DEEP = """selector => { const found = []; const walk = root => root.querySelectorAll("*").forEach(element => {
  if (element.matches(selector)) found.push(element);
  if (element.shadowRoot) walk(element.shadowRoot) }); walk(document); return found }"""


@pytest.fixture(scope="module")
def chromium():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None and sys.platform == "linux" and shutil.which("apt-get") and os.geteuid() == 0:
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-q", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
        program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Chromium(program, profile)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def paths(page, page_of_two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, each in (("one", page), ("two", page_of_two)):
        (folder / f"{name}.html").write_text(each.html)
    return {name: folder / f"{name}.html" for name in ("one", "two")}


@pytest.mark.slow
@pytest.mark.xdist_group("chromium")
class TestInABrowser:
    @pytest.mark.parametrize("name", ["one", "two"])
    @pytest.mark.parametrize("width", [1280, 390])
    def test_the_page_opens_without_errors_requests_or_overflow(self, chromium, paths, name, width):
        chromium.open(paths[name], width)
        messages = chromium.params("Runtime.consoleAPICalled")
        assert messages, "Bokeh says that it is there"
        assert {message["type"] for message in messages} <= {"log", "info", "debug"}
        assert not chromium.params("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
        urls = [sent["request"]["url"] for sent in chromium.params("Network.requestWillBeSent")]
        assert {url.split(":")[0] for url in urls} == {"file", "data"}
        assert chromium.js("document.documentElement.scrollWidth") <= width  # innerWidth would grow with it
        assert chromium.js("document.querySelectorAll('figure').length") == 12
        pictures = chromium.js("[...document.images].map(image => image.naturalWidth)")
        assert len(pictures) > 50
        assert min(pictures) > 0

    def test_the_pointer_shows_the_values(self, chromium, paths):
        chromium.open(paths["one"], 1280)
        chromium.js("document.querySelector('figure').scrollIntoView({block: 'center'})")
        box = chromium.js(
            "(r => [r.x, r.y, r.width, r.height])(document.querySelector('figure').getBoundingClientRect())"
        )
        for step in range(3):
            x, y = box[0] + box[2] * 0.52 + step, box[1] + box[3] * 0.6
            chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tips = f"({DEEP})('.bk-Tooltip').map(tip => tip.shadowRoot.textContent).join()"
        assert chromium.until(f"{tips}.includes('epoch 1: loss 3, entropy 2, kl 1')")

    def test_a_finger_on_a_chart_scrolls_the_page(self, chromium, paths):
        chromium.open(paths["one"], 390)
        actions = chromium.js(f"({DEEP})('.bk-events').map(area => getComputedStyle(area).touchAction)")
        assert actions == ["auto"] * 12

    def test_light_and_dark_follow_the_system(self, chromium, paths):
        seen = {}
        for scheme in ("light", "dark"):
            chromium.open(paths["one"], 390, scheme)
            colors = "[document.body, document.querySelector('h1')].map(e => getComputedStyle(e)).map((s, i) => "
            seen[scheme] = chromium.js(colors + "(i ? s.color : s.backgroundColor).match(/\\d+/g).map(Number)[0])")
            ink = f"({DEEP})('.bk-Axis, .bk-LinearAxis').concat(document.body)[0]"
            label = chromium.js(f"getComputedStyle({ink}).getPropertyValue('--bk-major-label-text-color')")
            seen[scheme].append(label)
        assert seen["light"][0] > 200 > 100 > seen["light"][1]
        assert seen["dark"][0] < 100 < 200 < seen["dark"][1]
        assert seen["light"][2] != seen["dark"][2]
