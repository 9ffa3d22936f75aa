"""Attention images: every picture against a slow float64 version of what it should show, and the script end to end."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments_of, assert_near, ending, run_script, shared
from PIL import Image

import dino_backbones
import dino_cli
import dino_features
import utils
import visualize_attention

SMALL = ["--arch", "vit_nano", "--patch_size", "16", "--device", "cpu"]
MEAN, STD = (np.array(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def arguments(*flags):
    return arguments_of(visualize_attention, *SMALL, *flags)


def run(*flags):
    visualize_attention.main(arguments(*flags))


def end(monkeypatch, capsys, *flags):
    return ending(monkeypatch, capsys, visualize_attention, *SMALL, *flags)


def backbone():
    """A network whose attention differs from patch to patch."""
    torch.manual_seed(1)
    model = dino_backbones.build_backbone("vit_nano", 16, 48)[0].eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(backbone().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A real photograph of no round size, 100 wide and 70 high."""
    path = tmp_path_factory.mktemp("photograph") / "cat.png"
    (source,) = visualize_attention.find_images(None)
    Image.open(source).crop((100, 0, 400, 210)).resize((100, 70)).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(weights, photograph, tmp_path_factory):
    """The folder of a finished run: 70 × 100 pixels make 4 × 6 whole patches of 16."""
    out = tmp_path_factory.mktemp("pictures")
    flags = ["--pretrained_weights", weights, "--image_path", photograph, "--image_size", 70, 100]
    run(*flags, "--threshold", 0.6, "--output_dir", out)
    return out


def seen_by_the_network(photograph):
    """What the network should get, float64 [3, 64, 96]: the photograph without its last 6 rows and 4 columns."""
    pixels = np.asarray(Image.open(photograph).convert("RGB"))[:64, :96]
    return (pixels.transpose(2, 0, 1) / 255 - MEAN) / STD


def attention_of_cls(model, image):
    """CLS to patches in the last block, one number after the other in float64: [heads, h, w] of an image [3, H, W]."""
    seen = []
    last = model.blocks[-1]
    hook = last.norm1.register_forward_hook(lambda *call: seen.append(call[2][0].double()))
    model = model.eval()
    with torch.no_grad():
        model(torch.from_numpy(image).float()[None])
    hook.remove()
    tokens, heads = seen[0].numpy(), last.attn.num_heads  # [1 + patches, D]
    weight, bias = (p.detach().double().numpy() for p in (last.attn.qkv.weight, last.attn.qkv.bias))
    width = tokens.shape[1]
    side = width // heads
    queries, keys = tokens @ weight[:width].T + bias[:width], tokens @ weight[width : 2 * width].T + bias[width:-width]
    maps = []
    for head in range(heads):
        part = slice(head * side, (head + 1) * side)
        scores = [math.exp(queries[0, part] @ key[part] / math.sqrt(side)) for key in keys]
        maps.append([score / sum(scores) for score in scores[1:]])
    rows, columns = (n // model.patch_embed.patch_size for n in image.shape[1:])
    return np.array(maps).reshape(heads, rows, columns)


def largest(attention, share):
    """Mask of the fewest patches that hold the share of a map [h, w], found by taking the largest one by one."""
    mask, held = np.zeros(attention.shape, dtype=bool), 0.0
    for place in np.argsort(-attention, axis=None):
        if held >= share * attention.sum():
            break
        mask.flat[place] = True
        held += attention.flat[place]
    return mask


def enlarge(patches, side=16):
    return np.kron(patches, np.ones((side, side), dtype=patches.dtype))


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


# ---- flags ----


def test_flags_have_the_published_names_and_defaults():
    args = vars(dino_cli.OneLineParser(parents=[visualize_attention.get_args_parser()]).parse_args([]))
    assert args == {
        "arch": "vit_small",
        "patch_size": 8,
        "pretrained_weights": "",
        "checkpoint_key": "teacher",
        "image_path": None,
        "image_size": [480, 480],
        "output_dir": ".",
        "threshold": None,
        "device": "auto",
    }


def test_without_weights_the_published_ones_for_attention_are_taken(monkeypatch, tmp_path):
    asked = []

    def stop(args, device, **kwargs):
        asked.append((args.pretrained_weights, kwargs))
        raise utils.UserError("enough")

    monkeypatch.setattr(dino_backbones, "frozen_backbone", stop)
    with pytest.raises(utils.UserError, match="enough"):
        run("--output_dir", tmp_path)
    assert asked == [("", {"part": "attention", "inputs": utils.RGB})]


# ---- the maps ----


def test_cls_attention_is_the_softmax_over_all_tokens_without_that_of_cls_itself(photograph):
    model, image = backbone(), seen_by_the_network(photograph)
    want = attention_of_cls(model, image)
    got = dino_features.cls_attention(model, torch.from_numpy(image).float()[None])
    assert got.shape == (1, 4, 4, 6)
    assert_near(got[0], want, 1e-5)
    assert want.std() / want.mean() > 0.5  # not a flat map, in which anything would do
    model.set_fused_attention(True)
    assert_near(dino_features.cls_attention(model, torch.from_numpy(image).float()[None])[0], want, 1e-5)


@pytest.mark.parametrize("share", [0.05, 0.37, 0.6, 0.95])
def test_largest_mass_takes_the_fewest_patches_that_hold_the_share(share):
    attention = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(3)) ** 4
    got = dino_features.largest_mass(attention, share)
    want = [[largest(head.numpy().astype(np.float64), share) for head in heads] for heads in attention]
    assert np.array_equal(got.numpy(), want)
    assert 0 < got.sum() < got.numel()


