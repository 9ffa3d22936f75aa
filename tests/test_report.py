"""report.py: numbers and pictures of the page against slow references, and the page in a real browser."""

import base64
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, arguments_of, assert_near, ending, run_script, sharp_nano
from matplotlib import colormaps
from PIL import Image

import dino_crops
import dino_features
import dino_images
import report
import utils

ATTACK = "</script><script>alert(1)</script>"
LN_K = math.log(64)


# ---- runs ----


def epoch_line(epoch, **more):
    """A line of log.txt with all numbers that main_dino.py logs."""
    return {
        "train_loss": 4.0 - epoch, "train_lr": 0.001, "train_wd": 0.04, "epoch": epoch, "train_entropy": 3.0 - epoch,
        "train_kl": 1.0, "train_ln_k": LN_K, "train_top_prototype": 0.25, "train_center_norm": 2.0,
        "train_feature_std": 0.06, "train_feature_dim": 192, "train_grad_norm": 0.1, "train_grad_norm_max": 2.0,
        "train_momentum": 0.996, "train_images_per_s": 800.0, "train_data_wait": 0.05, "train_max_mem_mb": 900.0,
        **more,
    }  # fmt: skip


BASELINES = {"knn_start": 30.0, "knn_raw_pixels": 20.5}
LOG = [
    epoch_line(0, knn_top1=40.0, **BASELINES),
    epoch_line(1, knn_top1=62.5, **BASELINES),
    epoch_line(2, warnings=[ATTACK, "slow"]),
]
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
    return sharp_nano(32, seed)


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


def run_of(log, name="A"):
    return report.Run(name, Path("x"), log, {}, {}, None, "")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", model=teacher())


@pytest.fixture(scope="module")
def images(tiny_root, tmp_path_factory):
    """Six images in two class folders; the name of one is an attack on the page."""
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

    def pictures(self):
        """{alternative text: pixels} of the maps."""
        found = {a["alt"]: a["src"] for tag, a in self.tags if tag == "img" and a["class"] == "PNG"}
        return {
            alt: np.array(Image.open(io.BytesIO(base64.b64decode(src.split(",")[1])))) for alt, src in found.items()
        }


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


# ---- reading a run ----


def test_lines_without_an_epoch_are_skipped_and_the_later_of_two_counts(tmp_path):
    lines = ['{"epoch": 1, "train_loss": 2}', '{"epoch": 0}', "resumed", "{torn", "[1]", '{"epoch": "2"}']
    lines += ['{"epoch": true}', '{"epoch": -1}', '{"test_acc": 1}', "[" * 100_000, '{"epoch": 1e400}']
    (tmp_path / "log.txt").write_text("\n".join([*lines, '{"epoch": 1, "train_loss": 3}']))
    assert report.read_run("A", tmp_path).log == [{"epoch": 0}, {"epoch": 1, "train_loss": 3}]


def test_columns_are_the_epochs_with_a_finite_first_number():
    log = [{"epoch": 0, "a": math.nan, "b": 1}, {"epoch": 1, "a": 2, "b": "x"}, {"epoch": 3, "a": 4, "b": 5, "c": None}]
    found = report.columns(log, "a", "b", "c")
    assert (found["epoch"], found["a"], list(found)) == ([1, 3], [2, 4], ["epoch", "a", "b"])
    assert math.isnan(found["b"][0])
    assert found["b"][1] == 5


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path, images):
    folder = make_run(tmp_path, model=teacher())
    (folder / "checkpoint.pth").rename(folder / "checkpoint.prev.pth")
    (folder / "checkpoint.pth").write_bytes(b"torn")
    assert "Nearest neighbors" in page_of(folder, images=images).text


# ---- text and tables ----


def test_the_verdict_says_what_has_come_of_the_run(page):
    knn = "k-NN accuracy 62.5 % (untrained 30.0, raw pixels 20.5), best 62.5 % in epoch 1."
    loss = f"Loss 2.000 = entropy 1.000 ({100 / LN_K:.0f} % of ln K) + KL 1.000."
    assert f"3 of 3 epochs. {knn} {loss} 2 warnings." in page.text


def test_an_epoch_without_a_finite_loss_is_reported():
    assert "The last epoch has no finite loss." in report.verdict(run_of([{"epoch": 0, "train_loss": math.nan}]))


