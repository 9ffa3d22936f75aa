"""Attention videos: decoded frames, attention images and masks against references, and the script end to end."""

import os
import re
import resource
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import arguments_of, assert_near, shared, sharp_nano
from PIL import Image

import dino_backbones
import dino_sample
import utils
import video_generation

SMALL = ["--arch", "vit_nano", "--patch_size", "16", "--device", "cpu"]


def run(*flags):
    video_generation.main(arguments_of(video_generation, *SMALL, *flags))


@pytest.fixture
def error_line(refusal):
    """error_line(*flags) -> the error line of a run that exits with code 2."""
    return partial(refusal, video_generation, *SMALL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save(sharp_nano(48).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """12 frames of 100 × 72 pixels, a window that moves over a photograph, numbered without leading zeros."""
    folder = tmp_path_factory.mktemp("frames")
    photograph = next(path for path in dino_sample.find_photographs() if path.endswith("coffee.png"))
    with Image.open(photograph) as image:
        for i in range(12):
            image.crop((20 * i, 10 * i, 20 * i + 300, 10 * i + 216)).resize((100, 72)).save(folder / f"shot{i}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


@pytest.fixture(scope="module")
def clip(frames, tmp_path_factory):
    """The same 12 frames as a video with 10 frames per second."""
    path = tmp_path_factory.mktemp("clip") / "a: clip.mp4"
    video_generation.write_video(path, (read(frames / f"shot{i}.png") for i in range(12)), 10)
    return path


@pytest.fixture(scope="module")
def from_folder(weights, frames, tmp_path_factory):
    """The output of a run on the folder: 72 × 100 pixels are 4 × 6 whole patches of 16."""
    out = tmp_path_factory.mktemp("out")
    run("--pretrained_weights", weights, "--input_path", frames, "--output_path", out, "--fps", 12.5)
    return out


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def decode(path):
    """(frames [N, H, W, 3], metadata) of a video."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.video[0]
        said = {"codec": stream.codec_context.name, "format": stream.pix_fmt, "rate": stream.average_rate}
        pictures = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    said["seconds between"] = np.diff([time for time, _ in pictures])
    return np.stack([picture for _, picture in pictures]), said


def mean_attention(weights, path):
    """Attention of CLS, mean over heads, float64 [4, 6], in a frame cropped to whole patches."""
    model, _ = dino_backbones.build_backbone("vit_nano", 16, 48)
    model.load_state_dict(torch.load(weights, weights_only=True))
    pixels = read(path)[:64, :96].transpose(2, 0, 1) / 255
    mean, std = (np.array(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        maps = model.double().get_last_selfattention(torch.from_numpy((pixels - mean) / std)[None])[0]
    return np.array([[sum(head[0, 1 + 6 * y + x] for head in maps) / len(maps) for x in range(6)] for y in range(4)])


def in_inferno(attention):
    """The colors of a map [h, w], rescaled to its range, with 16 × 16 pixels per patch."""
    from matplotlib import colormaps

    levels = (attention - attention.min()) / (attention.max() - attention.min())
    colors = colormaps["inferno"](np.minimum(levels * 256, 255).astype(int), bytes=True)[..., :3]
    return np.stack([np.kron(colors[..., c], np.ones((16, 16), dtype=np.uint8)) for c in range(3)], axis=-1)


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(float) - b).mean()


def test_flags_have_the_published_names_and_defaults():
    published = {"arch": "vit_small", "patch_size": 8, "pretrained_weights": "", "checkpoint_key": "teacher"}
    published |= {"input_path": "in", "output_path": "./", "threshold": 0.6, "resize": None, "video_only": False}
    published |= {"fps": 30.0, "video_format": "mp4"}
    assert vars(arguments_of(video_generation, "--input_path", "in")) == {**published, "device": "auto"}


@pytest.mark.usefixtures("offline")
def test_the_default_weights_are_the_ones_published_for_attention(error_line, frames, tmp_path):
    flags = ["--arch", "vit_small", "--patch_size", 8, "--input_path", frames, "--output_path", tmp_path]
    assert "dino_deitsmall8_300ep_pretrain.pth" in error_line(*flags)


# ---- a folder of frames ----


def test_output_files_are_named_after_the_frames(from_folder):
    assert names_in(from_folder) == ["attention", "masks", "video.mp4"]
    assert names_in(from_folder / "attention") == sorted(f"attn-shot{i}.jpg" for i in range(12))
    assert names_in(from_folder / "masks") == sorted(f"mask-shot{i}.jpg" for i in range(12))


@pytest.mark.parametrize("number", [2, 11])
def test_attention_is_the_mean_over_heads_in_inferno(number, from_folder, weights, frames):
    want = in_inferno(mean_attention(weights, frames / f"shot{number}.png"))
    got = read(from_folder / "attention" / f"attn-shot{number}.jpg")
    assert difference(got, want) < 4  # of 255: JPEG compression
    assert difference(got, want[::-1]) > 20
    assert difference(got, want[:, ::-1]) > 20


@pytest.mark.parametrize("number", [2, 11])
def test_masks_darken_the_frame_outside_the_share_of_the_mean_attention(number, from_folder, weights, frames):
    attention = mean_attention(weights, frames / f"shot{number}.png")
    kept, held = np.zeros((4, 6), dtype=bool), 0.0
    for place in np.argsort(-attention, axis=None):  # add the largest one by one
        if held < 0.6 * attention.sum():
            kept.flat[place] = True
            held += attention.flat[place]
    assert 0 < kept.sum() < 24
    pixels = read(frames / f"shot{number}.png")[:64, :96]
    want = np.where(np.kron(kept, np.ones((16, 16), dtype=bool))[..., None], pixels, pixels / 4)
    got = read(from_folder / "masks" / f"mask-shot{number}.jpg")
    assert difference(got, want) < 4
    assert difference(got, pixels) > 15


def test_the_video_shows_the_attention_images_in_numeric_order(from_folder):
    got, said = decode(from_folder / "video.mp4")
    want = np.stack([read(from_folder / "attention" / f"attn-shot{i}.jpg") for i in range(12)])
    assert difference(got, want) < 5
    for i in range(11):  # each frame is closer to its own image than to the next one
        assert difference(got[i], want[i]) < difference(got[i], want[i + 1])
    assert (said["codec"], said["format"], said["rate"]) == ("h264", "yuv420p", 12.5)
    assert_near(said["seconds between"], np.full(11, 1 / 12.5), 1e-3)


def test_an_mp4_starts_with_its_index(from_folder):
    content = (from_folder / "video.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_a_batch_gives_the_same_images_as_single_frames(from_folder, weights, frames, tmp_path):
    """12 frames are a full batch of 8 and a partial one. A run on one frame is a batch of 1."""
    for i in (0, 7, 8, 11):
        (tmp_path / str(i)).mkdir()
        shutil.copy(frames / f"shot{i}.png", tmp_path / str(i))
        run("--pretrained_weights", weights, "--input_path", tmp_path / str(i), "--output_path", tmp_path)
        name = f"attention/attn-shot{i}.jpg"
        assert difference(read(tmp_path / name), read(from_folder / name)) < 0.5


def test_masks_can_be_disabled(frames, tmp_path):
    flags = ["--pretrained_weights", "random", "--input_path", frames, "--output_path", tmp_path]
    run(*flags, "--threshold", "none")
    assert names_in(tmp_path) == ["attention", "video.mp4"]


@pytest.mark.parametrize(("resize", "size"), [(["36"], (32, 48)), (["50", "40"], (48, 32))])
def test_resize_sets_the_shorter_side_or_height_and_width(resize, size, frames, tmp_path):
    flags = ["--pretrained_weights", "random", "--input_path", frames, "--output_path", tmp_path]
    run(*flags, "--resize", *resize)
    assert read(tmp_path / "attention" / "attn-shot0.jpg").shape[:2] == size
    assert read(tmp_path / "masks" / "mask-shot0.jpg").shape[:2] == size
    assert decode(tmp_path / "video.mp4")[0].shape[1:3] == size


def test_resize_makes_frames_of_different_sizes_equal(frames, tmp_path):
    (tmp_path / "in").mkdir()
    for i, side in enumerate((40, 60)):
        Image.open(frames / "shot0.png").resize((side, 50)).save(tmp_path / "in" / f"{i}.png")
    flags = ["--pretrained_weights", "random", "--input_path", tmp_path / "in", "--output_path", tmp_path]
    run(*flags, "--resize", 32, 48)
    assert decode(tmp_path / "video.mp4")[0].shape == (2, 32, 48, 3)
    with pytest.raises(utils.UserError, match=r"1\.png has 60 × 50 pixels, .*0\.png has 40 × 50"):
        run(*flags, "--resize", 32)


def test_an_odd_size_is_padded_to_an_even_one(frames, tmp_path):
    flags = ["--pretrained_weights", "random", "--input_path", frames, "--output_path", tmp_path, "--patch_size", 5]
    run(*flags, "--resize", 35, 45)
    assert read(tmp_path / "attention" / "attn-shot0.jpg").shape == (35, 45, 3)
    got = decode(tmp_path / "video.mp4")[0]
    assert got.shape == (12, 36, 46, 3)
    assert difference(got[3, :35, :45], read(tmp_path / "attention" / "attn-shot3.jpg")) < 20
    assert np.abs(got[:, 35].astype(float) - got[:, 34]).mean() < 15  # the last row is repeated


# ---- video input and output ----


def test_the_frames_of_a_video_are_written_too(clip, frames, weights, from_folder, tmp_path):
    run("--pretrained_weights", weights, "--input_path", clip, "--output_path", tmp_path, "--fps", 10)
    for folder, start in (("frames", "frame"), ("attention", "attn-frame"), ("masks", "mask-frame")):
        assert names_in(tmp_path / folder) == [f"{start}-{i:05}.jpg" for i in range(12)]
    for i in range(12):
        assert difference(read(tmp_path / "frames" / f"frame-{i:05}.jpg"), read(frames / f"shot{i}.png")) < 6
    got, said = decode(tmp_path / "video.mp4")
    assert said["rate"] == 10
    assert difference(got, decode(from_folder / "video.mp4")[0]) < 12  # two more rounds of compression


@pytest.mark.parametrize(("flags", "rate"), [([], 10), (["--fps", 24], 24)])
def test_a_video_keeps_its_rate_by_default(clip, tmp_path, flags, rate):
    run("--pretrained_weights", "random", "--input_path", clip, "--output_path", tmp_path, *flags)
    assert decode(tmp_path / "video.mp4")[1]["rate"] == rate


def test_an_avi_is_mpeg4_and_shows_the_same_images(clip, from_folder, weights, frames, tmp_path):
    flags = ["--pretrained_weights", weights, "--input_path", frames, "--output_path", tmp_path]
    run(*flags, "--video_format", "avi", "--fps", 29.97)
    assert not (tmp_path / "video.mp4").exists()
    got, said = decode(tmp_path / "video.avi")
    assert (said["codec"], said["format"]) == ("mpeg4", "yuv420p")
    assert float(said["rate"]) == pytest.approx(29.97, abs=1e-3)
    assert difference(got, decode(from_folder / "video.mp4")[0]) < 6


def test_colors_are_preserved_and_the_color_space_is_declared(tmp_path):
    image = np.zeros((720, 1280, 3), dtype=np.uint8)
    image[:, :640], image[:, 640:] = (200, 60, 40), (30, 80, 220)
    video_generation.write_video(tmp_path / "video.mp4", [image] * 2, 30)
    with av.open(str(tmp_path / "video.mp4")) as container:
        for frame in container.decode(video=0):
            assert int(frame.colorspace) in (5, 6)  # BT.601; players assume BT.709 for large videos
            assert difference(frame.to_ndarray(format="rgb24"), image) < 2


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV can't write a rotation")
def test_the_rotation_stored_by_a_phone_is_applied(clip, tmp_path):
    rotated = tmp_path / "rotated.mp4"
    with av.open(f"file:{clip}") as source, av.open(str(rotated), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    paths, _ = video_generation.extract_frames(rotated, tmp_path / "frames")
    want = np.rot90(decode(clip)[0], axes=(1, 2))  # counterclockwise
    assert difference(np.stack([read(path) for path in paths]), want) < 3


def test_a_truncated_video_is_an_error(clip, tmp_path):
    whole = clip.read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])  # the index comes first, with all frames
    with pytest.raises(utils.UserError, match=r"half\.mp4 as a video after frame \d+: .* Is it complete\?"):
        video_generation.extract_frames(tmp_path / "half.mp4", tmp_path / "frames")


def test_a_video_cut_between_two_frames_gives_a_warning(clip, tmp_path, capsys):
    with av.open(str(clip)) as container:
        end = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[6]
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:end])
    paths, _ = video_generation.extract_frames(tmp_path / "half.mp4", tmp_path / "frames")
    assert len(paths) == 6
    assert "declares 12 frames, but only 6 can be read" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_frame_is_an_error(frames, tmp_path, seed):
    path = tmp_path / "bad.mp4"  # large enough for several threads, which would not report it
    pictures = [Image.open(frames / f"shot{i}.png").resize((320, 256)) for i in range(3)]
    video_generation.write_video(path, map(np.asarray, pictures), 10)
    with av.open(str(path)) as container:
        first = next(container.demux(video=0))
    content, middle = bytearray(path.read_bytes()), first.pos + first.size // 2
    content[middle : middle + 40] = np.random.RandomState(seed).bytes(40)
    path.write_bytes(content)
    with pytest.raises(utils.UserError, match=r"bad\.mp4: frame 0 is damaged. Is it complete\?"):
        video_generation.extract_frames(path, tmp_path / "frames")


def test_a_file_name_may_contain_a_colon(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(clip.parent)
    assert len(video_generation.extract_frames(clip.name, tmp_path / "frames")[0]) == 12


# ---- --video_only ----


def test_video_only_encodes_images_in_numeric_order_without_a_network(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(11):  # growing brighter; odd sides
        Image.new("RGB", (33, 21), (20 * i, 20 * i, 20 * i)).save(tmp_path / "in" / f"attn-{i}.png")
    flags = ["--pretrained_weights", "/no/where.pth", "--video_only", "--fps", 0.5]
    run("--input_path", tmp_path / "in", "--output_path", tmp_path / "out", *flags)
    assert names_in(tmp_path / "out") == ["video.mp4"]
    got, said = decode(tmp_path / "out" / "video.mp4")
    assert got.shape == (11, 22, 34, 3)
    assert np.abs(got.mean(axis=(1, 2, 3)) - 20 * np.arange(11)).max() < 3
    assert said["rate"] == 0.5


def uneven_clip(path, frames, seconds):
    """A video whose frames are shown at these seconds."""
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 100, 72, "yuv420p"
        for i, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(read(frames / f"shot{i}.png"), format="rgb24")
            frame.pts, frame.time_base = round(1000 * second), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("kind", "tolerance"), [("mp4", 0.001), ("avi", 0.01)])
def test_a_video_of_variable_rate_keeps_the_times_of_its_frames(weights, frames, tmp_path, kind, tolerance):
    seconds = [0, 0.033, 0.066, 1.0, 1.033, 2.5]
    uneven_clip(tmp_path / "in.mp4", frames, seconds)
    flags = ["--pretrained_weights", weights, "--input_path", tmp_path / "in.mp4", "--video_format", kind]
    run(*flags, "--output_path", tmp_path / "out")
    pictures, said = decode(tmp_path / "out" / f"video.{kind}")
    assert len(pictures) == 6
    assert np.abs(np.cumsum(said["seconds between"]) - seconds[1:]).max() <= tolerance
    run(*flags, "--output_path", tmp_path / "fixed", "--fps", 10)
    assert np.allclose(decode(tmp_path / "fixed" / f"video.{kind}")[1]["seconds between"], 0.1)


def test_two_frames_at_one_time_are_both_kept(tmp_path):
    images = [np.full((32, 32, 3), level, np.uint8) for level in (0, 80, 160, 240)]
    assert video_generation.write_video(tmp_path / "a.mp4", images, [5.0, 5.5, 5.5, 7.0]) == 4
    assert np.allclose(decode(tmp_path / "a.mp4")[1]["seconds between"], [0.5, 0.001, 1.499])


def test_numbers_in_file_names_are_sorted_as_numbers(tmp_path):
    names = ["f1.png", "f2.png", "f10.png", "f10b.png", "g1-2.png", "g1-10.png", "g1²3.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in video_generation.frame_files(tmp_path)] == names


# ---- earlier results ----


def test_the_same_command_again_gives_the_same_files_without_a_warning(from_folder, weights, frames, tmp_path, capsys):
    shutil.copytree(from_folder, tmp_path, dirs_exist_ok=True)
    run("--pretrained_weights", weights, "--input_path", frames, "--output_path", tmp_path, "--fps", 12.5)
    assert "warning" not in capsys.readouterr().out
    for path in from_folder.rglob("*.jpg"):
        assert (tmp_path / path.relative_to(from_folder)).read_bytes() == path.read_bytes()
    assert difference(decode(tmp_path / "video.mp4")[0], decode(from_folder / "video.mp4")[0]) < 0.5


def test_images_of_an_earlier_run_are_kept_with_a_warning(from_folder, clip, tmp_path, capsys):
    shutil.copytree(from_folder, tmp_path, dirs_exist_ok=True)
    run("--pretrained_weights", "random", "--input_path", clip, "--output_path", tmp_path)
    out = capsys.readouterr().out
    assert f"warning: {tmp_path}/attention also has 12 attn-*.jpg of an earlier run, such as attn-shot0.jpg" in out
    assert f"warning: {tmp_path}/masks also has 12 mask-*.jpg" in out
    assert len(names_in(tmp_path / "attention")) == 24


@pytest.mark.parametrize("place", ["attention", "masks", "video.mp4"])
def test_an_input_is_not_overwritten(place, from_folder, tmp_path, error_line):
    shutil.copytree(from_folder, tmp_path, dirs_exist_ok=True)
    line = error_line("--input_path", tmp_path / place, "--output_path", tmp_path)
    assert f"--input_path {tmp_path / place} would be overwritten" in line


def test_an_interrupted_run_changes_nothing(from_folder, frames, tmp_path):
    shutil.copytree(from_folder, tmp_path, dirs_exist_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # the images fit, the video does not
    try:
        with pytest.raises(OSError, match="File too large"):
            run("--pretrained_weights", "random", "--input_path", frames, "--output_path", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == names_in(from_folder)
    for path in (path for path in from_folder.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(from_folder)).read_bytes() == path.read_bytes()


# ---- errors ----


@pytest.fixture(scope="module")
def bad(clip, frames, tmp_path_factory):
    """Unusable inputs, by name."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("TORN", "SIZES", "TWICE", "TINY"):
        (root / name).mkdir()
    first = (frames / "shot0.png").read_bytes()
    (root / "TORN" / "0.png").write_bytes(first)
    (root / "TORN" / "1.png").write_bytes(first[: len(first) // 2])
    (root / "SIZES" / "0.png").write_bytes(first)
    Image.new("RGB", (99, 72)).save(root / "SIZES" / "1.png")
    for name in ("0.png", "0.jpg"):
        (root / "TWICE" / name).write_bytes(first)
    Image.new("RGB", (40, 15)).save(root / "TINY" / "0.png")
    (root / "TEXT").write_text("hello\n" * 99)
    (root / "PICTURE").write_bytes(first)
    (root / "CUT").write_bytes(clip.read_bytes()[:300])
    noise = np.random.RandomState(0).randint(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    video_generation.write_video(root / "HALF.avi", noise, 30)
    os.truncate(root / "HALF.avi", (root / "HALF.avi").stat().st_size // 2)
    with av.open(str(root / "SOUND.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with av.open(str(root / "FRAMELESS.avi"), "w") as container:
        container.add_stream("mpeg4", rate=30).width = 32
        container.streams.video[0].height = 32
        container.start_encoding()
    return {path.stem: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_path", "/no/where"], "--input_path /no/where does not exist"),
        (["--input_path", "TORN"], "1.png"),
        (["--input_path", "SIZES"], "1.png has 99 × 72 pixels"),
        (["--input_path", "TWICE"], "have the same name. Rename or remove one"),
        (["--input_path", "TINY"], "40 × 15 pixels are less than one patch (--patch_size 16)"),
        (["--resize", "10"], "13 × 10 pixels are less than one patch"),
        (["--input_path", "TEXT"], "as a video: Invalid data found"),
        (["--input_path", "CUT"], "is not a video"),
        (["--input_path", "HALF"], "HALF.avi: frame 18 is damaged. Is it complete?"),
        (["--input_path", "SOUND"], "is not a video"),
        (["--input_path", "FRAMELESS"], "has no frames"),
        (["--input_path", "PICTURE", "--video_only"], "--video_only needs a folder of attention images"),
        (["--video_only", "--resize", "32"], "Remove --resize"),
        (["--arch", "resnet50"], "--arch resnet50 has no CLS token"),
        (["--output_path", "PICTURE"], "can't write to --output_path"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(error_line, bad, frames, tmp_path, flags, message):
    flags = [bad.get(flag, flag) for flag in flags]
    standard = ["--pretrained_weights", "random", "--input_path", frames, "--output_path", tmp_path]
    assert message in error_line(*standard, *flags)
    assert not list(tmp_path.iterdir())


def test_attention_that_is_not_finite_is_an_error(error_line, frames, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["blocks.1.mlp.fc1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    flags = ["--pretrained_weights", tmp_path / "nan.pth", "--input_path", frames, "--output_path", tmp_path / "out"]
    assert "the attention is not finite" in error_line(*flags)
    assert not (tmp_path / "out").exists()  # made by the run, and empty


def test_the_position_of_damage_in_a_video_is_named(error_line, tmp_path):
    video = bytearray(shared("data/clip.mp4").read_bytes())
    video[200_000:204_000] = bytes(4000)
    (tmp_path / "clip.mp4").write_bytes(video)
    flags = ["--pretrained_weights", "random", "--input_path", tmp_path / "clip.mp4", "--output_path", tmp_path / "out"]
    line = error_line(*flags)
    assert re.search(r"clip\.mp4 as a video after frame \d+: Invalid data", line)
    assert not (tmp_path / "out").exists()  # made by the run, and empty


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (Path.touch, "attention", "can't write to --output_path {place}"),
        (Path.touch, "frames", "can't write to --output_path {place}"),
        (Path.touch, "masks", "can't write to --output_path {place}"),
        (Path.mkdir, "video.mp4", "has a folder named video.mp4"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(make, name, message, error_line, frames, tmp_path):
    make(tmp_path / name)
    line = error_line("--input_path", frames, "--output_path", tmp_path)
    assert message.format(place=tmp_path / name) in line
