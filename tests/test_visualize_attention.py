"""Attention images: every picture against a float64 reference, and the script end to end."""

import math
import resource

import numpy as np
import pytest
import torch
from conftest import arguments_of, assert_near, run_script, shared, sharp_nano
from PIL import Image

import dino_features
import utils
import visualize_attention

SMALL = ["--arch", "vit_nano", "--patch_size", "16", "--device", "cpu"]
MEAN, STD = (np.array(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def arguments(*flags):
    return arguments_of(visualize_attention, *SMALL, *flags)


def run(*flags):
    visualize_attention.main(arguments(*flags))


def backbone():
    return sharp_nano(48)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(backbone().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A photograph of 100 × 70 pixels, not a multiple of the patch size."""
    path = tmp_path_factory.mktemp("photograph") / "cat.png"
    (source,) = visualize_attention.find_images(None)
    Image.open(source).crop((100, 0, 400, 210)).resize((100, 70)).save(path)
    return path


POINTS = (0.2, 0.9, 1, 0)  # the patches in row 3, column 1, and in row 0, column 5


@pytest.fixture(scope="module")
def pictures(weights, photograph, tmp_path_factory):
    """The folder of a finished run: 70 × 100 pixels make 4 × 6 whole patches of 16."""
    out = tmp_path_factory.mktemp("pictures")
    flags = ["--pretrained_weights", weights, "--image_path", photograph, "--image_size", 70, 100]
    run(*flags, "--threshold", 0.6, "--points", *POINTS, "--output_dir", out)
    return out


def seen_by_the_network(photograph):
    """Input of the network, float64 [3, 64, 96]: the photograph without its last 6 rows and 4 columns."""
    pixels = np.asarray(Image.open(photograph).convert("RGB"))[:64, :96]
    return (pixels.transpose(2, 0, 1) / 255 - MEAN) / STD


def attention_of_cls(model, image, token=0):
    """Attention of a token to the patches in the last block, [heads, h, w] float64, for an image [3, H, W]."""
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
        scores = [math.exp(queries[token, part] @ key[part] / math.sqrt(side)) for key in keys]
        maps.append([score / sum(scores) for score in scores[1:]])
    rows, columns = (n // model.patch_embed.patch_size for n in image.shape[1:])
    return np.array(maps).reshape(heads, rows, columns)


def largest(attention, share):
    """Mask of the smallest set of patches with this share of a map [h, w], adding the largest one by one."""
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


def test_flags_have_the_published_names_and_defaults():
    published = {"arch": "vit_small", "patch_size": 8, "pretrained_weights": "", "checkpoint_key": "teacher"}
    published |= {"image_path": None, "image_size": [480, 480], "output_dir": ".", "threshold": None}
    ours = {"device": "auto", "exif": False, "points": []}
    assert vars(arguments_of(visualize_attention)) == {**published, **ours}


@pytest.mark.usefixtures("offline")
def test_the_default_weights_are_the_ones_published_for_attention(refusal, tmp_path):
    line = refusal(visualize_attention, "--device", "cpu", "--output_dir", tmp_path)
    assert "dino_deitsmall8_300ep_pretrain.pth" in line


# ---- maps ----


def test_cls_attention_is_a_softmax_over_all_tokens_without_the_entry_of_cls(photograph):
    model, image = backbone(), seen_by_the_network(photograph)
    want = attention_of_cls(model, image)
    got = dino_features.cls_attention(model, torch.from_numpy(image).float()[None])
    assert got.shape == (1, 4, 4, 6)
    assert_near(got[0], want, 1e-5)
    assert want.std() / want.mean() > 0.5  # a flat map would match by chance
    model.set_fused_attention(True)
    assert_near(dino_features.cls_attention(model, torch.from_numpy(image).float()[None])[0], want, 1e-5)


@pytest.mark.parametrize("share", [0.05, 0.37, 0.6, 0.95])
def test_largest_mass_is_the_smallest_set_of_patches_with_the_share(share):
    attention = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(3)) ** 4
    got = dino_features.largest_mass(attention, share)
    want = [[largest(head.numpy().astype(np.float64), share) for head in heads] for heads in attention]
    assert np.array_equal(got.numpy(), want)
    assert 0 < got.sum() < got.numel()


# ---- pictures ----


def test_a_run_writes_its_pictures_and_nothing_else(pictures):
    heads = range(4)
    names = ["img.png", "overview.png", "heads.png", *(f"attn-head{h}.png" for h in heads)]
    names += [*(f"mask_th0.6_head{h}.png" for h in heads), "attn-point0.png", "attn-point1.png"]
    assert sorted(path.name for path in pictures.iterdir()) == sorted(names)


def test_img_is_the_normalized_input_rescaled_to_its_range(pictures, photograph):
    image = seen_by_the_network(photograph)
    want = (image - image.min()) / (image.max() - image.min()) * 255
    got = read(pictures / "img.png").transpose(2, 0, 1)
    assert np.abs(got - want).max() <= 0.51


def test_each_map_is_drawn_in_viridis_one_color_per_patch(pictures, photograph):
    from matplotlib import colormaps

    table = colormaps["viridis"](np.arange(256), bytes=True)[:, :3].astype(int)
    attention = attention_of_cls(backbone(), seen_by_the_network(photograph))
    for head, want in enumerate(attention):
        levels = (want - want.min()) / (want.max() - want.min()) * 255.999
        got = read(pictures / f"attn-head{head}.png").astype(int)
        assert np.abs(got - enlarge_colors(table[levels.astype(int)])).max() <= 4  # two entries of the table
    assert (table[0] == [68, 1, 84]).all()
    assert (table[255] == [253, 231, 36]).all()


def enlarge_colors(colors):
    return np.stack([enlarge(colors[..., c]) for c in range(3)], axis=-1)


def test_masks_darken_the_image_outside_and_draw_an_outline(pictures, photograph):
    attention = attention_of_cls(backbone(), seen_by_the_network(photograph))
    pixels = np.asarray(Image.open(photograph).convert("RGB")).astype(int)[:64, :96]
    for head, got in enumerate(attention):
        mask = enlarge(largest(got, 0.6))
        drawn = read(pictures / f"mask_th0.6_head{head}.png").astype(int)
        outline = np.zeros_like(mask)  # pixels whose neighbor above, below, left or right is on the other side
        outline[1:] |= mask[1:] != mask[:-1]
        outline[:-1] |= mask[1:] != mask[:-1]
        outline[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        outline[:, :-1] |= mask[:, 1:] != mask[:, :-1]
        for part, want in ((outline, (255, 220, 0)), (mask & ~outline, pixels), (~mask & ~outline, pixels // 3)):
            assert part.any()
            assert (drawn[part] == np.broadcast_to(want, drawn.shape)[part]).all()


def test_each_head_has_a_color_where_its_mass_is_and_the_rest_is_gray(pictures, photograph):
    from matplotlib import colormaps

    attention = attention_of_cls(backbone(), seen_by_the_network(photograph))
    gray = np.asarray(Image.open(photograph).convert("RGB"))[:64, :96].mean(axis=2, keepdims=True) / 255
    want = np.repeat(gray, 3, axis=2)
    for row, column in np.ndindex(attention.shape[1:]):
        shares = [a[row, column] / a.max() for a in attention if largest(a, 0.6)[row, column]]
        if shares:
            owner = next(h for h, a in enumerate(attention) if a[row, column] / a.max() == max(shares))
            patch = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            want[patch] = 0.4 * gray[patch] + 0.6 * np.array(colormaps["hsv"](owner / 4)[:3])
    assert np.abs(read(pictures / "heads.png") - 255 * want).max() <= 1
    assert (np.ptp(want, axis=2) == 0).any()


@pytest.mark.parametrize(("number", "patch"), [(0, (3, 1)), (1, (0, 5))])
def test_the_attention_of_a_point_is_the_mean_over_heads_for_its_patch(pictures, photograph, number, patch):
    from matplotlib import colormaps

    attention = attention_of_cls(backbone(), seen_by_the_network(photograph), 1 + patch[0] * 6 + patch[1]).mean(axis=0)
    pixels = np.asarray(Image.open(photograph).convert("RGB"))[:64, :96] / 255
    heat = np.minimum(attention / np.quantile(attention, 0.99), 1)
    want = 0.4 * pixels + 0.6 * enlarge_colors(colormaps["viridis"](heat)[..., :3])
    want[16 * patch[0] : 16 * patch[0] + 16, 16 * patch[1] : 16 * patch[1] + 16] = (1, 0, 0)
    assert np.abs(read(pictures / f"attn-point{number}.png") - 255 * want).max() <= 4  # two entries of the table


def test_a_point_has_two_numbers(refusal, photograph):
    assert "--points has 3 numbers" in refusal(visualize_attention, "--points", 0.1, 0.2, 0.3)
    assert "--points" in refusal(visualize_attention, "--points", 10, 20)


def panels(heads, height=64, width=96):
    """(figure of an overview, its axes with images, the image, the attention)."""
    attention = torch.rand(heads, height // 16, width // 16, generator=torch.Generator().manual_seed(1))
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    figure = visualize_attention.draw_overview(pixels, attention)
    figure.canvas.draw()
    return figure, [axis for axis in figure.axes if axis.images], pixels, attention


def test_the_overview_shows_the_image_the_mean_and_each_head_with_titles():
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


def test_a_constant_map_is_drawn_in_one_color(tmp_path):
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    visualize_attention.write_pictures(tmp_path, image, torch.full((2, 2, 2), 0.2), 16, 0.5)
    assert len(np.unique(read(tmp_path / "attn-head1.png").reshape(-1, 3), axis=0)) == 1


# ---- images ----


def test_the_whole_image_is_resized_bilinearly_and_cropped_to_whole_patches():
    ramp = Image.fromarray(np.tile(np.arange(0, 200, 20, dtype=np.uint8), (50, 1))).convert("RGB")  # 10 × 50
    got = dino_features.prepare(ramp, (20, 200), 16)
    assert got.shape == (3, 16, 192)
    centers = (np.arange(192) + 0.5) / 20 - 0.5  # of the new pixels, in old ones
    assert np.abs(got[0, 0].numpy() - 20 * centers.clip(0, 9)).max() <= 0.51


def test_images_of_a_folder_are_sorted_and_other_files_ignored(photograph, tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(photograph.read_bytes())
    found = visualize_attention.find_images([photograph, tmp_path])
    assert found == [photograph, tmp_path / "a.JPG", tmp_path / "b.png"]


def test_sub_folders_are_searched_too_each_in_the_order_of_numbers(photograph, tmp_path):
    names = ["10.png", "a/2.png", "a/10.png", "a/b/1.png"]
    for name in [*names, ".hidden/1.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(photograph.read_bytes())
    assert visualize_attention.find_images([tmp_path]) == [tmp_path / name for name in names]


@pytest.mark.parametrize(("size", "shape"), [([32], (32, 64)), ([32, 80], (32, 80)), ([50], (48, 96))])
@pytest.mark.parametrize("inputs", [utils.RGB, utils.Inputs(1, (0.5,), (0.2,))])
def test_one_number_is_the_shorter_side(tmp_path, size, shape, inputs):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")  # 100 high
    args = arguments_of(visualize_attention, *SMALL, "--image_size", *size)
    visualize_attention.check_args(args)
    shown, seen = visualize_attention.load(tmp_path / "a.png", args, inputs)
    assert shown.shape[1:] == seen.shape[1:] == shape


def test_images_with_equal_names_get_numbered_folders():
    paths = [visualize_attention.Path(name) for name in ("x/cat.png", "y/cat.jpg", "cat-2.png", "z/Cat.png", "dog.png")]
    folders = visualize_attention.output_folders(paths, "out")
    assert [folder.name for folder in folders] == ["cat", "cat-2", "cat-2-2", "Cat-3", "dog"]
    assert {folder.parent.name for folder in folders} == {"out"}


def test_several_images_get_a_folder_each_with_the_same_pictures_as_alone(pictures, weights, photograph, tmp_path):
    (tmp_path / "in").mkdir()
    (other,) = visualize_attention.find_images(None)
    for name, source in (("a.png", photograph), ("b.png", other)):
        (tmp_path / "in" / name).write_bytes(source.read_bytes())
    flags = ["--pretrained_weights", weights, "--image_size", 70, 100, "--threshold", 0.6, "--points", *POINTS]
    run(*flags, "--image_path", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    for path in pictures.iterdir():
        assert np.array_equal(read(path), read(tmp_path / "out" / "a" / path.name)), path.name
    assert not np.array_equal(read(pictures / "img.png"), read(tmp_path / "out" / "b" / "img.png"))


def test_a_real_photograph_without_threshold_in_full_size(tmp_path):
    path = sorted(shared("data/imagenet_100").iterdir())[0]
    run("--pretrained_weights", "random", "--patch_size", 8, "--image_path", path, "--output_dir", tmp_path)
    assert read(tmp_path / "attn-head3.png").shape == read(tmp_path / "img.png").shape == (480, 480, 3)
    assert not list(tmp_path.glob("mask*"))


# ---- errors ----


@pytest.fixture
def standard(photograph):
    return [*SMALL, "--pretrained_weights", "random", "--image_path", photograph, "--image_size", 32]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_path", "/no/where.png"], "--image_path /no/where.png does not exist"),
        (["--image_path", "EMPTY"], "has no images"),
        (["--image_path", "CAT", "DAMAGED"], "damaged"),
        (["--arch", "resnet50"], "--arch resnet50 has no CLS token"),
        (["--image_size", "15", "40"], "--image_size 15 40 is smaller than one patch (--patch_size 16)"),
        (["--image_size", "1", "2", "3"], "--image_size 1 2 3 has more than two numbers"),
        (["--pretrained_weights", "WEIGHTS", "--arch", "vit_tiny"], "Check --arch"),
        (["--pretrained_weights", "NAN"], "is not finite: the weights are damaged"),
        (["--output_dir", "CAT"], "can't write to --output_dir"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(
    refusal, weights, photograph, standard, tmp_path, flags, message
):
    places = {"CAT": photograph, "WEIGHTS": weights}
    places |= {name: tmp_path / name.lower() for name in ("EMPTY", "DAMAGED", "NAN")}
    places["EMPTY"].mkdir()
    places["DAMAGED"].write_bytes(photograph.read_bytes()[:3000])
    diverged = backbone()
    diverged.blocks[2].mlp.fc1.bias.data[0] = float("nan")
    torch.save(diverged.state_dict(), places["NAN"])
    flags = [*standard, "--output_dir", tmp_path / "out", *(places.get(flag, flag) for flag in flags)]
    line = refusal(visualize_attention, *flags)
    assert message in line
    assert not list((tmp_path / "out").glob("*"))


def test_an_input_is_not_overwritten(refusal, photograph, standard, tmp_path):
    image = tmp_path / "img.png"
    image.write_bytes(photograph.read_bytes())
    flags = [*standard, "--image_path", image, "--output_dir", tmp_path]
    line = refusal(visualize_attention, *flags)
    assert f"--image_path {image} would be overwritten" in line
    assert image.read_bytes() == photograph.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_run_leaves_no_pictures(standard, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # the maps fit, the overview does not
    try:
        with pytest.raises(OSError, match="File too large"):
            visualize_attention.main(arguments_of(visualize_attention, *standard, "--output_dir", tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_command_line_draws_the_default_image(tmp_path):
    flags = ["--pretrained_weights", "random", "--image_size", 64, "--threshold", 0.6, "--output_dir", tmp_path]
    done = run_script("visualize_attention.py", *SMALL, *flags)
    assert "astronaut.png: 4 heads, 4 × 4 patches" in done.stdout
    assert len(list(tmp_path.iterdir())) == 11