def test_tables_show_machine_versions_and_settings(page):
    assert "processes 1 host here cores 2 gpus none python 3.11 torch 2.14 commit 0123abc changed files 2" in page.text
    assert "Settings that differ from the defaults value epochs 3 lr 0.001" in page.text


def test_settings_that_differ_between_two_runs_come_first_and_are_marked(page_of_two):
    assert "≠ lr 0.001 default ≠ seed default 7 epochs 3 3" in page_of_two.text


def test_a_warning_of_several_epochs_is_one_row():
    run = run_of([epoch_line(2, warnings=["slow", "odd"]), epoch_line(3), epoch_line(5, warnings=["slow", 7])])
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", report.warnings_table(run))
    assert rows == [("2 – 5", "slow"), ("2", "odd"), ("5", "7")]
    assert "4 warnings." in report.verdict(run)


# ---- charts ----


def figures_of(*logs):
    runs = [run_of(log, name) for name, log in zip("AB", logs, strict=False)]
    results, others, missing = report.draw_charts(runs)
    drawn = results | others
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


def test_knn_is_drawn_with_the_start_weights_and_raw_pixels():
    knn, start, pixels = glyphs(figures_of(LOG)[0]["k-NN accuracy"], "Line")
    assert knn.data_source.data["knn_top1"] == [40.0, 62.5]
    assert (start.glyph.y, start.glyph.line_dash) == (30.0, [6])
    assert (pixels.glyph.y, pixels.glyph.line_dash) == (20.5, [2, 4])


def test_results_come_first_and_settings_last(page):
    order = ["k-NN accuracy", "Loss", "2 warnings", "Warnings of", "Attention and patch features", "Learning rate"]
    places = [page.text.index(words) for words in [*order, "Settings, machine, versions", "changed files"]]
    assert places == sorted(places)


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [run_of(LOG)._replace(folder=tmp_path / part) for part in ("a/demo", "b/demo")]
    assert report.names_of(runs) == ["a/demo", "b/demo"]
    assert report.names_of(runs[:1]) == ["demo"]
    assert report.names_of([runs[0], runs[0]]) == ["demo", "demo"]


def test_a_log_of_the_authors_code_has_three_charts():
    log = [{"train_loss": 9.0, "train_lr": 0.1, "train_wd": 0.04, "epoch": epoch} for epoch in range(60)]
    figures, missing, _ = figures_of(log)
    assert list(figures) == ["Loss", "Learning rate", "Weight decay"]
    assert len(missing) == 9
    assert not glyphs(figures["Loss"], "VArea")
    assert not glyphs(figures["Loss"], "Scatter")  # 60 dots would hide the line


# ---- pictures ----