def test_all_of_the_mass_is_all_patches():
    assert dino_features.largest_mass(torch.rand(1, 4, 4) + 0.1, 1.0).all()


# ---- the pictures ----


def test_a_run_writes_its_pictures_and_nothing_else(pictures):
    heads = range(4)
    names = ["img.png", "overview.png", *(f"attn-head{h}.png" for h in heads)]
    names += [f"mask_th0.6_head{h}.png" for h in heads]
    assert sorted(path.name for path in pictures.iterdir()) == sorted(names)


def test_img_is_the_normalised_image_from_its_least_to_its_most(pictures, photograph):
    image = seen_by_the_network(photograph)
    want = (image - image.min()) / (image.max() - image.min()) * 255
    got = read(pictures / "img.png").transpose(2, 0, 1)
    assert np.abs(got - want).max() <= 0.51


def test_attention_of_each_head_is_shown_by_viridis_patch_by_patch(pictures, photograph):
    from matplotlib import colormaps

    table = colormaps["viridis"](np.arange(256), bytes=True)[:, :3].astype(int)
    attention = attention_of_cls(backbone(), seen_by_the_network(photograph))
    for head, want in enumerate(attention):
        levels = (want - want.min()) / (want.max() - want.min()) * 255.999
        got = read(pictures / f"attn-head{head}.png").astype(int)
        assert np.abs(got - enlarge_colours(table[levels.astype(int)])).max() <= 4  # two neighbours in the table
    assert (table[0] == [68, 1, 84]).all()
    assert (table[255] == [253, 231, 36]).all()


def enlarge_colours(colours):
    return np.stack([enlarge(colours[..., c]) for c in range(3)], axis=-1)