def test_images_come_evenly_from_val_or_from_class_folders_or_from_one_folder(tiny_root):
    samples = report.choose_images(str(tiny_root), 8)
    every = sorted((tiny_root / "val").glob("*/*"))
    assert [Path(sample.name) for sample in samples] == [every[i] for i in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert [sample.label for sample in samples] == [Path(sample.name).parent.name for sample in samples]
    assert len(report.choose_images(str(tiny_root / "train"), 100)) == 40
    flat = report.choose_images(str(tiny_root / "train" / "text"), 100)
    assert (len(flat), {sample.label for sample in flat}) == (10, {None})


def test_principal_components_agree_with_a_singular_value_decomposition():
    torch.manual_seed(0)
    tokens = torch.randn(3, 40, 8) * torch.tensor([5, 4, 3, 1, 1, 1, 1, 1.0]) + 7
    flat = tokens.double().numpy().reshape(120, 8)
    flat = flat - flat.mean(0)
    want = []
    for axis in np.linalg.svd(flat, full_matrices=False)[2][:3]:
        found = flat @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        low, high = np.percentile(found, [2, 98])
        want.append(np.clip((found - low) / (high - low), 0, 1))
    assert_near(dino_features.main_components(tokens), np.stack(want, -1).reshape(3, 40, 3), 1e-6)


def test_attention_maps_and_patch_colors_have_one_pixel_per_patch(page, images):
    model, tokens, maps = teacher(), [], page.pictures()
    paths = sorted(images.glob("*/*"))
    for path in paths:
        batch = utils.normalize(dino_crops.eval_transform(64)(dino_images.load_image(path))[None])  # twice 32
        with torch.no_grad():
            tokens.append(model.get_intermediate_layers(batch)[0][0, 1:])
            heads = model.get_last_selfattention(batch)[0, :, 0, 1:].double().numpy()
        names = ["mean", *(f"head {i}" for i in range(len(heads)))]
        for name, mass in zip(names, [heads.mean(0), *heads], strict=True):
            scaled = (mass - mass.min()) / (mass.max() - mass.min())
            want = 255 * colormaps["viridis"](scaled.reshape(4, 4))[..., :3]
            got = maps[f"{name} of {path.parent.name}/{path.name}"]
            assert got.shape == (4, 4, 3)
            assert np.abs(got - want).max() <= 4, name
    colors = 255 * dino_features.main_components(torch.stack(tokens)).numpy().reshape(6, 4, 4, 3)
    for path, want in zip(paths, colors, strict=True):
        assert np.abs(maps[f"patches of {path.parent.name}/{path.name}"] - want).max() <= 1
    assert len(maps) == 6 * (2 + len(heads))


def test_neighbors_are_the_images_with_the_highest_cosine_similarity(page, images):
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
        assert re.findall(r"<small>(-?\d\.\d+)<br>", row) == [f"{cosine[i, j]:.3f}" for j in order]
        marks = ["≠" in cell for cell in row.split("<td>")[2:]]
        assert marks == [paths[j].parent != paths[i].parent for j in order]
    assert f"For {100 * hits / 6:.0f} % of all images the nearest one has the same class" in page.text


def test_images_without_classes_have_their_file_names(run_folder, images, tmp_path):
    text = page_of(run_folder, images=images / "brick", output=tmp_path / "out.html").text
    assert "the same class" not in text
    assert "≠" not in text.split("Nearest neighbors")[-1]
    assert sorted((images / "brick").iterdir())[0].name in text.split("Nearest neighbors")[-1]


def test_the_runs_own_images_are_used_if_they_still_exist(tmp_path, images, sample_root, monkeypatch):
    monkeypatch.setattr(dino_images, "PATIENCE", 0.0)
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in sorted(images.glob("*/*"))[:5]))
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for path in sorted(images.glob("*/*"))[:4]:
            shard.add(path.resolve(), path.name)
    shards, lost = tmp_path / "{0..0}.tar", tmp_path / "{0..1}.tar"
    for there, number in ((images, 6), (tmp_path / "list.txt", 5), (shards, 4), (lost, 20), (tmp_path / "gone", 20)):
        folder = make_run(tmp_path / "run", info=None, model=teacher(), args={**ARGS, "data_path": str(there)})
        assert f"The nearest of {number} images" in page_of(folder, "--images", 20).text


# ---- missing and odd parts ----


def test_a_log_alone_gives_a_page_without_pictures(tmp_path):
    page = page_of(make_run(tmp_path, info=None))
    assert f"No pictures: there is no checkpoint.pth in {tmp_path}." in page.text
    assert "(no run.json)" in page.text
    assert "img" not in [tag for tag, _ in page.tags]


def test_a_checkpoint_alone_gives_a_page_without_curves(tmp_path, images):
    page = page_of(make_run(tmp_path, None, None, teacher()), images=images)
    assert "log.txt is missing or has no epochs." in page.text
    assert "Not in log.txt: Loss, k-NN accuracy," in page.text
    assert "arch vit_nano" in page.text
    assert "Attention and patch features" in page.text
    assert len(page.html) < 500_000  # without Bokeh


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": None}, "does not name its network"),
        ({"arch": "vit_nanoo"}, "unknown --arch vit_nanoo; did you mean vit_nano"),
        ({"patch_size": 8}, "patch_embed.proj.weight is [128, 3, 16, 16]"),
        ("diverged", "has weights that are not finite: the run has diverged"),
    ],
)
def test_a_checkpoint_that_gives_no_pictures_is_explained_on_the_page(tmp_path, images, change, reason):
    model = teacher()
    if change == "diverged":
        model.norm.weight.data[3], change = math.nan, {}
    page = page_of(make_run(tmp_path, info=None, model=model, args={**ARGS, **change}), images=images)
    assert reason in page.text.split("No pictures: ")[1]
    assert "figure" in [tag for tag, _ in page.tags]


def test_names_and_warnings_can_not_inject_html(page, tmp_path, images):
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 4  # Bokeh, its log level, the data, dark mode
    assert "alert(1)" not in "".join(re.findall(r"<script.*?</script>", page.html, re.S))
    assert f"python main_dino.py {ATTACK}" in page.text
    assert f"2 {ATTACK}" in page.text  # the warning of epoch 2
    assert "≠ <script>alert(1)" in page.text
    other = make_run(tmp_path / "<b onclick=alert(1)>'\"&$body")
    page = page_of(other, other)
    assert "b" not in [tag for tag, attrs in page.tags if "onclick" in attrs]
    assert f"A: {other}" in page.text


def test_everything_is_in_the_page(page):
    for tag, attrs in page.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:"), tag
    assert len(page.html) < 3_000_000


# ---- mistakes ----


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["nowhere"], "RUN_DIR nowhere is not a folder"),
        (["{run}", "{run}", "{run}"], "3 runs are too many for one page"),
        (["{run}", "--images", "1"], "--images: 1 must be at least 2"),
        (["{run}", "--output", "{run}/log.txt/out.html"], "can't write to --output"),
        (["{empty}"], "has no readable log.txt"),
        (["{folder_as_log}"], "can't read"),
        (["{run}", "--curves", "curves.pdf"], "--curves curves.pdf must end in .png or .svg"),
        (["{run}", "--curves", "c.png", "--output", "page.html"], "--output is for a page. Remove one of them"),
        (["{run}", "--curves", "c.png", "--data_path", "x"], "--data_path is for a page. Remove one of them"),
        (["{empty}", "--curves", "{empty}/c.png"], "/empty has no log.txt with a loss"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, run_folder, tmp_path, flags, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder_as_log" / "log.txt").mkdir(parents=True)
    places = {"run": run_folder, **{name: tmp_path / name for name in ("empty", "folder_as_log")}}
    code, said = ending(monkeypatch, capsys, report, *(flag.format(**places) for flag in flags))
    assert code == 2
    assert line in said


def test_curves_of_several_runs_are_one_picture(tmp_path):
    for seed in range(3):
        lines = [{"epoch": epoch, "train_loss": 5 - epoch + seed / 10} for epoch in range(3)]
        lines[2] |= {"knn_top1": 40.0 + seed, "knn_start": 20.0, "knn_raw_pixels": 30.0}
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "log.txt").write_text("\n".join(map(json.dumps, lines)))
    runs = [tmp_path / f"seed{seed}" for seed in range(3)]
    report.main(arguments_of(report, *runs, "--curves", tmp_path / "curves.png"))
    with Image.open(tmp_path / "curves.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colors  # matplotlib's first three, one per run
    report.main(arguments_of(report, *runs, "--curves", tmp_path / "curves.svg"))
    text = (tmp_path / "curves.svg").read_text()
    assert all(f"<!-- {word} -->" in text for word in ("seed2", "loss", "k-NN top-1 (%)", "raw pixels", "2"))
    assert "<!-- 1.5" not in text  # an epoch


def test_curves_of_runs_with_odd_and_equal_names_are_all_drawn(tmp_path, monkeypatch):
    folders = ["a/seed0", "b/seed0", "b/$x_$y", "b/_z"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        line = {"epoch": 0, "train_loss": 4.5} | (
            {"knn_top1": 40.0, "knn_raw_pixels": 30.0} if folder[0] == "a" else {}
        )
        (tmp_path / folder / "log.txt").write_text(json.dumps(line))
    report.main(arguments_of(report, *(tmp_path / f for f in folders), "--curves", tmp_path / "curves.SVG"))
    text = (tmp_path / "curves.SVG").read_text()
    assert "<!-- 1 -->" in text  # the first epoch is 1
    assert all(text.count(f"<!-- {word} -->") == 1 for word in ("a/seed0", "b/seed0", "b/$x_$y", "b/_z", "raw pixels"))
    monkeypatch.chdir(tmp_path / "a" / "seed0")
    report.main(arguments_of(report, ".", "--curves", tmp_path / "one.svg"))
    assert "<!-- seed0 -->" in (tmp_path / "one.svg").read_text()


def test_without_bokeh_the_pip_command_is_named(monkeypatch, capsys, run_folder):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bokeh" else find(name, *more))
    code, said = ending(monkeypatch, capsys, report, run_folder)
    assert (code, said.endswith("pip install bokeh")) == (2, True)


def test_a_damaged_image_is_left_out_and_an_odd_name_escaped(tmp_path, images, capsys):
    folder = make_run(tmp_path / "run", model=teacher())
    (tmp_path / "images").mkdir()
    names = [b"0.png", b"1.png", b"k\xf6ln.png"]
    for name, path in zip(names, sorted((images / "brick").iterdir()), strict=True):
        content = path.read_bytes()
        (tmp_path / "images" / os.fsdecode(name)).write_bytes(content[:500] if name == b"1.png" else content)
    page = page_of(folder, images=tmp_path / "images")
    assert f"can't read the image {tmp_path / 'images' / '1.png'}" in capsys.readouterr().out
    assert "The nearest of 2 images" in page.text
    assert "k\\udcf6ln.png" in page.text


def test_without_a_readable_image_the_old_page_stays(refusal, tmp_path):
    folder = make_run(tmp_path / "run", model=teacher())
    (folder / "report.html").write_text("before")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"torn")
    flags = [folder, "--data_path", tmp_path / "images", "--device", "cpu", "--num_workers", 1]
    assert "none of the 1 images" in refusal(report, *flags)
    assert (folder / "report.html").read_text() == "before"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pth", "log.txt", "report.html", "run.json"]


# ---- end to end ----


def test_a_run_of_main_dino_has_a_page_with_everything(tiny_root, tmp_path):
    run, data = tmp_path / "run", tiny_root / "train"
    run_script("main_dino.py", *SMALL_RUN, "--data_path", data, "--output_dir", run, "--use_fp16", "false")
    done = run_script("report.py", run, "--num_workers", 1, "--images", 30, "--device", "cpu")
    page = Page(run / "report.html")
    assert done.stdout.strip().splitlines()[-1].startswith(f"{run / 'report.html'}: 1.")
    loss = json.loads((run / "log.txt").read_text().splitlines()[-1])["train_loss"]
    assert page.text.startswith("run ")
    assert f"2 of 2 epochs. Loss {loss:.3f} = entropy" in page.text
    assert "Not in log.txt: k-NN accuracy." in page.text
    assert "The nearest of 30 images" in page.text
    assert "Attention and patch features" in page.text


# Writes what the page has become into its title, which --dump-dom prints. Bokeh draws inside of shadow roots.
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const deep = root => [...root.querySelectorAll("*")].flatMap(e => [e, ...(e.shadowRoot ? deep(e.shadowRoot) : [])]);
  const all = deep(document), style = getComputedStyle(document.body);
  document.title = JSON.stringify({
    charts: all.filter(e => e.className === "bk-Canvas" || e.matches(".bk-Canvas")).length,
    width: document.documentElement.scrollWidth, room: innerWidth, ink: style.color, paper: style.backgroundColor,
    pictures: [...document.images].every(i => i.naturalWidth > 0) ? document.images.length : 0,
  }) }, 2000))</script></body>"""


@pytest.mark.slow
@pytest.mark.xdist_group("chromium")
@pytest.mark.parametrize(("which", "width", "dark"), [("page", 1280, False), ("page_of_two", 390, True)])
def test_a_browser_draws_all_charts_without_errors_or_overflow(request, tmp_path, which, width, dark):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    html = request.getfixturevalue(which).html
    (tmp_path / "page.html").write_text(html.replace("</body>", PROBE))
    words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=20000"]
    words += ["--enable-logging=stderr", *["--blink-settings=preferredColorScheme=0"] * dark]
    done = subprocess.run([*words, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert console, "Bokeh reports its version"
    assert not [line for line in console if re.search("(?i)error|refused|warn|uncaught|violates", line)], console
    assert found["charts"] == 12
    assert found["pictures"] > 50
    assert found["width"] <= found["room"]
    light = [int(re.search(r"\d+", found[name])[0]) for name in ("ink", "paper")]
    assert (light[0] > light[1]) == dark