def test_masks_keep_the_image_where_the_mass_is_darken_the_rest_and_draw_a_line_between(pictures, photograph):
    attention = attention_of_cls(backbone(), seen_by_the_network(photograph))
    pixels = np.asarray(Image.open(photograph).convert("RGB")).astype(int)[:64, :96]
    for head, got in enumerate(attention):
        mask = enlarge(largest(got, 0.6))
        drawn = read(pictures / f"mask_th0.6_head{head}.png").astype(int)
        line = np.zeros_like(mask)  # pixels with another kind of pixel above, below or beside them
        line[1:] |= mask[1:] != mask[:-1]
        line[:-1] |= mask[1:] != mask[:-1]
        line[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        line[:, :-1] |= mask[:, 1:] != mask[:, :-1]
        assert (drawn[line] == (255, 220, 0)).all()
        assert (drawn[mask & ~line] == pixels[mask & ~line]).all()
        assert (drawn[~mask & ~line] == pixels[~mask & ~line] // 3).all()
        assert line.any()
        assert (mask & ~line).any()
        assert (~mask & ~line).any()


def panels(heads, height=64, width=96):
    """The figure of an overview, drawn, and its panels that are in use."""
    attention = torch.rand(heads, height // 16, width // 16, generator=torch.Generator().manual_seed(1))
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    figure = visualize_attention.draw_overview(pixels, attention)
    figure.canvas.draw()
    return figure, [axis for axis in figure.axes if axis.images], pixels, attention


def test_the_overview_shows_the_image_the_mean_and_each_head_under_their_names():
    _, used, pixels, attention = panels(4)
    assert [axis.get_title() for axis in used] == ["image", "mean of heads", "head 0", "head 1", "head 2", "head 3"]
    shown = [axis.images[0] for axis in used]
    assert np.array_equal(shown[0].get_array(), pixels)
    assert_near(shown[1].get_array(), attention.double().mean(dim=0), 1e-6)
    for picture, head in zip(shown[2:], attention, strict=True):
        assert np.array_equal(picture.get_array(), head.numpy())
        assert picture.get_cmap().name == "viridis"
        assert picture.get_interpolation() == "nearest"
        assert picture.get_clim() == (head.min(), head.max())


@pytest.mark.parametrize(
    ("heads", "size", "grid"),
    [
        (4, (64, 64), (2, 3)),
        (6, (64, 64), (2, 4)),
        (12, (64, 64), (3, 5)),
        (3, (64, 96), (2, 3)),
        (6, (96, 160), (3, 3)),
        (6, (160, 16), (1, 8)),
        (4, (16, 320), (6, 1)),
    ],
)
def test_the_overview_has_the_shape_of_a_slide_and_no_row_to_spare(heads, size, grid):
    figure, used, *_ = panels(heads, *size)
    assert used[0].get_subplotspec().get_gridspec().get_geometry() == grid
    assert (grid[0] - 1) * grid[1] < len(used) <= grid[0] * grid[1]
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_overview_has_a_white_ground_and_no_axes(pictures):
    shown = read(pictures / "overview.png")
    assert (shown[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    figure, *_ = panels(3)  # 5 panels, a place is left over
    assert len(figure.axes) == 6
    assert not any(axis.axison for axis in figure.axes)
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_a_map_without_differences_is_drawn_too(tmp_path):
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    visualize_attention.write_pictures(tmp_path, image, torch.full((2, 2, 2), 0.2), 16, 0.5)
    assert len(np.unique(read(tmp_path / "attn-head1.png"))) == 3  # one colour


# ---- images ----


def test_one_number_is_the_side_of_a_square():
    args = arguments("--image_size", 96)
    visualize_attention.check_args(args)
    assert args.image_size == [96, 96]


def test_the_whole_image_is_resized_to_height_and_width_bilinearly():
    ramp = Image.fromarray(np.tile(np.arange(0, 200, 20, dtype=np.uint8), (50, 1))).convert("RGB")  # 10 × 50
    got = visualize_attention.prepare(ramp, (20, 200), 16)
    assert got.shape == (3, 16, 192)
    centres = (np.arange(192) + 0.5) / 20 - 0.5  # of the new pixels, in old ones
    assert np.abs(got[0, 0].numpy() - 20 * centres.clip(0, 9)).max() <= 0.51


def test_a_photograph_that_is_installed_stands_in_without_image_path():
    (path,) = visualize_attention.find_images(None)
    assert Image.open(path).size == (512, 512)


def test_images_of_a_folder_come_by_name_and_other_files_are_left(photograph, tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(photograph.read_bytes())
    found = visualize_attention.find_images([photograph, tmp_path])
    assert found == [photograph, tmp_path / "a.JPG", tmp_path / "b.png"]


def test_images_of_one_name_get_folders_of_their_own():
    paths = [visualize_attention.Path(name) for name in ("x/cat.png", "y/cat.jpg", "cat-2.png", "z/Cat.png", "dog.png")]
    folders = visualize_attention.output_folders(paths, "out")
    assert [folder.name for folder in folders] == ["cat", "cat-2", "cat-2-2", "Cat-3", "dog"]
    assert {folder.parent.name for folder in folders} == {"out"}


def test_several_images_get_a_folder_each_with_what_each_would_have_alone(pictures, weights, photograph, tmp_path):
    (tmp_path / "in").mkdir()
    (other,) = visualize_attention.find_images(None)
    for name, source in (("a.png", photograph), ("b.png", other)):
        (tmp_path / "in" / name).write_bytes(source.read_bytes())
    flags = ["--pretrained_weights", weights, "--image_size", 70, 100, "--threshold", 0.6]
    run(*flags, "--image_path", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    for path in pictures.iterdir():
        assert np.array_equal(read(path), read(tmp_path / "out" / "a" / path.name)), path.name
    assert not np.array_equal(read(pictures / "img.png"), read(tmp_path / "out" / "b" / "img.png"))


def test_a_real_photograph_in_full_size_and_small_patches(tmp_path):
    path = sorted(shared("data/imagenet_100").iterdir())[0]
    run("--pretrained_weights", "random", "--patch_size", 8, "--image_path", path, "--output_dir", tmp_path)
    assert read(tmp_path / "attn-head3.png").shape == read(tmp_path / "img.png").shape == (480, 480, 3)


def test_no_threshold_no_masks(photograph, tmp_path):
    run("--pretrained_weights", "random", "--image_path", photograph, "--image_size", 32, "--output_dir", tmp_path)
    assert not list(tmp_path.glob("mask*"))


# ---- errors ----


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image_path", "/no/where.png"], "--image_path /no/where.png: there is no such file or folder"),
        (["--image_path", "EMPTY"], "has no images in it"),
        (["--image_path", "CAT", "DAMAGED"], "can't read the image"),
        (["--arch", "resnet50"], "--arch resnet50 has no CLS token"),
        (["--arch", "vit_smal"], "did you mean vit_small"),
        (["--image_size", "15", "40"], "--image_size 15 40 is smaller than one patch (--patch_size 16)"),
        (["--image_size", "40", "15"], "--image_size 40 15 is smaller than one patch (--patch_size 16)"),
        (["--image_size", "1", "2", "3"], "--image_size 1 2 3: give height and width"),
        (["--image_size", "0"], "--image_size 0 must be at least 1"),
        (["--patch_size", "0"], "--patch_size 0 must be at least 1"),
        (["--threshold", "0"], "--threshold 0.0 must be above 0"),
        (["--threshold", "1.1"], "--threshold 1.1 must be above 0 and at most 1"),
        (["--threshold", "nan"], "--threshold nan must be above 0"),
        (["--pretrained_weights", "/no/where.pth"], "there is no file /no/where.pth"),
        (["--pretrained_weights", "WEIGHTS", "--arch", "vit_tiny"], "Check --arch"),
        (["--pretrained_weights", "NAN"], "is not finite: the network has diverged"),
        (["--output_dir", "CAT"], "can't write to --output_dir"),
    ],
)
def test_what_the_user_can_put_right_ends_with_one_line_and_code_2(
    monkeypatch, capsys, weights, photograph, tmp_path, flags, says
):
    places = {"CAT": photograph, "WEIGHTS": weights}
    places |= {name: tmp_path / name.lower() for name in ("EMPTY", "DAMAGED", "NAN")}
    places["EMPTY"].mkdir()
    places["DAMAGED"].write_bytes(photograph.read_bytes()[:3000])
    diverged = backbone()
    diverged.blocks[2].mlp.fc1.bias.data[0] = float("nan")
    torch.save(diverged.state_dict(), places["NAN"])
    flags = [places.get(flag, flag) for flag in flags]
    standard = ["--pretrained_weights", "random", "--image_path", photograph, "--image_size", 32]
    code, error = end(monkeypatch, capsys, *standard, "--output_dir", tmp_path / "out", *flags)
    assert code == 2
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_in_the_place_of_a_picture_is_named(monkeypatch, capsys, photograph, tmp_path):
    (tmp_path / "attn-head3.png").mkdir()
    flags = ["--pretrained_weights", "random", "--image_path", photograph, "--image_size", 32]
    code, error = end(monkeypatch, capsys, *flags, "--output_dir", tmp_path)
    assert code == 2
    assert "has a folder named attn-head3.png" in error
    assert [path.name for path in tmp_path.iterdir()] == ["attn-head3.png"]


def test_an_input_is_not_overwritten(monkeypatch, capsys, photograph, tmp_path):
    image = tmp_path / "img.png"
    image.write_bytes(photograph.read_bytes())
    flags = ["--pretrained_weights", "random", "--image_size", 32, "--image_path", image]
    code, error = end(monkeypatch, capsys, *flags, "--output_dir", tmp_path)
    assert code == 2
    assert f"--image_path {image} would be overwritten" in error
    assert image.read_bytes() == photograph.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_breaks_off_leaves_no_pictures(monkeypatch, photograph, tmp_path):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(visualize_attention, "draw_overview", broken)
    with pytest.raises(KeyboardInterrupt):
        run("--pretrained_weights", "random", "--image_path", photograph, "--output_dir", tmp_path, "--image_size", 32)
    assert not list(tmp_path.iterdir())


# ---- the whole command ----


def test_the_command_of_the_readme_works_without_an_image_of_ones_own(tmp_path):
    flags = ["--pretrained_weights", "random", "--image_size", 64, "--threshold", 0.6, "--output_dir", tmp_path]
    done = run_script(ROOT / "visualize_attention.py", *SMALL, *flags)
    assert "astronaut.png: 4 heads, 4 × 4 patches" in done.stdout
    assert len(list(tmp_path.iterdir())) == 10
